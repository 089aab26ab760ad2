"""Which parameters are trained, by name, and other values that they hold for a while."""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn


def _is_time_or_output(name: str) -> bool:
    return name.startswith(("time_embedding.", "conv_out."))


#: Name of a set -> whether a parameter of that name is in it.  The names are the papers'.
PARAMETER_SETS: dict[str, Callable[[str], bool]] = {
    "full": lambda name: True,
    "selfattn": lambda name: ".attn1." in name,
    "xattn": lambda name: ".attn2." in name,
    "xattn-strict": lambda name: ".attn2.to_k." in name or ".attn2.to_v." in name,
    "noxattn": lambda name: ".attn2." not in name and not _is_time_or_output(name),
    "notime": lambda name: not _is_time_or_output(name),
}


def select_parameters(unet: nn.Module, params: str | Sequence[str]) -> dict[str, nn.Parameter]:
    """Choose parameters by name.

    Args:
        unet: the model.
        params: a key of :data:`PARAMETER_SETS`, or one or more shell-style patterns of parameters' names.

    Raises:
        ValueError: no parameter matches a pattern, or is in the set.
    """
    named = dict(unet.named_parameters())
    if isinstance(params, str) and params in PARAMETER_SETS:
        chosen = {name for name in named if PARAMETER_SETS[params](name)}
        if not chosen:
            raise ValueError(f"{type(unet).__name__} has no parameter in the set {params!r}")
    else:
        chosen = set()
        for pattern in [params] if isinstance(params, str) else params:
            matching = fnmatch.filter(named, pattern)
            if not matching:
                raise ValueError(
                    f"no parameter of {type(unet).__name__} matches {pattern!r}; sets: {', '.join(PARAMETER_SETS)}; "
                    f"a parameter is called, for example, {next(reversed(named))!r}"
                )
            chosen.update(matching)
        if not chosen:
            raise ValueError("params must name at least one set or pattern, got none")
    return {name: parameter for name, parameter in named.items() if name in chosen}


def check_trainable(parameters: Mapping[str, Tensor]) -> None:
    """Refuse weights whose gradients or updates would be lost.

    Raises:
        ValueError: a parameter of another type than float32, float64 and bfloat16.
    """
    for name, parameter in parameters.items():
        if parameter.dtype not in (torch.float32, torch.float64, torch.bfloat16):
            kind = str(parameter.dtype).removeprefix("torch.")
            raise ValueError(
                f"{kind} weights cannot be trained, and {name} is of them: pipe.to(torch.float32), or lora_rank=8"
            )


def fingerprint(parameters: Mapping[str, Tensor]) -> str:
    """Return what tells one model's weights from another's: of each its name, type and shape, and all its values.

    Values are added up as integers, which every device does alike, and the first ones are also told by their order.
    Of weights that are offloaded to the meta device the values are not known.
    """
    found = hashlib.sha256()
    for name, value in parameters.items():
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        if not value.is_meta:
            data = value.detach().flatten().view(torch.uint8)
            data = data.clone() if data.storage_offset() % 8 else data  # which int64 cannot begin at
            whole = data.numel() // 8 * 8
            total = int(data[:whole].view(torch.int64).sum())
            found.update(f"{total} {data[whole:].tolist()} {data[:256].tolist()}".encode())
    return found.hexdigest()[:16]


class Weights:
    """Parameters that are trained, in their order, and a way to let them hold other values.

    Args:
        parameters: by name.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.names, self.parameters = tuple(parameters), tuple(parameters.values())

    def copy(self) -> list[Tensor]:
        """Return a copy of the values."""
        return [parameter.detach().clone() for parameter in self.parameters]

    def make_adamw(self, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
        """Return an AdamW of these parameters that goes once over memory for each of them."""
        return torch.optim.AdamW(self.parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)

    @torch.no_grad()
    def load(self, values: Sequence[Tensor]) -> None:
        """Copy values into the parameters."""
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    @contextlib.contextmanager
    def hold(self, values: Sequence[Tensor]) -> Iterator[None]:
        """Let the parameters hold ``values`` themselves inside the block: nothing is copied, updates go into them.

        A graph that was made outside the block must not be differentiated inside it, and the other way round.
        """
        own = [parameter.data for parameter in self.parameters]
        try:
            for parameter, value in zip(self.parameters, values, strict=True):
                parameter.data = value
            yield
        finally:
            for parameter, value in zip(self.parameters, own, strict=True):
                parameter.data = value

    @contextlib.contextmanager
    def training(self, unet: nn.Module) -> Iterator[None]:
        """Let these parameters, and no others of the UNet, want gradients inside the block."""
        wanted = [(parameter, parameter.requires_grad) for parameter in unet.parameters()]
        try:
            unet.requires_grad_(False)
            for parameter in self.parameters:
                parameter.requires_grad_(True)
            yield
        finally:
            for parameter, earlier in wanted:
                parameter.requires_grad_(earlier)
            for parameter in self.parameters:
                parameter.grad = None

    def gradients(self) -> list[Tensor]:
        """Take the gradients out; those that are missing are zeros."""
        taken = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        self.set_gradients([None] * len(taken))
        return taken

    def set_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        """Put gradients in."""
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
