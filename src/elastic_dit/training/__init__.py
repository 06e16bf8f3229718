"""Train a base DiT, an adapter for one, or the classifier whose features the metrics use; one TOML
recipe each."""
