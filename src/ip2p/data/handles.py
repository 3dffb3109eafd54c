"""Per-process caches of open files: neither pickled nor shared with forked workers."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")


class Lately(Generic[Value]):
    """An LRU cache of `most` values for one process.

    A forked worker starts empty: it would share file positions with its parent.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._process = os.getpid()
        self._values: OrderedDict[Hashable, Value] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        if self._process != os.getpid():
            self._values, self._process = OrderedDict(), os.getpid()
        if key not in self._values:
            value = make()
            while len(self._values) >= self.most:
                _close(self._values.popitem(last=False)[1])
            self._values[key] = value
        self._values.move_to_end(key)
        return self._values[key]

    def __getstate__(self) -> dict[str, Any]:
        return {"most": self.most}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def _close(value: object) -> None:
    close = getattr(value, "close", None)
    if callable(close):
        close()
