"""Tensors as nobody would choose them: values far from zero, huge, equal, subnormal or not finite, in every layout."""

import math

import torch
from hypothesis import strategies as st

#: Kinds of values, from the tamest.
FINITE = ("centred", "offset", "one huge", "equal", "zero", "subnormal", "wide")
WILD = ("one infinite", "one nan", "overflowing")
#: How a tensor lies in memory.
LAYOUTS = ("contiguous", "permuted", "storage offset", "stepped", "expanded", "overlapping")

kinds = st.sampled_from(FINITE)
wild_kinds = st.sampled_from(WILD)
layouts = st.sampled_from(LAYOUTS)
seeds = st.integers(0, 2**31 - 1)


def lay_out(shape, layout, generator):
    """Return float64 numbers of a normal distribution, laid out so; a caller who changes them changes the storage."""

    def draw(*sizes):
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    if layout == "permuted":
        return draw(*reversed(shape)).permute(*reversed(range(len(shape))))
    if layout == "storage offset":
        return draw(math.prod(shape) + 3)[3:].view(shape)
    if layout == "stepped":
        return draw(*(2 * size + 1 for size in shape))[tuple(slice(1, None, 2) for _ in shape)]
    if layout == "expanded":
        return draw(1, *shape[1:]).expand(shape)
    if layout == "overlapping":  # a step in any dimension goes to the next number
        return draw(1 + sum(max(0, size - 1) for size in shape)).as_strided(shape, [1] * len(shape))
    return draw(*shape)


def make(shape, dtype, kind, layout, seed):
    """Return a tensor of a kind, whose numbers are exact in its dtype."""
    generator = torch.Generator().manual_seed(seed)
    x = lay_out(shape, layout, generator)
    if not x.numel():
        return _cast(x, dtype)

    def pick(*options):
        return options[int(torch.randint(len(options), (), generator=generator))]

    storage = x.as_strided((x.untyped_storage().nbytes() // 8,), (1,), 0)
    where = tuple(int(torch.randint(size, (), generator=generator)) for size in shape)
    if kind == "offset":
        storage += pick(10.0, 1e2, 1e3, 1e4) * pick(1, -1)
    elif kind == "one huge":
        x[where] = pick(1e2, 1e4, 1e8) * pick(1, -1)
    elif kind == "equal":
        storage.fill_(pick(1.0, -3.0, 1e3 / 3, -1e4))
    elif kind == "zero":
        storage.zero_()
    elif kind == "subnormal":
        storage *= torch.finfo(dtype).smallest_normal / pick(1.0, 8.0, 64.0)
    elif kind == "wide":
        storage *= torch.exp(5 * torch.randn(storage.shape, generator=generator, dtype=torch.float64))
    elif kind == "one infinite":
        x[where] = pick(math.inf, -math.inf)
    elif kind == "one nan":
        x[where] = math.nan
    elif kind == "overflowing":
        # Products of two of them are infinite, sums of them are not.
        storage.copy_(pick(1, -1) * storage.abs().clamp(0.5, 1.0) * torch.finfo(dtype).max ** 0.75)
    return _cast(x, dtype)


def _cast(x, dtype):
    """Return x in another dtype with its strides, its storage offset and what overlaps."""
    storage = x.as_strided((x.untyped_storage().nbytes() // 8,), (1,), 0).to(dtype)
    return storage.as_strided(x.shape, x.stride(), x.storage_offset())
