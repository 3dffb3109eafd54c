"""How good the pairs of `ip2p synth pairs` are, on storybook edits, whose exact results are known.

    python -m benchmarks.data_quality quality -o pairs-measured --count 500 --candidates 8
    python -m benchmarks.data_quality choose -o pairs-measured --seed 1 --count 200
    python -m benchmarks.data_quality ways -o pairs-measured --count 40
    python -m benchmarks.data_quality paper -o pairs-measured --prompts 8 --count 200

quality: how many pairs are right before the filter, after it, and against each threshold alone; a table and
a plot. choose: thresholds of the filter and their result; use another seed than for the figures you report.
ways: each cheaper way to draw, side by side. paper: network evaluations for a kept pair, by default and with
--as-paper.

Each candidate is drawn once and kept as a line of a file in the folder, with its similarities and whether it
is right (`pair_score`); the same call resumes. Rounds, giving up and early rejection are replayed on these
lines: a candidate does not depend on the others in its batch (except for the rounding of sums).

Shares have Wilson's interval of 95%. Candidates of one edit resemble each other, so their number is divided
by the design effect.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from benchmarks.common import table
from benchmarks.data_quality.pair_score import DETAILS, PairCase, judge_pair, make_pair_case, pair_triples
from benchmarks.data_quality.stats import (
    Share,
    auc,
    bootstrap,
    curve,
    ratio,
    share_of,
    signed_percent,
)
from ip2p.base.files import append_row, content_key, make_folder, replacing, write_text
from ip2p.base.terminal import progress
from ip2p.cli.synth import PAINTER_FILES, STORYBOOK_SCALE
from ip2p.editing.rank import find_clip
from ip2p.models.bundle import find_model
from ip2p.models.clip import Clip
from ip2p.pictures.images import save_image, to_pil
from ip2p.synth import rounds
from ip2p.synth.filter import PRESETS, SIMILARITIES, TOP, Scored, Thresholds, measure_similarities, select
from ip2p.synth.pairs import PairMaker
from ip2p.synth.records import Candidate, P, Triple, candidate
from ip2p.synth.settings import PAIRS_AS_PAPER, PAIRS_STORYBOOK, SynthPairsConfig
from ip2p_storybook.triples import ExactTriple

Row = dict[str, Any]  # what is known of a candidate: a line of the file
HALF = "half_"  # before the names of the similarities half-way
MARGINS = (0.2, 0.1, 0.05, 0.0)


# --- what is kept of candidates -------------------------------------------------------------------


def filtered(rows: Sequence[Row], thresholds: Thresholds, top: int | None = TOP) -> list[Row]:
    """The rows that `ip2p synth filter` keeps."""
    made = [row for row in rows if row["fate"] == "made"]
    scored = Scored(
        ids=[f"{row['edit']}-{row['number']}" for row in made],
        edits=[row["edit"] for row in made],
        instructions=[""] * len(made),
        hashes=np.zeros((len(made), 2), np.uint64),
        flaws=[""] * len(made),
        clips=[""] * len(made),
        scores={name: np.array([row[name] for row in made], dtype=float) for name in SIMILARITIES},
    )
    reasons = select(scored, thresholds, top=top, near_bits=None)
    return [row for row, reason in zip(made, reasons, strict=True) if not reason]


@dataclass(frozen=True)
class Early:
    """Refuse half-way what lies below the thresholds by more than a margin; a candidate then costs less."""

    thresholds: Thresholds
    margin: float
    at: float

    def refuses(self, row: Row) -> bool:
        least = self.thresholds.least().items()
        return any(row[HALF + name] < value - self.margin for name, value in least)


def evaluations(row: Row, early: Early | None = None) -> float:
    """Pictures through the network for a candidate; of one refused half-way only up to there."""
    if early is None or not early.refuses(row):
        return float(row["evaluations"])
    return float(row["evaluations"] * row["half_step"] / row["steps"])


def replay(
    triples: Sequence[Triple],
    plan: rounds.Rounds,
    thresholds: Thresholds,
    row_of: Callable[[Candidate], Row],
    *,
    new: Callable[[Triple, int], Candidate],
    early: Early | None = None,
    done: Callable[[], None] | None = None,
) -> list[tuple[rounds.TripleResult[Row], list[Row]]]:
    """What the rounds make of each triple, and all rows that were drawn for it.

    The rounds are those of `ip2p synth pairs`; `row_of` gives a candidate's row instead of drawing it.
    """

    def judged(row: Row) -> bool:
        if row["fate"] != "made" or (early is not None and early.refuses(row)):
            return False
        return thresholds.passes({name: row[name] for name in SIMILARITIES})

    found = []
    for triple in triples:
        drawn: list[Row] = []

        def judge(candidates: list[Candidate], drawn: list[Row] = drawn) -> list[Row | None]:
            some = [row_of(one) for one in candidates]
            drawn.extend(some)
            return [row if judged(row) else None for row in some]

        [prompt] = rounds.draw_in_rounds([triple], plan, judge, new=new)
        found.append((prompt, drawn))
        if done:
            done()
    return found


# --- drawing --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Way:
    """How candidates are drawn."""

    steps: int = PAIRS_STORYBOOK["steps"]
    sampler: str = PAIRS_STORYBOOK["sampler"]
    schedule: str = PAIRS_STORYBOOK["schedule"]
    cfg_interval: tuple[float, float] = PAIRS_STORYBOOK["cfg_interval"]
    attention: str = PAIRS_STORYBOOK["attention"]
    per_source: int = PAIRS_STORYBOOK["p_per_source"]
    p: tuple[float, float] = P
    scale: tuple[float, float] = STORYBOOK_SCALE
    early_at: float = 0.5

    @property
    def name(self) -> str:
        """What differs from the default, for a table."""
        usual = asdict(Way())
        words = [f"{key} {_said(value)}" for key, value in asdict(self).items() if value != usual[key]]
        return ", ".join(words) or "default"

    @property
    def file(self) -> str:
        """A file's name."""
        return "_".join(_said(value).replace("+", "-and-") for value in asdict(self).values()) + ".jsonl"

    def candidate(self, triple: Triple, number: int) -> Candidate:
        return candidate(triple, number, per_source=self.per_source, p=self.p, scale=self.scale)


def _said(value: Any) -> str:
    return "-".join(f"{each:g}" for each in value) if isinstance(value, tuple) else str(value)


class Measured:
    """Candidates of storybook edits, drawn in different ways, each once; they lie in a folder.

    Raises SystemExit for a folder of other settings.
    """

    def __init__(self, args: argparse.Namespace, count: int) -> None:
        self.args = args
        self.model = find_model(args.model)
        self.size = args.size
        painter = content_key(self.model, *PAINTER_FILES)
        settings = {"painter": painter, "clip": content_key(find_clip(None, args.model))}
        settings |= {name: getattr(args, name) for name in ("split", "details", "size", "dtype")}
        self.folder = args.out / f"seed-{args.seed}"
        make_folder(self.folder)
        known = self.folder / "settings.json"
        if known.exists() and (old := json.loads(known.read_text())) != settings:
            changed = ", ".join(name for name in settings if old.get(name) != settings[name])
            raise SystemExit(f"{self.folder} holds candidates of other settings ({changed}); use another -o.")
        write_text(known, json.dumps(settings, indent=1) + "\n")
        self.exact = self._edits(count)
        self.triples = [
            Triple(id=t.id, caption=t.caption, instruction=t.instruction, edited_caption=t.edited_caption)
            for t in self.exact
        ]
        self.place = {triple.id: number for number, triple in enumerate(self.triples)}
        self.rows: dict[Way, dict[tuple[str, int], Row]] = {}
        self.case = lru_cache(maxsize=4)(self._case)

    def _edits(self, count: int) -> list[ExactTriple]:
        """Edits whose captions the painter reads whole, no two alike in words."""
        from transformers import CLIPTokenizer

        tokenizer = CLIPTokenizer.from_pretrained(self.model / "tokenizer", local_files_only=True)

        def read_whole(triple: ExactTriple) -> bool:
            tokens = tokenizer([triple.caption, triple.edited_caption], verbose=False)["input_ids"]
            return all(len(each) <= tokenizer.model_max_length for each in tokens)

        every = pair_triples(self.args.seed, self.size, self.args.split)
        seen: dict[str, ExactTriple] = {}
        with progress("edits", count) as advance:
            for triple in every:
                if read_whole(triple) and triple.id not in seen:
                    seen[triple.id] = triple
                    advance()
                if len(seen) == count:
                    return list(seen.values())
        raise AssertionError("the edits have no end")

    @cached_property
    def clip(self) -> Clip:
        return Clip.load(find_clip(None, self.args.model))

    def _case(self, number: int) -> PairCase:
        return make_pair_case(self.exact[number], self.size, self.args.details)

    def of(self, way: Way, candidates: Sequence[Candidate]) -> list[Row]:
        """The rows of candidates; those that are not known yet are drawn together."""
        known = self._known(way)
        missing = [one for one in candidates if (one.triple.id, one.number) not in known]
        if missing:
            for row in self._draw(way, missing):
                append_row(self.folder / way.file, row)
                known[row["edit"], row["number"]] = row
        return [known[one.triple.id, one.number] for one in candidates]

    def every(self, way: Way, count: int) -> list[Row]:
        """The first `count` candidates of every edit."""
        rows: list[Row] = []
        with progress(way.name, len(self.triples)) as advance:
            for triple in self.triples:
                rows += self.of(way, [way.candidate(triple, number) for number in range(count)])
                advance()
        return rows

    def _known(self, way: Way) -> dict[tuple[str, int], Row]:
        if way not in self.rows:
            path = self.folder / way.file
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            if lines and not lines[-1].endswith("\n"):  # cut short by a kill
                write_text(path, "".join(lines[:-1]))
                lines.pop()
            found = [json.loads(line) for line in lines]
            self.rows[way] = {(row["edit"], row["number"]): row for row in found}
        return self.rows[way]

    @lru_cache(maxsize=1)  # noqa: B019 - one network at a time, and one folder a process
    def _maker(self, way: Way) -> tuple[PairMaker, dict[str, dict[str, float]]]:
        """What draws, and the similarities half-way, which it fills."""
        half: dict[str, dict[str, float]] = {}

        def look(some: Sequence[Candidate], before: torch.Tensor, after: torch.Tensor) -> list[bool]:
            one, two = ([to_pil(picture * 2 - 1) for picture in both] for both in (before, after))
            half.update(zip((each.id for each in some), self._similarities(some, one, two), strict=True))
            return [True] * len(some)

        maker = PairMaker(
            self.args.model,
            dtype=self.args.dtype,
            device=self.args.device,
            size=self.size,
            steps=way.steps,
            sampler=way.sampler,
            schedule=way.schedule,
            cfg_interval=way.cfg_interval,
            attention=way.attention,  # type: ignore[arg-type]
            batch_size=self.args.batch_size,
            early=look,
            early_at=way.early_at,
        )
        return maker, half

    def _similarities(
        self, some: Sequence[Candidate], before: list[Image.Image], after: list[Image.Image]
    ) -> list[dict[str, float]]:
        triples = [one.triple for one in some]
        words = [t.caption for t in triples], [t.edited_caption for t in triples]
        found = measure_similarities(self.clip, before, after, *words)
        return [{name: float(values[k]) for name, values in found.items()} for k in range(len(some))]

    def _draw(self, way: Way, candidates: Sequence[Candidate]) -> list[Row]:
        maker, half = self._maker(way)
        made = maker(candidates)
        whole = [each for each in made if each.before is not None]
        pictures = [[Image.fromarray(each.pair().before) for each in whole]]  # type: ignore[arg-type]
        pictures.append([Image.fromarray(each.pair().after) for each in whole])  # type: ignore[arg-type]
        final = self._similarities([each.candidate for each in whole], *pictures) if whole else []
        scores = dict(zip((each.candidate.id for each in whole), final, strict=True))
        rows = []
        for each in made:
            one, number = each.candidate, self.place[each.candidate.triple.id]
            row: Row = {"edit": one.triple.id, "kind": self.exact[number].edit.kind, "number": one.number}
            row |= {"p": one.p, "scale": one.scale, "fate": each.fate, "evaluations": each.evaluations}
            row |= {"steps": way.steps, "half_step": maker.early_step}
            # Beside similarities, what overflowed has none: it passes nowhere.
            row |= {HALF + name: half.get(one.id, {}).get(name, -2.0) for name in SIMILARITIES}
            row |= {name: scores.get(one.id, {}).get(name, -2.0) for name in SIMILARITIES}
            verdict = None
            if each.before is not None and each.after is not None:
                verdict = judge_pair(self.case(number), each.before, each.after)
            for name in ("drawn", "edited", "right", "changed"):
                row[name] = bool(verdict and getattr(verdict, name))
            row["kept"] = None if verdict is None or verdict.kept is None else min(verdict.kept, 99.0)
            rows.append(row)
        half.clear()
        return rows


# --- tables ---------------------------------------------------------------------------------------


def _right(rows: Sequence[Row], name: str = "right") -> Share:
    return share_of([row[name] for row in rows], [row["edit"] for row in rows])


def quality(args: argparse.Namespace) -> None:
    """How many pairs are right, before the filter, after it, and against each threshold."""
    measured = Measured(args, args.count)
    way = _way(args)
    rows = measured.every(way, args.candidates)
    write_rows(rows, args.out / f"candidates-{args.seed}.parquet")
    edits = len(measured.triples)
    lines = [f"{len(rows):,} candidates of {edits:,} edits, {way.name}, seed {args.seed}", ""]
    found = []
    for name, kept in (
        ("no filter", rows),
        *((f"{name}, top {TOP}", filtered(rows, least)) for name, least in PRESETS.items()),
        ("storybook, top 1", filtered(rows, PRESETS["storybook"], 1)),
        ("storybook, all", filtered(rows, PRESETS["storybook"], None)),
    ):
        some = len({row["edit"] for row in kept})
        psnrs = [row["kept"] for row in kept if row["kept"] is not None]
        found.append(
            (
                *(name, len(kept), f"{len(kept) / len(rows):.1%}", f"{some / edits:.1%}"),
                *(_right(kept, verdict) for verdict in ("right", "changed", "drawn", "edited")),
                f"{np.mean(psnrs):.1f} dB" if psnrs else "-",
            )
        )
    heads = (
        "kept by",
        "pairs",
        "share",
        "edits with one",
        "right",
        "changed",
        "drawn",
        "edited",
        "kept still",
    )
    lines += [table(heads, found), ""]
    names = list(SIMILARITIES)
    heads = ("a similarity alone", "AUC of right", "AUC of changed", "AUC of right, half-way", "median")
    found = [
        [
            SIMILARITIES[name].replace("_", " "),
            *(f"{auc(_column(rows, name), _column(rows, flag)):.3f}" for flag in ("right", "changed")),
            f"{auc(_column(rows, HALF + name), _column(rows, 'right')):.3f}",
            f"{np.median(_column(rows, name)):.3f}",
        ]
        for name in names
    ]
    lines += [table(heads, found), ""]
    heads = ("least", *(f"{SIMILARITIES[name].replace('_', ' ')}: kept, right" for name in names))
    steps = np.arange(-0.1, 1.0, 0.1)
    curves = [curve(_column(rows, name), _column(rows, "right"), steps) for name in names]
    found = [
        [f"{least:.1f}", *(f"{own[k][1]:.0%}, {_percent(own[k][2])}" for own in curves)]
        for k, least in enumerate(steps)
    ]
    lines += [table(heads, found), ""]
    heads = ("kind", "candidates", "right", "changed", "kept by the storybook's", "right of them")
    passed = filtered(rows, PRESETS["storybook"])
    found = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        own, after = ([row for row in some if row["kind"] == kind] for some in (rows, passed))
        found.append([kind, len(own), _right(own), _right(own, "changed"), len(after), _right(after)])
    lines += [table(heads, found)]
    _finish(args, "quality", lines)
    print(save_image(plot(rows), args.out / "quality.png"))


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.0%}"


def _column(rows: Sequence[Row], name: str) -> list[Any]:
    return [row[name] for row in rows]


def choose(args: argparse.Namespace) -> None:
    """Of all thresholds on a grid, those of the best precision for each share of right pairs that stay."""
    measured = Measured(args, args.count)
    rows = [row for row in measured.every(_way(args), args.candidates) if row["fate"] == "made"]
    lines = [f"{len(rows):,} candidates of {args.count} edits, seed {args.seed}; all that pass", ""]
    for verdict in ("right", "changed"):
        found = []
        for recall, (least, share, precision) in best_thresholds(rows, verdict):
            kept = filtered(rows, least)
            found.append(
                (
                    f"{recall:.0%}",
                    f"{least.image:g} / {least.caption:g} / {least.directional:g}",
                    f"{share:.1%}",
                    f"{precision:.1%}",
                    _right(kept, verdict),
                )
            )
        heads = (f"{verdict} ones that pass", "image / caption / directional", "passing", f"{verdict}")
        lines += [table((*heads, f"{verdict}, top {TOP}"), found), ""]
    _finish(args, "choose", lines)


def best_thresholds(
    rows: Sequence[Row],
    verdict: str = "right",
    recalls: Sequence[float] = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2),
) -> list[tuple[float, tuple[Thresholds, float, float]]]:
    """For each least share of the right ones that must pass: thresholds, share that passes, its precision."""
    true = np.array(_column(rows, verdict), dtype=bool)
    image, before, after, directional = (np.array(_column(rows, name)) for name in SIMILARITIES)
    caption = np.minimum(before, after)
    best: dict[float, tuple[Thresholds, float, float]] = {}
    grid = product(np.arange(0, 0.96, 0.1), np.arange(0, 0.86, 0.05), np.arange(-0.1, 0.81, 0.05))
    for least in grid:
        a, b, c = (round(float(value), 2) for value in least)
        passing = (image >= a) & (caption >= b) & (directional >= c)
        hits = int((passing & true).sum())
        if not hits:
            continue
        precision = hits / int(passing.sum())
        for recall in recalls:
            if hits >= recall * true.sum() and precision > best.get(recall, (None, 0.0, 0.0))[2]:
                chosen = Thresholds(image=a, caption=b, directional=c)
                best[recall] = (chosen, float(passing.mean()), precision)
    return [(recall, best[recall]) for recall in recalls if recall in best]


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """All candidates as one table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with replacing(path) as temporary:
        pq.write_table(pa.Table.from_pylist(list(rows)), temporary)
    print(path)


def ways(args: argparse.Namespace) -> None:
    """Each cheaper way beside the others: what a kept pair costs, and how often it is right."""
    measured = Measured(args, args.count)
    usual = _way(args)
    plan = _plan(args, usual)
    heads = ("way", "evaluations a candidate", "evaluations a kept pair", "right of the kept")
    heads += ("changed of the kept", "edits with a pair", "right of all drawn")
    found: list[list[object]] = []
    others = [replace(usual, **change) for change in WAYS]
    only = set(args.only or ())
    wanted = [
        way
        for way in others
        if not only or any({part, part.split()[0]} & only for part in way.name.split(", "))
    ]
    for way in dict.fromkeys((usual, *wanted)):
        measured.every(way, args.candidates)
        found.append([way.name, *_costs(measured, way, plan, _thresholds(args))])
    lines = [f"{args.count} edits, {args.candidates} candidates at most, seed {args.seed}", ""]
    lines += [table(heads, found), ""]
    least = _thresholds(args)
    found = [["early, margin " + f"{m:g}", *_costs(measured, usual, plan, least, m)] for m in MARGINS]
    found.insert(0, ["no early rejection", *_costs(measured, usual, plan, least)])
    lines += [f"Refused at {usual.early_at:.0%} of the steps (replayed):", "", table(heads, found), ""]
    found = []
    for name, change in (
        ("all candidates drawn", {"enough": None, "risk": 0.0}),
        ("until enough, none given up", {"risk": 0.0}),
        ("all drawn, hopeless given up", {"enough": None}),
        ("until enough, hopeless given up", {}),
        ("the same, enough 2", {"enough": 2}),
        ("the same, enough 1", {"enough": 1}),
        ("the same, worth 0.2", {"worth": 0.2}),
        ("the same, worth 0.3", {"worth": 0.3}),
    ):
        found.append([name, *_costs(measured, usual, replace(plan, **change), least)])  # type: ignore[arg-type]
    lines += ["Rounds (replayed):", "", table(heads, found)]
    _finish(args, "ways", lines)


WAYS: tuple[dict[str, Any], ...] = (
    *({"steps": steps} for steps in (100, 50, 20, 10)),  # 100 as in --as-paper
    *({"sampler": sampler} for sampler in ("euler", "dpmpp_2m")),
    {"sampler": "dpmpp_2m", "steps": 10},
    {"per_source": 4},
    *({"attention": attention} for attention in ("replace", "refine", "self+replace", "self+refine")),
    *({"scale": (scale, scale)} for scale in (2.0, 4.0, 6.0)),
    *({"p": p} for p in ((0.1, 0.5), (0.5, 0.9))),
)


def _plan(args: argparse.Namespace, way: Way) -> rounds.Rounds:
    """The default rounds, with no more candidates than are drawn."""
    most = min(PAIRS_STORYBOOK["most"], args.candidates)
    return replace(rounds.Rounds.of(PAIRS_STORYBOOK), most=most, shared=way.per_source)


def _costs(
    measured: Measured, way: Way, plan: rounds.Rounds, thresholds: Thresholds, margin: float | None = None
) -> list[object]:
    early = None if margin is None else Early(thresholds, margin, way.early_at)
    plan = replace(plan, shared=way.per_source)
    found = replay(
        measured.triples,
        plan,
        thresholds,
        lambda one: measured.of(way, [one])[0],
        new=way.candidate,
        early=early,
    )
    drawn = [row for _, rows in found for row in rows]
    return [f"{sum(evaluations(row, early) for row in drawn) / len(drawn):.0f}", *_summary(found, early)]


def _summary(
    found: Sequence[tuple[rounds.TripleResult[Row], list[Row]]], early: Early | None, top: int = TOP
) -> list[object]:
    kept = [_kept(prompt, top) for prompt, _ in found]
    cost = [sum(evaluations(row, early) for row in rows) for _, rows in found]
    value, low, high = ratio(cost, [len(rows) for rows in kept])
    every = [row for rows in kept for row in rows]
    a_pair = f"{value:,.0f} ({low:,.0f} to {high:,.0f})" if every else "none kept"
    drawn = [row for _, rows in found for row in rows]
    with_one = share_of([bool(rows) for rows in kept])
    return [a_pair, _right(every), _right(every, "changed"), with_one, _right(drawn)]


def _kept(prompt: rounds.TripleResult[Row], top: int = TOP) -> list[Row]:
    """Of the pairs that passed, the best, as the filter takes them."""
    rows = [row for _, row in prompt.passed]
    return sorted(rows, key=lambda row: -row["clip_sim_dir"])[:top]


def paper(args: argparse.Namespace) -> None:
    """Network evaluations for a kept pair: the default against --as-paper, and how often both are right.

    With --drawn 25 only 25 of the 100 candidates of --as-paper are drawn of each edit, and of the best four
    one is kept: the same share of them, at the same cost a pair, of four times as many edits in a given time.
    """
    measured = Measured(args, max(args.count, args.prompts))
    tops = {"default": TOP, "--as-paper": max(1, round(TOP * args.drawn / PAIRS_AS_PAPER["most"]))}
    least = _thresholds(args)
    results: dict[str, list[tuple[rounds.TripleResult[Row], list[Row]]]] = {}
    rejections: dict[str, Early | None] = {}
    for name, how, number in (
        ("default", PAIRS_STORYBOOK, args.count),
        ("--as-paper", PAIRS_AS_PAPER, args.prompts),
    ):
        most = min(how["most"], args.drawn) if name == "--as-paper" else how["most"]
        way = Way(
            steps=how["steps"],
            sampler=how["sampler"],
            schedule=how["schedule"],
            cfg_interval=how["cfg_interval"],
            attention=how["attention"],
            per_source=how["p_per_source"],
            early_at=how["early_at"] or Way.early_at,
        )
        plan = replace(rounds.Rounds.of(how), most=most, size=min(how["round_size"], most))
        early = Early(least, args.early_margin, how["early_at"]) if how["early_at"] else None
        with progress(name, number) as advance:
            results[name] = replay(
                measured.triples[:number],
                plan,
                least,
                partial(_drawn_ahead, measured, way, plan),
                new=way.candidate,
                early=early,
                done=advance,
            )
        rejections[name] = early
    heads = ("", "edits", "pairs", "evaluations a kept pair", "right of the kept", "changed of the kept")
    heads += ("edits with a pair", "right of all drawn")
    found = []
    for name in ("default", "--as-paper"):
        one = results[name]
        pairs = sum(len(_kept(prompt, tops[name])) for prompt, _ in one)
        found.append([name, len(one), pairs, *_summary(one, rejections[name], tops[name])])
        if name == "default":
            one = one[: args.prompts]
            pairs = sum(len(_kept(prompt)) for prompt, _ in one)
            found.append(["the same edits", len(one), pairs, *_summary(one, rejections[name])])
    lines = [f"seed {args.seed}; at most {TOP} pairs of an edit stay; --as-paper: {most} drawn of each edit"]
    lines[0] += f", at most {tops['--as-paper']} stay"
    lines += ["", table(heads, found), ""]
    slow = results["--as-paper"], tops["--as-paper"]
    times = _times(*slow, results["default"], rejections["default"])
    lines.append("Evaluations a kept pair, --as-paper over default: {:.1f} ({:.1f} to {:.1f})".format(*times))
    same = results["default"][: args.prompts]
    times = _times(*slow, same, rejections["default"])
    lines.append("The same on the edits of --as-paper alone: {:.1f} ({:.1f} to {:.1f})".format(*times))
    lines.append("Right of the kept, --as-paper less default, same edits: " + _more_right(*slow, same))
    _finish(args, "paper", lines)


def _drawn_ahead(measured: Measured, way: Way, plan: rounds.Rounds, one: Candidate) -> Row:
    """A candidate, drawn with those beside it, which will mostly be asked for too."""
    first = one.number - one.number % measured.args.batch_size
    last = min(first + measured.args.batch_size, plan.most)
    together = [way.candidate(one.triple, number) for number in range(first, last)]
    return measured.of(way, together)[one.number - first]


def _more_right(slow: Any, top: int, fast: Any) -> str:
    """How much more of the kept pairs of one way are right."""

    def counts(found: Any, top: int) -> NDArray[Any]:
        kept = [_kept(prompt, top) for prompt, _ in found]
        return np.array([(sum(bool(row["right"]) for row in rows), len(rows)) for rows in kept])

    one, two = counts(slow, top), counts(fast, TOP)

    def difference(picks: NDArray[Any]) -> float:
        (right, kept), (other, others) = one[picks].sum(axis=0), two[picks].sum(axis=0)
        return float(right / max(kept, 1) - other / max(others, 1))

    return signed_percent(*bootstrap(difference, len(one)))


def _times(slow: Any, top: int, fast: Any, early: Early | None) -> tuple[float, float, float]:
    """How many times fewer evaluations a kept pair takes; the edits of both ways vary independently."""
    rng = np.random.default_rng(0)

    def costs(found: Any, early: Early | None, top: int) -> tuple[NDArray[Any], NDArray[Any]]:
        cost = [sum(evaluations(row, early) for row in rows) for _, rows in found]
        return np.array(cost), np.array([len(_kept(prompt, top)) for prompt, _ in found])

    def price(found: tuple[NDArray[Any], NDArray[Any]], again: bool) -> float:
        cost, kept = found
        picks = rng.integers(0, len(cost), len(cost)) if again else np.arange(len(cost))
        return float(cost[picks].sum() / max(kept[picks].sum(), 0.5))

    one, two = costs(slow, None, top), costs(fast, early, TOP)
    again = [price(one, True) / price(two, True) for _ in range(2000)]
    low, high = np.percentile(again, [2.5, 97.5])
    return price(one, False) / price(two, False), float(low), float(high)


def _thresholds(args: argparse.Namespace) -> Thresholds:
    preset = PRESETS["storybook"]
    given = {name: getattr(args, name) for name in asdict(preset)}
    return replace(preset, **{name: value for name, value in given.items() if value is not None})


def _way(args: argparse.Namespace) -> Way:
    given = {name: getattr(args, name) for name in asdict(Way())}
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    return replace(Way(), **{name: value for name, value in values.items() if value is not None})


def _finish(args: argparse.Namespace, name: str, lines: Sequence[str]) -> None:
    text = "\n".join(lines) + "\n"
    print(f"\n{text}")
    write_text(args.out / f"{name}-{args.seed}.md", text)


# --- the plot -------------------------------------------------------------------------------------

PANEL = 560, 420
INKS = ("#1f6fb2", "#d1603d", "#3a8f5c", "#8a4fa3")


def plot(rows: Sequence[Row], verdict: str = "right") -> Image.Image:
    """Share kept and precision against each similarity's threshold; and one against the other."""
    width, height = PANEL
    true = _column(rows, verdict)
    names = list(SIMILARITIES)
    sheet = Image.new("RGB", (3 * width, 2 * height), "white")
    last = _axes("the four: precision against share kept", (0.0, 1.0), "share kept")
    pen = ImageDraw.Draw(last)
    for number, name in enumerate(names):
        scores = np.array(_column(rows, name), dtype=float)
        low, high = (float(value) for value in np.percentile(scores, [0.5, 99.5]))
        points = curve(scores.tolist(), true, np.linspace(low, high, 80).tolist())
        # Of few pairs precision is noise.
        points = [point for point in points if point[1] * len(rows) >= 20]
        panel = _axes(f"{SIMILARITIES[name].replace('_', ' ')}: least", (low, high), "threshold")
        own = ImageDraw.Draw(panel)
        _line(own, [(x, kept) for x, kept, _ in points], (low, high), "#999999")
        band = [(x, _right([row for row in rows if row[name] >= x], verdict)) for x, _, _ in points]
        for edge in ("low", "high"):
            _line(own, [(x, getattr(share, edge)) for x, share in band], (low, high), "#b9d3ea", 1)
        _line(own, [(x, right) for x, _, right in points], (low, high), INKS[0], 3)
        for preset, ink in zip(PRESETS.values(), INKS[1:], strict=False):
            x = preset.least()[name]
            if low <= x <= high:
                _line(own, [(x, 0.0), (x, 1.0)], (low, high), ink, 1)
        sheet.paste(panel, (number % 3 * width, number // 3 * height))
        _line(pen, [(kept, right) for _, kept, right in points], (0.0, 1.0), INKS[number], 3)
        _text(pen, (width - 170, 40 + 20 * number), SIMILARITIES[name].replace("_", " "), INKS[number])
    sheet.paste(last, (width, height))
    pen = ImageDraw.Draw(sheet)
    words = [(f"share of the kept that are {verdict}", INKS[0]), ("with its 95% interval", "#b9d3ea")]
    words += [("share kept", "#777777")]
    words += [(f"threshold of {name}", ink) for name, ink in zip(PRESETS, INKS[1:], strict=False)]
    for number, (said, ink) in enumerate(words):
        _text(pen, (2 * width + 60, height + 60 + 24 * number), said, ink)
    return sheet


_BOX = 60, 36, PANEL[0] - 20, PANEL[1] - 48


def _axes(title: str, span: tuple[float, float], below: str) -> Image.Image:
    panel = Image.new("RGB", PANEL, "white")
    pen = ImageDraw.Draw(panel)
    left, top, right, bottom = _BOX
    _text(pen, (left, 8), title, "black")
    for k in range(6):
        y = bottom - (bottom - top) * k / 5
        pen.line([(left, y), (right, y)], "#e6e6e6")
        _text(pen, (left - 8, y), f"{k * 20}%", "#555555", "rm")
        x = left + (right - left) * k / 5
        said = f"{span[0] + (span[1] - span[0]) * k / 5:.2f}"
        _text(pen, (x, bottom + 8), said, "#555555", "ma")
    _text(pen, ((left + right) / 2, bottom + 26), below, "#555555", "ma")
    pen.line([(left, top), (left, bottom), (right, bottom)], "#999999")
    return panel


def _line(
    pen: ImageDraw.ImageDraw,
    points: Sequence[tuple[float, float]],
    span: tuple[float, float],
    ink: str,
    width: int = 2,
) -> None:
    left, top, right, bottom = _BOX
    room = (span[1] - span[0]) or 1.0
    at = [
        (left + (right - left) * (x - span[0]) / room, bottom - (bottom - top) * y)
        for x, y in points
        if not math.isnan(y)
    ]
    if len(at) > 1:
        pen.line(at, ink, width)


def _text(
    pen: ImageDraw.ImageDraw, at: tuple[float, float], said: str, ink: str, anchor: str | None = None
) -> None:
    pen.text(at, said, ink, ImageFont.load_default(15), anchor=anchor)


# --- options --------------------------------------------------------------------------------------

# What to run, edits, candidates of each edit.
VERBS: dict[str, tuple[Callable[[argparse.Namespace], None], int, int]] = {
    "quality": (quality, 500, 8),
    "choose": (choose, 200, 8),
    "ways": (ways, 40, 8),
    "paper": (paper, 200, 0),
}


def add_options(parser: argparse.ArgumentParser, verb: str) -> None:
    run, count, candidates = VERBS[verb]
    parser.set_defaults(run=run)
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder; the same call resumes")
    parser.add_argument("--model", default="storybook", help="painter, with its own CLIP")
    parser.add_argument("--count", type=int, default=count, help="edits")
    if candidates:
        parser.add_argument("--candidates", type=int, default=candidates, help="of each edit")
    if verb == "paper":
        parser.add_argument("--prompts", type=int, default=8, help="edits that are drawn with --as-paper")
        most = PAIRS_AS_PAPER["most"]
        parser.add_argument("--drawn", type=int, default=most, help=f"of the {most} candidates of those")
        parser.add_argument("--early-margin", type=float, default=SynthPairsConfig.early_margin)
    if verb == "ways":
        parser.add_argument("--only", nargs="+", help='ways with these words: "steps 10", attention …')
    for similarity in ("image", "caption", "directional"):
        parser.add_argument(f"--{similarity}", type=float, help="least; default: the storybook preset's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", default="test")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--details", type=int, default=DETAILS, help="drawings of each answer")
    for name, kind in (("steps", int), ("per-source", int), ("early-at", float)):
        parser.add_argument(f"--{name}", type=kind)
    for name in ("sampler", "schedule", "attention"):
        parser.add_argument(f"--{name}")
    for name in ("p", "scale", "cfg-interval"):
        parser.add_argument(f"--{name}", type=float, nargs=2)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
