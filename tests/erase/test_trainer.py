"""Training a concept out: what is trained, what is put back, and runs that are interrupted."""

import contextlib
import copy
import math
import warnings

import pytest
import torch
import zoo
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from trained import FAST, assert_same, make_trap, weights_of

import difffast
from difffast.erase.params import select_parameters
from difffast.erase.relearning import relearn
from difffast.erase.trainer import NonFiniteLossError
from difffast.models import tiny_pipeline


@pytest.mark.parametrize(
    ("params", "belongs"),
    [
        ("full", lambda name: True),
        ("selfattn", lambda name: "attn1" in name.split(".")),
        ("xattn", lambda name: "attn2" in name.split(".")),
        ("noxattn", lambda name: not {"attn2", "time_embedding", "conv_out"} & set(name.split("."))),
        ("notime", lambda name: not {"time_embedding", "conv_out"} & set(name.split("."))),
        ("xattn-strict", lambda name: name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))),
        ("*.norm1.weight", lambda name: name.endswith("norm1.weight")),
        (["conv_in.*", "conv_out.bias"], lambda name: name in ("conv_in.weight", "conv_in.bias", "conv_out.bias")),
    ],
)
def test_parameters_are_chosen_by_name(pipe, params, belongs):
    expected = [name for name, _ in pipe.unet.named_parameters() if belongs(name)]
    assert list(select_parameters(pipe.unet, params)) == expected
    assert expected


@pytest.mark.parametrize(("params", "named"), [("atn2", "'atn2'"), (["xattn"], "'xattn'"), ([], "at least one")])
def test_names_that_match_nothing_are_refused(pipe, params, named):
    with pytest.raises(ValueError, match=named):
        difffast.EraseTrainer(pipe, "red", params=params)


@pytest.mark.parametrize(("method", "lora_rank"), [("esd", None), ("esd-2025", 2), ("sdd", None)])
def test_only_what_was_chosen_is_trained_and_all_comes_back(pipe, method, lora_rank):
    pipe.unet.conv_in.requires_grad_(False)
    stock, wanted = weights_of(pipe.unet), [p.requires_grad for p in pipe.unet.parameters()]
    z, embeds = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 64)
    with torch.no_grad():
        before = pipe.unet(z, 500, embeds).sample
    trainer = difffast.EraseTrainer(pipe, "red", method=method, params="xattn-strict", lora_rank=lora_rank, **FAST)
    losses = trainer.train(3, progress=False)
    assert len(losses) == trainer.step == 3
    assert all(loss > 0 for loss in losses)
    with torch.no_grad():
        trained = pipe.unet(z, 500, embeds).sample
    changed = {n for n, w in pipe.unet.state_dict().items() if n in stock and not torch.equal(w, stock[n])}
    assert changed == (set() if lora_rank else set(select_parameters(pipe.unet, "xattn-strict")))
    trainer.disable()
    trainer.disable()
    with torch.no_grad():
        assert torch.equal(pipe.unet(z, 500, embeds).sample, before)
        trainer.enable()
        assert torch.equal(pipe.unet(z, 500, embeds).sample, trained)
    assert not torch.equal(trained, before)
    trainer.remove()
    assert_same(pipe.unet, stock)
    assert [p.requires_grad for p in pipe.unet.parameters()] == wanted
    assert all(p.grad is None for p in pipe.unet.parameters())


def test_a_step_is_adam_on_the_loss(pipe64):
    """Against torch's Adam on a copy, whose gradients come from the trainer of that copy."""
    twin = copy.deepcopy(pipe64)
    options = {"sampling_steps": 4, "params": "xattn", "learning_rate": 1e-2, "clip": 1e-3, "seed": 5}
    difffast.EraseTrainer(pipe64, "red", **options).train(1, progress=False)
    other = difffast.EraseTrainer(twin, "red", **options)
    with other.weights.training(twin.unet):
        other.erasing_loss().backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in other.weights.parameters))
        assert norm > 1e-3
        for name, parameter in select_parameters(pipe64.unet, "xattn").items():
            stock = dict(twin.unet.named_parameters())[name]
            gradient = stock.grad * 1e-3 / (norm + 1e-6)
            expected = stock.detach() - 1e-2 * gradient / (gradient.abs() + 1e-8)  # Adam's first step
            assert (parameter - expected).abs().max() < 1e-9, name


def test_losses_that_are_not_finite_stop_before_the_update(pipe, tmp_path):
    trainer = difffast.EraseTrainer(pipe, "red", params="xattn", folder=tmp_path, save_every=2, **FAST)
    poisoned = []

    def poison(trainer):
        if trainer.step == 3:
            with torch.no_grad():
                trainer.weights.parameters[0].fill_(float("inf"))
            poisoned.extend(trainer.weights.copy())

    with pytest.raises(NonFiniteLossError, match=r"step 4 has the loss nan.*last good checkpoint is .*step-0000002"):
        trainer.train(9, callbacks=[poison], progress=False)
    assert trainer.step == 3
    assert all(torch.equal(p, v) for p, v in zip(trainer.weights.parameters, poisoned, strict=True))
    assert trainer.train(4, resume="latest", progress=False)[-1] < float("inf")
    for tensor in trainer.weights.parameters:
        assert tensor.isfinite().all()


def test_what_is_saved_is_what_was_trained(pipe, tmp_path):
    stock = copy.deepcopy(pipe)
    trainer = difffast.EraseTrainer(pipe, "red", params="xattn", **FAST)
    trainer.train(2, progress=False)
    trainer.save(tmp_path / "unet")
    assert_same(UNet2DConditionModel.from_pretrained(tmp_path / "unet"), weights_of(pipe.unet))
    trainer.disable()
    with pytest.raises(ValueError, match="disabled"):
        trainer.save(tmp_path / "unet")
    with pytest.raises(ValueError, match="disabled, and cannot be trained"):
        trainer.train(3)
    trainer.fuse()
    with pytest.raises(ValueError, match="fused for good"):
        trainer.disable()

    lora = difffast.EraseTrainer(copy.deepcopy(stock), "red", params="xattn", lora_rank=2, **FAST)
    lora.train(2, progress=False)
    with pytest.warns(UserWarning, match="leave it out"):
        lora.save(tmp_path / "lora")
    stock.load_lora_weights(tmp_path / "lora")
    stock.fuse_lora()
    stock.unload_lora_weights()
    lora.fuse()
    lora.save(tmp_path / "fused")
    fused = UNet2DConditionModel.from_pretrained(tmp_path / "fused").state_dict()
    assert fused.keys() == stock.unet.state_dict().keys()
    assert all((fused[n] - w).abs().max() <= 1e-6 for n, w in stock.unet.state_dict().items())


def test_gradient_checkpointing_changes_nothing_but_memory(pipe):
    twin = copy.deepcopy(pipe)
    plain = difffast.EraseTrainer(pipe, "red", **FAST)
    thrifty = difffast.EraseTrainer(twin, "red", gradient_checkpointing=True, **FAST)
    for trainer in (plain, thrifty):
        trainer.attach(make_trap())
        trainer.train(1, progress=False)
    assert all((twin.unet.state_dict()[n] - w).abs().max() < 1e-6 for n, w in pipe.unet.state_dict().items())
    assert not twin.unet.is_gradient_checkpointing


def test_callbacks_may_stop_and_a_bar_is_shown(pipe, capfd):
    seen = []

    def watch(trainer):
        seen.append((trainer.step, trainer.last["loss"]))
        if trainer.step == 2:
            trainer.stop()

    trainer = difffast.EraseTrainer(pipe, "red", **FAST)
    losses = trainer.train(9, callbacks=[watch])
    assert seen == [(1, losses[0]), (2, losses[1])]
    assert "erasing" in capfd.readouterr().err
    trainer.train(3, progress=False)
    assert trainer.step == 3
    with pytest.raises(ValueError, match="before the first step; 3 steps"):
        trainer.attach(make_trap())


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"concepts": []}, ValueError, "concepts must name at least 1"),
        ({"method": "uce"}, ValueError, "method must be one of esd, esd-2025, sdd, got 'uce'"),
        ({"erase_from": "x"}, ValueError, "erase_from belongs to method 'esd-2025', got method 'esd'"),
        ({"method": "sdd", "eta": 2.0}, ValueError, "method 'sdd' has no eta, got 2.0"),
        ({"pool": 51}, ValueError, "pool must be at most sampling_steps, 50, got 51"),
        ({"learning_rate": -1.0}, ValueError, "learning_rate must be positive and finite, got -1.0"),
        ({"save_every": 0}, ValueError, "save_every must be at least 1, got 0"),
        ({"eta": math.nan}, ValueError, "eta must be finite, got nan"),
        ({"guidance_scale": math.inf}, ValueError, "guidance_scale must be finite, got inf"),
        ({"weight_decay": math.inf}, ValueError, "weight_decay must be finite and at least 0, got inf"),
        ({"sampling_steps": 2.5}, ValueError, "sampling_steps must be an integer, got 2.5"),
        ({"lora_rank": True}, ValueError, "lora_rank must be an integer, got True"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"leraning_rate": 1.0}, TypeError, "unknown option 'leraning_rate', did you mean 'learning_rate'?"),
        ({"sampling_steps": 1000}, ValueError, "sampling_steps must lie in 1 .. 999, got 1000"),
        ({"params": ["conv_in.*"], "lora_rank": 2}, ValueError, "on linear layers, and none of the chosen"),
    ],
)
def test_bad_calls_are_refused(pipe, given, error, message):
    concepts = given.pop("concepts", "red")
    with pytest.raises(error) as caught:
        difffast.EraseTrainer(pipe, concepts, **given)
    assert message in str(caught.value)


def test_benign_losses_are_held_as_much_as_they_are_raised_unless_as_published():
    g11, g12, _, g22, g23 = make_trap().gammas
    assert g11 > g23
    assert g12 > g22
    assert make_trap(compat="published").gammas == (0.1, 0.01, 0.01, 1.0, 1.0)
    assert make_trap(gammas=(1, 2, 3, 4, 5)).gammas == (1, 2, 3, 4, 5)


@pytest.mark.parametrize(
    ("compat", "given", "decay", "clip"),
    [
        (None, {}, 0.0, None),
        ("published", {}, 1e-4, 1.0),
        ("published", {"weight_decay": 0.0, "clip": 3e-3}, 0.0, 3e-3),
    ],
)
def test_published_traps_come_with_the_published_optimiser(pipe, compat, given, decay, clip):
    """Against torch's AdamW, given the gradients that the step has found."""
    trainer = difffast.EraseTrainer(pipe, "red", params="xattn-strict", sampling_steps=3, learning_rate=0.1, **given)
    trainer.attach(make_trap(compat=compat, gammas=(100, 100, 100, 100, 100)))
    twins = [torch.nn.Parameter(value) for value in trainer.weights.copy()]
    for parameter, twin in zip(trainer.weights.parameters, twins, strict=True):
        parameter.register_post_accumulate_grad_hook(lambda p, twin=twin: setattr(twin, "grad", p.grad.clone()))
    trainer.train(1, progress=False)
    if clip is not None:
        assert torch.nn.utils.clip_grad_norm_(twins, clip) > 1.0001 * clip
    torch.optim.AdamW(twins, lr=0.1, weight_decay=decay).step()
    for parameter, twin in zip(trainer.weights.parameters, twins, strict=True):
        assert (parameter - twin).abs().max() < 1e-7


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gammas": (1, 2)}, "gammas must be five finite numbers"),
        ({"gammas": (1, 2, 3, 4, -1)}, "gammas must be five finite numbers"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive and finite, got 0.0"),
        ({"learning_rate": math.inf}, "learning_rate must be positive and finite, got inf"),
        ({"weight_decay": math.nan}, "weight_decay must be finite and at least 0, got nan"),
        ({"batch_size": 1.5}, "batch_size must be an integer, got 1.5"),
        ({"compat": "old"}, "compat must be None or 'published', got 'old'"),
    ],
)
def test_bad_traps_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        make_trap(**given)


def test_pipelines_that_cannot_be_trained_are_refused(pipe):
    with pytest.raises(ValueError, match="reads 9 channels and writes 4"):
        difffast.EraseTrainer(tiny_pipeline(channels=(32,), sample_size=8, in_channels=9), "red")
    with pytest.raises(ValueError, match="six sizes"):
        difffast.EraseTrainer(zoo.ROWS["StableDiffusionXLImg2ImgPipeline: refiner"].build(), "red")
    with difffast.patched(pipe, "exact"), pytest.raises(ValueError, match="unpatch"):
        difffast.EraseTrainer(pipe, "red")
    with pytest.raises(ValueError, match="examples must be at least one pair"):
        difffast.EraseTrainer(pipe, "red").attach(difffast.MetaTrap([], [], []))
    with pytest.raises(TypeError, match="pairs of a picture and a prompt"):
        difffast.EraseTrainer(pipe, "red").attach(difffast.MetaTrap(["x"], [], []))
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        difffast.EraseTrainer(pipe, "red").train(0)
    pipe.unet.to(torch.float16)
    with pytest.raises(ValueError, match="float16 weights cannot be trained"):
        difffast.EraseTrainer(pipe, "red")


def test_a_lora_is_trained_in_float32_on_half_precision(pipe):
    pipe.to(torch.bfloat16)
    stock = weights_of(pipe.unet)
    trainer = difffast.EraseTrainer(pipe, "red", lora_rank=2, **FAST)
    trainer.train(2, progress=False)
    assert {p.dtype for p in trainer.weights.parameters} == {torch.float32}
    trainer.remove()
    assert_same(pipe.unet, stock)


@pytest.mark.parametrize("end", ["remove", "fuse", "relearn"])
def test_adapters_of_others_stay(pipe, end):
    """The user's own on the text encoder, and one that was loaded on the UNet after the training."""
    mine = {"r": 2, "init_lora_weights": False}
    pipe.text_encoder.add_adapter(LoraConfig(target_modules=["q_proj", "v_proj"], **mine), adapter_name="mine")
    encoder, embeds = weights_of(pipe.text_encoder), pipe.encode_prompt("red", "cpu", 1, False)[0]
    if end == "relearn":
        for _ in relearn(pipe, difffast.Relearning(make_trap().harmful, steps=(1,), lora_rank=2)):
            pass
    else:
        trainer = difffast.EraseTrainer(pipe, "red", lora_rank=2, params="xattn", **FAST)
        trainer.train(1, progress=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's, of several adapters
            pipe.unet.add_adapter(LoraConfig(target_modules=["attn1.to_q"], **mine), adapter_name="later")
        if end == "fuse":
            with pytest.raises(ValueError, match=r"loaded since \(later\): unload"):
                trainer.fuse()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # peft's, of another adapter that becomes active
                pipe.unet.delete_adapters("later")
            trainer.fuse()
        else:
            trainer.remove()
            assert list(pipe.unet.peft_config) == ["later"]
            assert not [name for name in pipe.unet.state_dict() if "difffast" in name]
            pipe.unet.unload_lora()
    assert not getattr(pipe.unet, "peft_config", None)
    assert_same(pipe.text_encoder, encoder)
    assert list(pipe.text_encoder.peft_config) == ["mine"]
    assert torch.equal(pipe.encode_prompt("red", "cpu", 1, False)[0], embeds)


def test_sdxl_is_trained():
    pipe = zoo.ROWS["StableDiffusionXLPipeline"].build()
    stock = weights_of(pipe.unet)
    trainer = difffast.EraseTrainer(pipe, "red", method="esd-2025", params="xattn-strict", sampling_steps=3)
    assert trainer._rate == 2e-4
    assert trainer._eta == 1.0
    trainer.train(2, progress=False)
    assert any(not torch.equal(w, stock[n]) for n, w in pipe.unet.state_dict().items())
    trainer.remove()
    assert_same(pipe.unet, stock)


def test_an_accelerator_of_one_process_changes_nothing(pipe):
    twin = copy.deepcopy(pipe)
    difffast.EraseTrainer(pipe, "red", **FAST).train(2, progress=False)
    difffast.EraseTrainer(twin, "red", accelerator=Accelerator(cpu=True), **FAST).train(2, progress=False)
    assert_same(twin.unet, weights_of(pipe.unet))


def test_weights_that_are_held_come_back_after_an_error(pipe):
    trainer = difffast.EraseTrainer(pipe, "red", **FAST)
    before = weights_of(pipe.unet)
    with contextlib.suppress(KeyboardInterrupt), trainer.weights.hold([v + 1 for v in trainer.weights.copy()]):
        raise KeyboardInterrupt
    assert_same(pipe.unet, before)
