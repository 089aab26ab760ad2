"""Candidates: the ways in which an operator can be computed on a device, PyTorch's own first."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..ops import _installed
from ..ops._installed import FROM_PYTORCH, SDPA_KERNELS
from ..ops._keys import Key
from .problems import KINDS

#: A way that is no backend: it computes a key's operands, and returns a tuple.
Extra = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Candidate:
    """One way to compute an operator.

    Attributes:
        name: of the backend.
        ours: whether it has to prove that it is right; PyTorch's own are compared all the same.
        around: what is entered around calls.
        call: computes a key's operands.
    """

    name: str
    ours: bool
    around: Callable[[], AbstractContextManager[object]]
    call: Callable[..., tuple[Tensor, ...]]


def find_default(key: Key) -> str:
    """Return PyTorch's own way for a key: what runs where nothing has been proved."""
    has_sdpa = "sdpa" in ops.OPERATORS[key.operator]
    return "sdpa" if has_sdpa and not key.option("maps") else "reference"


def find_candidates(key: Key, device: torch.device, extras: Sequence[str] = ()) -> list[Candidate]:
    """Return the candidates for a key; what cannot run on this device is none.

    Args:
        extras: "module:name" of dictionaries {operator: {name: way}}, for tests.
    """
    default = find_default(key)
    found = []
    # Triton's interpreter is a way to look for errors.
    none = (*FROM_PYTORCH, "triton") if _installed.INTERPRETED else FROM_PYTORCH
    others = [each for each in ops.OPERATORS[key.operator] if each not in none]
    for name in (default, *others):
        if _installed.find_obstacle(name, device) is None:
            around = _force(name, key.operator)
            found.append(Candidate(name, name not in (*FROM_PYTORCH, *SDPA_KERNELS), around, KINDS[key.operator].call))
    for extra in extras:
        module, _, attribute = extra.partition(":")
        ways: dict[str, dict[str, Extra]] = getattr(importlib.import_module(module), attribute)
        found += [
            Candidate(name, True, contextlib.nullcontext, way) for name, way in ways.get(key.operator, {}).items()
        ]
    return found


def _force(name: str, operator: str) -> Callable[[], AbstractContextManager[object]]:
    return lambda: ops.use_backend(name, operator)
