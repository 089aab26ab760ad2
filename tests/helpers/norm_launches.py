"""Launches of the CUDA norm's kernels, emulated on the CPU."""

import ctypes
import dataclasses

import torch

from difffast.ops.group_norm_silu import reference
from difffast.ops.skip_norm_silu import reference as skip_reference

LAUNCHER = """
#include "group_norm_silu.cu"

using namespace difffast::cuda;

extern "C" void use_device(
    int multiprocessors, int shared_bytes, bool clusters, int ptx_version, int for_clusters) {
  emulator::use_device(
      {multiprocessors, static_cast<size_t>(shared_bytes), clusters, ptx_version, for_clusters});
}

extern "C" int questions() { return emulator::questions; }

extern "C" void let_read(const void* from, int64_t bytes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(from);
  if (from == nullptr) emulator::readable.clear();
  if (from != nullptr) emulator::readable.push_back({begin, begin + bytes});
}

extern "C" const char* obstacle(const GroupNormSilu* args) { return group_norm_silu_obstacle(*args); }

extern "C" const char* workspace(const GroupNormSilu* args, int64_t* floats) {
  return group_norm_silu_workspace(*args, floats);
}

extern "C" const char* forward(const GroupNormSilu* args, float* workspace) {
  return group_norm_silu_forward(*args, workspace, nullptr);
}

extern "C" void describe(const GroupNormSilu* args, Layout* layout) {
  Device device = {};
  plan_here(*args, device, *layout);
}

// One kernel, right or with one mistake, for the emulator's own test: two blocks read each other's numbers.
struct Exercise {
  float* out;
  int mistake;
};

enum {
  kNone, kNoBarrier, kUnwritten, kEarlyWrite, kNoWaitAtEnd, kEarlyEnd, kOutside, kTwoArrivals, kForeign, kRelaxed,
  kOvertaking
};

void exercise(Exercise e) {
  const int thread = threadIdx.x, rank = blockIdx.x % 2;
  if (e.mistake != kUnwritten || thread != 5) store_shared_float(thread * 4, thread + 100.0f * rank);
  if (e.mistake == kTwoArrivals) cluster_arrive();
  if (e.mistake != kNoBarrier) {
    if (e.mistake == kRelaxed) {
      cluster_arrive_relaxed();
    } else {
      cluster_arrive();
    }
    cluster_wait();
  }
  const float value = load_cluster_float(thread * 4, e.mistake == kOutside ? 2 : 1 - rank);
  if (e.mistake == kEarlyWrite && rank == 0) store_shared(thread * 4, 0);
  store_global(e.out + blockIdx.x * blockDim.x + thread, value);
  if (e.mistake == kForeign) load_global(e.out + 256 + thread);
  if (e.mistake == kEarlyEnd) return;
  if (e.mistake != kOvertaking) __syncthreads();
  cluster_arrive_relaxed();
  if (e.mistake != kNoWaitAtEnd) cluster_wait();
}

extern "C" const char* run_exercise(const Exercise* e) {
  cudaLaunchAttribute cluster = {cudaLaunchAttributeClusterDimension, {{2, 1, 1}}};
  const cudaLaunchConfig_t config = {dim3(4), dim3(64), 256, nullptr, &cluster, 1};
  const cudaError_t error = cudaLaunchKernelEx(&config, exercise, *e);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
"""
DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
FORMATS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
#: name -> (multiprocessors, shared memory of a block, clusters, version of the instructions that were compiled,
#: multiprocessors that clusters of 8 fill: an H100 has them in groups of 16 and 18)
DEVICES = {
    "sm_80": (108, 163 << 10, False, 80, 0),
    "sm_89": (128, 99 << 10, False, 80, 0),
    "sm_90": (132, 227 << 10, True, 90, 128),
}


class Args(ctypes.Structure):
    """GroupNormSilu of group_norm_silu.h."""

    _fields_ = [
        ("dtype", ctypes.c_int32),
        ("channels_last", ctypes.c_bool),
        ("silu", ctypes.c_bool),
        *[(name, ctypes.c_int64) for name in ("batch", "channels", "pixels", "groups")],
        ("eps", ctypes.c_double),
        *[(name, ctypes.c_void_p) for name in ("weight", "bias", "x")],
        *[(name, ctypes.c_int64) for name in ("own", "kept")],
        ("skip", ctypes.c_void_p),
        ("repeats", ctypes.c_int64),
        *[(name, ctypes.c_void_p) for name in ("out", "shared", "addend")],
        ("addend_repeats", ctypes.c_int64),
        ("addend_by_channel", ctypes.c_bool),
        *[(name, ctypes.c_void_p) for name in ("scale", "shift")],
    ]


class Layout(ctypes.Structure):
    _fields_ = [
        ("one_pass", ctypes.c_bool),
        *[
            (name, ctypes.c_int)
            for name in (
                "slab_groups", "own_slabs", "shared_slabs", "parts", "span", "threads", "tile_bytes", "sums_bytes",
                "shared_bytes",
            )
        ],
    ]  # fmt: skip


class Exercise(ctypes.Structure):
    _fields_ = [("out", ctypes.c_void_p), ("mistake", ctypes.c_int)]


@dataclasses.dataclass(frozen=True)
class Case:
    """One call; with ``of_skip`` channels of a skip, of which ``repeats`` rows of x share one row, skip_norm_silu."""

    batch: int = 2
    own: int = 12
    pixels: tuple[int, ...] = (5, 7)
    groups: int = 3
    of_skip: int = 0
    repeats: int = 1
    addend: str = ""  # "rows" or "pixels", of which ``addend_repeats`` rows of x share one
    addend_repeats: int = 1
    scaled: bool = False
    silu: bool = True
    device: str = "sm_80"
    past: int = 0  # elements by which all tensors miss an alignment of 64 bytes
    mean: float = 0.5

    def __str__(self):
        changed = [f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return " ".join(f"{f.name}={getattr(self, f.name)}" for f in changed) or "default"


class Call:
    """Inputs and outputs of one call, NaN wherever the kernel must not look or has not written."""

    GUARD = 64  # bytes before and after

    def __init__(self, case, dtype, layout):
        self.case, self.dtype, self.layout = case, dtype, layout
        self.generator = torch.Generator().manual_seed(0)
        self.buffers, c = [], case
        channels = c.own + c.of_skip
        self.x = self.input(c.batch, c.own, *c.pixels) if c.batch else self.memory(0, c.own, *c.pixels)
        self.x += c.mean
        self.skip = self.input(c.batch // c.repeats, c.of_skip, *c.pixels) if c.of_skip else None
        self.weight, self.bias = self.input(channels), self.input(channels)
        rows = c.batch // c.addend_repeats
        self.addend = self.input(rows, c.own, *(c.pixels if c.addend == "pixels" else ())) if c.addend else None
        self.scale, self.shift = (self.input(c.batch, channels) if c.scaled else None for _ in range(2))
        size = channels // c.groups
        self.kept = -(-c.own // size) * size
        self.out = self.memory(c.batch, self.kept, *c.pixels)
        self.shared = self.memory(c.batch // c.repeats, channels - self.kept, *c.pixels)

    def memory(self, *shape):
        """All bits set, a NaN in every format; misaligned as the case says, in the layout if there are pixels."""
        count, past = torch.Size(shape).numel(), self.GUARD // self.dtype.itemsize + self.case.past
        storage = torch.full(((count + past) * self.dtype.itemsize + 2 * self.GUARD,), -1, dtype=torch.int8)
        begin = -storage.data_ptr() % self.GUARD
        buffer = storage[begin : begin + (storage.numel() - self.GUARD) // 4 * 4]
        view = buffer[: buffer.numel() // self.dtype.itemsize * self.dtype.itemsize].view(self.dtype)
        view = view[past : past + count]
        self.buffers.append((buffer, past * self.dtype.itemsize, (past + count) * self.dtype.itemsize))
        if len(shape) < 3 or self.layout == "NCHW":
            return view.view(shape)
        return view.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)

    def input(self, *shape):
        view = self.memory(*shape)
        return view.copy_(torch.randn(shape, generator=self.generator))

    def guards_are_whole(self):
        return all((b[:begin] == -1).all() and (b[end:] == -1).all() for b, begin, end in self.buffers)

    def args(self):
        c, args = self.case, Args()
        for name in ("x", "skip", "weight", "bias", "addend", "scale", "shift", "out", "shared"):
            tensor = getattr(self, name)
            setattr(args, name, None if tensor is None or not tensor.numel() else tensor.data_ptr())
        args.dtype, args.channels_last, args.silu = DTYPES[self.dtype], self.layout == "NHWC", c.silu
        args.batch, args.channels, args.groups = c.batch, c.own + c.of_skip, c.groups
        args.pixels, args.eps, args.own, args.kept = torch.Size(c.pixels).numel(), 1e-5, c.own, self.kept
        args.repeats, args.addend_repeats, args.addend_by_channel = c.repeats, c.addend_repeats, c.addend == "rows"
        return args

    def run(self, emulated):
        """-> error text or None"""
        args, floats = self.args(), ctypes.c_int64()
        emulated.use_device(*DEVICES[self.case.device])
        error = emulated.workspace(ctypes.byref(args), ctypes.byref(floats))
        if error is not None:
            return error
        workspace = torch.full((floats.value,), float("nan"))
        emulated.let_read(None, 0)
        for name in ("x", "skip", "weight", "bias", "addend", "scale", "shift"):
            tensor = getattr(self, name)
            if tensor is not None:
                emulated.let_read(tensor.data_ptr(), tensor.numel() * tensor.itemsize)
        if floats.value:
            emulated.let_read(workspace.data_ptr(), floats.value * 4)
        return emulated.forward(ctypes.byref(args), workspace.data_ptr() if floats.value else None)

    def definition(self, dtype):
        """out and shared by plain PyTorch in ``dtype``."""
        c = self.case

        def of(tensor):
            return None if tensor is None else tensor.to(dtype).contiguous()

        arguments = (c.groups, of(self.weight), of(self.bias), 1e-5)
        if c.of_skip:
            return skip_reference(of(self.x), of(self.skip), *arguments, c.silu)
        return (reference(of(self.x), *arguments, of(self.addend), of(self.scale), of(self.shift), c.silu),)

    def layout_on(self, emulated, device):
        layout = Layout()
        emulated.use_device(*DEVICES[device])
        emulated.describe(ctypes.byref(self.args()), ctypes.byref(layout))
        return layout
