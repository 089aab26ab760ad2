"""The attack on an erasure: ordinary finetuning on the concept, and back."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .denoise import Denoiser
from .examples import Examples, draw_batches, encode_examples
from .optimiser import AdamW
from .params import Weights, check_trainable, select_parameters
from .ranges import check_positive, check_whole
from .student import add_lora, check_adapters, remove_lora


@dataclass(frozen=True)
class Relearning:
    """What an attacker does: AdamW on the loss of diffusion, gradients clipped to a norm of 1.

    Attributes:
        examples: pairs of a picture and a prompt that show the concept, or :class:`~.examples.Examples`.
        steps: after how many steps the weights are looked at, ascending.
        learning_rate, batch_size: of the attack.
        lora_rank: train a LoRA on the attention layers; None: all weights.
        seed: of its draws.

    Raises:
        ValueError: steps that do not ascend from at least 1, a number out of its range.
    """

    examples: Examples | Sequence[tuple[Any, str]]
    steps: tuple[int, ...] = (10, 30, 100, 300)
    learning_rate: float = 1e-5
    batch_size: int = 1
    lora_rank: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for step in self.steps:
            check_whole("each of steps", step)
        if not self.steps or any(a >= b for a, b in zip(self.steps, self.steps[1:], strict=False)):
            raise ValueError(f"steps must ascend from at least 1, got {self.steps}")
        check_positive("learning_rate", self.learning_rate)
        check_whole("batch_size", self.batch_size)
        check_whole("seed", self.seed, 0)
        if self.lora_rank is not None:
            check_whole("lora_rank", self.lora_rank)


def prepare_attack(pipe: Any, attack: Relearning) -> Relearning:
    """Return the attack with its examples encoded, after everything that can be wrong with it was looked at.

    Raises:
        ValueError: a pipeline that cannot be trained, weights in float16 without ``lora_rank``, adapters that are
            loaded with it.
        TypeError: examples that are no pairs.
    """
    unet = Denoiser(pipe).unet
    if attack.lora_rank is None:
        check_trainable(select_parameters(unet, "full"))
    else:
        check_adapters(unet)
    if isinstance(attack.examples, Examples):
        return attack
    return replace(attack, examples=encode_examples(pipe, attack.examples))


def relearn(pipe: Any, attack: Relearning) -> Generator[int, None, None]:
    """Finetune the pipeline, and yield at each of the attack's steps; afterwards the weights are as they were.

    Raises:
        ValueError, TypeError: see :func:`prepare_attack`.
    """
    attack = prepare_attack(pipe, attack)
    denoiser = Denoiser(pipe)
    if attack.lora_rank is None:
        chosen = select_parameters(denoiser.unet, "full")
    else:
        attention = list(select_parameters(denoiser.unet, "*.attn[12].*.weight"))
        chosen = add_lora(denoiser.unet, attention, attack.lora_rank, attack.seed)
    weights = Weights(chosen)
    before = weights.copy()
    try:
        yield from _finetune(denoiser, weights, attack)
    finally:
        weights.load(before)
        if attack.lora_rank is not None:
            remove_lora(denoiser.unet)


def _finetune(denoiser: Denoiser, weights: Weights, attack: Relearning) -> Iterator[int]:
    optimiser = AdamW(weights.parameters, attack.learning_rate, weight_decay=1e-4)
    generator = torch.Generator().manual_seed(attack.seed)
    step = 0
    while True:
        for batch in draw_batches(denoiser, attack.examples, attack.batch_size, generator):
            with weights.training(denoiser.unet):
                batch.loss(denoiser).backward()
                torch.nn.utils.clip_grad_norm_(weights.parameters, 1.0)
                optimiser.step()
            step += 1
            if step in attack.steps:
                yield step
            if step >= attack.steps[-1]:
                return
