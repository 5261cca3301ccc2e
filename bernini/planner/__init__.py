"""The planner: a multimodal LLM that writes the ViT embeddings of the target."""
