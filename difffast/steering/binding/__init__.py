"""Semantic binding: ToMe, "Token Merging for Training-Free Semantic Binding" (arXiv 2411.07132)."""
