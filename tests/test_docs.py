"""The commands in README.md and the guides run as written; those that cannot run here are parsed.

Each page's `sh` blocks run in order in one folder with examples/ and the files that a reader would have.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from ip2p.cli import main as cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
QUICKSTART = "## Quick start"

# Lines that contain one of these do not run here. They are parsed, to check that their options exist.
NOT_RUN = {
    "timbrooks/": "downloads a model or a data set",
    "stable-diffusion-v1-5/": "downloads a model",
    "osunlp/": "downloads a data set",
    "Qwen/": "downloads a language model",
    "--server": "needs a language-model server",
    "-o figure-8": "edits with twelve variants; tests/evaluation run them",
    "--judge": "needs a vision-model server",
    "--ray": "needs a Ray cluster",
    "ip2p ui": "serves until it is stopped; tests/serve runs it",
    "ip2p serve": "serves until it is stopped; tests/serve runs it",
    "ip2p train": "takes long; tests/train run it",
    "ip2p distill": "takes long; tests/train run it",
    "--model fast": "uses a model that the page's distillation makes",
    "--preset cpu": "trains for hours",
    "ip2p storybook score": "takes minutes; tests/storybook run it",
    "--model editor": "uses a model that the page's training makes",
    "--model thatch": "uses a model that the page's training makes",
    "--model writer": "uses a language model that the page's training makes",
    "--count 1000": "draws a thousand pages, which takes a minute",
    "--size 768": "takes the bundled model, whose size is 64, a minute",
    "laion.parquet": "uses a data set of many captions",
    "photos-pairs": "uses a data set of the reader's",
}
# Not ip2p commands: installation, network, several machines.
OTHERS = ("make ", "pip install", ". .venv", "transformers serve", "ray start", "accelerate launch")
OTHERS += ("recipes/", "MACHINES=")


def blocks(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return [
        re.sub(r"(?m)^ +", "", block) for block in re.findall(r"^ *```sh\n(.*?)^ *```", text, re.M | re.S)
    ]


def commands(page: Path) -> list[str]:
    """The lines of a page's blocks, with continued lines joined and without comments."""
    lines = "\n".join(blocks(page)).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def reason_not_to_run(line: str) -> str | None:
    return next((reason for word, reason in NOT_RUN.items() if word in line), None)


def words_of(line: str) -> list[str]:
    """The arguments of an ip2p command, also after `accelerate launch`."""
    words = shlex.split(line, comments=True)
    start = words.index("-m") + 1 if "-m" in words else 0
    return words[start + 1 :] if words[start] == "ip2p" else []


def check_options(words: list[str]) -> None:
    """Raise the command line's error if it refuses `words`."""
    verb = next((verb for verb in cli.VERBS if words[: len(verb.split())] == verb.split()), None)
    assert verb is not None, f"no such verb: {words}"
    config = cli.parse(verb, words[len(verb.split()) :])
    if hasattr(config, "check"):
        config.check()


def create_files(folder: Path, *, pairs: bool = True) -> None:
    """Create examples/, recipes/, and the files that a reader would have."""
    for name in ("examples", "recipes"):
        shutil.copytree(ROOT / name, folder / name)
    page = folder / "examples" / "page-1.png"
    shutil.copy(page, folder / "page.png")
    picture = Image.open(page).convert("RGB").resize((96, 64))
    (folder / "photos" / "more").mkdir(parents=True)
    for name in ("photo.jpg", "a.png", "b.jpg", "c.webp", "photos/1.jpg", "photos/more/2.jpg"):
        picture.save(folder / name)
    mask = Image.new("L", picture.size)
    mask.paste(255, (30, 20, 60, 50))
    mask.save(folder / "car.png")
    if not pairs:
        return
    words = ["storybook", "draw", "--count", "6", "--size", "64", "--seed", "1"]
    (folder / "pairs").mkdir()
    assert cli.main([*words, "--pairs", str(folder / "pairs" / "train.parquet")]) == 0


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IP2P_STEPS", "2")
    monkeypatch.setenv("IP2P_DTYPE", "fp32")
    return tmp_path


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=lambda page: page.name)
@pytest.mark.timeout(900)
def test_the_commands_of_a_page_run_as_written(page, folder):
    create_files(folder, pairs="-o pairs" not in " ".join(commands(page)))
    for line in commands(page):
        if line.startswith(OTHERS) and not words_of(line):
            continue
        words = words_of(line)
        assert words, f"neither a command of ip2p nor in OTHERS: {line}"
        if reason_not_to_run(line):
            check_options(words)
        else:
            assert cli.main(words) == 0, line


def test_the_first_quick_start_command_runs_in_a_shell(folder, monkeypatch):
    create_files(folder, pairs=False)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    [block, *_] = re.findall(r"```sh\n(.*?)```", text[text.index(QUICKSTART) :], re.S)
    (folder / "bin").mkdir()
    program = folder / "bin" / "ip2p"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m ip2p "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    first = block.splitlines()[0]
    process = subprocess.run(["sh", "-ec", first], cwd=folder, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert (folder / "night.png").exists()


def test_the_demo_runs(monkeypatch, tmp_path, capsys):
    from examples import demo

    shutil.copy(ROOT / "examples/page-1.png", tmp_path)
    (tmp_path / "pages.json").write_text('[{"page": "page-1.png", "instructions": ["make it night"]}]')
    monkeypatch.setattr(demo, "EXAMPLES", tmp_path)
    monkeypatch.setattr(demo, "RESULTS", tmp_path / "demo")
    demo.main()
    with Image.open(tmp_path / "demo" / "contact-sheet.png") as sheet:
        assert sheet.width > 2 * 64
    assert capsys.readouterr().out.startswith("The bundled model edits drawn storybook pages.")


def test_every_entry_of_not_run_and_others_matches_a_command():
    lines = [line for page in PAGES for line in commands(page)]
    assert [word for word in NOT_RUN if not any(word in line for line in lines)] == []
    assert [word for word in OTHERS if not any(line.startswith(word) for line in lines)] == []


class Assets(HTMLParser):
    """External URLs that a page loads; links to other pages do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if (
                tag != "a"
                and name in ("src", "href", "srcset", "data")
                and re.match("(https?:)?//", value or "")
            ):
                self.found.add(value)


def test_the_site_builds_strictly_and_loads_nothing_from_the_network(tmp_path):
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(tmp_path / "site"),
    ]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 15
    assets = Assets()
    for page in pages:
        assets.feed(page.read_text(encoding="utf-8"))
    assert assets.found == set()
    for sheet in (tmp_path / "site").rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*['\"]?https?:", sheet.read_text(encoding="utf-8")), sheet


def test_a_broken_link_fails_the_build(tmp_path):
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    (tmp_path / "src").symlink_to(ROOT / "src")
    with open(tmp_path / "docs" / "index.md", "a") as page:
        page.write("\n[nowhere](no-such-page.md)\n")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode != 0 and "no-such-page.md" in process.stderr
