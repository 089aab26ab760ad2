"""Semantic binding written out: a plain sampling loop, autograd, and full forward passes; nothing of difffast runs."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Things:
    """A prompt, as positions: the nouns and modifiers of each thing, its phrase, and the simplified prompt."""

    text: str
    subjects: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    phrases: tuple[str, ...]
    simplified: str


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


def merged(text: Any, subjects: Any, mode: str) -> tuple[Any, list[int], int]:
    """-> (embedding [T, D], anchors, rows taken out)"""
    u, w = (1.0, 1.0) if mode == "paper" else (1.1, 1.2)
    out, gone = text.clone(), []
    for nouns, modifiers in subjects:
        out[nouns[0]] = u * sum(text[i] for i in nouns) + w * sum(
            (text[i] for i in modifiers), torch.zeros_like(text[0])
        )
        gone += [i for i in (*nouns, *modifiers) if i != nouns[0]]
    if mode == "reference":
        for i in gone:
            out[i] = 0
        return out, [nouns[0] for nouns, _ in subjects], 0
    rows = [out[i] for i in range(len(out)) if i not in gone]
    anchors = [nouns[0] - sum(i < nouns[0] for i in gone) for nouns, _ in subjects]
    return torch.stack(rows + [out[-1]] * len(gone)), anchors, len(gone)


def entropy(maps: Any, anchors: Any, n: int) -> Any:
    """Of maps [N, T]."""
    b = torch.exp(maps[:, 1 : n + 1] / 0.5)
    b = b / b.sum(1, keepdim=True)
    total = 0.0
    for a in anchors:
        column = b[:, a - 1]
        column = (column - column.min()) / (column.max() - column.min())
        p = column / column.sum()
        total = total - 2 * (p * torch.log(p + 1e-5)).sum()
    return total


def sample(
    pipe: Any,
    things: Things,
    *,
    mode: str,
    steps: int,
    bind: int,
    focus: int,
    iterations: int,
    replace: int | None,
    step_size: float,
    bind_step_size: float,
    guidance: float = 7.5,
    layers: tuple[str, ...] = (),
    seed: int = 0,
) -> tuple[Any, list[list[float]], list[list[float]]]:
    """-> (latents, focus losses per step, mean bind losses per step)"""
    pipe = copy.deepcopy(pipe)
    pipe.unet.requires_grad_(False)
    processors = {}
    for name, module in pipe.unet.named_modules():
        if name in layers:
            processors[name] = module.processor = StoringProcessor()

    xl = hasattr(pipe, "text_encoder_2")

    def encode(text: str) -> Any:
        with torch.no_grad():
            if xl:
                return pipe.encode_prompt(text, device="cpu", do_classifier_free_guidance=False)[0][0]
            return pipe.encode_prompt(text, "cpu", 1, False)[0][0]

    def words(text: str) -> int:
        return len(pipe.tokenizer(text, add_special_tokens=False).input_ids)

    def unet(z: Any, t: Any, text: Any, pooled: Any = None) -> Any:
        extra = {}
        if xl:
            size = (4 * z.shape[2], 4 * z.shape[3])
            ids = torch.tensor([[*size, 0, 0, *size]], dtype=z.dtype)
            pooled = torch.zeros(len(z), 64, dtype=z.dtype) if pooled is None else pooled
            extra["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids.repeat(len(z), 1)}
        return pipe.unet(pipe.scheduler.scale_model_input(z, t), t, encoder_hidden_states=text, **extra).sample

    text, pooled = encode(things.text), None
    nothing = torch.zeros_like(text) if xl else encode("")  # SDXL's negative prompt, where there is none
    if xl:
        with torch.no_grad():
            pooled = pipe.encode_prompt(things.text, device="cpu", do_classifier_free_guidance=False)[2]
    phrases = [encode(phrase) for phrase in things.phrases]
    text, anchors, gone = merged(text, things.subjects, mode)
    n, m = words(things.text) - gone, words(things.simplified)
    simplified = encode(things.simplified)

    pipe.scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn((1, 4, 8, 8), generator=generator, dtype=text.dtype) * pipe.scheduler.init_noise_sigma
    own = [z.clone() for _ in phrases]
    own_schedulers = [copy.deepcopy(pipe.scheduler) for _ in phrases]
    focus_losses, bind_losses = [], []
    for i, t in enumerate(pipe.scheduler.timesteps):
        if i == replace:
            for row in range(n + 1, len(text)):
                source = row if mode == "reference" else min(row - n + m, len(text) - 1)
                text[row] = simplified[source]
        if i < bind:
            losses = []
            for k, phrase in enumerate(phrases):
                at = own[k] if mode == "reference" else z
                with torch.no_grad():
                    wanted = unet(at, t, phrase[None])
                s = text[anchors[k]].clone()
                for j in range(3):
                    s.requires_grad_()
                    loss = ((wanted - unet(at, t, s[None, None])) ** 2).mean()
                    losses += [(j, float(loss.detach()))]
                    s = (s - bind_step_size * torch.autograd.grad(loss, s)[0]).detach()
                text[anchors[k]] = s
                if mode == "reference":
                    with torch.no_grad():
                        null = unet(at, t, nothing[None])
                    noise = null + guidance * (null - wanted)
                    own[k] = own_schedulers[k].step(noise, t, at).prev_sample
            bind_losses.append([sum(v for j, v in losses if j == c) / len(phrases) for c in range(3)])
        moved = z.clone()
        if i < focus:
            focus_losses.append([])
            eta = step_size * (1 - i / (steps - 1))
            for _ in range(iterations):
                leaf, at = text.clone().requires_grad_(), moved.clone().requires_grad_()
                unet(at, t, leaf[None], pooled)
                maps = torch.stack([p.kept[0] for p in processors.values()]).mean((0, 1))
                loss = entropy(maps, anchors, n)
                focus_losses[-1].append(float(loss.detach()))
                by_text, by_z = torch.autograd.grad(loss, (leaf, at))
                if mode == "reference":
                    text = text - eta * by_text
                else:
                    for a in anchors:
                        text[a] -= eta * by_text[a]
                moved = moved - 0.5 * eta * by_z
        with torch.no_grad():
            both = None if pooled is None else torch.cat([torch.zeros_like(pooled), pooled])
            null, cond = unet(torch.cat([moved] * 2), t, torch.stack([nothing, text]), both).chunk(2)
            noise = null + guidance * (cond - null)
            z = pipe.scheduler.step(noise, t, moved if mode == "paper" else z).prev_sample
    return z, focus_losses, bind_losses
