"""Files of many prompts: what is read, what each prompt becomes, and the manifest of what is made of them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import lock_file

#: The manifest's name in the folder of the pictures.
MANIFEST = "manifest.jsonl"


@dataclass(frozen=True)
class Job:
    """One picture to make.

    Attributes:
        line: the prompt's line in its file, from 1.
        prompt: what it says.
        seed: of its noise.
        settings: all else that the picture depends on.
    """

    line: int
    prompt: str
    seed: int
    settings: Mapping[str, Any]

    @property
    def file(self) -> str:
        """The name of the picture: another prompt, seed or setting has another one, and overwrites nothing."""
        what = json.dumps([self.prompt, self.seed, self.settings], sort_keys=True)
        return f"{self.line:05d}-{hashlib.sha256(what.encode()).hexdigest()[:12]}.png"

    def describe(self) -> dict[str, Any]:
        """Return what the manifest says of it, whatever came out."""
        return {"line": self.line, "prompt": self.prompt, "seed": self.seed, "settings": dict(self.settings)}


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a file in UTF-8, one a line.

    Raises:
        OSError: it cannot be read.
        ValueError: it has none, or a line is empty or no UTF-8; the error names the line.
    """
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    lines = content.split(b"\n")
    if lines[-1].strip() == b"":
        lines.pop()
    if not lines:
        raise ValueError(f"{path} has no prompts; it must have one on each line")
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            prompts.append(line.decode().strip())
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, line {number}: a prompt must be UTF-8, got {error.object[:40]!r}") from None
        if not prompts[-1]:
            raise ValueError(f"{path}, line {number}: a line must hold a prompt, and this one is empty")
    return prompts


def check_lengths(path: Path, prompts: Sequence[str], tokenizer: Any) -> None:
    """Refuse prompts that the text encoder would cut off.

    Args:
        path: their file, for the error.
        prompts: one a line.
        tokenizer: the pipeline's, or None: it has none, and nothing is known of lengths.

    Raises:
        ValueError: one has more tokens than the tokenizer's ``model_max_length``; the error names the line.
    """
    most = getattr(tokenizer, "model_max_length", None)
    for number, prompt in enumerate(prompts if most else (), 1):
        tokens = len(tokenizer(prompt, truncation=False, verbose=False).input_ids)
        if tokens > most:
            raise ValueError(
                f"{path}, line {number}: a prompt must have at most {most} tokens, those at its ends included, and "
                f"this one has {tokens}: the text encoder would not see its end"
            )


class Manifest:
    """What has been made in a folder, as JSON lines that several processes append to.

    Args:
        folder: where the pictures are.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._path = folder, folder / MANIFEST
        self._read = 0  # bytes
        self._made: set[str] = set()

    def find_made(self) -> set[str]:
        """Return the names of all pictures that are there and that the manifest knows."""
        self._read_on()
        return {name for name in self._made if (self._folder / name).is_file()}

    def count_made(self, jobs: Sequence[Job]) -> int:
        """Return how many jobs the manifest says are made."""
        self._read_on()
        return sum(job.file in self._made for job in jobs)

    def add(self, record: Mapping[str, Any]) -> None:
        """Append a record, whole; a picture that is in there already is not added again.

        Raises:
            OSError: the manifest cannot be written.
        """
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        with lock_file(self._path):
            self._read_on()
            if record.get("file") in self._made:
                return
            with self._path.open("ab+") as file:
                size = file.seek(0, os.SEEK_END)
                if size:
                    file.seek(size - 1)
                    # A process that was killed while it wrote has left half a line.
                    line = line if file.read(1) == b"\n" else b"\n" + line
                file.write(line)

    def _read_on(self) -> None:
        """Read the lines that are new; what is no record is skipped."""
        if not self._path.is_file():
            return
        with self._path.open("rb") as file:
            file.seek(self._read)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and isinstance(record.get("file"), str):
                self._made.add(record["file"])
