"""Runs that end where nobody expects it, with every way of sharing steps: nothing is left, and nobody else is hit."""

import inspect
import signal
import sys

import pytest
import torch
from sampling import latents, scheduler
from slowly import mostly_slow
from threads import in_threads
from watching import watching

from difffast import CfgReuse, EncoderPropagation, FeatureReuse, patch, patched, unpatch
from difffast.layers.context import CURRENT
from difffast.sampling.calls import find_pipeline_call
from difffast.sampling.controller import find_controller
from difffast.surgery.subclass import is_swapped

STEPS = 9
SHARING = {
    "ahead": {"propagation": EncoderPropagation(key_steps=3)},
    "outer layers": {"propagation": FeatureReuse(2)},
    "ahead in halves": {"propagation": EncoderPropagation(key_steps=3), "cfg": CfgReuse(3)},
}


def run(pipe, **options):
    return latents(pipe, **{"steps": STEPS, **options})


def assert_nothing_kept(pipe):
    for each in find_controller(pipe.unet)._runs:
        held = vars(each._strategy)
        assert not any(held.get(name) for name in ("_deep", "_features", "_queue", "_known"))
        assert each._fingerprint is each._cfg._difference is each._kv is None
        assert not each._texts
        assert not each._conditioning._held
    assert CURRENT.get() is None
    assert find_pipeline_call() is None


class Interrupt:
    """Sends the signal of Ctrl-C at the n-th call into difffast inside the block.

    Generators are left out: Python drops whatever is raised in one that is only being closed.
    """

    def __init__(self, at):
        self.left = at

    def __call__(self, frame, event, _argument):
        own = frame.f_globals.get("__name__", "").startswith("difffast.")
        if event == "call" and own and not frame.f_code.co_flags & inspect.CO_GENERATOR:
            self.left -= 1
            if self.left == 0:
                signal.raise_signal(signal.SIGINT)

    def __enter__(self):
        # A shell's background processes ignore the signal.
        self.handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.setprofile(self)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)
        signal.signal(signal.SIGINT, self.handler)


@pytest.mark.parametrize("sharing", mostly_slow(SHARING, "ahead in halves"))
def test_ctrl_c_anywhere_in_a_run(pipe, sharing):
    stock = run(pipe)
    patch(pipe, **SHARING[sharing])
    expected = run(pipe)
    with Interrupt(-1) as counter:
        run(pipe, prompt="two dogs")
    count = -1 - counter.left
    for position in (0.01, 0.2, 0.45, 0.7, 0.95):
        with pytest.raises(KeyboardInterrupt), Interrupt(1 + int(position * count)):
            run(pipe, prompt="two dogs")
        assert_nothing_kept(pipe)
    assert torch.equal(run(pipe), expected)
    unpatch(pipe)
    assert torch.equal(run(pipe), stock)


@pytest.mark.parametrize("sharing", mostly_slow(SHARING, "ahead"))
def test_an_error_in_a_layer(pipe, sharing):
    """In the encoder, the decoder, and a layer that an operator computes around it."""
    unet = pipe.unet
    layers = (
        unet.down_blocks[0].resnets[0].time_emb_proj,
        unet.up_blocks[1].attentions[0].transformer_blocks[0].attn2.to_q,
        unet.conv_out,
    )
    patch(pipe, **SHARING[sharing])
    expected = run(pipe)
    for layer in layers:
        calls = []

        def fail(_layer, _output, calls=calls):
            calls.append(1)
            if len(calls) == 3:
                raise ZeroDivisionError

        with watching(fail, layer), pytest.raises(ZeroDivisionError):
            run(pipe, prompt="two dogs")
        assert_nothing_kept(pipe)
    assert torch.equal(run(pipe), expected)


@pytest.mark.parametrize("sharing", mostly_slow(SHARING, "outer layers"))
@pytest.mark.parametrize("how", ["interrupted", "stopped by a callback"])
def test_memory_is_free_when_the_call_returns(pipe, sharing, how):
    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = step >= 3
        if step == 3 and how != "interrupted":
            raise ZeroDivisionError
        return tensors

    patch(pipe, **SHARING[sharing])
    if how == "interrupted":
        run(pipe, callback_on_step_end=stop)
    else:
        with pytest.raises(ZeroDivisionError):
            run(pipe, callback_on_step_end=stop)
    assert find_controller(pipe.unet)._runs, "it is still there"
    assert_nothing_kept(pipe)


@pytest.mark.parametrize("sharing", mostly_slow(SHARING, "outer layers"))
def test_unpatched_in_a_callback(pipe, sharing):
    stock = run(pipe)

    def act(pipe, step, timestep, tensors):
        if step == 4:
            unpatch(pipe)
        return tensors

    patch(pipe, **SHARING[sharing])
    first = run(pipe, callback_on_step_end=act)
    assert not any(map(is_swapped, [pipe, pipe.scheduler, *pipe.unet.modules()]))
    assert torch.equal(run(pipe), stock)
    patch(pipe, **SHARING[sharing])
    assert torch.equal(run(pipe, callback_on_step_end=act), first)


@pytest.mark.parametrize("sharing", mostly_slow(SHARING, "ahead in halves"))
def test_the_same_pipeline_inside_itself(pipe, sharing):
    """DDIM keeps no state in the scheduler but its schedule, so that stock survives it, and so must we."""
    with patched(pipe, **SHARING[sharing]) as report:
        outer, inner = run(pipe), run(pipe, prompt="two cats")
        seen = []

        def nest(pipe, step, timestep, tensors):
            if step == 4:
                seen.append(run(pipe, prompt="two cats"))
            return tensors

        assert torch.equal(run(pipe, callback_on_step_end=nest), outer)
        assert torch.equal(seen[0], inner)
        assert_nothing_kept(pipe)
        assert report.last_run.total == STEPS


def test_threads_that_share_a_unet_in_different_ways(pipe):
    pipes, expected, results = [], [], {}
    text, negative = pipe.encode_prompt("two dogs", "cpu", 1, True)
    call = {"prompt": None, "prompt_embeds": text, "negative_prompt_embeds": negative}
    for options in SHARING.values():
        own = type(pipe)(**{**pipe.components, "scheduler": scheduler("DDIM")}, requires_safety_checker=False)
        own.set_progress_bar_config(disable=True)
        patch(own, **options)
        pipes.append(own)
        expected.append(run(own, **call))

    def work(i):
        for repeat in range(3):
            results[i, repeat] = run(pipes[i], **call)

    in_threads(work, len(pipes))
    assert len(results) == 3 * len(pipes)
    for (i, _), result in results.items():
        assert torch.equal(result, expected[i])
    assert len({float(each.sum()) for each in expected}) == len(pipes), "they differ"
