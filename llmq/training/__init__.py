"""Training on a frozen base: steps, resumable state, learning curves."""
