"""Files that are written as a whole or not at all, and locks between the processes that write them."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows: there the last one to write wins
    fcntl = None

_here = threading.Lock()


class _NothingToWriteError(Exception):
    """Leaves a file as it was."""


@contextlib.contextmanager
def write_whole(path: str | Path) -> Iterator[Path]:
    """Give the name of a new file to write; after the block it takes the place of ``path``.

    Whatever interrupts the block, ``path`` holds what it held before.  Missing folders are made.  The new file has the
    ending of ``path``, by which writers choose the format, and a name that nobody else uses.  What is no regular file,
    such as /dev/stdout, is written in place.

    Raises:
        OSError: ``path`` cannot be written; the error names it.
    """
    path = Path(path)
    with _name_in_errors(path):
        if path.is_dir():
            raise _make_error(errno.EISDIR, path)
        if path.exists() and not path.is_file():
            yield path
            return
        target = Path(os.path.realpath(path))  # a link stays one
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not os.access(target, os.W_OK):
            raise _make_error(errno.EACCES, path)
        part = target.with_name(f".{target.stem[:100]}.{uuid.uuid4().hex}{target.suffix}")
        try:
            part.touch(exist_ok=False)
            if target.exists():
                part.chmod(target.stat().st_mode & 0o7777)
            yield part
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)


def check_writable(path: str | Path) -> None:
    """Find out whether :func:`write_whole` can write a file, before the time for its content is spent.

    Missing folders are made; no file is left behind, and none is changed.

    Raises:
        OSError: it cannot; the error names the file.
    """
    with contextlib.suppress(_NothingToWriteError), write_whole(path):
        raise _NothingToWriteError


@contextlib.contextmanager
def lock_file(path: str | Path) -> Iterator[None]:
    """Let nobody else who locks ``path`` into the block: no thread of this process, and no other process.

    The lock is a hidden file beside it, which stays there.  On file systems without locks, the last one to write wins.

    Raises:
        OSError: the lock cannot be made; the error names ``path``.
    """
    path = Path(path)
    with _here, contextlib.ExitStack() as stack:
        if fcntl is not None:
            with _name_in_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context(path.with_name(f".{path.name}.lock").open("a"))
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _name_in_errors(path: Path) -> Iterator[None]:
    """Let errors of the operating system inside the block name ``path``, not the file that stands in for it."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename == str(path):
            raise
        raise _make_error(error.errno, path) from error


def _make_error(number: int, path: Path) -> OSError:
    return OSError(number, os.strerror(number), str(path))
