"""Submodules that look at the present mode."""
