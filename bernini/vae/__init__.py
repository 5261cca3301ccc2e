"""The video autoencoder: from pixels to latents and back."""
