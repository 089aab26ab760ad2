"""Others' code in the UNet runs as in the stock loop, at every step and on whole batches, and the report says so."""

import contextlib
import functools
import warnings

import pytest
import torch
from others import OTHERS, FadingOut, processors
from sampling import largest, latents
from slowly import mostly_slow
from tolerances import EXACT_FLOAT32

from difffast import CfgReuse, EncoderPropagation, FeatureReuse, patched
from difffast.surgery.origin import find_origin

STEPS = 10
SHARING = {
    "ahead": {"propagation": EncoderPropagation(key_steps=3)},
    "outer layers": {"propagation": FeatureReuse(2)},
    "halves": {"propagation": EncoderPropagation(key_steps=1), "cfg": CfgReuse(2)},
}


def run(pipe, **options):
    return latents(pipe, **{"steps": STEPS, **options})


@contextlib.contextmanager
def both(pipe, others, *args, **options):
    """A patched pipeline with others' code in it; yields the patch's report, and what the code has seen."""
    with contextlib.ExitStack() as stack:
        put_in = lambda: stack.enter_context(OTHERS[others](pipe))  # noqa: E731
        before = put_in() if others == "a subclass of the UNet" else None
        report = stack.enter_context(patched(pipe, *args, **options))
        yield report, before if before is not None else put_in()


@pytest.mark.parametrize("others", OTHERS)
@pytest.mark.parametrize("sharing", mostly_slow(SHARING, "ahead"))
def test_it_runs_as_in_the_stock_loop(pipe, others, sharing):
    plain = run(pipe)
    with OTHERS[others](pipe) as seen:
        stock, calls = run(pipe), seen.copy()
        seen.clear()
    assert largest(stock, plain) > 1e-3, "it must show"
    with both(pipe, others, **SHARING[sharing], fused=False) as (report, seen):
        with pytest.warns(UserWarning, match="every step is a key step: "):
            assert torch.equal(run(pipe), stock)
        assert seen == calls
    last = report.last_run
    assert last.propagated + last.reused + last.halves == 0
    assert any(reason.startswith("every step is a key step: ") for reason in last.reasons)
    with patched(pipe, **SHARING[sharing]) as report:
        run(pipe)
    assert not report.last_run.reasons, "it is gone"


@pytest.mark.parametrize("others", mostly_slow(OTHERS, "a method of a class", "scaled_dot_product_attention"))
def test_exact_lets_it_do_what_it_does(pipe, others):
    with OTHERS[others](pipe) as seen:
        stock, calls = run(pipe), seen.copy()
        seen.clear()
    with both(pipe, others, "exact") as (_, seen), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "difffast: (attn2 layers run stock|no layer is fused: .* has been replaced)")
        assert largest(run(pipe), stock) <= EXACT_FLOAT32
        assert seen == calls


def test_a_hook_that_only_looks_on_changes_nothing(pipe):
    def look(*_):
        seen.append(1)

    look.observes, seen = True, []
    pipe.unet.mid_block.register_forward_hook(look)
    with patched(pipe, propagation=FeatureReuse(2)) as report:
        run(pipe)
    assert len(seen) == report.last_run.key < report.last_run.total


def test_it_comes_and_goes_in_the_middle_of_a_run(pipe):
    """Decoded steps are thrown away when it comes; when it goes, this run stays as it is."""

    def change(pipe, step, timestep, tensors):
        if step == 3:
            stack.enter_context(processors(pipe, FadingOut))
        return tensors

    with contextlib.ExitStack() as stack:
        stock = run(pipe, callback_on_step_end=change)
    results = []
    for parallel in (True, False):
        config = EncoderPropagation(key_steps=(0, 1, 2, 3), parallel=parallel)
        with (
            contextlib.ExitStack() as stack,
            patched(pipe, propagation=config) as report,
            pytest.warns(UserWarning, match="FadingOut"),
        ):
            results.append(run(pipe, callback_on_step_end=change))
        assert (report.last_run.key, report.last_run.propagated) == (10, 0)
    for result in results:
        assert largest(result, stock) <= EXACT_FLOAT32


def test_where_functions_come_from():
    assert find_origin(run) == __name__
    assert find_origin(functools.wraps(torch.nn.Linear.forward)(run)) == __name__
    assert find_origin(functools.partial(run, steps=3)) == __name__
    assert find_origin(torch.nn.Linear.forward) == "torch.nn.modules.linear"
    assert find_origin(len) == "builtins"
