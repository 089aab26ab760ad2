"""Trainings that are cut off: checkpoints, what is refused of them, several processes, a process that is killed."""

import copy
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from small_disk import small_disk
from trained import FAST, assert_same, make_trap, weights_of

import difffast
from difffast.erase.params import select_parameters
from difffast.erase.saving import read_tensors
from difffast.erase.text import Conditions
from difffast.erase.trainer import NonFiniteLossError
from difffast.models.tiny import ddim_scheduler

RUNS = {
    "ESD": {"method": "esd"},
    "ESD with a pool": {"method": "esd", "pool": 3},
    "SDD, LoRA, pool": {"method": "sdd", "lora_rank": 2, "pool": 3},
    "ESD 2025, trap": {"method": "esd-2025", "trap": {}},
    "SDD, second-order trap": {"method": "sdd", "trap": {"second_order": True}},
}
FAST_RUNS = ("SDD, LoRA, pool", "ESD 2025, trap")  # the others are proved by the slow suite


@pytest.mark.parametrize(
    "run",
    [pytest.param(run, id=name, marks=[pytest.mark.slow] * (name not in FAST_RUNS)) for name, run in RUNS.items()],
)
def test_a_run_that_goes_on_ends_in_the_same_weights(pipe, tmp_path, run):
    def make(one):
        options = dict(run)
        trap = options.pop("trap", None)
        trainer = difffast.EraseTrainer(
            one, ["red", "a cat"], params="xattn-strict", folder=tmp_path, save_every=2, **FAST, **options
        )
        if trap is not None:
            trainer.attach(make_trap(**trap))
        return trainer

    def interrupt(trainer):
        if trainer.step == 3:
            raise KeyboardInterrupt

    killed, again, whole = pipe, copy.deepcopy(pipe), copy.deepcopy(pipe)
    with pytest.raises(KeyboardInterrupt):
        make(killed).train(5, callbacks=[interrupt], progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000002.safetensors"]
    torch.manual_seed(99)  # another process would have another state
    resumed = make(again)
    losses = resumed.train(5, resume="latest", progress=False)
    for path in tmp_path.iterdir():
        path.unlink()
    straight = make(whole)
    assert straight.train(5, resume="latest", progress=False) == losses
    assert_same(again.unet, weights_of(whole.unet))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-0000004.safetensors", "step-0000005.safetensors"]


def test_a_full_disk_leaves_the_earlier_checkpoint(pipe, tmp_path):
    trainer = difffast.EraseTrainer(pipe, "red", params="xattn-strict", folder=tmp_path, **FAST)
    trainer.train(1, progress=False)
    (path,) = tmp_path.iterdir()
    before = path.read_bytes()
    with small_disk(10_000), pytest.raises(OSError, match="step-0000002"):
        trainer.train(2, progress=False)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_was_written_last_is_latest_and_nothing_else_is_lost(pipe, tmp_path):
    def make(**given):
        options = {"params": "xattn-strict", "folder": tmp_path / "run", "save_every": 2, "keep": 2, **FAST, **given}
        return difffast.EraseTrainer(copy.deepcopy(pipe), "red", **options)

    make().train(8, progress=False)
    first = contents(tmp_path / "run")
    assert sorted(first) == ["step-0000006.safetensors", "step-0000008.safetensors"]
    make(folder=tmp_path / "early").train(2, progress=False)

    back = make()
    back.train(4, resume=tmp_path / "early" / "step-0000002.safetensors", progress=False)
    after = contents(tmp_path / "run")
    aside = {name.replace(".", ".abandoned-1.", 1): data for name, data in first.items()}
    assert {name: after[name] for name in aside} == aside
    assert set(after) - set(aside) == {"step-0000004.safetensors"}
    again = make()
    again.train(5, resume="latest", progress=False)
    assert again.losses[:4] == back.losses

    second = contents(tmp_path / "run")
    make(learning_rate=1e-2).train(4, progress=False)  # a run of its own, which comes by the same steps
    third = contents(tmp_path / "run")
    assert set(third) - {n for n in third if "abandoned" in n} == {
        "step-0000002.safetensors",
        "step-0000004.safetensors",
    }
    assert sorted(data for name, data in third.items() if "abandoned" in name) == sorted(second.values())


def test_a_full_disk_leaves_a_checkpoint_of_another_run(pipe, tmp_path):
    options = {"params": "xattn-strict", "folder": tmp_path, **FAST}
    difffast.EraseTrainer(copy.deepcopy(pipe), "red", **options).train(1, progress=False)
    before = contents(tmp_path)
    with small_disk(10_000), pytest.raises(OSError, match="step-0000001"):
        difffast.EraseTrainer(pipe, "blue", **options).train(1, progress=False)
    assert contents(tmp_path) == before


def test_an_error_names_the_last_checkpoint_of_its_own_branch(pipe, tmp_path):
    options = {"params": "xattn-strict", "folder": tmp_path, "save_every": 2, **FAST}
    difffast.EraseTrainer(copy.deepcopy(pipe), "red", **options).train(4, progress=False)
    trainer = difffast.EraseTrainer(pipe, "red", **options)

    def poison(trainer):
        with torch.no_grad():
            trainer.weights.parameters[0].fill_(float("nan"))

    with pytest.raises(NonFiniteLossError, match=r"last good checkpoint is .*step-0000002"):
        trainer.train(4, resume=tmp_path / "step-0000002.safetensors", callbacks=[poison], progress=False)


def test_checkpoints_of_something_else_are_refused(pipe, tmp_path):
    options = {"params": "xattn-strict", **FAST}
    difffast.EraseTrainer(copy.deepcopy(pipe), "red", folder=tmp_path, **options).train(1, progress=False)
    (path,) = tmp_path.iterdir()
    other = copy.deepcopy(pipe)
    with torch.no_grad():
        select_parameters(other.unet, "xattn-strict").popitem()[1].mul_(2)
    stock = weights_of(other.unet)
    for given, name in (
        ({}, "stock weights"),
        ({"method": "sdd"}, "method: 'esd' there, 'sdd' here"),
        ({"params": "xattn"}, "parameters"),
        ({"lora_rank": 2}, "lora_rank: None there, 2 here"),
        ({"concepts": ["blue"]}, r"concepts: \['red'\] there, \['blue'\] here"),
    ):
        trainer = difffast.EraseTrainer(other, given.pop("concepts", "red"), **{**options, **given})
        with pytest.raises(ValueError, match=name):
            trainer.train(2, resume=path, progress=False)
        trainer.remove()
    assert_same(other.unet, stock)
    trainer = difffast.EraseTrainer(pipe, "red", folder=tmp_path, **options)
    damaged = tmp_path / "step-0000009.safetensors"
    damaged.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="is damaged"):
        trainer.train(2, resume="latest", progress=False)
    with pytest.raises(FileNotFoundError, match="there is no nowhere"):
        trainer.train(2, resume="nowhere", progress=False)


def _other_scheduler(pipe):
    pipe.scheduler = ddim_scheduler(prediction_type="v_prediction")


def _other_unet(pipe):
    with torch.no_grad():
        pipe.unet.conv_in.weight[-1, -1, -1, -1] += 1  # nothing that is trained, and not among the first values


def _other_text_encoder(pipe):
    with torch.no_grad():
        list(pipe.text_encoder.parameters())[-1][-1] += 1


def _other_size(pipe):
    pipe.unet.register_to_config(sample_size=16)


def _change_trap(trap, **changed):
    trap.related = replace(trap.related, **changed)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_other_scheduler, "model"),
        (_other_size, "model"),
        (_other_unet, "stock weights"),
        (_other_text_encoder, "text encoders"),
        (lambda pipe: pipe.to(torch.float64), "stock weights"),
    ],
)
def test_checkpoints_of_another_pipeline_are_refused(pipe, tmp_path, change, named):
    options = {"params": "xattn-strict", "folder": tmp_path, **FAST}
    difffast.EraseTrainer(copy.deepcopy(pipe), "red", **options).train(1, progress=False)
    change(pipe)
    with pytest.raises(ValueError, match=f"differs in {named}"):
        difffast.EraseTrainer(pipe, "red", **options).train(2, resume="latest", progress=False)


@pytest.mark.parametrize(
    "change",
    [
        lambda trap: _change_trap(trap, conditions=Conditions(trap.related.conditions.embeds.flip(2))),
        lambda trap: _change_trap(trap, std=trap.related.std * 2),
        lambda trap: _change_trap(trap, mean=trap.related.mean + 1),
    ],
)
def test_checkpoints_of_a_trap_with_other_examples_are_refused(pipe, tmp_path, change):
    options = {"params": "xattn-strict", "folder": tmp_path, **FAST}
    for steps in (1, 2):
        trainer, trap = difffast.EraseTrainer(copy.deepcopy(pipe), "red", **options), make_trap()
        if steps == 2:
            change(trap)
        trainer.attach(trap)
        if steps == 1:
            trainer.train(1, progress=False)
        else:
            with pytest.raises(ValueError, match="differs in trap"):
                trainer.train(2, resume="latest", progress=False)


TWO = """
import sys
import torch
from accelerate import Accelerator
import difffast
from difffast.models import tiny_pipeline
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
pipe = tiny_pipeline(channels=(32, 64), sample_size=8)
options = {"sampling_steps": 4, "learning_rate": 1e-3, "pool": 2, "folder": sys.argv[1], "save_every": 3}
trainer = difffast.EraseTrainer(pipe, ["red", "cat"], accelerator=accelerator, **options)
trainer.train(int(sys.argv[2]), resume="latest", progress=False)
mine = torch.cat([p.detach().flatten() for p in trainer.weights.parameters])
both = accelerator.gather(mine[None])
assert torch.equal(both[0], both[1])
if accelerator.is_main_process:
    torch.save(mine, sys.argv[3])
"""


@pytest.mark.slow
def test_two_processes_stay_together_and_go_on(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO)

    def run(folder, steps, out):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29517"]
        done = subprocess.run(
            [*command, str(script), str(folder), str(steps), str(out)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return torch.load(out)

    whole = run(tmp_path / "a", 5, tmp_path / "whole.pt")
    run(tmp_path / "b", 3, tmp_path / "part.pt")
    assert torch.equal(run(tmp_path / "b", 5, tmp_path / "resumed.pt"), whole)


KILLED = """
import os
import signal
import sys
import torch
import difffast
from difffast.models import tiny_pipeline
torch.manual_seed(7)  # or PyTorch would begin every process elsewhere
trainer = difffast.EraseTrainer(
    tiny_pipeline(channels=(32, 64), sample_size=8), "red", folder=sys.argv[1], save_every=2, sampling_steps=4, pool=3
)
def kill(trainer):
    if trainer.step == 3 and len(sys.argv) > 2:
        os.kill(os.getpid(), signal.SIGKILL)
trainer.train(5, resume="latest", callbacks=[kill], progress=False)
"""


@pytest.mark.slow
def test_a_run_killed_by_the_system_goes_on(tmp_path):
    def run(folder, *more):
        return subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / folder), *more]).returncode

    assert run("killed", "kill") == -9
    assert run("killed") == 0
    assert run("whole") == 0
    (killed, said), (whole, also_said) = (
        read_tensors(tmp_path / folder / "step-0000005.safetensors") for folder in ("killed", "whole")
    )
    assert said == also_said
    assert killed.keys() == whole.keys()
    assert [name for name in whole if not torch.equal(killed[name], whole[name])] == []
