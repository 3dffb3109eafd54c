"""Weights in, weights out: models are folders in the diffusers format."""
