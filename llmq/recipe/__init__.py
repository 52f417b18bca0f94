"""What is asked for: Recipe, Calibration, presets by name, the catalog of methods."""
