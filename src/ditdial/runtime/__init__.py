"""One call of an elastic model, from the pipeline's call to the stock ``forward`` and back.

The class of the model leads a call to its `Engine`. The engine asks where the call stands in its
run, has its mode chosen, splits the batch where pictures or guidance branches differ, runs the
stock ``forward`` in each mode and books what that cost. `Surgery` is the only place that changes a
live model, and undoes it.
"""
