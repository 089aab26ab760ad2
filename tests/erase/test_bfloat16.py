"""Training in bfloat16, whose neighbours lie further apart than a step moves a weight."""

import copy

import pytest
import torch
from sampling import picture
from trained import FAST, assert_same, make_trap, weights_of

import difffast
from difffast.erase.relearning import relearn

OPTIONS = {"method": "sdd", "params": "xattn-strict", "sampling_steps": 3, "learning_rate": 1e-5}


@pytest.fixture
def narrow(pipe):
    return pipe.to(torch.bfloat16)


def test_small_steps_add_up(narrow):
    """Against Adam and the average of students in float64, given the gradients that the run has found."""
    trainer = difffast.EraseTrainer(narrow, "red", **OPTIONS)
    stock = [value.double() for value in trainer.weights.copy()]
    twins = [torch.nn.Parameter(value.clone()) for value in stock]
    averages = [value.clone() for value in stock]
    adam = torch.optim.Adam(twins, lr=1e-5)
    for parameter, twin in zip(trainer.weights.parameters, twins, strict=True):
        parameter.register_post_accumulate_grad_hook(lambda p, twin=twin: setattr(twin, "grad", p.grad.double()))

    def follow(trainer):
        adam.step()
        for average, twin in zip(averages, twins, strict=True):
            average.lerp_(twin.detach(), 0.001)

    trainer.train(20, callbacks=[follow], progress=False)
    moved = 0
    for parameter, twin, before in zip(trainer.weights.parameters, twins, stock, strict=True):
        assert (parameter.double() - twin).abs().max() <= 2**-9 * twin.abs().max() + 1e-9  # half of what lies between
        moved += int((parameter.double() != before).sum())
    assert moved > 0.1 * sum(value.numel() for value in stock)
    for average, expected, before in zip(trainer._state.average, averages, stock, strict=True):
        assert (average - expected).norm() < 0.05 * (expected - before).norm()  # float32's own rounding is 2%


def test_a_run_that_goes_on_ends_in_the_same_weights(narrow, tmp_path):
    whole, again = copy.deepcopy(narrow), copy.deepcopy(narrow)
    straight = difffast.EraseTrainer(whole, "red", **OPTIONS)
    losses = straight.train(12, progress=False)
    difffast.EraseTrainer(narrow, "red", folder=tmp_path, **OPTIONS).train(7, progress=False)
    torch.manual_seed(99)  # another process would have another state
    resumed = difffast.EraseTrainer(again, "red", folder=tmp_path, **OPTIONS)
    assert resumed.train(12, resume="latest", progress=False) == losses
    assert_same(again.unet, weights_of(whole.unet))
    for one, other in zip(straight._state.optimiser.masters, resumed._state.optimiser.masters, strict=True):
        assert torch.equal(one, other)


def test_weights_come_back_and_others_may_change_them(narrow):
    stock = weights_of(narrow.unet)
    trainer = difffast.EraseTrainer(narrow, "red", **OPTIONS)
    trainer.train(2, progress=False)
    trainer.disable()
    assert_same(narrow.unet, stock)
    trainer.enable()
    with torch.no_grad():
        trainer.weights.parameters[0].fill_(3.0)
    trainer.train(3, progress=False)
    assert (trainer.weights.parameters[0] - 3.0).abs().max() == 0  # 1e-5 is less than half of what lies between
    assert {p.dtype for p in narrow.unet.parameters()} == {torch.bfloat16}
    trainer.remove()
    assert_same(narrow.unet, stock)


def test_an_attack_moves_as_far_as_in_float32(pipe):
    attack = difffast.Relearning([(picture((32, 32), 0), "red")], steps=(60,), learning_rate=1e-5)
    found = []
    for one in (copy.deepcopy(pipe).to(torch.bfloat16).to(torch.float32), pipe.to(torch.bfloat16)):
        stock = weights_of(one.unet)
        for _ in relearn(one, attack):
            moved = [(value - stock[name]).double().flatten() for name, value in one.unet.state_dict().items()]
            found.append(float(torch.cat(moved).abs().mean()))
        assert_same(one.unet, stock)
    wide, rounded = found
    assert 0.7 * wide < rounded < 1.3 * wide


def test_a_trap_needs_float32(narrow):
    trainer = difffast.EraseTrainer(narrow, "red", **OPTIONS)
    with pytest.raises(ValueError, match=r"bfloat16 weights round to nothing: pipe\.to\(torch\.float32\)"):
        trainer.attach(make_trap())
    trainer = difffast.EraseTrainer(narrow, "red", lora_rank=2, **FAST)
    trainer.attach(make_trap())
