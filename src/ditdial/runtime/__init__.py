"""One call of an elastic model."""
