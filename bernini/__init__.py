"""Bernini: a multimodal LLM plans a video as ViT embeddings, a diffusion transformer renders it."""

__version__ = "0.1.0"
