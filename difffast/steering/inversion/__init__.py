"""Inversion: the noise and what else a picture needs to come out of a pipeline again."""
