"""The kinds of layers that are fused, and the only list of them.

Adding one: write a :class:`LayerKind` and :func:`register` it.  Patching, reports, compiled programs and unpatching ask
nothing but this list.
"""

from __future__ import annotations

from .channels_last import TransformerNorm, TransformerOutput
from .convolution import Convolution
from .cross_attention import CrossAttention
from .geglu import Geglu
from .kind import LayerKind
from .linear import Linear
from .resnet import Resnet
from .self_attention import SelfAttention
from .upsampler import Upsampler

#: From the outermost to the innermost: attention layers and GEGLU contain linear layers, upsamplers convolutions.
LAYERS: list[LayerKind] = [
    CrossAttention(),
    SelfAttention(),
    Resnet(),
    TransformerNorm(),
    TransformerOutput(),
    Geglu(),
    Linear(),
    Upsampler(),
    Convolution(),
]


def register(kind: LayerKind) -> LayerKind:
    """Add a kind of layers, which contain none of the others; pipelines that are patched from now on fuse it.

    Raises:
        TypeError: ``kind`` is no :class:`LayerKind`.
        ValueError: a kind of this name is registered already.
    """
    if not isinstance(kind, LayerKind):
        raise TypeError(f"kind must be a difffast.layers.kind.LayerKind, got {type(kind).__name__}")
    if any(each.name == kind.name for each in LAYERS):
        raise ValueError(f"name must be new, got {kind.name!r}; registered: {', '.join(k.name for k in LAYERS)}")
    LAYERS.append(kind)
    return kind
