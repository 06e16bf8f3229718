"""Sampling many pictures, each from a seed of its own."""
