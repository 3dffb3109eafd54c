"""Columns chosen by the user, names of published data sets, sidecar texts and imagefolders."""

import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from layouts import IMAGE, Rows, add, make_pair, make_pairs, picture, write_original

from ip2p.base.errors import InputError
from ip2p.cli import main as cli
from ip2p.data.columns import find_columns
from ip2p.data.convert import convert
from ip2p.data.loading import open_source
from ip2p.data.records import MissingPart

WORDS = ("instruction", "caption", "edited_caption")
ODD = {"original": "left", "edited": "right", "instruction": "todo"}


def as_text(chosen):
    return ",".join(f"{part}={name}" for part, name in chosen.items())


def equal(pair, expected, *fields):
    return all(getattr(pair, name) == getattr(expected, name) for name in ("before", "after", *fields))


def write_odd(folder, layout):
    """Two pairs in columns with meaningless names, next to misleading ones."""
    pairs = make_pairs(2)
    folder.mkdir()
    if layout == "parquet":
        table = pa.table(
            {
                "left": pa.array([{"bytes": p.before, "path": None} for p in pairs], IMAGE),
                "Right": pa.array([{"bytes": p.after, "path": None} for p in pairs], IMAGE),
                "todo": [p.instruction for p in pairs],
                "caption": [p.caption for p in pairs],
                "edit_prompt": ["a trap"] * 2,
            }
        )
        pq.write_table(table, folder / "a.parquet")
    elif layout == "shards":
        with tarfile.open(folder / "a.tar", "w") as tar:
            for number, pair in enumerate(pairs):
                add(tar, f"{number}.left.jpg", pair.before)
                add(tar, f"{number}.Right.png", pair.after)
                words = {"todo": pair.instruction, "caption": pair.caption, "edit_prompt": "a trap"}
                add(tar, f"{number}.json", json.dumps(words).encode())
    else:
        lines = []
        for number, pair in enumerate(pairs):
            (folder / f"{number}.jpg").write_bytes(pair.before)
            (folder / f"{number}.png").write_bytes(pair.after)
            line = {"left": f"{number}.jpg", "Right": f"{number}.png", "todo": pair.instruction}
            lines.append(line | {"caption": pair.caption, "edit_prompt": "a trap"})
        (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return pairs


@pytest.mark.parametrize("layout", ["parquet", "shards", "folders"])
def test_any_column_can_be_chosen(tmp_path, layout):
    pairs = write_odd(tmp_path / "set", layout)
    with pytest.raises(InputError, match="missing: before .*--columns original=NAME,edited=NAME"):
        open_source(str(tmp_path / "set"))
    source = open_source(str(tmp_path / "set"), columns=as_text(ODD))
    assert all(equal(source[row], pair, "instruction", "caption") for row, pair in enumerate(pairs))
    other = open_source(str(tmp_path / "set"), columns=as_text(ODD | {"instruction": "caption"}))
    assert other[0].instruction == pairs[0].caption and other.key != source.key  # cached separately


def test_the_keys_of_a_prompt_file_can_be_chosen_too(tmp_path):
    folder = write_original(tmp_path / "set", make_pairs(1))
    (folder / "0000000" / "prompt.json").write_text(json.dumps({"caption": "a", "edit": "b", "vorgabe": "c"}))
    assert open_source(str(folder), columns="instruction=vorgabe")[0].instruction == "c"
    with pytest.raises(InputError, match="pictures of this layout have fixed names; leave original away"):
        open_source(str(folder), columns="original=x")


@pytest.mark.parametrize("layout", ["parquet", "shards", "folders"])
def test_a_missing_column_is_reported_with_the_existing_ones(tmp_path, layout):
    write_odd(tmp_path / "set", layout)
    with pytest.raises(InputError, match=r"has no .*'lefd' \(--columns original=lefd\); it has .*left"):
        open_source(str(tmp_path / "set"), columns=as_text(ODD | {"original": "lefd"}))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("original", "write PART=COLUMN"),
        ("original=", "write PART=COLUMN"),
        ("pic=a", "pic is no part of a pair: original, edited, instruction, caption, edited_caption"),
        ("original=a,before=b", "original is named twice"),
    ],
)
def test_an_invalid_list_of_columns_is_refused_before_any_work(text, words, capsys):
    assert cli.main(["data", "check", "nowhere", "--columns", text]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["train", "data check", "data convert", "evaluate"])
def test_commands_that_read_pairs_accept_columns(verb):
    assert cli.parse(verb, ["--columns", "original=a, edited=b"]).columns == "original=a,edited=b"


def test_check_and_convert_read_the_chosen_columns(tmp_path, capsys):
    pairs = write_odd(tmp_path / "set", "parquet")
    columns = ["--columns", as_text(ODD)]
    assert cli.main(["data", "check", str(tmp_path / "set"), *columns]) == 0
    assert cli.main(["data", "convert", str(tmp_path / "set"), str(tmp_path / "new"), *columns]) == 0
    assert equal(open_source(str(tmp_path / "new"))[1], pairs[1], "instruction", "caption")


def test_columns_are_refused_for_the_storybook(capsys):
    assert cli.main(["data", "check", "storybook", "--limit", "1", "--columns", "original=a"]) == 2
    assert "--columns" in capsys.readouterr().err


# --- published data sets ----------------------------------------------------------------------------

# From the dataset cards and annotation files of each.
PUBLISHED = {
    "InstructPix2Pix": "original_image original_prompt edit_prompt edited_prompt edited_image",
    "diffusers": "input_image edit_prompt edited_image",
    "MagicBrush": "img_id turn_index source_img mask_img instruction target_img",
    "HQ-Edit": "input input_image edit inverse_edit output output_image",
    "UltraEdit": "clip_sim_source clip_sim_target clip_sim_dir clip_sim_image ssim dinov2_sim edit_prompt "
    "edit_object source_caption target_caption source_image edited_image mask_image",
    "OmniEdit": "omni_edit_id task src_img edited_img edited_prompt_list width height sc_score_1 o_score",
    "HumanEdit": "IMAGE_ID EDITING_TYPE CORE MASK EDITING_INSTRUCTION OUTPUT_DESCRIPTION "
    "INPUT_CAPTION_BY_LLAMA OUTPUT_CAPTION_BY_LLAMA INPUT_IMG MASK_IMG OUTPUT_IMG",
    "AnyEdit": "edit input output edit_type visual_input image_file edited_file",
    "AURORA": "input output instruction",
    "SEED-Data-Edit": "source_image target_image instruction",
    "pico-banana": "open_image_input_url text output_image edit_type summarized_text local_input_image",
}
FOUND = {  # before, after, instruction, caption, edited caption
    "InstructPix2Pix": "original_image edited_image edit_prompt original_prompt edited_prompt",
    "diffusers": "input_image edited_image edit_prompt - -",
    "MagicBrush": "source_img target_img instruction - -",
    "HQ-Edit": "input_image output_image edit input output",
    "UltraEdit": "source_image edited_image edit_prompt source_caption target_caption",
    "OmniEdit": "src_img edited_img edited_prompt_list - -",
    "HumanEdit": "INPUT_IMG OUTPUT_IMG EDITING_INSTRUCTION INPUT_CAPTION_BY_LLAMA OUTPUT_CAPTION_BY_LLAMA",
    "AnyEdit": "image_file edited_file edit input output",
    "AURORA": "input output instruction - -",
    "SEED-Data-Edit": "source_image target_image instruction - -",
    "pico-banana": "local_input_image output_image text - -",
}


@pytest.mark.parametrize("paths", [False, True])
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_columns_of_published_data_sets_are_known(name, paths):
    found = find_columns(PUBLISHED[name].split(), of=name, paths=paths)
    got = [found.get(part, "-") for part in ("before", "after", *WORDS)]
    assert got == FOUND[name].split()


def write_pictures(folder, pairs, before="{}.jpg", after="{}.png"):
    for number, pair in enumerate(pairs):
        for name, data in ((before, pair.before), (after, pair.after)):
            path = folder / name.format(number)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def test_auroras_json_array_with_repository_paths_is_read(tmp_path):
    pairs = make_pairs(2)
    write_pictures(tmp_path, pairs, "data/ag/images/{}_left.png", "data/ag/images/{}_right.png")
    rows = [
        {
            "instruction": pair.instruction,
            "input": f"data/ag/images/{number}_left.png",
            "output": f"data/ag/images/{number}_right.png",
        }
        for number, pair in enumerate(pairs)
    ]
    (tmp_path / "data" / "ag" / "train.json").write_text(json.dumps(rows))
    for path in (tmp_path / "data" / "ag" / "train.json", tmp_path / "data" / "ag"):
        source = open_source(str(path))
        assert all(equal(source[row], pair, "instruction") for row, pair in enumerate(pairs))


def test_seed_data_edits_annotations_and_images_are_read(tmp_path):
    pair, other = make_pairs(2)
    write_pictures(tmp_path / "images", [pair, other], "a/{}.jpg", "b/{}.png")
    (tmp_path / "annotations").mkdir()
    one = {"source_image": "a/0.jpg", "target_image": "b/0.png", "instruction": pair.instruction}
    (tmp_path / "annotations" / "one.jsonl").write_text(json.dumps(one) + "\n")
    assert equal(open_source(str(tmp_path / "annotations" / "one.jsonl"))[0], pair, "instruction")
    turns = {"source_image": "a/0.jpg", "edit_image_1": "b/0.png", "edit_image_2": "b/1.png"}
    turns |= {"instruction_1": pair.instruction, "instruction_2": "and then so"}
    (tmp_path / "annotations" / "turns.jsonl").write_text(json.dumps(turns) + "\n")
    source = open_source(str(tmp_path / "annotations" / "turns.jsonl"))
    assert len(source) == 2 and equal(source[0], pair, "instruction")
    assert (source[1].before, source[1].after) == (pair.after, other.after)
    assert source[1].instruction == "and then so"


def test_a_picture_given_as_a_url_is_refused_with_advice(tmp_path):
    (tmp_path / "b.png").write_bytes(picture(0))
    row = {"open_image_input_url": "https://x.example/a.jpg", "text": "go", "output_image": "b.png"}
    (tmp_path / "sft.jsonl").write_text(json.dumps(row))
    with pytest.raises(MissingPart, match="before: https://x.example/a.jpg is an address; download"):
        open_source(str(tmp_path))[0]


# --- file_name, sidecar texts, imagefolder ----------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "cells"),
    [
        ("file_name,edited_image,instruction", "0.jpg,0.png"),
        ("file_name,original_image_file_name,edit_prompt", "0.png,0.jpg"),
    ],
)
def test_file_name_may_be_one_of_the_pictures(tmp_path, header, cells):
    pair = make_pair(0)
    write_pictures(tmp_path, [pair])
    (tmp_path / "metadata.csv").write_text(f"{header}\n{cells},{pair.instruction}\n")
    assert equal(open_source(str(tmp_path))[0], pair, "instruction")


@pytest.mark.parametrize("where", ["before/{}.txt", "after/{}.txt", "instructions/{}.txt", "{}.txt"])
def test_instructions_are_read_from_text_files_in_or_next_to_two_folders(tmp_path, where):
    pairs = make_pairs(3)
    write_pictures(tmp_path, pairs, "before/{}.jpg", "after/{}.png")
    for number, pair in enumerate(pairs):
        path = tmp_path / where.format(number)
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"\ufeff{pair.instruction}\n", encoding="utf-8")
    source = open_source(str(tmp_path))
    assert [source[row].id for row in range(len(source))] == ["0", "1", "2"]
    assert all(equal(source[row], pair, "instruction") for row, pair in enumerate(pairs))


def test_instructions_are_read_from_text_files_in_one_folder(tmp_path):
    pairs = make_pairs(2)
    write_pictures(tmp_path, pairs, "{}_before.jpg", "{}_after.png")
    for number, pair in enumerate(pairs):
        (tmp_path / f"{number}.txt").write_text(pair.instruction)
    source = open_source(str(tmp_path))
    assert len(source) == 2 and all(equal(source[n], pair, "instruction") for n, pair in enumerate(pairs))


def test_missing_and_ambiguous_files_of_a_row_are_reported(tmp_path):
    pairs = make_pairs(3)
    write_pictures(tmp_path, pairs, "before/{}.jpg", "after/{}.png")
    (tmp_path / "before" / "0.txt").write_text("go")
    (tmp_path / "before" / "1.txt").write_text("go")
    (tmp_path / "after" / "1.png").unlink()
    (tmp_path / "before" / "0.png").write_bytes(picture(5))
    source = open_source(str(tmp_path))
    for row, words in enumerate(("two pictures", "after: no picture", "no 2.txt with its instruction")):
        with pytest.raises(Exception, match=words):
            source[row]


def test_a_table_without_instructions_takes_them_from_text_files(tmp_path):
    pair = make_pair(0)
    write_pictures(tmp_path, [pair])
    (tmp_path / "metadata.csv").write_text("before,after\n0.jpg,0.png\n")
    (tmp_path / "0.txt").write_text(pair.instruction)
    assert equal(open_source(str(tmp_path))[0], pair, "instruction")


def test_written_folders_are_read_by_datasets_as_an_imagefolder(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    mask = picture(9)
    pairs = [make_pair(0, mask=mask), make_pair(1), make_pair(2, caption="")]
    convert(Rows(pairs), tmp_path / "set", "folders", shard_rows=2)
    loaded = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path / "set"), cache_dir=str(tmp_path / "cache"), split="train"
    )
    assert loaded.num_rows == 3
    assert {"before", "after", "instruction", "caption", "edited_caption"} <= set(loaded.column_names)
    for row, pair in zip(loaded.cast_column("before", datasets.Image(decode=False)), pairs, strict=True):
        assert Path(row["before"]["path"]).read_bytes() == pair.before
        assert row["after"].size == (24, 20) and row["instruction"] == pair.instruction
    first = json.loads((tmp_path / "set" / "metadata.jsonl").read_text().splitlines()[0])
    assert {"before_file_name", "after_file_name", "mask_file_name"} <= first.keys()
    back = open_source(str(tmp_path / "set"))
    assert all(equal(back[n], pair, "id", "mask", "scores", *WORDS) for n, pair in enumerate(pairs))
