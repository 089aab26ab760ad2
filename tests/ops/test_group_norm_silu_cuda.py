"""The CUDA forward kernel of group_norm_silu and skip_norm_silu without a GPU: emulated, and compiled by nvcc.

Emulation (``cuda_emulator.h``) runs the blocks of a cluster together, and reports races, unwritten shared memory and
double stores as launch failures.
"""

import ctypes
import dataclasses
import itertools
import random
import re

import cuda_sources
import pytest
import torch
from norm_launches import DEVICES, DTYPES, FORMATS, LAUNCHER, Args, Call, Case, Exercise, Layout

# Error against float64 relative to eager's in NCHW, over all cases of a dtype, and the largest of one case.
TIMES_EAGER_MEAN = 1.2
TIMES_EAGER_MOST = 3.0


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """The kernel compiled for the host."""
    loaded = cuda_sources.emulated(tmp_path_factory.mktemp("emulated"), LAUNCHER)
    for function in (loaded.obstacle, loaded.forward, loaded.workspace, loaded.run_exercise):
        function.restype = ctypes.c_char_p
    loaded.describe.restype = loaded.use_device.restype = None
    loaded.let_read.restype, loaded.let_read.argtypes = None, [ctypes.c_void_p, ctypes.c_int64]
    loaded.forward.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    return loaded


#: What is fused, by number: nothing, each kind of addend, scale and shift.
FUSED = [
    {},
    {"addend": "rows", "silu": False},
    {"addend": "rows", "addend_repeats": 2, "scaled": True},
    {"addend": "pixels", "addend_repeats": 2},
    {"addend": "pixels", "scaled": True},
    {"scaled": True},
]


def chosen_by_chance():
    """Sizes that are no multiple of anything, and any alignment."""
    pick = random.Random(0)
    for i in range(48):
        groups, size = pick.choice((1, 2, 3, 5, 8, 32)), pick.choice((1, 2, 3, 7, 10, 16, 33))
        pixels = pick.choice(((1, 1), (3, 5), (4, 4), (7, 9), (8, 8), (13, 10)))
        other = {"device": list(DEVICES)[i % 3], "past": pick.choice((0, 0, 1, 2, 4))}
        if i % 2:
            steps = pick.choice((1, 2, 3))
            own = pick.randrange(1, groups * size) if groups * size > 1 else 1
            rest = groups * size - own
            if rest:
                batch = steps * pick.choice((1, 2))
                yield Case(batch, own, pixels, groups, rest, steps, silu=bool(i % 4), **other)
        else:
            batch, fused = pick.choice((1, 2, 4)), FUSED[i // 2 % len(FUSED)]
            fused = {**fused, "addend_repeats": 1} if batch % fused.get("addend_repeats", 1) else fused
            yield Case(batch, groups * size, pixels, groups, **fused, **other)


#: Those whose numbers are enough to tell errors apart, too.
LARGE = [
    # In NHWC columns are more than one vector, in NCHW rows of pixels are split among the blocks of a cluster.
    Case(1, 20, (40, 30), 2, device="sm_90"),
    Case(1, 20, (40, 30), 2, addend="pixels", device="sm_90"),
    Case(2, 40, (32, 20), 4, addend="rows", scaled=True, device="sm_90", mean=30.0),
    # More than one launch: too much for one block and too few blocks for the device.
    Case(1, 20, (40, 30), 1, device="sm_89"),
    Case(1, 20, (41, 31), 1, addend="rows", device="sm_80", mean=30.0),
    Case(1, 20, (31, 41), 1, addend="pixels", device="sm_80", past=1),
    # Steps of SDXL's and DeepFloyd's straddling groups, and one in which all of the skip is.
    Case(2, 40, (18, 20), 4, 20, 2, device="sm_90"),
    Case(2, 22, (32, 40), 2, 20, 2, device="sm_89"),
    Case(3, 30, (16, 20), 1, 2, 3, device="sm_90"),
]
SMALL = [
    *chosen_by_chance(),
    # Rows of more vectors than a block has threads, one group in all and the widest one.
    Case(1, 2048, (2, 1), 1),
    Case(1, 2048, (1, 3), 1, addend="pixels", device="sm_90"),
    Case(1, 1000, (3,), 1, 1048, past=1),
    # Parts of a cluster without pixels: 70 are five vectors of 16 for eight blocks.
    Case(1, 600, (70,), 1, device="sm_90"),
    *(Case(batch, 6, (3, 3), 2, addend="rows", addend_repeats=batch) for batch in (3, 5, 7, 9, 11, 13, 15, 16)),
    Case(0),
]


def check(emulated, case, dtype, layout):
    """-> squares of the errors against float64, ours and eager's, and their number"""
    if len(case.pixels) == 1:
        layout = "NCHW"
    call = Call(case, dtype, layout)
    error = call.run(emulated)
    assert error is None, error.decode()
    assert call.guards_are_whole()
    squares = torch.zeros(3, dtype=torch.float64)
    for ours, eager, exact in zip(
        (call.out, call.shared), call.definition(dtype), call.definition(torch.float64), strict=False
    ):
        assert ours.shape == exact.shape
        if not ours.numel():
            continue
        assert ours.isfinite().all()
        errors = [(ours.double() - exact).abs(), (eager.double() - exact).abs()]
        # A single number is right to two units in the last place, and to what its mean loses.
        least = 2 * torch.finfo(dtype).eps * float(exact.abs().max() + case.mean / 4)
        assert errors[0].max() <= TIMES_EAGER_MOST * errors[1].max() + least
        squares += torch.tensor([*(float(e.square().sum()) for e in errors), ours.numel()], dtype=torch.float64)
    return squares


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_emulated_kernel_is_the_definition(emulated, case, layout):
    for dtype in DTYPES:
        check(emulated, case, dtype, layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", FORMATS)
def test_error_is_no_worse_than_eager(emulated, layout, dtype):
    for mean in (None, 1e3) if dtype == torch.float32 else (None,):
        cases = LARGE if mean is None else [dataclasses.replace(LARGE[i], mean=mean) for i in (0, 3, 7)]
        ours, eager, count = sum(check(emulated, case, dtype, layout) for case in cases)
        assert count > 1e4
        assert (ours / count).sqrt() <= TIMES_EAGER_MEAN * (eager / count).sqrt(), f"{float((ours / eager).sqrt()):.3f}"


def test_same_arguments_same_bits(emulated):
    for case in (LARGE[1], LARGE[3]):
        calls = [Call(case, torch.float32, "NHWC") for _ in range(2)]
        assert all(call.run(emulated) is None for call in calls)
        assert torch.equal(calls[0].out, calls[1].out)


def test_nan_stays_in_its_group(emulated):
    for layout, device in itertools.product(FORMATS, DEVICES):
        call = Call(Case(2, 12, (20, 30), 6, device=device), torch.float32, layout)
        # A group's first number, which its differences are taken from, the slab's first, and any other.
        for place in ((0, 0, 0, 0), (0, 4, 0, 0), (1, 9, 13, 7)):
            call.x[place] = float("nan")
        assert call.run(emulated) is None
        expected = torch.zeros(call.out.shape, dtype=torch.bool)
        expected[0, :2] = expected[0, 4:6] = expected[1, 8:10] = True
        assert torch.equal(call.out.isnan(), expected)


def test_large_results(emulated):
    """SiLU is u for a large u, and 0, not NaN, for a large -u."""
    for dtype, factor in itertools.product(DTYPES, (100.0, 1e3, 3e4)):
        call = Call(Case(1, 1, (2,), 1), dtype, "NCHW")
        call.x[0, 0, 0], call.x[0, 0, 1] = -1.0, 1.0
        call.weight[0], call.bias[0] = factor, 0.0
        assert call.run(emulated) is None
        low, high = call.out.flatten().tolist()
        assert -1e-6 < low <= 0
        assert high == pytest.approx(factor, rel=1e-2)


def test_cases_take_every_path(emulated):
    taken = set()
    for case, layout in itertools.product([*SMALL, *LARGE], FORMATS):
        if case.batch == 0 or (len(case.pixels) == 1 and layout == "NHWC"):
            continue
        plan = Call(case, torch.float16, layout).layout_on(emulated, case.device)
        passes = ("two passes", "one block", "a cluster")[plan.one_pass * (1 + (plan.parts > 1))]
        taken |= {(layout, passes), (layout, passes, case.addend), (layout, passes, bool(case.of_skip))}
        if passes == "two passes":
            taken.add((layout, "parts", plan.parts > 1))
        pixels = torch.Size(case.pixels).numel()
        if plan.parts * plan.span - pixels >= plan.span:
            taken.add((layout, passes, "a part without pixels"))
    for layout, passes in itertools.product(FORMATS, ("two passes", "one block", "a cluster")):
        assert (layout, passes) in taken
        assert {(layout, passes, kind) for kind in ("", "rows", "pixels", False, True)} <= taken
    assert ("NCHW", "a cluster", "a part without pixels") in taken
    assert {(layout, "parts", True) for layout in FORMATS} <= taken


#: (batch, channels, pixels): what the networks have, for one image and for many.
PUBLISHED = [
    *((batch, channels, 64 * 64) for batch in (2, 16) for channels in (320, 640, 960)),
    *((batch, channels, 32 * 32) for batch in (2, 16) for channels in (640, 1280, 1920)),
    *((2, channels, pixels) for channels in (1280, 2560) for pixels in (256, 64)),
    *((2, channels, 128 * 128) for channels in (320, 640, 960)),
    (2, 320, 96 * 96),
    (2, 640, 48 * 48),
]


def args_of(batch, channels, pixels, dtype, layout, *, addend=False):
    args = Args(dtype=DTYPES[dtype], channels_last=layout == "NHWC", batch=batch, channels=channels, pixels=pixels)
    args.groups, args.eps, args.own, args.kept = 32, 1e-5, channels, channels
    args.repeats = args.addend_repeats = 1
    args.addend = 16 if addend else None
    return args


def layout_of(emulated, device, *sizes, **options):
    layout, args = Layout(), args_of(*sizes, **options)
    emulated.use_device(*DEVICES[device])
    emulated.describe(ctypes.byref(args), ctypes.byref(layout))
    return layout


@pytest.mark.parametrize("layout", FORMATS)
def test_layouts_of_published_shapes(emulated, layout):
    """Pixels are read once where they fit into the cluster's memory, by blocks for at least 6 of 7 processors."""
    for batch, channels, pixels in PUBLISHED:
        plan = layout_of(emulated, "sm_90", batch, channels, pixels, torch.float16, layout)
        assert plan.one_pass or plan.slab_groups * channels // 32 * pixels * 2 > 8 * DEVICES["sm_90"][1]
        blocks = batch * plan.own_slabs * plan.parts
        assert blocks >= 132 * 6 / 7 or plan.tile_bytes < 16 << 10
        if layout == "NHWC":
            assert plan.slab_groups * (channels // 32) * 2 % 16 == 0


def test_layouts_of_all_sizes(emulated):
    sizes = itertools.product((1, 3, 10, 77, 2048), (1, 7, 64, 1000, 9216, 1 << 20), (1, 16), DEVICES, FORMATS, DTYPES)
    for size, pixels, batch, device, layout, dtype in sizes:
        for addend in (False, True):
            plan = layout_of(emulated, device, batch, 32 * size, pixels, dtype, layout, addend=addend)
            _, shared_bytes, clusters, *_ = DEVICES[device]
            assert plan.shared_bytes <= shared_bytes
            assert plan.threads % 32 == 0
            assert 64 <= plan.threads <= 512
            assert plan.own_slabs * plan.slab_groups >= 32 > (plan.own_slabs - 1) * plan.slab_groups
            assert plan.parts * plan.span >= pixels
            # All parts begin where a vector does.
            assert layout == "NHWC" or plan.span * dtype.itemsize % 16 == 0
            if plan.one_pass:
                assert plan.parts in ((1, 2, 4, 8) if clusters else (1,))
            else:
                assert (plan.parts - 1) * plan.span < pixels


def test_no_clusters_where_they_cannot_run(emulated, monkeypatch):
    """Where none fits, as in a small partition of a device, or none is known to, and in kernels for older devices."""
    devices = {(132, 227 << 10, True, 90, processors): processors > 0 for processors in (128, 0, -1)}
    devices[132, 227 << 10, True, 86, 128] = False
    for device, cluster in devices.items():
        monkeypatch.setitem(DEVICES, "this", device)
        plan = layout_of(emulated, "this", 2, 320, 4096, torch.float16, "NCHW")
        assert (plan.one_pass and plan.parts > 1) == cluster
        check(emulated, dataclasses.replace(LARGE[1], device="this"), torch.float16, "NCHW")


@pytest.mark.parametrize(
    ("together", "clusters"), [(16, True), (15, False), (13, False), (12, True), (8, True), (5, True)]
)
def test_no_clusters_that_leave_a_third_of_the_last_wave_empty(emulated, monkeypatch, together, clusters):
    """2 x 960 x 64 x 64 in NHWC are 16 slabs of 8 blocks: in waves of 15, 14 places of 30 would stay empty."""
    monkeypatch.setitem(DEVICES, "this", (132, 227 << 10, True, 90, 8 * together))
    plan = layout_of(emulated, "this", 2, 960, 4096, torch.float16, "NHWC")
    assert plan.one_pass == clusters
    if clusters:
        assert (plan.own_slabs, plan.parts) == (8, 8)


def test_the_runtime_is_asked_once_for_a_device(emulated, monkeypatch):
    """And not for what another device has: nothing about one is taken for the other."""
    monkeypatch.setitem(DEVICES, "one", (130, 227 << 10, True, 90, 128))
    monkeypatch.setitem(DEVICES, "two", (130, 163 << 10, False, 80, 0))
    asked = {}
    for device in ("one", "two", "one", "two"):
        before = emulated.questions()
        check(emulated, dataclasses.replace(LARGE[0], device=device), torch.float16, "NCHW")
        asked.setdefault(device, []).append(emulated.questions() - before)
    # Three attributes, the version of the instructions, the setting of shared memory, clusters of two sizes.
    assert asked["one"][0] > asked["two"][0] == 5
    assert asked["one"][1] == asked["two"][1] == 0


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_group_of_more_bytes_than_32_bits_hold(emulated, dtype, layout):
    """A size that wraps around to nothing would look as if shared memory could hold it."""
    for channels in (256, 512, 1024, 2048):
        plan = layout_of(emulated, "sm_90", 1, 32 * channels, 2048**2, dtype, layout)
        assert not plan.one_pass
        assert plan.parts > 1
        assert 0 < plan.tile_bytes <= plan.shared_bytes <= DEVICES["sm_90"][1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_obstacles(emulated, dtype):
    case = Case(4, 12, (5, 7), 4, 4, 2)
    past = f"x must be aligned to its elements, got an address {dtype.itemsize - 1} past that"
    obstacles = {
        "dtype must be float16 (0), bfloat16 (1) or float32 (2), got 3": {"dtype": 3},
        "batch must be at least 0, got -1": {"batch": -1},
        "pixels must be at least 1, got 0": {"pixels": 0},
        "groups must divide channels, got 0 and 16": {"groups": 0},
        "groups must divide channels, got 5 and 16": {"groups": 5},
        "a group must have at most 2048 channels, got 2052": {"channels": 4 * 2052},
        "kept must be own rounded up to groups of 4, got 13 and 12": {"kept": 13},
        "kept must be own rounded up to groups of 4, got 12 and 17": {"own": 17},
        "repeats must divide batch, got 3 and 4": {"repeats": 3},
        "addend_repeats must divide batch, got 0 and 4": {"addend_repeats": 0},
        "there must be no addend, scale or shift beside a skip, got own 12 of 16 channels": {"addend": 64},
        "scale and shift must be given together, got only shift": {"own": 16, "kept": 16, "shift": 64},
        "eps must be positive and finite, got 0": {"eps": 0.0},
        "eps must be positive and finite, got nan": {"eps": float("nan")},
        "batch * groups * pixels must be below 2**31, got 4 * 4 * 134217728": {"pixels": 1 << 27},
        "x must be a device pointer, got null": {"x": None},
        "skip must be a device pointer, got null": {"skip": None},
        "shared must be a device pointer, got null": {"shared": None},
        past: {"x": 4096 + dtype.itemsize - 1},
    }
    for message, changes in obstacles.items():
        args = Call(case, dtype, "NCHW").args()
        assert emulated.obstacle(ctypes.byref(args)) is None
        for name, value in changes.items():
            setattr(args, name, value)
        assert emulated.obstacle(ctypes.byref(args)).decode() == message
        assert emulated.forward(ctypes.byref(args), None).decode() == message


def test_two_passes_need_a_workspace(emulated):
    call = Call(LARGE[3], torch.float16, "NCHW")
    emulated.use_device(*DEVICES["sm_89"])
    assert emulated.forward(ctypes.byref(call.args()), None) == b"workspace must be a device pointer, got null"


# In the order of the launcher's enumeration.
MISTAKES = [
    None,
    "load_cluster_float at .* (races with a write|reads what nothing has written)",
    "load_cluster_float at 20 reads what nothing has written",
    "store_shared at .* races with a read by another block",
    "a thread ended between cluster_arrive and cluster_wait",
    "load_cluster_float from a block of which threads have ended",
    "load_cluster_float from block 2 of a cluster of 2",
    "cluster_arrive without cluster_wait before it",
    "load_global reads outside of the operands",
    "load_cluster_float after a relaxed arrival, which makes no write seen",
    "cluster_arrive_relaxed may overtake a read of another block",
]


@pytest.mark.parametrize("mistake", range(len(MISTAKES)), ids=lambda i: str(MISTAKES[i]))
def test_the_emulator_notices(emulated, mistake):
    out = torch.zeros(4, 64)
    emulated.use_device(*DEVICES["sm_90"])
    emulated.let_read(None, 0)
    emulated.let_read(out.data_ptr(), out.numel() * 4)
    error = emulated.run_exercise(ctypes.byref(Exercise(out.data_ptr(), mistake)))
    if MISTAKES[mistake] is None:
        assert error is None
        expected = torch.arange(64.0)
        assert torch.equal(out, torch.stack([expected + 100, expected] * 2))
    else:
        assert re.match(MISTAKES[mistake], error.decode())


# The newest always; 8.6 and 9.0 are compiled as 8.9 and 9.0a are.
@pytest.mark.parametrize(
    "architecture", ["90a", *(pytest.param(name, marks=pytest.mark.slow) for name in ("80", "89"))]
)
def test_nvcc_spills_no_registers(architecture, tmp_path):
    # Three element types in two layouts.
    assert cuda_sources.memory_of_kernels("group_norm_silu", architecture, tmp_path) == [("0", "0", "0")] * 6
