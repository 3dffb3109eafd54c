import dataclasses
import io
import json
from functools import partial
from pathlib import Path

import imagehash
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter

from ip2p.base import jobs
from ip2p.base.errors import InputError
from ip2p.data.loading import open_source
from ip2p.data.records import BrokenRow, Pair
from ip2p.models.clip import Clip, similarities
from ip2p.synth.filter import (
    PAIR_SCHEMA,
    PRESETS,
    SIMILARITIES,
    Scored,
    Scorer,
    Thresholds,
    filter_pairs,
    known_scores,
    measure_similarities,
    picture_cell,
    picture_hash,
    score_rows,
    select,
)

ALL = Thresholds(image=-1, caption=-1, directional=-1)
quiet = {"say": lambda line: None}


def picture(seed: int, size: tuple[int, int] = (40, 32)) -> Image.Image:
    """Smooth noise, different for each seed."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def pair(number: int, edit: int = 0, scores=(), **changes) -> Pair:
    fields = {
        "id": f"p{number}",
        "before": png(picture(2 * number)),
        "after": png(picture(2 * number + 1)),
        "caption": f"cat {edit}",
        "instruction": f"make it dog {edit}",
        "edited_caption": f"dog {edit}",
        "scores": dict(zip(SIMILARITIES, scores, strict=False)),
    }
    return Pair(**(fields | changes))


class Rows:
    endless, name, key = False, "rows", "k"

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        if isinstance(self.rows[row], BrokenRow):
            raise self.rows[row]
        return self.rows[row]

    def blocks(self):
        return [range(len(self.rows))]


@pytest.fixture(scope="module")
def clip(tiny_clip_dir) -> Clip:
    return Clip.load(tiny_clip_dir)


@pytest.fixture
def unmeasured() -> Rows:
    """Five pairs without scores; one is broken, one has other sizes, one no captions."""
    rows = [pair(n) for n in range(5)]
    rows[1] = BrokenRow("p1", "cut short")
    rows[2] = pair(2, before=png(picture(4, (64, 64))), after=png(picture(5, (700, 350))))
    rows[3] = pair(3, caption="", edited_caption="")
    return Rows(rows)


@pytest.fixture
def measured() -> Rows:
    """Pairs with scores (image, before, after, directional): three of one edit, then flaws of every kind."""
    good = 0.9, 0.3, 0.3
    twin = png(picture(2)), png(picture(3).filter(ImageFilter.BoxBlur(1)))
    return Rows(
        [
            pair(0, scores=(*good, 0.3)),
            pair(1, scores=(*good, 0.5)),
            pair(2, scores=(*good, 0.4)),
            pair(3, 1, scores=(0.69, 0.3, 0.3, 0.5)),
            pair(4, 1, scores=(0.72, 0.3, 0.3, 0.5)),
            pair(5, 1, scores=(0.9, 0.19, 0.3, 0.5)),
            pair(6, 1, scores=(0.9, 0.3, 0.19, 0.5)),
            pair(7, 1, scores=(0.9, 0.3, 0.3, 0.1999)),
            pair(8, 2, scores=(0.75, 0.2, 0.2, 0.2)),
            pair(9, scores=(*good, 0.25), before=twin[0], after=twin[1], instruction="Make it dog 0!"),
            BrokenRow("p10", "no picture"),
        ]
    )


# --- similarities ---------------------------------------------------------------------------------


def test_similarities_equal_clip_on_single_pairs_for_any_batch_and_sizes(clip):
    before = [picture(0), picture(1, (64, 64)), picture(6, (64, 64)), picture(2)]
    after = [picture(3), picture(4), picture(7, (64, 64)), picture(5, (64, 64))]
    words = ["a cat", "a longer text about a cat", "night", "a cat"], ["a dog", "night", "day", "snow"]
    batched = measure_similarities(clip, before, after, *words)
    for k in range(4):
        one, two = (torch.from_numpy(np.array(p[k])).permute(2, 0, 1)[None] / 255 for p in (before, after))
        found = similarities(clip.images(one), clip.images(two), *(clip.texts([w[k]]) for w in words))
        for name, of in SIMILARITIES.items():
            assert batched[name][k] == pytest.approx(getattr(found, of).item(), abs=2e-6)
    small = measure_similarities(clip, before, after, *words, batch=1)
    for name, values in batched.items():
        np.testing.assert_allclose(values, small[name], atol=2e-6)
    assert len({value for values in batched.values() for value in values.tolist()}) == 16


def test_without_captions_only_the_pictures_are_compared(clip):
    scores = measure_similarities(clip, [picture(0)] * 2, [picture(1)] * 2, ["", "a cat"], ["a dog", " "])
    assert not np.isnan(scores["clip_sim_image"]).any()
    assert np.isnan(scores["clip_sim_0"]).tolist() == [True, False]
    assert np.isnan(scores["clip_sim_1"]).tolist() == [False, True]
    assert np.isnan(scores["clip_sim_dir"]).all()


def test_large_pictures_are_downscaled_smoothly_before_clip(clip):
    large = Image.fromarray(np.random.default_rng(0).integers(0, 256, (1200, 1600, 3), dtype=np.uint8))
    small = large.resize((512, 384), Image.Resampling.LANCZOS)
    one, two = (
        measure_similarities(clip, [each], [picture(0)], [""], [""])["clip_sim_image"][0]
        for each in (large, small)
    )
    assert one == pytest.approx(two, abs=1e-4)
    assert large.size == (1600, 1200)


# --- thresholds -----------------------------------------------------------------------------------


def test_presets_equal_those_of_the_paper_and_its_code():
    assert PRESETS["paper"] == Thresholds(image=0.75, caption=0.2, directional=0.2)
    assert PRESETS["code"] == Thresholds(image=0.70, caption=0.2, directional=0.2)


def test_a_similarity_at_its_threshold_passes_and_an_unknown_one_is_ignored():
    paper = PRESETS["paper"]
    at = {"clip_sim_image": 0.75, "clip_sim_0": 0.2, "clip_sim_1": 0.2, "clip_sim_dir": 0.2}
    assert paper.passes(at)
    for name in at:
        assert not paper.passes(at | {name: 0.19})
        assert paper.passes({other: value for other, value in at.items() if other != name})
    assert paper.passes(at | {"clip_sim_dir": float("nan")})


def test_rows_are_dropped_for_the_first_reason_and_the_best_of_each_edit_are_kept(measured, tmp_path):
    scored = score_rows(measured, tmp_path / "scores", **quiet)
    code = select(scored, PRESETS["code"], top=2)
    assert code == [
        *("surplus", "", "", "clip_sim_image", "", "clip_sim_0", "clip_sim_1", "clip_sim_dir", ""),
        *("duplicate", "broken"),
    ]
    paper = select(scored, PRESETS["paper"], top=2)
    assert [row for row in range(11) if paper[row] != code[row]] == [4]
    assert paper[4] == "clip_sim_image"
    assert select(scored, PRESETS["code"], top=None)[0] == ""
    assert select(scored, PRESETS["code"], top=None, near_bits=None)[9] == ""
    assert [row for row, why in enumerate(select(scored, PRESETS["code"], top=1)) if not why] == [1, 4, 8]


def test_the_best_duplicate_is_kept_and_a_different_instruction_is_not_a_duplicate():
    def scored(instructions, sims, hashes):
        count = len(sims)
        return Scored(
            ids=[str(k) for k in range(count)],
            edits=[str(k) for k in range(count)],
            instructions=instructions,
            hashes=np.array(hashes, np.uint64),
            flaws=[""] * count,
            clips=[""] * count,
            scores={name: np.array(sims) for name in SIMILARITIES},
        )

    near = [(1, 8), (0b11111, 8), (0b11111, 8 | 2**40 | 2**41 | 2**42 | 2**43 | 2**44)]
    assert select(scored(["a b"] * 3, [0.5, 0.6, 0.4], near), ALL) == ["duplicate", "", ""]
    assert select(scored(["a b"] * 3, [0.5, 0.6, 0.4], near), ALL, near_bits=5) == [
        "duplicate",
        "",
        "duplicate",
    ]
    assert select(scored(["a b", "a c", "a d"], [0.5, 0.6, 0.4], near), ALL, near_bits=64) == ["", "", ""]
    # Missing hashes are not compared.
    assert select(scored(["a b"] * 2, [0.5, 0.6], [(0, 0), (0, 0)]), ALL) == ["", ""]


# --- hashes ---------------------------------------------------------------------------------------


def bits(one: Image.Image, other: Image.Image) -> int:
    return (picture_hash(one) ^ picture_hash(other)).bit_count()


def test_a_hash_is_robust_to_small_changes_and_distinguishes_pictures():
    for seed in range(20):
        one = picture(seed, (256, 192))
        buffer = io.BytesIO()
        one.save(buffer, "JPEG", quality=60)
        changed = [Image.open(buffer), one.resize((150, 113)), ImageEnhance.Brightness(one).enhance(0.93)]
        assert max(bits(one, each) for each in changed) <= 4
        assert bits(one, picture(seed + 100, (256, 192))) >= 12
    flat = Image.new("RGB", (64, 64), "teal")
    assert bits(flat, Image.new("RGB", (64, 64), (0, 129, 127))) == 0


def test_the_hash_equals_that_of_imagehash():
    flat = [Image.new("RGB", (50, 40), color) for color in ("black", "teal", "white")]
    for each in flat + [picture(seed, (30 + 9 * seed, 64)) for seed in range(12)]:
        assert f"{picture_hash(each):016x}" == str(imagehash.phash(each))


# --- scoring as a job -----------------------------------------------------------------------------


def test_every_row_is_scored_and_broken_rows_are_counted(unmeasured, clip, tiny_clip_dir, tmp_path):
    scored = score_rows(unmeasured, tmp_path / "s", clip=tiny_clip_dir, part_rows=2, **quiet)
    assert scored.ids == [f"p{n}" for n in range(5)]
    assert scored.flaws == ["", "broken", "", "", ""]
    assert scored.instructions[1] == "cut short"
    assert scored.clips == [tiny_clip_dir.name, "", *[tiny_clip_dir.name] * 3]
    expected = measure_similarities(clip, [picture(0)], [picture(1)], ["cat 0"], ["dog 0"])
    assert scored.of(0) == {name: pytest.approx(expected[name][0], abs=2e-6) for name in SIMILARITIES}
    assert set(scored.of(3)) == {"clip_sim_image"} and scored.of(1) == {}
    assert scored.hashes[0].tolist() == [picture_hash(picture(0)), picture_hash(picture(1))]
    assert scored.edits[0] == scored.edits[4] != scored.edits[3]
    assert jobs.summary(tmp_path / "s").counts == {"scored": 4, "broken": 1}


def test_existing_scores_are_kept_unless_rescore_is_set(measured, tiny_clip_dir, tmp_path):
    scored = score_rows(measured, tmp_path / "a", **quiet)
    assert scored.of(3) == dict(zip(SIMILARITIES, (0.69, 0.3, 0.3, 0.5), strict=True))
    assert jobs.summary(tmp_path / "a").counts == {"scored": 0, "broken": 1}
    again = score_rows(measured, tmp_path / "b", clip=tiny_clip_dir, rescore=True, **quiet)
    assert jobs.summary(tmp_path / "b").counts == {"scored": 10, "broken": 1}
    assert again.of(3) != scored.of(3)
    known = known_scores(measured)
    assert known.ids == scored.ids and known.flaws == scored.flaws and known.edits == scored.edits
    np.testing.assert_array_equal(known.scores["clip_sim_dir"], scored.scores["clip_sim_dir"])


def test_pairs_without_scores_need_a_clip_model(unmeasured, tmp_path):
    with pytest.raises(InputError, match="p0 of rows has no similarities; choose a CLIP"):
        score_rows(unmeasured, tmp_path / "s", **quiet)


def test_an_endless_source_needs_a_count(measured, tmp_path):
    measured.endless = True
    with pytest.raises(InputError, match="is endless; set a number of rows"):
        score_rows(measured, tmp_path / "s", **quiet)
    assert len(score_rows(measured, tmp_path / "s", count=3, **quiet)) == 3


def no_red(limit, loaded):
    """A safety check that flags pictures whose mean red is above a limit."""
    loaded.append(limit)
    return lambda pictures: [np.asarray(picture)[..., 0].mean() <= limit for picture in pictures]


def test_the_safety_check_is_loaded_once_and_applied_to_both_pictures(tmp_path):
    red = png(Image.new("RGB", (32, 32), "red"))
    rows = [pair(n, scores=(0.9,) * 4) for n in range(4)]
    rows[1], rows[2] = dataclasses.replace(rows[1], after=red), dataclasses.replace(rows[2], before=red)
    loaded: list[int] = []
    safety = partial(no_red, 200, loaded)
    scored = score_rows(Rows(rows), tmp_path / "s", safety=safety, part_rows=2, **quiet)
    assert scored.flaws == ["", "unsafe", "unsafe", ""]
    assert len(loaded) == 1
    assert select(scored, ALL)[1] == "unsafe"
    # A different check is a different job.
    with pytest.raises(InputError, match="started with safety"):
        score_rows(Rows(rows), tmp_path / "s", part_rows=2, **quiet)


# --- filtering ------------------------------------------------------------------------------------


def test_kept_pairs_are_written_as_a_data_set_with_scores(measured, tmp_path):
    kept = tmp_path / "kept"
    report = filter_pairs(measured, kept, PRESETS["code"], top=2, part_rows=3, **quiet)
    assert (report.rows, report.kept) == (11, 4)
    assert list(report.reasons) == [
        *("broken", "clip_sim_image", "clip_sim_0", "clip_sim_1", "clip_sim_dir", "duplicate", "surplus"),
    ]
    assert report.lines()[0] == "4 of 11 pairs kept (36.4%)"
    source = open_source(str(kept))
    assert [source[row].id for row in range(len(source))] == ["p1", "p2", "p4", "p8"]
    for row in source[0], source[3]:
        original = measured[int(row.id[1:])]
        assert (row.before, row.after) == (original.before, original.after)
        assert (row.caption, row.instruction) == (original.caption, original.instruction)
        assert dict(row.scores) == dict(original.scores)
    assert pq.read_schema(kept / "data" / "train-00000.parquet").equals(PAIR_SCHEMA)


def test_changing_the_thresholds_does_not_score_again(unmeasured, tiny_clip_dir, tmp_path, monkeypatch):
    kept = tmp_path / "kept"
    assert filter_pairs(unmeasured, kept, ALL, clip=tiny_clip_dir, **quiet).kept == 4
    monkeypatch.setattr(Scorer, "__call__", None)
    assert filter_pairs(unmeasured, kept, ALL, clip=tiny_clip_dir, **quiet).kept == 4
    with pytest.raises(InputError, match=r"started with image -1, but it is now 2; add --overwrite"):
        filter_pairs(unmeasured, kept, dataclasses.replace(ALL, image=2), clip=tiny_clip_dir, **quiet)
    report = filter_pairs(
        unmeasured, kept, dataclasses.replace(ALL, image=2), clip=tiny_clip_dir, overwrite=True, **quiet
    )
    assert (report.kept, report.unknown) == (0, 1)
    assert not list(kept.glob("data/*.parquet"))


@pytest.fixture
def table(tmp_path) -> Path:
    """A parquet folder like the pair maker's: two files, with columns that no reader uses."""
    rows = []
    for n in range(5):
        example = pair(n)
        rows.append(
            {
                "original_image": picture_cell(example.before, f"{n}_0"),
                "edited_image": picture_cell(example.after, f"{n}_1"),
                **{"original_prompt": example.caption, "edit_prompt": example.instruction},
                **{"edited_prompt": example.edited_caption, "id": example.id, "triple_id": f"t{n % 2}"},
                **{"candidate": n, "seed": 2**32 - n, "p2p_threshold": n / 8, "license": "CC0-1.0"},
                **({name: 0.5 + n / 16 for name in SIMILARITIES} if n != 3 else {}),
                **{"clip": "its own"},
            }
        )
    folder = tmp_path / "pairs"
    (folder / "data").mkdir(parents=True)
    for number, part in enumerate((rows[:2], rows[2:])):
        pq.write_table(
            pa.Table.from_pylist(part, PAIR_SCHEMA),
            folder / "data" / f"train-{number:05}.parquet",
            row_group_size=2,
        )
    return folder


def test_a_parquet_source_keeps_all_its_columns(table, tiny_clip_dir, tmp_path):
    source = open_source(str(table))
    filter_pairs(source, tmp_path / "kept", dataclasses.replace(ALL, image=0.55), clip=tiny_clip_dir, **quiet)
    [path] = (tmp_path / "kept" / "data").iterdir()
    kept, old = pq.read_table(path), pa.concat_tables(map(pq.read_table, sorted(table.glob("data/*"))))
    rows = [int(id[1:]) for id in kept["id"].to_pylist()]
    assert set(rows) - {3} == {1, 2, 4}
    for name in old.column_names:
        if name not in (*SIMILARITIES, "clip"):
            assert kept[name].to_pylist() == old.take(rows)[name].to_pylist()
    clips = dict(zip(rows, kept["clip"].to_pylist(), strict=True))
    assert clips[4] == "its own" and clips.get(3, tiny_clip_dir.name) == tiny_clip_dir.name
    assert kept.schema.equals(PAIR_SCHEMA)


def test_scores_are_added_as_columns_to_a_data_set_without_them(table, tiny_clip_dir, tmp_path):
    """The Hugging Face version's five columns, and scores as JSON that would hide the new ones."""
    [first, _] = sorted(table.glob("data/*"))
    plain = pq.read_table(first).select([*PAIR_SCHEMA.names[:5]])
    plain = plain.append_column("scores", pa.array(['{"clip_sim_dir": 9.0, "seed": 7}'] * 2))
    pq.write_table(plain, tmp_path / "plain.parquet")
    source = open_source(str(tmp_path / "plain.parquet"))
    filter_pairs(source, tmp_path / "kept", ALL, clip=tiny_clip_dir, rescore=True, **quiet)
    kept = open_source(str(tmp_path / "kept"))
    assert [kept[row].id for row in range(2)] == ["0000000", "0000001"]
    assert set(kept[0].scores) == {*SIMILARITIES, "seed"}
    assert abs(kept[0].scores["clip_sim_dir"]) <= 1
    schema = pq.read_schema(tmp_path / "kept" / "data" / "train-00000.parquet")
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert features["original_image"] == {"_type": "Image"}
    assert features["clip_sim_dir"] == {"dtype": "float64", "_type": "Value"}
    assert set(SIMILARITIES) | {"id", "clip"} <= set(schema.names)


def test_values_in_a_scores_column_that_are_not_objects_are_kept(table, tiny_clip_dir, tmp_path):
    old = pa.concat_tables(map(pq.read_table, sorted(table.glob("data/*")))).drop(["clip", *SIMILARITIES])
    mapping = [{"clip_sim_dir": 9.0, "seed": 7}] * 5
    for number, (cells, expected) in enumerate(
        (
            (pa.array([0.5] * 5), [0.5] * 5),
            (pa.array(["n/a", None, "[1]", "2.5", "{}"]), ["n/a", None, "[1]", "2.5", None]),
            (pa.array(mapping), [None] * 5),
        )
    ):
        path, out = tmp_path / f"{number}.parquet", tmp_path / f"kept-{number}"
        pq.write_table(old.append_column("scores", cells), path)
        filter_pairs(open_source(str(path)), out, ALL, top=None, clip=tiny_clip_dir, **quiet)
        kept = pq.read_table(out / "data" / "train-00000.parquet")["scores"].to_pylist()
        assert len(kept) == 5
        for one, other in zip(kept, expected, strict=True):
            assert one == other or set(SIMILARITIES) <= set(json.loads(one))
        again = open_source(str(out))
        assert all(abs(again[row].scores["clip_sim_dir"]) <= 1 for row in range(5))


def test_columns_are_kept_if_the_first_picture_is_missing_and_lost_ones_are_reported(
    table, tiny_clip_dir, tmp_path
):
    paths = sorted(table.glob("data/*"))
    first = pq.read_table(paths[0]).append_column("author", pa.array(["me", "you"]))
    none = pa.array([None, first["original_image"][1].as_py()], first["original_image"].type)
    pq.write_table(first.set_column(0, "original_image", none), tmp_path / "one.parquet")
    messages = []
    one = open_source(str(tmp_path / "one.parquet"))
    filter_pairs(one, tmp_path / "kept", ALL, clip=tiny_clip_dir, say=messages.append)
    assert pq.read_table(tmp_path / "kept" / "data")["author"].to_pylist() == ["you"]
    assert not messages
    # Files with different columns are written with the Hugging Face ones; the dropped ones are reported.
    pq.write_table(first, paths[0])
    filter_pairs(open_source(str(table)), tmp_path / "both", ALL, clip=tiny_clip_dir, say=messages.append)
    [line] = messages
    assert line.startswith("warning: the columns author of ")


def test_a_nan_similarity_counts_as_unknown(table, tiny_clip_dir, tmp_path):
    path = sorted(table.glob("data/*"))[0]
    old = pq.read_table(path)
    place = old.column_names.index("clip_sim_dir")
    pq.write_table(old.set_column(place, "clip_sim_dir", pa.array([float("nan"), 0.5])), path)
    source = open_source(str(table))
    assert "clip_sim_dir" not in source[0].scores
    scored = score_rows(source, tmp_path / "scores", clip=tiny_clip_dir, **quiet)
    assert scored.clips[:2] == [tiny_clip_dir.name, ""]
    assert "clip_sim_dir" in scored.of(0)


def test_folders_of_another_command_or_with_other_files_are_refused_before_any_work(
    measured, tmp_path, monkeypatch
):
    monkeypatch.setattr("ip2p.synth.filter.score_rows", None)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="home already contains other files"):
        filter_pairs(measured, tmp_path / "home", ALL, **quiet)
    assert len(list((tmp_path / "home").iterdir())) == 1
    other = tmp_path / "pairs"
    jobs.run_job(
        lambda: lambda part: jobs.StageOutput(tables={}), [[1]], other, settings={"seed": 1}, **quiet
    )
    for overwrite in (False, True):
        with pytest.raises(InputError, match="pairs contains the output of another command"):
            filter_pairs(measured, other, ALL, overwrite=overwrite, **quiet)
    assert jobs.is_done(other) and not (other / "scores").exists()


def test_pictures_that_a_table_references_by_path_are_embedded(tiny_clip_dir, tmp_path):
    for k in (0, 1):
        picture(k).save(tmp_path / f"{k}.png")
    cell = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {
        f"{name}_image": pa.array([{"path": f"{k}.png"}], cell)
        for k, name in enumerate(("original", "edited"))
    }
    pq.write_table(pa.table(columns | {"edit_prompt": ["make it red"]}), tmp_path / "t.parquet")
    source = open_source(str(tmp_path / "t.parquet"))
    filter_pairs(source, tmp_path / "kept", ALL, clip=tiny_clip_dir, **quiet)
    kept = open_source(str(tmp_path / "kept"))[0]
    assert (kept.id, kept.before) == ("0000000", (tmp_path / "0.png").read_bytes())
    assert set(kept.scores) == {"clip_sim_image"}
