"""Plain text and plain data: the forms of errors, figures, tables and JSON files.

What a person reads is formed here: errors say ``name = value; legal: ...`` and what may have been
meant, counts and shares are rounded alike, a table looks alike in a terminal and in a notebook, and
a JSON file is either complete or absent. Nothing here knows what a Diffusion Transformer is.
"""
