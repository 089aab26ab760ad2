"""The last check of proofs: what was chosen for a UNet's keys has to make the whole UNet faster."""

import json
from typing import ClassVar

import pytest
import torch
from diffusers import UNet2DConditionModel
from test_proofs import FakeChild, entry

from difffast.ops._keys import Key
from difffast.proofs import collect, parent, store, whole
from difffast.proofs.candidates import find_default
from difffast.proofs.run import prove, prove_keys

CPU = torch.device("cpu")
NORM, ATTENTION, CROSS = "group_norm_silu a eager", "self_attention b eager", "cross_attention c eager"
pytestmark = pytest.mark.usefixtures("proof_cache")


def make_unet(size=32, channels=(32, 64)):
    return UNet2DConditionModel(
        sample_size=size,
        block_out_channels=channels,
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=16,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()


def add_up(costs, floor=10.0):
    """Whole times that are sums: ``costs`` of what is chosen, by operator, and 1 of PyTorch's."""

    def total(entries):
        chosen = {text.partition(" ")[0] for text, each in entries.items() if each["choice"] != each["default"]}
        return floor + sum(costs[name] if name in chosen else 1.0 for name in costs)

    return lambda some, others: total(some) / total(others)


def chosen_everywhere():
    return {text: entry("cpp") for text in (NORM, ATTENTION, CROSS)}


@pytest.mark.parametrize(
    ("costs", "lost", "pays"),
    [
        ({"group_norm_silu": 0.5, "self_attention": 0.5, "cross_attention": 0.5}, set(), True),
        ({"group_norm_silu": 1.5, "self_attention": 0.5, "cross_attention": 0.9}, {"group_norm_silu"}, True),
        ({"group_norm_silu": 1.0, "self_attention": 0.5, "cross_attention": 0.9}, {"group_norm_silu"}, True),
        (
            {"group_norm_silu": 1.5, "self_attention": 1.1, "cross_attention": 2.0},
            {"group_norm_silu", "self_attention", "cross_attention"},
            False,
        ),
    ],
)
def test_operators_that_do_not_pay_are_found(costs, lost, pays):
    found, quotient = whole.find_losers(chosen_everywhere(), add_up(costs))
    assert set(found) == lost
    assert all(each >= 1 for each in found.values())
    assert (quotient is not None and quotient < 1) == pays


def test_what_does_not_pay_together_is_left_out_together():
    """Each seems to pay beside the others, as in noise; all of them do not."""

    def compare(some, others):
        apart = sum(each["choice"] == each["default"] for each in others.values())
        return 1.02 if apart == len(others) else 0.99

    found, quotient = whole.find_losers(chosen_everywhere(), compare)
    assert found == dict.fromkeys(("cross_attention", "group_norm_silu", "self_attention"), 1.02)
    assert quotient is None


def test_nothing_is_compared_where_pytorchs_own_way_is_chosen():
    assert whole.find_losers({NORM: entry("sdpa")}, None) == ({}, None)


def test_what_is_refused_says_why_and_keeps_the_rest():
    entries = {NORM: entry("cpp", refused={"triton": "wrong"}), ATTENTION: entry("sdpa"), CROSS: entry("cpp")}
    changed = whole.refuse(entries, {"group_norm_silu": "slow in the whole", "self_attention": "slow in the whole"})
    assert set(changed) == {NORM}
    assert changed[NORM]["choice"] == "sdpa"
    assert changed[NORM]["refused"] == {"triton": "wrong", "cpp": "slow in the whole"}
    assert entries[NORM]["choice"] == "cpp", "what was given is not changed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_share_one_buffer_and_keep_their_layouts(dtype, monkeypatch):
    monkeypatch.setattr(whole, "_SHARED", 1 << 16)
    dry = collect.make_dry(make_unet(), dtype, torch.device("cuda"))
    expected = {name: (each.shape, each.stride()) for name, each in dry.named_parameters()}
    made = whole.materialize(dry, CPU)
    found = dict(made.named_parameters())
    assert {name: (each.shape, each.stride()) for name, each in found.items()} == expected
    assert any(each.is_contiguous(memory_format=torch.channels_last) for each in found.values() if each.ndim == 4)
    storages = {each.untyped_storage().data_ptr() for each in found.values()}
    (nbytes,) = {each.untyped_storage().nbytes() for each in found.values()}
    assert len(storages) == 1
    assert nbytes == max(1 << 16, max(each.numel() * each.element_size() for each in found.values()))
    assert all(0 < each.float().std() < 0.04 for each in found.values() if each.numel() > 64)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "if-ii-l"])
def test_a_description_is_json_and_makes_the_same_unet(name):
    dry = collect.make_dry(name, torch.float16, torch.device("cuda"))
    what = whole.describe_unet(dry, 2)
    collect.patch_dry(dry)
    assert whole.describe_unet(dry, 2) == what, "patched it is the same UNet"
    assert whole.name_unet(what) != whole.name_unet({**what, "batch": 4})
    assert what["dtype"] == "float16"
    assert json.loads(json.dumps(what)) == what
    with torch.device("meta"):
        again = UNet2DConditionModel.from_config(what["config"])
    shapes = {key: each.shape for key, each in again.state_dict().items()}
    assert shapes == {key: each.shape for key, each in dry.state_dict().items()}


def entries_of(unet, choices):
    keys = collect.collect(collect.make_dry(unet, torch.float32, CPU), 2, CPU, decoders=())
    return keys, {
        key.text("eager"): entry(choices.get(key.operator, find_default(key)), default=find_default(key))
        for key in keys
    }


@pytest.mark.usefixtures("_one_thread")
def test_a_way_that_is_slow_in_a_unet_is_switched_off_there(monkeypatch):
    """PyTorch's composition stands for a kernel of ours that loses in a UNet: it writes all probabilities."""
    for name, value in (("_ROUNDS", 3), ("_SECONDS", 0.0), ("_ROUND", 0.0)):
        monkeypatch.setattr(whole, name, value)
    unet = make_unet(48, (16, 32))
    keys, entries = entries_of(unet, {"self_attention": "reference"})
    other = "self_attention float32 9x9x9x9,9x9x9x9,9x9x9x9 any gradient=0 eager"
    entries[other] = entry("reference")
    what = whole.describe_unet(collect.make_dry(unet, torch.float32, CPU), 2)
    found = whole.check_whole(what, entries, CPU)
    assert set(found["lost"]) == {"self_attention"}
    assert found["lost"]["self_attention"] > 1
    assert found["quotient"] is None
    assert set(found["entries"]) == {key.text("eager") for key in keys}, "what the call asks for, and nothing else"
    assert all(each["choice"] == each["default"] for each in found["entries"].values())
    assert whole.was_checked(what, found["entries"])
    assert not whole.was_checked({**what, "batch": 4}, found["entries"])


class Scripted(FakeChild):
    """Asked for a whole UNet alone."""

    scripts: ClassVar[list] = []


ENTRIES = {NORM: entry("cpp"), ATTENTION: entry("sdpa")}


@pytest.mark.parametrize(
    ("event", "note"),
    [
        ("end", "it crashed with SIGSEGV"),
        (
            {"whole": {"error": "AcceleratorError: illegal address"}, "broken": True},
            "AcceleratorError: illegal address",
        ),
    ],
)
def test_what_breaks_a_whole_unet_is_not_used_in_eager_calls(event, note, monkeypatch):
    monkeypatch.setattr(parent, "Child", Scripted)
    Scripted.scripts[:] = [[event]]
    outcome = parent.Proving(CPU, 60, None).run([], lambda: {"whole": {}, "entries": ENTRIES})
    assert set(outcome.whole["entries"]) == {NORM}
    assert outcome.whole["entries"][NORM]["choice"] == "sdpa"
    assert outcome.whole["entries"][NORM]["refused"] == {"cpp": f"the whole UNet: {note}"}
    assert note in outcome.notes[0]


@pytest.mark.parametrize(
    ("event", "note"),
    [
        ("wait", "the time did not suffice for calling the whole UNet"),
        ({"whole": {"error": "OutOfMemoryError: 2 GiB"}, "broken": False}, "was not called: OutOfMemoryError: 2 GiB"),
    ],
)
def test_a_unet_that_could_not_be_called_leaves_what_was_chosen(event, note, monkeypatch):
    monkeypatch.setattr(parent, "Child", Scripted)
    Scripted.scripts[:] = [[event]]
    outcome = parent.Proving(CPU, 60, None).run([], lambda: {"whole": {}, "entries": ENTRIES})
    assert "entries" not in outcome.whole
    assert note in outcome.notes[0]


def test_a_unet_is_called_once_and_after_all_keys(monkeypatch):
    monkeypatch.setattr(parent, "Child", Scripted)
    key = Key.parse("self_attention float32 2x2x64x8,2x2x64x8,2x2x64x8 any gradient=0")
    what = {"class": "UNet2DConditionModel", "batch": 2}
    done = {"done": key.text(), "entries": {"eager": entry("cpp")}}
    marked = {key.text("eager"): entry("sdpa", whole={whole.name_unet(what): None})}
    found = {"quotient": None, "lost": {"self_attention": 1.25}, "entries": marked}
    Scripted.scripts[:] = [[done, {"whole": found}]]
    report = prove_keys([key], CPU, 60, whole=what)
    assert report.proofs == marked
    assert "self_attention is PyTorch's in eager calls: others make the whole UNet take 1.250" in str(report)
    again = prove_keys([key], CPU, 60, whole=what)  # there is no script left
    assert (again.proved, again.known, again.notes) == (0, 1, ())
    Scripted.scripts[:] = [[{"whole": {"quotient": 0.9, "lost": {}, "entries": {}}}]]
    other = prove_keys([key], CPU, 60, whole={**what, "batch": 4})
    assert other.whole == 0.9
    assert "a call of the whole UNet takes 0.900 of its time with PyTorch's operators" in str(other)
    assert other.as_dict()["whole"] == 0.9


def test_while_keys_are_left_no_unet_is_called(monkeypatch):
    monkeypatch.setattr(parent, "Child", Scripted)
    key = Key.parse("self_attention float32 2x2x64x8,2x2x64x8,2x2x64x8 any gradient=0")
    Scripted.scripts[:] = [[{"done": key.text(), "entries": {}, "error": "no memory"}]]
    outcome = parent.Proving(CPU, 60, None).run([key], lambda: pytest.fail("asked"))
    assert outcome.left == [key]


@pytest.mark.slow
@pytest.mark.usefixtures("_one_thread")
def test_proving_ends_with_the_whole_unet(pipe, monkeypatch):
    """In the process that proves, from a pipeline, as on a GPU."""
    monkeypatch.setattr("difffast.proofs.run.CHECKED", ("cpu",))
    report = prove(pipe, seconds=120)
    assert report.left == ()
    assert not [note for note in report.notes if "whole UNet was not called" in note]
    called = [each for each in report.proofs.values() if "whole" in each]
    assert called
    quotients = {value for each in called for value in each["whole"].values()}
    assert quotients == {report.whole}
    assert report.whole is None or report.whole < 1
    store.clear(CPU)
