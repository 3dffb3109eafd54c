"""What one browser has at hand: its picture, its candidates, its history, all in a folder of its own."""

from __future__ import annotations

import atexit
import functools
import secrets
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from ip2p.errors import InputError
from ip2p.images import WRITES, load_image, resized, save_image
from ip2p.infotext import Settings, parse_infotext, read_infotext
from ip2p.serve.history import History, Step

SHOWN = 1024  # the longer side of what the page shows; files for download have every pixel
BROWSER_READS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One result of an edit, on disk: a PNG to go on from, and a copy to look at."""

    file: Path
    shown: Path
    parameters: str
    mask: Path | None = None

    @property
    def settings(self) -> Settings:
        return parse_infotext(self.parameters)


@dataclass(kw_only=True)
class Session:
    """A browser's own state. Nothing in it is shared, and its folder goes when it does.

    source: the name of the picture dropped, whose ending a download takes. jobs: the ids of what runs for it;
    stops: how often that was stopped. cells: the infotext of each cell of the matrix.
    """

    history: History = field(default_factory=History)
    candidates: list[Candidate] = field(default_factory=list)
    chosen: int | None = None
    source: str = "picture.png"
    cells: dict[int, str] = field(default_factory=dict)
    stops: int = 0
    jobs: set[str] = field(default_factory=set)
    _folder: Path | None = None

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
        picture = load_image(path.read_bytes(), max_pixels=max_pixels)
        parameters = ""
        if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"):
            parameters = read_infotext(path) or ""
        file = save_image(picture, self.new("start.png"))
        self.source = name or path.name
        self.candidates, self.chosen = [], None
        return self.history.start(file, self.show(picture), "start", parameters)

    def picture(self) -> Image.Image:
        """The picture at hand, with its EXIF and profile. Raises InputError without one."""
        return load_image(self.history.current.file, max_pixels=None)

    def show(self, picture: Image.Image, side: int = SHOWN) -> Path:
        """Write a copy to look at, without EXIF and settings; its longer side is at most `side`."""
        return show(picture, self.new("shown.webp"), side)

    def keep(self, results: Sequence[Image.Image]) -> None:
        """Make results the candidates; their info has what belongs to them."""
        made = []
        for result in results:
            mask = result.info.get("mask")
            made.append(
                Candidate(
                    file=save_image(result, self.new("result.png")),
                    shown=self.show(result),
                    parameters=result.info.get("parameters", ""),
                    mask=None if mask is None else self.show(mask.convert("RGB")),
                )
            )
        self.candidates, self.chosen = made, 0 if made else None

    def candidate(self) -> Candidate:
        """The candidate that was chosen. Raises InputError without one."""
        if self.chosen is None:
            raise InputError("There is no result yet. Write an instruction and press Edit.")
        return self.candidates[self.chosen]

    def go_on(self) -> Step:
        """Make the chosen candidate the next step, and the picture at hand."""
        chosen = self.candidate()
        step = self.history.add(
            chosen.file, chosen.shown, chosen.settings.instruction, chosen.parameters, chosen.mask
        )
        for old in self.history.prune():
            for file in filter(None, (old.file, old.shown, old.mask)):
                file.unlink(missing_ok=True)
        self.candidates, self.chosen = [], None
        return step

    def download(self, file: Path, parameters: str) -> Path:
        """A file in the format of the picture that was dropped, with its EXIF, profile and settings."""
        name = Path(self.source)
        suffix = name.suffix.lower() if name.suffix.lower() in WRITES else ".png"
        picture = load_image(file, max_pixels=None)
        if parameters:
            picture.info["parameters"] = parameters
        return save_image(picture, for_browser(f"{name.stem}-edited{suffix}"))

    def close(self) -> None:
        """Delete all that was kept."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = None
        self.history = History()
        self.candidates, self.chosen = [], None


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
