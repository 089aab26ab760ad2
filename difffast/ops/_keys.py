"""What a proof is for: an operator, a dtype, shapes, how operands lie in memory, and options."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

#: An operand whose strides nobody asks for: it lies as attention layers and stock blocks lay it out.
ANY = "any"


class Key(NamedTuple):
    """The part of a call on which its proof depends; the device is the table's.

    Attributes:
        operator: its name.
        dtype: of the operands.
        shapes: of the operands that settle all others.
        layouts: how each of them lies in memory, from :func:`name_layout`; empty where that makes no difference.
        options: pairs (name, number) of whatever else the operator asks for.
    """

    operator: str
    dtype: torch.dtype
    shapes: tuple[tuple[int, ...], ...]
    layouts: tuple[str, ...]
    options: tuple[tuple[str, int], ...]

    @classmethod
    def of(
        cls,
        operator: str,
        dtype: torch.dtype,
        shapes: Sequence[Sequence[int]],
        strides: Sequence[Sequence[int]] | None,
        options: Sequence[tuple[str, int]],
    ) -> Key:
        """Return the key of a call.

        Args:
            shapes: of the operands.
            strides: of as many of them; None: they make no difference.
            options: see :class:`Key`.
        """
        sizes = tuple(tuple(int(size) for size in shape) for shape in shapes)
        layouts = () if strides is None else tuple(map(name_layout, sizes, strides))
        return cls(operator, dtype, sizes, layouts, tuple((name, int(value)) for name, value in options))

    def text(self, mode: str | None = None) -> str:
        """Return the key as a line of text, with a mode of :data:`difffast.ops._local.MODES` at its end."""
        shapes = ",".join("x".join(map(str, shape)) for shape in self.shapes)
        options = ",".join(f"{name}={value}" for name, value in self.options)
        parts = (self.operator, str(self.dtype).removeprefix("torch."), shapes, ",".join(self.layouts) or ANY, options)
        return " ".join(part for part in (*parts, mode) if part)

    @classmethod
    def parse(cls, text: str) -> Key:
        """Return the key of a line from :meth:`text` without a mode."""
        operator, dtype, shapes, layouts, *rest = text.split(" ")
        pairs = (pair.split("=") for pair in rest[0].split(",")) if rest else ()
        return cls(
            operator,
            getattr(torch, dtype),
            tuple(tuple(map(int, shape.split("x"))) for shape in shapes.split(",")),
            () if layouts == ANY else tuple(layouts.split(",")),
            tuple((name, int(value)) for name, value in pairs),
        )

    def option(self, name: str) -> int:
        """Return the value of an option; 0 where there is none of this name."""
        return dict(self.options).get(name, 0)

    @property
    def size(self) -> int:
        """How many bytes the operands have."""
        return sum(map(math.prod, self.shapes)) * self.dtype.itemsize


def _dense(shape: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a dense tensor whose dimensions follow each other in this order, the innermost last."""
    strides, step = [0] * len(shape), 1
    for dimension in reversed(order):
        strides[dimension] = step
        step *= shape[dimension]
    return tuple(strides)


#: Orders of dimensions that have a name, the innermost last: [B, C, H, W] or [B, H, N, d] stored as [B, N, H, d].
_ORDERS = {
    "contiguous": {3: (0, 1, 2), 4: (0, 1, 2, 3)},
    "rows": {4: (0, 2, 1, 3)},
    "channels_last": {4: (0, 2, 3, 1)},
}


def name_layout(shape: Sequence[int], strides: Sequence[int]) -> str:
    """Return the name of how a tensor lies in memory; what has no name is called by its strides."""
    for name, orders in _ORDERS.items():
        if len(shape) in orders:
            dense = _dense(shape, orders[len(shape)])
            if all(size == 1 or a == b for size, a, b in zip(shape, dense, strides, strict=True)):
                return name
    return ".".join(str(int(stride)) for stride in strides)


def find_strides(shape: Sequence[int], layout: str) -> tuple[int, ...]:
    """Return strides for which :func:`name_layout` gives this name."""
    if layout in _ORDERS:
        return _dense(shape, _ORDERS[layout][len(shape)])
    return tuple(int(part) for part in layout.split("."))
