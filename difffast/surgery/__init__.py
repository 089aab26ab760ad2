"""Reversible changes to other people's objects, and ways to look at them without changing anything."""
