"""Override methods of objects, exactly reversibly: give them a subclass of their class.

An object's instance dict is not touched, nothing on its class changes, and copies and pickles are of the plain class.
Unlike an instance attribute ``forward``, an overridden ``__call__`` survives accelerate's offload hooks, enabled before
or after.  Objects of one class that are given the same methods share one subclass: torch.compile guards the types of
modules, and takes blocks for equal only if those are.

Others may derive a class from that subclass and give it to the object (FSDP2 and ``torch.nn.utils.parametrize`` do).
It stays overridden; :func:`swap_out` puts the plain class in the subclass's place among the bases of theirs.
"""

from __future__ import annotations

import copyreg
import functools
import weakref
from collections.abc import Callable
from typing import Any

#: Where a subclass keeps the plain class.
MARK = "_difffast_plain_class"

#: Where a subclass keeps, by ``id``, the objects that it was given to.
_GIVEN = "_difffast_given"

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
    vars(kept[key])[_GIVEN][id(obj)] = obj  # first: whatever happens next, it is taken out
    _set_class(obj, kept[key])


def _make_subclass(plain: type, methods: dict[str, Callable[..., Any]], metaclass: type) -> type:
    def reduce_ex(self: Any, protocol: int) -> tuple[Any, ...]:
        function, arguments, *state = super(subclass, self).__reduce_ex__(max(protocol, 2))
        own = _plain(type(self))
        if function is copyreg.__newobj__:
            # It insists on the object's own class; the older _reconstructor takes any.
            return (copyreg._reconstructor, (own, object, None), *state)
        return (own if function is type(self) else function, arguments, *state)

    def new(cls: type, *args: Any, **kwargs: Any) -> Any:
        # type(obj).from_config(...) must make a plain object.
        if cls is subclass:
            return plain(*args, **kwargs)
        return object.__new__(cls) if plain.__new__ is object.__new__ else plain.__new__(cls, *args, **kwargs)

    attributes = {
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        "__doc__": plain.__doc__,
        "__new__": new,
        "__reduce_ex__": reduce_ex,
        MARK: plain,
        _GIVEN: weakref.WeakValueDictionary(),
        **methods,
    }
    subclass = metaclass(plain.__name__, (plain,), attributes)
    return subclass


@functools.cache
def _equal_metaclass(metaclass: type) -> type:
    """Return a subclass of ``metaclass`` whose classes compare and hash as their plain classes."""

    def equal(cls: type, other: object) -> bool:
        return _plain(cls) is (_plain(other) if isinstance(other, type) else other)

    def find_hash(cls: type) -> int:
        # Classes that others derive have the metaclass as well, and are equal to themselves alone.
        return hash(vars(cls)[MARK]) if MARK in vars(cls) else metaclass.__hash__(cls)

    return type(metaclass.__name__, (metaclass,), {"__eq__": equal, "__hash__": find_hash})


def swap_out(obj: Any) -> None:
    """Give ``obj`` its plain class back; nothing happens if it has it.

    A class that others have derived from the subclass stays the object's own, derived from the plain class from now on:
    once no other object of it has been given the subclass, whose methods until then only do what the plain ones do.
    """
    cls = type(obj)
    ours = next((each for each in cls.__mro__ if MARK in vars(each)), None)
    if ours is None:
        return
    given = vars(ours)[_GIVEN]
    given.pop(id(obj), None)
    if cls is ours:
        _set_class(obj, _plain(cls))
        return
    others = [type(other) for other in given.values()]
    for derived in [each for each in cls.__mro__ if any(base is ours for base in each.__bases__)]:
        if not any(derived in other.__mro__ for other in others):
            bases = (_plain(ours) if base is ours else base for base in derived.__bases__)
            derived.__bases__ = tuple(dict.fromkeys(bases))


def _set_class(obj: Any, cls: type) -> None:
    object.__setattr__(obj, "__class__", cls)  # what torch.compile returns for a module hands attributes on to that


def is_swapped(obj: Any) -> bool:
    """Whether ``obj`` has a subclass from :func:`swap_in`, or a class that others have derived from one."""
    return hasattr(type(obj), MARK)


def plain_class(obj: Any) -> type:
    """The class of ``obj`` as it is without difffast; a class that others have derived from ours is theirs."""
    return _plain(type(obj))


def _plain(cls: type) -> type:
    return vars(cls).get(MARK, cls)
