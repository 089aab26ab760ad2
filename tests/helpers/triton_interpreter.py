"""Triton's interpreter as the hardware rounds, and faster."""

import contextlib

import pytest

from difffast.ops._installed import INTERPRETED


@contextlib.contextmanager
def as_hardware(kernels):
    """Inside the block, where kernels are interpreted, those of a module: casts round to nearest, calls cost less."""
    if not INTERPRETED:
        yield
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    cast = interpreter.InterpreterBuilder.cast_impl
    patched = set()

    def round_to_nearest(self, src, dst_type):
        # It truncates float32 to bfloat16, which doubles the error; the hardware rounds to nearest, ties to even.
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            bits = np.ascontiguousarray(src.data).view(np.uint32)
            bits = np.where(np.isnan(src.data), np.uint32(0x7FC00000), bits + 0x7FFF + ((bits >> 16) & 1))
            return interpreter.TensorHandle((bits >> 16).astype(np.uint16), tl.bfloat16)
        return cast(self, src, dst_type)

    def call(self, *args, **kwargs):
        # It patches the language anew at each call of a function inside a kernel: most of its time.
        space = self.fn.__globals__
        if space is not vars(kernels) and id(space) not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(id(space))
        return self.rewrite()(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "cast_impl", round_to_nearest)
        for name in ("create_fp_trunc", "create_fp_ext"):
            patch.setattr(interpreter.InterpreterBuilder, name, round_to_nearest)
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        yield
