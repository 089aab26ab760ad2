"""The committed record of proving SD1.5's shapes on a CPU: within its time, and no choice slower than PyTorch."""

import json

import prove_choices
import pytest
import torch

from difffast.ops._keys import Key
from difffast.proofs import collect
from difffast.proofs.candidates import find_candidates, find_default

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def record():
    return json.loads(prove_choices.RECORD.read_text())


def test_all_shapes_are_proved_within_a_minute(record):
    assert record["left"] == []
    assert record["threads"] == 2
    assert record["seconds"] <= 60


def test_no_choice_is_slower_than_pytorch_by_more_than_three_percent(record):
    ratios = {text: prove_choices.find_ratio(record, text) for text in record["proofs"]}
    assert max(ratios.values()) <= 1.03
    chosen = {text for text, entry in record["proofs"].items() if entry["choice"] != entry["default"]}
    assert chosen == set(record["measured"]), "each of them was measured"
    assert all(len(runs) >= 3 for runs in record["measured"].values())


@pytest.mark.slow
def test_the_record_has_the_shapes_that_the_unet_asks_for(record):
    keys = collect.collect(collect.make_dry("sd15", torch.float32, CPU), 2, CPU)
    found = {key.text("eager") for key in keys if len(find_candidates(key, CPU)) > 1}
    assert found == set(record["proofs"])


def test_what_is_measured_is_what_was_chosen_against_pytorchs_own_way(monkeypatch):
    monkeypatch.setattr(prove_choices, "KEY_SECONDS", 0.0)
    key = Key.parse("self_attention float32 2x2x64x8,2x2x64x8,2x2x64x8 any gradient=0")
    text = key.text("eager")
    entry = {"choice": "reference", "default": find_default(key)}
    record = {"proofs": {text: entry, "other eager": {"choice": "sdpa", "default": "sdpa"}}, "measured": {}}
    ways = [*find_candidates(key, CPU)]
    monkeypatch.setattr(
        prove_choices, "find_candidates", lambda *_: [*ways, type(ways[0])("reference", True, ways[0].around, slow)]
    )
    for _ in range(2):
        prove_choices.measure_all(record)
    ((measured, runs),) = record["measured"].items()
    assert measured == text
    assert [set(run["microseconds"]) for run in runs] == [{"reference", "sdpa"}] * 2
    assert prove_choices.find_ratio(record, text) > 1.03
    assert prove_choices.find_ratio(record, "other eager") == 1.0


def slow(_key, q, k, v):
    for _ in range(200):
        q = q @ k.mT @ v
    return (q,)
