"""How many of a language model's edits of unseen storybook captions parse and are right, by kind and reason.

    python -m benchmarks.data_quality language-model --count 500 --split test

Captions of pages that training never saw go to the model at its default sampling values, through the same
`Instruct` as in `ip2p synth instruct`, but without retries. An answer parses when it is an instruction and a
caption; it is right when the storybook's grammar says so (`reading`) and `Instruct` takes it.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.data_quality.reading import edit_kind, judge
from ip2p.synth.instruct import TEMPERATURE, Instruct, LocalWriter, parse_answer
from ip2p_storybook.captions import Form, form_of, say_page
from ip2p_storybook.edits import SPLITS, sample_edit
from ip2p_storybook.scene import rng_for

FORMS = ("varied", "canonical")


@dataclass(frozen=True)
class Measured:
    """One answer. why: `judge`'s verdict, or the reason of `Instruct`. kind: of the instruction."""

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
    """The first answer to each caption, judged."""
    answers = []
    for written in Instruct(writer, retries=0)(captions):
        if written.triples:
            triple = written.triples[0]
            verdict = judge(triple.caption, triple.instruction, triple.edited_caption)
            answer = f"{triple.instruction} -> {triple.edited_caption}"
            found = (triple.caption, answer, True, verdict.right, verdict.why, edit_kind(triple.instruction))
        else:
            refused = written.rejected[0]
            edit = parse_answer(refused.text)
            parsed = edit is not None and refused.reason != "too_long"
            kind = "none" if edit is None else edit_kind(edit.instruction)
            found = (written.caption, refused.text, parsed, False, f"refused: {refused.reason}", kind)
        answers.append(Measured(*found))
    return answers


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run)
    parser.add_argument("--model", default="storybook", help="a language model's folder, or storybook")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--form", choices=FORMS, default="varied", help="of the captions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=TEMPERATURE)
    parser.add_argument("--frequency-penalty", type=float, default=0.1)
    parser.add_argument("--show", type=int, default=0, help="number of wrong answers to print")
    parser.add_argument("--json", action="store_true", help="print only the figures, as JSON")


def run(args: argparse.Namespace) -> None:
    sampling = {"temperature": args.temperature, "frequency_penalty": args.frequency_penalty}
    writer = LocalWriter(args.model, **sampling, batch=64)
    answers = measure(writer, list(unseen_captions(args.count, args.split, args.form, args.seed)))
    kinds, right = Counter(m.kind for m in answers), Counter(m.kind for m in answers if m.right)
    figures = {
        "model": writer.name,
        "split": args.split,
        "form": args.form,
        "captions": len(answers),
        "parse": round(sum(m.parsed for m in answers) / len(answers), 4),
        "right": round(sum(m.right for m in answers) / len(answers), 4),
        "why": dict(Counter(m.why for m in answers).most_common()),
        "kinds": {kind: f"{right[kind]}/{count}" for kind, count in kinds.most_common()},
        "answers that differ": len({m.answer for m in answers}),
    }
    if args.json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name}:" if isinstance(value, dict) else f"{name}: {value}")
        for key, number in value.items() if isinstance(value, dict) else ():
            print(f"  {key:24} {number}")
    for m in [m for m in answers if not m.right][: args.show]:
        print(f"\n{m.why} ({m.kind})\n  {m.caption}\n  {m.answer!r}")
