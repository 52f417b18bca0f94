"""Finished folders in the formats of other programs."""
