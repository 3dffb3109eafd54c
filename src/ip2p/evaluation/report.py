"""The report of an evaluation: averages with bootstrap intervals, as a table, JSON and a page."""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ip2p.evaluation.metrics import Metric

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

CELLS = 8_000_000  # maximum size of the resampled weights in memory
Numbers = dict[str, "NDArray[np.float64]"]  # values of all rows by metric; NaN: no value


# --- intervals ------------------------------------------------------------------------------------


def resampled_means(
    values: NDArray[np.float64], groups: Sequence[str], *, weights: NDArray[np.float64], resamples: int
) -> NDArray[np.float64]:
    """Bootstrap replicates of weighted means, [resamples, columns] (Efron 1979).

    values, weights: [rows, columns]; NaN or weight 0 excludes a row. Resamples whole groups, because the rows
    of a group are not independent. The draws depend only on the number of groups, so two models are compared
    on the same draws.
    """
    names = {name: number for number, name in enumerate(dict.fromkeys(groups))}
    owner = np.array([names[name] for name in groups])
    use = np.where(np.isnan(values), 0.0, weights)
    parts, wholes = (np.zeros((len(names), values.shape[1])) for _ in range(2))
    np.add.at(parts, owner, np.nan_to_num(values) * use)
    np.add.at(wholes, owner, use)
    rng = np.random.default_rng(0)
    found = []
    step = max(1, CELLS // len(names))
    for start in range(0, resamples, step):
        some = min(step, resamples - start)
        times = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=some).astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            found.append((times @ parts) / (times @ wholes))
    return np.concatenate(found)


def summarize_rows(
    numbers: Numbers, groups: Sequence[str], metrics: Mapping[str, Metric], *, resamples: int
) -> dict[str, dict[str, float | int | None] | None]:
    """{metric: {"value", "low", "high", "count"}}: the mean and its 95% interval (percentiles).

    A metric without values is None; low and high are None for fewer than two values.
    """
    shown = [name for name, metric in metrics.items() if not metric.hidden]
    if not groups or not shown:
        return dict.fromkeys(shown)
    values = np.stack([numbers[name] for name in shown], axis=1)
    weights = np.stack(
        [
            np.nan_to_num(numbers[metrics[name].weight]) if metrics[name].weight else np.ones(len(groups))
            for name in shown
        ],
        axis=1,
    )
    draws = resampled_means(values, groups, weights=weights, resamples=resamples)
    found: dict[str, dict[str, float | int | None] | None] = {}
    for column, name in enumerate(shown):
        there = ~np.isnan(values[:, column])
        count = int(there.sum())
        whole = weights[there, column].sum()
        if not count or not whole:
            found[name] = None
            continue
        mean = float((values[there, column] * weights[there, column]).sum() / whole)
        ends: list[float | None] = [None, None]
        if count > 1:
            ends = [float(end) for end in np.nanpercentile(draws[:, column], [2.5, 97.5])]
        found[name] = {"value": mean, "low": ends[0], "high": ends[1], "count": count}
    return found


def correlation(
    one: NDArray[np.float64], other: NDArray[np.float64], groups: Sequence[str], *, resamples: int
) -> dict[str, float | int | None] | None:
    """Pearson correlation of two metrics with a bootstrap interval; None if one of them is constant."""
    there = ~(np.isnan(one) | np.isnan(other))
    x, y = one[there], other[there]
    kept = [group for group, yes in zip(groups, there, strict=True) if yes]
    if len(x) < 3 or not x.std() or not y.std():
        return None
    columns = np.stack([x, y, x * x, y * y, x * y], axis=1)
    means = resampled_means(columns, kept, weights=np.ones_like(columns), resamples=resamples)

    def of(m: NDArray[np.float64]) -> NDArray[np.float64]:
        with np.errstate(invalid="ignore", divide="ignore"):
            spread = (m[..., 2] - m[..., 0] ** 2) * (m[..., 3] - m[..., 1] ** 2)
            return (m[..., 4] - m[..., 0] * m[..., 1]) / np.sqrt(spread)

    low, high = np.nanpercentile(of(means), [2.5, 97.5])
    return {
        "value": float(np.corrcoef(x, y)[0, 1]),
        "low": float(low),
        "high": float(high),
        "count": len(x),
    }


# --- the report -----------------------------------------------------------------------------------


def write_summary(
    rows: pa.Table, metrics: Mapping[str, Metric], *, resamples: int, by_kind: bool = False
) -> list[dict[str, Any]]:
    """The lines of the report, one per variant and point, in the order of the rows.

    by_kind: average the means of the kinds (GEdit-Bench) instead of all rows.
    """
    columns = {
        name: rows[name].to_pylist() for name in ("variant", "kind", "point", "group", "edit_kind", "flaw")
    }
    values = {name: rows[name].to_numpy(zero_copy_only=False).astype(np.float64) for name in metrics}
    keys = list(zip(columns["variant"], columns["point"], columns["kind"], strict=True))
    flaws = columns["flaw"]
    report = []
    for key in dict.fromkeys(keys):
        place = np.array(
            [k for k, each in enumerate(keys) if each == key and flaws[k] is None], dtype=np.int64
        )
        flawed = sum(each == key and flaws[k] is not None for k, each in enumerate(keys))

        def of(places: NDArray[np.int64]) -> dict[str, Any]:
            groups = [columns["group"][k] for k in places]
            return summarize_rows(
                {name: column[places] for name, column in values.items()},
                groups,
                metrics,
                resamples=resamples,
            )

        kinds = list(dict.fromkeys(columns["edit_kind"][k] for k in place if columns["edit_kind"][k]))
        by = {
            kind: of(np.array([k for k in place if columns["edit_kind"][k] == kind], dtype=np.int64))
            for kind in kinds
        }
        found = of(place)
        if by_kind and by:
            found = {name: _mean_of_kinds([each[name] for each in by.values()]) for name in found}
        line = {"name": key[0], "kind": key[2], "point": key[1], "rows": len(place), "flawed": flawed}
        line |= {"metrics": found, "kinds": by}
        if "strict" in metrics and "clip_directional" in metrics:
            groups = [columns["group"][k] for k in place]
            line["correlations"] = {
                f"clip_directional and {name}": correlation(
                    values["clip_directional"][place], values[name][place], groups, resamples=resamples
                )
                for name in ("strict", "nearest", "gain")
                if name in metrics
            }
        report.append(line)
    return report


def _mean_of_kinds(each: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """The mean of the kinds' means; its interval assumes independent kinds."""
    known = [one for one in each if one is not None]
    if not known:
        return None
    value = sum(one["value"] for one in known) / len(known)
    halves = [(one["high"] - one["low"]) / 2 for one in known if one["low"] is not None]
    half = math.sqrt(sum(each**2 for each in halves)) / len(known) if len(halves) == len(known) else None
    return {
        "value": value,
        "low": None if half is None else value - half,
        "high": None if half is None else value + half,
        "count": sum(one["count"] for one in known),
    }


def label_of(line: Mapping[str, Any]) -> str:
    """The name of a line of the report: its variant and its point."""
    return line["name"] if line["point"] is None else f"{line['name']} {line['point']:g}"


def as_table(summary: Sequence[Mapping[str, Any]], metrics: Mapping[str, Metric], *, width: int = 110) -> str:
    """The report as text of at most `width` columns, split into blocks of metrics.

    A cell has the mean and half the width of its 95% interval.
    """
    shown = [name for name, metric in metrics.items() if not metric.hidden]
    first = [["", *(label_of(line) for line in summary)], ["rows", *(str(line["rows"]) for line in summary)]]
    columns = [
        [
            f"{name} {'↑' if metrics[name].higher else '↓'}",
            *(_short(line["metrics"][name]) for line in summary),
        ]
        for name in shown
    ]
    blocks: list[list[list[str]]] = []
    for column in columns:
        wide = sum(max(map(len, each)) + 2 for each in [*(blocks[-1] if blocks else first), column])
        if not blocks or (wide > width and len(blocks[-1]) > len(first)):
            blocks.append([*first])
        blocks[-1].append(column)
    return "\n\n".join(_block(block) for block in blocks)


def _block(columns: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in columns]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in zip(*columns, strict=True)
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _short(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    digits = 1 if abs(found["value"]) >= 10 else 3
    text = f"{found['value']:.{digits}f}"
    return text if found["low"] is None else f"{text} ±{(found['high'] - found['low']) / 2:.{digits}f}"


def _cell(found: Mapping[str, Any] | None) -> str:
    if found is None or found["low"] is None:
        return _short(found)
    digits = 1 if abs(found["value"]) >= 10 else 3
    low, high = (f"{found[end]:.{digits}f}" for end in ("low", "high"))
    return f"{found['value']:.{digits}f} <small>({low} to {high})</small>"


# --- the page -------------------------------------------------------------------------------------

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 84rem; padding: 0 1rem;
  color: #222 }
table { border-collapse: collapse; display: block; overflow-x: auto } td, th { padding: .2rem .8rem .2rem 0 }
td, th { text-align: left; white-space: nowrap } td small { color: #666 }
article { border-top: 1px solid #ccc; padding: .6rem 0 } .sheet { display: flex; flex-wrap: wrap; gap: .6rem }
figure { margin: 0; width: 160px } figure img { width: 160px; background: #eee }
figcaption { font-size: 12px; line-height: 1.3; overflow-wrap: anywhere }
"""
SCRIPT = """
const [by, of, rows] = ["by", "of", "rows"].map(id => document.getElementById(id));
function sort() {
  const sign = data.higher[by.value] ? -1 : 1;
  const value = article => { const v = (data.rows[article.dataset.row][of.value] || {})[by.value];
    return v == null ? Infinity : sign * v; };
  [...rows.children].sort((a, b) => value(a) - value(b) || a.dataset.row - b.dataset.row)
    .forEach(article => rows.append(article));
  document.querySelectorAll("figure[data-of]").forEach(figure => {
    const v = (data.rows[figure.closest("article").dataset.row][figure.dataset.of] || {})[by.value];
    figure.querySelector("span").textContent = v == null ? "" : by.value + " " + v.toPrecision(3); });
}
by.onchange = of.onchange = sort; sort();
"""


def page_html(
    title: str,
    summary: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, Metric],
    rows: Sequence[Mapping[str, Any]],
    pictures: Sequence[Mapping[str, Any]],
    notes: Sequence[str] = (),
    curves: Sequence[str] = (),
) -> str:
    """A self-contained page: the table, and the pictures of some rows, which can be sorted by any metric.

    rows: the metrics of the shown rows. pictures: their JPEGs. curves: as SVG.
    """
    shown = [name for name, metric in metrics.items() if not metric.hidden]
    known = {(row["row"], label_of({"name": row["variant"], "point": row["point"]})): row for row in rows}
    labels = [label_of(line) for line in summary]
    data: dict[str, Any] = {"higher": {name: metrics[name].higher for name in shown}, "rows": {}}
    articles = []
    first = {each["row"]: each["before"] for each in pictures if each["before"] is not None}
    for number in sorted({each["row"] for each in pictures}):
        some = {
            label_of({"name": each["variant"], "point": each["point"]}): each["output"]
            for each in pictures
            if each["row"] == number
        }
        data["rows"][number] = {label: {name: known[number, label][name] for name in shown} for label in some}
        instruction = next(known[number, label]["instruction"] for label in some)
        figures = [_figure(first[number], "input", "")] if number in first else []
        figures += [
            _figure(some[label], label, label)
            for label in labels
            if label in some and label != "copy the input"
        ]
        articles.append(
            f'<article data-row="{number}"><p>{html.escape(instruction)}</p><div class="sheet">'
            f"{''.join(figures)}</div></article>"
        )
    heads = "".join(
        f'<th title="{html.escape(metrics[name].about)}">{name} {"↑" if metrics[name].higher else "↓"}</th>'
        for name in shown
    )
    cells = "".join(
        f"<tr><td>{html.escape(label_of(line))}</td><td>{line['rows']}</td>"
        + "".join(f"<td>{_cell(line['metrics'][name])}</td>" for name in shown)
        + "</tr>"
        for line in summary
    )
    options = "".join(f"<option>{name}</option>" for name in shown)
    choices = "".join(f"<option>{html.escape(label)}</option>" for label in labels)
    pick = (
        f'<h2>Pictures</h2><p>Sorted by <select id="by">{options}</select> of '
        f'<select id="of">{choices}</select></p><div id="rows">{"".join(articles)}</div>'
        f"<script>const data = {json.dumps(data).replace('<', chr(92) + 'u003c')};{SCRIPT}</script>"
        if articles
        else ""
    )
    plots = "".join(f"<p>{text}</p>" for text in curves)
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width">\n<title>{html.escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n<h1>{html.escape(title)}</h1>\n"
        + "".join(f"<p>{html.escape(note)}</p>\n" for note in notes)
        + f"<table><tr><th></th><th>rows</th>{heads}</tr>{cells}</table>\n"
        f"<p>Means with 95% bootstrap intervals.</p>\n{plots}\n{pick}\n</html>\n"
    )


def _figure(jpeg: bytes, caption: str, label: str) -> str:
    picture = base64.b64encode(jpeg).decode()
    mark = f' data-of="{html.escape(label)}"' if label else ""
    return (
        f'<figure{mark}><img alt="{html.escape(caption)}" src="data:image/jpeg;base64,{picture}">'
        f"<figcaption>{html.escape(caption)}<br><span></span></figcaption></figure>"
    )
