"""Override methods of objects, exactly reversibly: give them a subclass of their class.

An object's instance dict is not touched, nothing on its class changes, and copies and pickles are of the plain class.
Unlike an instance attribute ``forward``, an overridden ``__call__`` survives accelerate's offload hooks, enabled before
or after.  Objects of one class that are given the same methods share one subclass: torch.compile guards the types of
modules, and takes blocks for equal only if those are.
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable
from typing import Any

#: Where a subclass keeps the plain class.
MARK = "_difffast_plain_class"

#: Where the first of the methods keeps the subclasses that it is in: they live as long as it does.
_KEPT = "_difffast_subclasses"


def swap_in(obj: Any, methods: dict[str, Callable[..., Any]], *, equal: bool = False) -> None:
    """Give ``obj`` the subclass with ``methods``.

    Args:
        methods: functions, by the names of what they override.
        equal: whether the subclass compares equal to the plain class, as Diffusers' ``from_pipe`` asks of the classes
            of the models that a new pipeline takes over.

    Raises:
        ValueError: ``obj`` has been given one already.
    """
    if is_swapped(obj):
        raise ValueError(f"{type(obj).__name__} is already patched")
    plain = type(obj)
    key = (plain, equal, *((name, id(method)) for name, method in methods.items()))
    kept = vars(next(iter(methods.values()))).setdefault(_KEPT, {})
    if key not in kept:
        kept[key] = _make_subclass(plain, methods, _equal_metaclass(type(plain)) if equal else type(plain))
    _set_class(obj, kept[key])


def _make_subclass(plain: type, methods: dict[str, Callable[..., Any]], metaclass: type) -> type:
    def reduce_ex(self: Any, protocol: int) -> tuple[Any, ...]:
        function, arguments, *state = super(subclass, self).__reduce_ex__(max(protocol, 2))
        if function is copyreg.__newobj__:
            # It insists on the object's own class; the older _reconstructor takes the plain one.
            return (copyreg._reconstructor, (plain, object, None), *state)
        return (plain if function is subclass else function, arguments, *state)

    def new(_cls: type, *args: Any, **kwargs: Any) -> Any:
        # type(obj).from_config(...) must make a plain object.
        return plain(*args, **kwargs)

    attributes = {
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        "__doc__": plain.__doc__,
        "__new__": new,
        "__reduce_ex__": reduce_ex,
        MARK: plain,
        **methods,
    }
    subclass = metaclass(plain.__name__, (plain,), attributes)
    return subclass


@functools.cache
def _equal_metaclass(metaclass: type) -> type:
    """Return a subclass of ``metaclass`` whose classes compare and hash as their plain classes."""

    def equal(cls: type, other: object) -> bool:
        return _plain(cls) is (_plain(other) if isinstance(other, type) else other)

    return type(metaclass.__name__, (metaclass,), {"__eq__": equal, "__hash__": lambda cls: hash(_plain(cls))})


def swap_out(obj: Any) -> None:
    """Give ``obj`` its plain class back; nothing happens if it has it."""
    if is_swapped(obj):
        _set_class(obj, plain_class(obj))


def _set_class(obj: Any, cls: type) -> None:
    object.__setattr__(obj, "__class__", cls)  # what torch.compile returns for a module hands attributes on to that


def is_swapped(obj: Any) -> bool:
    """Whether ``obj`` has a subclass from :func:`swap_in`."""
    return MARK in vars(type(obj))


def plain_class(obj: Any) -> type:
    """The class of ``obj`` as it is without difffast."""
    return _plain(type(obj))


def _plain(cls: type) -> type:
    return vars(cls).get(MARK, cls)
