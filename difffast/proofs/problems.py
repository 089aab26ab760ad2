"""Problems: the operands that a key stands for, what calls the operator on them, and what defines the result."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..ops._attention_checks import MAX_KEYS, repeat_rows
from ..ops._keys import Key, find_strides
from ..ops.cross_attention import reference as define_cross
from ..ops.geglu import reference as define_geglu
from ..ops.group_norm_silu import reference as define_norm
from ..ops.joint_attention import reference as define_joint
from ..ops.skip_norm_silu import reference as define_skip_norm

#: What the numbers of a problem are like: around 0; far from it (logits with a deviation of 20, pixels with a mean of
#: 100 deviations); with one huge element in each sample of each operand.
DATA = ("normal", "uncentred", "spike")
#: Most maps that a problem asks for.
_MAPS = 12
#: How often small problems are repeated where a few elements make nearly all of the error, and up to which size.
_REPEATED, _REPEATED_SIZE = 16, 1 << 20
#: Most rows of pixels of a norm that varies with all its channels.
_ROWS = 16
#: Elements of NaN before and behind each operand; a multiple of what kernels want operands to be aligned to.
GUARD = 4096


@dataclass(frozen=True)
class Problem:
    """Operands in memory full of NaN.

    Attributes:
        key: what they are operands of.
        tensors: the operands, each a view of an arena.
        arenas: flat tensors, NaN wherever no operand lies.
    """

    key: Key
    tensors: tuple[Tensor, ...]
    arenas: tuple[Tensor, ...]

    def copy(self) -> Problem:
        """Return the same problem elsewhere in memory."""
        arenas = tuple(arena.clone() for arena in self.arenas)
        pairs = zip(arenas, self.tensors, strict=True)
        return Problem(self.key, tuple(a.as_strided(x.shape, x.stride(), GUARD) for a, x in pairs), arenas)


@dataclass(frozen=True)
class Kind:
    """How one operator is set up.

    Attributes:
        layouts: of a key, (shape, layout) of each operand.
        call: the public operator, of the key and its operands; returns a tuple.
        define: the same for operands in float64, in plain PyTorch.
        compose: the same in plain PyTorch, computed in the dtype of the operands; None: the default is that already.
    """

    layouts: Callable[[Key], list[tuple[tuple[int, ...], str]]]
    call: Callable[..., tuple[Tensor, ...]]
    define: Callable[..., tuple[Tensor, ...]]
    compose: Callable[..., tuple[Tensor, ...]] | None


def _lay_attention(key: Key) -> list[tuple[tuple[int, ...], str]]:
    return list(zip(key.shapes, key.layouts or ["rows"] * len(key.shapes), strict=True))


def _lay_norm(key: Key) -> list[tuple[tuple[int, ...], str]]:
    (x,), layout = key.shapes, key.layouts[0]
    found = [(x, layout), ((x[1],), "1"), ((x[1],), "1")]
    rows = key.option("addends")
    if rows:
        found.append(((rows, *x[1:]), layout) if key.option("whole") else ((rows, x[1]), f"{x[1]}.1"))
    if key.option("modulated"):
        found += [(x[:2], f"{x[1]}.1")] * 2
    return found


def _lay_skip_norm(key: Key) -> list[tuple[tuple[int, ...], str]]:
    hidden, skip = key.shapes
    channels = (hidden[1] + skip[1],)
    return [(hidden, key.layouts[0]), (skip, key.layouts[0]), (channels, "1"), (channels, "1")]


def _tokens(key: Key, keys: int) -> list[int] | None:
    return list(range(min(_MAPS, keys))) if key.option("maps") else None


def _as_tuple(found: Any) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def _call_cross(key: Key, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return _as_tuple(ops.cross_attention(q, k, v, sink=key.option("sink"), map_tokens=_tokens(key, k.shape[2])))


def _define_cross(key: Key, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    tokens = _tokens(key, k.shape[2])
    found = define_cross(q, k, v, q.shape[3] ** -0.5, key.option("sink"), tokens or ())
    return found[: 1 + bool(tokens)]


def _compose_cross(key: Key, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return _compose(q, *repeat_rows(q, k, v), key.option("sink"), _tokens(key, k.shape[2]))


def _compose(q: Tensor, k: Tensor, v: Tensor, sink: int, tokens: list[int] | None) -> tuple[Tensor, ...]:
    # As PyTorch's own composition has it, half of the scale goes to either side.
    half = q.shape[3] ** -0.25
    padded = [F.pad(x, (0, 0, 0, sink)) for x in (k, v)] if sink else [k, v]
    p = (q * half @ (padded[0] * half).transpose(-1, -2)).softmax(-1)
    maps = () if tokens is None else (p[..., tokens].float().mean(1),)
    return p @ padded[1], *maps


def _call_joint(key: Key, q: Tensor, tk: Tensor, tv: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return _as_tuple(ops.joint_attention(q, tk, tv, k, v, map_tokens=_tokens(key, tk.shape[2])))


def _define_joint(key: Key, q: Tensor, tk: Tensor, tv: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    tokens = _tokens(key, tk.shape[2])
    return define_joint(q, tk, tv, k, v, q.shape[3] ** -0.5, tokens or ())[: 1 + bool(tokens)]


def _compose_joint(key: Key, q: Tensor, tk: Tensor, tv: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    tk, tv = repeat_rows(q, tk, tv)
    return _compose(q, torch.cat([tk, k], 2), torch.cat([tv, v], 2), 0, _tokens(key, tk.shape[2]))


def _name_norm(key: Key, tensors: Sequence[Tensor]) -> tuple[Tensor, int, Tensor, Tensor, dict[str, Tensor]]:
    x, weight, bias, *rest = tensors
    names = (["addend"] if key.option("addends") else []) + (["scale", "shift"] if key.option("modulated") else [])
    return x, key.option("groups"), weight, bias, dict(zip(names, rest, strict=True))


def _call_norm(key: Key, *tensors: Tensor) -> tuple[Tensor, ...]:
    x, groups, weight, bias, named = _name_norm(key, tensors)
    return (ops.group_norm_silu(x, groups, weight, bias, **named),)


def _define_norm(key: Key, *tensors: Tensor) -> tuple[Tensor, ...]:
    x, groups, weight, bias, named = _name_norm(key, tensors)
    return (define_norm(x, groups, weight, bias, **named),)


def _call_skip_norm(key: Key, hidden: Tensor, skip: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return ops.skip_norm_silu(hidden, skip, key.option("groups"), weight, bias)


def _define_skip_norm(key: Key, hidden: Tensor, skip: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return define_skip_norm(hidden, skip, key.option("groups"), weight, bias)


def _call_self(key: Key, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return (ops.self_attention(q, k, v),)


def _lay_geglu(key: Key) -> list[tuple[tuple[int, ...], str]]:
    return [(key.shapes[0], "contiguous")]


def _call_geglu(key: Key, x: Tensor) -> tuple[Tensor, ...]:
    return (ops.geglu(x),)


def _define_geglu(key: Key, x: Tensor) -> tuple[Tensor, ...]:
    return (define_geglu(x),)


#: Operators whose kernels are proved for each shape.
KINDS: dict[str, Kind] = {
    "cross_attention": Kind(_lay_attention, _call_cross, _define_cross, _compose_cross),
    "geglu": Kind(_lay_geglu, _call_geglu, _define_geglu, None),
    "group_norm_silu": Kind(_lay_norm, _call_norm, _define_norm, None),
    "joint_attention": Kind(_lay_attention, _call_joint, _define_joint, _compose_joint),
    "self_attention": Kind(_lay_attention, _call_self, _define_cross, _compose_cross),
    "skip_norm_silu": Kind(_lay_skip_norm, _call_skip_norm, _define_skip_norm, None),
}


def make_problem(key: Key, data: str, device: torch.device, seed: int = 0) -> Problem:
    """Return operands of a key.

    Args:
        data: one of :data:`DATA`.
        seed: of the random numbers.
    """
    generator = torch.Generator(device).manual_seed(seed)
    norm = "norm" in key.operator
    tensors, arenas = [], []
    for index, (shape, layout) in enumerate(KINDS[key.operator].layouts(key)):
        values = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        if data == "uncentred":
            values = values + 100 if norm and index == 0 else values * 20 if not norm and index == 0 else values + 1
        elif data == "spike" and len(shape) > 1:
            values.flatten(1)[:, values[0].numel() // 3] = 300.0
        strides = find_strides(shape, layout)
        length = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        arena = torch.full((length + 2 * GUARD,), float("nan"), device=device, dtype=key.dtype)
        arena.as_strided(shape, strides, GUARD).copy_(values)
        tensors.append(arena.as_strided(shape, strides, GUARD))
        arenas.append(arena)
    return Problem(key, tuple(tensors), tuple(arenas))


def vary(key: Key, step: int) -> Key | None:
    """Return a key like this one for one sample, and for two heads or four groups at most.

    Args:
        step: how many rows of pixels, and keys of a text, there are more.

    Returns:
        The key; None where nothing would be left.
    """
    shapes, named = [list(shape) for shape in key.shapes], dict(key.options)
    if key.operator == "geglu":
        shapes[0][0], shapes[0][-1] = 1, shapes[0][-1] + 2 * step
    elif "norm" in key.operator:
        for shape in shapes:
            shape[-1] += step
            if key.operator == "skip_norm_silu":  # with all channels, because they say which group straddles
                shape[2:-1] = [min(size, _ROWS) for size in shape[2:-1]]
        shapes[0][0] = shapes[0][0] // shapes[-1][0]  # alone, or as many steps as share a skip
        shapes[-1][0] = 1
        if key.operator == "group_norm_silu":
            size, named["groups"] = shapes[0][1] // named["groups"], min(named["groups"], 4)
            shapes[0][1] = size * named["groups"]
            named["addends"] = min(named["addends"], 1)
    else:
        repeats = shapes[0][0] // shapes[1][0]
        of_text = () if key.operator == "self_attention" else (1, 2)
        for index, shape in enumerate(shapes):
            shape[:2] = 1 if index in of_text else repeats, min(shape[1], 2)
            shape[2] = max(1, min(shape[2] + step, MAX_KEYS)) if index in of_text else shape[2] + step
    if not all(min(shape) > 0 for shape in shapes):
        return None
    layouts = tuple(each if each[0].isalpha() else "rows" for each in key.layouts)
    return key._replace(shapes=tuple(map(tuple, shapes)), layouts=layouts, options=tuple(named.items()))


def repeat(key: Key) -> Key:
    """Return a small key for more samples, so that an error's root mean square is no matter of luck."""
    repeats = max(1, min(_REPEATED, _REPEATED_SIZE // max(1, sum(map(math.prod, key.shapes)))))
    named = dict(key.options)
    if named.get("addends"):
        named["addends"] *= repeats
    shapes = tuple((shape[0] * repeats, *shape[1:]) for shape in key.shapes)
    return key._replace(shapes=shapes, options=tuple(named.items()))
