"""Published models and what they cost, without their weights."""
