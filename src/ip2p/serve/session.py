"""What one browser has at hand: its picture, its candidates, its history, all in a folder of its own."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from ip2p.base.errors import InputError, ResourceError
from ip2p.pictures.images import WRITES, load_image, resized, save_image
from ip2p.pictures.infotext import EditRecord, parse_infotext, read_infotext
from ip2p.serve.history import History, Step

SHOWN = 1024  # the longer side of what the page shows; files for download have every pixel
MOST_BYTES = 1_000_000_000  # of what one browser's pictures take
AGE = 3600  # seconds that Gradio keeps uploads and what it shows; what a session needs lies elsewhere


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One result of an edit, on disk: a PNG to go on from, and a copy to look at.

    mask: the region edited, to look at; drawn: the mask that was given, with every pixel.
    """

    file: Path
    shown: Path
    parameters: str
    mask: Path | None = None
    drawn: Path | None = None

    @property
    def settings(self) -> EditRecord:
        return parse_infotext(self.parameters)


Made = Step | Candidate


@dataclass(kw_only=True)
class Session:
    """A browser's own state. Nothing in it is shared, and its folder goes when it does.

    source: the name of the picture dropped, whose ending a download takes. jobs: the ids of what runs for it;
    running: how many actions are at it; stops: how often that was stopped. cells: the infotext of each cell
    of the matrix.
    """

    history: History = field(default_factory=History)
    candidates: list[Candidate] = field(default_factory=list)
    chosen: int | None = None
    source: str = "picture.png"
    cells: dict[int, str] = field(default_factory=dict)
    stops: int = 0
    running: int = 0
    jobs: set[str] = field(default_factory=set)
    _folder: Path | None = None
    _downloads: dict[Path, Path] = field(default_factory=dict)  # by the file of the candidate

    def folder(self) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="session-", dir=store()))
        return self._folder

    def new(self, name: str) -> Path:
        """A path in the folder that nobody can guess, ending as `name` does."""
        place = self.folder() / secrets.token_hex(8)
        place.mkdir()
        return place / name

    def open(self, path: str | Path, *, name: str | None = None, max_pixels: int | None) -> Step:
        """Begin with a picture: checked, upright, its settings read if it has some. Raises InputError."""
        path = Path(path)
        # By its bytes: an error then says nothing of where the server keeps it.
        picture = load_image(uploaded(path), max_pixels=max_pixels)
        parameters = ""
        if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"):
            parameters = read_infotext(path) or ""
        file = save_image(picture, self.new("start.png"))
        shown = self.show(picture)
        self.source = name or path.name
        old: list[Made] = [*self.history.steps.values(), *self.candidates]
        self.candidates, self.chosen = [], None
        step = self.history.start(file, shown, "start", parameters)
        self._drop(old)
        return step

    def picture(self) -> Image.Image:
        """The picture at hand, with its EXIF and profile. Raises InputError without one."""
        return load_image(self.history.current.file, max_pixels=None)

    def show(self, picture: Image.Image, side: int = SHOWN) -> Path:
        """Write a copy to look at, without EXIF and settings; its longer side is at most `side`."""
        return show(picture, self.new("shown.webp"), side)

    def stands_at(self, step: Step) -> bool:
        """Whether a step is the one at hand: its number another one may have, once a picture is dropped."""
        return self.history.at is not None and self.history.current.file == step.file

    def keep(
        self, results: Sequence[Image.Image], drawn: Image.Image | None = None, *, of: Step | None = None
    ) -> bool:
        """Make results the candidates, where `of` is still at hand; their info has what belongs to them.

        drawn: the mask that they were given.
        """
        made = []
        given = None if drawn is None else save_image(drawn, self.new("mask.png"))
        for result in results:
            mask = result.info.get("mask")
            made.append(
                Candidate(
                    file=save_image(result, self.new("result.png")),
                    shown=self.show(result),
                    parameters=result.info.get("parameters", ""),
                    mask=None if mask is None else self.show(mask.convert("RGB")),
                    drawn=given,
                )
            )
        if of is not None and not self.stands_at(of):
            self._drop(made)
            return False
        old, self.candidates, self.chosen = self.candidates, made, 0 if made else None
        self._drop(old)
        return True

    def forget(self) -> None:
        """Be without candidates."""
        old, self.candidates, self.chosen = self.candidates, [], None
        self._drop(old)

    def _drop(self, old: Iterable[Made]) -> None:
        """Delete the files of these, but for those of the steps and candidates that are left."""
        kept: list[Made] = [*self.history.steps.values(), *self.candidates]
        left = {file for made in kept for file in files_of(made)}
        for made in old:
            for file in {*files_of(made)} - left:
                remove(file)
            if made.file in self._downloads:
                remove(self._downloads.pop(made.file))

    def check_space(self) -> None:
        """Raise ResourceError where this browser's pictures take as much as they may."""
        used = 0
        for folder, _, files in os.walk(self.folder()):
            for name in files:
                with contextlib.suppress(FileNotFoundError):  # an action beside this one drops it
                    used += (Path(folder) / name).stat().st_size
        if used >= MOST_BYTES:
            raise ResourceError(
                f"This page's history takes {used / 1e9:.1f} GB; the limit is {MOST_BYTES / 1e9:g}. Download "
                "what you want to keep, then drop a picture to begin anew."
            )

    @contextlib.contextmanager
    def at_work(self) -> Iterator[Path]:
        """While something runs, a folder for what is shown on the way: Gradio copies what it is given."""
        self.running += 1
        try:
            # Beside the session's own, which a picture that is dropped meanwhile may empty.
            with tempfile.TemporaryDirectory(prefix="run-", dir=store()) as place:
                yield Path(place)
        finally:
            self.running -= 1

    def candidate(self) -> Candidate:
        """The candidate that was chosen. Raises InputError without one."""
        if self.chosen is None:
            raise InputError("There is no result yet. Write an instruction and press Edit.")
        return self.candidates[self.chosen]

    def go_on(self) -> Step:
        """Make the chosen candidate the next step, and the picture at hand."""
        chosen = self.candidate()
        step = self.history.add(
            *(chosen.file, chosen.shown, chosen.settings.instruction, chosen.parameters),
            *(chosen.mask, chosen.drawn),
        )
        self._drop(self.history.prune())
        self.forget()
        return step

    def download(self, made: Candidate) -> Path:
        """A file in the format of the picture that was dropped, with its EXIF, profile, mark and settings.

        It is made once a candidate.
        """
        file = self._downloads.get(made.file)
        if file is not None and file.exists():  # Gradio deletes it by age
            return file
        picture = load_image(made.file, max_pixels=None)
        with Image.open(made.file) as kept:  # XMP is not read of what comes in, only of what was made here
            picture.info["xmp"] = kept.info.get("xmp")
        picture.info["parameters"] = made.parameters
        file = save_image(
            picture, for_browser(f"{Path(self.source).stem}-edited{kept_ending(self.source).lower()}")
        )
        self._downloads[made.file] = file
        return file

    def close(self) -> None:
        """Delete all that was kept, but for downloads: they may be on their way."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = None
        self.history = History()
        self.candidates, self.chosen = [], None
        self._downloads.clear()


def files_of(made: Made) -> tuple[Path, ...]:
    return tuple(file for file in (made.file, made.shown, made.mask, made.drawn) if file is not None)


def remove(file: Path) -> None:
    """Delete a file, and its folder if nothing else is there."""
    file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        file.parent.rmdir()


def kept_ending(name: str | Path) -> str:
    """The ending that a result takes over from the file it was made of: of a format that holds its mark."""
    ending = Path(name).suffix
    return ending if WRITES.get(ending.lower()) not in (None, "BMP") else ".png"


def uploaded(path: str | Path) -> bytes:
    """The bytes of a file that was uploaded. Raises InputError for one that is not kept any more."""
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        hours = AGE // 3600
        raise InputError(
            f"The file is gone: uploads are deleted after {hours} hour. Send it again."
        ) from None


def show(picture: Image.Image, path: Path, side: int = SHOWN) -> Path:
    """Write `picture` for a browser, its longer side at most `side`, without anything but its colours."""
    share = min(1.0, side / max(picture.size))
    small = resized(
        picture.convert("RGB"), (max(1, round(picture.width * share)), max(1, round(picture.height * share)))
    )
    profile = {"icc_profile": picture.info["icc_profile"]} if picture.info.get("icc_profile") else {}
    small.save(path, "WEBP", quality=92, **profile)
    return path


def cache() -> Path:
    """What Gradio hands to browsers by address lies here, and is deleted by age."""
    folder = store() / "cache"
    folder.mkdir(exist_ok=True)
    return folder


def for_browser(name: str) -> Path:
    """A path in the cache that nobody can guess, ending as `name` does."""
    place = cache() / secrets.token_hex(16)
    place.mkdir()
    return place / name


@functools.cache
def store() -> Path:
    """The folder of this process for what its page keeps; only its user can enter it; it goes at exit."""
    folder = Path(tempfile.mkdtemp(prefix="ip2p-page-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
