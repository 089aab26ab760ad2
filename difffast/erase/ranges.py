"""What numbers may be; each error names the number, what it must be, and what it is."""

from __future__ import annotations

import math
import numbers
from typing import Any


def check_whole(name: str, value: Any, least: int = 1) -> None:
    """Refuse all but integers from ``least`` on.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_positive(name: str, value: Any) -> None:
    """Refuse all but positive finite numbers.

    Raises:
        ValueError: it is none.
    """
    if not (_is_finite(value) and value > 0):
        raise ValueError(f"{name} must be positive and finite, got {value!r}")


def check_finite(name: str, value: Any, least: float = -math.inf) -> None:
    """Refuse all but finite numbers, from ``least`` on.

    Raises:
        ValueError: it is none.
    """
    if not (_is_finite(value) and value >= least):
        above = "" if least == -math.inf else f" and at least {least:g}"
        raise ValueError(f"{name} must be finite{above}, got {value!r}")


def _is_finite(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
