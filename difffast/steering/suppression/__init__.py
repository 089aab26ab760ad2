"""Content suppression: SuppressEOT, "Get What You Want, Not What You Don't" (arXiv 2402.05375)."""
