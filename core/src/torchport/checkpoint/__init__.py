"""Checkpoints: written beside their target, verified, and put in place in one step."""
