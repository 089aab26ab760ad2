"""Proofs: on the user's own device, which backend of each operator is right there, and the fastest of those."""

from .report import ProofReport
from .run import prove

__all__ = ["ProofReport", "prove"]
