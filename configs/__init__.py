"""Recipes: data only, one runnable file each, all deltas of `configs.base`."""
