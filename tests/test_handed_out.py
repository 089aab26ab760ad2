"""What recorded graphs leave for others is handed out where it lies, and changes under nobody's hands."""

import gc

import pytest
import torch
from recorder import CpuRecorder
from sampling import largest, latents

import difffast
from difffast import EncoderPropagation, FeatureReuse, patched
from difffast.engines import graphs
from difffast.engines.handed_out import HandedOut, find_owner
from difffast.sampling.controller import find_controller


def test_whoever_holds_a_view_of_a_view_holds_the_result():
    graph, results = HandedOut(), [torch.arange(24.0).view(2, 3, 4), torch.ones(0)]
    with torch.no_grad():
        out, empty = graph.hand_out(results)
        assert torch.equal(out, results[0])
        assert out.data_ptr() == results[0].data_ptr()
        assert empty.shape == (0,)
        view = out[1:].transpose(1, 2)
        del out
        gc.collect()
        assert graph.is_held()
        place = graph.locate(view)
        assert torch.equal(place, view)
        assert (place.data_ptr(), place.stride()) == (view.data_ptr(), view.stride())
        assert place.untyped_storage()._cdata == results[0].untyped_storage()._cdata, "it holds nothing that is out"
        assert graph.locate(results[0]) is None
        del view
        gc.collect()
    assert not graph.is_held()


def test_values_of_two_graphs_are_copied():
    one, two = HandedOut(), HandedOut()
    (a,), (b,) = one.hand_out([torch.ones(3)]), two.hand_out([torch.ones(3)])
    other = torch.ones(3)
    assert find_owner([one, two], [a, b, other]) is None
    assert find_owner([one, two], [other]) is None
    assert find_owner([one, two], [other, b]) is two
    assert two.owns(b)
    assert not two.owns(other)


@pytest.fixture
def recorded(pipe):
    def patch(**options):
        difffast.patch(pipe, engine="cudagraphs", **options)
        engine = graphs.Graphs(CpuRecorder())
        find_controller(pipe.unet)._engines["cudagraphs"] = engine
        return engine

    yield pipe, patch
    difffast.unpatch(pipe)


PLANS = {
    "propagation": EncoderPropagation(key_steps=(0, 1, 4, 7, 9, 11)),
    "step by step": EncoderPropagation(key_steps=(0, 1, 4, 7, 9, 11), parallel=False),
    "reuse": FeatureReuse(3),
    "reuse, extrapolated": FeatureReuse(3, extrapolate=2),
}


@pytest.mark.parametrize("plan", PLANS)
def test_images_are_what_runs_eagerly_with_features_where_they_lie(recorded, plan):
    pipe, patch = recorded
    with patched(pipe, propagation=PLANS[plan], engine="eager"):
        expected = [latents(pipe, steps=13, seed=seed) for seed in range(3)]
    engine = patch(propagation=PLANS[plan])
    found = [latents(pipe, steps=13, seed=seed) for seed in range(3)]
    assert [largest(a, b) for a, b in zip(found, expected, strict=True)] == [0, 0, 0]
    given = [b.given for recording in engine._recordings.values() for b in recording.buffers]
    assert any(given) or "extrapolated" in plan
    kept = len(engine._recordings)
    latents(pipe, steps=13, seed=3)
    assert len(engine._recordings) == kept, "nothing is recorded for a later image"


def test_results_that_somebody_keeps_stay_as_they_are(recorded, monkeypatch):
    """Features of all key steps of an image, held to its end: each is what was computed at its step."""
    pipe, patch = recorded
    patch(propagation=PLANS["propagation"])
    latents(pipe, steps=13)
    kept = []
    run = graphs._Recording.read_outputs

    def keep(self):
        outputs = run(self)
        graphs._map(lambda tensor: kept.append((tensor, tensor.clone())), outputs)
        return outputs

    monkeypatch.setattr(graphs._Recording, "read_outputs", keep)
    latents(pipe, steps=13, seed=1)
    assert len(kept) > 20
    assert all(torch.equal(tensor, then) for tensor, then in kept)
