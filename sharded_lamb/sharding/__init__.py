"""Who holds what, in which memory."""
