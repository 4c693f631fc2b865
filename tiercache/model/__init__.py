"""The attached transformers model: what it needs, and how it gets its weights."""
