"""`ip2p synth instruct` asks a real `transformers serve`, which is killed half-way and started again.

Every caption must get an answer: a triple, or so many refusals that it has none. Needs
`pip install 'transformers[serving]'`.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.common import ENVIRONMENT, PATIENCE, Process, free_port, must, serving
from benchmarks.crash.targets import CAPTIONS

AWAY = 3.0  # seconds for which the server is gone
COUNT = 40  # captions


def kill_server(root: Path) -> Iterator[str]:
    import pyarrow.parquet as pq

    from ip2p.base import jobs
    from ip2p.cli.main import main
    from ip2p.synth.records import read_triples

    captions, port, shards = CAPTIONS[:COUNT], free_port(), root / "served.parts"
    (root / "some-captions.txt").write_text("".join(f"{caption}\n" for caption in captions))
    tool = Path(sys.executable).with_name("transformers")
    serve = [str(tool if tool.exists() else shutil.which("transformers")), "serve", str(root / "lm")]
    serve += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    start = partial(
        serving, serve, f"http://127.0.0.1:{port}/health", root / "server.txt", env=dict(ENVIRONMENT)
    )
    # One request a second leaves time for the kill. `transformers serve` applies a frequency penalty to the
    # prompt's tokens too, and a small model then cannot copy its caption: hence the 0.
    words = [
        *("synth", "instruct", str(root / "some-captions.txt"), "-o", str(root / "served.parquet")),
        *("--server", f"http://127.0.0.1:{port}/v1", "--model", str(root / "lm")),
        *("--patience", str(PATIENCE), "--rate", "1", "--frequency-penalty", "0"),
    ]

    def progress() -> float:
        """The share of shards that are committed."""
        with contextlib.suppress(FileNotFoundError, IndexError):
            rows = [json.loads(line) for line in (shards / "manifest.jsonl").read_text().splitlines()]
            return sum("part" in row for row in rows) / float(rows[0]["job"]["parts"])
        return 0.0

    with start() as process:
        command = Process(partial(main, words), root / "instruct.txt")
        command.wait_for(lambda: progress() >= 0.5, "half of the captions")
        process.kill()
    killed_at = progress()
    must(command.poll() is None, "the command had ended before the server was killed")
    time.sleep(AWAY)
    must(command.poll() is None, f"it gave up: {command.messages()[-600:]}")
    with start():
        command.finish()
    counts = jobs.summary(shards).counts
    triples = read_triples(root / "served.parquet")
    tables = jobs.committed(shards, "rejected/rejected")
    refused = [row for path in tables for row in pq.read_table(path).to_pylist()]
    have = {triple.caption for triple in triples}
    without = {row["caption"] for row in refused} - have
    must(have | without == set(captions), f"{len(set(captions) - have - without)} captions have no answer")
    must(counts["captions"] == len(captions), f"{counts['captions']} captions were counted")
    must(counts["retries"] >= 1, "nothing was asked again, so that the kill tried nothing")
    reasons = ", ".join(
        f"{name} {count}" for name, count in Counter(r["reason"] for r in refused).most_common()
    )
    yield (
        f"server: HOLDS. killed with {killed_at:.0%} written; {len(captions)} captions answered, {len(have)} "
        f"with {len(triples)} triples; refused: {reasons or 'none'}; {counts['retries']:.0f} requests "
        "sent again"
    )
