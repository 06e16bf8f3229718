"""The command line: one file per command; each reads arguments, calls the library and prints.

No command computes anything that the library does not offer. Modules that take long to load, torch
first of all, are imported inside the commands, so that ``--help`` and a mistyped option answer at
once.
"""
