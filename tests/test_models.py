import json
import re

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from sampling import latents
from transformers import CLIPTextModel, CLIPTokenizer

from difffast import models
from difffast.models.embedded import CHECKSUMS, check, write_checksums
from difffast.models.tokenizer import clip_tokenizer, learn_merges


def test_tiny_pipeline_is_a_real_stable_diffusion(pipe):
    assert type(pipe) is StableDiffusionPipeline
    assert type(pipe.tokenizer) is CLIPTokenizer
    assert type(pipe.text_encoder) is CLIPTextModel
    assert type(pipe.vae) is AutoencoderKL
    assert type(pipe.scheduler) is DDIMScheduler
    assert not any(getattr(pipe, part).training for part in ("unet", "vae", "text_encoder"))


def test_tokenizer_reads_any_text(pipe):
    tokens = pipe.tokenizer("a Red çat 猫!").input_ids
    assert pipe.tokenizer.model_max_length == 77
    assert len(pipe.tokenizer) == 514
    assert tokens[0] == pipe.tokenizer.bos_token_id
    assert tokens[-1] == pipe.tokenizer.eos_token_id
    assert pipe.tokenizer.unk_token_id not in tokens[1:-1]
    assert tokens != pipe.tokenizer("a blue çat 猫!").input_ids


def test_learned_merges_write_each_word_as_one_token():
    tokenizer = clip_tokenizer(learn_merges(["red", "ring", "circle", "red", "a", ","]))
    assert tokenizer.tokenize("a red circle, a ring") == [
        "a</w>",
        "red</w>",
        "circle</w>",
        ",</w>",
        "a</w>",
        "ring</w>",
    ]
    assert "".join(tokenizer.tokenize("zebra 猫")).startswith("zebra</w>")


def test_the_same_words_give_the_same_merges():
    # A resumed training depends on it: another order is another number for each word.
    words = ["red", "rind", "ring", "redder"]
    merges = learn_merges(words)
    assert merges[:4] == [("i", "n"), ("r", "e"), ("r", "in"), ("d", "d")]  # twice, twice, twice, once
    assert merges == learn_merges(reversed(words)) == learn_merges(words * 2)


def test_saved_and_loaded_back(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = models.load_pipeline(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is StableDiffusionPipeline
    assert loaded.tokenizer("two cats").input_ids == pipe.tokenizer("two cats").input_ids
    assert torch.equal(latents(loaded), latents(pipe))


def test_seeded_and_without_side_effects():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    a = models.tiny_pipeline("sd", channels=(32, 32), sample_size=4)
    assert torch.equal(torch.rand(3), expected)
    b = models.tiny_pipeline("sd", channels=(32, 32), sample_size=4)
    c = models.tiny_pipeline("sd", channels=(32, 32), sample_size=4, seed=1)
    assert torch.equal(a.unet.conv_in.weight, b.unet.conv_in.weight)
    assert not torch.equal(a.unet.conv_in.weight, c.unet.conv_in.weight)


def test_images_are_four_times_the_latents(pipe):
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red circle", num_inference_steps=1).images[0].size == (32, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "sd9"}, "unknown tiny pipeline 'sd9'; available: sd"),
        ({"channels": (32, 48)}, r"multiples of 32 .* got \(32, 48\)"),
        ({"sample_size": 4}, "at least 2x2 and divide evenly, got 4"),
        ({"sample_size": 34}, "at least 2x2 and divide evenly, got 34"),
    ],
)
def test_bad_tiny_pipelines(options, message):
    with pytest.raises(ValueError, match=message):
        models.tiny_pipeline(**options)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("sd15", 859.52), ("sd21", 865.91), ("sdxl", 2567.46), ("if-i-xl", 4304.70)],
)
def test_published_unets_have_their_published_sizes(name, millions):
    unet = models.unet(name)
    assert all(p.is_meta for p in unet.parameters())
    assert not unet.training
    assert sum(p.numel() for p in unet.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)


def test_published_unets_run_on_the_meta_device():
    unet = models.unet("sd15", dtype=torch.float16)
    text = torch.empty(2, 77, 768, device="meta", dtype=torch.float16)
    sample = torch.empty(2, 4, 64, 64, device="meta", dtype=torch.float16)
    with torch.no_grad():
        out = unet(sample, torch.empty(2, device="meta", dtype=torch.int64), encoder_hidden_states=text).sample
    assert out.shape == (2, 4, 64, 64)
    assert out.dtype == torch.float16


def test_if_ii_l_is_near_the_published_size():
    # A reconstruction: 1128 M parameters against 1184 M.
    size = sum(p.numel() for p in models.unet("if-ii-l").parameters()) / 1e6
    assert 0.9 * 1184 < size < 1.1 * 1184


def test_unknown_unets():
    with pytest.raises(ValueError, match="unknown UNet 'sd3'; published configurations: sd15, sd21"):
        models.unet("sd3")


def test_a_missing_or_damaged_embedded_model_is_named(pipe, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no embedded model in .*: {CHECKSUMS} is missing; reinstall"):
        models.embedded_pipeline(tmp_path / "nowhere")
    pipe.save_pretrained(tmp_path)
    write_checksums(tmp_path)
    loaded = models.embedded_pipeline(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(latents(loaded), latents(pipe))
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.safetensors is damaged: its SHA-256"):
        models.embedded_pipeline(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks .*diffusion_pytorch_model\.safetensors; reinstall"):
        models.embedded_pipeline(tmp_path)


def test_checksums_are_not_trusted_to_name_every_file(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    write_checksums(tmp_path)
    record = tmp_path / CHECKSUMS
    whole = json.loads(record.read_text())
    assert len(whole) >= 8
    for name in whole:
        record.write_text(json.dumps({each: value for each, value in whole.items() if each != name}))
        with pytest.raises(ValueError, match=rf"{re.escape(name)} has no SHA-256 in {CHECKSUMS}"):
            check(tmp_path)
    for wrong in ("", "{", "[]", "[" * 100_000, '{"model_index.json": 3}', b"\xff".decode("latin-1")):
        record.write_text(wrong, encoding="latin-1")
        with pytest.raises(ValueError, match=rf"{CHECKSUMS} is damaged: it .*; reinstall"):
            check(tmp_path)
    record.write_text(json.dumps(whole))
    (tmp_path / ".DS_Store").write_text("a system's own")
    check(tmp_path)
