"""Small pipelines that have UNets or loops of their own: latent diffusion, unCLIP, Kandinsky 2.1 and 3; see zoo.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import diffusers
import torch
import zoo
from adapter_zoo import despite, draw, from_one_picture, kandinsky, of_embedding
from kandinsky_zoo import (
    _WIDTH,
    from_picture_under_hint,
    kandinsky_1,
    kandinsky_3,
    kandinsky_combined,
    of_embedding_and_text,
    of_text,
    unclip,
    with_prior,
)
from sampling import picture
from torch import Tensor
from transformers import (
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
)
from zoo import Inputs, Row

#: A second run of pipelines that round sizes up.
_OTHER = Inputs("two cats", seed=1, images=2, size=(64, 32))
#: The same of pipelines that confuse height and width.
_OTHER_SQUARE = replace(_OTHER, size=(64, 64))
#: The same of those that make one picture at a time.
_OTHER_SINGLE = replace(_OTHER, images=1)


def marigold(pipeline: str, targets: int = 1, **config: Any) -> Callable[[], Any]:
    """Builds a Marigold pipeline, which predicts one picture or several from another."""
    channels = {"in_channels": 4 + 4 * targets, "out_channels": 4 * targets}
    return zoo.sd(pipeline, channels, default_denoising_steps=8, default_processing_resolution=0, **config)


def predict(pipe: Any, inputs: Inputs) -> Tensor:
    """A Marigold run."""
    pictures = [picture(inputs.size, seed) for seed in range(inputs.images)]
    options = {"processing_resolution": 0, "batch_size": inputs.images, "output_latent": True}
    return pipe(pictures, inputs.steps, generator=inputs.generator, **options).latent


def latent_diffusion() -> Any:
    """The first of all latent diffusion models for text; a text encoder of CLIP's kind in place of BERT's."""
    base = zoo.parts_of_sd()
    return zoo.build(
        "LDMTextToImagePipeline", {**base, "bert": base["text_encoder"], "vqvae": base["vae"], "unet": zoo.unet()}
    )


def of_prompts(pipe: Any, inputs: Inputs) -> Tensor:
    """A run on as many prompts as there are pictures, at twice the size: its latents are an eighth."""
    size = {"height": 2 * inputs.size[0], "width": 2 * inputs.size[1]}
    return zoo.sample(
        pipe, inputs, prompt=[inputs.prompt] * inputs.images, guidance_scale=3.0, output_type="pt", **size
    )


def pixels(pipeline: str, scheduler: Any = None, **config: Any) -> Callable[[], Any]:
    """Builds a pipeline with a UNet that knows no text."""

    def builder() -> Any:
        layout = {
            "sample_size": 8,
            "in_channels": 3,
            "out_channels": 3,
            "block_out_channels": (32, 64),
            "layers_per_block": 2,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        }
        vae = zoo.seeded(diffusers.AutoencoderKL, latent_channels=3, block_out_channels=(32,))
        unet = zoo.seeded(diffusers.UNet2DModel, **{**layout, **config})
        plain = diffusers.DDIMScheduler(clip_sample=False)
        return zoo.build(pipeline, {"unet": unet, "scheduler": scheduler or plain, "vqvae": vae})

    return builder


def unconditional(pipe: Any, inputs: Inputs, **options: Any) -> Tensor:
    """A run from noise alone."""
    return zoo.sample(pipe, inputs, batch_size=inputs.images, output_type="pt", **options)


def enlarge(pipe: Any, inputs: Inputs) -> Tensor:
    """A run on a low-resolution picture."""
    low = draw(pipe, 3, inputs.images, 3, inputs.size[0] // 4, inputs.size[1] // 4)
    return zoo.sample(pipe, inputs, image=low, output_type="pt")


def audio() -> Any:
    """AudioLDM 2, without what makes its two texts."""
    unet = zoo.seeded(
        diffusers.AudioLDM2UNet2DConditionModel,
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=((None, 16, 24),) * 2,
        attention_head_dim=8,
    )
    vocoder = zoo.seeded(
        SpeechT5HifiGan,
        SpeechT5HifiGanConfig(
            model_in_dim=32,
            sampling_rate=16000,
            upsample_initial_channel=8,
            upsample_rates=[2],
            upsample_kernel_sizes=[4],
            resblock_kernel_sizes=[3],
            resblock_dilation_sizes=[[1]],
        ),
    )
    base = zoo.parts_of_sd()
    encoders = {name: base["text_encoder"] for name in ("text_encoder", "text_encoder_2", "language_model")}
    without = dict.fromkeys(("projection_model", "tokenizer_2"))
    return zoo.build("AudioLDM2Pipeline", {**base, **encoders, **without, "unet": unet, "vocoder": vocoder})


def of_two_texts(pipe: Any, inputs: Inputs) -> Tensor:
    """An AudioLDM 2 run on what its encoders would return; the second text is masked."""
    seed = sum(inputs.prompt.encode())
    texts = {
        "prompt": None,
        "prompt_embeds": draw(pipe, seed, 1, 5, 24),
        "negative_prompt_embeds": draw(pipe, 0, 1, 5, 24),
        "generated_prompt_embeds": draw(pipe, seed, 1, 4, 16),
        "negative_generated_prompt_embeds": draw(pipe, 1, 1, 4, 16),
        "attention_mask": torch.tensor([[1, 1, 1, 0, 0]]),
        "negative_attention_mask": torch.tensor([[1, 1, 0, 0, 0]]),
    }
    length = {"audio_length_in_s": inputs.size[0] / 8000, "num_waveforms_per_prompt": inputs.images}
    return zoo.sample(pipe, inputs, **texts, **length)


def dreamlite(pipeline: str) -> Callable[[], Any]:
    """Builds a DreamLite pipeline; a text encoder of CLIP's kind in place of Qwen's."""

    def builder() -> Any:
        unet = zoo.seeded(
            diffusers.DreamLiteUNetModel,
            sample_size=8,
            block_out_channels=(32, 64),
            down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
            up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
            cross_attention_dim=24,
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=16,
        )
        vae = zoo.seeded(
            diffusers.AutoencoderTiny,
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            num_encoder_blocks=(1, 1, 1),
            num_decoder_blocks=(1, 1, 1),
        )
        base = {**zoo.parts_of_sd(), "processor": None, "unet": unet, "vae": vae}
        return zoo.build(pipeline, base, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))

    return builder


def lightly(pipe: Any, inputs: Inputs, rows: int, **options: Any) -> Tensor:
    """A DreamLite run on a text for each part of the batch, the last of which is the prompt's."""
    texts = torch.cat([draw(pipe, seed, 1, 6, 24) for seed in (*range(rows - 1), sum(inputs.prompt.encode()))])
    kept = torch.ones(rows, 6, dtype=torch.long)
    with mock.patch.object(pipe, "encode_prompt", return_value=(texts, kept)):
        return zoo.sample(pipe, inputs, **options)


def upscaler() -> Any:
    """The latent upscaler, with a UNet of k-diffusion's blocks."""
    layout = {
        "in_channels": 8,
        "out_channels": 5,
        "act_fn": "gelu",
        "norm_num_groups": None,
        "block_out_channels": (32, 32, 64, 64),
        "time_cond_proj_dim": 128 + _WIDTH,
        "conv_in_kernel": 1,
        "conv_out_kernel": 1,
        "down_block_types": ("KDownBlock2D", *["KCrossAttnDownBlock2D"] * 3),
        "mid_block_type": None,
        "up_block_types": (*["KCrossAttnUpBlock2D"] * 3, "KUpBlock2D"),
        "resnet_time_scale_shift": "scale_shift",
        "time_embedding_type": "fourier",
        "timestep_post_act": "gelu",
        "attention_head_dim": 8,
    }
    return zoo.sd("StableDiffusionLatentUpscalePipeline", layout, scheduler=diffusers.EulerDiscreteScheduler())()


def upscale(pipe: Any, inputs: Inputs) -> Tensor:
    """A run of the latent upscaler, from latents."""
    low = draw(pipe, 3, 1, 4, inputs.size[0] // 4, inputs.size[1] // 4)
    return zoo.sample(pipe, inputs, image=low)


def invert_and_edit(pipe: Any, inputs: Inputs, **options: Any) -> Tensor:
    """A run of LEdits++: noise maps from a picture, then the picture anew with something added."""
    pipe.invert(picture(inputs.size), num_inversion_steps=inputs.steps, generator=inputs.generator, **options)
    # Its masks by attention want larger pictures.
    edit = {"editing_prompt": inputs.prompt, "edit_warmup_steps": 1, "use_intersect_mask": False}
    return pipe(**edit, generator=inputs.generator, output_type="latent", return_dict=False)[0]


def ledits(make: Callable[..., Callable[[], Any]], pipeline: str) -> Callable[[], Any]:
    """Builds a pipeline of LEdits++."""
    scheduler = diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_order=2, steps_offset=1)
    return make(pipeline, scheduler=scheduler)


class OwnPipeline(diffusers.DiffusionPipeline):
    """A pipeline that nobody has seen: its UNet gets copies of the times, and is called twice a step."""

    def __init__(self, unet: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str,
        num_inference_steps: int,
        generator: torch.Generator,
        num_images_per_prompt: int = 1,
        height: int = 32,
        width: int = 32,
    ) -> tuple[Tensor]:
        images = num_images_per_prompt
        texts = [draw(self, seed, 1, 7, _WIDTH).repeat(images, 1, 1) for seed in (sum(prompt.encode()), 0)]
        latents = torch.randn(images, 4, height // 4, width // 4, generator=generator).to(self.unet.dtype)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            mine, none = (self.unet(latents, t.clone(), encoder_hidden_states=text).sample for text in texts)
            latents = self.scheduler.step(none + 3 * (mine - none), t, latents).prev_sample
        return (latents,)


def own() -> Any:
    return OwnPipeline(zoo.unet(), zoo.parts_of_sd()["scheduler"])


#: DreamLite's attention, in which several heads share keys and values.
_FOREIGN = tuple(f"{kind} layers run stock: attention processor DreamLite" for kind in ("attn2", "self-attention"))
ROWS: dict[str, Row] = {
    "LatentConsistencyModelImg2ImgPipeline": Row(
        zoo.sd("LatentConsistencyModelImg2ImgPipeline", {"time_cond_proj_dim": 16}, scheduler=diffusers.LCMScheduler()),
        partial(zoo.image_to_image, strength=0.75),
        slow=True,
    ),
    "KandinskyV22InpaintPipeline": Row(
        kandinsky("KandinskyV22InpaintPipeline", 9),
        partial(of_embedding, run=zoo.inpainting),
        other=_OTHER,
        slow=True,
    ),
    "KandinskyV22ControlnetImg2ImgPipeline": Row(
        kandinsky("KandinskyV22ControlnetImg2ImgPipeline", 8, addition_embed_type="image_hint"),
        from_picture_under_hint,
        other=_OTHER_SQUARE,
        slow=True,
    ),
    "KandinskyV22CombinedPipeline": Row(
        kandinsky_combined("KandinskyV22CombinedPipeline"), with_prior, other=_OTHER, slow=True
    ),
    "KandinskyV22Img2ImgCombinedPipeline": Row(
        kandinsky_combined("KandinskyV22Img2ImgCombinedPipeline"),
        partial(with_prior, run=from_one_picture),
        other=_OTHER_SQUARE,
        slow=True,
    ),
    "KandinskyV22InpaintCombinedPipeline": Row(
        kandinsky_combined("KandinskyV22InpaintCombinedPipeline", 9),
        partial(with_prior, run=zoo.inpainting),
        other=_OTHER,
        slow=True,
    ),
    "KandinskyPipeline": Row(kandinsky_1("KandinskyPipeline"), of_embedding_and_text, other=_OTHER, slow=True),
    "KandinskyImg2ImgPipeline": Row(
        kandinsky_1("KandinskyImg2ImgPipeline"),
        partial(of_embedding_and_text, run=from_one_picture),
        other=_OTHER_SQUARE,
        slow=True,
    ),
    "KandinskyInpaintPipeline": Row(
        kandinsky_1("KandinskyInpaintPipeline", 9),
        partial(of_embedding_and_text, run=zoo.inpainting),
        other=_OTHER,
        slow=True,
    ),
    "KandinskyCombinedPipeline": Row(
        kandinsky_1("KandinskyCombinedPipeline"),
        partial(with_prior, output_type="pt"),
        other=_OTHER,
        slow=True,
    ),
    "KandinskyImg2ImgCombinedPipeline": Row(
        kandinsky_1("KandinskyImg2ImgCombinedPipeline"),
        partial(with_prior, run=zoo.image_to_image, output_type="pt"),
        other=_OTHER_SQUARE,
        slow=True,
    ),
    "KandinskyInpaintCombinedPipeline": Row(
        kandinsky_1("KandinskyInpaintCombinedPipeline", 9),
        partial(with_prior, run=zoo.inpainting, output_type="pt"),
        other=_OTHER,
        slow=True,
    ),
    "Kandinsky3Pipeline": Row(kandinsky_3("Kandinsky3Pipeline"), of_text, other=_OTHER),
    "Kandinsky3Img2ImgPipeline": Row(
        kandinsky_3("Kandinsky3Img2ImgPipeline"),
        partial(of_text, run=from_one_picture),
        other=_OTHER,
        slow=True,
    ),
    "StableUnCLIPPipeline": Row(
        unclip("StableUnCLIPPipeline"), partial(zoo.sample, prior_num_inference_steps=2), slow=True
    ),
    "StableUnCLIPImg2ImgPipeline": Row(unclip("StableUnCLIPImg2ImgPipeline"), zoo.under_map, slow=True),
    "MarigoldDepthPipeline": Row(marigold("MarigoldDepthPipeline", prediction_type="depth"), predict),
    "MarigoldNormalsPipeline": Row(marigold("MarigoldNormalsPipeline", prediction_type="normals"), predict, slow=True),
    "MarigoldIntrinsicsPipeline": Row(
        marigold(
            "MarigoldIntrinsicsPipeline",
            2,
            prediction_type="intrinsics",
            target_properties={"target_names": ["albedo", "material"]},
        ),
        predict,
        slow=True,
    ),
    "LDMTextToImagePipeline": Row(latent_diffusion, of_prompts),
    "LDMSuperResolutionPipeline": Row(pixels("LDMSuperResolutionPipeline", in_channels=6), enlarge, slow=True),
    "DDPMPipeline": Row(pixels("DDPMPipeline", diffusers.DDPMScheduler(clip_sample=False)), unconditional, slow=True),
    "DDIMPipeline": Row(pixels("DDIMPipeline"), unconditional),
    "ConsistencyModelPipeline": Row(
        pixels("ConsistencyModelPipeline", diffusers.CMStochasticIterativeScheduler()),
        unconditional,
        slow=True,
    ),
    "AudioLDM2Pipeline": Row(
        despite("`torch.jit.script` is deprecated", audio),
        of_two_texts,
        reasons=("attn2 layers run stock: arguments attention_mask (masks are not fused)",),
    ),
    "DreamLitePipeline": Row(
        dreamlite("DreamLitePipeline"), partial(lightly, rows=2), _OTHER_SINGLE, _FOREIGN, slow=True
    ),
    "DreamLitePipeline: edit": Row(
        dreamlite("DreamLitePipeline"),
        lambda pipe, inputs: lightly(pipe, inputs, 3, image=picture(inputs.size)),
        _OTHER_SINGLE,
        _FOREIGN,
        slow=True,
    ),
    "DreamLiteMobilePipeline": Row(
        dreamlite("DreamLiteMobilePipeline"), partial(lightly, rows=1), _OTHER_SINGLE, _FOREIGN
    ),
}
_NOTED = "attn2 layers run stock: attention processor", "self-attention layers run stock: attention processor"
#: Pipelines whose steps share nothing: of Diffusers', those that are not deprecated.
EXACT_ROWS: dict[str, Row] = {
    "LEditsPPPipelineStableDiffusion": Row(
        ledits(zoo.sd, "LEditsPPPipelineStableDiffusion"), invert_and_edit, _OTHER_SINGLE, _NOTED
    ),
    "LEditsPPPipelineStableDiffusionXL": Row(
        ledits(zoo.xl, "LEditsPPPipelineStableDiffusionXL"), invert_and_edit, _OTHER_SINGLE, _NOTED
    ),
    "StableDiffusionLatentUpscalePipeline": Row(
        upscaler, upscale, _OTHER_SINGLE, ("attn2 layers run stock: the layer has a norm_cross",)
    ),
    "OwnPipeline": Row(own, zoo.sample),
}
