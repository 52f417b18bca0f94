"""Pure functions on tensors: grids, range search, rounding, packing. Knows no model and no file."""
