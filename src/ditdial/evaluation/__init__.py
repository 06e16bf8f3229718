"""How good pictures are: named features, distances of sets, fidelity of pairs, contact sheets.

An elastic model is compared with what a user would do without it: the base in fewer steps,
diffusers' step caches, another sampler, all at the same seeds, with their seconds beside. Methods
that change the run instead (`rivals.py`) are here as baselines; they are no part of the library's
public face.
"""
