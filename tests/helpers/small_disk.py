"""A disk that is full."""

import contextlib
import resource


@contextlib.contextmanager
def small_disk(most):
    """Let the kernel refuse files of more bytes, as a full disk does in the middle of a file."""
    earlier = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, earlier[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, earlier)
