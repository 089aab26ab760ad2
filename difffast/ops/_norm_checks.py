"""What the operators with a GroupNorm share: checks of their operands, and how these lie in memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._dispatch import Case, Operand

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

#: How an operand lies in memory: its strides, and whether it is contiguous.
Layout = tuple[tuple[int, ...], bool]


def memory_format(x: Tensor) -> torch.memory_format:
    """Return the format that the result has for this operand: channels_last where its channels are neighbours."""
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of an operand are neighbours; where either format fits, it is contiguous."""
    return lies_channels_last((x.stride(), x.is_contiguous()))


def lies_channels_last(layout: Layout) -> bool:
    """Do what :func:`is_channels_last` does, for a signature."""
    strides, contiguous = layout
    return len(strides) == 4 and strides[1] == 1 and not contiguous


def check_norm(name: str, x: Operand, groups: int, others: dict[str, Operand], channels: int = 0) -> None:
    """Check an operand and the norm's ``others``, of which ``weight`` and ``bias`` have ``channels`` (0: as x)."""
    if len(x.shape) not in (3, 4):
        raise ValueError(f"{name} must be [B, C, H, W] or [B, C, N], got {tuple(x.shape)}")
    if not math.prod(x.shape[1:]):
        raise ValueError(f"{name} must have at least one channel and one pixel, got {tuple(x.shape)}")
    if x.dtype not in DTYPES:
        raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    channels = channels or x.shape[1]
    if type(groups) is not int or groups < 1 or channels % groups:
        raise ValueError(f"groups must be an int that divides channels, got {groups!r} and {channels}")
    for other, operand in others.items():
        if other in ("weight", "bias") and operand.shape != (channels,):
            raise ValueError(f"{other} must be [{channels}], got {tuple(operand.shape)}")
        check_like(other, operand, name, x)


def check_like(other: str, operand: Operand, name: str, x: Operand) -> None:
    """Check that another operand has the dtype and the device of x."""
    if operand.dtype != x.dtype or operand.device != x.device:
        raise ValueError(
            f"{other} must be {x.dtype} on {x.device} like {name}, got {operand.dtype} on {operand.device}"
        )


def check_addend(x: Operand, addend: Operand) -> tuple[int, int] | None:
    """Check an addend; return its shape without trailing dimensions of size 1, or None for one in the shape of x."""
    check_like("addend", addend, "x", x)
    shape = addend.shape
    by_row = len(shape) >= 2 and math.prod(shape[2:]) == 1
    if len(shape) < 2 or shape[1] != x.shape[1] or not (by_row or shape[2:] == x.shape[2:]):
        raise ValueError(
            f"addend must be [Ba, {x.shape[1]}] or [Ba, {', '.join(map(str, x.shape[1:]))}], got {tuple(shape)}"
        )
    if shape[0] != x.shape[0] and (not shape[0] or x.shape[0] % shape[0]):
        raise ValueError(f"addend's batch must divide x's, got {shape[0]} and {x.shape[0]}")
    return (shape[0], shape[1]) if by_row else None


def check_rows(name: str, x: Operand, rows: Operand) -> None:
    """Check that there is one number for each channel of each row of x."""
    check_like(name, rows, "x", x)
    if rows.shape[:2] != x.shape[:2] or math.prod(rows.shape[2:]) != 1:
        raise ValueError(f"{name} must be {list(x.shape[:2])}, got {tuple(rows.shape)}")


def make_case(
    x: Operand,
    layout: Layout,
    groups: int,
    addends: int = 0,
    whole: bool = False,
    modulated: bool = False,
    gradient: bool = False,
) -> Case:
    """Return what the local table is asked for a call of group_norm_silu.

    Args:
        x, layout: the operand, and how it lies in memory.
        groups: of the norm.
        addends: rows of an addend; 0: there is none.
        whole: whether each of them has the shape of a row of x.
        modulated: whether there are scale and shift.
        gradient: whether the call will be differentiated.
    """
    options = (
        ("groups", groups),
        ("addends", addends),
        ("whole", whole),
        ("modulated", modulated),
        ("gradient", gradient),
    )
    return Case((x.shape,), (layout[0],), options)
