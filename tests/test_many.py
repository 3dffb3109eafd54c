"""Batch edits: which pictures are found, how results are committed, and how a killed run resumes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ip2p.base.errors import InputError, ResourceError, Terminated, as_ip2p_error
from ip2p.cli.edit import EditConfig
from ip2p.editing import batch

pytestmark = pytest.mark.usefixtures("here")


def save_pages(folder: Path, names: list[str], seed: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    numbers = np.random.default_rng(seed)
    for k, name in enumerate(names):
        size = [(64, 64), (96, 64), (64, 96)][k % 3]
        noise = Image.fromarray(numbers.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize(size)
        noise.convert("CMYK" if name.startswith("cmyk") else "RGB").save(folder / name)


def mixed_folder(folder: Path) -> list[str]:
    """Write 35 pictures of four formats and three sizes, 5 broken ones, a text; return the broken names."""
    endings = ["png", "jpg", "webp", "bmp", "JPG"]
    save_pages(folder, [f"page-{k:02}.{endings[k % 5]}" for k in range(34)] + ["cmyk.jpg"])
    (folder / "b-empty.png").write_bytes(b"")
    (folder / "b-html.png").write_text("<!doctype html><html></html>")
    (folder / "b-cut.jpg").write_bytes((folder / "page-01.jpg").read_bytes()[:300])
    Image.new("RGB", (200, 15)).save(folder / "b-strip.png")
    frames = [Image.new("RGB", (32, 32), color) for color in ("red", "blue")]
    frames[0].save(folder / "b-moving.gif", save_all=True, append_images=frames[1:])
    (folder / "notes.txt").write_text("not a picture, and not called one")
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("b-"))


def manifest(folder: Path) -> list[dict[str, object]]:
    """The lines of results, without those of plans."""
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    return [row for row in rows if "plan" not in row]


# --- finding pictures -----------------------------------------------------------------------------


def found(*words: str, out: str = "out") -> dict[str, str]:
    return {name: path.as_posix() for path, name in batch.find_pictures(words, Path(out))}


def test_folders_globs_and_files_are_found() -> None:
    save_pages(Path("a"), ["x.png", "y.JPG", "z.gif", ".hidden.png"])
    save_pages(Path("a/deep"), ["w.webp"])
    Path("a/notes.txt").write_text("no")
    assert found("a") == {"x.png": "a/x.png", "y.JPG": "a/y.JPG", "z.gif.png": "a/z.gif"}
    assert found("a/*.png") == {"x.png": "a/x.png"}
    assert found("a/**/*.webp", "a/x.png") == {"deep/w.webp": "a/deep/w.webp", "x.png": "a/x.png"}
    assert found("a/x.png", "a") == found("a")  # no duplicates


def test_results_of_an_earlier_run_are_not_inputs() -> None:
    save_pages(Path("a"), ["x.png"])
    save_pages(Path("a/out"), ["x.png"])
    assert found("a/**/*.png", out="a/out") == {"x.png": "a/x.png"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["none"], "none: no such file"),
        (["a/*.webp"], "a/*.webp matches no pictures"),
        (["empty"], "empty matches no pictures"),
        (["a/x.png", "b/x.png"], "would both be written to out/x.png"),
    ],
)
def test_arguments_without_pictures_or_with_clashing_names_are_refused(words: list[str], said: str) -> None:
    save_pages(Path("a"), ["x.png"])
    save_pages(Path("b"), ["x.png"])
    Path("empty").mkdir()
    with pytest.raises(InputError) as caught:
        found(*words)
    assert said in str(caught.value)


def test_a_single_picture_is_not_a_batch() -> None:
    save_pages(Path("a"), ["x[1].png"])
    assert not batch.is_batch(["a/x[1].png"])
    assert not batch.is_batch(["a/none.png"])
    assert batch.is_batch(["a"]) and batch.is_batch(["a/*.png"]) and batch.is_batch(["a/x.png", "a/y.png"])


def test_several_seeds_give_numbered_names() -> None:
    [one] = batch.list_tasks([(Path("x.png"), "x.png")], [5])
    two = batch.list_tasks([(Path("x.png"), "deep/x.y.png")], [5, 6])
    assert (one.name, one.seed) == ("x.png", 5)
    assert [(task.name, task.seed) for task in two] == [("deep/x.y-1.png", 5), ("deep/x.y-2.png", 6)]


# --- the job --------------------------------------------------------------------------------------


def invert(pictures, seeds):
    return [Image.eval(picture, lambda level: 255 - level) for picture in pictures]


def do(config: EditConfig, *, edit=invert, batch_size: int = 4, jobs: int = 2) -> tuple[list[str], dict]:
    """Run a job of `config` with `edit` as its network; return the names written and the errors."""
    made: list[str] = []
    with batch.open_job(config, config.out) as job:
        tasks = batch.list_tasks(batch.find_pictures([config.image], config.out), range(config.count))
        _, todo = batch.split_tasks(job, tasks, jobs, overwrite=config.overwrite)
        failed = batch.run_batch(
            job,
            todo,
            edit=edit,
            working_size=lambda size: size,
            batch_size=batch_size,
            jobs=jobs,
            max_pixels=None,
            on_result=lambda task, path: made.append(task.name),
        )
    return made, failed


CONFIG = EditConfig(image="pages", instruction="make it night", out=Path("out"))


def test_batches_hold_pictures_of_one_size_up_to_the_batch_size() -> None:
    save_pages(Path("pages"), [f"{k:02}.png" for k in range(10)])
    batches = []

    def edit(pictures, seeds):
        batches.append([picture.size for picture in pictures])
        return invert(pictures, seeds)

    made, failed = do(CONFIG, edit=edit, batch_size=3)
    assert len(made) == 10 and not failed
    assert all(len(set(sizes)) == 1 and len(sizes) <= 3 for sizes in batches)
    assert sum(len(sizes) == 3 for sizes in batches) == 3  # of 4, 3 and 3 pictures of a size


def test_a_second_run_makes_only_what_is_new_changed_or_damaged() -> None:
    save_pages(Path("pages"), ["a.png", "b.png", "c.png", "d.png"])
    assert sorted(do(CONFIG)[0]) == ["a.png", "b.png", "c.png", "d.png"]
    assert do(CONFIG)[0] == []
    Path("out/a.png").write_bytes(Path("out/a.png").read_bytes()[:-20])  # truncated
    Path("out/b.png").unlink()
    save_pages(Path("pages"), ["c.png"], seed=1)  # now a different picture
    save_pages(Path("pages"), ["e.png"], seed=2)
    assert sorted(do(CONFIG)[0]) == ["a.png", "b.png", "c.png", "e.png"]
    assert do(CONFIG)[0] == []


def test_a_changed_setting_is_refused_by_name_unless_overwritten() -> None:
    save_pages(Path("pages"), ["a.png"])
    do(CONFIG)
    changed = [
        ({"steps": 30}, "--steps not given, but it is now 30"),
        ({"instruction": "make it day"}, 'instruction "make it night", but it is now "make it day"'),
        ({"cfg_interval": (0.2, 0.9)}, "--cfg-interval not given, but it is now [0.2, 0.9]"),
        ({"text_cfg": 3.0}, "--text-cfg not given, but it is now 3.0"),
    ]
    for fields, message in changed:
        with pytest.raises(InputError) as caught:
            do(EditConfig(**{**vars(CONFIG), **fields}))
        assert message in str(caught.value) and "--overwrite" in str(caught.value)
    assert do(EditConfig(**{**vars(CONFIG), "jobs": 1, "batch_size": 1}))[0] == []  # affect only the speed
    assert do(EditConfig(**{**vars(CONFIG), "steps": 30, "overwrite": True}))[0] == ["a.png"]
    assert do(EditConfig(**{**vars(CONFIG), "steps": 30}))[0] == []


def test_other_files_are_not_overwritten() -> None:
    save_pages(Path("pages"), ["a.png", "b.png"])
    Path("out").mkdir()
    Path("out/b.png").write_bytes(b"mine")
    with pytest.raises(InputError, match="out/b.png already exists; add --overwrite"):
        do(CONFIG)
    assert Path("out/b.png").read_bytes() == b"mine" and not Path("out/a.png").exists()
    Path("other").mkdir()
    Path("other/run.json").write_text("{}")
    with pytest.raises(InputError, match="holds another run"):
        do(EditConfig(**{**vars(CONFIG), "out": Path("other")}))
    Path("out/b.png").unlink()
    do(CONFIG)
    save_pages(Path("pages"), ["c.png"])
    Path("out/c.png").write_bytes(b"mine")  # on a resumed run too
    with pytest.raises(InputError, match="out/c.png already exists; add --overwrite"):
        do(CONFIG)


def test_a_result_without_a_manifest_line_is_made_again() -> None:
    save_pages(Path("pages"), ["a.bmp", "b.bmp"])  # a format without room for settings
    do(CONFIG)
    text = Path("out/manifest.jsonl").read_text()
    Path("out/manifest.jsonl").write_text("".join(text.splitlines(keepends=True)[:-1]))  # last line missing
    assert do(CONFIG)[0] == [json.loads(text.splitlines()[-1])["name"]]


@pytest.mark.skipif(sys.platform == "win32", reason="needs fcntl")
def test_a_second_job_in_the_same_folder_is_refused() -> None:
    save_pages(Path("pages"), ["a.png"])
    with (
        batch.open_job(CONFIG, CONFIG.out),
        pytest.raises(InputError, match="another ip2p process is writing to out"),
    ):
        do(CONFIG)


def test_a_partially_written_manifest_line_does_not_count() -> None:
    save_pages(Path("pages"), ["a.png", "b.png"])
    do(CONFIG)
    text = Path("out/manifest.jsonl").read_text()
    Path("out/manifest.jsonl").write_text(text[:-30])  # killed while it was written
    assert do(CONFIG)[0] == [json.loads(text.splitlines()[-1])["name"]]
    assert sorted(row["name"] for row in manifest(Path("out"))) == ["a.png", "b.png"]


def test_an_error_of_the_network_is_reported_for_its_picture_only() -> None:
    save_pages(Path("pages"), ["a.png", "b.png", "c.png", "d.png", "e.png", "f.png", "g.png"])
    bad = Image.open("pages/d.png").tobytes()

    def edit(pictures, seeds):
        if any(picture.tobytes() == bad for picture in pictures):
            raise InputError("no such luck")
        return invert(pictures, seeds)

    made, failed = do(CONFIG, edit=edit)
    assert failed == {Path("pages/d.png"): "no such luck"}
    assert len(made) == 6


@pytest.mark.parametrize("stop", [KeyboardInterrupt, Terminated])
def test_computed_results_are_written_when_the_job_is_stopped(stop: type[BaseException]) -> None:
    save_pages(Path("pages"), [f"{k}.png" for k in range(6)])
    computed = []

    def edit(pictures, seeds):
        if len(computed) == 4:
            raise stop
        computed.append(pictures)
        return invert(pictures, seeds)

    with pytest.raises(stop):
        do(CONFIG, edit=edit, batch_size=1)
    assert len(manifest(Path("out"))) == 4
    assert len(do(CONFIG)[0]) == 2


def test_a_full_disk_stops_the_job_and_keeps_earlier_results(monkeypatch: pytest.MonkeyPatch) -> None:
    save_pages(Path("pages"), [f"{k}.png" for k in range(6)])
    save, calls = Image.Image.save, []

    def full(self, *args, **options):
        calls.append(args)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")
        return save(self, *args, **options)

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left") as caught:
        patched.setattr(Image.Image, "save", full)
        do(CONFIG, batch_size=1, jobs=1)
    assert isinstance(as_ip2p_error(caught.value), ResourceError)
    before = {row["name"] for row in manifest(Path("out"))}
    assert len(before) == 2 and sorted(before | set(do(CONFIG)[0])) == [f"{k}.png" for k in range(6)]
    assert not [name for name in os.listdir("out") if name.startswith(".")]


# --- kills ----------------------------------------------------------------------------------------

# A job whose network takes 20 ms and that logs the name of each result before committing it.
SLOW_JOB = """
import sys, time
from pathlib import Path
sys.path[:0] = [sys.argv[1]]
from test_many import CONFIG, do, invert
from ip2p.pictures import images
from ip2p.editing import batch

commit = batch.BatchJob.commit
def said(self, task, result):
    with open("computed.log", "a") as log:
        log.write(task.name + "\\n")
    return commit(self, task, result)
batch.BatchJob.commit = said

def edit(pictures, seeds):
    time.sleep(0.02)
    return invert(pictures, seeds)

do(CONFIG, edit=edit, batch_size=2)
print("finished", flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_repeatedly_killed_job_loses_no_result_and_commits_none_twice() -> None:
    names = [f"{k:02}.png" for k in range(24)]
    save_pages(Path("pages"), names)
    clock = random.Random(0)
    command = [sys.executable, "-c", SLOW_JOB, str(Path(__file__).parent)]
    kills = 0
    for _ in range(30):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            if kills < 6:
                rows = Path("out/manifest.jsonl")
                start = rows.stat().st_size if rows.exists() else 0
                while process.poll() is None and (not rows.exists() or rows.stat().st_size == start):
                    time.sleep(0.002)  # until it starts writing
                time.sleep(clock.uniform(0, 0.03))
                process.send_signal(signal.SIGKILL)
            out, err = process.communicate(timeout=60)
        if out:
            break
        assert process.returncode == -signal.SIGKILL, err
        kills += 1
    assert kills >= 3
    rows = [str(row["name"]) for row in manifest(Path("out"))]
    assert sorted(rows) == names  # none lost, none committed twice
    assert sorted(path.name for path in Path("out").iterdir()) == sorted(
        [*names, "manifest.jsonl", "run.json"]
    )
    # At most the pictures in flight at a kill are computed twice: the current batch and pending writes.
    computed = Path("computed.log").read_text().split()
    assert len(computed) - len(names) <= kills * (2 + 2 + 2)
    for name in names:
        assert batch.checksum(Path("out") / name) in Path("out/manifest.jsonl").read_text()


# The whole program with the tiny model. It logs the pictures given to the network; the 20th kills it.
EDIT_AND_DIE = """
import hashlib, os, signal, sys
from ip2p.cli import main as cli
from ip2p.editing.editor import Editor

edit_batch, given = Editor.edit_batch, []
def noted(self, pictures, *args, **settings):
    for picture in pictures:
        given.append(hashlib.sha256(picture.tobytes()).hexdigest())
        with open("computed.log", "a") as log:
            log.write(given[-1] + "\\n")
    if len(given) >= 20 and sys.argv[1] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return edit_batch(self, pictures, *args, **settings)
Editor.edit_batch = noted
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_forty_files_with_five_broken_ones_are_resumed_after_a_kill(here: Path, tiny_model_dir: Path) -> None:
    broken = mixed_folder(here / "photos")
    words = ["edit", "photos", "make it night", "-o", "out", "--steps", "1", "--dtype", "fp32"]
    words += ["--model", str(tiny_model_dir), "--batch-size", "2"]

    def run(how: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", EDIT_AND_DIE, how, *words], capture_output=True, text=True
        )

    assert run("die").returncode == -signal.SIGKILL
    committed = manifest(here / "out")
    assert 14 <= len(committed) < 20
    before = {row["name"]: (here / "out" / str(row["name"])).stat().st_mtime_ns for row in committed}
    first = (here / "computed.log").read_text().split()
    (here / "computed.log").unlink()

    resumed = run("live")
    assert resumed.returncode == 2
    second = (here / "computed.log").read_text().split()
    # The last pair was in flight, and so may be pending writes.
    assert len(set(first) & set(second)) <= 2 + 2 + 2
    assert len(second) == len(set(second)) == 35 - len(committed)
    results = [path for path in (here / "out").iterdir() if path.suffix not in (".json", ".jsonl")]
    assert len(results) == 35
    assert len(resumed.stdout.split()) == 35 - len(committed)
    assert all((here / "out" / name).stat().st_mtime_ns == when for name, when in before.items())
    lines = resumed.stderr.splitlines()
    assert len([line for line in lines if line.startswith("ip2p: error: ")]) == 5
    assert all(f"photos/{name}" in resumed.stderr for name in broken)
    assert lines[-1] == "ip2p: 5 of 40 pictures could not be edited; the other results are in out."
    assert "Traceback" not in resumed.stderr
    for path in results:
        source = (
            here / "photos" / (path.name if path.name[-4:] != ".png" or "bmp" not in path.name else path.stem)
        )
        with Image.open(source) as picture, Image.open(path) as result:
            assert result.size == picture.size
