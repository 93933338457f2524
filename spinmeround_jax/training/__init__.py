"""Training: step, loop, optimizer, autoencoder, evaluation and previews during training."""
