"""Training: the loop, its checkpoints, its optimiser and its batches."""
