"""The user's request: Recipe, Calibration, presets by name, the catalog of methods."""
