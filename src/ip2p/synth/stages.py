"""The job stages that generate training data: captions to triples, and triples to pairs.

Each worker process (local or on Ray) creates a stage once. Its output for a part depends only on the part.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ip2p.base.jobs import StageOutput
from ip2p.models.bundle import called
from ip2p.models.clip import Clip
from ip2p.pictures.images import to_pil
from ip2p.synth.filter import KEPT, Thresholds, measure_similarities, pair_row, pair_table
from ip2p.synth.instruct import EditLimits, Instruct, Writer, reasons
from ip2p.synth.pairs import PairMaker
from ip2p.synth.records import SCALE, TABLE, Candidate, Rejected, Triple, candidate, triple_table
from ip2p.synth.rounds import Rounds, draw_in_rounds
from ip2p.synth.settings import SynthPairsConfig

REJECTED = "rejected/rejected"  # the table of rejected answers
FATES = ("candidates", "made", "passed", "early", "judged", "overflow")
WORK = ("evaluations", "decoded", "previewed")  # counts of the painter
REFUSED = "refused: "  # prefix of the counts by reason


class InstructStage:
    """Captions to triples; rejected answers go into a separate table with the reasons.

    writer: makes the writer. Counts captions, captions without a triple, triples, rejected answers by reason,
    and the writer's usage: tokens, and the cost of a server.
    """

    def __init__(self, writer: Callable[[], Writer], *, edits: int, retries: int, limits: EditLimits) -> None:
        self.instruct = Instruct(writer, edits=edits, retries=retries, limits=limits)

    def __call__(self, part: Sequence[str]) -> StageOutput:
        import pyarrow as pa

        before = self._used()
        written = self.instruct(part)
        used = self._used()
        triples = [triple for each in written for triple in each.triples]
        refused = [asdict(rejected) for each in written for rejected in each.rejected]
        counts: dict[str, float] = {
            "captions": len(written),
            "captions without": sum(not each.triples for each in written),
            "triples": len(triples),
            **{REFUSED + reason: count for reason, count in reasons(written).items()},
            **{name: value - before[name] for name, value in used.items()},
        }
        schema = pa.schema([(name, pa.string()) for name in Rejected.__dataclass_fields__])
        tables = {TABLE: triple_table(triples), REJECTED: pa.Table.from_pylist(refused, schema)}
        return StageOutput(tables=tables, counts=counts)

    def _used(self) -> dict[str, float]:
        writer: Any = self.instruct.writer
        usage = getattr(writer, "usage", None)
        return asdict(usage) if usage is not None else {"answer_tokens": getattr(writer, "tokens", 0)}


class PairStage:
    """Triples to pairs: draws, measures and judges candidates in rounds (paper, section 3.1.2).

    config: its drawing and judging settings are used; those of None have the defaults of its `how`. clip:
    returns the folder of the CLIP that judges; clip_name: its name in the table. All triples of a part are
    drawn together.

    Counts candidates and their fates (made, passed, early, judged, overflow), UNet evaluations, decoded and
    previewed pictures, triples and how each ended (enough, hopeless, most), triples without a pair, and
    triples with a text that exceeds the painter's token limit (cut).
    """

    def __init__(
        self,
        config: SynthPairsConfig,
        *,
        clip: Callable[[], Path],
        clip_name: str,
        thresholds: Thresholds,
    ) -> None:
        config = config.changed(**config.how())
        self.thresholds = thresholds
        self.new_candidate = partial(
            candidate,
            per_source=config.p_per_source or 1,
            p=config.p,
            scale=config.scale or SCALE,
            p_cross=config.p_cross,
        )
        self.keep_all = config.keep == "all"
        self.rounds = Rounds.of(config.how())
        self.painter = PairMaker(
            config.model,
            config,
            early=partial(self._pass, lowered(thresholds, config.early_margin)) if config.early_at else None,
            # Candidates that fail on the previews are not decoded in full, unless all are kept.
            judge=partial(self._pass, thresholds) if config.tiny_vae and not self.keep_all else None,
            tiny_vae=config.tiny_vae,
        )
        self.clip = Clip.load(clip(), self.painter.device)
        self.known = {"model": called(config.model), "clip": clip_name, "license": config.license}

    def __call__(self, part: Sequence[Triple]) -> StageOutput:
        painter = self.painter
        before = {name: getattr(painter, name) for name in WORK}
        counts: Counter[str] = Counter(dict.fromkeys(FATES, 0))
        drawn: list[dict[str, Any]] = []

        def judge(candidates: list[Candidate]) -> list[bool | None]:
            passes, rows = self._judged(candidates, counts)
            drawn.extend(rows)
            return passes

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The text is longer than")  # counted as cut
            results = draw_in_rounds(part, self.rounds, judge, new=self.new_candidate)
        order = {triple.id: place for place, triple in enumerate(part)}
        drawn.sort(key=lambda row: (order[row["triple_id"]], row["candidate"]))
        ends = Counter(result.ended for result in results)
        counts.update({f"prompts_{end}": ends[end] for end in ("enough", "hopeless", "most")})
        counts["prompts"] = len(part)
        counts["prompts_none"] = sum(not result.passed for result in results)
        counts["cut"] = sum(self._is_cut(triple) for triple in part)
        counts.update({name: getattr(painter, name) - before[name] for name in WORK})
        return StageOutput(tables={KEPT: pair_table(drawn)}, counts=counts)

    def _judged(
        self, candidates: list[Candidate], counts: Counter[str]
    ) -> tuple[list[bool | None], list[dict[str, Any]]]:
        """Whether each candidate passes (True or None), and the rows of the kept ones."""
        results = self.painter(candidates)
        counts["candidates"] += len(results)
        counts.update(each.fate for each in results)
        made = [each for each in results if each.fate == "made"]
        pairs = [each.pair() for each in made]
        before, after = (
            [Image.fromarray(getattr(pair, side)) for pair in pairs] for side in ("before", "after")
        )
        scores = self._scores([each.candidate for each in made], before, after)
        passes: dict[str, bool] = {}
        rows = []
        for each, similarities in zip(made, scores, strict=True):
            one = each.candidate
            passes[one.id] = passed = self.thresholds.passes(similarities)
            if passed or self.keep_all:
                row = pair_row(each.pair(**similarities), triple_id=one.triple.id, candidate=one.number)
                rows.append(row | self.known | {"kind": "whole" if one.triple.is_whole else "part"})
        counts["passed"] += sum(passes.values())
        return [passes.get(one.id) or None for one in candidates], rows

    def _pass(
        self, least: Thresholds, candidates: Sequence[Candidate], before: torch.Tensor, after: torch.Tensor
    ) -> list[bool]:
        """Which candidates pass, judged by intermediate pictures in [0, 1]."""
        one, two = ([to_pil(picture * 2 - 1) for picture in both] for both in (before, after))
        return [least.passes(own) for own in self._scores(candidates, one, two)]

    def _scores(
        self, candidates: Sequence[Candidate], before: list[Image.Image], after: list[Image.Image]
    ) -> list[dict[str, float]]:
        if not candidates:
            return []
        found = measure_similarities(
            self.clip,
            before,
            after,
            [one.triple.caption for one in candidates],
            [one.triple.edited_caption for one in candidates],
        )
        return [
            {name: float(values[k]) for name, values in found.items() if not np.isnan(values[k])}
            for k in range(len(candidates))
        ]

    def _is_cut(self, triple: Triple) -> bool:
        tokenizer = self.painter.editor.bundle.tokenizer
        texts = [triple.caption, triple.edited_caption]
        whole = tokenizer(texts, verbose=False)["input_ids"]
        return any(len(tokens) > tokenizer.model_max_length for tokens in whole)


def lowered(thresholds: Thresholds, margin: float) -> Thresholds:
    """Thresholds reduced by a margin."""
    return Thresholds(**{name: value - margin for name, value in asdict(thresholds).items()})
