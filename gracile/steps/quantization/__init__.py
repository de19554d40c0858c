"""Number formats in layers: grids, rounding, equalization, and formats chosen within a budget."""
