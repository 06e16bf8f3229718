"""What a run is to do, as plain data: modes, schedules, budgets, and who chooses.

A `Mode` is one way to run the network, a `Schedule` says which mode runs at which noise level, a
`Plan` is a schedule bound to the steps of one run with its cost, a `Report` is what really ran. A
`Controller` chooses while the run goes on. What a budget buys is solved here, from the numbers of a
calibration. No model is needed for any of it.
"""
