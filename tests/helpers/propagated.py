"""Propagation as published, and whether a patched pipeline has kept anything of its runs."""

from difffast import EncoderPropagation
from difffast.sampling.controller import find_controller
from difffast.sampling.decode_ahead import DecodeAhead

PUBLISHED = EncoderPropagation()
STEP_BY_STEP = EncoderPropagation(parallel=False)


def controller_of(pipe):
    return find_controller(pipe.unet)


def assert_nothing_kept(pipe):
    for run in controller_of(pipe)._runs:
        assert run._fingerprint is None
        if isinstance(run._strategy, DecodeAhead):
            assert run._strategy._features is None
            assert not run._strategy._known
            assert not run._strategy._queue
