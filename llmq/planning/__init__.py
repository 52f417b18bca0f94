"""Planning: every weight's scheme, and the memory and disk of a run, checked before any work."""
