"""A vision model as a judge, on any OpenAI-compatible server: the three scores of VIEScore.

The prompts are in `prompts/`. A reply that cannot be parsed is counted as a failure and gets no score.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import json
import math
import random
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ip2p.base.errors import InputError, ModelError
from ip2p.evaluation.encoders import Encoders, Picture
from ip2p.evaluation.metrics import Metric, Shot
from ip2p.pictures.images import to_bytes, to_pil
from ip2p.synth.records import derived_seed

PROMPTS = Path(__file__).parent / "prompts"
QUESTIONS = {"semantics": 2, "quality": 2}  # prompt file: number of scores
INSTRUCTION = "{instruction}"
MOST = 10  # the best score; 0 is the worst
TOGETHER = 8  # concurrent requests
MAX_TOKENS = 1000
FAILURES = ("refused", "malformed", "out of range", "timed out", "server error")
REFUSALS = re.compile(r"\b(i('m| am) sorry|i can(no|')t|unable to|as an ai)\b", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class JudgeSettings:
    """The judge and its questions.

    style: "viescore" asks two questions with two scores each, from semantics.txt and quality.txt in the
    folder `prompts`; "imgedit" asks one question with three scores, which the JSON file `prompts` has for
    each kind of edit. published: parse replies as the benchmark's public code does (docs/evaluate.md). key:
    of the server; never printed.
    """

    server: str
    model: str
    repeats: int = 1
    timeout: float = 120.0
    prompts: Path = PROMPTS
    style: Literal["viescore", "imgedit"] = "viescore"
    published: bool = False
    key: str = field(default="", repr=False)

    def texts(self) -> dict[str, str]:
        """The prompts by name, each with {instruction}. Raises InputError for an unusable one."""
        try:
            if self.style == "imgedit":
                prompts = json.loads(self.prompts.read_text(encoding="utf-8"))
                found = {kind: text.replace("<edit_prompt>", INSTRUCTION) for kind, text in prompts.items()}
            else:
                found = {n: (self.prompts / f"{n}.txt").read_text(encoding="utf-8") for n in QUESTIONS}
        except (OSError, ValueError, AttributeError) as error:
            raise InputError(f"the judge's prompts in {self.prompts} cannot be read ({error}).") from None
        for name, text in found.items():
            if INSTRUCTION not in text and name != "quality":
                raise InputError(
                    f"the judge's prompt {name} in {self.prompts} does not contain {INSTRUCTION}; add it."
                )
        return found

    def as_json(self) -> dict[str, Any]:
        """Everything that affects the scores; not the key or the server's address."""
        return {"model": self.model, "repeats": self.repeats, "style": self.style, "prompts": self.texts()}


def parse_scores(text: str, count: int) -> list[float] | str:
    """The scores in a reply, or one of `FAILURES`.

    A reply has one JSON object with "score": a list of `count` numbers from 0 to 10. Text and code fences
    around it are ignored. Different objects, or another count, are malformed; no score is guessed.
    """
    found = []
    for match in re.finditer(r"\{[^{}]*\}", text):
        with contextlib.suppress(ValueError):
            value = json.loads(match[0])
            if "score" in value:
                found.append(value["score"])
    if not found:
        return "refused" if REFUSALS.search(text) else "malformed"
    scores = found[0]
    plain = isinstance(scores, list) and all(type(each) in (int, float) for each in scores)
    if not plain or len(scores) != count or any(each != scores for each in found):
        return "malformed"
    return [float(each) for each in scores] if all(0 <= e <= MOST for e in scores) else "out of range"


def parse_score_lines(text: str, count: int = 3) -> list[float] | str:
    """The scores in an ImgEdit reply, one "Name: 4" per line, from 1 to 5; else one of `FAILURES`."""
    found = [
        float(match[1]) for match in re.finditer(r"^[^:\n]+:\s*(\d+)(?:\s*/\s*5)?\s*$", text, re.MULTILINE)
    ]
    if len(found) != count:
        return "refused" if REFUSALS.search(text) else "malformed"
    return found if all(1 <= each <= 5 for each in found) else "out of range"


def published_scores(text: str, seed: int) -> list[float]:
    """As in GEdit-Bench's public code: any scores in the reply, else a random integer from 0 to 10."""
    match = re.search(r"\"score\"\s*:\s*\[([^\]]*)\]", text) or re.search(r"\[(\d+, ?\d+)\]", text)
    numbers = re.findall(r"-?\d+(?:\.\d+)?", match[1]) if match else []
    return [float(each) for each in numbers] or [float(random.Random(seed).randint(0, 10))]


def published_lines(text: str) -> list[float] | str:
    """As in ImgEdit's public code: every line that ends in ": DIGITS", of any number and range."""
    parts = [line.strip().split(": ") for line in text.splitlines()]
    return [float(p[1]) for p in parts if len(p) == 2 and p[1].isdigit()] or "malformed"


class VisionJudge:
    """Asks the server about edits. Raises ModelError if the `openai` client is not installed."""

    def __init__(self, settings: JudgeSettings) -> None:
        try:
            import openai
        except ImportError:
            raise ModelError("--judge needs the openai client: pip install 'ip2p[llm-server]'") from None
        self.settings, self.texts, self._openai = settings, settings.texts(), openai
        self.client = openai.OpenAI(
            base_url=settings.server, api_key=settings.key or "none", timeout=settings.timeout, max_retries=1
        )

    def __call__(self, shots: Sequence[Shot]) -> list[dict[str, Any]]:
        """The judge's columns of each shot.

        judge_semantics and judge_quality are the minimum of their two scores, and judge_overall is their
        geometric mean, all from 0 to 10 (VIEScore, Ku et al. 2024). In ImgEdit's style, judge_overall is the
        mean of three scores from 1 to 5. Each is the mean over the repeats with a score, NaN without any.
        judge_spread: the standard deviation of judge_overall over the repeats. judge_replies: the number of
        questions. judge_failures: {reason: count} as JSON. judge_date: the date in UTC.
        """
        names = tuple(QUESTIONS) if self.settings.style == "viescore" else ("edit",)
        turns = range(self.settings.repeats)
        tasks = [(k, name, turn) for k in range(len(shots)) for turn in turns for name in names]
        with ThreadPoolExecutor(TOGETHER) as pool:
            answers = list(pool.map(lambda task: self.ask(shots[task[0]], *task[1:]), tasks))
        found = dict(zip(tasks, answers, strict=True))
        return [
            _columns([{n: found[k, n, turn] for n in names} for turn in turns]) for k in range(len(shots))
        ]

    def ask(self, shot: Shot, name: str, turn: int = 0) -> list[float] | str:
        """The scores of one question, or one of `FAILURES`."""
        imgedit, published = self.settings.style == "imgedit", self.settings.published
        prompt = self.texts.get(shot.kind if imgedit else name)
        if prompt is None:
            raise InputError(f"the judge has no prompt for the kind of edit {shot.kind!r}; add one.")
        reply = self._reply(
            prompt.replace(INSTRUCTION, shot.instruction),
            [shot.output] if name == "quality" else [shot.before, shot.output],
        )
        if isinstance(reply, tuple):
            return reply[0]
        if imgedit:
            return published_lines(reply) if published else parse_score_lines(reply)
        if published:
            return published_scores(reply, derived_seed("guess", shot.instruction, name, turn))
        return parse_scores(reply, QUESTIONS[name])

    def _reply(self, prompt: str, pictures: Sequence[Picture]) -> str | tuple[str]:
        """The server's reply, or the failure as a tuple."""
        content: list[Any] = [{"type": "text", "text": prompt}]
        for picture in pictures:
            data = base64.b64encode(to_bytes(to_pil(picture * 2 - 1))).decode()
            content.append({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}})
        openai = self._openai
        try:
            reply = self.client.chat.completions.create(
                model=self.settings.model,
                messages=[{"role": "user", "content": content}],
                temperature=0.0 if self.settings.repeats == 1 else 1.0,
                max_tokens=MAX_TOKENS,
            )
        except openai.APITimeoutError:
            return ("timed out",)
        except (openai.AuthenticationError, openai.NotFoundError, openai.APIConnectionError) as error:
            # Every other question would fail, too.
            reason = " ".join(str(error).split())[:200]
            raise ModelError(
                f"the judge {self.settings.server} does not accept requests ({reason})."
            ) from None
        except openai.APIError:
            return ("server error",)
        if not reply.choices:
            return ("malformed",)
        message = reply.choices[0].message
        return ("refused",) if getattr(message, "refusal", None) else message.content or ""


def _columns(repeats: Sequence[Mapping[str, list[float] | str]]) -> dict[str, Any]:
    """The columns of one shot. repeats: its answers by question."""
    failures = Counter(answer for each in repeats for answer in each.values() if isinstance(answer, str))
    numbers: dict[str, list[float]] = {"semantics": [], "quality": [], "overall": []}
    for each in repeats:
        known = {name: answer for name, answer in each.items() if not isinstance(answer, str)}
        for name in set(known) & set(QUESTIONS):
            numbers[name].append(min(known[name]))
        if "edit" in known:
            numbers["overall"].append(sum(known["edit"]) / len(known["edit"]))
        elif len(known) == len(QUESTIONS):
            product = math.prod(min(scores) for scores in known.values())
            numbers["overall"].append(math.sqrt(max(0.0, product)))
    found: dict[str, Any] = {f"judge_{name}": _mean(values) for name, values in numbers.items()}
    overall = numbers["overall"]
    found["judge_spread"] = statistics.stdev(overall) if len(overall) > 1 else math.nan
    return found | {
        "judge_replies": sum(len(each) for each in repeats),
        "judge_failures": json.dumps(failures, sort_keys=True),
        "judge_date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def count_failures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The number of questions, the replies without a score by reason, and the dates."""
    failures = dict.fromkeys(FAILURES, 0)
    for row in rows:
        for reason, count in json.loads(row.get("judge_failures") or "{}").items():
            failures[reason] += count
    days = sorted({row["judge_date"] for row in rows if row.get("judge_date")})
    return {
        "replies": sum(row.get("judge_replies") or 0 for row in rows),
        "failures": failures,
        "dates": days,
    }


def _unmeasured(shot: Shot, encoders: Encoders) -> float:
    return math.nan  # the stage asks the judge


_ABOUT = {
    "semantics": "the judge: the edit follows the instruction and changes nothing else, 0 to 10",
    "quality": "the judge: natural and without artifacts, 0 to 10",
    "overall": "the judge: geometric mean of semantics and quality; ImgEdit: mean of three scores, 1 to 5",
}
JUDGED = {
    f"judge_{name}": Metric(measure=_unmeasured, higher=True, about=about) for name, about in _ABOUT.items()
}
JUDGED["judge_spread"] = Metric(
    measure=_unmeasured, higher=False, about="the judge: standard deviation of overall over its repeats"
)
