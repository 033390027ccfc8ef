"""Messages between ranks: who talks to whom, and in which order. Nothing of LAMB."""
