"""Train a base DiT, an adapter for one, or the metrics' classifier; one TOML recipe each."""
