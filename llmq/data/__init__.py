"""Text into token ids: calibration windows, rows of data sets, instructions."""
