"""Training: the loop, its state, what watches it, and the folder of a run."""
