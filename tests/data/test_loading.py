"""Every supported layout, detected from the contents of the path."""

import csv
import json
import multiprocessing
import os
import pickle
import shutil
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from layouts import IMAGE, add, make_pair, make_pairs, picture, write_hub, write_original

from ip2p.base.errors import InputError
from ip2p.data.loading import open_source
from ip2p.data.records import BrokenRow, MissingPart

WORDS = ("instruction", "caption", "edited_caption")


def same(pair, expected, *fields):
    return all(getattr(pair, field) == getattr(expected, field) for field in ("before", "after", *fields))


def write_tar(path, pairs, first=0):
    with tarfile.open(path, "w") as tar:
        for number, pair in enumerate(pairs, first):
            add(tar, f"{number:04}.before.jpg", pair.before)
            add(tar, f"{number:04}.after.png", pair.after)
            words = {name: getattr(pair, name) for name in WORDS}
            add(tar, f"{number:04}.json", json.dumps(words | dict(pair.scores)).encode())
    return path


def write_folders(folder, pairs, table="metadata.jsonl"):
    for part in ("before", "after"):
        (folder / part).mkdir(parents=True)
    rows = []
    for number, pair in enumerate(pairs):
        (folder / "before" / f"{number}.jpg").write_bytes(pair.before)
        (folder / "after" / f"{number}.png").write_bytes(pair.after)
        rows.append(
            {
                "before": f"before/{number}.jpg",
                "after": f"after/{number}.png",
                "edit_prompt": pair.instruction,
                "caption": pair.caption,
                "edited_caption": pair.edited_caption,
            }
        )
    path = folder / table
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return folder


# --- parquet --------------------------------------------------------------------------------------


@pytest.mark.parametrize("plain", [False, True])
def test_the_columns_of_the_hugging_face_version_are_read(tmp_path, plain):
    pairs = make_pairs()
    source = open_source(str(write_hub(tmp_path / "a.parquet", pairs, plain=plain)))
    assert len(source) == 5 and not source.endless
    assert source.blocks() == [range(0, 2), range(2, 4), range(4, 5)]
    assert [source[row].id for row in (0, 4)] == ["0000000", "0000004"]
    assert all(same(source[row], pair, *WORDS) for row, pair in enumerate(pairs))
    with pytest.raises(IndexError):
        source[5]


def test_the_columns_of_magicbrush_are_read(tmp_path):
    pairs = make_pairs(2)
    mask = picture(9)
    table = pa.table(
        {
            "img_id": ["1234", "1234"],
            "turn_index": pa.array([1, 2], pa.int32()),
            "source_img": pa.array([{"bytes": p.before, "path": "a"} for p in pairs], IMAGE),
            "mask_img": pa.array([{"bytes": mask, "path": "b"}, None], IMAGE),
            "instruction": [p.instruction for p in pairs],
            "target_img": pa.array([{"bytes": p.after, "path": "c"} for p in pairs], IMAGE),
        }
    )
    pq.write_table(table, tmp_path / "dev.parquet")
    source = open_source(str(tmp_path / "dev.parquet"))
    assert [source[row].id for row in range(2)] == ["1234-1", "1234-2"]
    assert [source[row].mask for row in range(2)] == [mask, None]
    assert all(same(source[row], pair, "instruction") for row, pair in enumerate(pairs))


def test_sequential_rows_read_each_row_group_once(tmp_path, monkeypatch):
    reads = []
    read = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda self, group, **more: reads.append(group) or read(self, group, **more),
    )
    source = open_source(str(write_hub(tmp_path / "a.parquet", make_pairs())))
    for row in range(5):
        source[row]
    assert reads == [0, 1, 2]
    source[1]  # two groups are cached, so the first was dropped
    assert reads == [0, 1, 2, 0]


def test_the_files_of_a_split_are_read_in_name_order(tmp_path):
    pairs = make_pairs(4)
    write_hub(tmp_path / "data" / "train-00001-of-00002.parquet", pairs[2:])
    write_hub(tmp_path / "data" / "train-00000-of-00002.parquet", pairs[:2])
    write_hub(tmp_path / "data" / "test-00000-of-00001.parquet", pairs[:1])
    source = open_source(str(tmp_path))
    assert [source[row].instruction for row in range(4)] == [pair.instruction for pair in pairs]
    assert len(open_source(str(tmp_path), split="test")) == 1
    with pytest.raises(InputError, match="has no split validation; it has test, train. Choose with --split"):
        open_source(str(tmp_path), split="validation")


def test_a_damaged_row_group_breaks_only_its_rows(tmp_path):
    path = write_hub(tmp_path / "a.parquet", make_pairs())
    column = pq.read_metadata(path).row_group(0).column(0)
    data = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + 30] = b"\xff" * 30
    path.write_bytes(data)
    source = open_source(str(path))
    for row in (0, 1):
        with pytest.raises(BrokenRow, match="row group 0 of .* is damaged|cannot be read"):
            source[row]
    assert source[2].instruction == "make it number 2"


def test_a_row_without_a_picture_is_missing_a_part(tmp_path):
    pairs = [make_pair(0), make_pair(1, after=None)]
    source = open_source(str(write_hub(tmp_path / "a.parquet", pairs)))
    with pytest.raises(MissingPart, match="after: the picture is missing") as error:
        source[1]
    assert error.value.id == "0000001"


# --- the paper's folders --------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [True, False])
def test_the_papers_folders_are_read(tmp_path, seeds):
    pairs = make_pairs()
    # Two seeds of a prompt share its words.
    expected = [pairs[row - row % 2] if row < 4 else pairs[4] for row in range(5)]
    for row in (1, 3):
        pairs[row] = make_pair(row, **{name: getattr(pairs[row - 1], name) for name in WORDS})
    source = open_source(str(write_original(tmp_path / "set", pairs, seeds=seeds)))
    assert [source[row].id for row in range(5)] == [f"{row // 2:07}/{100 + row}" for row in range(5)]
    assert all(same(source[row], pair, *WORDS, "scores") for row, pair in enumerate(pairs))
    assert [source[row].caption for row in range(5)] == [pair.caption for pair in expected]


def test_a_missing_picture_or_invalid_prompt_breaks_only_its_rows(tmp_path):
    folder = write_original(tmp_path / "set", make_pairs(), seeds=False)
    (folder / "0000000" / "100_1.jpg").unlink()
    (folder / "0000001" / "prompt.json").write_text("{")
    source = open_source(str(folder))
    with pytest.raises(MissingPart, match="after: the picture .*100_1.jpg is missing"):
        source[0]
    for row in (2, 3):
        with pytest.raises(MissingPart, match="prompt.json is missing or cannot be read"):
            source[row]
    assert source[4].instruction == "make it number 4"


def test_an_invalid_seeds_file_is_reported(tmp_path):
    folder = write_original(tmp_path / "set", make_pairs(2))
    (folder / "seeds.json").write_text("[3]")
    with pytest.raises(InputError, match=r"seeds.json cannot be read.*Remove it"):
        open_source(str(folder))


# --- shards ---------------------------------------------------------------------------------------


def test_tar_shards_are_read(tmp_path):
    pairs = make_pairs()
    write_tar(tmp_path / "train-0.tar", pairs[:3])
    write_tar(tmp_path / "train-1.tar", pairs[3:], first=3)
    source = open_source(str(tmp_path))
    assert source.blocks() == [range(0, 3), range(3, 5)]
    assert [source[row].id for row in range(5)] == [f"{row:04}" for row in range(5)]
    assert all(same(source[row], pair, *WORDS, "scores") for row, pair in enumerate(pairs))


def test_shards_that_repeat_keys_get_distinct_ids(tmp_path):
    write_tar(tmp_path / "a.tar", make_pairs(2))
    write_tar(tmp_path / "b.tar", make_pairs(1))
    source = open_source(str(tmp_path))
    assert [source[row].id for row in range(3)] == ["a/0000", "a/0001", "b/0000"]


@pytest.mark.parametrize(
    "names", [("input", "output"), ("source", "target"), ("original_image", "edited_image")]
)
def test_other_file_names_and_text_files_in_shards_are_read(tmp_path, names):
    pair = make_pair(0)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, f"./sub/x.{names[0]}.jpg", pair.before)
        add(tar, f"./sub/x.{names[1]}.png", pair.after)
        add(tar, "./sub/x.txt", pair.instruction.encode())
        add(tar, "./sub/x.caption.txt", pair.caption.encode())
    row = open_source(str(tmp_path / "a.tar"))[0]
    assert row.id == "sub/x" and same(row, pair, "instruction", "caption")


def test_a_truncated_shard_keeps_its_complete_rows(tmp_path):
    path = write_tar(tmp_path / "a.tar", make_pairs(3))
    with tarfile.open(path) as tar:
        last = next(m for m in tar if m.name == "0002.before.jpg")
    data = path.read_bytes()
    path.write_bytes(data[: last.offset_data + 40])
    source = open_source(str(path))
    assert source[1].instruction == "make it number 1"
    reasons = []
    for row in range(2, len(source)):
        with pytest.raises(BrokenRow) as error:
            source[row]
        reasons.append(str(error.value))
    assert any("cut short" in reason for reason in reasons)


def test_a_compressed_shard_and_a_file_that_is_not_a_tar_are_refused(tmp_path):
    write_tar(tmp_path / "a.tar", make_pairs(1))
    with tarfile.open(tmp_path / "b.tar", "w:gz") as tar:
        tar.add(tmp_path / "a.tar", "a")
    with pytest.raises(InputError, match="b.tar .* is compressed; unpack it"):
        open_source(str(tmp_path / "b.tar"))
    (tmp_path / "c.tar").write_bytes(b"text" * 500)
    with pytest.raises(InputError, match="c.tar .* is not a tar file"):
        open_source(str(tmp_path / "c.tar"))


# --- folders and a table --------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["metadata.jsonl", "metadata.csv", "captions.csv", "list.tsv"])
def test_two_folders_and_a_table_are_read(tmp_path, table):
    pairs = make_pairs()
    folder = write_folders(tmp_path / "set", pairs, table)
    for path in (folder, folder / table):
        source = open_source(str(path))
        assert [source[row].id for row in range(5)] == [f"{row:07}" for row in range(5)]
        assert all(same(source[row], pair, *WORDS) for row, pair in enumerate(pairs))


@pytest.mark.parametrize("folders", [("input", "output"), ("original", "edited")])
def test_one_file_name_applies_to_both_pictures(tmp_path, folders):
    pair = make_pair(0)
    for folder, data in zip(folders, (pair.before, pair.after), strict=True):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.png").write_bytes(data)
    (tmp_path / "metadata.csv").write_text(f"file_name,instruction\nx.png,{pair.instruction}\n")
    assert same(open_source(str(tmp_path))[0], pair, "instruction")


def test_a_bad_line_or_a_missing_picture_of_a_table_breaks_only_its_row(tmp_path):
    folder = write_folders(tmp_path / "set", make_pairs(3))
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    (folder / "metadata.jsonl").write_text("\n".join([lines[0], "{oops", *lines[2:]]))
    (folder / "after" / "2.png").unlink()
    source = open_source(str(folder))
    assert source[0].instruction == "make it number 0"
    with pytest.raises(BrokenRow, match="line 2 of the table is not a JSON object"):
        source[1]
    with pytest.raises(MissingPart, match="after: the picture .*2.png is missing"):
        source[2]


# --- all layouts ----------------------------------------------------------------------------------


def each_layout(folder):
    pairs = make_pairs(3)
    write_hub(folder / "parquet" / "a.parquet", pairs)
    (folder / "shards").mkdir()
    write_tar(folder / "shards" / "a.tar", pairs)
    write_original(folder / "original", pairs, seeds=False)
    write_folders(folder / "folders", pairs)
    return [folder / name for name in ("parquet", "shards", "original", "folders")]


def test_a_pickled_copy_reads_the_same_rows(tmp_path):
    for path in each_layout(tmp_path):
        source = open_source(str(path))
        first = source[0]
        copy = pickle.loads(pickle.dumps(source))
        assert copy.key == source.key
        assert same(copy[2], source[2], "id", *WORDS) and same(copy[0], first, "id", *WORDS)


def _read_last(source, sender):
    sender.send(source[2].instruction)


def test_a_forked_worker_reads_the_same_rows(tmp_path):
    if not hasattr(os, "fork"):
        return
    context = multiprocessing.get_context("fork")
    for path in each_layout(tmp_path):
        source = open_source(str(path))
        source[0]
        receiver, sender = context.Pipe(False)
        process = context.Process(target=_read_last, args=(source, sender))
        process.start()
        assert receiver.poll(60) and receiver.recv() == source[2].instruction
        process.join()


def test_the_key_changes_only_with_the_files(tmp_path):
    for path in each_layout(tmp_path):
        key = open_source(str(path)).key
        assert open_source(str(path)).key == key
        file = next(f for f in sorted(path.rglob("*")) if f.is_file() and f.suffix != ".json")
        known = file.stat()
        os.utime(file, ns=(known.st_atime_ns, known.st_mtime_ns + 10**9))
        assert open_source(str(path)).key != key


def test_a_missing_path_gets_a_suggestion(tmp_path):
    write_hub(tmp_path / "pairs.parquet", make_pairs(1))
    with pytest.raises(InputError, match=r"no such file. Did you mean .*pairs.parquet\?"):
        open_source(str(tmp_path / "pair.parquet"))


def test_paths_that_are_not_data_sets_are_refused_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.parquet").write_bytes(b"")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1" + b"x" * 100)
    (tmp_path / "readme.txt").write_text("hello")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.bin").write_bytes(b"x")
    (tmp_path / "untold" / "before").mkdir(parents=True)
    (tmp_path / "untold" / "after").mkdir()
    (tmp_path / "none.jsonl").write_text("\n")
    write_hub(tmp_path / "none.parquet", [])
    messages = {
        "": "no data set given",
        "empty": "is an empty folder",
        "empty.parquet": r"is empty \(0 bytes\)",
        "cut.parquet": "not a complete parquet file",
        "readme.txt": "is not a supported data set",
        "other": "contains no supported data set",
        "untold": "pictures but no table; write .*metadata.csv",
        "none.jsonl": "has no rows",
        "none.parquet": "has no rows",
    }
    for name, words in messages.items():
        with pytest.raises(InputError, match=words) as error:
            open_source(str(tmp_path / name) if name else " ")
        assert "\n" not in str(error.value)


def test_unknown_columns_are_reported_with_the_required_ones(tmp_path):
    pq.write_table(pa.table({"picture": [b"x"], "edit_prompt": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(
        InputError,
        match=r"a.parquet has the columns picture, edit_prompt; missing: "
        r"before \(original_image, source_img, before …\); after \(edited_image,.*Rename them",
    ):
        open_source(str(tmp_path / "a.parquet"))
    (tmp_path / "a.csv").write_text("before,after\na.png,b.png\n")
    with pytest.raises(InputError, match=r"a.csv has the columns before, after; .*instruction \(edit_prompt"):
        open_source(str(tmp_path / "a.csv"))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "0.before.png", picture(0))
        add(tar, "0.txt", b"words")
    with pytest.raises(InputError, match=r"a.tar has the files of a key before.png, txt; .*after"):
        open_source(str(tmp_path / "a.tar"))


def test_hub_settings_are_refused_for_a_path(tmp_path):
    path = str(write_hub(tmp_path / "a.parquet", make_pairs(1)))
    with pytest.raises(InputError, match="--revision does not apply"):
        open_source(path, revision="main")
    with pytest.raises(InputError, match="--stream does not apply"):
        open_source(path, stream=True)


def test_parquet_files_inside_the_papers_numbered_folders_are_ignored(tmp_path):
    folder = write_original(tmp_path / "set", make_pairs(1))
    shutil.copy(write_hub(tmp_path / "x.parquet", make_pairs(2)), folder / "0000000" / "x.parquet")
    assert len(open_source(str(folder))) == 1


def test_the_output_of_an_interrupted_job_is_refused_until_it_is_finished(tmp_path):
    from ip2p.base import jobs
    from ip2p.synth.filter import pair_row, pair_table
    from ip2p.training.storybook.source import StorybookSource

    source = StorybookSource(32, count=4)

    class Stopped(Exception):
        pass

    class Rows:
        broken = True

        def __call__(self, part):
            if 2 in part and self.broken:
                raise Stopped
            return jobs.StageOutput(tables={"data/train": pair_table([pair_row(source[k]) for k in part])})

    def run():
        jobs.run_job(Rows, [range(0, 2), range(2, 4)], tmp_path / "out", settings={}, unit="pairs")

    with pytest.raises(Stopped):
        run()
    with pytest.raises(InputError, match="is not finished"):
        open_source(str(tmp_path / "out"))
    Rows.broken = False
    run()
    finished = open_source(str(tmp_path / "out"))
    assert [finished[k].id for k in range(len(finished))] == [source[k].id for k in range(4)]
