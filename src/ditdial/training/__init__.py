"""Train a base DiT, an adapter for one, or the metrics' classifier; one TOML recipe each.

One loop for all tasks, under accelerate, that is resumed bit for bit: nothing random lives across
steps. What is learnt is an objective (`ditdial.training.objectives`), from the data or from the
base itself.
"""
