"""Every row of the support table, on a real Diffusers pipeline with random weights."""

import copy
import functools
import warnings

import pytest
import torch
import video_zoo
import zoo
from sampling import largest
from tolerances import LATENTS_FLOAT64

from difffast import EncoderPropagation, FeatureReuse, patch, patched, support, unpatch
from difffast.swap import is_swapped

pytestmark = pytest.mark.usefixtures("_one_thread")

ROWS = {**zoo.ROWS, **video_zoo.ROWS}

#: Half of the steps share features, in segments of different lengths.
KEYS = (0, 1, 4, 6)
AHEAD = EncoderPropagation(key_steps=KEYS, max_parallel=3)
STEP_BY_STEP = EncoderPropagation(key_steps=KEYS, parallel=False)
ALL_KEY = EncoderPropagation(key_steps=1)


@functools.cache
def built(name):
    pipe = ROWS[name].build()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(params=ROWS)
def row(request):
    return ROWS[request.param]


@pytest.fixture
def pipe(request, row):
    """The row's pipeline in float64."""
    name = next(name for name, each in ROWS.items() if each is row)
    return copy.deepcopy(built(name)).to(dtype=torch.float64)


def run(row, pipe, inputs=None):
    """The last latents of a run, in which nothing but what the row says may be warned of."""
    with warnings.catch_warnings():
        for message in row.warnings:
            warnings.filterwarnings("ignore", message)
        latents = row.run(pipe, inputs or row.inputs)
    assert latents.isfinite().all()
    return latents


def test_every_supported_pipeline_has_a_row():
    assert {name.partition(":")[0] for name in ROWS} == set(support.PIPELINES)
    for name in ROWS:
        assert type(built(name)).__name__ == name.partition(":")[0]


def test_a_pipeline(row, pipe):
    """All-key is stock bit for bit, look-ahead is step by step, other inputs after it are right, unpatch is exact."""
    supported = support.support_of(type(pipe))
    state, classes = vars(pipe.unet).copy(), {name: type(module) for name, module in pipe.unet.named_modules()}
    stock, stock_other = run(row, pipe), run(row, pipe, row.other)
    with patched(pipe, propagation=ALL_KEY, fused=False):
        assert torch.equal(run(row, pipe), stock)
        assert torch.equal(run(row, pipe, row.other), stock_other)
    with patched(pipe, "exact"):
        assert largest(run(row, pipe), stock) <= LATENTS_FLOAT64

    with patched(pipe, propagation=STEP_BY_STEP):
        slow, slow_other = run(row, pipe), run(row, pipe, row.other)
    with patched(pipe, propagation=AHEAD) as report:
        fast = run(row, pipe)
        stats = report.last_run
        other = run(row, pipe, row.other)
        again = run(row, pipe)
    assert largest(fast, slow) <= LATENTS_FLOAT64
    assert largest(other, slow_other) <= LATENTS_FLOAT64
    assert torch.equal(again, fast)
    assert largest(fast, stock) > 1000 * LATENTS_FLOAT64, "propagation must have taken place"
    assert stats.propagated > 0
    assert (stats.stock, stats.forced) == (0, 0)
    assert (max(stats.decode_batches) > 1) == supported.parallel
    assert any("one at a time" in note for note in report.notes) != supported.parallel

    reuse = FeatureReuse(interval=2)
    if supported.reuse:
        with patched(pipe, propagation=FeatureReuse(interval=1), fused=False):
            assert torch.equal(run(row, pipe), stock)
        with patched(pipe, propagation=reuse) as report:
            reused = run(row, pipe)
        assert report.last_run.reused > 0
        assert (report.last_run.stock, report.last_run.forced) == (0, 0)
        assert largest(reused, stock) > 1000 * LATENTS_FLOAT64
    else:
        with pytest.raises(ValueError, match="reuse"):
            patch(pipe, propagation=reuse)

    if not supported.prior_noise:
        with pytest.raises(ValueError, match="prior noise"):
            patch(pipe, propagation=EncoderPropagation(prior_noise=0.003))

    unpatch(pipe)
    assert vars(pipe.unet) == state
    assert {name: type(module) for name, module in pipe.unet.named_modules()} == classes
    assert not is_swapped(pipe.scheduler)
    assert torch.equal(run(row, pipe), stock)
