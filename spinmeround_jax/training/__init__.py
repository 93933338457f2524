"""Training of the autoencoder and of the diffusion model."""
