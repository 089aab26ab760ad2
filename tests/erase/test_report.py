"""Reports of erasures, attacks on them, and the commands."""

import copy
import json
import warnings

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from PIL import Image
from sampling import picture

import difffast
from difffast.erase.relearning import relearn
from difffast.tools import cli, erasing


def weights_of(unet):
    return {name: value.clone() for name, value in unet.state_dict().items()}


def assert_same(unet, expected):
    found = unet.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.fixture
def pairs():
    return [(picture((32, 32), seed), f"red {seed}") for seed in range(3)]


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_an_attack_finetunes_and_goes(pipe, pairs, lora_rank):
    stock, wanted = weights_of(pipe.unet), [p.requires_grad for p in pipe.unet.parameters()]
    attack = difffast.Relearning(pairs, steps=(1, 4), learning_rate=1e-3, lora_rank=lora_rank)
    z, embeds, seen = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 64), []
    for step in relearn(pipe, attack):
        with torch.no_grad():
            seen.append((step, pipe.unet(z, 500, embeds).sample))
    assert [step for step, _ in seen] == [1, 4]
    assert not torch.equal(seen[0][1], seen[1][1])
    assert_same(pipe.unet, stock)
    assert [p.requires_grad for p in pipe.unet.parameters()] == wanted
    for _ in relearn(pipe, attack):
        break
    assert_same(pipe.unet, stock)


def test_an_attack_is_adamw_on_the_loss(pipe64, pairs):
    """The first step of AdamW, whose size does not depend on the gradient's: lr in every direction, and decay."""
    stock = weights_of(pipe64.unet)
    attack = difffast.Relearning(pairs, steps=(1,), learning_rate=1e-3)
    for _ in relearn(pipe64, attack):
        moved = pipe64.unet.conv_out.bias - stock["conv_out.bias"] * (1 - 1e-3 * 1e-4)
        assert (moved.abs() - 1e-3).abs().max() < 1e-6


def test_attacks_that_cannot_be_made_are_refused_before_anything_changes(pipe, pairs):
    switch = Switch()

    def report(**given):
        attack = {"name": difffast.Relearning(**{"examples": pairs, "steps": (1,), **given})}
        difffast.erase_report(pipe, switch, lambda *_: pytest.fail("judged"), {"target": ["red"]}, attacks=attack)

    with pytest.raises(TypeError, match="pairs of a picture and a prompt"):
        report(examples=["x"])
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="mine")
    with pytest.raises(ValueError, match="adapters are loaded already"):
        report(lora_rank=2)
    pipe.unet.unload_lora()
    pipe.unet.to(torch.float16)
    stock = weights_of(pipe.unet)
    with pytest.raises(ValueError, match="float16 weights cannot be trained"):
        report()
    with pytest.raises(ValueError, match="float16 weights cannot be trained"):
        next(relearn(pipe, difffast.Relearning(pairs, steps=(1,))))
    assert_same(pipe.unet, stock)
    assert switch.log == []


class Switch:
    """An edit that makes everything darker."""

    def __init__(self):
        self.on, self.log = True, []

    def enable(self):
        self.on = True
        self.log.append("enable")

    def disable(self):
        self.on = False
        self.log.append("disable")


def test_a_report_counts_what_the_judge_says(pipe, pairs, tmp_path):
    switch, asked = Switch(), []

    def judge(image, prompt):
        assert isinstance(image, Image.Image)
        asked.append((prompt, switch.on))
        return float(not switch.on) if prompt == "red" else 0.5 if prompt == "a cat" else 1.0

    report = difffast.erase_report(
        pipe,
        switch,
        judge,
        {"target": ["red"], "neighbours": ["blue", "a cat"]},
        attacks={"full": difffast.Relearning(pairs, steps=(1, 2))},
        pictures=2,
        steps=1,
    )
    assert switch.log == ["disable", "enable"]
    assert report.share("target") == (1.0, 0.0)
    assert report.share("neighbours") == (0.75, 0.75)
    assert [(each.attack, each.steps, each.shown) for each in report.relearned] == [("full", 1, 0.0), ("full", 2, 0.0)]
    assert len(asked) == 2 * (3 + 3 + 2)
    assert "target                     100.0     0.0" in str(report)
    assert "after steps of full, %: 1: 0.0, 2: 0.0" in str(report)
    assert json.loads(json.dumps(report.as_dict()))["pictures"] == 2
    report.plot(tmp_path / "report.png")
    with Image.open(tmp_path / "report.png") as drawn:
        assert drawn.size[0] > 1000
    with pytest.raises(ValueError, match="group must be one of target, neighbours, got 'binding'"):
        report.share("binding")


@pytest.mark.parametrize("asked", [1, 2, 3, 4])
def test_a_report_that_is_interrupted_leaves_the_edit_in(pipe, pairs, asked):
    edit, calls = difffast.erase(pipe, "red"), []
    edited = weights_of(pipe.unet)

    def judge(image, prompt):
        calls.append(prompt)
        if len(calls) == asked:  # with the stock weights, the edited ones, and twice in the attack
            raise KeyboardInterrupt
        return 1.0

    attacks = {"full": difffast.Relearning(pairs, steps=(1, 2), learning_rate=1e-3)}
    with pytest.raises(KeyboardInterrupt):
        difffast.erase_report(pipe, edit, judge, {"target": ["red"]}, attacks=attacks, pictures=1, steps=1)
    assert edit.enabled
    assert_same(pipe.unet, edited)


def test_both_kinds_of_edits_are_reported(pipe):
    seen = []
    for make in (lambda one: difffast.erase(one, "red"), lambda one: difffast.EraseTrainer(one, "red")):
        one = copy.deepcopy(pipe)
        edit = make(one)

        def look(image, prompt):
            seen.append(image.tobytes())
            return 0.0

        difffast.erase_report(one, edit, look, {"target": ["red"]}, pictures=1, steps=2)
    closed_before, closed_after, trained_before, trained_after = seen
    assert closed_before == trained_before == trained_after != closed_after  # no step was made


@pytest.mark.parametrize(
    ("prompts", "given", "message"),
    [
        ({"neighbours": ["x"]}, {}, "must have a group 'target', got neighbours"),
        ({"target": []}, {}, "must be a list of at least one"),
        ({"target": "red"}, {}, "must be a list of at least one, got 'red'"),
        ({"target": ["x"]}, {"pictures": 0}, "pictures must be at least 1, got 0"),
    ],
)
def test_bad_reports_are_refused(pipe, prompts, given, message):
    with pytest.raises(ValueError, match=message):
        difffast.erase_report(pipe, Switch(), lambda *_: 0.0, prompts, **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": ()}, r"steps must ascend from at least 1, got \(\)"),
        ({"steps": (3, 3)}, r"steps must ascend from at least 1, got \(3, 3\)"),
        ({"steps": (0, 1)}, "each of steps must be at least 1, got 0"),
        ({"steps": (1.5,)}, "each of steps must be an integer, got 1.5"),
        ({"learning_rate": 0.0}, "learning_rate must be positive and finite, got 0.0"),
        ({"learning_rate": float("inf")}, "learning_rate must be positive and finite, got inf"),
        ({"batch_size": 1.5}, "batch_size must be an integer, got 1.5"),
        ({"lora_rank": 0}, "lora_rank must be at least 1, got 0"),
    ],
)
def test_bad_attacks_are_refused(pairs, given, message):
    with pytest.raises(ValueError, match=message):
        difffast.Relearning(pairs, **given)


def test_the_command_erases_in_closed_form(pipe, tmp_path, capsys):
    pipe.save_pretrained(tmp_path / "model")
    given = ["--concept", "red", "a cat", "--guide", "blue", "--preserve", "green", "--device", "cpu"]
    files = ["--out", str(tmp_path / "unet"), "--lora", str(tmp_path / "red.safetensors")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cli.main(["erase", "--model", str(tmp_path / "model"), *given, *files]) == 0
    difffast.erase(pipe, ["red", "a cat"], guide="blue", preserve="green")
    assert_same(UNet2DConditionModel.from_pretrained(tmp_path / "unet"), weights_of(pipe.unet))
    assert (tmp_path / "red.safetensors").stat().st_size > 1000
    said = capsys.readouterr().out
    assert "erased: 'red', 'a cat'; fused" in said
    assert "can leave it out" in said
    assert cli.main(["erase", "--model", str(tmp_path / "nowhere"), *given, *files]) == 2


def test_the_command_trains_and_goes_on(pipe, tmp_path, capsys):
    pipe.save_pretrained(tmp_path / "model")
    for name, count in (("harmful", 2), ("related", 1), ("unrelated", 1)):
        (tmp_path / name).mkdir()
        lines = []
        for i in range(count):
            picture((32, 32), i).save(tmp_path / name / f"{i}.png")
            lines.append(json.dumps({"file_name": f"{i}.png", "text": f"{name} {i}"}))
        (tmp_path / name / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    folders = [f"--{name}={tmp_path / name}" for name in ("harmful", "related", "unrelated")]
    given = ["train-erase", "--model", str(tmp_path / "model"), "--concept", "red", "--params", "xattn-strict"]
    given += ["--sampling-steps", "3", "--pool", "2", "--device", "cpu"]
    given += ["--checkpoints", str(tmp_path / "kept"), "--resume", "latest"]
    assert cli.main([*given, "--steps", "1", "--out", str(tmp_path / "one"), *folders]) == 0
    assert cli.main([*given, "--steps", "2", "--out", str(tmp_path / "two"), *folders]) == 0
    assert "2 steps" in capsys.readouterr().out
    first, second = (UNet2DConditionModel.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two"))
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert changed == {name for name in first if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}
    assert cli.main([*given, "--steps", "1", "--out", str(tmp_path / "x"), folders[0]]) == 2
    assert "needs all of --harmful, --related and --unrelated" in capsys.readouterr().out


def test_pictures_without_text_are_refused(tmp_path):
    file = tmp_path / "metadata.jsonl"
    for line, message in (
        ('{"file_name": "x.png"}', "line 1 of .* must be JSON with file_name and text"),
        ("", "one line"),
    ):
        file.write_text(line)
        with pytest.raises(ValueError, match=message):
            erasing.read_pairs(tmp_path)
    with pytest.raises(OSError, match=r"metadata\.jsonl"):
        erasing.read_pairs(tmp_path / "nowhere")
