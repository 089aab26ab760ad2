"""What a converted model has taken in as constants: has any of it changed since?

OpenVINO copies weights into models of its own, so a weight that changes in place is not seen by itself, as it is by
recorded graphs.  Three things are compared.  At every call: where the weights lie and what is in the module
(:mod:`.watch`), and how often each weight has been written to.  Once a picture: the bits of all weights, for what
writes past PyTorch's counters, as ``weight.data.mul_(2)`` and ``load_textual_inversion`` do.
"""

from __future__ import annotations

import hashlib
import itertools
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops._fingerprint import fingerprint, view_as_it_lies
from ..surgery.subclass import plain_class
from ..unet.contents import contents_of
from .watch import Watch

#: Attributes of a module that say nothing of what it computes.
_BOOKKEEPING = ("_parameters", "_buffers", "_modules", "training")
_PLAIN = (str, int, float, bool, type(None), torch.dtype)


class Constants:
    """The weights and the structure of a module, as of now.

    Args:
        module: the module, which :func:`refuse_constants` has not refused.
    """

    def __init__(self, module: nn.Module) -> None:
        self._watch = Watch(module)
        self._weights = [weight for _, weight in _list_weights(module)]
        self._versions = self._read_versions()
        self._bits, self._config = _Bits(self._weights), _read_config(module)
        self._mark: str | None = None
        self._distrusted = False

    def still_hold(self, module: nn.Module) -> bool:
        """Return whether nothing has changed since, as far as can be told at every call."""
        if not self._watch.still_holds() or self._read_versions() != self._versions:
            return False
        if self._distrusted:
            self._distrusted = False
            return _read_config(module) == self._config and self._bits.are_unchanged()
        return True

    def _read_versions(self) -> list[int]:
        return [weight._version for weight in self._weights]

    def distrust(self) -> None:
        """Compare the weights' bits as well when they are asked for next."""
        self._distrusted = True

    def mark(self, module: nn.Module) -> str:
        """Return a hash of the weights and of the structure, the same in every process."""
        if self._mark is None:
            found = hashlib.sha256(self.mark_structure(module).encode())
            for _, weight in _list_weights(module):
                found.update(f"{_check_bits(weight)}\n".encode())
            self._mark = found.hexdigest()
        return self._mark

    def mark_structure(self, module: nn.Module) -> str:
        """Return a hash of the structure alone, the same for all weights."""
        found = hashlib.sha256(self._config.encode())
        for name, weight in _list_weights(module):
            found.update(f"{name} {tuple(weight.shape)} {weight.dtype}\n".encode())
        for line in describe_structure(module):
            found.update(f"{line}\n".encode())
        return found.hexdigest()


def refuse_constants(module: nn.Module) -> str | None:
    """Return why a change of a module's weights could not be seen, or None."""
    for name, weight in _list_weights(module):
        if weight.is_inference():
            return f"{name} was made under torch.inference_mode, where PyTorch counts no changes"
        if type(weight) not in (nn.Parameter, Tensor):
            return f"{name} is a {type(weight).__name__}"
    return None


def describe_structure(module: nn.Module) -> Iterator[str]:
    """Yield a line for every module: its name, class, switches, and those of its attention processor."""
    for name, each in module.named_modules():
        yield f"{name}: {_describe_object(each)}"
        processor = vars(each).get("processor")
        if processor is not None:
            yield f"{name}.processor: {_describe_object(processor)}"


def _describe_object(thing: Any) -> str:
    own = getattr(thing, "__dict__", {})
    switches = {
        key: _describe_value(value)
        for key, value in own.items()
        if key not in _BOOKKEEPING and (not key.startswith("_") or isinstance(value, _PLAIN))
    }
    return f"{plain_class(thing).__module__}.{plain_class(thing).__qualname__} {sorted(switches.items())}"


def _describe_value(value: Any) -> str:
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, dict):
        return str({str(key): _describe_value(item) for key, item in value.items()})
    if isinstance(value, (list, tuple, set, frozenset)):
        parts = [_describe_value(item) for item in value]
        return str(sorted(parts) if isinstance(value, (set, frozenset)) else parts)
    return getattr(value, "__qualname__", type(value).__qualname__)


def _list_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return itertools.chain(module.named_parameters(), module.named_buffers())


def _read_config(module: nn.Module) -> str:
    """Return a transformers model's configuration, which it reads while it runs; Diffusers' cannot be written to."""
    read = getattr(getattr(module, "config", None), "to_dict", None)
    return "" if read is None else repr({**read(), "_name_or_path": None})


class _Bits:
    """The bits of weights, as of now.

    Views of the weights' memory are held, so that looking again takes one call and as long as memory can be read.
    They are of no use once a weight lies elsewhere, which :mod:`.watch` sees.

    Args:
        weights: the weights.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        whole = [(weight, _lay_out(weight)) for weight in weights]
        self._views = [view for weight, view in whole if view.data_ptr() == weight.data_ptr()]
        # In memory these have gaps, or an order of their own.
        self._scattered = [weight for weight, view in whole if view.data_ptr() != weight.data_ptr()]
        self._found = self._read()

    def are_unchanged(self) -> bool:
        """Return whether they are what they were."""
        return self._read() == self._found

    def _read(self) -> int:
        return fingerprint([*self._views, *map(_lay_out, self._scattered)])


def _lay_out(weight: Tensor) -> Tensor:
    """Return a weight as it lies in memory, or else a copy that is contiguous."""
    return view_as_it_lies(weight.detach()).contiguous()


def _check_bits(weight: Tensor) -> int:
    """Return a checksum that is the same wherever it is computed."""
    return zlib.crc32(memoryview(_lay_out(weight).reshape(-1).view(torch.uint8).numpy()))


def holds_foreign_code(module: nn.Module) -> str | None:
    """Return what others have put into a module, which may do something else at every call, or None."""
    contents = contents_of(module)
    contents.look()
    return contents.foreign
