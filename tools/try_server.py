"""Let `ip2p synth instruct` ask a real `transformers serve`, kill the server half-way, and start it again.

    python tools/try_server.py                          # 40 captions, a language model made in seconds
    python tools/try_server.py --lm writer --captions 100

The server is killed (kill -9) when half of the captions are written, and started again after some seconds.
Every caption must come out answered: with a triple, or refused so often that it has none; what was refused is
told by reason. The exit code is 1 when that does not hold. Needs `pip install 'transformers[serving]'`.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from crash_synth import CAPTIONS, lines_of, write_lm
from crash_train import PATIENCE, Failed, must

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
AWAY = 3.0  # seconds for which the server is gone


@contextlib.contextmanager
def serving(model: Path, port: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`transformers serve`, once it answers; killed at the end."""
    tool = shutil.which("transformers", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    must(tool, "transformers is not here: pip install 'transformers[serving]'")
    words = [str(tool), "serve", str(model), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with open(log, "ab") as told:
        process = subprocess.Popen(words, env=os.environ | ENVIRONMENT, stdout=told, stderr=told)
    try:
        until = time.monotonic() + PATIENCE
        while not answers(port):
            must(process.poll() is None, f"the server ended: {log.read_text()[-600:]}")
            must(time.monotonic() < until, "the server does not answer")
            time.sleep(0.1)
        yield process
    finally:
        process.kill()
        process.wait()


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def free_port() -> int:
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return int(own.getsockname()[1])


def instruct(root: Path, model: Path, port: int, more: list[str]) -> subprocess.Popen[str]:
    words = [
        *(sys.executable, "-m", "ip2p", "synth", "instruct", str(root / "captions.txt")),
        *("-o", str(root / "triples.parquet"), "--server", f"http://127.0.0.1:{port}/v1"),
        *("--model", str(model), "--patience", str(PATIENCE), *more),
    ]
    print("$", " ".join(["ip2p", *words[3:]]), flush=True)
    return subprocess.Popen(
        words, env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def parts_of(root: Path) -> int:
    return sum("part" in row for row in lines_of(root / "triples.parts"))


def run(root: Path, model: Path, captions: list[str], more: list[str]) -> None:
    import pyarrow.parquet as pq

    from ip2p.base import jobs
    from ip2p.synth.records import read_triples

    (root / "captions.txt").write_text("".join(f"{caption}\n" for caption in captions))
    port = free_port()
    with serving(model, port, root / "server.txt"):
        command = instruct(root, model, port, more)
        while not (head := lines_of(root / "triples.parts")) or parts_of(root) < head[0]["job"]["parts"] / 2:
            if command.poll() is not None:
                raise Failed(f"it ended early: {command.communicate()[1][-600:]}")
            time.sleep(0.02)
        before = parts_of(root)
    print(f"killed the server with {before} of {head[0]['job']['parts']} parts written", flush=True)
    must(command.poll() is None, "the command had ended before the server was killed")
    time.sleep(AWAY)
    if command.poll() is not None:
        raise Failed(f"it gave up: {command.communicate()[1][-600:]}")
    with serving(model, port, root / "server.txt"):
        _, errors = command.communicate(timeout=PATIENCE)
    print(errors, end="", flush=True)
    must(command.returncode == 0, f"exit {command.returncode}")
    counts = jobs.summary(root / "triples.parts").counts
    triples = read_triples(root / "triples.parquet")
    refused = [
        row
        for path in jobs.committed(root / "triples.parts", "rejected/rejected")
        for row in pq.read_table(path).to_pylist()
    ]
    have = {triple.caption for triple in triples}
    without = {row["caption"] for row in refused} - have
    must(have | without == set(captions), f"{len(set(captions) - have - without)} captions have no answer")
    must(counts["captions"] == len(captions), f"{counts['captions']} captions were counted")
    must(counts["retries"] >= 1, "nothing was asked again, so that the kill tried nothing")
    reasons = Counter(row["reason"] for row in refused)
    told = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common()) or "none"
    print(
        f"HOLDS: {len(captions)} captions answered, {len(have)} with {len(triples)} triples, {len(without)} "
        f"without; refused: {told}; {counts['retries']:.0f} requests were sent again"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--captions", type=int, default=40)
    parser.add_argument("--lm", type=Path, help="a language model's folder; default: one made here")
    parser.add_argument("--folder", type=Path, help="where all is written; default: the system's")
    asked, more = parser.parse_known_args()
    # One a second, so that there is a half of the way to kill it at. And `transformers serve` takes the
    # frequency penalty as one of repetition, of the prompt's tokens too: a small model, which has to copy its
    # caption, then cannot.
    more = more or ["--rate", "1", "--frequency-penalty", "0"]
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        root = Path(name)
        if asked.lm is None:
            write_lm(root / "lm")
        captions = list(itertools.islice(CAPTIONS, asked.captions))
        try:
            run(root, (asked.lm or root / "lm").absolute(), captions, more)
        except Failed as error:
            print(f"FAILS: {error}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
