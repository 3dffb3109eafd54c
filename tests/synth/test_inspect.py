import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from ip2p.base.errors import InputError
from ip2p.data.records import BrokenRow, Pair
from ip2p.synth.filter import PRESETS, SIMILARITIES, known_scores
from ip2p.synth.inspect import histogram, inspect


class Rows:
    endless, name, key = False, "pairs & <co>", "k"

    def __init__(self, count):
        self.rows = [self.row(n, 0.6 + 0.02 * n) for n in range(count)]

    def row(self, n, image):
        page = np.full((40, 24, 3), 10 * n, np.uint8)
        scores = dict(zip(SIMILARITIES, (image, 0.3, 0.25, 0.22), strict=True))
        words = {
            "caption": f"a cat {n}",
            "instruction": f"make it <b>{n}</b>",
            "edited_caption": f"a dog {n}",
        }
        return Pair(id=f"p{n}", before=page, after=page, scores=scores, **words)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        if isinstance(self.rows[row], BrokenRow):
            raise self.rows[row]
        return self.rows[row]

    def blocks(self):
        return [range(len(self.rows))]


class Page(HTMLParser):
    """What a browser would find: tags, attributes and texts. Asserts that all tags are closed."""

    VOID = ("meta", "img", "br", "line")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.texts = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture
def source():
    source = Rows(12)
    source.rows[4] = BrokenRow("p4", "cut <short>")
    return source


@pytest.fixture
def text(source, tmp_path):
    reasons = inspect(source, known_scores(source), tmp_path / "page.html", PRESETS["code"], count=2, side=32)
    # Rows 0 to 4 are below 0.7, and row 4 is broken.
    assert reasons == {"broken": 1, "clip_sim_image": 4}
    return (tmp_path / "page.html").read_text(encoding="utf-8")


def sections(text):
    """Heading → the ids of the figures below it."""
    found = {}
    for part in re.split(r"<h[23]>", text)[1:]:
        heading, rest = part.split("</h", 1)
        found.setdefault(heading, re.findall(r"(p\d+): (?:removed|kept)", rest))
    return found


def test_the_page_is_self_contained_and_has_no_scripts(text):
    page = Page(text)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    sources = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert sources
    for source in sources:
        head, data = source.split(",")
        assert head == "data:image/jpeg;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (19, 32)
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)


def test_texts_of_the_data_are_escaped(text):
    page = Page(text)
    assert "make it <b>5</b>" in page.texts
    assert any("cut <short>" in words for words in page.texts)
    assert "pairs & <co>: filter results" in page.texts


def test_each_threshold_shows_the_pairs_nearest_to_it_on_both_sides(text):
    found = sections(text)
    # Row 5 is at 0.70, the threshold; the broken row is not shown at any.
    assert found["Narrowly passed (≥ 0.7)"] == ["p5", "p6"]
    assert found["Narrowly failed"] == ["p3", "p2"]
    assert found["Kept pairs (a sample)"] == ["p5", "p8"]
    assert found["broken: unreadable picture"] == ["p4"]
    assert len([1 for heading in found if heading.startswith("Narrowly passed")]) == 2  # 0.7 and 0.2


def test_the_page_shows_the_numbers_of_the_filter(text):
    assert "<b>7</b> of 12 pairs kept (58.3%)" in text
    assert '<td>too low: picture – picture</td><td class="n">4</td>' in text
    assert '<td class="n">0.7</td><td class="n">4</td><td class="n">1</td>' in text


def test_the_bars_of_a_histogram_add_up_to_the_known_rows():
    values = np.array([0.1, 0.2, 0.2, 0.9, np.nan])
    svg = histogram(values, np.array([False, True, False, True, True]), 0.2)
    bars = re.findall(r"<title>[-\d.]+ to [-\d.]+: (\d+) pairs, (\d+) kept", svg)
    # A partly green bar is two rectangles with one title.
    assert sorted(bars) == [("1", "0"), ("1", "1"), ("2", "1"), ("2", "1")]
    heights = [float(h) for h in re.findall(r'height="([\d.]+)"', svg)]
    assert sum(heights) == pytest.approx(2 * 120)  # of four values, with two in the highest bar
    assert "median 0.200 · minimum 0.2" in svg
    assert histogram(np.array([np.nan]), np.array([True]), 0.2) == "<p>Unknown for all pairs.</p>"
    assert "<rect" in histogram(np.array([0.2]), np.array([True]), 0.2)


def test_an_existing_page_is_kept_unless_overwritten(source, text, tmp_path):
    again = tmp_path / "page.html"
    with pytest.raises(InputError, match="already exists"):
        inspect(source, known_scores(source), again, PRESETS["paper"])
    assert again.read_text(encoding="utf-8") == text
    inspect(source, known_scores(source), again, PRESETS["paper"], overwrite=True)
    assert again.read_text(encoding="utf-8") != text
