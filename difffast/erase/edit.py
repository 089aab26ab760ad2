"""``difffast.erase``: concepts out of a pipeline in seconds, and exactly back in."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .closed_form import METHODS, LowRankMap, Rece, Uce
from .saving import save_unet, write_tensors
from .text import check_pipeline, choose_rows, list_prompts

_REMOVABLE = "difffast: whoever loads a LoRA can leave it out: use fuse() and save() for weights that are released"


def erase(
    pipe: Any,
    concepts: str | Sequence[str],
    *,
    method: str | Uce = "uce",
    guide: str | Sequence[str] = "",
    preserve: str | Sequence[str] = (),
) -> Erasure:
    """Erase concepts from a pipeline's UNet by a closed form, in seconds and without pictures.

    The weights are edited in place at once; :meth:`Erasure.disable` gives the stock ones back, bit for bit.  Works for
    Stable Diffusion 1, 2 and XL, and for what else reads the encoded prompt through ``attn2.to_k`` and ``attn2.to_v``.

    Args:
        pipe: the pipeline, stock or patched.
        concepts: prompts to erase.
        method: "uce" or "rece", or :class:`~difffast.erase.closed_form.Uce` or
            :class:`~difffast.erase.closed_form.Rece` with other numbers.
        guide: what is drawn instead: one prompt for all concepts, or one for each; "" for nothing in particular.
        preserve: prompts to leave as they are.

    Raises:
        ValueError: no concept, a guide too many or too few, an unknown method, a pipeline without a UNet and a text
            encoder, weights that cannot be edited (offloaded, quantised, under a LoRA).
        TypeError: prompts that are no texts.
    """
    check_pipeline(pipe)
    if isinstance(method, str) and method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    numbers = METHODS[method] if isinstance(method, str) else method
    erased = list_prompts(concepts, "concepts")
    kept = list_prompts(preserve, "preserve", least=0)
    guides = list_prompts(guide, "guide")
    guides = guides * len(erased) if len(guides) == 1 else guides
    if len(guides) != len(erased):
        raise ValueError(f"guide must be one text, or one for each of {len(erased)} concepts, got {len(guides)}")
    layers = find_text_layers(pipe.unet)
    c_e, c_g = (choose_rows(pipe, texts, numbers.tokens) for texts in (erased, guides))
    c_p = choose_rows(pipe, kept, numbers.tokens) if kept else c_e[:0]
    _check_width(layers, c_e.shape[1])
    c_e, c_g, c_p = (rows.to(_exact_device(rows), torch.float64) for rows in (c_e, c_g, c_p))
    if isinstance(numbers, Rece):
        null = choose_rows(pipe, [""] * len(erased), numbers.tokens).to(c_e)
        found = numbers.find_map_again(_gram(layers, c_e), c_e, c_g, c_p, null)
    else:
        found = numbers.find_map(c_e, c_g, c_p)
    edit = Erasure(pipe.unet, layers, found, tuple(erased))
    edit.enable()
    return edit


class Erasure:
    """Concepts erased from a UNet by one map of prompt embeddings.

    Attributes:
        concepts: the prompts that were erased.
        map: M, by which the weight of every layer of ``layers`` is multiplied.
        layers: the layers' names.
        enabled: whether the weights are the edited ones.
    """

    def __init__(
        self, unet: nn.Module, layers: Mapping[str, nn.Linear], found: LowRankMap, concepts: tuple[str, ...]
    ) -> None:
        self.concepts, self.map, self.layers = concepts, found, tuple(layers)
        self._unet, self._modules = unet, dict(layers)
        self._stock: dict[str, Tensor] = {}
        self._fused = False

    @property
    def enabled(self) -> bool:
        return self._fused or bool(self._stock)

    @torch.no_grad()
    def enable(self) -> None:
        """Put the edited weights in; nothing happens if they are."""
        if self.enabled:
            return
        self._stock = {name: layer.weight.detach().clone() for name, layer in self._modules.items()}
        try:
            for name, layer in self._modules.items():
                layer.weight.copy_(self._edited(name))
        except BaseException:
            self._put_back()
            raise

    @torch.no_grad()
    def disable(self) -> None:
        """Put the stock weights back, bit for bit; nothing happens if they are.

        Raises:
            ValueError: the edit was fused, or somebody else changed the weights since, which would be lost.
        """
        if self._fused:
            raise ValueError("this edit was fused for good: load the pipeline again for the stock weights")
        for name, layer in self._modules.items() if self._stock else ():
            if not torch.equal(layer.weight, self._edited(name).to(layer.weight)):
                raise ValueError(
                    f"the weight of {name} was changed after it was edited: take that change back first, or load the "
                    f"pipeline again"
                )
        self._put_back()

    def fuse(self) -> None:
        """Make the edit permanent: the stock weights are forgotten."""
        self.enable()
        self._stock.clear()
        self._fused = True

    def save_lora(self, path: str | Path) -> None:
        """Write the edit as a LoRA that ``pipe.load_lora_weights`` loads, and warn that it can be left out.

        Its rank is that of the map, its scale 1: on the stock weights it is exactly the edit.

        Raises:
            ValueError: the edit was fused, so that the stock weights it starts from are no longer known, or changes
                nothing, for a LoRA has at least rank 1.
            OSError: the file cannot be written.
        """
        if self._fused:
            raise ValueError("this edit was fused, and a LoRA is of the stock weights: save_lora() before fuse()")
        if not self.map.rank:
            raise ValueError("a LoRA must have at least rank 1, got an edit of rank 0, which changes nothing")
        tensors = {}
        for name, layer in self._modules.items():
            stock = self._stock.get(name, layer.weight).detach()
            dtype = torch.promote_types(stock.dtype, torch.float32)
            tensors[f"unet.{name}.lora_A.weight"] = self.map.right.to(dtype)
            tensors[f"unet.{name}.lora_B.weight"] = (stock.to(self.map.left) @ self.map.left).to(dtype)
        write_tensors(tensors, path)
        warnings.warn(_REMOVABLE, stacklevel=2)

    def save(self, folder: str | Path) -> None:
        """Write the whole UNet with the edit, for ``UNet2DConditionModel.from_pretrained``.

        Raises:
            ValueError: the edit is disabled, or the folder holds weights in another form.
            OSError: a file cannot be written.
        """
        if not self.enabled:
            raise ValueError("the edit is disabled, so that the stock weights would be saved: enable() it first")
        save_unet(self._unet, folder)

    def _edited(self, name: str) -> Tensor:
        return self.map.multiply(self._stock[name])

    @torch.no_grad()
    def _put_back(self) -> None:
        for name, stock in self._stock.items():
            self._modules[name].weight.copy_(stock)
        self._stock = {}

    def __str__(self) -> str:
        state = "fused" if self._fused else "enabled" if self.enabled else "disabled"
        return (
            f"erased: {', '.join(map(repr, self.concepts))}; {state}\n"
            f"{len(self.layers)} layers times one map of rank {self.map.rank} ({len(self.map.left)} x "
            f"{len(self.map.left)})"
        )


def find_text_layers(unet: nn.Module) -> dict[str, nn.Linear]:
    """Find the layers that make keys and values of the encoded prompt, by name.

    Raises:
        ValueError: there is none, or the weight of one cannot be edited.
    """
    found = {}
    for name, module in unet.named_modules():
        if not name.endswith((".attn2.to_k", ".attn2.to_v")):
            continue
        weight = getattr(module, "weight", None)
        if not isinstance(module, nn.Linear) or not weight.is_floating_point():
            raise ValueError(
                f"{name} is a {type(module).__name__}: unload or fuse adapters, and load the pipeline unquantised, "
                f"before concepts are erased"
            )
        if weight.is_meta:
            raise ValueError(f"the weight of {name} is offloaded: erase concepts before offloading is enabled")
        found[name] = module
    if not found:
        raise ValueError(f"{type(unet).__name__} has no layer named attn2.to_k or attn2.to_v: there is no text to edit")
    return found


def _check_width(layers: Mapping[str, nn.Linear], width: int) -> None:
    for name, layer in layers.items():
        if layer.in_features != width:
            raise ValueError(
                f"{name} takes embeddings of width {layer.in_features}, the text encoder makes {width}: this UNet "
                f"projects the prompt first, and one map cannot serve all its layers"
            )


def _exact_device(tensor: Tensor) -> torch.device:
    """Return where float64 can be computed: on the tensor's device, but for Apple's GPUs."""
    return torch.device("cpu") if tensor.device.type == "mps" else tensor.device


def _gram(layers: Mapping[str, nn.Linear], like: Tensor) -> Tensor:
    """Return G = sum W^T W over the layers, [d, d]."""
    wide = (layer.weight.detach().to(like) for layer in layers.values())
    return sum((w.T @ w for w in wide), start=torch.zeros(like.shape[1], like.shape[1]).to(like))
