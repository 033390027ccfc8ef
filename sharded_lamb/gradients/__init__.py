"""How gradients arrive, and what all ranks must know of them."""
