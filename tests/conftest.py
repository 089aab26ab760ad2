import copy
import os
import tempfile

import pytest
import torch

if not torch.cuda.is_available():
    # Before any kernel is imported, also Triton's own (transformers does): Triton reads it when a kernel is defined.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# What has been proved on this machine is no part of the tests.
os.environ["DIFFFAST_CACHE"] = os.path.join(tempfile.gettempdir(), f"difffast-tests-{os.getpid()}")  # noqa: PTH118

import transformers.models.clip.modeling_clip as clip
import unets
from triton_interpreter import as_hardware

import difffast
from difffast.ops import _local

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))


def _build(in_channels=4):
    pipe = difffast.models.tiny_pipeline("sd", channels=(32, 64), sample_size=8, in_channels=in_channels)
    pipe.unet = unets.make_small(in_channels=in_channels)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def _built():
    return _build()


@pytest.fixture(scope="session")
def _built_inpaint():
    return _build(in_channels=9)


@pytest.fixture(autouse=True)
def _seeded():
    """What a test draws without a generator of its own is the same in every run, and so are the threads it has."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == threads, "the tests after this one would have other threads"


@pytest.fixture(scope="session", autouse=True)
def _interpreter():
    with as_hardware():
        yield


@pytest.fixture
def one_level():
    """A pipeline with a UNet of one level, whose models are converted fast."""
    from engine_histories import EngineHistory

    return EngineHistory(0, lambda pipe: None).pipe


@pytest.fixture
def models_folder(tmp_path, monkeypatch):
    """An empty folder for the files of OpenVINO's models."""
    monkeypatch.setenv("DIFFFAST_CACHE", str(tmp_path))
    return tmp_path / "openvino"


@pytest.fixture(scope="session", autouse=True)
def _no_races():
    """Which of a model and Python is faster depends on what else runs here; tests of that say when they compare."""
    with pytest.MonkeyPatch.context() as context:
        context.setattr("difffast.engines.race.SHORTEST", float("inf"))
        yield


@pytest.fixture(scope="session", autouse=True)
def _clip_in_float64():
    """Before transformers 5.0 CLIP cannot run in float64: its mask holds float64's lowest number, in float32."""
    name = "_create_4d_causal_attention_mask"
    with pytest.MonkeyPatch.context() as monkeypatch:
        if create := getattr(clip, name, None):

            def in_range(shape, dtype, **options):
                return create(shape, torch.float32 if dtype == torch.float64 else dtype, **options).to(dtype)

            monkeypatch.setattr(clip, name, in_range)
        yield


@pytest.fixture
def proof_cache(tmp_path, monkeypatch):
    """A cache folder of the test's own, where nothing has been proved."""
    monkeypatch.setenv("DIFFFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DIFFFAST_PROVE", raising=False)
    _local.forget_tables()
    yield tmp_path / "cache"
    _local.forget_tables()


@pytest.fixture
def pipe(_built):
    """A small Stable Diffusion pipeline of the test's own: float32, 8x8 latents, deepest level 4x4.

    Its encoder has one layer a level, its decoder two: two thirds of the time of Stable Diffusion's two and three.
    """
    return copy.deepcopy(_built)


@pytest.fixture
def pipe_of_all_layers():
    """The same with as many layers as Stable Diffusion has, where their number matters."""
    pipe = difffast.models.tiny_pipeline("sd", channels=(32, 64), sample_size=8)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe64(_built):
    """The same in float64, for tolerances that leave no room."""
    return copy.deepcopy(_built).to(dtype=torch.float64)


@pytest.fixture
def inpaint_pipe64(_built_inpaint):
    """The nine-channel inpainting layout in float64."""
    return copy.deepcopy(_built_inpaint).to(dtype=torch.float64)


@pytest.fixture(scope="module")
def _one_thread():
    """For models so small that a second thread costs more than it helps."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def _nan_memory():
    """Uninitialised memory is NaN (integers: their largest), whoever allocates it: Python or C++."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
