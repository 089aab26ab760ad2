"""Names that have changed: the old ones work for one release and say what to write instead."""

from __future__ import annotations

import warnings


def warn_renamed(old: str, new: str, *, stacklevel: int = 3) -> None:
    """Warn that ``old`` is now called ``new``."""
    text = f"difffast: {old} is now {new}; the old name goes with 0.3"
    warnings.warn(text, DeprecationWarning, stacklevel=stacklevel)
