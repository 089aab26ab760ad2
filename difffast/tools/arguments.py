"""What the commands' arguments have in common."""

from __future__ import annotations

import argparse
import math


def positive(text: str) -> int:
    """Return an argument as an int of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def positive_seconds(text: str) -> float:
    """Return an argument as a positive number."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive and finite, got {text}")
    return value


def finite(text: str) -> float:
    """Return an argument as a finite number."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be finite, got {text}")
    return value


def seed(text: str) -> int:
    """Return an argument as a seed, which has 64 bits."""
    value = int(text)
    if not -(2**63) <= value < 2**64:
        raise argparse.ArgumentTypeError(f"must be a number of 64 bits, got {text}")
    return value


def choose_device(asked: str | None) -> str:
    """Return the device that was asked for, or the best one.

    Raises:
        ValueError: this machine has no such device.
    """
    import torch

    if asked is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=asked)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {asked} cannot be used here: {str(error).splitlines()[0]}") from None
    return asked
