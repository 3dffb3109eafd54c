"""Edit many pictures into a folder, batched by size. It can be killed at any point and resumed.

The `ledger` of the folder has a line for each result. The names of all results are noted there before the
first is made. `run.json` beside it holds the settings, which must be the same on resume.
"""

from __future__ import annotations

import contextlib
import glob
import json
import logging
import mimetypes
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ip2p.base.errors import InputError, Ip2pError
from ip2p.base.files import checksum, make_folder, remove_temporaries, write_text
from ip2p.base.ledger import MANIFEST, Ledger, find_damage, lock_folder
from ip2p.pictures import images
from ip2p.pictures.address import is_url
from ip2p.settings import OverwriteSettings, first_difference, run_json

RUN = "run.json"
log = logging.getLogger("ip2p")

# Names of pictures that `mimetypes` does not know. Those that are not read are named as failures.
ENDINGS = {".ppm", ".pgm", ".jxl", ".psd", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"}
ENDINGS |= {".avifs", ".cur", ".dds", ".dib", ".icns", ".j2k", ".jp2", ".kra", ".mpo", ".pef", ".qoi", ".srw"}
ENDINGS |= {".tga", ".x3f", ".xcf"}


# --- what is to be done ---------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Task:
    """One result: the picture it is made from, its seed, and its place below the job's folder."""

    source: Path
    seed: int
    name: str


def is_many(words: Sequence[str]) -> bool:
    """Whether the names of pictures on a command line stand for a job of many."""
    return len(words) > 1 or any(os.path.isdir(word) or _is_glob(word) for word in words)


def looks_like_picture(path: Path) -> bool:
    """Whether an entry of a folder is one to edit: by its ending, or, if it has none, by its first bytes."""
    kind, _ = mimetypes.guess_type(path.name)
    if path.suffix.lower() in ENDINGS or (kind or "").startswith("image/"):
        return True
    if path.suffix and kind:
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=images.READS):
                return True
    except Image.DecompressionBombError:
        return True
    except Exception:  # decoders raise anything
        return False


def find_pictures(words: Sequence[str], out: Path) -> list[tuple[Path, str]]:
    """The pictures that files, folders and globs name, each with its name below `out`.

    A folder stands for the pictures in it, not for those in its folders; a glob with `**` goes down. Broken
    links and folders with the name of a picture are among them, to fail by name; hidden files are not, with a
    line that names them. Raises InputError for a word that names none, and for two pictures with one name.
    """
    found: dict[Path, str] = {}
    for word in words:
        path = Path(word)
        if path.is_dir():
            here = [(p, p.name) for p in sorted(path.iterdir()) if looks_like_picture(p)]
            hidden = [name for _, name in here if name.startswith(".")]
            if hidden:
                count = f"{len(hidden)} hidden files" if len(hidden) > 1 else "1 hidden file"
                more = ", …" if len(hidden) > 5 else ""
                left = "are" if len(hidden) > 1 else "is"
                log.info("%s of %s %s left out: %s%s", count, word, left, ", ".join(hidden[:5]), more)
        elif _is_glob(word):
            root = _root(word)
            here = [
                (Path(p), Path(p).relative_to(root).as_posix())
                for p in sorted(glob.glob(word, recursive=True))
                if os.path.isfile(p) or os.path.islink(p)
            ]
        elif path.is_file():
            here = [(path, path.name)]
        elif is_url(word):
            raise InputError(f"{word}: addresses are edited one at a time. Download the pictures first.")
        else:
            raise images.missing_file(path)
        here = [
            (p, name)
            for p, name in here
            # Results of an earlier run are no input. `Path.resolve` fails where links go in a circle.
            if not p.name.startswith(".") and out.resolve() not in Path(os.path.realpath(p)).parents
        ]
        if not here:
            raise InputError(
                f"{word} names no picture. Give a folder of pictures, or a glob in quotes: 'photos/*.jpg'."
            )
        for p, name in here:
            found.setdefault(p, name)
    named: dict[str, Path] = {}
    for p, name in found.items():
        # Another picture may have the name with the written ending, so the own one stays before it.
        name = name if p.suffix.lower() in images.WRITES else f"{name}.png"
        if name in named:
            raise InputError(
                f"{named[name]} and {p} would both be written as {out / name}. Edit them into two folders."
            )
        named[name] = p
    return [(p, name) for name, p in named.items()]


def tasks(pictures: Iterable[tuple[Path, str]], seeds: Sequence[int]) -> list[Task]:
    """A task for each picture and seed; of several seeds, NAME-1.png, NAME-2.png, …"""
    several = len(seeds) > 1
    made = []
    for source, name in pictures:
        stem, dot, ending = name.rpartition(".")
        for k, seed in enumerate(seeds, 1):
            made.append(Task(source=source, seed=seed, name=f"{stem}-{k}{dot}{ending}" if several else name))
    return made


def _is_glob(word: str) -> bool:
    # A file's own name may hold brackets.
    return glob.has_magic(word) and not os.path.exists(word) and not is_url(word)


def _root(pattern: str) -> Path:
    """The folder of a glob above its first wildcard."""
    parts = Path(pattern).parts
    fixed = next(k for k, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:fixed])


# --- what is done already -------------------------------------------------------------------------


class Job:
    """A folder of results and its ledger, held by one process at a time. `open_job` makes one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ledger = Ledger(folder, key="name")
        self.planned = {name for line in self.ledger.lines for name in line.get("plan", ())}

    def commit(self, task: Task, result: Image.Image) -> Path:
        """Write a result, then its line."""
        path = self.folder / task.name
        path.parent.mkdir(parents=True, exist_ok=True)
        images.save_image(result, path)
        line = {"name": task.name, "source": task.source.as_posix(), "seed": task.seed}
        self.ledger.append(line | {"sha256": checksum(path), "source_sha256": checksum(task.source)})
        return path

    def is_done(self, task: Task) -> bool:
        """Whether the result is undamaged and was made from the picture as it is now."""
        line = self.ledger.done.get(task.name)
        if line is None:
            return False
        path = self.folder / task.name
        if damage := find_damage(path, None, str(line.get("sha256"))):
            log.warning("%s %s; it is made again", path, damage)
            return False
        return find_damage(task.source, None, str(line.get("source_sha256"))) is None

    def plan(self, tasks: Sequence[Task]) -> None:
        """Record that the files of these results will be this job's."""
        names = [task.name for task in tasks if task.name not in self.planned]
        if names:
            self.ledger.append({"plan": names})
            self.planned |= set(names)


@contextlib.contextmanager
def open_job(config: OverwriteSettings, folder: Path) -> Iterator[Job]:
    """Begin a job in `folder`, or resume the one in it.

    Raises InputError when another process is at it, when its settings were others (naming the first that
    differs), or when the folder holds a run of another kind. `overwrite` begins again.
    """
    make_folder(folder)
    run = folder / RUN
    if run.exists() and not (folder / MANIFEST).exists() and not config.overwrite:
        raise InputError(
            f"{folder} holds another run ({RUN}); choose another folder with -o, or add --overwrite."
        )
    with lock_folder(folder):
        job = Job(folder)
        if run.exists() and not config.overwrite:
            _same_settings(config, run)
        else:
            if config.overwrite or not job.ledger.path.exists():
                job.ledger.replace([])  # before the settings: alone they are another run's
                job.planned.clear()
            write_text(run, run_json(config))
        yield job


def _same_settings(config: OverwriteSettings, run: Path) -> None:
    try:
        before = json.loads(run.read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"{run} cannot be read; choose another folder with -o, or add --overwrite."
        ) from None
    difference = first_difference(config, before)
    if difference is not None:
        flag, old, new = difference
        raise InputError(
            f"{run.parent} was begun with {flag} {old}, and now it is {new}; "
            "use the same again, choose another folder with -o, or add --overwrite."
        )


def split(job: Job, tasks: Sequence[Task], jobs: int, *, overwrite: bool) -> tuple[list[Task], list[Task]]:
    """The tasks whose results are in the folder, and those to do.

    Raises InputError for a result whose place another file has; half-written files of a killed run go.
    """
    with ThreadPoolExecutor(jobs) as pool:
        there = list(pool.map(job.is_done, tasks))
    done = [task for task, is_there in zip(tasks, there, strict=True) if is_there]
    todo = [task for task, is_there in zip(tasks, there, strict=True) if not is_there]
    # Killed between the renaming and its line, a run leaves a result that was only planned.
    foreign = [task for task in todo if task.name not in job.planned and (job.folder / task.name).exists()]
    if foreign and not overwrite:
        more = f" (and {len(foreign) - 1} more)" if len(foreign) > 1 else ""
        raise InputError(
            f"{job.folder / foreign[0].name} is there already{more}; add --overwrite, or choose another "
            "folder with -o."
        )
    job.plan(tasks)
    for parent in {(job.folder / task.name).parent for task in todo}:
        remove_temporaries(parent)
    return done, todo


# --- doing it -------------------------------------------------------------------------------------


def run(
    job: Job,
    todo: Sequence[Task],
    *,
    edit: Callable[[Sequence[Image.Image], Sequence[int]], Sequence[Image.Image]],
    working_size: Callable[[tuple[int, int]], tuple[int, int]],
    batch_size: int,
    jobs: int,
    max_pixels: int | None,
    made: Callable[[Task, Path], object],
) -> dict[Path, str]:
    """Make the results of `todo` and commit each; the errors of pictures that cannot be edited come back.

    `edit(pictures, seeds)` is called with at most `batch_size` pictures of one working size. Files are read
    and written in `jobs` threads each while it runs. `made` is told of each result that lies in the folder.
    """
    failed: dict[Path, str] = {}
    readers, writers = (ThreadPoolExecutor(jobs, thread_name_prefix=name) for name in ("read", "write"))
    writing: deque[tuple[Task, Future[Path]]] = deque()

    def settle(most: int) -> None:
        """Tell of what is written, and wait until no more than `most` results are not."""
        while writing and (len(writing) > most or writing[0][1].done()):
            task, future = writing.popleft()
            made(task, future.result())

    def edit_some(some: Sequence[tuple[Task, Image.Image]]) -> None:
        try:
            results = edit([picture for _, picture in some], [task.seed for task, _ in some])
        except InputError as error:
            if len(some) == 1:
                failed[some[0][0].source] = str(error)
                return
            for one in some:  # to find out which it is
                edit_some([one])
            return
        for (task, _), result in zip(some, results, strict=True):
            writing.append((task, writers.submit(job.commit, task, result)))

    try:
        sources = list(dict.fromkeys(task.source for task in todo))
        of_source: dict[Path, list[Task]] = {source: [] for source in sources}
        for task in todo:
            of_source[task.source].append(task)
        waiting: dict[tuple[int, int], list[tuple[Task, Image.Image]]] = {}
        read = _read_ahead(
            sources,
            lambda source: images.load_image(source, max_pixels=max_pixels),
            readers,
            batch_size + jobs,
        )
        for source, future in read:
            try:
                picture = future.result()
            except Ip2pError as error:
                failed[source] = str(error)
                continue
            size = working_size(picture.size)
            waiting.setdefault(size, []).extend((task, picture) for task in of_source[source])
            while len(waiting[size]) >= batch_size or sum(map(len, waiting.values())) > 8 * batch_size:
                fullest = max(waiting, key=lambda size: len(waiting[size]))
                edit_some(waiting[fullest][:batch_size])
                del waiting[fullest][:batch_size]
                settle(max(batch_size, jobs))
        for rest in waiting.values():
            for start in range(0, len(rest), batch_size):
                edit_some(rest[start : start + batch_size])
                settle(max(batch_size, jobs))
        settle(0)
    finally:
        readers.shutdown(cancel_futures=True)
        # Whatever stops the job, what is computed is written.
        writers.shutdown()
    return failed


def _read_ahead(
    sources: Sequence[Path], read: Callable[[Path], Image.Image], pool: ThreadPoolExecutor, ahead: int
) -> Iterator[tuple[Path, Future[Image.Image]]]:
    """Each source with its picture to come, in order; at most `ahead` of them are held."""
    waiting: deque[tuple[Path, Future[Image.Image]]] = deque()
    left = iter(sources)
    while True:
        while len(waiting) < ahead and (source := next(left, None)) is not None:
            waiting.append((source, pool.submit(read, source)))
        if not waiting:
            return
        yield waiting.popleft()
