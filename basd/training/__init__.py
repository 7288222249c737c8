"""Training: frozen arms in, checkpoints, metrics and students out."""
