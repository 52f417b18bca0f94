"""The checks of the first seconds: what happens to every weight, and what it needs."""
