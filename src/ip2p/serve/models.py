"""Which models are loaded: each when it is first needed, and no more at once than there is room for."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from ip2p.editing.editor import Editor
from ip2p.serve.engine import JoinedEditor

Source = Editor | Callable[[], Editor]


class _Model:
    """A model by its name. given: it was given loaded and stays so; make: loads it."""

    def __init__(self, name: str, source: Source) -> None:
        self.name = name
        self.given = source if isinstance(source, Editor) else None
        self.make = None if isinstance(source, Editor) else source
        self.joined: JoinedEditor | None = None
        self.users = 0
        self.used = 0.0
        self.loading = threading.Lock()

    @property
    def editor(self) -> Editor | None:
        return self.joined or self.given


class ModelPool:
    """Models by name, each an editor or a function that loads one; of the functions' at most `room` stay.

    join: how many requests share a call of a network; calls: counts the calls by that number. changed: the
    lock; it is notified when a model is free. tiny_vae: for previews.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        *,
        room: int,
        join: int,
        calls: Counter[int],
        changed: threading.Condition,
        tiny_vae: str | Path | None = None,
    ) -> None:
        self.names = list(sources)
        self._tiny_vae = tiny_vae
        self._room, self._join, self._calls, self._changed = max(1, room), join, calls, changed
        self._models = {name: _Model(name, source) for name, source in sources.items()}

    @property
    def loaded(self) -> tuple[str, ...]:
        with self._changed:
            return tuple(name for name, model in self._models.items() if model.editor is not None)

    def peek(self, name: str) -> Editor | None:
        """The editor of a model if it is loaded."""
        with self._changed:
            return self._models[name].editor

    def reserve(self, name: str) -> bool:
        """Count a user of a model that is loaded or may be; an unused model makes room for it."""
        with self._changed:
            model = self._models[name]
            if not self._has_room(model):
                return False
            model.users += 1
            return True

    def _has_room(self, model: _Model) -> bool:
        if model.editor is not None or model.users:
            return True
        held = [m for m in self._models.values() if m.make is not None and (m.joined is not None or m.users)]
        if len(held) < self._room:
            return True
        idle = [m for m in held if not m.users and m.joined is not None]
        if not idle:
            return False
        oldest = min(idle, key=lambda m: m.used)
        assert oldest.joined is not None
        oldest.joined.close()
        oldest.joined = None
        return True

    def release(self, name: str) -> None:
        """Count a user less."""
        with self._changed:
            model = self._models[name]
            model.users -= 1
            model.used = time.monotonic()
            self._changed.notify_all()

    def open(self, name: str) -> JoinedEditor:
        """The editor of a model that was reserved, loaded if need be."""
        model = self._models[name]
        with model.loading:
            if model.joined is None:
                if model.make is not None:
                    gc.collect()  # what made room
                    if torch.cuda.is_available():
                        torch.cuda.empty_cache()
                editor = model.given or model.make()  # type: ignore[misc]
                model.joined = JoinedEditor(
                    editor, join=self._join, calls=self._calls, tiny_vae=self._tiny_vae
                )
            return model.joined

    @contextlib.contextmanager
    def using(self, name: str) -> Iterator[JoinedEditor]:
        """The editor of a model, waited for until there is room for it."""
        with self._changed:
            self._changed.wait_for(lambda: self.reserve(name))
        try:
            yield self.open(name)
        finally:
            self.release(name)

    def close(self) -> None:
        for model in self._models.values():
            if model.joined is not None:
                model.joined.close()
                model.joined = None
