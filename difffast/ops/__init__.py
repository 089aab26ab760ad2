"""Operators: one file each with schema, reference and dispatch.

What all of them promise, whichever of our kernels runs (numbers of the backends "sdpa", "flash", "cudnn" and
"efficient" are PyTorch's own):

**Error.** Against the definition in float64, at most four times the largest error of plain PyTorch in the dtype of the
computation, plus eight units in the last place of the largest number of the result, and as much as the exact result
moves where each operand is changed by eight such units.  The dtype of the computation is float32 for half precision.
All rows of a head, all channels of a group, all columns of a product, and all pixels of a convolution's channel share
one bound; that of a convolution is larger by eight units of its terms if every weight of two channels met their largest
pixel.  Gradients may be wrong besides by 64 units in the last place of the terms that cancel in them; a norm whose
group differs by rounding errors alone is not determined.  Probabilities below 2^-125 may count as zero.  The reference
of a norm rounds the sum with an addend to half precision, as PyTorch does.

**NaN and infinity.** What is finite in plain PyTorch is finite, and what is NaN or infinite there is never made finite.
A NaN reaches no other element than in the definition: in a query its row, in a key all rows of its head, in a value one
component of the head, in a norm the group, in maps their batch entry; but in a convolution a pixel's all of the tiles
that it touches, 2x2 or 4x4, and a weight's all pixels, also those at which it meets the border.  This holds as long as
no product, square or sum within the definition leaves a thousandth of the dtype's range, and on GPUs no logit exceeds
1e9; where logits overflow, rows are NaN, as they are in plain PyTorch.

**Transforms of PyTorch.** Inside torch.func (``vmap``, ``grad``, ``jvp``) and forward-mode differentiation the
reference runs, and a forced kernel refuses.  Results have the dtype of the operands, also under autocast, which
chooses the dtype of :func:`linear` only.  Operands of several dtypes are refused, meta tensors give meta tensors, and
``torch.export`` keeps the operator.
"""

from ._dispatch import OPERATORS, default_backend, use_backend
from ._installed import BACKENDS, INSTRUCTION_SET, missing
from ._proofs import PROVED, Proof
from .attention_entropy import attention_entropy
from .convolution import convolution, convolution_weights
from .cross_attention import cross_attention
from .edited_attention import edited_attention
from .geglu import geglu
from .group_norm_silu import group_norm_silu
from .joint_attention import joint_attention
from .linear import linear
from .repeat_batch import repeat_batch
from .self_attention import self_attention
from .skip_norm_silu import skip_norm_silu

__all__ = [
    "BACKENDS",
    "INSTRUCTION_SET",
    "OPERATORS",
    "PROVED",
    "Proof",
    "attention_entropy",
    "convolution",
    "convolution_weights",
    "cross_attention",
    "default_backend",
    "edited_attention",
    "geglu",
    "group_norm_silu",
    "joint_attention",
    "linear",
    "missing",
    "repeat_batch",
    "self_attention",
    "skip_norm_silu",
    "use_backend",
]
