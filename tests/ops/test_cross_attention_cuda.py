"""The CUDA forward kernel of cross_attention without a GPU: emulated on the host, and compiled by nvcc where it exists.

Emulation compiles the same .cu with g++ and ``cuda_emulator.h``, which checks fragment layouts by computing with them
and reports races, unwritten shared memory and double stores as launch failures.
"""

import ctypes
import dataclasses
import itertools
import random
import re
import shutil
import subprocess
from pathlib import Path

import cuda_sources
import pytest
import torch
from cross_attention_launches import LAUNCHER, Args, Call, Case, Exercise, Layout, Strides

# Error against float64 relative to the eager composition's, and what both may lose to the last float32 bits.
TIMES_EAGER_MEAN = 1.2
# Of two equally good roundings, the worst element of one is often twice that of the other.
TIMES_EAGER_MOST = 3.0
FLOOR = 1e-6


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """The kernel compiled for the host."""
    loaded = cuda_sources.emulated(tmp_path_factory.mktemp("emulated"), LAUNCHER)
    for function in (loaded.obstacle, loaded.workspace, loaded.forward, loaded.run_exercise):
        function.restype = ctypes.c_char_p
    loaded.describe.restype = None
    loaded.forward.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
    return loaded


def every(keys):
    return tuple(range(keys))


def grid():
    """Every number of keys with every head_dim; the other sizes by chance."""
    pick = random.Random(0).choice
    for keys, head_dim in itertools.product((1, 2, 7, 16, 17, 33, 76, 77, 80, 81, 128), (8, 24, 40, 64, 80, 160, 256)):
        batch, kv_repeats = pick(((1, 1), (2, 1), (2, 2), (3, 1), (4, 2), (4, 4)))
        yield Case(
            keys,
            head_dim,
            queries=pick((1, 15, 64, 65, 130)),
            heads=pick((1, 2, 3)),
            batch=batch,
            kv_repeats=kv_repeats,
            sink=pick((0, 0, 5)),
            tokens=pick(((), tuple(sorted({0, keys // 2, keys - 1})), every(keys))),
        )


CASES = [
    *grid(),
    # The shapes of SD1.x, SD2.x and SDXL.
    Case(head_dim=40, queries=130, tokens=(2, 5)),
    Case(head_dim=64, queries=130, batch=4, kv_repeats=2),
    Case(head_dim=64, queries=65, batch=4, kv_repeats=2, tokens=every(77), sink=5, heads=3),
    Case(head_dim=160, queries=130, batch=1, heads=1),
    # A block of a small device walks over several tiles, the last walk being shorter.
    Case(head_dim=64, queries=300, batch=4, heads=1, multiprocessors=1),
    Case(keys=128, head_dim=256, queries=290, batch=1, heads=2, multiprocessors=1),
    # Probabilities close to one-hot, and close to zero beside the sink's.
    Case(spread=20.0, tokens=every(77)),
    Case(spread=20.0, sink=5, tokens=(3,)),
    Case(keys=1, spread=300.0, sink=5, tokens=(0,)),
    # Blocks with maps that have some of the heads: one each, two, and groups of which the last has fewer; all of them.
    Case(head_dim=64, queries=70, heads=5, batch=1, tokens=every(77)),
    Case(head_dim=64, queries=130, heads=5, batch=1, tokens=(0, 3, 63, 64), multiprocessors=4, sink=2),
    Case(keys=33, head_dim=80, queries=97, heads=7, batch=2, kv_repeats=2, tokens=(32,), multiprocessors=8),
    Case(keys=128, head_dim=256, queries=49, heads=3, batch=1, tokens=(0, 127), multiprocessors=2, sink=1),
    Case(keys=81, head_dim=160, queries=33, heads=5, batch=3, tokens=every(81), multiprocessors=7),
    Case(head_dim=40, queries=130, heads=3, tokens=(2, 5), multiprocessors=1),
    # Keys and queries far from zero: all logits are, by the same amount or nearly so.
    Case(head_dim=64, queries=65, heads=4, batch=1, tokens=every(77), multiprocessors=4, mean=6.0),
    Case(keys=19, head_dim=40, queries=33, heads=4, batch=2, tokens=(0, 18), sink=3, mean=4.0, multiprocessors=6),
]


def composition(call, dtype):
    """Out and maps by plain matrix products in ``dtype``; the definition where that is float64."""
    c = call.case
    q = call.q.to(dtype)
    k, v = (x.to(dtype).repeat_interleave(c.kv_repeats, 0) for x in (call.k, call.v))
    logits = (q @ k.mT) * call.scale
    logits = torch.cat([logits, logits.new_zeros(*logits.shape[:-1], c.sink)], -1)
    logits = logits.to(torch.promote_types(dtype, torch.float32))
    probabilities = logits.softmax(-1)[..., : c.keys].to(dtype)
    maps = probabilities.to(logits.dtype).mean(1)[..., list(c.tokens)]
    return probabilities @ v, maps


def assert_no_worse(actual, eager, exact):
    # Errors of n numbers are told apart to about 1 / sqrt(n) only.
    floor = FLOOR + torch.finfo(actual.dtype).eps * exact.abs().max() * actual.numel() ** -0.5
    for times, size in (
        (TIMES_EAGER_MEAN, lambda x: x.square().mean().sqrt()),
        (TIMES_EAGER_MOST, lambda x: x.abs().max()),
    ):
        assert size(actual.double() - exact) <= times * size(eager.double() - exact) + floor


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_emulated_kernel_is_the_definition(emulated, case, dtype):
    call = Call(case, dtype)
    error = call.run(emulated)
    assert error is None, error.decode()
    assert call.guards_are_whole()

    out, maps = composition(call, torch.float64)
    eager_out, eager_maps = composition(call, dtype)
    assert call.out.isfinite().all()
    assert_no_worse(call.out, eager_out, out)
    if case.tokens:
        assert_no_worse(call.maps, eager_maps, maps)


def test_the_largest_of_logits_in_the_billions_takes_everything(emulated):
    """Where one rounding of a logit is hundreds, as far as the softmax of others reaches."""
    call = Call(Case(head_dim=8, queries=9, heads=1, batch=1, tokens=every(77)), torch.bfloat16)
    call.q.copy_(torch.linspace(4e4, 5e4, 9)[:, None].expand(9, 8))
    call.k.copy_(torch.linspace(-5e4, 5e4, 77)[:, None].expand(77, 8))
    call.v.copy_(torch.arange(77.0)[:, None].expand(77, 8))
    for call.scale in (0.7, 1.0, 3.0):
        assert call.run(emulated) is None
        assert torch.equal(call.out, torch.full_like(call.out, 76.0))
        assert torch.equal(call.maps, torch.eye(77)[-1:].expand(1, 9, 77))


def test_maps_leave_the_output_alone(emulated):
    for keys, head_dim in [(77, 40), (128, 64), (128, 256)]:
        case = Case(keys=keys, head_dim=head_dim, batch=1)
        plain = Call(case, torch.float16)
        full = Call(dataclasses.replace(case, tokens=every(keys)), torch.float16)
        for call in (plain, full):
            assert call.run(emulated) is None
        assert torch.equal(plain.out, full.out)


def test_cases_take_every_path(emulated):
    taken = set()
    for case in CASES:
        layout = Layout()
        emulated.describe(ctypes.byref(Call(case, torch.float16).args()), case.multiprocessors, ctypes.byref(layout))
        taken.add(("groups", layout.groups, bool(case.tokens)))
        taken.add(("one_buffer", layout.one_buffer, bool(case.tokens)))
        taken.add(("warps", layout.warps))
        taken.add(("walks", layout.tiles_a_block > 1, layout.one_buffer))
        taken.add(("short walk", layout.tiles % layout.tiles_a_block != 0))
        if case.tokens:
            last = case.heads - (layout.head_groups - 1) * layout.heads_a_block
            taken.add(("heads", min(2, layout.head_groups), min(3, layout.heads_a_block), layout.one_buffer))
            taken.add(("last group has fewer", last < layout.heads_a_block))
        taken.add(("half step", layout.padded_dim % 32 != 0, layout.padded_dim != case.head_dim))
    assert taken >= {("groups", n, maps) for n in (1, 2, 4, 5, 8) for maps in (False, True)}
    assert taken >= {("one_buffer", a, b) for a in (False, True) for b in (False, True)}
    assert taken >= {("walks", a, b) for a in (False, True) for b in (False, True)}
    assert taken >= {("half step", a, b) for a, b in [(False, False), (False, True), (True, False), (True, True)]}
    assert taken >= {("heads", 2, 1, False), ("heads", 2, 2, False), ("heads", 1, 3, False), ("heads", 2, 3, False)}
    assert taken >= {("heads", 2, 1, True), ("heads", 2, 2, True), ("last group has fewer", True)}
    assert taken >= {("warps", 1), ("warps", 2), ("warps", 4), ("short walk", True)}


def test_layouts_of_all_sizes(emulated):
    layout, args = Layout(), Args(batch=2, heads=8, kv_repeats=1)
    loads = [(1, 0, 108), (64, 1, 108), (9216, 0, 132), (4097, 1, 20)]
    for args.keys, args.head_dim, load in itertools.product(range(1, 129), range(8, 257, 8), loads):
        args.queries, args.map_count, multiprocessors = load
        args.maps = 16 if args.map_count else None
        emulated.describe(ctypes.byref(args), multiprocessors, ctypes.byref(layout))
        assert layout.shared_bytes <= 99 * 1024
        assert 16 * layout.groups >= args.keys
        assert args.head_dim <= layout.padded_dim < args.head_dim + 16
        assert layout.pitch % 32 == 16
        tile = layout.warps * (32 if layout.groups <= 5 and not args.map_count else 16)
        assert tile * layout.tiles >= args.queries > tile * (layout.tiles - 1)
        covered = layout.splits * layout.tiles_a_block
        assert covered >= layout.tiles > covered - layout.tiles_a_block
        heads = layout.head_groups * layout.heads_a_block
        assert heads >= args.heads > heads - layout.heads_a_block


#: What the networks have with maps: (batch, heads, queries, head_dim).
WITH_MAPS = [(2, 8, 4096, 40), (2, 8, 1024, 80), (2, 8, 256, 160), (2, 10, 4096, 64), (2, 20, 1024, 64)]


def test_maps_leave_no_processor_idle(emulated):
    """Blocks for 97 of 100 processors of an H100 at least, where one walked over all heads: 8 to 64 of them."""
    layout = Layout()
    for batch, heads, queries, head_dim in WITH_MAPS:
        args = Args(batch=batch, heads=heads, queries=queries, keys=77, head_dim=head_dim, kv_repeats=1, map_count=12)
        args.maps = 16
        emulated.describe(ctypes.byref(args), 132, ctypes.byref(layout))
        assert layout.splits * batch * layout.head_groups >= 0.96 * 132
        # What the head groups write and read again, beside q and out.
        if queries >= 4096:
            assert 2 * layout.head_groups * 12 * 4 <= 2 * heads * head_dim * 2 * 0.15


def test_head_groups_need_a_workspace(emulated):
    args = Call(Case(tokens=(3,), batch=1), torch.float16).args()
    assert emulated.forward(ctypes.byref(args), 108, None) == b"workspace must be a device pointer, got null"


def test_same_arguments_same_bits(emulated):
    calls = [Call(Case(heads=5, batch=1, tokens=every(77), multiprocessors=4), torch.bfloat16) for _ in range(2)]
    assert all(call.run(emulated) is None for call in calls)
    assert torch.equal(calls[0].maps, calls[1].maps)


def test_the_runtime_is_asked_once_for_a_device(emulated):
    """A smaller call of the same kernel must not lower the shared memory that a larger one has asked for."""
    asked = []
    for head_dim in (160, 64, 160):
        before = emulated.questions()
        assert Call(Case(head_dim=head_dim, batch=1, multiprocessors=77), torch.float16).run(emulated) is None
        asked.append(emulated.questions() - before)
    # Two attributes, and the setting of the function.
    assert asked == [3, 0, 0]


def test_empty_inputs_launch_nothing(emulated):
    for name in ("batch", "heads", "queries"):
        args = Args(batch=1, heads=1, queries=1, keys=77, head_dim=40, kv_repeats=1, scale=1)
        setattr(args, name, 0)
        assert emulated.forward(ctypes.byref(args), 108, None) is None


OBSTACLES = {
    "dtype must be float16 (0) or bfloat16 (1), got 2": {"dtype": 2},
    "batch must be at least 0, got -1": {"batch": -1},
    "heads must be at least 0, got -1": {"heads": -1},
    "queries must be at least 0, got -1": {"queries": -1},
    "keys must be 1 to 128, got 0": {"keys": 0},
    "keys must be 1 to 128, got 129": {"keys": 129},
    "head_dim must be a multiple of 8 up to 256, got 0": {"head_dim": 0},
    "head_dim must be a multiple of 8 up to 256, got 44": {"head_dim": 44},
    "head_dim must be a multiple of 8 up to 256, got 264": {"head_dim": 264},
    "kv_repeats must divide batch, got 0 and 2": {"kv_repeats": 0},
    "kv_repeats must divide batch, got 3 and 2": {"kv_repeats": 3},
    "sink must be at least 0, got -2": {"sink": -2},
    "scale must be positive and finite, got 0": {"scale": 0.0},
    "scale must be positive and finite, got inf": {"scale": float("inf")},
    "scale must be positive and finite, got nan": {"scale": float("nan")},
    "map_count must be the number of bits in map_mask (1), got 2": {"map_count": 2},
    "map_mask must choose keys below 77, got key 77": {"map_mask": (ctypes.c_uint64 * 2)(0, 1 << 13)},
    "batch * heads * queries / 16 must be below 2**31, got 2 * 2 * 2147483600 / 16": {"queries": 2147483600},
    "batch * heads * queries / 16 must be below 2**31, got 65536 * 65536 * 65 / 16": {"batch": 65536, "heads": 65536},
    "maps must be a device pointer when map_count is 1, got null": {"maps": None},
    "q must be a device pointer, got null": {"q": None},
    "out must be a device pointer, got null": {"out": None},
    "k must be aligned to 16 bytes, got an address 8 past that": {"k": 4104},
    "the row stride of q must be a multiple of 8 elements, got 41": {"q_strides": Strides(80, 40, 41)},
    "the head stride of k must be a multiple of 8 elements, got 1": {"k_strides": Strides(80, 1, 80)},
    "the batch stride of v must be a multiple of 8 elements, got 4": {"v_strides": Strides(4, 40, 80)},
    "the row stride of out must be a multiple of 8 elements, got 2": {"out_strides": Strides(80, 40, 2)},
}


@pytest.mark.parametrize("message", OBSTACLES)
def test_obstacles(emulated, message):
    call = Call(Case(tokens=(3,)), torch.float16)
    args = call.args()
    assert emulated.obstacle(ctypes.byref(args)) is None
    for name, value in OBSTACLES[message].items():
        setattr(args, name, value)
    assert emulated.obstacle(ctypes.byref(args)).decode() == message
    assert emulated.forward(ctypes.byref(args), 108, None).decode() == message


def test_strides_of_single_rows_are_never_used(emulated):
    args = Call(Case(queries=1, heads=1, batch=1), torch.float16).args()
    args.q_strides = args.out_strides = Strides(1, 3, 5)
    assert emulated.obstacle(ctypes.byref(args)) is None


# In the order of the launcher's enumeration; warps run in increasing order, so that the distance decides who is early.
MISTAKES = [
    (None, -32),
    ("load_shared at .* meets a copy under way", -32),
    ("load_shared at .* races with a write by thread", -32),
    ("load_shared at .* races with a write by thread", -32),
    ("store_shared at .* races with a read by thread", 32),
    ("load_shared at 80 reads what nothing has written", -32),
    ("load_shared at .* is outside the 1024 bytes", -32),
    ("load_shared at .* is not aligned to 16 bytes", -32),
    ("store_global writes an address again", -32),
    ("lanes of a warp call __.* and __.* together", -32),
    ("deadlock", -32),
]


@pytest.mark.parametrize("mistake", range(len(MISTAKES)), ids=lambda i: str(MISTAKES[i][0]))
def test_the_emulator_notices(emulated, mistake):
    message, distance = MISTAKES[mistake]
    values, out = torch.arange(256, dtype=torch.int32), torch.zeros(256, dtype=torch.int32)
    error = emulated.run_exercise(ctypes.byref(Exercise(values.data_ptr(), out.data_ptr(), distance, mistake)))
    if message is None:
        assert error is None
        assert torch.equal(out, values[:128].repeat(2))
    else:
        assert re.match(message, error.decode())


# Each takes ptxas many seconds, and 8.6 and 9.0 are compiled as 8.9 and 9.0a are.
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["80", "89", "90a"])
def test_nvcc_spills_no_registers(architecture, tmp_path):
    # Two element types, five numbers of keys, with and without maps; and the sum over head groups.
    assert cuda_sources.memory_of_kernels("cross_attention", architecture, tmp_path) == [("0", "0", "0")] * 21


@pytest.mark.parametrize(
    "source", sorted((cuda_sources.FOLDER.parent / "registration").glob("*.cpp")), ids=lambda p: p.stem
)
def test_the_bindings_compile_with_cuda(source):
    """What a CPU build of PyTorch leaves out of them."""
    include = Path(torch.__file__).parent / "include"
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    flags = ["-fsyntax-only", "-Wall", "-Werror", "-std=c++17", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    flags += ["-DDIFFFAST_WITH_CUDA", "-DUSE_CUDA", f"-I{cuda_sources.FOLDER.parent}", f"-isystem{include}"]
    result = subprocess.run(["g++", *flags, str(source)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
