"""One training step: the state it changes, the mean teachers, the pure function itself."""
