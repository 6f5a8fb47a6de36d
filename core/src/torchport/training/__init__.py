"""What wraps a training step: accumulation windows, optimizers and schedulers, random numbers."""
