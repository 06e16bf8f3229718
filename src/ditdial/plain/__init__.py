"""Plain text and plain data: the forms of errors, figures, tables and JSON files."""
