"""Submodules that look at the present mode.

Each is a class that is mixed in front of the class of one submodule of the stock model. In full
mode it calls the stock ``forward``; in another mode it does that mode's share of the work: makes
coarse tokens, adds a low-rank update, leaves heads out. What the mode is they read from one `State`
per model, which is set before the stock ``forward`` of the model runs.
"""
