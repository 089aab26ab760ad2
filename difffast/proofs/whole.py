"""The last check of what was proved: a whole UNet is called with it and without it, and has to be faster with it.

A key's time is that of its calls alone.  Between the layers of a UNet the host may be what everything waits for, and a
kernel that takes longer to launch than PyTorch's is then slower, whatever it saves on the device.  So, one operator
after another, what was chosen has to pay in the whole UNet as well; PyTorch's own way runs where it does not.

The UNet is one of the user's configuration and without the user's weights: these need not fit twice on the device.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.context import use_context
from ..ops import _local
from ..ops._keys import Key
from ..surgery.subclass import plain_class
from .collect import make_call, make_context, make_dry, patch_dry

#: Entries of a table, by key and mode.
Entries = Mapping[str, Mapping[str, Any]]

#: Bytes that all weights share, more than a device caches.
_SHARED = 1 << 28
#: Fewest rounds of a comparison, and seconds after which there are no more.
_ROUNDS, _SECONDS = 5, 0.6
#: Seconds of the calls of a round: the host may be far ahead of the device, and has to be waited for.
_ROUND = 0.05


def describe_unet(dry: nn.Module, batch: int) -> dict[str, Any]:
    """Return, as what JSON can hold, all that the time of a UNet depends on.

    Args:
        dry: from :func:`.collect.make_dry`.
        batch: rows of a call, guidance included.
    """
    config = {name: value for name, value in dry.config.items() if not name.startswith("_")}
    dtype = str(next(dry.parameters()).dtype).removeprefix("torch.")
    what = {"class": plain_class(dry).__name__, "config": config, "dtype": dtype, "batch": batch}
    return json.loads(json.dumps(what, sort_keys=True, default=str))


def name_unet(what: Mapping[str, Any]) -> str:
    """Return a short name of what :func:`describe_unet` has described."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]


def was_checked(what: Mapping[str, Any], entries: Entries) -> bool:
    """Return whether what is chosen in these entries has been checked in a UNet already."""
    name = name_unet(what)
    return any(name in entry.get("whole", {}) for entry in entries.values())


class WholeUnet:
    """A UNet of a configuration, patched, whose operators choose by tables that are given.

    Args:
        what: from :func:`describe_unet`.
        device: where it runs.
    """

    def __init__(self, what: Mapping[str, Any], device: torch.device) -> None:
        import diffusers

        with torch.device("meta"):
            stock = getattr(diffusers, what["class"]).from_config(what["config"])
        dry = make_dry(stock, getattr(torch, what["dtype"]), device)
        call = make_call(dry, what["batch"])
        self._unet = materialize(dry, device)
        patch_dry(self._unet)
        self._call = {name: _fill(each, device) for name, each in call.items()}
        self._context = make_context(self._call)
        self._device = device
        self._table = _local.table_of(device)

    def find_keys(self) -> set[Key]:
        """Return the keys that a call asks for."""
        asked: set[Key] = set()
        _local.watch = lambda _device, key: asked.add(key)
        try:
            self.run()
        finally:
            _local.watch = None
        return asked

    def run(self, count: int = 1) -> float:
        """Call the UNet; return the seconds of a call."""
        start = time.perf_counter()
        with torch.no_grad(), use_context(self._context):
            for _ in range(count):
                self._unet(**self._call, return_dict=False)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return (time.perf_counter() - start) / count

    def compare(self, some: Entries, others: Entries) -> float:
        """Return the median over rounds of what a call takes with ``some``, as a multiple of that with ``others``."""
        quotients: list[float] = []
        begin = time.monotonic()
        while len(quotients) < _ROUNDS or time.monotonic() - begin < _SECONDS:
            seconds = [0.0, 0.0]
            for which in (0, 1) if len(quotients) % 2 else (1, 0):
                self._table.proofs = {text: dict(entry) for text, entry in (some, others)[which].items()}
                _local.change()
                once = self.run()  # answers are remembered anew, and kernels may be compiled
                seconds[which] = self.run(max(1, round(_ROUND / max(once, 1e-6))))
            quotients.append(seconds[0] / seconds[1])
        return statistics.median(quotients)


def check_whole(what: Mapping[str, Any], entries: Entries, device: torch.device) -> dict[str, Any]:
    """Check what was chosen for the keys of a UNet's eager call.

    Args:
        what: from :func:`describe_unet`.
        entries: by key and mode; those of other modes or calls are left as they are.
        device: where.

    Returns:
        "quotient": the time with what is chosen now, as a multiple of that with PyTorch's operators, None where these
        are chosen everywhere.  "lost": the same of each operator that does not pay.  "entries": those that were
        checked, as they are now.
    """
    unet = WholeUnet(what, device)
    texts = {key.text("eager") for key in unet.find_keys()}
    checked = {text: entry for text, entry in entries.items() if text in texts}
    lost, quotient = find_losers(checked, unet.compare)
    reasons = {name: f"the whole UNet takes {each:.3f} times as long with it" for name, each in lost.items()}
    settled = {**checked, **refuse(checked, reasons)}
    mark = {name_unet(what): quotient}
    marked = {text: {**entry, "whole": {**entry.get("whole", {}), **mark}} for text, entry in settled.items()}
    return {"quotient": quotient, "lost": lost, "entries": marked}


def find_losers(
    entries: Entries, compare: Callable[[Entries, Entries], float]
) -> tuple[dict[str, float], float | None]:
    """Return the operators whose choices do not pay, each with the quotient that says so, and the quotient of the rest.

    Args:
        entries: of one mode.
        compare: returns the time with the first entries, as a multiple of that with the second.
    """
    chosen = sorted({text.partition(" ")[0] for text, each in entries.items() if each["choice"] != each["default"]})
    lost: dict[str, float] = {}
    for operator in chosen:
        with_it = without(entries, lost)
        quotient = compare(with_it, without(with_it, [operator]))
        if quotient >= 1:
            lost[operator] = quotient
    left = [operator for operator in chosen if operator not in lost]
    if not left:
        return lost, None
    quotient = compare(without(entries, lost), without(entries, chosen))
    return (lost, quotient) if quotient < 1 else ({**lost, **dict.fromkeys(left, quotient)}, None)


def without(entries: Entries, operators: Sequence[str] | Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Return entries in which PyTorch's own way is chosen for some operators."""
    return {
        text: {**entry, "choice": entry["default"]} if text.partition(" ")[0] in operators else dict(entry)
        for text, entry in entries.items()
    }


def refuse(entries: Entries, reasons: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return those entries of operators with a reason that chose something else than PyTorch's own way, changed."""
    return {
        text: {
            **entry,
            "choice": entry["default"],
            "refused": {**entry.get("refused", {}), entry["choice"]: reasons[text.partition(" ")[0]]},
        }
        for text, entry in entries.items()
        if text.partition(" ")[0] in reasons and entry["choice"] != entry["default"]
    }


def materialize(dry: nn.Module, device: torch.device) -> nn.Module:
    """Give a dry UNet memory: all weights are pieces of one buffer, each in the layout that it has."""
    tensors = {name: each for name, each in [*dry.named_parameters(), *dry.named_buffers()] if each.is_floating_point()}
    like = next(iter(tensors.values()))
    whole = sum(each.numel() for each in tensors.values())
    largest = max(each.numel() for each in tensors.values())
    shared = max(largest, min(whole, _SHARED // like.element_size()))
    buffer = torch.empty(shared, dtype=like.dtype, device=device).normal_(0, 0.02)
    at = 0
    for name, each in tensors.items():
        at = at if at + each.numel() <= shared else 0
        path, _, leaf = name.rpartition(".")
        owner = dry.get_submodule(path)
        piece = torch.as_strided(buffer, each.shape, each.stride(), at)
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(piece, requires_grad=False)
        else:
            owner._buffers[leaf] = piece
        at += each.numel()
    return dry


def _fill(value: Any, device: torch.device) -> Any:
    """Return an argument of a call with numbers in it."""
    if isinstance(value, dict):
        return {name: _fill(each, device) for name, each in value.items()}
    if not isinstance(value, Tensor):
        return value
    made = torch.empty_like(value, device=device)
    return made.normal_() if made.is_floating_point() else made.zero_()
