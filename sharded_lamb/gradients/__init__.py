"""How gradients arrive, and the summary of them on which all ranks agree."""
