"""Measurements of :func:`difffast.tune`, kept in a file so that an interrupted or a later call goes on from them."""

from __future__ import annotations

import hashlib
import json
import math
import os
import reprlib
import sys
import warnings
from collections.abc import ItemsView, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..files import check_writable, lock_file, write_whole

#: What is kept beside seconds of everything but stock.
_ERRORS = ("psnr_db", "latent_error")


def identify(pipe: Any, steps: int, call: Mapping[str, Any]) -> str:
    """Return what a measurement holds for: weights, scheduler, steps, further arguments of the call, and device.

    Of the weights, names, shapes and some numbers of each count.
    """
    digest = hashlib.sha256()
    for name, weight in pipe.unet.state_dict().items():
        some = weight.flatten()[:: max(1, weight.numel() // 16)].float().cpu()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype} {some.tolist()}".encode())
    scheduler = {name: str(value) for name, value in pipe.scheduler.config.items()}
    device = pipe.device.type
    machine = torch.cuda.get_device_name(pipe.device) if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    facts = [type(pipe.scheduler).__name__, scheduler, steps, machine, _describe(call)]
    digest.update(json.dumps(facts, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _describe(value: Any) -> str:
    """Return what tells an argument of a call from others: of tensors and pictures all that is in them."""
    if isinstance(value, torch.Tensor):
        content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return f"{tuple(value.shape)} {value.dtype} {hashlib.sha256(content).hexdigest()}"
    if hasattr(value, "tobytes"):  # PIL's, NumPy's
        return f"{getattr(value, 'mode', '')} {value.size} {hashlib.sha256(value.tobytes()).hexdigest()}"
    if isinstance(value, (list, tuple)):
        return str([_describe(each) for each in value])
    if isinstance(value, Mapping):
        return str({name: _describe(each) for name, each in value.items()})
    return str(value)


@dataclass(frozen=True)
class _Entry:
    """What is known of a candidate on a prompt: the seconds of every repeat, and the errors, which repeats share."""

    repeats: tuple[float, ...] = ()
    errors: Mapping[str, float] = field(default_factory=dict)

    def add(self, seconds: float, errors: Mapping[str, float]) -> _Entry:
        """Return the entry with one more repeat."""
        return _Entry((*self.repeats, seconds), {**self.errors, **errors})


_Entries = dict[tuple[str, str], _Entry]


class Measurements:
    """Measurements by candidate and prompt, written to a file after each; several processes may share the file.

    Args:
        path: of the file; None: none is kept.
        key: from :func:`identify`.

    Raises:
        OSError: the file cannot be written.
        ValueError: it holds something else than measurements.
    """

    def __init__(self, path: str | Path | None, key: str) -> None:
        self._path, self._key = None if path is None else Path(path), key
        self._saved: _Entries = {}
        self._unsaved: list[tuple[str, str, float, Mapping[str, float]]] = []
        self._warned = False
        if self._path is not None:
            check_writable(self._path)
            self._saved = _read_entries(self._path, read_file(self._path), key)
        self._known = self._saved

    def count(self, name: str, prompt: str) -> int:
        """Return how often a candidate has been timed on a prompt."""
        return len(self._known.get((name, prompt), _Entry()).repeats)

    def add(self, name: str, prompt: str, seconds: float, **errors: float) -> None:
        """Add one more timing; the errors are the same every time.

        What others have added to the file meanwhile stays, and counts.  If the file cannot be written, there is a
        warning, and the measurements are kept in memory until it can.
        """
        self._unsaved.append((name, prompt, seconds, errors))
        if self._path is not None:
            try:
                self._save(self._path)
            except (OSError, ValueError) as error:
                if not self._warned:
                    self._warned = True
                    warnings.warn(f"difffast: measurements are kept in memory only: {error}", stacklevel=3)
        self._known = self._add_unsaved(self._saved)

    def column(self, name: str, prompts: Sequence[str], which: str) -> tuple[float, ...]:
        """Return one number of a candidate for every prompt; of "seconds" the least."""
        entries = [self._known[name, prompt] for prompt in prompts]
        return tuple(min(each.repeats) if which == "seconds" else each.errors[which] for each in entries)

    def _save(self, path: Path) -> None:
        """Put what is not in the file into it."""
        with lock_file(path):
            content = read_file(path)
            entries = self._add_unsaved({**self._saved, **_read_entries(path, content, self._key)})
            mine: dict[str, dict[str, Any]] = {}
            for (name, prompt), entry in entries.items():
                mine.setdefault(name, {})[prompt] = {"repeats": list(entry.repeats), **entry.errors}
            with write_whole(path) as part:
                part.write_text(json.dumps({**content, self._key: mine}, indent=1), encoding="utf-8")
        self._saved, self._unsaved = entries, []

    def _add_unsaved(self, entries: _Entries) -> _Entries:
        entries = dict(entries)
        for name, prompt, seconds, errors in self._unsaved:
            entries[name, prompt] = entries.get((name, prompt), _Entry()).add(seconds, errors)
        return entries


def read_file(path: Path) -> dict[str, Any]:
    """Return what is in a file of measurements: an object by the keys of :func:`identify`; empty if there is no file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no regular file, or it holds no object.
    """
    if not os.path.exists(path):  # noqa: PTH110 - also false where a folder may not be looked into
        return {}
    if not path.is_file():
        raise ValueError(f"{path} must be a regular file to keep measurements in")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise make_error(path, f"something that is no JSON ({error})") from None
    if not isinstance(content, dict):
        raise make_error(path, shorten(content))
    return content


def _read_entries(path: Path, content: Mapping[str, Any], key: str) -> _Entries:
    """Return the measurements of one key, every number of which has been looked at."""
    found: _Entries = {}
    candidates = content.get(key, {})
    for name, prompts in _items(path, key, candidates):
        for prompt, entry in _items(path, name, prompts):
            where = f"{name}, {prompt!r}"
            fields = dict(_items(path, where, entry))
            repeats = fields.get("repeats")
            if not isinstance(repeats, list) or not repeats or not all(_is_number(each, "seconds") for each in repeats):
                raise make_error(path, f"repeats of {where} that are no positive seconds: {shorten(repeats)}")
            errors = {} if name == "stock" else {each: fields.get(each) for each in _ERRORS}
            for each, value in errors.items():
                if not _is_number(value, each):
                    raise make_error(path, f"{each} of {where}: {shorten(value)}")
            found[name, prompt] = _Entry(tuple(map(float, repeats)), {n: float(v) for n, v in errors.items()})
    return found


def _items(path: Path, where: str, value: Any) -> ItemsView[str, Any]:
    if not isinstance(value, dict):
        raise make_error(path, f"no object under {where}: {shorten(value)}")
    return value.items()


def _is_number(value: Any, what: str) -> bool:
    """Whether a value can be what it is to be; errors may be infinite, seconds may not."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        return False
    if what == "psnr_db":
        return not math.isnan(value)
    return 0 < value < math.inf if what == "seconds" else value >= 0


def shorten(value: Any) -> str:
    """Return a value as short text."""
    return reprlib.repr(value)


def make_error(path: Path, found: str) -> ValueError:
    """Return the error for a file that holds something else than measurements."""
    return ValueError(f"{path} must hold measurements of difffast.tune, and holds {found}; delete it, or name another")
