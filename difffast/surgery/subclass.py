"""Override methods of one object, exactly reversibly: give it a subclass of its own.

The object's instance dict is not touched, nothing on its class changes, and copies and pickles are of the plain
class.  Unlike an instance attribute ``forward``, an overridden ``__call__`` survives accelerate's offload hooks,
enabled before or after.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from typing import Any

#: Where the subclass of one object keeps the plain class.
MARK = "_difffast_plain_class"


def swap_in(obj: Any, methods: dict[str, Callable[..., Any]]) -> None:
    """Give ``obj`` a subclass with ``methods``.

    Raises:
        ValueError: ``obj`` has been given one already.
    """
    if is_swapped(obj):
        raise ValueError(f"{type(obj).__name__} is already patched")
    plain = type(obj)

    def reduce_ex(self: Any, protocol: int) -> tuple[Any, ...]:
        # copyreg.__newobj__ insists on the object's own class; the older _reconstructor takes the plain one.
        _, _, *state = super(swapped, self).__reduce_ex__(max(protocol, 2))
        return (copyreg._reconstructor, (plain, object, None), *state)

    def new(_cls: type, *args: Any, **kwargs: Any) -> Any:
        # type(obj).from_config(...) must make a plain object.
        return plain(*args, **kwargs)

    swapped = type(
        plain.__name__,
        (plain,),
        {
            "__module__": plain.__module__,
            "__qualname__": plain.__qualname__,
            "__doc__": plain.__doc__,
            "__new__": new,
            "__reduce_ex__": reduce_ex,
            MARK: plain,
            **methods,
        },
    )
    obj.__class__ = swapped


def swap_out(obj: Any) -> None:
    """Give ``obj`` its plain class back; nothing happens if it has it."""
    if is_swapped(obj):
        obj.__class__ = plain_class(obj)


def is_swapped(obj: Any) -> bool:
    """Whether ``obj`` has a subclass of its own from :func:`swap_in`."""
    return MARK in vars(type(obj))


def plain_class(obj: Any) -> type:
    """The class of ``obj`` as it is without difffast."""
    return vars(type(obj)).get(MARK, type(obj))
