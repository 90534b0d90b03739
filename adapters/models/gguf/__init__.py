"""GGUF files: which one a model's name means, and how it is made."""
