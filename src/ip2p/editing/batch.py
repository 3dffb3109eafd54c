"""Edit many pictures into a folder, batched by size. A batch job can be killed at any point and resumed.

The folder's `ledger` has a line for each result. The names of all results are recorded in it before the
first is written. `run.json` beside it holds the settings, which must be the same on resume.
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

# Extensions of pictures that `mimetypes` does not know. Pictures that cannot be read are listed as failures.
ENDINGS = {".ppm", ".pgm", ".jxl", ".psd", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"}
ENDINGS |= {".avifs", ".cur", ".dds", ".dib", ".icns", ".j2k", ".jp2", ".kra", ".mpo", ".pef", ".qoi", ".srw"}
ENDINGS |= {".tga", ".x3f", ".xcf"}


# --- tasks ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Task:
    """One result: its source picture, its seed, and its path below the job's folder."""

    source: Path
    seed: int
    name: str


def is_batch(words: Sequence[str]) -> bool:
    """Whether the picture arguments of a command line mean a batch job."""
    return len(words) > 1 or any(os.path.isdir(word) or _is_glob(word) for word in words)


def looks_like_picture(path: Path) -> bool:
    """Whether an entry of a folder is a picture: by its extension, or, without one, by its content."""
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

    Subfolders of a folder are not searched; a glob with `**` is recursive. Broken links and folders with the
    name of a picture are included, so that they fail by name; a message lists hidden files, which are not
    included. Raises InputError for an argument without pictures, and for two pictures with the same name.
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
            raise InputError(
                f"{word}: addresses can only be edited one at a time. Download the pictures first."
            )
        else:
            raise images.missing_file(path)
        here = [
            (p, name)
            for p, name in here
            # Skip results of an earlier run. `Path.resolve` fails for circular links.
            if not p.name.startswith(".") and out.resolve() not in Path(os.path.realpath(p)).parents
        ]
        if not here:
            raise InputError(
                f"{word} matches no pictures. Give a folder of pictures, or a glob in quotes: 'photos/*.jpg'."
            )
        for p, name in here:
            found.setdefault(p, name)
    named: dict[str, Path] = {}
    for p, name in found.items():
        # Keep the original extension before .png: another picture may have the name with .png instead.
        name = name if p.suffix.lower() in images.WRITES else f"{name}.png"
        if name in named:
            raise InputError(
                f"{named[name]} and {p} would both be written to {out / name}. Edit them into two folders."
            )
        named[name] = p
    return [(p, name) for name, p in named.items()]


def list_tasks(pictures: Iterable[tuple[Path, str]], seeds: Sequence[int]) -> list[Task]:
    """A task for each picture and seed. Several seeds are written to NAME-1.png, NAME-2.png, …"""
    several = len(seeds) > 1
    tasks = []
    for source, name in pictures:
        stem, dot, ending = name.rpartition(".")
        for k, seed in enumerate(seeds, 1):
            tasks.append(Task(source=source, seed=seed, name=f"{stem}-{k}{dot}{ending}" if several else name))
    return tasks


def _is_glob(word: str) -> bool:
    # The name of an existing file may contain brackets.
    return glob.has_magic(word) and not os.path.exists(word) and not is_url(word)


def _root(pattern: str) -> Path:
    """The folder of a glob above its first wildcard."""
    parts = Path(pattern).parts
    fixed = next(k for k, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:fixed])


# --- the state of a job ---------------------------------------------------------------------------


class BatchJob:
    """A folder of results and its ledger, used by one process at a time. Create one with `open_job`."""

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
        """Whether the result is undamaged and was made from the current version of the source."""
        line = self.ledger.done.get(task.name)
        if line is None:
            return False
        path = self.folder / task.name
        if damage := find_damage(path, None, str(line.get("sha256"))):
            log.warning("%s %s; recreating it", path, damage)
            return False
        return find_damage(task.source, None, str(line.get("source_sha256"))) is None

    def plan(self, tasks: Sequence[Task]) -> None:
        """Record that the files of these results belong to this job."""
        names = [task.name for task in tasks if task.name not in self.planned]
        if names:
            self.ledger.append({"plan": names})
            self.planned |= set(names)


@contextlib.contextmanager
def open_job(config: OverwriteSettings, folder: Path) -> Iterator[BatchJob]:
    """Start a job in `folder`, or resume it. With `overwrite`, start over.

    Raises InputError if another process works on it, if its settings were different (naming the first one),
    or if the folder holds another kind of run.
    """
    make_folder(folder)
    run = folder / RUN
    if run.exists() and not (folder / MANIFEST).exists() and not config.overwrite:
        raise InputError(
            f"{folder} holds another run ({RUN}); choose another folder with -o, or add --overwrite."
        )
    with lock_folder(folder):
        job = BatchJob(folder)
        if run.exists() and not config.overwrite:
            _same_settings(config, run)
        else:
            if config.overwrite or not job.ledger.path.exists():
                job.ledger.replace([])  # before run.json: a folder with run.json alone holds another run
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
            f"{run.parent} was started with {flag} {old}, but it is now {new}; "
            "use the same value, choose another folder with -o, or add --overwrite."
        )


def split_tasks(
    job: BatchJob, tasks: Sequence[Task], jobs: int, *, overwrite: bool
) -> tuple[list[Task], list[Task]]:
    """The finished tasks and the remaining ones. Removes temporary files of a killed run.

    Raises InputError if another file has the name of a result.
    """
    done: list[Task] = []
    todo: list[Task] = []
    with ThreadPoolExecutor(jobs) as pool:
        for task, is_done in zip(tasks, pool.map(job.is_done, tasks), strict=True):
            (done if is_done else todo).append(task)
    # A run that is killed after renaming a file and before writing its line leaves a planned result.
    foreign = [task for task in todo if task.name not in job.planned and (job.folder / task.name).exists()]
    if foreign and not overwrite:
        more = f" (and {len(foreign) - 1} more)" if len(foreign) > 1 else ""
        raise InputError(
            f"{job.folder / foreign[0].name} already exists{more}; add --overwrite, or choose another "
            "folder with -o."
        )
    job.plan(tasks)
    for parent in {(job.folder / task.name).parent for task in todo}:
        remove_temporaries(parent)
    return done, todo


# --- running a job --------------------------------------------------------------------------------


def run_batch(
    job: BatchJob,
    todo: Sequence[Task],
    *,
    edit: Callable[[Sequence[Image.Image], Sequence[int]], Sequence[Image.Image]],
    working_size: Callable[[tuple[int, int]], tuple[int, int]],
    batch_size: int,
    jobs: int,
    max_pixels: int | None,
    on_result: Callable[[Task, Path], object],
) -> dict[Path, str]:
    """Make the results of `todo` and commit each. Returns the errors of pictures that cannot be edited.

    `edit(pictures, seeds)` is called with at most `batch_size` pictures of one working size. Meanwhile `jobs`
    threads read files and `jobs` threads write files. on_result: called for each committed result.
    """
    failed: dict[Path, str] = {}
    readers, writers = (ThreadPoolExecutor(jobs, thread_name_prefix=name) for name in ("read", "write"))
    writing: deque[tuple[Task, Future[Path]]] = deque()

    def settle(most: int) -> None:
        """Report written results, and wait until at most `most` results are still being written."""
        while writing and (len(writing) > most or writing[0][1].done()):
            task, future = writing.popleft()
            on_result(task, future.result())

    def edit_some(some: Sequence[tuple[Task, Image.Image]]) -> None:
        try:
            results = edit([picture for _, picture in some], [task.seed for task, _ in some])
        except InputError as error:
            if len(some) == 1:
                failed[some[0][0].source] = str(error)
                return
            for one in some:  # find the picture that fails
                edit_some([one])
            return
        for (task, _), result in zip(some, results, strict=True):
            writing.append((task, writers.submit(job.commit, task, result)))

    try:
        of_source: dict[Path, list[Task]] = {}
        for task in todo:
            of_source.setdefault(task.source, []).append(task)
        waiting: dict[tuple[int, int], list[tuple[Task, Image.Image]]] = {}
        read = _read_ahead(
            list(of_source),
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
        # Write all computed results, whatever stops the job.
        writers.shutdown()
    return failed


def _read_ahead(
    sources: Sequence[Path], read: Callable[[Path], Image.Image], pool: ThreadPoolExecutor, ahead: int
) -> Iterator[tuple[Path, Future[Image.Image]]]:
    """Each source with the future of its picture, in order; at most `ahead` pictures are in memory."""
    waiting: deque[tuple[Path, Future[Image.Image]]] = deque()
    left = iter(sources)
    while True:
        while len(waiting) < ahead and (source := next(left, None)) is not None:
            waiting.append((source, pool.submit(read, source)))
        if not waiting:
            return
        yield waiting.popleft()
