"""What was written down: the records of a run, packs, checkpoints, and the environment."""
