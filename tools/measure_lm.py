"""How many of a language model's edits of unseen storybook captions parse and are right, by kind and reason.

    python tools/measure_lm.py --count 500 --split test

Captions of pages that training never saw go to the model at its default sampling values, through the same
`Instruct` as `ip2p synth instruct`, but each is asked for once. An answer parses when it is an instruction
and a caption; it is right when the storybook's grammar says so (`storybook.reading`) and `Instruct` takes it.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from ip2p.synth.instruct import FREQUENCY_PENALTY, TEMPERATURE, Instruct, LocalWriter, parse
from ip2p_storybook.captions import Form, form_of, say_page
from ip2p_storybook.edits import SPLITS, sample_edit
from ip2p_storybook.reading import edit_kind, judge
from ip2p_storybook.scene import rng_for

FORMS = ("varied", "canonical")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One answer. why: `judge`'s verdict, or why `Instruct` refused it. kind: of the instruction."""

    caption: str
    answer: str
    parsed: bool
    right: bool
    why: str
    kind: str


def unseen_captions(count: int, split: str, form: str, seed: int = 0) -> Iterator[str]:
    """Captions of the split's pages, in the fullest form or in varied ones."""
    for number in range(count):
        rng = rng_for("measure lm", seed, split, number)
        page = sample_edit(rng, split=split).before
        yield say_page(page, Form() if form == "canonical" else form_of(rng))


def measure(writer: LocalWriter, captions: list[str]) -> list[Measured]:
    """What came of the first answer to each caption."""
    stage = Instruct(writer, retries=0)
    told = []
    for written in stage(captions):
        if written.triples:
            triple = written.triples[0]
            verdict = judge(triple.caption, triple.instruction, triple.edited_caption)
            told.append(
                Measured(
                    caption=triple.caption,
                    answer=f"{triple.instruction} -> {triple.edited_caption}",
                    parsed=True,
                    right=verdict.right,
                    why=verdict.why,
                    kind=edit_kind(triple.instruction),
                )
            )
        else:
            refused = written.rejected[0]
            edit = parse(refused.text)
            told.append(
                Measured(
                    caption=written.caption,
                    answer=refused.text,
                    parsed=edit is not None and refused.reason != "too_long",
                    right=False,
                    why=f"refused: {refused.reason}",
                    kind="none" if edit is None else edit_kind(edit.instruction),
                )
            )
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="storybook", help="a language model's folder, or storybook")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--form", choices=FORMS, default="varied", help="of the captions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=TEMPERATURE)
    parser.add_argument("--frequency-penalty", type=float, default=FREQUENCY_PENALTY)
    parser.add_argument("--show", type=int, default=0, help="so many of the wrong answers")
    parser.add_argument("--json", action="store_true", help="print the figures alone, as JSON")
    args = parser.parse_args()
    writer = LocalWriter(
        args.model, temperature=args.temperature, frequency_penalty=args.frequency_penalty, batch=64
    )
    told = measure(writer, list(unseen_captions(args.count, args.split, args.form, args.seed)))
    kinds, right = Counter(m.kind for m in told), Counter(m.kind for m in told if m.right)
    figures = {
        "model": writer.name,
        "split": args.split,
        "form": args.form,
        "captions": len(told),
        "parse": round(sum(m.parsed for m in told) / len(told), 4),
        "right": round(sum(m.right for m in told) / len(told), 4),
        "why": dict(Counter(m.why for m in told).most_common()),
        "kinds": {kind: f"{right[kind]}/{count}" for kind, count in kinds.most_common()},
        "answers that differ": len({m.answer for m in told}),
    }
    if args.json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        if isinstance(value, dict):
            print(f"{name}:")
            for key, number in value.items():
                print(f"  {key:24} {number}")
        else:
            print(f"{name}: {value}")
    for m in [m for m in told if not m.right][: args.show]:
        print(f"\n{m.why} ({m.kind})\n  {m.caption}\n  {m.answer!r}")


if __name__ == "__main__":
    main()
