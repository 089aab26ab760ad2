"""Captioned scenes drawn by program, and what tells whether a picture shows one: only developers need them."""
