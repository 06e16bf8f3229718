"""Measurements: calibrations, timings, and where a number comes from."""
