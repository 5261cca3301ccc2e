"""The renderer's text: prompts, UMT5 features and tables of them."""
