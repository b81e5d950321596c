"""Text-to-image latent diffusion in JAX: captions and noise => pictures."""
