"""Measurements: calibrations, timings, memory, and where a number comes from.

What cannot be told from shapes is measured on real runs: what each choice of modes loses at each
noise level, and the seconds that it takes on this device. Every record says its command, commit,
machine and versions.
"""
