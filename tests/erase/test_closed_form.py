"""Erasure in closed form: the one map against each layer's own formula, and in and out of pipelines."""

import copy
import math
import warnings

import pytest
import torch
import zoo
from diffusers import UNet2DConditionModel
from small_disk import small_disk

import difffast
from difffast.erase.closed_form import LowRankMap, Rece, Uce
from difffast.erase.edit import find_text_layers
from difffast.erase.text import choose_rows, encode

KINDS = {
    "SD1": "StableDiffusionPipeline",
    "SD2 (v)": "StableDiffusionPipeline: v-prediction, zero terminal SNR",
    "SDXL": "StableDiffusionXLPipeline",
}


@pytest.fixture(scope="module")
def _pipes():
    built = {kind: zoo.ROWS[row].build() for kind, row in KINDS.items()}
    for pipe in built.values():
        pipe.set_progress_bar_config(disable=True)
    return built


@pytest.fixture(params=KINDS)
def any_pipe(request, _pipes):
    return copy.deepcopy(_pipes[request.param])


def layer_by_layer(weight, erased, guides, preserved, lam, s_e, s_p):
    """UCE of one layer as the paper writes it: sums over rows, and an inverse."""
    d = weight.shape[1]
    numerator, a = lam * weight, lam * torch.eye(d, dtype=torch.float64)
    for c_e, c_g in zip(erased, guides, strict=True):
        numerator = numerator + s_e * torch.outer(weight @ c_g, c_e)
        a = a + s_e * torch.outer(c_e, c_e)
    for c_p in preserved:
        numerator = numerator + s_p * torch.outer(weight @ c_p, c_p)
        a = a + s_p * torch.outer(c_p, c_p)
    return numerator @ a.inverse()


def draw(rows, d=24, shift=0.0, seed=0):
    return shift + torch.randn(rows, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shift", [0.0, 3.0], ids=["centred", "uncentred"])
@pytest.mark.parametrize(("preserved", "numbers"), [(5, (0.5, 1.0, 1.0)), (0, (2.0, 0.3, 1.0)), (40, (0.1, 3.0, 0.2))])
def test_one_map_is_uce_of_every_layer(shift, preserved, numbers):
    erased, guides, kept = draw(4, shift=shift), draw(4, shift=shift, seed=1), draw(preserved, shift=shift, seed=2)
    found = Uce(*numbers).find_map(erased, guides, kept)
    assert found.rank == 4
    for out, seed in ((7, 3), (24, 4), (50, 5)):
        weight = draw(out, seed=seed)
        expected = layer_by_layer(weight, erased, guides, kept, *numbers)
        assert (found.multiply(weight) - expected).abs().max() < 1e-10 * expected.abs().max()
        rows = draw(6, shift=shift, seed=6)
        assert (found.map_embeds(rows) @ weight.T - rows @ expected.T).abs().max() < 1e-10 * expected.abs().max() * 24


@pytest.mark.parametrize("shift", [0.0, 3.0], ids=["centred", "uncentred"])
def test_rece_is_least_squares_over_the_layers_and_uce_again(shift):
    layers = [draw(10, seed=i) for i in range(5)]
    erased, null, kept = draw(3, shift=shift, seed=7), draw(3, shift=shift, seed=8), draw(6, shift=shift, seed=9)
    rho, epochs, lam = 0.05, 3, 0.5
    edited = [layer_by_layer(w, erased, null, kept, lam, 1.0, 1.0) for w in layers]
    for _ in range(epochs):
        # The c' that makes of the edited layers what c made of the stock ones: least squares on stacked equations.
        system = torch.cat([*edited, rho**0.5 * torch.eye(24, dtype=torch.float64)])
        target = torch.cat([*(w @ erased.T for w in layers), torch.zeros(24, 3, dtype=torch.float64)])
        again = torch.linalg.lstsq(system, target).solution.T
        edited = [layer_by_layer(w, again, null, kept, lam, 1.0, 1.0) for w in edited]
    gram = sum(w.T @ w for w in layers)
    found = Rece(rho=rho, epochs=epochs).find_map_again(gram, erased, null, kept, null)
    for weight, expected in zip(layers, edited, strict=True):
        assert (found.multiply(weight) - expected).abs().max() < 1e-10 * expected.abs().max()


def test_equal_rows_cost_no_rank():
    erased = draw(1).expand(70, -1)
    guides = draw(1, seed=1).expand(70, -1)
    assert Uce().find_map(erased, guides, draw(2, seed=2)).rank == 1
    assert Uce().find_map(erased, erased, draw(2, seed=2)).rank == 0


def test_erase_of_a_pipeline_and_back(any_pipe):
    before = {name: weight.clone() for name, weight in any_pipe.unet.state_dict().items()}
    edit = difffast.erase(any_pipe, ["red", "a cat"], guide=["blue", ""], preserve=["green", "a dog"])
    layers = find_text_layers(any_pipe.unet)
    assert set(edit.layers) == set(layers)
    with torch.no_grad():
        rows = [choose_rows(any_pipe, p, "all").double() for p in (["red", "a cat"], ["blue", ""], ["green", "a dog"])]
    for name, weight in any_pipe.unet.state_dict().items():
        if name.removesuffix(".weight") in layers:
            expected = layer_by_layer(before[name].double(), *rows, 0.5, 1.0, 1.0)
            assert (weight - expected).abs().max() < 1e-6 * expected.abs().max()
            assert not torch.equal(weight, before[name])
        else:
            assert torch.equal(weight, before[name])
    run = zoo.sample(any_pipe, zoo.Inputs(prompt="red", steps=2))
    edit.disable()
    assert all(torch.equal(weight, before[name]) for name, weight in any_pipe.unet.state_dict().items())
    assert not torch.equal(run, zoo.sample(any_pipe, zoo.Inputs(prompt="red", steps=2)))
    edit.enable()
    assert torch.equal(run, zoo.sample(any_pipe, zoo.Inputs(prompt="red", steps=2)))


def test_both_text_encoders_of_sdxl_take_part():
    pipe = zoo.ROWS[KINDS["SDXL"]].build()
    width = pipe.text_encoder.config.hidden_size
    edit = difffast.erase(pipe, "red", guide="blue")
    change = edit.map.dense() - torch.eye(2 * width, dtype=torch.float64)
    assert all(part.abs().max() > 1e-3 for part in (change[:, :width], change[:, width:]))


def test_the_map_on_prompts_is_the_edit(pipe64):
    embeds = encode(pipe64, ["a red cat"]).embeds
    z = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        stock = pipe64.unet(z, 500, embeds).sample
        edit = difffast.erase(pipe64, "red", guide="blue")
        edited = pipe64.unet(z, 500, embeds).sample
        edit.disable()
        mapped = pipe64.unet(z, 500, edit.map.map_embeds(embeds)).sample
    assert (edited - mapped).abs().max() < 1e-12
    assert (edited - stock).abs().max() > 1e-6


@pytest.mark.parametrize("method", ["uce", "rece"])
def test_the_lora_is_the_edit(any_pipe, tmp_path, method):
    stock = copy.deepcopy(any_pipe)
    edit = difffast.erase(any_pipe, "red", guide="blue", preserve=["green"], method=method)
    with pytest.warns(UserWarning, match="leave it out"):
        edit.save_lora(tmp_path / "red.safetensors")
    edit.fuse()
    stock.load_lora_weights(tmp_path, weight_name="red.safetensors")
    stock.fuse_lora()
    stock.unload_lora_weights()
    fused = any_pipe.unet.state_dict()
    for name, weight in stock.unet.state_dict().items():
        assert (weight - fused[name]).abs().max() <= 2e-6 * fused[name].abs().max(), name


def test_the_file_of_the_whole_unet(pipe, tmp_path):
    edit = difffast.erase(pipe, "red")
    edit.save(tmp_path / "unet")
    loaded = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    assert all(torch.equal(w, pipe.unet.state_dict()[n]) for n, w in loaded.state_dict().items())
    edit.disable()
    with pytest.raises(ValueError, match="disabled"):
        edit.save(tmp_path / "unet")
    edit.enable()
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="holds other weights already"):
        edit.save(tmp_path / "unet")


def test_a_full_disk_leaves_the_file_that_was_there(pipe, tmp_path):
    edit = difffast.erase(pipe, "red")
    edit.save(tmp_path)
    before = (tmp_path / "diffusion_pytorch_model.safetensors").read_bytes()
    edit.disable()
    edit.enable()
    with small_disk(100_000), pytest.raises(OSError, match="diffusion_pytorch_model"):
        edit.save(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_fused_is_for_good(pipe, tmp_path):
    edit = difffast.erase(pipe, "red")
    edit.disable()
    edit.fuse()
    assert edit.enabled
    assert "fused" in str(edit)
    with pytest.raises(ValueError, match="fused for good"):
        edit.disable()
    with pytest.raises(ValueError, match="before fuse"):
        edit.save_lora(tmp_path / "x.safetensors")


def test_what_others_changed_since_is_not_lost(pipe):
    edit = difffast.erase(pipe, "red")
    again = difffast.erase(pipe, "blue")
    with pytest.raises(ValueError, match="was changed after it was edited"):
        edit.disable()
    again.disable()
    edit.disable()
    edit.disable()


def test_edits_move_with_the_pipeline(pipe):
    before = copy.deepcopy(pipe.unet).to(torch.float16).state_dict()
    edit = difffast.erase(pipe, "red")
    pipe.unet.to(torch.float16)
    edit.disable()
    assert all(torch.equal(w, before[n]) for n, w in pipe.unet.state_dict().items())


def test_patched_pipelines_draw_what_stock_ones_do(pipe):
    stock = copy.deepcopy(pipe)
    difffast.patch(pipe, "exact")
    first = zoo.sample(pipe, zoo.Inputs(prompt="red"))
    for one in (pipe, stock):
        difffast.erase(one, "red", guide="blue")
    patched, plain = (zoo.sample(one, zoo.Inputs(prompt="red")) for one in (pipe, stock))
    assert (patched - plain).abs().max() < 1e-4 * plain.abs().max()
    assert (first - plain).abs().max() > 1e-2 * plain.abs().max()
    difffast.unpatch(pipe)


def test_an_edit_that_fails_leaves_the_stock_weights(pipe, monkeypatch):
    before = {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}
    edit = difffast.erase(pipe, "red")
    edit.disable()
    calls = []

    def fail(self, weight):
        calls.append(weight)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return weight + 1

    monkeypatch.setattr(LowRankMap, "multiply", fail)
    with pytest.raises(KeyboardInterrupt):
        edit.enable()
    assert not edit.enabled
    assert all(torch.equal(weight, before[name]) for name, weight in pipe.unet.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"concepts": []}, ValueError, "concepts must name at least 1, got"),
        ({"concepts": [7]}, TypeError, "concepts must be texts, got"),
        ({"concepts": "red", "method": "esd"}, ValueError, "method must be one of uce, rece, got 'esd'"),
        ({"concepts": ["a", "b", "c"], "guide": ["x", "y"]}, ValueError, "one for each of 3 concepts, got 2"),
        ({"concepts": "red", "guide": []}, ValueError, "guide must name at least 1"),
    ],
)
def test_bad_calls_are_refused(pipe, arguments, error, message):
    with pytest.raises(error, match=message):
        difffast.erase(pipe, **arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Uce(lam=0), "lam must be positive and finite, got 0"),
        (lambda: Uce(erase_scale=-1), "erase_scale must be finite and at least 0, got -1"),
        (lambda: Uce(tokens="first"), "tokens must be 'last' or 'all', got 'first'"),
        (lambda: Rece(rho=0), "rho must be positive and finite, got 0"),
        (lambda: Uce(lam=math.inf), "lam must be positive and finite, got inf"),
        (lambda: Uce(erase_scale=math.inf), "erase_scale must be finite and at least 0, got inf"),
        (lambda: Uce(preserve_scale=math.nan), "preserve_scale must be finite and at least 0, got nan"),
        (lambda: Rece(rho=math.inf), "rho must be positive and finite, got inf"),
        (lambda: Rece(epochs=1.5), "epochs must be an integer, got 1.5"),
        (lambda: Rece(epochs=0), "epochs must be at least 1, got 0"),
    ],
)
def test_bad_numbers_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_pipelines_that_cannot_be_edited_are_refused(pipe):
    with pytest.raises(ValueError, match="with a UNet and a text encoder"):
        difffast.erase(object(), "red")
    broken = copy.deepcopy(pipe)
    next(broken.text_encoder.parameters()).data.fill_(float("nan"))
    with pytest.raises(ValueError, match="erased embeddings must be finite"):
        difffast.erase(broken, "red")
    offloaded = copy.deepcopy(pipe)
    name, layer = next(iter(find_text_layers(offloaded.unet).items()))
    layer.to("meta")
    with pytest.raises(ValueError, match=f"{name} is offloaded"):
        difffast.erase(offloaded, "red")
    from peft import LoraConfig

    pipe.unet.add_adapter(LoraConfig(target_modules=["to_k"]))
    with pytest.raises(ValueError, match="unload or fuse adapters"):
        difffast.erase(pipe, "red")
    plain = copy.deepcopy(offloaded)
    plain.unet = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="no layer named"):
        difffast.erase(plain, "red")


def test_stock_weights_stay_while_nothing_is_erased(pipe):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        edit = difffast.erase(pipe, "red", guide="red")
    assert edit.map.rank == 0
    edit.disable()


def test_an_edit_that_changes_nothing_is_no_lora(pipe, tmp_path):
    edit = difffast.erase(pipe, "red", guide="red")
    assert edit.map.rank == 0
    with pytest.raises(ValueError, match="at least rank 1, got an edit of rank 0"):
        edit.save_lora(tmp_path / "red.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_scales_that_overflow_are_refused(pipe):
    stock = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    with pytest.raises(ValueError, match=r"must leave the edit finite, got 0\.5, 1e\+308 and 1\.0"):
        difffast.erase(pipe, "red", method=Uce(erase_scale=1e308))
    assert all(torch.equal(value, stock[name]) for name, value in pipe.unet.state_dict().items())
