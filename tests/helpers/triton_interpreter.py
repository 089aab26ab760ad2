"""Triton's interpreter as the hardware rounds, and faster: half of its time is bookkeeping that no test here needs."""

import contextlib
import dataclasses

import pytest

from difffast import ops
from difffast.ops._installed import INTERPRETED


@contextlib.contextmanager
def as_hardware():
    """Inside the block, where kernels are interpreted: casts round to nearest, operations cost less.

    Left out is the check of every sum and product of integers for overflow, which compiled kernels do not have: it
    takes ten operations for each.  What could overflow is a pointer into a large tensor, which no interpreted test has.
    """
    if not INTERPRETED or ops.missing("triton") is not None:
        yield
        return
    from triton.runtime import interpreter

    with pytest.MonkeyPatch.context() as patch:
        cast = _rounding_to_nearest(interpreter)
        for name in ("cast_impl", "create_fp_trunc", "create_fp_ext"):
            patch.setattr(interpreter.InterpreterBuilder, name, cast)
        patch.setattr(interpreter.InterpretedFunction, "__call__", _calling_once_patched(interpreter))
        patch.setattr(interpreter, "_get_np_dtype", _remembering_dtypes(interpreter))
        builder = interpreter.interpreter_builder
        patch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
        yield


def _rounding_to_nearest(interpreter):
    """It truncates float32 to bfloat16, which doubles the error; the hardware rounds to nearest, ties to even."""
    import numpy as np
    import triton.language as tl

    cast = interpreter.InterpreterBuilder.cast_impl

    def round_to_nearest(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            bits = np.ascontiguousarray(src.data).view(np.uint32)
            bits = np.where(np.isnan(src.data), np.uint32(0x7FC00000), bits + 0x7FFF + ((bits >> 16) & 1))
            return interpreter.TensorHandle((bits >> 16).astype(np.uint16), tl.bfloat16)
        return cast(self, src, dst_type)

    return round_to_nearest


def _calling_once_patched(interpreter):
    """It patches the language anew at each call of a function inside a kernel: most of the call's time."""
    patched = set()

    def call(self, *args, **kwargs):
        space = id(self.fn.__globals__)  # of a module, which stays
        if space not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(space)
        return self.rewrite()(*args, **kwargs)

    return call


def _remembering_dtypes(interpreter):
    """It makes a table of all of them to look one up, several times an operation."""
    look_up, known = interpreter._get_np_dtype, {}

    def get(dtype):
        found = known.get(dtype.name)
        if found is None:
            found = known[dtype.name] = look_up(dtype)
        return found

    return get
