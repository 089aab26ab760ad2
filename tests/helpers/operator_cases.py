"""One call of each operator, drawn at random, and its definition in plain PyTorch, written anew from the docstrings."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from drawn_operands import (
    Case,
    _dims,
    _few,
    _keys,
    _scales,
    _sizes,
    _tiles,
    _tokens,
    attend,
    attention_sizes,
    draw_operands,
    find_spread,
    norm_sizes,
    normalise,
    reach,
)
from hypothesis import assume
from hypothesis import strategies as st

from difffast import ops


@st.composite
def cross_attention(draw, dtype, kinds):
    rows, repeats = draw(_few), draw(_few)
    heads, queries, keys, dim = draw(_few), draw(st.sampled_from([0, 1, 2, 33, 64, 65, 70])), draw(_keys), draw(_dims)
    scale, sink, tokens = draw(_scales), draw(st.sampled_from([0, 1, 5])), _tokens(draw, keys)
    batch = 0 if draw(st.integers(0, 9)) == 9 else rows * repeats
    rows = draw(st.sampled_from([0, rows])) if not batch else rows
    shapes = {"q": (batch, heads, queries, dim), "k": (rows, heads, keys, dim), "v": (rows, heads, keys, dim)}

    def call(q, k, v):
        result = ops.cross_attention(q, k, v, scale=scale, sink=sink, map_tokens=tokens)
        return (result,) if tokens is None else result

    def define(q, k, v):
        k, v = (x.repeat_interleave(q.shape[0] // max(1, rows), 0) for x in (k, v))
        factor = dim**-0.5 if scale is None else scale
        return attend(q, k, v, factor, sink, tokens or ())[: 1 if tokens is None else 2]

    operands = draw_operands(draw, shapes, dtype, kinds)
    about = {"scale": scale, "sink": sink, "tokens": tokens}
    sizes = attention_sizes(operands, dim**-0.5 if scale is None else scale)
    return Case("cross_attention", operands, call, define, (2, 2), about, sizes)


@st.composite
def self_attention(draw, dtype, kinds):
    batch, heads = draw(st.sampled_from([1, 2, 0])), draw(_few)
    queries, keys, dim = draw(st.sampled_from([1, 2, 33, 64, 65, 70, 0])), draw(_keys | st.just(150)), draw(_dims)
    scale = draw(_scales)
    shapes = {"q": (batch, heads, queries, dim), "k": (batch, heads, keys, dim), "v": (batch, heads, keys, dim)}

    def call(q, k, v):
        return (ops.self_attention(q, k, v, scale=scale),)

    def define(q, k, v):
        return attend(q, k, v, dim**-0.5 if scale is None else scale)[:1]

    operands = draw_operands(draw, shapes, dtype, kinds)
    sizes = attention_sizes(operands, dim**-0.5 if scale is None else scale)
    return Case("self_attention", operands, call, define, (2,), {"scale": scale}, sizes)


@st.composite
def joint_attention(draw, dtype, kinds):
    rows, repeats, heads, dim = draw(_few), draw(_few), draw(_few), draw(_dims)
    queries, texts, pixels = draw(st.sampled_from([1, 2, 33, 65, 0])), draw(_keys), draw(_sizes | st.just(0))
    scale, tokens = draw(_scales), _tokens(draw, texts)
    batch = 0 if draw(st.integers(0, 9)) == 9 else rows * repeats
    rows = draw(st.sampled_from([0, rows])) if not batch else rows
    text, pixel = (rows, heads, texts, dim), (batch, heads, pixels, dim)
    shapes = {"q": (batch, heads, queries, dim), "text_k": text, "text_v": text, "k": pixel, "v": pixel}

    def call(q, text_k, text_v, k, v):
        result = ops.joint_attention(q, text_k, text_v, k, v, scale=scale, map_tokens=tokens)
        return (result,) if tokens is None else result

    def define(q, text_k, text_v, k, v):
        text_k, text_v = (x.repeat_interleave(q.shape[0] // max(1, rows), 0) for x in (text_k, text_v))
        factor = dim**-0.5 if scale is None else scale
        keys, values = torch.cat([text_k, k], 2), torch.cat([text_v, v], 2)
        return attend(q, keys, values, factor, 0, tokens or ())[: 1 if tokens is None else 2]

    operands = draw_operands(draw, shapes, dtype, kinds)
    sizes = attention_sizes(operands, dim**-0.5 if scale is None else scale)
    return Case("joint_attention", operands, call, define, (2, 2), {"scale": scale, "tokens": tokens}, sizes)


@st.composite
def group_norm_silu(draw, dtype, kinds):
    size, groups, silu = draw(st.sampled_from([1, 2, 3, 16, 20])), draw(st.sampled_from([1, 2, 5])), draw(st.booleans())
    rows, repeats, channels = draw(_few), draw(_few), size * groups
    batch = 0 if draw(st.integers(0, 9)) == 9 else rows * repeats
    pixels = draw(st.sampled_from([(1,), (2,), (1, 1), (1, 3), (5, 7), (33,), (9, 8)]))
    # Plain PyTorch rounds the sum of half-precision numbers, before the norm: its error is of another kind.
    addends = [None] if dtype == torch.bfloat16 else [None, "rows", "whole"]
    addend, modulated = draw(st.sampled_from(addends)), draw(st.booleans())
    eps, last = draw(st.sampled_from([1e-5, 1e-6, 1e-3])), draw(st.booleans())
    shapes = {"x": (batch, channels, *pixels), "weight": (channels,), "bias": (channels,)}
    if addend is not None:
        shapes["addend"] = (rows if batch else 0, channels, *(pixels if addend == "whole" else ()))
    if modulated:
        shapes |= {"scale": (batch, channels), "shift": (batch, channels)}

    def call(x, weight, bias, **more):
        return (ops.group_norm_silu(x, groups, weight, bias, eps, silu=silu, **more),)

    def add(x, addend):
        if addend is None:
            return x
        addend = addend if addend.ndim > 2 else addend.reshape(*addend.shape, *(1 for _ in pixels))
        return x + (addend.repeat_interleave(x.shape[0] // addend.shape[0], 0) if x.shape[0] else addend)

    def define(x, weight, bias, addend=None, scale=None, shift=None):
        return (normalise(add(x, addend), groups, weight, bias, eps, silu, scale, shift),)

    operands = draw_operands(draw, shapes, dtype, kinds)
    if last and len(pixels) == 2:
        operands["x"] = operands["x"].contiguous(memory_format=torch.channels_last)
    z = add(*(operands[n].double() if n in operands else None for n in ("x", "addend")))
    about = {"groups": groups, "eps": eps, "silu": silu}
    sizes, spread = norm_sizes(operands, z, groups, eps), find_spread(z, groups, dtype)
    return Case("group_norm_silu", operands, call, define, (len(pixels),), about, sizes, spread)


@st.composite
def skip_norm_silu(draw, dtype, kinds):
    groups, size = draw(st.sampled_from([1, 2, 5])), draw(st.sampled_from([1, 2, 3, 16]))
    channels = max(2, groups * size)
    groups = groups if channels % groups == 0 else 1
    own = draw(st.integers(1, channels - 1))
    rows, repeats, silu = draw(st.sampled_from([1, 2, 3, 0])), draw(_few), draw(st.booleans())
    pixels = draw(st.sampled_from([(1,), (2,), (1, 1), (1, 3), (5, 7), (33,), (9, 8)]))
    eps, last = draw(st.sampled_from([1e-5, 1e-6, 1e-3])), draw(st.booleans())
    shapes = {
        "hidden": (rows * repeats, own, *pixels),
        "skip": (rows, channels - own, *pixels),
        "weight": (channels,),
        "bias": (channels,),
    }
    kept = -(-own // (channels // groups)) * (channels // groups)

    def call(hidden, skip, weight, bias):
        return ops.skip_norm_silu(hidden, skip, groups, weight, bias, eps, silu)

    def join(hidden, skip):
        return torch.cat([hidden, skip.repeat_interleave(repeats, 0)], 1)

    def define(hidden, skip, weight, bias):
        both = normalise(join(hidden, skip), groups, weight, bias, eps, silu)
        return both[:, :kept], both[::repeats, kept:]

    operands = draw_operands(draw, shapes, dtype, kinds)
    if last and len(pixels) == 2:
        operands["hidden"] = operands["hidden"].contiguous(memory_format=torch.channels_last)
    about = {"groups": groups, "eps": eps, "silu": silu}
    z = join(operands["hidden"].double(), operands["skip"].double())
    sizes, spread = norm_sizes(operands, z, groups, eps), find_spread(z, groups, dtype)
    return Case("skip_norm_silu", operands, call, define, (len(pixels), len(pixels)), about, sizes, spread)


@st.composite
def attention_entropy(draw, dtype, kinds):
    batch, pixels, words = draw(st.sampled_from([1, 2, 3, 0])), draw(_sizes), draw(st.sampled_from([1, 2, 5, 12, 127]))
    columns = 1 + words + draw(st.sampled_from([0, 1, 7]))
    anchors = draw(st.lists(st.integers(1, words), min_size=1, max_size=3, unique=True))
    options = {
        "tau": draw(st.sampled_from([0.5, 1.0, 1e-2])),
        "eps": draw(st.sampled_from([1e-5, 1e-3])),
        "weight": draw(st.sampled_from([2.0, -1.0])),
        "detach_min": draw(st.booleans()),
    }

    def call(maps):
        return (ops.attention_entropy(maps, anchors, words, **options),)

    def rise_of(maps):
        b = (maps[:, :, 1 : words + 1] / options["tau"]).softmax(-1)[:, :, [a - 1 for a in anchors]]
        least = b.min(1, keepdim=True).values
        rise = b - (least.detach() if options["detach_min"] else least)
        return rise, rise.sum(1, keepdim=True)

    def define(maps):
        rise, total = rise_of(maps)
        p = torch.where(total == 0, 0, rise / torch.where(total == 0, 1, total))
        return (-options["weight"] * (p * (p + options["eps"]).log()).sum((1, 2)),)

    operands = draw_operands(draw, {"maps": (batch, pixels, columns)}, dtype, kinds)
    # Columns that are below 2^-125 in every pixel count as zero.
    largest = (operands["maps"].double()[:, :, 1 : words + 1] / options["tau"]).softmax(-1).amax(1)
    assume(not ((largest > 0) & (largest < 1e-30)).any())
    total = rise_of(operands["maps"].double())[1]
    sizes = {"maps": 12 * abs(options["weight"]) / options["tau"] * reach(1 / total[total > 0])}
    about = {"anchors": anchors, "words": words, **options}
    return Case("attention_entropy", operands, call, define, (0,), about, sizes)


@st.composite
def geglu(draw, dtype, kinds):
    shape = draw(st.sampled_from([(2,), (3, 8), (0, 4), (2, 0), (2, 3, 34), (1, 130), (65, 6)]))

    def define(x):
        value, gate = x[..., : shape[-1] // 2], x[..., shape[-1] // 2 :]
        if x.dtype == torch.float32:  # what PyTorch makes of it
            return (value * F.gelu(gate),)
        # Far below zero 1 + erf is nothing but rounding error, in float64 as well.
        return (value * (gate * 0.5 * torch.erfc(gate * -math.sqrt(0.5))),)

    operands = draw_operands(draw, {"x": shape}, dtype, kinds)
    return Case("geglu", operands, lambda x: (ops.geglu(x),), define, (1,), {})


@st.composite
def linear(draw, dtype, kinds):
    inner, outer = draw(st.sampled_from([1, 2, 17, 64, 0])), draw(st.sampled_from([1, 3, 16, 65, 0]))
    leading = draw(st.sampled_from([(1,), (3,), (2, 65), (0,), (), (2, 3, 5)]))
    shapes = {"x": (*leading, inner), "weight": (outer, inner)}
    if draw(st.booleans()):
        shapes["bias"] = (outer,)

    def define(x, weight, bias=None):
        y = (x[..., None, :] * weight).sum(-1)
        return (y if bias is None else y + bias,)

    operands = draw_operands(draw, shapes, dtype, kinds)
    return Case("linear", operands, lambda **o: (ops.linear(**o),), define, (1,), {})


@st.composite
def convolution(draw, dtype, kinds):
    channels, out, batch = draw(_sizes), draw(_sizes), draw(st.sampled_from([1, 2, 3, 0]))
    pixels, tile = draw(st.sampled_from([(2, 5), (4, 4), (7, 2), (9, 13), (16, 18), (3, 35)])), draw(_tiles)
    shapes = {"x": (batch, channels, *pixels), "weight": (out, channels, 3, 3)}
    if draw(st.booleans()):
        shapes["bias"] = (out,)

    def call(x, weight, bias=None):
        return (ops.convolution(x, ops.convolution_weights(weight, tile), bias),)

    def define(x, weight, bias=None):
        def cut(*by):
            return ..., *(slice(max(0, k), n + min(0, k)) for k, n in zip(by, pixels, strict=True))

        y = x.new_zeros(x.shape[0], out, *pixels)
        for i in (-1, 0, 1):
            for j in (-1, 0, 1):  # y[r, c] has x[r + i, c + j]
                there, here = cut(i, j), cut(-i, -j)
                part = torch.einsum("bchw,oc->bohw", x[there], weight[:, :, i + 1, j + 1])
                y[here] = y[here] + part
        return (y if bias is None else y + bias[:, None, None],)

    operands = draw_operands(draw, shapes, dtype, kinds)
    # A bias's gradient is a sum of weights of the results, which no rounding of operands moves: its sums on the way.
    sizes = {"x": 1.0, "weight": 1.0, "bias": max(1.0, math.sqrt(batch * math.prod(pixels)))}
    return Case("convolution", operands, call, define, (2,), {"tile": tile}, sizes, blurs=tile)


@st.composite
def repeat_batch(draw, dtype, kinds):
    shape = draw(st.sampled_from([(1,), (3,), (2, 3), (0, 2), (2, 0), (2, 3, 4, 5), (3, 1, 1, 2), (2, 3, 4)]))
    repeats = draw(st.integers(1, 4))

    def define(x):
        return (torch.stack([x[i // repeats] for i in range(repeats * shape[0])]) if shape[0] else x,)

    operands = draw_operands(draw, {"x": shape}, dtype, kinds)
    if draw(st.booleans()) and len(shape) == 4:
        operands["x"] = operands["x"].contiguous(memory_format=torch.channels_last)
    return Case("repeat_batch", operands, lambda x: (ops.repeat_batch(x, repeats),), define, (1,), {"repeats": repeats})


@st.composite
def edited_attention(draw, dtype, kinds):
    rows, repeats, heads, dim = draw(_few), draw(_few), draw(_few), draw(_dims)
    queries, texts, keys = draw(st.sampled_from([0, 1, 2, 33, 65])), draw(_keys), draw(_keys)
    scale, keeps = draw(_scales), draw(st.booleans())
    query, text, own = (rows * repeats, heads, queries, dim), (rows, heads, texts, dim), (rows, heads, keys, dim)
    shapes = {"source_q": query, "source_k": text, "v": own, "mix": (texts, keys)}
    shapes |= {"q": query, "k": own, "keep": (keys,)} if keeps else {}

    def call(**operands):
        return (ops.edited_attention(**operands, scale=scale),)

    def define(source_q, source_k, v, mix, q=None, k=None, keep=None):
        factor = dim**-0.5 if scale is None else scale
        source_k, v = (x.repeat_interleave(repeats, 0) for x in (source_k, v))
        maps = (source_q @ source_k.transpose(-1, -2) * factor).softmax(-1) @ mix
        if keeps:
            maps = maps + (q @ k.repeat_interleave(repeats, 0).transpose(-1, -2) * factor).softmax(-1) * keep
        return (maps @ v,)

    operands = draw_operands(draw, shapes, dtype, kinds)
    factor = abs(dim**-0.5 if scale is None else scale)
    weights = reach(operands["v"], operands["mix"], *([operands["keep"]] if keeps else []))
    sizes = {name: weights for name in operands}
    for one, other in (("source_q", "source_k"), ("source_k", "source_q"), ("q", "k"), ("k", "q")):
        if one in operands:
            sizes[one] = factor * reach(operands[other]) * weights
    return Case("edited_attention", operands, call, define, (2,), {"scale": scale}, sizes)


OPERATORS = {
    each.__name__: each
    for each in (
        attention_entropy, convolution, cross_attention, edited_attention, geglu, group_norm_silu, joint_attention,
        linear, repeat_batch, self_attention, skip_norm_silu,
    )
}  # fmt: skip
