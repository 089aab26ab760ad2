"""Semantic binding written out: plain sampling loops, autograd, and full forward passes; nothing of difffast runs.

Latents z are the scheduler's; x is what the UNet sees of them, and what losses are differentiated with respect to.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Things:
    """A prompt, as positions: the nouns and modifiers of each thing, its phrase, and the simplified prompt.

    SDXL's prompt for what is not wanted, where there is none, is zeros, and so is its pooled text.
    """

    text: str
    subjects: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    phrases: tuple[str, ...]
    simplified: str
    unwanted: str | None = None


@dataclass(frozen=True)
class Numbers:
    """What is done how often, and how far: ``thresholds`` end a step below value / 2 * things - 2."""

    steps: int
    bind: int
    focus: int
    iterations: int
    replace: int | None
    step_size: float
    bind_step_size: float
    guidance: float = 7.5
    rescale: float = 0.0
    thresholds: tuple[float, ...] = ()
    layout: bool = False


class StoringProcessor:
    """Attention that keeps its probabilities [B, heads, N, T]."""

    def __init__(self) -> None:
        self.kept: torch.Tensor | None = None

    def __call__(self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, **_: Any) -> Any:
        def heads(x: Any) -> Any:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        q, k, v = (
            heads(to(x))
            for to, x in (
                (attn.to_q, hidden_states),
                (attn.to_k, encoder_hidden_states),
                (attn.to_v, encoder_hidden_states),
            )
        )
        self.kept = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        return attn.to_out[0]((self.kept @ v).transpose(1, 2).flatten(2))


class Model:
    """A copy of a pipeline, SD's or SDXL's, by its parts."""

    def __init__(self, pipe: Any, things: Things, steps: int, layers: tuple[str, ...], seed: int) -> None:
        self.pipe = pipe = copy.deepcopy(pipe)
        pipe.unet.requires_grad_(False)
        self.stores = []
        for name, module in pipe.unet.named_modules():
            if name in layers:
                module.processor = StoringProcessor()
                self.stores.append(module.processor)
        self.xl = hasattr(pipe, "text_encoder_2")
        self.text, self.pooled = self.encode(things.text)
        if self.xl and things.unwanted is None:
            self.nothing, self.unwanted = torch.zeros_like(self.text), torch.zeros_like(self.pooled)
        else:
            self.nothing, self.unwanted = self.encode(things.unwanted or "")
        self.phrases = [self.encode(phrase)[0] for phrase in things.phrases]
        self.simplified = self.encode(things.simplified)[0]
        self.scheduler = pipe.scheduler
        self.scheduler.set_timesteps(steps)
        noise = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=self.text.dtype)
        self.z = noise * self.scheduler.init_noise_sigma

    def encode(self, text: str) -> tuple[Any, Any]:
        with torch.no_grad():
            if self.xl:
                found = self.pipe.encode_prompt(text, device="cpu", do_classifier_free_guidance=False)
                return found[0][0], found[2]
            return self.pipe.encode_prompt(text, "cpu", 1, False)[0][0], None

    def count(self, text: str) -> int:
        return len(self.pipe.tokenizer(text, add_special_tokens=False).input_ids)

    def __call__(self, x: Any, t: Any, text: Any, pooled: Any = None) -> Any:
        """The UNet's output for inputs x; without pooled text, SDXL's is zero."""
        extra = {}
        if self.xl:
            size = (4 * x.shape[2], 4 * x.shape[3])
            ids = torch.tensor([[*size, 0, 0, *size]], dtype=x.dtype)
            pooled = torch.zeros(len(x), 64, dtype=x.dtype) if pooled is None else pooled
            extra["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids.repeat(len(x), 1)}
        return self.pipe.unet(x, t, encoder_hidden_states=text, **extra).sample

    def maps(self) -> Any:
        """Of the latest pass, [N, T]."""
        return torch.stack([store.kept[0] for store in self.stores]).mean((0, 1))

    def guided(self, x: Any, t: Any, text: Any, numbers: Numbers) -> Any:
        pooled = None if self.pooled is None else torch.cat([self.unwanted, self.pooled])
        with torch.no_grad():
            null, cond = self(torch.cat([x] * 2), t, torch.stack([self.nothing, text]), pooled).chunk(2)
        return rescaled(null + numbers.guidance * (cond - null), cond, numbers.rescale)

    def bind(self, x: Any, t: Any, token: Any, phrase: Any, size: float) -> tuple[Any, Any, list[float]]:
        """Three steps of a token alone towards what its phrase predicts -> (token, that prediction, losses)"""
        with torch.no_grad():
            wanted = self(x, t, phrase[None])
        losses = []
        for _ in range(3):
            token = token.clone().requires_grad_()
            loss = ((wanted - self(x, t, token[None, None])) ** 2).mean()
            losses.append(float(loss.detach()))
            token = (token - size * torch.autograd.grad(loss, token)[0]).detach()
        return token, wanted, losses


def rescaled(noise: Any, cond: Any, share: float) -> Any:
    """Of one image: guidance brought part of the way back to the conditional prediction's spread (2305.08891, 3.4)."""
    return share * noise * (cond.std() / noise.std()) + (1 - share) * noise


def attended(maps: Any, anchors: Any, n: int) -> list[Any]:
    """Of maps [N, T], for each anchor: softmax over the words at temperature 0.5, from 0 to 1, and of sum 1."""
    b = torch.exp(maps[:, 1 : n + 1] / 0.5)
    b = b / b.sum(1, keepdim=True)
    found = []
    for a in anchors:
        column = b[:, a - 1]
        column = (column - column.min()) / (column.max() - column.min())
        found.append(column / column.sum())
    return found


def entropy(maps: Any, anchors: Any, n: int) -> Any:
    return sum(-2 * (p * torch.log(p + 1e-5)).sum() for p in attended(maps, anchors, n))


def released_layout(maps: Any, anchors: Any, n: int) -> Any:
    """Square maps: two things at (10, 16) and (25, 16), where a side's first pixel is at 0 and its last at 32."""
    total = 0.0
    for p, (x, y) in zip(attended(maps, anchors, n), ((10.0, 16.0), (25.0, 16.0)), strict=True):
        side = math.isqrt(len(p))
        places = torch.tensor([32 * i / (side - 1) for i in range(side)], dtype=p.dtype)
        picture = p.reshape(side, side)
        across, down = (picture.sum(0) * places).sum(), (picture.sum(1) * places).sum()
        total = total + 0.2 * ((across - x) ** 2 + (down - y) ** 2) / 2
    return total


def released(pipe: Any, things: Things, numbers: Numbers, layers: tuple[str, ...], seed: int = 0) -> Any:
    """ToMe's published steps -> (latents, focus losses per step, mean bind losses per step)"""
    model = Model(pipe, things, numbers.steps, layers, seed)
    text, n, z = model.text.clone(), model.count(things.text), model.z
    anchors = [nouns[0] for nouns, _ in things.subjects]
    for nouns, modifiers in things.subjects:
        merged = 1.1 * text[list(nouns)].sum(0) + 1.2 * text[list(modifiers)].sum(0)
        text[list(nouns + modifiers)] = 0
        text[nouns[0]] = merged
    own = [z.clone() for _ in anchors]
    clocks = [copy.deepcopy(model.scheduler) for _ in anchors]
    focus_losses, bind_losses = [], []
    for i, t in enumerate(model.scheduler.timesteps):
        x = model.scheduler.scale_model_input(z, t)
        if i == numbers.replace:
            text[n + 1 :] = model.simplified[n + 1 :]
        if i < numbers.bind:
            bind_losses.append([])
            for k, a in enumerate(anchors):
                own[k] = clocks[k].scale_model_input(own[k], t)
                text[a], wanted, losses = model.bind(own[k], t, text[a], model.phrases[k], numbers.bind_step_size)
                bind_losses[-1].append(losses)
                with torch.no_grad():
                    null = model(own[k], t, model.nothing[None])
                away = rescaled(null + numbers.guidance * (null - wanted), wanted, numbers.rescale)
                own[k] = clocks[k].step(away, t, own[k]).prev_sample
        if i < numbers.focus:
            focus_losses.append([])
            eta = numbers.step_size * (1 - i / (numbers.steps - 1))
            for _ in range(numbers.iterations):
                x, text = x.detach().requires_grad_(), text.detach().requires_grad_()
                model(x, t, text[None])
                loss = entropy(model.maps(), anchors, n)
                if numbers.layout:
                    loss = loss + released_layout(model.maps(), anchors, n)
                by_x, by_text = torch.autograd.grad(loss, (x, text))
                x, text = (x - 0.5 * eta * by_x).detach(), (text - eta * by_text).detach()
                focus_losses[-1].append(float(loss.detach()))
                if numbers.thresholds and loss < numbers.thresholds[i] / 2 * len(anchors) - 2:
                    break
        z = model.scheduler.step(model.guided(x, t, text, numbers), t, z).prev_sample
    return z, focus_losses, [mean_over_things(each) for each in bind_losses]


def paper(pipe: Any, things: Things, numbers: Numbers, layers: tuple[str, ...], seed: int = 0) -> Any:
    """The method as published, all iterations used -> the same"""
    model = Model(pipe, things, numbers.steps, layers, seed)
    text, z = model.text.clone(), model.z
    gone = [i for nouns, modifiers in things.subjects for i in (*nouns, *modifiers) if i != nouns[0]]
    for nouns, modifiers in things.subjects:
        text[nouns[0]] = text[list(nouns + modifiers)].sum(0)
    text = torch.stack([text[i] for i in range(len(text)) if i not in gone] + [text[-1]] * len(gone))
    anchors = [nouns[0] - sum(i < nouns[0] for i in gone) for nouns, _ in things.subjects]
    n, m = model.count(things.text) - len(gone), model.count(things.simplified)
    focus_losses, bind_losses = [], []
    for i, t in enumerate(model.scheduler.timesteps):
        seen = x = model.scheduler.scale_model_input(z, t)
        if i == numbers.replace:
            for row in range(n + 1, len(text)):
                text[row] = model.simplified[min(row - n + m, len(text) - 1)]
        if i < numbers.bind:
            bind_losses.append([])
            for k, a in enumerate(anchors):
                text[a], _, losses = model.bind(x, t, text[a], model.phrases[k], numbers.bind_step_size)
                bind_losses[-1].append(losses)
        if i < numbers.focus:
            focus_losses.append([])
            eta = numbers.step_size * (1 - i / (numbers.steps - 1))
            for _ in range(numbers.iterations):
                at, leaf = x.clone().requires_grad_(), text.clone().requires_grad_()
                model(at, t, leaf[None])
                loss = entropy(model.maps(), anchors, n)
                by_x, by_text = torch.autograd.grad(loss, (at, leaf))
                x = x - 0.5 * eta * by_x
                for a in anchors:
                    text[a] -= eta * by_text[a]
                focus_losses[-1].append(float(loss.detach()))
        scale = seen.norm() / z.norm()
        start = z + (x - seen) / scale
        z = model.scheduler.step(model.guided(x, t, text, numbers), t, start).prev_sample
    return z, focus_losses, [mean_over_things(each) for each in bind_losses]


def mean_over_things(losses: list[list[float]]) -> list[float]:
    return [sum(each) / len(losses) for each in zip(*losses, strict=True)]


SAMPLE = {"paper": paper, "reference": released}
