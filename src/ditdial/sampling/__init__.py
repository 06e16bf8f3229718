"""Sampling many pictures, each from a seed of its own.

A pipeline for models of pixels, such as the reference model, and seeded batches: picture ``i`` is
the same whatever batch, process or number of processes it is made in.
"""
