"""difffast.prove: find out on this device which kernels are right and the fastest, and remember it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..ops import _local
from ..ops._keys import Key
from . import store
from .report import ProofReport

if TYPE_CHECKING:
    from ..support import Pipeline
    from .parent import Child, Planted

#: Kinds of devices where a whole UNet is called at the end.  On a CPU a UNet's time is the sum of its calls' times.
CHECKED = ("cuda",)
#: Is told after each key how many of how many are done.
Progress = Callable[[int, int], object]


def prove(
    pipe: Pipeline | None = None,
    *,
    model: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    batch: int = 1,
    seconds: float = 20.0,
    refresh: bool = False,
    progress: Progress | None = None,
) -> ProofReport:
    """Prove, on this device, which backend of each operator is right for a UNet's shapes, and choose the fastest.

    The candidates run in a process of their own: whatever they do, this one lives.  What is chosen is remembered in the
    user's cache folder, for this device, driver and versions, and holds at once.  What the time does not suffice for
    stays PyTorch's, and is proved at the next call.  On a GPU the whole UNet is called at the end, with weights of its
    own: an operator whose kernels do not make eager calls of it faster is PyTorch's in these.

    Args:
        pipe: a pipeline, whose UNet, device and dtype count.  Its VAE's decoder, and calls whose maps are collected or
            that are differentiated, are proved last.
        model: instead, the name of a published UNet: "sd15", "sdxl", "if-i-xl" and so on.
        device: None means the pipeline's; without one, cuda where there is one, else cpu.
        dtype: None means the pipeline's; without one, float16 on cuda, else float32.
        batch: images at once; guidance doubles it.
        seconds: how long it may take.
        refresh: prove anew what is known.
        progress: is told after each key how many of how many are done.

    Returns:
        A report, which prints as text.

    Raises:
        ValueError: neither or both of ``pipe`` and ``model`` are given; no UNet of this name or kind; values out of
            range; a device that has no proofs.
        TypeError: ``pipe`` has no UNet.
    """
    if (pipe is None) == (model is None):
        raise ValueError(f"either pipe or model must be given, got pipe={type(pipe).__name__} and model={model!r}")
    if type(batch) is not int or batch < 1:
        raise ValueError(f"batch must be an int of at least 1, got {batch!r}")
    if not 0 < seconds < float("inf"):
        raise ValueError(f"seconds must be positive and finite, got {seconds}")
    from .candidates import find_candidates  # not before they are needed: everybody imports this file
    from .collect import collect, collect_decoder, collect_other_uses, make_call, make_dry
    from .whole import describe_unet

    unet = model if pipe is None else find_unet(pipe)
    device = complete_device(device or find_device(unet))
    if dtype is None:
        half = torch.float16 if device.type == "cuda" else torch.float32
        dtype = half if isinstance(unet, str) else unet.dtype
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"dtype must be float16, bfloat16 or float32, got {dtype}")
    child = _begin(device) if refresh or not _local.table_of(device).proofs else None
    try:
        dry = make_dry(unet, dtype, device)
        keys = collect(dry, 2 * batch, device)
        if pipe is not None:
            latents = (batch, *make_call(dry, batch)["sample"].shape[1:])
            of_decoder = collect_decoder(getattr(pipe, "vae", None), dtype, device, latents)
            keys += [*of_decoder, *collect_other_uses(keys, device)]
    except BaseException:
        if child is not None:
            child.kill()
        raise
    keys = [key for key in keys if len(find_candidates(key, device)) > 1]  # else there is nothing to choose
    whole = describe_unet(dry, 2 * batch) if device.type in CHECKED else None
    return prove_keys(keys, device, seconds, refresh=refresh, progress=progress, child=child, whole=whole)


def _begin(device: torch.device) -> Child | None:
    """Begin to start the process that proves, while this one collects keys; whoever needs one notes if it cannot."""
    from .parent import Child, NoChildError

    try:
        return Child(device, ())
    except NoChildError:
        return None


def find_unet(pipe: Any) -> Any:
    """Return a pipeline's UNet, not its compiled wrapper.

    Raises:
        TypeError: it has none.
    """
    unet = getattr(pipe, "unet", None)
    if unet is None:
        raise TypeError(f"pipe must be a pipeline with a UNet, got {type(pipe).__name__}")
    return getattr(unet, "_orig_mod", unet)


def find_device(unet: Any) -> torch.device:
    """Return where a UNet is; of a name, the best device that there is."""
    if not isinstance(unet, str):
        return unet.device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def complete_device(device: str | torch.device) -> torch.device:
    """Return a device with its index, if it has one.

    Raises:
        ValueError: there are no proofs for this kind.
    """
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"proofs are made on cpu and cuda, got {device}")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def prove_keys(
    keys: Sequence[Key],
    device: torch.device,
    seconds: float,
    *,
    refresh: bool = False,
    progress: Progress | None = None,
    planted: Planted | None = None,
    child: Child | None = None,
    whole: Mapping[str, Any] | None = None,
) -> ProofReport:
    """Do what :func:`prove` does, for keys in the order in which they shall be proved.

    Args:
        planted: what tests add.
        child: a process that has begun to start, if there is one.
        whole: a UNet (:func:`.whole.describe_unet`) that shall be faster with what is chosen for its eager calls.
    """
    from . import parent

    start = time.monotonic()
    table = _local.table_of(device)
    modes = _local.MODES if device.type == "cuda" else _local.MODES[:1]
    known = [key for key in keys if not refresh and all(key.text(mode) in table.proofs for mode in modes)]
    new = [key for key in keys if key not in set(known)]
    notes: list[str] = []
    done = 0

    def keep(key: Key, entries: dict[str, Any]) -> None:
        nonlocal done
        done += 1
        note = store.merge(device, {key.text(mode): entry for mode, entry in entries.items()})
        if note is not None and note not in notes:
            notes.append(note)
        if progress is not None:
            progress(done, len(new))

    outcome = parent.Outcome()
    request = _prepare_whole(whole, keys, device, anew=bool(new))
    if new or child is not None or request is not None:
        outcome = parent.Proving(device, seconds, keep, planted or parent.Planted(), child).run(new, request)
        if outcome.whole.get("entries"):
            store.merge(device, outcome.whole["entries"])
    table = _local.table_of(device)
    texts = (key.text(mode) for key in keys for mode in modes)
    return ProofReport(
        device=_local.name_device(device),
        path=table.path,
        facts=_local.find_facts(device),
        proofs={text: table.proofs[text] for text in texts if text in table.proofs},
        proved=done,
        known=len(known),
        left=tuple(key.text() for key in outcome.left),
        notes=tuple(dict.fromkeys((*notes, *outcome.notes))),
        seconds=time.monotonic() - start,
        whole=outcome.whole.get("quotient"),
    )


def _prepare_whole(
    whole: Mapping[str, Any] | None, keys: Sequence[Key], device: torch.device, *, anew: bool
) -> Callable[[], dict[str, Any]] | None:
    """Return what makes the request that has a whole UNet checked, or None where it was, or shall not be.

    Args:
        whole: from :func:`.whole.describe_unet`, or None.
        keys: whose entries are checked, as they are when the request is made.
        device: where.
        anew: whether it is checked even if it was.
    """
    from .whole import was_checked

    def request() -> dict[str, Any]:
        proofs = _local.table_of(device).proofs
        return {
            "whole": whole,
            "entries": {text: proofs[text] for text in (key.text("eager") for key in keys) if text in proofs},
        }

    return None if whole is None or (not anew and was_checked(whole, request()["entries"])) else request
