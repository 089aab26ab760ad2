"""Edits of a picture by its prompt: Prompt-to-Prompt (arXiv 2208.01626), without materialised attention maps."""
