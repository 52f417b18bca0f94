"""How long a decode step takes on this machine with each candidate for each group of weights."""
