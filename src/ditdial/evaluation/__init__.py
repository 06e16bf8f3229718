"""How good pictures are: named features, distances of sets, fidelity of pairs, contact sheets."""
