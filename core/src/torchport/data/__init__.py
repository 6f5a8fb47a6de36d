"""Loaders that share a data set out over processes."""
