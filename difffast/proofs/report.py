"""What proving has found, as text, as rows of a table, and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Columns of :meth:`ProofReport.rows`.
COLUMNS = ("operator", "operands", "mode", "choice", "us", "PyTorch us", "refused")


@dataclass(frozen=True)
class ProofReport:
    """What :func:`difffast.prove` has found on a device.

    Attributes:
        device: its name.
        path: the file with all proofs of the device.
        facts: what the proofs depend on besides their keys.
        proofs: entries by key and mode, of the keys that were asked for.
        proved: how many keys were proved in this call.
        known: how many had been proved before.
        left: keys that the time did not suffice for; PyTorch's operators serve them.
        notes: what went wrong.
        seconds: that this call has taken.
        whole: what a call of the whole UNet takes with what is chosen, as a multiple of what it takes with PyTorch's
            operators; None: it was not called, or PyTorch's are chosen everywhere.
    """

    device: str
    path: Path
    facts: Mapping[str, Any]
    proofs: Mapping[str, Mapping[str, Any]]
    proved: int
    known: int
    left: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: float
    whole: float | None = None

    def rows(self) -> Iterator[tuple[str, ...]]:
        """Yield a row of :data:`COLUMNS` for every proof."""
        return list_rows(self.proofs)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as what JSON can hold."""
        return {
            "device": self.device,
            "facts": dict(self.facts),
            "proofs": dict(self.proofs),
            "proved": self.proved,
            "known": self.known,
            "left": list(self.left),
            "notes": list(self.notes),
            "seconds": self.seconds,
            "whole": self.whole,
        }

    def __str__(self) -> str:
        head = f"{self.device}: {self.proved} keys proved in {self.seconds:.1f} s, {self.known} known before"
        left = [f"{len(self.left)} keys are left, which PyTorch's operators serve; prove again to go on"]
        whole = (
            []
            if self.whole is None
            else [f"a call of the whole UNet takes {self.whole:.3f} of its time with PyTorch's operators"]
        )
        return "\n".join([head, *whole, *(left if self.left else []), *(f"note: {note}" for note in self.notes)])


def list_rows(proofs: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Yield a row of :data:`COLUMNS` for every entry, which may come from a file."""
    for text, entry in proofs.items():
        operator, _, rest = text.partition(" ")
        operands, _, mode = rest.rpartition(" ")
        choice, default = str(entry.get("choice", "?")), str(entry.get("default", "?"))
        refused = entry.get("refused")
        reasons = refused.items() if isinstance(refused, Mapping) else ()
        lost = "; ".join(f"{name}: {reason}" for name, reason in reasons)
        yield operator, operands, mode, choice, read_time(entry, choice), read_time(entry, default), lost


def read_time(entry: Mapping[str, Any], name: str) -> str:
    """Return the median time of a candidate of an entry as text; "" where there is none."""
    times = entry.get("microseconds")
    found = times.get(name) if isinstance(times, Mapping) else None
    return f"{found[1]:.1f}" if isinstance(found, list) and len(found) == 3 else ""
