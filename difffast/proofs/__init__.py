"""Proofs: on the user's own device, which backend of each operator is right there, and the fastest of those."""

from .prove import prove
from .report import ProofReport

__all__ = ["ProofReport", "prove"]
