"""The renderer: a Wan diffusion transformer over packed segments."""
