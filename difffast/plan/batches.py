"""How many of the steps up to the next key step are decoded together."""

from __future__ import annotations


def count_together(left: int, max_batch: int, sizes: tuple[int, ...] | None) -> int:
    """Return how many of ``left`` steps are decoded in the first batch.

    Args:
        left: steps that are left.
        max_batch: most steps in one batch.
        sizes: sizes that a batch may have, ascending from 1; None: any, and ``left`` steps are cut into batches of
            nearly equal size.
    """
    if sizes is not None:
        most = min(left, max_batch)
        return max(size for size in sizes if size <= most)
    batches = -(-left // max_batch)
    return -(-left // batches)
