"""Recipes that train models with ShardedLamb, and what they share (`training`)."""
