"""Small pipelines whose UNets take more, or other things, than text of Stable Diffusion's kind; see zoo.py."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import diffusers
import torch
import zoo
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor2_0, IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from sampling import picture
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection
from zoo import Inputs, Row

_EMBEDDING = 16  # width of image embeddings


def draw(pipe: Any, seed: int, *shape: int) -> Tensor:
    """Random numbers that depend on nothing but the seed and the shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(pipe.unet.dtype)


def ip_adapter(pipeline: Callable[[], Any], scales: tuple[float, ...]) -> Callable[[], Any]:
    """Builds a pipeline as ``load_ip_adapter`` leaves it: image projections, and processors of its own on attn2."""

    def builder() -> Any:
        pipe = pipeline()
        unet, tokens = pipe.unet, 4
        width = unet.config.cross_attention_dim
        unet.encoder_hid_proj = MultiIPAdapterImageProjection(
            [zoo.seeded(ImageProjection, _EMBEDDING, width, num_image_text_embeds=tokens) for _ in scales]
        )
        unet.config.encoder_hid_dim_type = "ip_image_proj"
        for name, layer in unet.named_modules():
            if name.endswith("attn2"):
                sizes = {"num_tokens": (tokens,) * len(scales), "scale": list(scales)}
                layer.set_processor(zoo.seeded(IPAdapterAttnProcessor2_0, layer.inner_dim, width, **sizes))
        return pipe

    return builder


def with_pictures(pipe: Any, inputs: Inputs, count: int = 1, **options: Any) -> Tensor:
    """A run on image embeddings, one for each IP-Adapter."""
    embeddings = [draw(pipe, 7 + i, 2, 1, _EMBEDDING) for i in range(count)]
    return zoo.sample(pipe, inputs, ip_adapter_image_embeds=embeddings, **options)


def with_masks(pipe: Any, inputs: Inputs) -> Tensor:
    """A run in which each picture counts in its own half; as many masks as adapters, in one tensor as documented."""
    left = torch.zeros(1, 1, *inputs.size)
    left[..., : inputs.size[1] // 2] = 1
    return with_pictures(pipe, inputs, 2, cross_attention_kwargs={"ip_adapter_masks": torch.cat([left, 1 - left])})


def custom_diffusion() -> Any:
    """A pipeline with the processors of Custom Diffusion: keys, values, queries and outputs of their own."""
    pipe = zoo.sd("StableDiffusionPipeline")()
    for name, layer in pipe.unet.named_modules():
        if name.endswith("attn2"):
            sizes = {"hidden_size": layer.inner_dim, "cross_attention_dim": layer.cross_attention_dim}
            layer.set_processor(zoo.seeded(CustomDiffusionAttnProcessor2_0, **sizes))
    return pipe


def despite(message: str, build: Callable[[], Any]) -> Callable[[], Any]:
    """Builds a pipeline of whose age Diffusers, or torch, warns."""

    def builder() -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message)
            return build()

    return builder


def grounded(pipe: Any, inputs: Inputs) -> Tensor:
    """A GLIGEN run that is grounded in the first three of eight steps."""
    return zoo.sample(
        pipe,
        inputs,
        gligen_phrases=["a cat"],
        gligen_boxes=[[0.1, 0.2, 0.6, 0.9]],
        gligen_scheduled_sampling_beta=0.4,
    )


def kandinsky(
    pipeline: str, in_channels: int = 4, parts: Callable[[], dict[str, Any]] = dict, **layout: Any
) -> Callable[[], Any]:
    """Builds a pipeline of Kandinsky 2, from what ``parts`` makes besides the decoder's own."""

    def builder() -> Any:
        unet = zoo.unet(
            in_channels=in_channels,
            out_channels=8,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            resnet_time_scale_shift="scale_shift",
            attention_head_dim=32,
            **{
                "encoder_hid_dim": _EMBEDDING,
                "encoder_hid_dim_type": "image_proj",
                "addition_embed_type": "image",
                **layout,
            },
        )
        movq = zoo.seeded(
            diffusers.VQModel,
            block_out_channels=(8, 8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            norm_num_groups=4,
            num_vq_embeddings=8,
            vq_embed_dim=4,
        )
        scheduler = diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=False)
        return zoo.build(pipeline, {**parts(), "unet": unet, "movq": movq, "scheduler": scheduler})

    return builder


def of_embedding(pipe: Any, inputs: Inputs, run: Callable[..., Tensor] = zoo.sample, **options: Any) -> Tensor:
    """A Kandinsky run, at twice the size: its latents are an eighth."""
    height, width = inputs.size
    embeddings = {
        "image_embeds": draw(pipe, sum(inputs.prompt.encode()), 1, _EMBEDDING),
        "negative_image_embeds": draw(pipe, 0, 1, _EMBEDDING),
    }
    return run(pipe, inputs, **embeddings, height=2 * height, width=2 * width, **options)


def from_one_picture(pipe: Any, inputs: Inputs, **options: Any) -> Tensor:
    """A run from a picture, which the pipeline repeats itself."""
    return zoo.image_to_image(pipe, inputs, image=picture(inputs.size), **options)


def under_hint(pipe: Any, inputs: Inputs) -> Tensor:
    """A Kandinsky run under a picture."""
    height, width = (-(-2 * side // 64) * 64 for side in inputs.size)  # the pipeline rounds up
    hint = draw(pipe, 9, 1, 3, height, width)
    return of_embedding(pipe, inputs, hint=hint, output_type="pt")


def kolors(pipeline: str) -> Callable[[], Any]:
    """Builds a Kolors pipeline; the text encoder is gone, as where memory is short."""
    layout = {"encoder_hid_dim": 24, "encoder_hid_dim_type": "text_proj"}
    without = dict.fromkeys(("text_encoder", "tokenizer"))
    return despite("`torch.jit.script` is deprecated", zoo.xl(pipeline, layout, **without))


def text_embeddings(pipe: Any, inputs: Inputs) -> dict[str, Tensor]:
    """A Kolors run's arguments for text embeddings that depend on the prompt."""
    seed, n = sum(inputs.prompt.encode()), inputs.images  # Kolors repeats only what it has encoded itself
    return {
        "prompt_embeds": draw(pipe, seed, n, 9, 24),
        "negative_prompt_embeds": draw(pipe, 0, n, 9, 24),
        "pooled_prompt_embeds": draw(pipe, seed, n, 64),
        "negative_pooled_prompt_embeds": draw(pipe, 0, n, 64),
    }


def of_text_embedding(pipe: Any, inputs: Inputs) -> Tensor:
    return zoo.sample(pipe, inputs, prompt=None, num_images_per_prompt=1, **text_embeddings(pipe, inputs))


def from_picture_and_embedding(pipe: Any, inputs: Inputs) -> Tensor:
    """A Kolors run from a picture; upstream forgets to pass pooled embeddings on, so they come from the encoder."""
    texts = text_embeddings(pipe, inputs)
    with mock.patch.object(pipe, "encode_prompt", return_value=tuple(texts.values())):
        return zoo.image_to_image(pipe, inputs, prompt=None, num_images_per_prompt=1, **texts)


def image_encoder(width: int) -> Any:
    """An image encoder whose embeddings have a width."""
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
        projection_dim=width,
    )
    return zoo.seeded(CLIPVisionModelWithProjection, config)


def variation() -> Any:
    """A pipeline whose text is one token, made from a picture."""
    return zoo.sd(
        "StableDiffusionImageVariationPipeline",
        image_encoder=lambda _: image_encoder(64),
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    )()


def consistency() -> Any:
    """A latent consistency model: the guidance scale is an input of the UNet."""
    return zoo.sd(
        "LatentConsistencyModelPipeline",
        {"time_cond_proj_dim": 16},
        scheduler=diffusers.LCMScheduler(**zoo.parts_of_sd()["scheduler"].config),
    )()


_SD = zoo.sd("StableDiffusionPipeline")
_XL = zoo.xl("StableDiffusionXLPipeline")

ROWS: dict[str, Row] = {
    "StableDiffusionPipeline: IP-Adapter": Row(ip_adapter(_SD, (0.7,)), with_pictures),
    "StableDiffusionXLPipeline: two IP-Adapters": Row(ip_adapter(_XL, (0.7, 0.4)), partial(with_pictures, count=2)),
    "StableDiffusionPipeline: two IP-Adapters with masks": Row(
        ip_adapter(_SD, (0.7, 0.4)), with_masks, reasons=("attn2 layers run stock: arguments ip_adapter_masks",)
    ),
    "StableDiffusionPipeline: Custom Diffusion": Row(
        custom_diffusion, zoo.sample, reasons=("attn2 layers run stock: attention processor CustomDiffusion",)
    ),
    "StableDiffusionGLIGENPipeline": Row(
        despite(".*has been deprecated", zoo.sd("StableDiffusionGLIGENPipeline", {"attention_type": "gated"})),
        grounded,
        reasons=("key step at 3: GLIGEN's layers changed",),
    ),
    "KandinskyV22Pipeline": Row(kandinsky("KandinskyV22Pipeline"), of_embedding),
    "KandinskyV22Img2ImgPipeline": Row(
        kandinsky("KandinskyV22Img2ImgPipeline"), partial(of_embedding, run=from_one_picture)
    ),
    "KandinskyV22ControlnetPipeline": Row(
        kandinsky("KandinskyV22ControlnetPipeline", 8, addition_embed_type="image_hint"), under_hint
    ),
    "KolorsPipeline": Row(kolors("KolorsPipeline"), of_text_embedding),
    "KolorsImg2ImgPipeline": Row(kolors("KolorsImg2ImgPipeline"), from_picture_and_embedding),
    "KolorsPAGPipeline": Row(kolors("KolorsPAGPipeline"), of_text_embedding),
    "StableDiffusionImageVariationPipeline": Row(variation, zoo.under_map),
    "LatentConsistencyModelPipeline": Row(consistency, zoo.sample),
}
