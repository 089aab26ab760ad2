"""GroupNorm and SiLU of cat([hidden, skip]) without the cat; the kernels are in ``norm_kernels.py``.

Shapes: hidden [B, Ch, H, W], row b uses row b // k of skip [B / k, Cs, H, W].  The skip is read for its moments once,
then once more for the channels that all steps share, and k times only in the channels of the group that begins in
hidden.  The operator's definition and its checks are in ``difffast/ops/skip_norm_silu.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .group_norm_silu import (
    OPTIONS,
    apply,
    coefficients_launch,
    moments,
    splits,
    sums_dtype,
    tiles,
)
from .launch import on_device_of
from .norm_kernels import coefficients_kernel


def forward(
    hidden: Tensor,
    skip: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool,
    *,
    channels_last: bool,
) -> tuple[Tensor, Tensor]:
    """SiLU of the GroupNorm of hidden and skip side by side.

    Args:
        hidden: [B, Ch, H, W] or [B, Ch, N].
        skip: [B / k, Cs, H, W] or [B / k, Cs, N].
        channels_last: whether to compute in that format; the operands may have any.

    Returns:
        per_step [B, E, H, W] and shared [B / k, Ch + Cs - E, H, W]; E is Ch rounded up to whole groups.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    hidden, skip = (x.contiguous(memory_format=layout) for x in (hidden, skip))
    batch, of_hidden, *image = hidden.shape
    channels = of_hidden + skip.shape[1]
    size = channels // groups
    own = -(-of_hidden // size) * size
    per_step, shared = (
        torch.empty((rows, width, *image), dtype=hidden.dtype, device=hidden.device, memory_format=layout)
        for rows, width in ((batch, own), (skip.shape[0], channels - own))
    )
    if not batch:
        return per_step, shared
    repeats, pixels = batch // skip.shape[0], hidden.numel() // (batch * of_hidden)
    tile = tiles(channels, pixels, channels_last)
    parts, span = splits(batch, channels, pixels, tile)
    coefficients = hidden.new_empty(4, batch, channels, dtype=sums_dtype(hidden))
    with on_device_of(hidden):
        weight, bias = weight.contiguous(), bias.contiguous()
        coefficients_kernel[(groups * batch,)](
            moments(hidden, parts, span, tile), moments(skip, parts, span, tile), hidden, weight, bias, hidden, hidden,
            coefficients, batch, channels, of_hidden, repeats, 1, pixels, parts, span, size, eps,
            SHARED=True, ADDED=False, SCALED=False, **coefficients_launch(parts, hidden.dtype), **OPTIONS,
        )  # fmt: skip
        apply(hidden, coefficients, per_step[:, :of_hidden], tile, silu)
        straddling = own - of_hidden
        if straddling:
            apply(skip[:, :straddling], coefficients, per_step[:, of_hidden:], tile, silu, first=of_hidden)
        if own < channels:
            apply(skip[:, straddling:], coefficients, shared, tile, silu, first=own)
    return per_step, shared
