"""The `ip2p synth` commands on small models: what they write, how they resume, and what they refuse."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_clip, make_model
from PIL import Image

from ip2p.base import jobs
from ip2p.base.cluster import Cluster
from ip2p.base.errors import InputError, ModelError
from ip2p.cli import main as cli
from ip2p.cli import synth as maker
from ip2p.data.loading import open_source
from ip2p.models import bundle
from ip2p.pictures.images import load_image
from ip2p.synth import instruct as instructing
from ip2p.synth import records, stages, workers
from ip2p.synth.filter import KEPT, PRESETS, SIMILARITIES, clips_of, preset_for
from ip2p.synth.instruct import Answer, Ask, LocalWriter
from ip2p.synth.records import Triple, read_triples, triple_id, write_triples
from ip2p.synth.safety import Classifier
from ip2p.synth.server import server_key
from ip2p.synth.settings import PAIRS, PAIRS_AS_PAPER, PAIRS_STORYBOOK, SynthInstructConfig, SynthPairsConfig
from ip2p.synth.tune import new_lm, tune_lm

CHANGES = (("cat", "dog"), ("hill", "lake"), ("boat", "kite"), ("tree", "rock"))
TRIPLES = [
    Triple(
        id=triple_id(f"a red {one}", 0),
        caption=f"a red {one}",
        instruction=f"make it a {other}",
        edited_caption=f"a red {other}",
        source="writer",
        kind="part",
    )
    for one, other in CHANGES
]
ANY = ("--image", "-1", "--caption", "-1", "--directional", "-1")  # the scores of a random CLIP mean nothing
FEW = ("--steps", "2", "--enough", "2", "--round-size", "2", "--most", "4")
GREEDY = ("--temperature", "0", "--frequency-penalty", "0", "--max-tokens", "30")
HERE = ("--workers", "1", "--dtype", "fp32", "--device", "cpu")


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    """A language model that has memorized the triples."""
    folder = tmp_path_factory.mktemp("lm")
    texts = [text for t in TRIPLES for text in (t.caption, t.instruction, t.edited_caption)]
    new_lm(texts, folder / "base", vocabulary=320, width=64, layers=2, heads=2, context=64)
    tuning = {"epochs": 110, "batch": 4, "rate": 1e-2}
    tune_lm(folder / "base", folder / "writer", TRIPLES, **tuning, backend="plain", device="cpu")
    return folder / "writer"


@pytest.fixture(scope="module")
def painter(tmp_path_factory):
    """A random Stable Diffusion with its own random CLIP."""
    folder = make_model(tmp_path_factory.mktemp("models") / "painter", in_channels=4)
    make_clip(folder / "clip")
    return folder


@pytest.fixture
def captions(here):
    (here / "captions.txt").write_text("".join(triple.caption + "\n" for triple in TRIPLES))
    return here / "captions.txt"


@pytest.fixture
def triples(here, monkeypatch):
    """Triples in three parts."""
    monkeypatch.setattr(maker, "TRIPLES_A_PART", 2)
    many = [
        *TRIPLES,
        Triple(id="5", caption="a fox", instruction="make it snow", edited_caption="a fox in snow"),
    ]
    write_triples(here / "triples.parquet", many)
    return here / "triples.parquet"


def ip2p(*words: object) -> int:
    return cli.main([str(word) for word in words])


def rows(folder: Path):
    return [row for path in jobs.committed(folder, KEPT) for row in pq.read_table(path).to_pylist()]


def pixels(row, name):
    return np.asarray(load_image(row[name]["bytes"])).astype(int)


def assert_same(actual, expected, *, tolerance: int = 0) -> None:
    """Check for equal rows: pictures up to `tolerance` levels, and scores up to what that can cause."""
    assert [row["id"] for row in actual] == [row["id"] for row in expected] and actual
    for one, two in zip(actual, expected, strict=True):
        for name in one:
            if name in SIMILARITIES:
                assert one[name] == pytest.approx(two[name], abs=1e-6 + 0.01 * tolerance)
            elif name.endswith("_image"):
                assert np.abs(pixels(one, name) - pixels(two, name)).max() <= tolerance
            else:
                assert one[name] == two[name]


def draw(triples, painter, out, *more, code=0):
    words = ("synth", "pairs", triples, "-o", out, "--model", painter, *HERE, *FEW)
    extra = [str(word) for word in more]
    kept = list(words)
    for flag in [word for word in extra if word.startswith("--")]:
        if flag in kept:  # a flag of the caller replaces ours
            place = kept.index(flag)
            del kept[place : place + 2]
    assert ip2p(*kept, *extra) == code
    return out


# --- end to end -----------------------------------------------------------------------------------


def test_captions_become_a_data_set_that_hf_datasets_loads(captions, lm, painter, here, capsys):
    assert ip2p("synth", "instruct", captions, "-o", "triples.parquet", "--model", lm, *GREEDY, *HERE) == 0
    captured = capsys.readouterr()
    assert captured.out == "triples.parquet\n"
    assert "4 triples of 4 captions; 0 captions have none" in captured.err
    assert read_triples(Path("triples.parquet")) == TRIPLES

    draw("triples.parquet", painter, "pairs", *ANY, "--license", "CC0-1.0")
    captured = capsys.readouterr()
    assert captured.out == "pairs\n"
    assert (
        "8 pairs are kept of 8 candidates" in captured.err
        and "8 pictures through the network" in captured.err
    )
    pairs = rows(Path("pairs"))
    assert [row["triple_id"] for row in pairs] == [triple.id for triple in TRIPLES for _ in range(2)]
    for row in pairs:
        candidate = records.candidate(
            next(triple for triple in TRIPLES if triple.id == row["triple_id"]), row["candidate"]
        )
        assert row["id"] == candidate.id and row["seed"] == candidate.seed
        assert (row["p2p_threshold"], row["cfg_scale"]) == (candidate.p, candidate.scale)
        assert (row["model"], row["clip"], row["license"]) == ("painter", "painter", "CC0-1.0")

    assert ip2p("synth", "filter", "pairs", "-o", "kept", "--top", "1", *ANY) == 0
    captured = capsys.readouterr()
    assert captured.out == "kept\n" and "pairs kept" in captured.err
    best = {}
    for row in pairs:
        best[row["triple_id"]] = max(best.get(row["triple_id"], row), row, key=lambda r: r["clip_sim_dir"])
    assert {row["id"] for row in rows(Path("kept"))} == {row["id"] for row in best.values()}

    source = open_source("kept")
    assert len(source) == 4 and source[0].instruction == "make it a dog"
    datasets = pytest.importorskip("datasets")
    files = [str(path) for path in sorted(Path("kept/data").iterdir())]
    loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(here / "cache"))
    assert loaded[0]["original_image"].size == (64, 64)
    assert {"original_prompt", "edit_prompt", "edited_prompt", "clip_sim_dir"} <= set(loaded.column_names)

    for data, out in (("pairs", "pairs.html"), ("kept", "kept.html")):
        assert ip2p("synth", "inspect", data, "-o", out, "--each", "2", "--side", "32") == 0
        page = Path(out).read_text()
        # Also for a filtered data set: removed pairs are shown with the kept ones.
        assert re.search(r"of 8 pairs kept", page) and "<img src=" in page
    assert "the edit already has enough better pairs" in Path("kept.html").read_text()

    for folder in ("pairs", "kept", "triples.parts"):
        assert json.loads((Path(folder) / "run.json").read_text())["settings"]["out"]


def test_repeating_a_finished_command_does_nothing(captions, triples, lm, painter, here, monkeypatch, capsys):
    calls = (
        ("synth", "instruct", captions, "-o", "t.parquet", "--model", lm, *GREEDY, *HERE),
        ("synth", "pairs", triples, "-o", "pairs", "--model", painter, *HERE, *FEW, *ANY),
        ("synth", "filter", "pairs", "-o", "kept", *ANY),
    )
    for words in calls:
        assert ip2p(*words) == 0
    first = capsys.readouterr()

    def contents():
        paths = sorted(path for path in here.rglob("*") if path.is_file())
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}

    before = contents()
    for stage in (LocalWriter, stages.PairStage):
        monkeypatch.setattr(stage, "__call__", None)
        monkeypatch.setattr(stage, "__init__", None)
    for words in calls:
        assert ip2p(*words) == 0
    again = capsys.readouterr()
    after = contents()
    assert {path: data for path, (data, _) in after.items()} == {p: data for p, (data, _) in before.items()}
    assert all(after[path] == before[path] for path in before if path.suffix == ".parquet")
    assert first.out == again.out
    # The counts of all runs are printed again.
    for line in ("4 triples of 4 captions", "pairs are kept of"):
        assert line in again.err


# --- stopped and resumed --------------------------------------------------------------------------


def test_a_failed_job_resumes_and_writes_the_same_pairs(triples, painter, here, monkeypatch, capsys):
    expected = rows(draw(triples, painter, Path("whole"), *ANY))
    make, seen = stages.PairStage.__call__, []

    def fails(self, part):
        seen.append([triple.id for triple in part])
        if len(seen) == 2:
            raise ModelError("the model is gone")
        return make(self, part)

    monkeypatch.setattr(stages.PairStage, "__call__", fails)
    draw(triples, painter, "pairs", *ANY, code=3)
    assert "the model is gone" in capsys.readouterr().err
    assert 0 < len(rows(Path("pairs"))) < len(expected)
    for verb in ("filter", "inspect"):
        words = ("-o", "kept") if verb == "filter" else ()
        assert ip2p("synth", verb, "pairs", *words) == 2
        assert "is not finished" in capsys.readouterr().err
    draw(triples, painter, "pairs", *ANY)
    assert_same(rows(Path("pairs")), expected)
    assert seen[2:] == [*seen[1:2], [triple.id for triple in read_triples(triples)[4:]]]
    first, second = (jobs.summary(Path(folder)).counts for folder in ("whole", "pairs"))
    assert first == second


KILLED = """
import sys, time
from ip2p.cli import main as cli, synth as maker
from ip2p.synth import stages
maker.TRIPLES_A_PART = 2
make, parts = stages.PairStage.__call__, []
def slow(self, part):
    parts.append(part)
    if len(parts) == 2:
        print("second", flush=True)
        time.sleep(60)
    return make(self, part)
stages.PairStage.__call__ = slow
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_killed_process_leaves_complete_parts_and_resumes_to_the_same_pairs(triples, painter, here):
    expected = rows(draw(triples, painter, Path("whole"), *ANY))
    words = ["synth", "pairs", triples, "-o", "pairs", "--model", painter, *HERE, *FEW, *ANY]
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, *map(str, words)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    try:
        assert child.stdout.readline() == "second\n"
        child.send_signal(signal.SIGKILL)
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    assert len(rows(Path("pairs"))) == 4 and jobs.damaged(Path("pairs")) == []
    draw(triples, painter, "pairs", *ANY)
    assert_same(rows(Path("pairs")), expected)


def test_settings_that_affect_the_result_cannot_change_on_resume(
    triples, painter, captions, lm, here, capsys
):
    draw(triples, painter, "pairs", *ANY)
    capsys.readouterr()
    for flags, message in (
        (("--steps", "3"), "started with steps 2, but it is now 3"),
        (("--p", "0.2", "0.3"), r"started with p [0.1, 0.9]"),
        (("--scale", "2", "3"), r"started with scale [7.5, 15.0]"),
        (("--image", "0.5"), "started with image -1.0, but it is now 0.5"),
        (("--keep", "all"), 'started with keep "passed"'),
        (("--count", "2"), "started with content of the triples"),
    ):
        draw(triples, painter, "pairs", *ANY, *flags, code=2)
        line = capsys.readouterr().err.splitlines()[-1]
        assert message in line and "add --overwrite" in line
    # How fast and where it runs may change.
    draw(triples, painter, "pairs", *ANY, "--batch-size", "1", "--threads", "1")
    draw(triples, painter, "pairs", *ANY, "--steps", "1", "--overwrite")
    assert json.loads(Path("pairs/run.json").read_text())["settings"]["steps"] == 1
    words = ("synth", "instruct", captions, "-o", "t", "--model", lm, *GREEDY, *HERE)
    assert ip2p(*words) == 0 and ip2p(*words, "--edits", "2") == 2
    assert "started with edits 1, but it is now 2" in capsys.readouterr().err


def test_a_changed_model_folder_is_noticed(triples, painter, here, capsys, tmp_path_factory):
    import shutil

    model = shutil.copytree(painter, tmp_path_factory.mktemp("own") / "painter")
    draw(triples, model, "pairs", *ANY)
    (model / "unet" / "config.json").write_text((model / "unet" / "config.json").read_text() + " ")
    draw(triples, model, "pairs", *ANY, code=2)
    assert "started with content of --model" in capsys.readouterr().err


# --- pairs ----------------------------------------------------------------------------------------


def test_pairs_do_not_depend_on_the_batch_size_or_the_part_size(triples, painter, here, monkeypatch):
    expected = rows(draw(triples, painter, Path("whole"), *ANY, "--batch-size", "8"))
    assert_same(rows(draw(triples, painter, Path("one"), *ANY, "--batch-size", "1")), expected, tolerance=1)
    # Without the monkeypatch: parts of 8.
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert_same(rows(draw(triples, painter, Path("parts"), *ANY)), expected, tolerance=1)


def test_a_prompt_is_drawn_until_enough_pass_and_keep_all_keeps_every_candidate(triples, painter, here):
    drawn = rows(draw(triples, painter, Path("all"), "--keep", "all", "--directional", "0.01", *ANY[:4]))
    thresholds = {"clip_sim_image": -1, "clip_sim_0": -1, "clip_sim_1": -1, "clip_sim_dir": 0.01}
    passing = [row["id"] for row in drawn if all(row[name] >= value for name, value in thresholds.items())]
    assert 0 < len(passing) < len(drawn)
    kept = rows(draw(triples, painter, Path("kept"), "--directional", "0.01", *ANY[:4]))
    assert [row["id"] for row in kept] == passing
    summary = jobs.summary(Path("kept"))
    assert summary.counts["candidates"] == summary.counts["made"] == len(drawn)
    assert summary.counts["passed"] == len(passing) == summary.rows[KEPT]
    assert summary.counts["evaluations"] == len(drawn) * 2 * 2 * 2  # pictures, guidance branches, steps
    ends = [summary.counts[f"prompts_{end}"] for end in ("enough", "hopeless", "most")]
    assert sum(ends) == summary.counts["prompts"] == 5
    # Recomputed for each triple: two at a time, until two pass or four are drawn.
    for triple in read_triples(triples):
        passed = [row["id"] in passing for row in drawn if row["triple_id"] == triple.id]
        assert len(passed) == (2 if sum(passed[:2]) == 2 else len(passed)) and len(passed) in (2, 3, 4)
    without = {triple.id for triple in read_triples(triples)} - {row["triple_id"] for row in kept}
    assert summary.counts["prompts_none"] == len(without)


def test_each_shortcut_saves_work(triples, painter, here, tmp_path_factory):
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    tiny = tmp_path_factory.mktemp("tiny")
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    ).save_pretrained(tiny)

    def counts(*flags, code=0):
        out = here / str(len(list(here.iterdir())))
        draw(triples, painter, out, "--count", "2", "--most", "4", *flags, code=code)
        return jobs.summary(out).counts, rows(out)

    plain, kept = counts(*ANY, "--enough", "0")
    assert plain["candidates"] == 8 and plain["evaluations"] == 8 * 8
    shared, rows_shared = counts(*ANY, "--enough", "0", "--p-per-source", "2")
    assert shared["evaluations"] == 8 * 8 * 3 / 4 and shared["decoded"] == 12
    assert rows_shared[0]["seed"] == rows_shared[1]["seed"] != rows_shared[2]["seed"]
    # All scores are below a threshold that nothing reaches, even with the margin.
    unreachable = ("--image", "1", "--caption", "1", "--directional", "1", "--keep", "all")
    early, _ = counts(*unreachable, "--early-at", "0.5", "--early-margin", "0.1", code=2)
    assert early["early"] == early["candidates"] == 8 and early["evaluations"] == 8 * 4
    late, _ = counts(*unreachable, "--early-at", "0.5", "--early-margin", "2")
    assert late["early"] == 0 and late["evaluations"] == 8 * 8
    hopeless, _ = counts(*unreachable, "--worth", "0.9", "--risk", "0.05")
    assert hopeless["prompts_hopeless"] == 2 and hopeless["candidates"] == 4
    kept_ids = [row["id"] for row in kept]
    previewed, previewed_rows = counts(*ANY, "--enough", "0", "--tiny-vae", str(tiny))
    assert previewed["previewed"] == 16 and [row["id"] for row in previewed_rows] == kept_ids


def test_as_paper_turns_off_all_shortcuts_and_refuses_contradicting_flags(here, capsys):
    how = SynthPairsConfig(as_paper=True).how()
    assert how == PAIRS_AS_PAPER and how["most"] == how["steps"] == 100
    assert not how["enough"] and not how["risk"] and not how["early_at"] and how["tiny_vae"] is None
    for flags in (("--enough", "4"), ("--steps", "20"), ("--sampler", "euler"), ("--most", "32")):
        assert ip2p("synth", "pairs", "t.parquet", "-o", "p", "--as-paper", *flags) == 2
        line = capsys.readouterr().err
        assert (
            line == f"ip2p: {flags[0]} {flags[1]} is not the paper's; leave out {flags[0]} or --as-paper.\n"
        )
    assert SynthPairsConfig(triples="t", out=Path("p"), as_paper=True, most=100, enough=0).check() is None

    # The help texts state the defaults, which come from one table.
    def said(value: object) -> str:
        if isinstance(value, tuple):
            return " ".join(map(said, value))
        return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)

    for name, value in PAIRS.items():
        description = SynthPairsConfig.model_fields[name].description
        own = PAIRS_STORYBOOK[name]
        assert description.endswith(
            f"default: {said(value)}" + (f", storybook {said(own)}" if own != value else "")
        )


def test_the_storybook_model_has_its_own_scale_and_thresholds(painter, triples, here, tmp_path_factory):
    import shutil

    model = shutil.copytree(painter, tmp_path_factory.mktemp("book") / "book")
    (model / "ip2p.json").write_text('{"name": "storybook"}')
    draw(triples, model, "pairs", "--keep", "all", "--count", "1")
    [first, *_] = rows(Path("pairs"))
    assert 3 <= first["cfg_scale"] < 5 and (first["model"], first["clip"]) == ("book", "storybook")
    assert (
        json.loads(Path("pairs/run.json").read_text())["thresholds"]["directional"]
        == PRESETS["storybook"].directional
    )
    assert clips_of(open_source("pairs")) == {"storybook"}
    assert preset_for({"storybook", ""}) == "storybook"
    assert preset_for(()) == preset_for({"storybook", "other"}) == "paper"


def test_truncated_captions_are_reported_once(painter, here, capsys):
    long_caption = " ".join(["cat"] * 90)
    long_triples = [
        Triple(
            id=str(n), caption=f"{long_caption} {n}", instruction="make it red", edited_caption="a red cat"
        )
        for n in range(3)
    ]
    write_triples(here / "t.parquet", long_triples)
    draw("t.parquet", painter, "pairs", *ANY, "--steps", "1")
    stderr = capsys.readouterr().err
    assert "3 triples have a caption that is longer than the model reads" in stderr
    assert stderr.count("longer") == 1


def test_a_triples_job_is_read_like_a_file_and_an_unfinished_one_is_refused(
    captions, lm, painter, here, monkeypatch, capsys
):
    words = ("synth", "instruct", captions, "-o", "triples", "--model", lm, *GREEDY, *HERE)
    monkeypatch.setattr(maker, "CAPTIONS_A_PART", (2, 2))
    make, parts = stages.InstructStage.__call__, []

    def stopped(self, part):
        parts.append(part)
        if len(parts) == 2:
            raise KeyboardInterrupt
        return make(self, part)

    monkeypatch.setattr(stages.InstructStage, "__call__", stopped)
    assert ip2p(*words) == 130
    draw("triples", painter, "pairs", code=2)
    assert "triples is not finished" in capsys.readouterr().err
    assert ip2p(*words) == 0 and read_triples(Path("triples")) == TRIPLES
    assert len(parts) == 3
    draw("triples", painter, "pairs", *ANY, "--steps", "1", "--most", "1", "--round-size", "1")
    assert len(rows(Path("pairs"))) == 4


# --- instructions ---------------------------------------------------------------------------------


def test_refusals_are_counted_over_all_runs_and_having_no_triple_is_an_error(
    captions, lm, here, monkeypatch, capsys
):
    script = {TRIPLES[0].caption: "nonsense", TRIPLES[1].caption: f"nothing\n%%\n{TRIPLES[1].caption}"}

    def answer(self, asks):
        return [Answer(text=script.get(ask.caption, "make it\n%%\na red " + ask.caption)) for ask in asks]

    monkeypatch.setattr(LocalWriter, "__call__", answer)
    words = ("synth", "instruct", captions, "--model", lm, "--retries", "1", *HERE)
    for _ in range(2):
        assert ip2p(*words, "-o", "t.parquet") == 0
        stderr = capsys.readouterr().err
        assert "2 triples of 4 captions; 2 captions have none" in stderr
        assert "4 answers were refused: unparsable 2, unchanged 2" in stderr
    table = pq.read_table(next(Path("t.parts/rejected").iterdir()))
    assert sorted(table["reason"].to_pylist()) == ["unchanged"] * 2 + ["unparsable"] * 2
    script |= {triple.caption: "nonsense" for triple in TRIPLES}
    assert ip2p(*words, "-o", "none.parquet") == 2
    assert "no answer was taken of 4 captions" in capsys.readouterr().err
    assert not Path("none.parquet").exists()


def test_a_damaged_output_file_is_rewritten_and_another_file_is_not_overwritten(captions, lm, here, capsys):
    words = ("synth", "instruct", captions, "-o", "t.parquet", "--model", lm, *GREEDY, *HERE)
    Path("t.parquet").write_bytes(b"somebody's")
    assert ip2p(*words) == 2 and "t.parquet already exists" in capsys.readouterr().err
    assert Path("t.parquet").read_bytes() == b"somebody's" and not Path("t.parts").exists()
    assert ip2p(*words, "--overwrite") == 0
    # Killed between the last part and the file, or truncated since.
    for harm in (Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:50])):
        harm(Path("t.parquet"))
        assert ip2p(*words) == 0 and read_triples(Path("t.parquet")) == TRIPLES
    # Shortened by the user on purpose.
    write_triples(Path("t.parquet"), TRIPLES[:2])
    assert ip2p(*words) == 2 and "t.parquet was changed after it was written" in capsys.readouterr().err
    assert read_triples(Path("t.parquet")) == TRIPLES[:2]
    assert ip2p(*words, "--overwrite") == 0 and read_triples(Path("t.parquet")) == TRIPLES


class Server:
    """A stand-in for `ServerWriter._post` that fails after `until` requests."""

    def __init__(self, until):
        self.requests, self.until, self.keys = 0, until, set()

    def __call__(self, writer, path, body):
        from ip2p.synth import server

        self.keys.add(writer._key)
        self.requests += 1
        if self.requests > self.until:
            raise server._Passing("connection refused", None)
        [triple] = [t for t in TRIPLES if t.caption in body["prompt"]]
        text = f"{triple.instruction}\n%%\n{triple.edited_caption}"
        usage = {"prompt_tokens": 10, "completion_tokens": 5}
        return {"choices": [{"text": text, "finish_reason": "stop"}], "usage": usage}


def test_a_lost_server_repeats_no_request_and_the_key_is_not_written(captions, here, monkeypatch, capsys):
    monkeypatch.setattr(maker, "CAPTIONS_A_PART", (2, 2))
    monkeypatch.setenv("MY_KEY", "sk-secret")
    words = ("synth", "instruct", captions, "-o", "t.parquet", "--server", "http://localhost:1/v1")
    words += ("--model", "tuned", "--together", "1", "--patience", "0.01", "--price", "1", "2")
    words += ("--key-variable", "MY_KEY")
    server = Server(until=2)
    monkeypatch.setattr("ip2p.synth.server.ServerWriter._post", lambda *given: server(*given))
    assert ip2p(*words) == 3
    assert "it resumes" in capsys.readouterr().err
    assert len(jobs.committed(Path("t.parts"), KEPT)) == 1 and not Path("t.parquet").exists()
    server.requests, server.until = 0, 99
    assert ip2p(*words) == 0
    assert server.requests == 2 and server.keys == {"sk-secret"}
    stderr = capsys.readouterr().err
    assert "4 answers, 0 retries, 40 tokens in, 20 out, cost 0.0001" in stderr
    assert [t.edited_caption for t in read_triples(Path("t.parquet"))] == [t.edited_caption for t in TRIPLES]
    assert "sk-secret" not in "".join(path.read_text("latin-1") for path in here.rglob("*") if path.is_file())
    assert "sk-secret" not in repr(
        maker._writer(
            SynthInstructConfig(server="http://localhost:1/v1", model="tuned", key_variable="MY_KEY")
        )
    )


@pytest.mark.parametrize(
    ("variables", "named", "key"),
    [
        ({}, None, ""),
        ({"OPENAI_API_KEY": "a"}, None, "a"),
        ({"OPENAI_API_KEY": "a", "IP2P_API_KEY": "b"}, None, "b"),
        ({"OPENAI_API_KEY": "a", "MINE": "c"}, "MINE", "c"),
    ],
)
def test_the_key_of_a_server_comes_from_the_environment(here, monkeypatch, variables, named, key):
    for name in ("OPENAI_API_KEY", "IP2P_API_KEY", "MINE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert server_key(named) == key


def test_the_packaged_language_model_is_the_default(
    here, lm, captions, monkeypatch, capsys, tmp_path_factory
):
    import shutil

    book = tmp_path_factory.mktemp("models") / "storybook"
    monkeypatch.setattr(bundle, "PACKAGED", book.parent)
    book.mkdir()
    (book / "model_index.json").write_text("{}")
    words = ("synth", "instruct", captions, "-o", "t.parquet", *GREEDY, *HERE)
    assert ip2p(*words) == 3
    assert f"{book / 'lm'} is not a language model" in capsys.readouterr().err
    shutil.copytree(lm, book / "lm")
    assert ip2p(*words) == 0
    assert {triple.source for triple in read_triples(Path("t.parquet"))} == {"storybook"}


def test_the_config_defaults_are_those_of_the_papers_code(here):
    config = SynthInstructConfig()
    assert config.temperature == instructing.TEMPERATURE and config.max_tokens == instructing.MAX_TOKENS
    assert config.frequency_penalty == 0.1 and config.retries == 3
    assert SynthPairsConfig().p == records.P


def test_small_jobs_have_enough_parts_to_show_progress(here):
    assert [maker.part_size(n) for n in (1, 100, 200, 1000, 10**6)] == [8, 8, 13, 63, 64]


# --- tuning ---------------------------------------------------------------------------------------


def test_a_model_is_tuned_on_triples_and_writes_instructions(captions, lm, here, capsys):
    write_triples(here / "own.parquet", TRIPLES)
    words = ("synth", "tune-lm", "--base", lm, "-o", "mine", "--triples", "own.parquet", "--backend", "plain")
    words += ("--epochs", "1", "--batch", "4", "--rate", "1e-5", "--device", "cpu")
    assert ip2p(*words) == 0
    captured = capsys.readouterr()
    assert captured.out == "mine\n" and "--model mine" in captured.err
    assert json.loads(Path("mine/run.json").read_text())["steps"] == 1
    assert ip2p(*words) == 2 and "mine is there already" in capsys.readouterr().err
    assert ip2p(*words, "--overwrite") == 0
    writer = LocalWriter("mine", device="cpu", dtype="fp32", temperature=0, max_tokens=30)
    assert writer([Ask(caption="a red cat")])[0].text == "make it a dog\n%%\na red dog"


# --- filter and inspect ---------------------------------------------------------------------------


def noise(seed: int) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((64, 64))


@pytest.fixture
def unmeasured(here):
    """A table of pairs without scores, one of them broken."""
    lines = ["before,after,instruction,caption,edited_caption"]
    for k in range(4):
        for name in ("b", "a"):
            noise(2 * k + (name == "a")).save(here / f"{name}{k}.png")
        lines.append(f"b{k}.png,a{k}.png,make it {k},a cat,a dog {k}")
    (here / "a3.png").write_bytes(b"no picture")
    (here / "pairs.csv").write_text("\n".join(lines) + "\n")
    return here / "pairs.csv"


def test_filter_scores_any_data_set(unmeasured, tiny_clip_dir, here, capsys):
    words = ("synth", "filter", unmeasured, "--clip", tiny_clip_dir, "--keep", "all")
    assert ip2p("synth", "inspect", unmeasured) == 2
    assert "has no scores; measure them" in capsys.readouterr().err
    assert ip2p(*words, "-o", "scored") == 0
    scored = rows(Path("scored"))
    assert len(scored) == 3 and {row["clip"] for row in scored} == {"clip"}
    assert all(-1 <= row[name] <= 1 for row in scored for name in SIMILARITIES)
    assert ip2p("synth", "inspect", "scored", "-o", "scored.html") == 0
    page = Path("scored.html").read_text()
    assert "of 4 pairs kept" in page and "unreadable picture" in page
    # Without the input, only the kept pairs are shown.
    unmeasured.unlink()
    capsys.readouterr()
    assert ip2p("synth", "inspect", "scored", "-o", "alone.html") == 0
    assert "only what stays is shown" in capsys.readouterr().err
    assert "of 3 pairs kept" in Path("alone.html").read_text()


def test_filter_refuses_to_write_into_its_input_and_reports_when_nothing_is_kept(
    painter, triples, unmeasured, tiny_clip_dir, here, capsys
):
    draw(triples, painter, "pairs", "--keep", "all")
    before = {path: path.read_bytes() for path in Path("pairs").rglob("*") if path.is_file()}
    for data, out in (("pairs", "pairs"), ("pairs", "./pairs/../pairs"), ("pairs/data", "pairs")):
        for more in ((), ("--overwrite",)):
            assert ip2p("synth", "filter", data, "-o", out, *more, *ANY) == 2
            assert "are one in the other" in capsys.readouterr().err
    assert ip2p("synth", "filter", "pairs", "-o", "pairs/kept", *ANY) == 2
    assert {path: path.read_bytes() for path in Path("pairs").rglob("*") if path.is_file()} == before
    # The output folder of another command is not restarted.
    words = ("synth", "filter", unmeasured, "--clip", tiny_clip_dir)
    assert ip2p(*words, "-o", "pairs", "--overwrite") == 2
    assert "contains the output of another command" in capsys.readouterr().err
    assert ip2p(*words, "-o", "none", "--directional", "1") == 2
    assert "no pair of" in capsys.readouterr().err
    assert ip2p("synth", "inspect", "none", "-o", "none.html") == 0
    assert "<b>0</b> of 4 pairs kept" in Path("none.html").read_text()
    assert ip2p("synth", "inspect", "none", "-o", "two.html", "--count", "2") == 0
    assert "<b>0</b> of 2 pairs kept" in Path("two.html").read_text()


def test_without_a_clip_model_the_papers_clip_is_named(unmeasured, here, capsys):
    assert ip2p("synth", "filter", unmeasured, "-o", "kept") == 3
    assert "openai/clip-vit-large-patch14" in capsys.readouterr().err


def test_thresholds_come_from_the_preset_or_the_flags(painter, triples, here, capsys):
    draw(triples, painter, "pairs", "--keep", "all", "--directional", "-1")
    all_rows = rows(Path("pairs"))
    for flags, thresholds in (
        (("--preset", "code"), PRESETS["code"]),
        (("--preset", "auto"), PRESETS["paper"]),
        (("--image", "0.1", "--caption", "-1", "--directional", "0"), None),
    ):
        out = Path(flags[1])
        code = ip2p("synth", "filter", "pairs", "-o", out, "--top", "0", "--near-bits", "-1", *flags)
        assert code == (0 if rows(out) else 2)
        passes = (
            thresholds.passes
            if thresholds
            else (lambda row: row["clip_sim_image"] >= 0.1 and row["clip_sim_dir"] >= 0)
        )
        assert [row["id"] for row in rows(out)] == [row["id"] for row in all_rows if passes(row)]
        assert ip2p("synth", "inspect", out, "-o", f"{out}.html") == 0
        # The page uses the filter's settings.
        assert f"<b>{len(rows(out))}</b> of {len(all_rows)} pairs kept" in Path(f"{out}.html").read_text()


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("safety") / "classifier"
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=16,
        id2label={0: "normal", 1: "NSFW"},
        label2id={"normal": 0, "NSFW": 1},
    )
    model = ViTForImageClassification(config).eval()
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    with torch.inference_mode():
        seen = processor([noise(seed) for seed in range(6)], return_tensors="pt")["pixel_values"]
        # Shift the bias so that it calls half of them unsafe.
        model.classifier.bias -= model(seen).logits.median(dim=0).values
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_pairs_that_a_classifier_calls_unsafe_are_removed(
    unmeasured, classifier, tiny_clip_dir, here, capsys
):
    pictures = [load_image((here / f"{name}{k}.png").read_bytes()) for k in range(3) for name in "ba"]
    safe = Classifier(str(classifier))(pictures)
    assert set(safe) == {True, False}
    words = ("synth", "filter", unmeasured, "-o", "kept", "--clip", tiny_clip_dir, *ANY)
    assert ip2p(*words, "--safety", classifier) == 0
    kept_edits = [f"make it {k}" for k in range(3) if safe[2 * k] and safe[2 * k + 1]]
    assert [row["edit_prompt"] for row in rows(Path("kept"))] == kept_edits
    assert f"unsafe {3 - len(kept_edits)}" in capsys.readouterr().err


def test_a_classifier_without_a_label_for_unsafe_is_refused(classifier, here, tmp_path_factory):
    import shutil

    other = shutil.copytree(classifier, tmp_path_factory.mktemp("other") / "other")
    config = json.loads((other / "config.json").read_text())
    config |= {"id2label": {"0": "cat", "1": "not nsfw"}, "label2id": {"cat": 0, "not nsfw": 1}}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="has no label for unsafe pictures. Its labels: cat, not nsfw"):
        Classifier(str(other))
    with pytest.raises(ModelError, match="no such model"):
        Classifier("nowhere")


# --- where it runs --------------------------------------------------------------------------------


def test_the_address_after_ray_is_optional(here):
    def ray(*words):
        return cli.parse("synth pairs", words).ray

    assert ray("t.parquet", "-o", "p") is None
    assert ray("t.parquet", "-o", "p", "--ray") == ray("--ray", "t.parquet", "-o", "p") == ""
    for address in ("auto", "10.0.0.1:6379", "head:6379", "ray://head:10001", "[::1]:6379"):
        assert ray("--ray", address, "t.parquet", "-o", "p") == address
    assert cli.parse("synth pairs", ["--ray", "t.parquet", "-o", "p"]).triples == "t.parquet"
    assert cli.parse("train", ["--ray", "2"]).ray == 2


def test_small_models_use_every_core_with_one_thread_each(here, painter, monkeypatch):
    monkeypatch.setattr(workers, "_cores", lambda: 3)

    def options(weights=painter, **settings):
        return workers.worker_options(SynthPairsConfig(**settings), weights, device="cpu")

    assert options() == {"processes": 3, "threads": 1}
    assert options(workers=1) == {"processes": 1, "threads": 1}
    assert options(threads=2) == {"processes": 3, "threads": 2}
    assert options(None) == {"processes": 1, "threads": None}
    assert options(None, workers=2) == {"processes": 2, "threads": 1}
    monkeypatch.setattr(workers, "SMALL", 1000)
    assert options() == {"processes": 1, "threads": None}
    cluster = Cluster(address="a:1", workers=4, cpus=2, gpus=0.5)
    assert options(ray="a:1", ray_workers=4, threads=2, ray_gpus=0.5) == {"cluster": cluster, "threads": 2}


def test_stages_can_be_pickled_for_other_machines(here, painter, lm, monkeypatch):
    """The stages passed to `jobs` can be pickled; Ray itself is tested with `jobs`."""
    import pickle

    unpickled = []

    def run(stage, parts, folder, **more):
        unpickled.append(pickle.loads(pickle.dumps(stage)))
        raise InputError("enough")

    monkeypatch.setattr(jobs, "run_job", run)
    write_triples(here / "t.parquet", TRIPLES)
    (here / "c.txt").write_text("a red cat\n")
    assert ip2p("synth", "pairs", "t.parquet", "-o", "p", "--model", painter, "--ray", *HERE[2:]) == 2
    assert ip2p("synth", "instruct", "c.txt", "-o", "t", "--model", lm, "--ray", *HERE[2:], *GREEDY) == 2
    pairs, instruct = (make() for make in unpickled)
    assert instruct(["a red cat"]).tables[KEPT].to_pylist()[0]["edited_caption"] == "a red dog"
    assert isinstance(pairs, stages.PairStage)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["instruct", "-o", "t.parquet"], 2, "the captions are missing; write: ip2p synth instruct"),
        (["instruct", "c.txt"], 2, "-o is missing; write: ip2p synth instruct"),
        (["instruct", "c.txt", "-o", "t.parquet"], 2, "c.txt: no such file"),
        (["instruct", "c.txt", "-o", "t", "--edits", "0"], 2, "--edits is 0"),
        (["instruct", "c.txt", "-o", "t", "--shots", "-1"], 2, "--shots is -1"),
        (["instruct", "c.txt", "-o", "t", "--server", "http://h/v1"], 2, "add --model NAME"),
        (["instruct", "c.txt", "-o", "t", "--server", "http://a:b@h/v1", "--model", "m"], 2, "environment"),
        (
            ["instruct", "c.txt", "-o", "t", "--server", "http://h/v1", "--model", "m", "--workers", "2"],
            2,
            "Raise --together",
        ),
        (
            ["instruct", "c.txt", "-o", "t", "--server", "http://h/v1", "--model", "m", "--ray"],
            2,
            "Raise --together",
        ),
        (["instruct", "c.txt", "-o", "t", "--way", "chat"], 2, "--way is for a server"),
        (["instruct", "here.txt", "-o", "t", "--model", "nowhere"], 3, "no such language model"),
        (["instruct", "here.txt", "-o", "no/t.parquet"], 2, "the folder no of the output"),
        (
            [
                "instruct",
                "here.txt",
                "-o",
                "t",
                "--key-variable",
                "NONE",
                "--server",
                "http://h/v1",
                "--model",
                "m",
            ],
            2,
            "the environment has no NONE",
        ),
        (["instruct", "here.txt", "-o", "t", "--server", "h", "--model", "m"], 2, "--server h is no address"),
        (["tune-lm", "-o", "x"], 2, "--base is missing"),
        (["tune-lm", "--base", "nowhere", "-o", "x"], 3, "no such language model"),
        (["tune-lm", "--base", "m", "-o", "x", "--epochs", "0"], 2, "--epochs is 0"),
        (["pairs", "-o", "p"], 2, "the triples are missing"),
        (["pairs", "t.parquet", "-o", "p"], 2, "t.parquet: no such file"),
        (["pairs", "t.parquet", "-o", "p", "--p", "0.9", "0.1"], 2, "--p 0.9 0.1 is empty"),
        (["pairs", "t.parquet", "-o", "p", "--scale", "5", "1000"], 2, "--scale is 1000"),
        (["pairs", "t.parquet", "-o", "p", "--image", "2"], 2, "--image is 2"),
        (["pairs", "t.parquet", "-o", "p", "--worth", "0"], 2, "--worth is 0"),
        (["pairs", "t.parquet", "-o", "p", "--ray-workers", "2"], 2, "add --ray"),
        (["pairs", "t.parquet", "-o", "p", "--ray", "--workers", "2"], 2, "--ray-workers"),
        (["pairs", "t.parquet", "-o", "p", "--attention", "cross"], 2, "attention"),
        (["pairs", "here.txt", "-o", "p"], 2, "a triple needs a caption, an instruction"),
        (["pairs", "own.parquet", "-o", "p", "--model", "nowhere"], 3, "nowhere: no such model"),
        (["filter", "-o", "k"], 2, "the data set is missing"),
        (["filter", "nowhere", "-o", "k"], 2, "nowhere: no such"),
        (["filter", "d", "-o", "k", "--near-bits", "99"], 2, "--near-bits is 99"),
        (["filter", "d", "-o", "k", "--keep", "all", "--image", "0.1"], 2, "--keep all writes every row"),
        (["inspect"], 2, "the data set is missing"),
        (["inspect", "nowhere"], 2, "nowhere: no such"),
    ],
)
def test_bad_commands_are_refused_in_one_line(here, capsys, monkeypatch, words, code, said):
    (here / "here.txt").write_text("a red cat\n")
    write_triples(here / "own.parquet", TRIPLES)
    assert ip2p("synth", *words) == code
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1, err


def test_a_run_that_keeps_no_pair_is_reported(triples, painter, here, capsys):
    draw(triples, painter, "pairs", "--image", "1", "--count", "1", "--steps", "1", code=2)
    assert "no pair was kept of 4 candidates; look at them with --keep all" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("package", "words", "extra"),
    [
        ("ray", ("pairs", "own.parquet", "-o", "p", "--model", "PAINTER", "--ray"), "ip2p[ray]"),
        ("trl", ("tune-lm", "--base", "LM", "-o", "x", "--backend", "trl"), "ip2p[llm]"),
        ("peft", ("tune-lm", "--base", "LM", "-o", "x", "--backend", "plain", "--lora", "4"), "ip2p[llm]"),
    ],
)
def test_a_missing_package_is_reported_with_its_install_command(
    here, painter, lm, monkeypatch, capsys, package, words, extra
):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == package else find(name)
    )
    monkeypatch.setitem(sys.modules, package, None)
    write_triples(here / "own.parquet", TRIPLES)
    places = {"PAINTER": painter, "LM": lm}
    assert ip2p("synth", *(places.get(word, word) for word in words)) == 2
    assert f"pip install '{extra}'" in capsys.readouterr().err
