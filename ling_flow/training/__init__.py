"""Training: the loop, the optimizer, checkpoints and resume, validation loss."""
