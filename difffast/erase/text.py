"""Prompts as a UNet sees them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .params import fingerprint


@dataclass(frozen=True)
class Conditions:
    """Encoded prompts.

    Attributes:
        embeds: [n, T, d].
        pooled: [n, p], SDXL's pooled text; None for the others.
    """

    embeds: Tensor
    pooled: Tensor | None = None

    def __len__(self) -> int:
        return len(self.embeds)

    def take(self, rows: Tensor | Sequence[int] | slice) -> Conditions:
        """Return some of the prompts."""
        return Conditions(self.embeds[rows], None if self.pooled is None else self.pooled[rows])

    def repeat(self, times: int) -> Conditions:
        """Return every prompt ``times`` times in a row."""
        pooled = None if self.pooled is None else self.pooled.repeat_interleave(times, 0)
        return Conditions(self.embeds.repeat_interleave(times, 0), pooled)

    @staticmethod
    def join(parts: Iterable[Conditions]) -> Conditions:
        """Return one batch of several."""
        parts = list(parts)
        pooled = None if parts[0].pooled is None else torch.cat([part.pooled for part in parts])
        return Conditions(torch.cat([part.embeds for part in parts]), pooled)


def check_pipeline(pipe: Any) -> None:
    """Refuse what has no UNet with a text.

    Raises:
        ValueError: the pipeline has no UNet with cross-attention to an encoded prompt.
    """
    unet = getattr(pipe, "unet", None)
    if not isinstance(unet, torch.nn.Module) or not hasattr(pipe, "encode_prompt"):
        raise ValueError(
            f"erasure needs a pipeline with a UNet and a text encoder, such as Stable Diffusion's, got "
            f"{type(pipe).__name__}"
        )


def list_prompts(value: str | Sequence[str], name: str, least: int = 1) -> list[str]:
    """Return prompts as a list.

    Raises:
        ValueError: fewer than ``least``.
        TypeError: something else than texts.
    """
    texts = [value] if isinstance(value, str) else list(value)
    if any(not isinstance(text, str) for text in texts):
        raise TypeError(f"{name} must be texts, got {texts!r}")
    if len(texts) < least:
        raise ValueError(f"{name} must name at least {least}, got {texts!r}")
    return texts


@torch.no_grad()
def encode(pipe: Any, prompts: Sequence[str]) -> Conditions:
    """Encode prompts, as the stock call does."""
    device = pipe.unet.device
    made = pipe.encode_prompt(
        prompt=list(prompts), device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return Conditions(made[0], made[2] if len(made) > 2 else None)


@torch.no_grad()
def encode_null(pipe: Any) -> Conditions:
    """Encode what guidance leads away from when no negative prompt is given: for SDXL these are zeros."""
    made = pipe.encode_prompt(
        prompt=[""], device=pipe.unet.device, num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    return Conditions(made[1], made[3] if len(made) > 2 else None)


def fingerprint_encoders(pipe: Any) -> str:
    """Return what tells a pipeline's text encoders from others."""
    encoders = {name: getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2")}
    return fingerprint(
        {
            f"{name}.{key}": value
            for name, encoder in encoders.items()
            if encoder is not None
            for key, value in encoder.named_parameters()
        }
    )


def choose_rows(pipe: Any, prompts: Sequence[str], tokens: str) -> Tensor:
    """Encode prompts and choose rows of them: each one's last word piece, or all, [rows, d]."""
    embeds = encode(pipe, prompts).embeds
    if tokens == "all":
        return embeds.flatten(0, 1)
    tokenizer = next(t for t in (getattr(pipe, n, None) for n in ("tokenizer", "tokenizer_2")) if t is not None)
    lengths = [len(tokenizer(text, truncation=True, max_length=embeds.shape[1]).input_ids) for text in prompts]
    return embeds[range(len(prompts)), [length - 2 for length in lengths]]  # the end token comes after it
