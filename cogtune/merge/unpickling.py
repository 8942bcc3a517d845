"""Python's own unpickler, held to time and memory that grow with the description alone."""

from __future__ import annotations

import gc
import pickle
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch

_Pure: Any = pickle._Unpickler


class RestrictedUnpickler(_Pure):  # type: ignore[misc]
    """Refuses keys that may take for ever to hash.

    The unpickler that is written in C makes room for as many objects as a damaged number says; this one keeps them in a
    dict.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(_Pure.dispatch)
    stack: list[Any]

    def load(self) -> Any:
        """Return the object; the garbage collector, which would look at all others again and again, waits meanwhile."""
        collects = gc.isenabled()
        gc.disable()
        try:
            return super().load()
        finally:
            if collects:
                gc.enable()

    def is_key(self, value: Any) -> bool:
        """Return whether a value may be a key: its size is known, as that of nested containers is not."""
        if isinstance(value, tuple):
            return all(isinstance(item, (str, int, float)) for item in value)
        return isinstance(value, (str, bytes, int, float, torch.dtype, type(None)))


def _checked(load: Callable[[Any], None], keys: Callable[[list[Any]], Iterable[Any]]) -> Callable[[Any], None]:
    def checked(self: RestrictedUnpickler) -> None:
        if not all(map(self.is_key, keys(self.stack))):
            raise pickle.UnpicklingError("a key is a container")
        load(self)

    return checked


def _every(stack: Sequence[Any]) -> Sequence[Any]:
    return stack


def _every_second(stack: Sequence[Any]) -> Sequence[Any]:
    return stack[::2]


def _last_but_one(stack: Sequence[Any]) -> Sequence[Any]:
    return stack[-2:-1]


for _code, _keys in (
    (pickle.SETITEM, _last_but_one),
    (pickle.SETITEMS, _every_second),
    (pickle.DICT, _every_second),
    (pickle.ADDITEMS, _every),
    (pickle.FROZENSET, _every),
):
    RestrictedUnpickler.dispatch[_code[0]] = _checked(_Pure.dispatch[_code[0]], _keys)
