"""Checks of a data set: every defect is found and named, and correct rows are not reported."""

import csv
import io
import json

import numpy as np
import pytest
from layouts import Rows, make_pair, make_pairs, picture
from PIL import Image
from test_align import cropped, drawn, shifted

from ip2p.data.check import check, imperative, sheet, tokens
from ip2p.data.loading import open_source
from ip2p.data.records import BrokenRow
from ip2p.training.storybook.source import StorybookSource


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def findings_of(rows):
    return {f.name: (f.kind, f.count, f.ids) for f in check(Rows(rows)).findings}


def page(kind, number):
    before, after = drawn(kind, number)
    return {"before": png(before), "after": png(after)}


def every_defect(folder):
    """A folder with each defect once, under an id that names it, and 12 correct rows."""
    rows = []

    def add(id, before, after, instruction="make it blue", caption="a page", edited_caption="a blue page"):
        names = []
        for part, data in (("before", before), ("after", after)):
            name = f"{part}/{len(rows):03}.png"
            (folder / part).mkdir(parents=True, exist_ok=True)
            if data is not None:
                (folder / name).write_bytes(data)
            names.append(name)
        rows.append([id, *names, instruction, caption, edited_caption])

    pages = [page(kind, number) for kind in ("recolour", "add", "put_on", "remove") for number in range(3)]
    for number, both in enumerate(pages):
        add(f"right-{number}", **both)
    one, three = pages[0], pages[6]
    before, after = drawn("remove", 3)
    add("cut", one["before"], one["after"][:-300])
    add("no-picture", one["before"], None)
    add("silent", picture(1), picture(2), instruction="  ")
    add("swapped-words", picture(3), picture(4), "a page with a cat", "make the cat green", "a green cat")
    add("swapped-pictures", picture(20), picture(5), "make it new", "a shared page", "another")
    rows[-1][1:3] = rows[-1][2], rows[-1][1]  # its after is the before of the next rows
    add("shares-1", picture(20), picture(6), "make it old", "a shared page", "an old page")
    add("shares-2", picture(20), picture(7), "make it odd", "a shared page", "an odd page")
    add("other-size", picture(8), picture(9, size=(24, 24)))
    add("shifted", png(before), png(shifted(after, 8, 0)))
    add("cropped", png(before), png(cropped(after, 0.1)))
    add("right-3", picture(10), picture(11))  # a duplicate id
    add("again", three["before"], three["after"])
    add("same", picture(12), picture(12), instruction="word " * 90)
    with open(folder / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [["id", "before", "after", "instruction", "caption", "edited_caption"], *rows]
        )
    return folder


def test_every_defect_of_a_folder_has_its_own_line(tmp_path):
    report = check(open_source(str(every_defect(tmp_path / "set"))))
    lines = {line.split("  ")[0]: " ".join(line.split()) for line in report.lines()}
    starts = {
        "broken picture": "1 row: cannot be read or decoded: cut (after: is damaged or truncated",
        "missing picture": "1 row: a picture or the texts of the row are missing: no-picture (after: ",
        "empty instruction": "1 row: the instruction is empty: silent",
        "duplicate ids": "1 row: an id that occurs more than once: right-3",
        "swapped words": "1 row: the caption starts like an instruction",
        "swapped pictures": "1 row: pairs share the picture after rather than the picture before",
        "size mismatch": "1 row: before and after have different sizes: other-size (24x20 and 24x24)",
        "misaligned": "2 rows: unchanged parts are not in the same place: shifted (shifted by +8, +0 px), "
        "cropped (cropped by 10% and enlarged)",
        "duplicate pairs": "1 row: same pictures and instruction as an earlier row: again",
        "identical pictures": "1 row: before and after are the same: same",
    }
    for name, start in starts.items():
        assert lines.get(name, "").startswith(f"{name} {start}"), lines.get(name)
    assert lines["swapped words"].endswith("may be swapped: swapped-words")
    assert lines["swapped pictures"].endswith("may be swapped: swapped-pictures")
    assert lines["data"].endswith("set, 25 rows")
    assert lines["instruction"] == (
        "instruction 3 / 3 / 90 words (min / median / max), about 1 over 77 tokens, 1 empty"
    )
    assert lines["caption"].startswith("caption 2 / 2 / 4 words")
    assert {f.name for f in report.findings} == set(starts)
    assert [f.name for f in report.defects] == list(starts)[:4]
    assert report.summary() == (
        f"{report.name} has defects: broken picture 1, missing picture 1, empty instruction 1, "
        "duplicate ids 1. Fix or remove these rows."
    )
    assert json.loads(json.dumps(report.to_json()))["findings"][0]["ids"][0].startswith("cut (after")


def test_drawn_pairs_have_no_findings():
    report = check(StorybookSource(64, seed=5, count=40))
    assert report.findings == ()
    assert report.lines()[-1] == f"{'found':<20}no problems"
    assert report.sizes == {"64x64": 40}


def test_an_endless_source_is_checked_up_to_a_limit():
    endless = Rows(make_pairs(3))
    endless.endless = True
    endless.__class__ = type("Long", (Rows,), {"__len__": lambda self: 2**31})
    report = check(endless, limit=2)
    assert (report.looked_at, report.lines()[0].split(", ", 1)[1]) == (
        2,
        "endless; checked the first 2",
    )


def test_the_first_few_ids_are_named_and_all_are_counted():
    rows = [BrokenRow(f"row-{number}", "before: gone") for number in range(9)]
    kind, count, ids = findings_of(rows)["broken picture"]
    assert (kind, count, len(ids)) == ("defect", 9, 5)
    line = check(Rows(rows)).findings[0].line()
    assert line.startswith(f"{'broken picture':<20}9 rows: ") and line.endswith("row-4 (before: gone), …")


@pytest.mark.parametrize(
    "words",
    [
        "make it snow",
        "Turn the cat red.",
        "please add a hat",
        "Now put it on the moon",
        "let's go to Mars",
        "SWAP them",
    ],
)
def test_an_instruction_is_recognized_by_its_first_words(words):
    assert imperative(words)


@pytest.mark.parametrize(
    "words",
    ["a cat on a mat", "in the snow", "as a painting", "The house is now red", "", "makeup on a table"],
)
def test_other_texts_are_not_mistaken_for_instructions(words):
    assert not imperative(words)


def test_words_are_reported_as_swapped_only_if_both_look_swapped():
    assert "swapped words" in findings_of([make_pair(0, instruction="a red cat", caption="make the cat red")])
    for instruction, caption in (
        ("in the snow", "a cat on a mat"),
        ("make the cat red", "a cat"),
        ("make the cat red", "make a wish, a poster"),
        ("as a painting", ""),
    ):
        pair = make_pair(0, instruction=instruction, caption=caption, edited_caption="")
        assert "swapped words" not in findings_of([pair])


def swaps(*pairs, captions=None):
    """The rows reported as swapped, for pairs of picture numbers; `captions`: of before and after."""
    rows = []
    for number, (before, after) in enumerate(pairs):
        caption, edited = captions[number] if captions else ("", "")
        words = {"caption": caption, "edited_caption": edited}
        rows.append(make_pair(number, id=str(number), before=picture(before), after=picture(after), **words))
    return findings_of(rows).get("swapped pictures", ("", 0, ()))[2]


def test_a_row_whose_after_is_its_groups_before_is_reported_as_swapped():
    assert swaps((1, 2), (1, 3), (4, 1)) == ("2",)
    # With captions one other row is enough: both have the same caption before.
    assert swaps((1, 2), (3, 1), captions=[("a", "b"), ("a", "c")]) == ("1",)


def test_a_group_with_one_shared_after_is_reported_as_swapped():
    assert swaps((2, 1), (3, 1), (4, 1)) == ("0", "1", "2")
    assert swaps((2, 1), (3, 1), captions=[("a", "b"), ("a", "c")]) == ("0", "1")


def test_chained_and_reversed_edits_are_not_reported_as_swapped():
    assert swaps((1, 2), (2, 3), (3, 4)) == ()
    assert swaps((1, 2), (1, 3), (1, 4), (2, 5)) == ()
    assert swaps((1, 2), (2, 1)) == ()
    # Removing things from different pictures may leave the same picture; their captions tell the edits apart.
    assert swaps((2, 1), (3, 1), (4, 1), captions=[("b", "a"), ("c", "a"), ("d", "a")]) == ()
    # An edit of an edit, edited twice: the second step's caption is different.
    assert swaps((1, 2), (2, 3), (2, 4), captions=[("a", "b"), ("b", "c"), ("b", "d")]) == ()


def test_the_same_picture_in_another_format_counts_as_identical():
    pixels = np.asarray(Image.open(io.BytesIO(picture(1))))
    assert "identical pictures" in findings_of([make_pair(0, before=picture(1), after=pixels)])
    again = make_pair(1, before=pixels, after=picture(2), instruction="Make  it number 0")
    assert findings_of([make_pair(0, before=picture(1), after=picture(2)), again])["duplicate pairs"][2] == (
        "pair-1",
    )


def test_the_token_estimate_counts_words_and_punctuation():
    assert tokens("make it snow") == 5
    assert tokens("a photograph, please") == 2 + 1 + 2 + 1 + 1


def test_the_sheet_shows_all_pairs_and_a_gray_area_for_a_broken_row(tmp_path):
    rows = [*make_pairs(10), BrokenRow("lost", "before: gone")]
    sheet(Rows(rows), tmp_path / "sheet.png", count=11)
    shown = Image.open(tmp_path / "sheet.png")
    assert shown.width > 3 * 2 * 160 and shown.height > 4 * 160
    grey = np.asarray(shown.convert("RGB")) == (211, 211, 211)  # the broken row's place
    assert grey.all(-1).sum() >= 2 * 160 * 160 - 100


# --- values -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("nan", "a missing value written out"),
        ("None", "a missing value written out"),
        ("17", "a number"),
        ("0.25", "a number"),
        ("-1e-3", "a number"),
        ("https://x.example/a", "an address"),
        ("images/0001.png", "a file name"),
        ('{"edit": "make it snow"}', "JSON"),
        ("[1, 2]", "JSON"),
        ("b'make it snow'", "Python's notation of a value"),
        ("{'edit': 'make it snow'}", "Python's notation of a value"),
        ("(1, 'make it snow')", "Python's notation of a value"),
        ("<PIL.Image.Image image mode=RGB size=8x8>", "Python's notation of a value"),
        ("???", "signs alone"),
    ],
)
def test_an_instruction_that_is_not_words_is_a_defect(value, reason):
    report = check(Rows([make_pair(0), make_pair(1, instruction=value)]))
    [finding] = report.defects
    assert (finding.name, finding.ids) == ("no words", (f"pair-1 ({reason})",))


@pytest.mark.parametrize(
    "words",
    [
        "make it 2024",
        "3 cats",
        "雪を降らせて",
        "make photo.png darker",
        "[bold] letters",
        "{x} red",
        "(very:1.2) red",
        "🦊",
        "nantucket",
    ],
)
def test_unusual_instructions_are_not_reported(words):
    assert not check(Rows([make_pair(0, instruction=words)])).findings


def test_captions_in_the_instruction_column_are_reported():
    report = check(Rows([make_pair(k, instruction=f"another page — “{k}”") for k in range(2)]))
    assert [finding.name for finding in report.findings] == ["caption for instruction"]


def test_one_instruction_for_all_rows_is_reported():
    report = check(Rows([make_pair(k, instruction="make it snow") for k in range(12)]))
    [finding] = report.findings
    assert (finding.name, finding.kind, finding.count) == ("one instruction", "warning", 12)
    assert not check(Rows([make_pair(k, instruction="make it snow") for k in range(5)])).findings


def test_a_blank_picture_is_reported():
    gray = np.full((20, 24, 3), 128, np.uint8)
    report = check(Rows([make_pair(0, after=gray)]))
    [finding] = report.findings
    assert (finding.name, finding.ids) == ("blank picture", ("pair-0 (after)",))
