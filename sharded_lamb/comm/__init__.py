"""Communication between ranks: process groups, collectives, consistency checks. Independent of LAMB."""
