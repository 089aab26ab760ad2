"""Compile Triton kernels ahead of time, without a GPU, and read from the cubins what they need.

``python tests/helpers/triton_aot.py [--quick] [--capability 80 90] [--module cross_attention] [--only TEXT] [--fresh]``
prints one line a kernel and fails if one spills registers or needs more shared memory than the GPU has. With ``--amd``
instead of capabilities the kernels are compiled for an AMD GPU: each must compile, with options that are AMD's, and fit
into its shared memory; whether registers spill is printed.

A kernel module takes part by a function ``aot_cases(capability, quick)`` that yields
``(name, kernel, signature, compile-time arguments, compiler options)``; see :data:`MODULES`.  It must run in a process
without TRITON_INTERPRET, which replaces every kernel when its module is imported.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

MODULES = ("attention_entropy", "cross_attention", "edited_attention", "geglu", "group_norm_silu", "joint_attention")

#: Those whose exponents of a softmax are s * scale - peak: see ROUND_PRODUCTS in triton_kernels/launch.py.  Where
#: products are the tensor cores', nothing is left that should be fused.
ROUNDED = ("cross_attention", "edited_attention", "joint_attention")

#: Shared memory of one block in bytes (CUDA C++ programming guide, table of technical specifications).
SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
CAPABILITIES = (80, 89, 90, 100)
#: Of one workgroup on CDNA 3, gfx942 (instruction set architecture manual, local data share).
AMD_SHARED = 64 * 1024


@dataclass(frozen=True)
class Compiled:
    """What one kernel needs on one GPU: registers a thread, bytes of stack a thread, bytes of shared memory a block."""

    name: str
    capability: int
    registers: int
    stack: int
    shared: int
    warps: int
    seconds: float
    unwritten: str | None
    fused: bool

    @property
    def complaint(self) -> str | None:
        """Why this kernel must not be shipped, or None."""
        if self.unwritten is not None:
            return f"reads a register that nothing has written: {self.unwritten}"
        if self.fused and self.name.startswith(ROUNDED) and " fp32 " not in self.name:
            return "multiplies and subtracts in one operation"
        if self.stack:
            return f"{self.stack} bytes of registers spilled"
        if self.shared > SHARED[self.capability]:
            return f"{self.shared} bytes of shared memory, sm_{self.capability} has {SHARED[self.capability]}"
        return None

    def __str__(self) -> str:
        return (
            f"sm_{self.capability:<4}{self.name:<40}{self.warps:>3} warps{self.registers:>5} registers"
            f"{self.stack:>6} stack{self.shared:>8} shared{self.seconds:>7.1f} s  {self.complaint or ''}"
        )


def _without_marks(signature: dict[str, str], constants: dict) -> tuple[dict, dict, dict]:
    """Signature, compile-time arguments and attributes as the compiler takes them."""
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if str(kind).endswith(":16")
    }
    return {argument: kind.removesuffix(":16") for argument, kind in signature.items()}, constants, attributes


def compile_case(case: tuple, capability: int) -> Compiled:
    """Compile one case; a signature's ``:16`` promises a multiple of 16."""
    name, kernel, signature, constants, options = case
    started = time.perf_counter()
    source = ASTSource(kernel, *_without_marks(signature, constants))
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    seconds = time.perf_counter() - started
    usage = resource_usage(binary.asm["cubin"])
    registers, stack, local = (int(re.search(rf"\b{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
    shared, warps = binary.metadata.shared, binary.metadata.num_warps
    unwritten = find_unwritten(disassemble(binary.asm["cubin"])) if capability >= 90 else None
    fused = re.search(r"\bfma\.rn\.f32\b", binary.asm["ptx"]) is not None
    return Compiled(name, capability, registers, stack + local, shared, warps, seconds, unwritten, fused)


def compile_for_amd(case: tuple, architecture: str) -> tuple[str, str | None]:
    """Compile one case for an AMD GPU.  -> (a line about it, why it must not be shipped or None)"""
    from triton.backends.amd.compiler import HIPOptions

    name, kernel, signature, constants, options = case
    foreign = set(options) - set(HIPOptions.__dataclass_fields__)
    # A launch refuses them; triton.compile would not.
    if foreign:
        return name, f"{', '.join(sorted(foreign))} are no options of AMD's compiler"
    source = ASTSource(kernel, *_without_marks(signature, constants))
    binary = triton.compile(source, target=GPUTarget("hip", architecture, 64), options=options)
    spilled = re.search(r"\.vgpr_spill_count:\s*(\d+)", binary.asm["amdgcn"])[1]
    shared = binary.metadata.shared
    line = f"{architecture} {name:<40}{binary.metadata.num_warps:>3} warps{spilled:>5} spilled{shared:>8} shared"
    return line, f"more than {AMD_SHARED} bytes of shared memory" if shared > AMD_SHARED else None


def resource_usage(cubin: bytes) -> str:
    """The lines about its function that the cuobjdump in Triton's wheel prints."""
    return _read(cubin, "cuobjdump", "--dump-resource-usage")


def disassemble(cubin: bytes) -> str:
    """The machine code, as the nvdisasm in Triton's wheel prints it."""
    return _read(cubin, "nvdisasm", "--print-code")


def _read(cubin: bytes, tool: str, option: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([str(path), option, file.name], capture_output=True, text=True, check=True).stdout


#: "/*0050*/  @P0 UIADD3 UR4, UP0, UR8, 0x20, URZ ;": where, what, operands.
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
#: Descriptors name the first of a group of registers, of which not all need be used.
_DESCRIPTOR = re.compile(r"g?desc\[U?R\d+\](\[[^\]]*\])?")


def find_unwritten(code: str) -> str | None:
    """Return the first instruction that reads a uniform register before any other has written it, or None.

    The assembler of CUDA 12.8 has made such code, for which the results are anything.  Registers that are written on
    some path only are not found.
    """
    written: set[int] = set()
    for at, operation, operands in _INSTRUCTION.findall(code):
        first, *others = [each.strip() for each in _DESCRIPTOR.sub("", operands).split(",")]
        target = re.fullmatch(r"UR(\d+)", first)
        sources = others if target else [first, *others]
        if {int(n) for each in sources for n in re.findall(r"\bUR(\d+)\b", each)} - written:
            return f"{at} {operation} {operands}"
        if target:
            width = 4 if ".128" in operation else 2 if ".64" in operation or ".WIDE" in operation else 1
            written.update(range(int(target[1]), int(target[1]) + width))
    return None


def cases(modules: Sequence[str], capability: int, quick: bool, only: str) -> Iterator[tuple]:
    """All cases of the modules whose names contain ``only``."""
    for stem in modules:
        module = importlib.import_module(f"difffast.triton_kernels.{stem}")
        for name, *rest in module.aot_cases(capability, quick):
            if only in name:
                yield (f"{stem}: {name}", *rest)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few shapes and dtypes")
    parser.add_argument("--capability", type=int, nargs="+", default=CAPABILITIES)
    parser.add_argument("--amd", metavar="ARCHITECTURE", help="such as gfx942, in place of capabilities")
    parser.add_argument("--module", nargs="+", default=MODULES, choices=MODULES)
    parser.add_argument("--only", default="", help="cases whose names contain this")
    parser.add_argument("--fresh", action="store_true", help="leave Triton's cache alone, to time the compiler")
    options = parser.parse_args()
    # By their variables: triton.knobs does not exist in the oldest version.
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set: unset it, the interpreter replaces the kernels")
    with tempfile.TemporaryDirectory() as cache:
        if options.fresh:
            os.environ["TRITON_CACHE_DIR"] = cache
        failed = total = 0
        started = time.perf_counter()
        if options.amd:
            # As in a build of PyTorch for AMD, by which launches choose their options.
            torch.version.hip = "compiled ahead of time"
        for capability in (0,) if options.amd else options.capability:
            for case in cases(options.module, capability, options.quick, options.only):
                if options.amd:
                    line, complaint = compile_for_amd(case, options.amd)
                    print(f"{line}  {complaint or ''}", flush=True)
                else:
                    result = compile_case(case, capability)
                    complaint = result.complaint
                    print(result, flush=True)
                total += 1
                failed += complaint is not None
    print(f"{total} kernels, {failed} failed, {time.perf_counter() - started:.1f} s")
    return 1 if failed or not total else 0


if __name__ == "__main__":
    sys.exit(main())
