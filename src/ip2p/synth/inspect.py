"""Writes an HTML page that shows what a filter keeps and removes: histograms, and pairs near each threshold.

The page is one static file with embedded pictures and no scripts, so it opens in any browser.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from ip2p.base.files import check_output, write_text
from ip2p.data.records import BrokenRow, Source, open_picture
from ip2p.synth.filter import NEAR_BITS, REASONS, TOP, TOP_WHOLE, Scored, Thresholds, select

if TYPE_CHECKING:
    from numpy.typing import NDArray

SIDE = 128  # pixels of a picture on the page
AT_EACH = 6  # kept pairs and removed pairs shown at each threshold
BARS = 50
WIDTH, HEIGHT, FOOT = 640, 120, 18  # of a histogram, in SVG units

TITLES = {
    "clip_sim_image": "picture – picture",
    "clip_sim_0": "picture before – caption",
    "clip_sim_1": "picture after – edited caption",
    "clip_sim_dir": "change of pictures – change of captions (directional)",
}
WORDS = {
    "broken": "unreadable picture",
    "unsafe": "picture rejected by the safety check",
    "duplicate": "nearly the same pictures as a better pair with the same instruction",
    "surplus": "the edit already has enough better pairs",
} | {name: f"too low: {title}" for name, title in TITLES.items()}

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem;
  color: #222; background: #fff }
table { border-collapse: collapse } td, th { padding: .15rem 1rem .15rem 0; text-align: left }
td.n { text-align: right; font-variant-numeric: tabular-nums }
svg { width: 100%; max-width: 46rem; height: auto; display: block }
.sheet { display: flex; flex-wrap: wrap; gap: .8rem; margin: .4rem 0 1.2rem }
figure { margin: 0; width: 17rem; border-top: 4px solid #1b7f4b; padding-top: .3rem }
figure.gone { border-color: #b3462e }
figure img { width: 8.4rem; height: 8.4rem; object-fit: contain; background: #eee; vertical-align: top }
figcaption { font-size: 12px; line-height: 1.35; overflow-wrap: anywhere } figcaption b { font-size: 13px }
.kept { fill: #1b7f4b } .rest { fill: #c9b8a8 } .least { stroke: #b3462e; stroke-width: 1.5 }
text { font: 11px system-ui, sans-serif; fill: #555 }
"""


def inspect(
    source: Source,
    scored: Scored,
    path: Path,
    thresholds: Thresholds,
    *,
    top: int | None = TOP,
    top_whole: int | None = TOP_WHOLE,
    near_bits: int | None = NEAR_BITS,
    count: int = AT_EACH,
    side: int = SIDE,
    overwrite: bool = False,
) -> dict[str, int]:
    """Write the page for `source`, scored by `filter.score_rows`; return the removed rows by reason.

    For each threshold, the page shows the `count` pairs that narrowly pass and the `count` that narrowly
    fail. For each other reason, and for the kept pairs, it shows `count` evenly spaced pairs. Raises
    InputError, before any work, if the file cannot be written.
    """
    check_output(path, overwrite=overwrite)
    reasons = select(scored, thresholds, top=top, top_whole=top_whole, near_bits=near_bits)
    stays = np.array([not reason for reason in reasons], dtype=bool)
    gone = Counter(reasons)
    removed = {name: gone[name] for name in REASONS if gone[name]}
    sheet = _Sheet(source, scored, reasons, side)
    parts = [
        _head(source.name, len(scored), int(stays.sum()), removed, scored, thresholds),
        "<h2>Kept pairs (a sample)</h2>",
        sheet.of(_spread(np.flatnonzero(stays), count)),
    ]
    for name, least in thresholds.least().items():
        values = scored.scores[name]
        below, above = _nearest(values, least, scored.flaws, count)
        parts += [
            f"<h2>{html.escape(TITLES[name])}</h2>",
            histogram(values, stays, least),
            f"<h3>Narrowly passed (≥ {least:g})</h3>",
            sheet.of(above),
            "<h3>Narrowly failed</h3>",
            sheet.of(below),
        ]
    for name in ("duplicate", "surplus", "unsafe", "broken"):
        if rows := [row for row, reason in enumerate(reasons) if reason == name]:
            parts += [f"<h2>{name}: {html.escape(WORDS[name])}</h2>", sheet.of(_spread(rows, count))]
    title = html.escape(f"{source.name}: filter results")
    write_text(
        path,
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width">\n<title>{title}</title>\n'
        f"<style>{STYLE}</style>\n<h1>{title}</h1>\n" + "\n".join(parts) + "\n</html>\n",
    )
    return removed


def _head(
    name: str, rows: int, kept: int, gone: dict[str, int], scored: Scored, thresholds: Thresholds
) -> str:
    """The counts: kept pairs, removed pairs by first reason, and pairs below each threshold."""
    share = f" ({kept / rows:.1%})" if rows else ""
    lines = [f"<p><b>{kept:,}</b> of {rows:,} pairs kept{share}.</p>"]
    if gone:
        cells = (
            f'<tr><td>{html.escape(WORDS[reason])}</td><td class="n">{number:,}</td></tr>'
            for reason, number in gone.items()
        )
        lines.append(f"<table><tr><th>removed, by first reason</th><th></th></tr>{''.join(cells)}</table>")
    cells = (
        f'<tr><td>{html.escape(TITLES[of])}</td><td class="n">{least:g}</td>'
        f'<td class="n">{int((scored.scores[of] < least).sum()):,}</td>'
        f'<td class="n">{int(np.isnan(scored.scores[of]).sum()):,}</td></tr>'
        for of, least in thresholds.least().items()
    )
    head = "<tr><th>similarity</th><th>minimum</th><th>below</th><th>unknown</th></tr>"
    lines.append(f"<table>{head}{''.join(cells)}</table>")
    return "\n".join(lines)


def histogram(values: NDArray[np.float64], stays: NDArray[np.bool_], least: float) -> str:
    """An SVG histogram with the kept pairs in green and the threshold as a line."""
    known = ~np.isnan(values)
    if not known.any():
        return "<p>Unknown for all pairs.</p>"
    low, high = min(values[known].min(), least), max(values[known].max(), least)
    high = high if high > low else low + 0.01
    edges = np.linspace(low, high, BARS + 1)
    every, kept = (np.histogram(values[which], edges)[0] for which in (known, known & stays))
    scale, wide = HEIGHT / every.max(), WIDTH / BARS
    bars = []
    for number, (all_of, green) in enumerate(zip(every.tolist(), kept.tolist(), strict=True)):
        span = f"{edges[number]:.3f} to {edges[number + 1]:.3f}"
        tooltip = f"<title>{span}: {all_of:,} pairs, {green:,} kept</title>"
        for kind, first, last in (("kept", 0, green), ("rest", green, all_of)):
            if last > first:
                bars.append(
                    f'<rect class="{kind}" x="{number * wide:.2f}" y="{HEIGHT - last * scale:.2f}" '
                    f'width="{wide - 1:.2f}" height="{(last - first) * scale:.2f}">{tooltip}</rect>'
                )
    x = (least - low) / (high - low) * WIDTH
    side = "end" if x > WIDTH / 2 else "start"
    label = f"median {np.median(values[known]):.3f} · minimum {least:g}"
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT + FOOT}" role="img" aria-label="{label}">{"".join(bars)}'
        f'<line class="least" x1="{x:.2f}" x2="{x:.2f}" y1="0" y2="{HEIGHT}"/>'
        f'<text x="{x + (-5 if side == "end" else 5):.2f}" y="12" text-anchor="{side}">{label}</text>'
        f'<text x="0" y="{HEIGHT + 13}">{low:.2f}</text>'
        f'<text x="{WIDTH}" y="{HEIGHT + 13}" text-anchor="end">{high:.2f}</text></svg>'
    )


def _nearest(
    values: NDArray[np.float64], least: float, flaws: Sequence[str], count: int
) -> tuple[list[int], list[int]]:
    """The rows just below a threshold and just above it, nearest first."""
    order = [row for row in np.argsort(values, kind="stable").tolist() if not flaws[row]]
    known = [row for row in order if not math.isnan(values[row])]
    below = [row for row in known if values[row] < least]
    return below[::-1][:count], known[len(below) :][:count]


def _spread(rows: Sequence[int] | NDArray[np.int64], count: int) -> list[int]:
    """Up to `count` evenly spaced rows."""
    few = min(count, len(rows))
    return [int(rows[k * len(rows) // few]) for k in range(few)]


class _Sheet:
    """Renders rows as figures: both pictures, the texts, the scores."""

    def __init__(self, source: Source, scored: Scored, reasons: Sequence[str], side: int) -> None:
        self.source, self.scored, self.reasons, self.side = source, scored, reasons, side

    def of(self, rows: Sequence[int]) -> str:
        figures = "".join(self._figure(row, self.scored.of(row)) for row in rows)
        return f'<div class="sheet">{figures}</div>' if figures else "<p>None.</p>"

    def _figure(self, row: int, scores: Mapping[str, float]) -> str:
        reason, id = self.reasons[row], html.escape(self.scored.ids[row])
        try:
            pair = self.source[row]
            texts = [pair.instruction, pair.caption, pair.edited_caption]
            shown = "".join(
                _picture(open_picture(data, pair.id), text or side, self.side)
                for data, text, side in ((pair.before, texts[1], "before"), (pair.after, texts[2], "after"))
            )
        except BrokenRow as error:
            texts, shown = ["", error.reason, ""], ""
        instruction, caption, edited = map(html.escape, texts)
        captions = f"{caption} → {edited}" if edited else caption
        numbers = ", ".join(f"{name.removeprefix('clip_sim_')} {value:.3f}" for name, value in scores.items())
        verdict = html.escape(f"removed: {WORDS[reason]}" if reason else "kept")
        return (
            f"<figure{' class=gone' if reason else ''}>{shown}<figcaption><b>{instruction}</b><br>"
            f"{captions}<br>{numbers}<br>{id}: {verdict}</figcaption></figure>"
        )


def _picture(picture: Image.Image, words: str, side: int) -> str:
    buffer = io.BytesIO()
    ImageOps.contain(picture, (side, side)).save(buffer, "JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{data}" alt="{html.escape(words)}">'
