"""Weights on disk: Hugging Face folders, GGUF files and Orbax checkpoints, in and out."""
