"""The training recipe: loss and conditioning dropout, moving average, crash-safe checkpoints."""
