"""Kandinsky's pipelines and UnCLIP's, small."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import torch
import zoo
from adapter_zoo import draw, from_one_picture, image_encoder, kandinsky, of_embedding
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPTextModelWithProjection,
)
from zoo import Inputs

_WIDTH = 64  # of all embeddings here


def image_processor() -> Any:
    """What comes before the image encoder."""
    return CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def prior_parts(prefix: str = "prior_") -> dict[str, Any]:
    """What makes an image embedding from a prompt, in a step or two."""
    base = zoo.parts_of_sd()
    prior = zoo.seeded(
        diffusers.PriorTransformer, num_attention_heads=2, attention_head_dim=8, num_layers=1, embedding_dim=_WIDTH
    )
    scheduler = diffusers.UnCLIPScheduler(
        variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0
    )
    return {
        "prior": prior,
        "prior_prior": prior,
        "prior_image_encoder": image_encoder(_WIDTH),
        "prior_text_encoder": zoo.seeded(CLIPTextModelWithProjection, base["text_encoder"].config),
        "prior_tokenizer": base["tokenizer"],
        "prior_scheduler": scheduler,
        "prior_image_processor": image_processor(),
    }


def with_prior(pipe: Any, inputs: Inputs, run: Callable[..., Tensor] = zoo.sample, **options: Any) -> Tensor:
    """A run at twice the size, as of all Kandinsky pipelines, with two steps of the prior before it."""
    size = {"height": 2 * inputs.size[0], "width": 2 * inputs.size[1]}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*callback_steps", FutureWarning)  # Diffusers' own
        return run(pipe, inputs, prior_num_inference_steps=2, **size, **options)


def kandinsky_combined(pipeline: str, in_channels: int = 4) -> Callable[[], Any]:
    """Builds a pipeline of Kandinsky 2.2 with its prior."""
    return kandinsky(pipeline, in_channels, parts=prior_parts, encoder_hid_dim=_WIDTH)


def kandinsky_1(pipeline: str, in_channels: int = 4) -> Callable[[], Any]:
    """Builds a pipeline of Kandinsky 2.1, with its prior where it takes one."""

    def parts() -> dict[str, Any]:
        from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP

        base = zoo.parts_of_sd()
        config = MCLIPConfig(
            transformerDimSize=32,
            imageDimSize=_WIDTH,
            hidden_size=32,
            intermediate_size=32,
            num_attention_heads=2,
            num_hidden_layers=1,
            vocab_size=base["text_encoder"].config.vocab_size,
        )
        return {**prior_parts(), "text_encoder": zoo.seeded(MultilingualCLIP, config), "tokenizer": base["tokenizer"]}

    layout = {"encoder_hid_dim": 32, "encoder_hid_dim_type": "text_image_proj", "addition_embed_type": "text_image"}
    return kandinsky(pipeline, in_channels, parts=parts, **layout)


def of_embedding_and_text(pipe: Any, inputs: Inputs, run: Callable[..., Tensor] = zoo.sample, **options: Any) -> Tensor:
    """A run of Kandinsky 2.1's decoder."""
    embeddings = {
        "image_embeds": draw(pipe, sum(inputs.prompt.encode()), 1, _WIDTH),
        "negative_image_embeds": draw(pipe, 0, 1, _WIDTH),
    }
    size = {"height": 2 * inputs.size[0], "width": 2 * inputs.size[1]}
    return run(pipe, inputs, output_type="pt", **embeddings, **size, **options)


def from_picture_under_hint(pipe: Any, inputs: Inputs) -> Tensor:
    """A Kandinsky run from a picture under another one."""
    height, width = (-(-2 * side // 64) * 64 for side in inputs.size)  # the pipeline rounds up
    hint = draw(pipe, 9, 1, 3, height, width)
    return of_embedding(pipe, inputs, run=from_one_picture, hint=hint, output_type="pt")


def kandinsky_3(pipeline: str) -> Callable[[], Any]:
    """Builds a pipeline of Kandinsky 3; the text encoder is gone, as where memory is short."""

    def builder() -> Any:
        unet = zoo.seeded(
            diffusers.Kandinsky3UNet,
            time_embedding_dim=32,
            groups=4,
            attention_head_dim=8,
            layers_per_block=2,
            block_out_channels=(16, 32),
            cross_attention_dim=24,
            encoder_hid_dim=24,
        )
        movq = kandinsky("KandinskyV22Pipeline")().movq
        parts = {"unet": unet, "movq": movq, "scheduler": diffusers.DDPMScheduler(clip_sample=False)}
        return zoo.build(pipeline, {**parts, "tokenizer": None, "text_encoder": None})

    return builder


def of_text(pipe: Any, inputs: Inputs, run: Callable[..., Tensor] = zoo.sample, **options: Any) -> Tensor:
    """A run of Kandinsky 3 on a text of which some tokens are none."""
    texts = {
        "prompt": None,
        "prompt_embeds": draw(pipe, sum(inputs.prompt.encode()), 1, 7, 24),
        "negative_prompt_embeds": draw(pipe, 0, 1, 7, 24),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0]]),
        "negative_attention_mask": torch.tensor([[1, 1, 0, 0, 0, 0, 0]]),
    }
    size = {"height": 2 * inputs.size[0], "width": 2 * inputs.size[1]}
    taken = zoo.taken_by(type(pipe).__call__)
    return run(pipe, inputs, **texts, **{name: each for name, each in size.items() if name in taken}, **options)


def unclip(pipeline: str) -> Callable[[], Any]:
    """Builds a Stable unCLIP pipeline."""

    def builder() -> Any:
        from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

        layout = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2 * _WIDTH}
        parts = {
            **zoo.parts_of_sd(),
            **prior_parts(),
            "unet": zoo.unet(**layout),
            "image_normalizer": zoo.seeded(StableUnCLIPImageNormalizer, embedding_dim=_WIDTH),
            "image_noising_scheduler": diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
            "image_encoder": image_encoder(_WIDTH),
            "feature_extractor": image_processor(),
        }
        return zoo.build(pipeline, parts)

    return builder
