"""The chain of edits in one browser: a tree of pictures, of which one is at hand."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from ip2p.base.errors import InputError

KEPT = 60  # steps a browser


@dataclass(frozen=True, kw_only=True)
class Step:
    """A picture and how it was made from its parent.

    file: what is edited next, with its EXIF and profile inside. shown: a copy to look at. parameters: the
    infotext, empty for a picture that was dropped. mask: the region edited, if there was one, to look at;
    drawn: the mask it was given, with every pixel.
    """

    number: int
    parent: int | None
    file: Path
    shown: Path
    title: str
    parameters: str = ""
    mask: Path | None = None
    drawn: Path | None = None


@dataclass(kw_only=True)
class History:
    """Steps by number; an edit of an earlier step begins a branch, and nothing is lost by going back."""

    steps: dict[int, Step] = field(default_factory=dict)
    at: int | None = None
    _last: dict[int, int] = field(default_factory=dict)  # the child that redo returns to
    _count: int = 0

    @property
    def current(self) -> Step:
        """The step at hand. Raises InputError before a picture was dropped."""
        if self.at is None:
            raise InputError("There is no picture yet. Drop one, or take one of the examples.")
        return self.steps[self.at]

    def start(self, file: Path, shown: Path, title: str, parameters: str = "") -> Step:
        """Begin anew with a picture."""
        self.steps.clear()
        self._last.clear()
        self.at, self._count = None, 0
        return self.add(file, shown, title, parameters)

    def add(
        self,
        file: Path,
        shown: Path,
        title: str,
        parameters: str = "",
        mask: Path | None = None,
        drawn: Path | None = None,
    ) -> Step:
        """Make a picture the newest child of the step at hand, and the one at hand."""
        step = Step(
            number=self._count,
            parent=self.at,
            file=file,
            shown=shown,
            title=title,
            parameters=parameters,
            mask=mask,
            drawn=drawn,
        )
        self._count += 1
        self.steps[step.number] = step
        self.go(step.number)
        return step

    def go(self, number: int) -> Step:
        """Take a step in hand; redo leads back to it from each step before it. Raises InputError."""
        if number not in self.steps:
            raise InputError(f"Step {number} is not kept any more. Choose another one of the history.")
        self.at = number
        step = self.steps[number]
        while step.parent is not None:
            self._last[step.parent] = step.number
            step = self.steps[step.parent]
        return self.current

    def undo(self) -> Step:
        """One step back; the first one stays where it is."""
        parent = self.current.parent
        if parent is not None:
            self.at = parent
        return self.current

    def redo(self) -> Step:
        """Forward again to where undo came from; without such a step nothing happens."""
        following = self._last.get(self.current.number)
        if following is not None:
            self.at = following
        return self.current

    @property
    def can_undo(self) -> bool:
        return self.at is not None and self.current.parent is not None

    @property
    def can_redo(self) -> bool:
        return self.at is not None and self.at in self._last

    def label(self, step: Step) -> str:
        """What stands below a step: its number and instruction, and where it branched off."""
        branch = "" if step.parent in (None, step.number - 1) else f" (from {step.parent})"
        here = "▶ " if step.number == self.at else ""
        return f"{here}{step.number} · {step.title}{branch}"

    def prune(self, kept: int = KEPT) -> list[Step]:
        """Drop the oldest steps, but for the first and the one at hand; theirs hang on their parents then."""
        gone = []
        for number in sorted(self.steps):
            old = self.steps[number]
            if len(self.steps) <= kept or number == self.at or old.parent is None:
                continue
            gone.append(self.steps.pop(number))
            for step in self.steps.values():
                if step.parent == number:
                    self.steps[step.number] = replace(step, parent=old.parent)
            following = self._last.pop(number, None)
            if self._last.get(old.parent) == number:
                self._last.pop(old.parent)
                if following is not None:
                    self._last[old.parent] = following
        return gone
