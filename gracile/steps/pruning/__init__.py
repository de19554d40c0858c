"""Which weights, units and blocks go, and what becomes of those that stay."""
