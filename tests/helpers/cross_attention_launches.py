"""Launches of the CUDA cross-attention's kernels, emulated on the CPU."""

import ctypes
import dataclasses

import torch

LAUNCHER = """
#include "cross_attention.cu"

using namespace difffast::cuda;

extern "C" const char* obstacle(const CrossAttentionArgs* args) { return cross_attention_obstacle(*args); }

extern "C" const char* workspace(const CrossAttentionArgs* args, int multiprocessors, int64_t* floats) {
  emulator::Device device;
  device.multiprocessors = multiprocessors;
  emulator::use_device(device);
  return cross_attention_workspace(*args, floats);
}

extern "C" const char* forward(const CrossAttentionArgs* args, int multiprocessors, float* workspace) {
  emulator::Device device;
  device.multiprocessors = multiprocessors;
  emulator::use_device(device);
  return cross_attention_forward(*args, workspace, nullptr);
}

extern "C" int questions() { return emulator::questions; }

extern "C" void describe(const CrossAttentionArgs* args, int multiprocessors, Layout* layout) {
  *layout = plan(*args, multiprocessors);
}

// One kernel, right or with one mistake, for the emulator's own test: 64 threads bring 16 bytes each, and a warp takes
// over those of the other.
struct Exercise {
  const uint32_t* in;
  uint32_t* out;
  int distance, mistake;
};

enum {
  kNone, kNoWait, kNoBarrier, kWarpBarrier, kEarlyWrite, kUnwritten, kOutside, kUnaligned, kTwice, kMixed, kAbsent
};

void exercise(Exercise e) {
  const int thread = threadIdx.x, other = thread + e.distance, from = other < 0 || other >= 64 ? thread : other;
  if (e.mistake != kUnwritten || thread != 5) copy_async(thread * 16, e.in + thread * 4, false);
  commit_copies();
  if (e.mistake != kNoWait) wait_copies<0>();
  if (e.mistake == kWarpBarrier) __syncwarp();
  if (e.mistake == kAbsent && thread == 7) return;
  if (e.mistake != kNoBarrier && e.mistake != kWarpBarrier) __syncthreads();
  const uint4 value = load_shared(from * 16 + (e.mistake == kOutside ? 1024 : e.mistake == kUnaligned ? 4 : 0));
  if (e.mistake == kMixed && thread % 2 == 0) {
    __shfl_xor_sync(0xffffffffu, 0.0f, 1);
  } else {
    __syncwarp();
  }
  if (e.mistake != kEarlyWrite) __syncthreads();
  store_shared(thread * 16 + 4, value.y + 1);
  const uint32_t results[] = {value.x, value.y, value.z, value.w};
  for (int i = 0; i < 4; ++i) store_global(e.out + thread * 4 + i, results[i]);
  if (e.mistake == kTwice) store_global(e.out, results[0]);
  wait_copies<0>();
}

extern "C" const char* run_exercise(const Exercise* e) {
  void* arguments[] = {const_cast<Exercise*>(e)};
  const cudaError_t error = cudaLaunchKernel(exercise, dim3(1), dim3(64), arguments, 1024, nullptr);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
"""


class Strides(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "head", "row")]


class Args(ctypes.Structure):
    """CrossAttentionArgs of cross_attention.h."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("q", "k", "v", "out", "maps")],
        *[(f"{name}_strides", Strides) for name in ("q", "k", "v", "out")],
        ("map_mask", ctypes.c_uint64 * 2),
        *[
            (name, ctypes.c_int32)
            for name in ("batch", "heads", "queries", "keys", "head_dim", "kv_repeats", "sink", "map_count")
        ],
        ("scale", ctypes.c_float),
        ("dtype", ctypes.c_int32),
    ]


class Layout(ctypes.Structure):
    _fields_ = [
        *[
            (name, ctypes.c_int)
            for name in (
                "groups", "warps", "tiles", "tiles_a_block", "splits", "heads_a_block", "head_groups", "padded_dim",
                "pitch", "shared_bytes",
            )
        ],
        ("one_buffer", ctypes.c_bool),
    ]  # fmt: skip


class Exercise(ctypes.Structure):
    _fields_ = [
        ("input", ctypes.c_void_p), ("out", ctypes.c_void_p), ("distance", ctypes.c_int), ("mistake", ctypes.c_int)
    ]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """One call; ``tokens`` are the map's, ``multiprocessors`` the emulated device's."""

    keys: int = 77
    head_dim: int = 40
    queries: int = 65
    heads: int = 2
    batch: int = 2
    kv_repeats: int = 1
    sink: int = 0
    tokens: tuple[int, ...] = ()
    multiprocessors: int = 108
    spread: float = 1.0  # standard deviation of the logits
    mean: float = 0.0  # of q and k: logits are about head_dim * mean ** 2 * scale from zero

    def __str__(self):
        changed = [f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        short = {f.name: len(self.tokens) if f.name == "tokens" else getattr(self, f.name) for f in changed}
        return " ".join(f"{name}={value}" for name, value in short.items()) or "default"


class Call:
    """Inputs and outputs of one call, NaN wherever the kernel must not look or has not written."""

    GUARD = 64  # elements before and after

    def __init__(self, case, dtype):
        self.case, self.dtype = case, dtype
        c, generator = case, torch.Generator().manual_seed(0)

        def inside_nan(*shape):
            values = torch.full((*shape[:-1], shape[-1] + 2 * self.GUARD), float("nan"), dtype=dtype)
            view = values[..., self.GUARD : -self.GUARD]
            view.copy_(torch.randn(shape, generator=generator))
            return view

        # Heads side by side in a row, K beside V, as one projection leaves them.
        q = inside_nan(c.batch, c.queries, c.heads * c.head_dim).add_(c.mean)
        kv = inside_nan(c.batch // c.kv_repeats, c.keys, 2 * c.heads * c.head_dim).add_(c.mean)
        self.q = q.unflatten(-1, (c.heads, c.head_dim)).transpose(1, 2)
        self.k, self.v = kv.unflatten(-1, (2, c.heads, c.head_dim)).permute(2, 0, 3, 1, 4)
        self.scale = c.spread * c.head_dim**-0.5
        self.buffers = []
        self.out = self.output((c.batch, c.queries, c.heads, c.head_dim), dtype).transpose(1, 2)
        self.maps = self.output((c.batch, c.queries, len(c.tokens)), torch.float32) if c.tokens else None

    def output(self, shape, dtype):
        count = torch.Size(shape).numel()
        # All bits set are a NaN in every format.
        buffer = torch.full(((count + 2 * self.GUARD) * dtype.itemsize,), -1, dtype=torch.int8)
        self.buffers.append((buffer, dtype))
        return buffer.view(dtype)[self.GUARD : self.GUARD + count].view(shape)

    def guards_are_whole(self):
        edges = [(buffer, self.GUARD * dtype.itemsize) for buffer, dtype in self.buffers]
        return all((b[:n] == -1).all() and (b[-n:] == -1).all() for b, n in edges)

    def args(self):
        c, args = self.case, Args()
        for name in ("q", "k", "v", "out"):
            tensor = getattr(self, name)
            assert tensor.stride(-1) == 1
            setattr(args, name, tensor.data_ptr())
            setattr(args, f"{name}_strides", Strides(*tensor.stride()[:3]))
        args.maps = None if self.maps is None else self.maps.data_ptr()
        for token in c.tokens:
            args.map_mask[token // 64] |= 1 << token % 64
        for name in ("batch", "heads", "queries", "keys", "head_dim", "kv_repeats", "sink"):
            setattr(args, name, getattr(c, name))
        args.map_count, args.scale = len(c.tokens), self.scale
        args.dtype = {torch.float16: 0, torch.bfloat16: 1}[self.dtype]
        return args

    def run(self, emulated):
        """-> error text or None"""
        args, floats = self.args(), ctypes.c_int64()
        error = emulated.workspace(ctypes.byref(args), self.case.multiprocessors, ctypes.byref(floats))
        if error is not None:
            return error
        address = self.output((floats.value,), torch.float32).data_ptr() if floats.value else None
        return emulated.forward(ctypes.byref(args), self.case.multiprocessors, address)
