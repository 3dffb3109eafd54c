"""Conversions between all layouts, and interrupted conversions."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from layouts import Rows, make_pair, make_pairs, picture, write_original
from PIL import Image

from ip2p.base import files
from ip2p.base.errors import InputError
from ip2p.data.convert import HOLDS_NO, LAYOUTS, convert, encoded
from ip2p.data.loading import open_source
from ip2p.data.records import BrokenRow, open_picture

FIELDS = ("id", "before", "after", "instruction", "caption", "edited_caption", "mask", "scores")


def fields(pair, lost=()):
    return {name: None if name in lost else getattr(pair, name) for name in FIELDS}


def masked(count=5):
    pairs = make_pairs(count)
    pairs[1] = make_pair(1, mask=picture(77))
    return pairs


def read(path):
    source = open_source(str(path))
    return [source[row] for row in range(len(source))]


@pytest.mark.parametrize("first", LAYOUTS)
def test_converting_between_any_two_layouts_keeps_all_fields_they_support(tmp_path, first):
    pairs = masked()
    convert(Rows(pairs), tmp_path / "a", first, shard_rows=2)
    converted = read(tmp_path / "a")
    lost = set(HOLDS_NO[first])
    assert [fields(pair, lost) for pair in converted] == [fields(pair, lost) for pair in pairs]
    source = open_source(str(tmp_path / "a"))
    for second in LAYOUTS:
        convert(source, tmp_path / second, second, shard_rows=3)
        dropped = lost | set(HOLDS_NO[second])
        converted = read(tmp_path / second)
        if "scores" in lost and second == "original":  # its rows need a seed
            assert [pair.scores for pair in converted] == [{"seed": row} for row in range(5)]
            dropped |= {"scores"}
        assert [fields(pair, dropped) for pair in converted] == [fields(pair, dropped) for pair in pairs]


def test_fields_that_a_layout_cannot_hold_are_reported(tmp_path):
    converted = convert(Rows(masked()), tmp_path / "a", "magicbrush")
    assert converted.left_out == {"caption": 5, "edited_caption": 5, "scores": 5}
    assert converted.lines("magicbrush") == [
        "not written, because the layout magicbrush cannot hold it: caption (5 rows), "
        "edited_caption (5 rows), scores (5 rows)"
    ]
    assert convert(Rows(masked()), tmp_path / "b", "original").left_out == {"mask": 1}
    assert convert(Rows(masked()), tmp_path / "c", "shards").lines("shards") == []


def test_pixel_arrays_are_written_as_png(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    convert(Rows([make_pair(0, before=pixels, labels={"edit": np.arange(3)})]), tmp_path / "a", "folders")
    (row,) = read(tmp_path / "a")
    assert row.before[:4] == b"\x89PNG" and (tmp_path / "a" / "before" / "0000000.png").exists()
    assert np.array_equal(np.asarray(open_picture(row.before, "a")), pixels)
    assert encoded(row.before) is row.before


def test_image_columns_are_declared_in_the_hugging_face_metadata(tmp_path):
    convert(Rows(masked(2)), tmp_path / "a", "parquet")
    convert(Rows(masked(2)), tmp_path / "b", "magicbrush")
    for path, columns in (
        (
            tmp_path / "a",
            ("original_image", "original_prompt", "edit_prompt", "edited_prompt", "edited_image"),
        ),
        (tmp_path / "b", ("img_id", "turn_index", "source_img", "mask_img", "instruction", "target_img")),
    ):
        schema = pq.read_schema(path / "data" / "train-00000.parquet")
        assert tuple(schema.names[: len(columns)]) == columns
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        assert [n for n in columns if n.endswith(("image", "img"))] == [
            name for name, feature in features.items() if feature == {"_type": "Image"}
        ]
    row = pq.read_table(tmp_path / "b" / "data").to_pylist()[1]
    assert (row["img_id"], row["turn_index"], row["mask_img"]["path"]) == ("pair", 1, "0000001-mask.png")


def test_the_original_layout_has_the_files_of_the_papers_code(tmp_path):
    source = open_source(str(write_original(tmp_path / "a", make_pairs(4))))
    convert(source, tmp_path / "b", "original", shard_rows=1)
    # The two rows of a prompt share its texts, and so a folder.
    seeds = json.loads((tmp_path / "b" / "seeds.json").read_text())
    assert [name for name, _ in seeds] == ["0000000", "0000001"]
    assert [list(s) for _, s in seeds] == [[100, 101], [102, 103]]
    for name, inner in seeds:
        prompt = json.loads((tmp_path / "b" / name / "prompt.json").read_text())
        assert set(prompt) == {"caption", "input", "edit", "output"}
        lines = [json.loads(x) for x in (tmp_path / "b" / name / "metadata.jsonl").read_text().splitlines()]
        assert [line["seed"] for line in lines] == inner
        for seed in inner:
            Image.open(tmp_path / "b" / name / f"{seed}_0.jpg").load()


def test_rows_of_one_prompt_with_different_texts_get_separate_folders(tmp_path):
    pairs = [make_pair(0, id="0000007/1"), make_pair(1, id="0000007/2"), make_pair(2, id="0000007/1")]
    convert(Rows(pairs), tmp_path / "a", "original")
    got = {pair.id: pair.instruction for pair in read(tmp_path / "a")}
    assert sorted(p.name for p in (tmp_path / "a").iterdir() if p.is_dir()) == [
        "0000007",
        "0000007-2",
        "0000007-3",
    ]
    assert got == {"0000007/1": "make it number 2", "0000007/2": "make it number 1"}


def test_broken_rows_are_skipped_and_listed(tmp_path):
    pairs = [*make_pairs(3), BrokenRow("lost", "before: gone"), make_pair(4, after=picture(1, "JPEG")[:-99])]
    converted = convert(Rows(pairs), tmp_path / "a", "shards", shard_rows=2, max_broken=0.5)
    assert converted.rows == 3
    broken = [json.loads(line) for line in (tmp_path / "a" / "quarantine.jsonl").read_text().splitlines()]
    assert [row["id"] for row in broken] == ["lost", "pair-4"]
    assert "damaged or truncated" in broken[1]["reason"]
    assert "2 broken rows" in converted.lines("shards")[0]
    assert [pair.id for pair in read(tmp_path / "a")] == ["pair-0", "pair-1", "pair-2"]


def test_more_than_1_percent_of_broken_rows_stops_the_conversion(tmp_path):
    rows = [BrokenRow("lost", "before: gone"), *make_pairs(4)]
    with pytest.raises(
        InputError,
        match=r"1 of the first 2 rows of rows are broken; the limit is 1% of 5.*lost: before: gone",
    ):
        convert(Rows(rows), tmp_path / "a", "shards", shard_rows=2)


# --- interrupted and resumed ----------------------------------------------------------------------


class Counting(Rows):
    """Records which rows were read; interrupts at one."""

    def __init__(self, rows, stop=None):
        super().__init__(rows)
        self.read, self.stop = [], stop

    def __getitem__(self, row):
        if row == self.stop:
            raise KeyboardInterrupt
        self.read.append(row)
        return super().__getitem__(row)


@pytest.mark.parametrize("to", LAYOUTS)
def test_an_interrupted_conversion_resumes_with_the_missing_rows(tmp_path, to):
    pairs = masked(6)
    with pytest.raises(KeyboardInterrupt):
        convert(Counting(pairs, stop=3), tmp_path / "a", to, shard_rows=2)
    with pytest.raises(
        InputError, match="is an unfinished conversion. Resume it: ip2p data convert rows .* --to"
    ):
        open_source(str(tmp_path / "a"))
    again = Counting(pairs)
    convert(again, tmp_path / "a", to, shard_rows=2)
    assert again.read == [2, 3, 4, 5]
    lost = HOLDS_NO[to]
    assert [fields(p, lost) for p in read(tmp_path / "a")] == [fields(p, lost) for p in pairs]
    convert(Rows(pairs), tmp_path / "b", to, shard_rows=2)
    assert all_files(tmp_path / "a") == all_files(tmp_path / "b")
    third = Counting(pairs)
    convert(third, tmp_path / "a", to, shard_rows=2)
    assert third.read == []


def all_files(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "manifest.jsonl"
    }


KILLED = """
import os, sys
sys.path.insert(0, {here!r})
from layouts import Rows, make_pairs
from ip2p.data.convert import convert
from pathlib import Path
left, replace = {left}, os.replace
def counted(one, two):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), 9)
    replace(one, two)
os.replace = counted
convert(Rows(make_pairs(6)), Path({target!r}), {to!r}, shard_rows=2)
"""


@pytest.mark.parametrize(("to", "left"), [("shards", 1), ("folders", 7), ("original", 13)])
def test_a_killed_and_resumed_conversion_equals_an_uninterrupted_one(tmp_path, to, left):
    script = KILLED.format(here=os.path.dirname(__file__), left=left, target=str(tmp_path / "a"), to=to)
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    convert(Rows(make_pairs(6)), tmp_path / "a", to, shard_rows=2)
    convert(Rows(make_pairs(6)), tmp_path / "b", to, shard_rows=2)
    assert all_files(tmp_path / "a") == all_files(tmp_path / "b")


def test_a_partial_shard_never_has_its_final_name(tmp_path, monkeypatch):
    seen = []
    replacing = files.os.replace
    monkeypatch.setattr(
        files.os,
        "replace",
        lambda a, b: seen.append(sorted(p.name for p in tmp_path.rglob("train-*"))) or replacing(a, b),
    )
    with pytest.raises(KeyboardInterrupt):
        convert(Counting(make_pairs(4), stop=3), tmp_path / "a", "shards", shard_rows=2)
    assert seen == [[]]
    assert [p.name for p in (tmp_path / "a").glob("*.tar")] == ["train-000000.tar"]


def test_a_truncated_output_file_is_written_again(tmp_path):
    for to, name in (
        ("shards", "train-000001.tar"),
        ("original", "0000002/102_1.jpg"),
        ("folders", "after/0000002.png"),
    ):
        folder = tmp_path / to
        convert(Rows(make_pairs()), folder, to, shard_rows=2)
        expected = all_files(folder)
        (folder / name).write_bytes(b"")
        again = Counting(make_pairs())
        convert(again, folder, to, shard_rows=2)
        assert again.read == [2, 3] and all_files(folder) == expected


def test_a_different_conversion_cannot_resume_in_the_folder(tmp_path):
    convert(Rows(make_pairs()), tmp_path / "a", "shards", shard_rows=2)
    for changes, words in (
        ({"to": "folders"}, "started with --to shards, but it is now --to folders"),
        ({"shard_rows": 3}, "started with --shard-rows 2, but it is now --shard-rows 3"),
        ({"count": 3}, "started with 5 rows, but it is now 3 rows"),
    ):
        with pytest.raises(InputError, match=words):
            convert(Rows(make_pairs()), tmp_path / "a", **({"to": "shards", "shard_rows": 2} | changes))
    with pytest.raises(InputError, match="started from other data; add --overwrite"):
        convert(Rows(make_pairs(), key="new"), tmp_path / "a", "shards", shard_rows=2)
    convert(Rows(make_pairs(2)), tmp_path / "a", "folders", overwrite=True)
    assert len(read(tmp_path / "a")) == 2
    assert not list((tmp_path / "a").glob("*.tar"))


def test_a_folder_with_other_files_is_not_touched(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="already contains other files"):
        convert(Rows(make_pairs()), tmp_path, "shards", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(InputError, match="must be a folder; remove .parquet from its name"):
        convert(Rows(make_pairs()), tmp_path / "a.parquet", "parquet")


def test_two_conversions_cannot_write_to_one_folder(tmp_path):
    class Meddling(Rows):
        def __getitem__(self, row):
            with pytest.raises(InputError, match="another ip2p process is writing to"):
                convert(Rows(make_pairs(5)), tmp_path / "a", "shards")
            return super().__getitem__(row)

    convert(Meddling(make_pairs(1)), tmp_path / "a", "shards")


def test_an_endless_source_needs_a_count(tmp_path):
    endless = Rows(make_pairs())
    endless.endless = True
    with pytest.raises(InputError, match="is endless; set a number of rows, such as --count"):
        convert(endless, tmp_path / "a", "shards")
    assert convert(endless, tmp_path / "a", "shards", count=2).rows == 2
