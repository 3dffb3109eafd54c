"""Draws candidates in rounds: a prompt ends when enough pairs pass, or early when success is unlikely.

The paper draws 100 candidates for every prompt; 31% of its prompts keep none. Here a prompt is abandoned
after so many failures that a prompt worth continuing is unlikely to have them: see `Rounds.patience`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Literal, TypeVar

from ip2p.synth.records import Candidate, Triple, candidate

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """How many candidates a prompt gets.

    A prompt whose pass rate is at least `worth` is abandoned with a probability of at most `risk`. Prompts
    with a lower rate are meant to be abandoned, although some of them would pass eventually. A prompt with
    one pass continues up to `most` candidates. A try is one candidate, or all candidates that share a
    trajectory.

    Stopping at enough passes also has a cost: the best `enough` of all candidates have a higher directional
    similarity than the first `enough` that pass.
    """

    most: int = 100  # candidates, as in the paper
    enough: int | None = 4  # passes; None: all candidates are drawn
    enough_whole: int | None = None  # the same for edits of the whole picture; None: as the others
    size: int = 8  # maximum candidates per round and prompt
    worth: float = 0.1
    risk: float = 0.05  # 0: no prompt is abandoned
    shared: int = 1  # candidates per source trajectory; they are not independent, so they count as one try

    @classmethod
    def of(cls, how: Mapping[str, Any]) -> Rounds:
        """Rounds from `SynthPairsConfig.how`, where `enough=0` draws all candidates."""
        return cls(
            most=how["most"],
            enough=how["enough"] or None,
            enough_whole=how["enough_whole"] or None,
            size=how["round_size"],
            worth=how["worth"],
            risk=how["risk"],
            shared=how["p_per_source"],
        )

    def for_triple(self, triple: Triple) -> Rounds:
        """The rounds of a triple: its kind has its quota, unless all candidates are drawn."""
        if self.enough is None or self.enough_whole is None or not triple.is_whole:
            return self
        return replace(self, enough=min(self.enough, self.enough_whole))

    @property
    def patience(self) -> int | None:
        """Tries without a pass after which a prompt is abandoned; None for never.

        The smallest n with (1 - worth)^n ≤ risk. A prompt with pass rate q ≥ worth has no pass in its first n
        tries with probability (1 - q)^n ≤ risk. Passes are final and a round can only delay the verdict, so
        this bound holds for any round size.
        """
        return math.ceil(math.log(self.risk) / math.log1p(-self.worth)) if self.risk else None

    def verdict(self, tried: int, passes: int) -> Literal["enough", "hopeless", "most"] | None:
        """Why a prompt ends after `tried` candidates with `passes` passes; None if it continues."""
        if self.enough is not None and passes >= self.enough:
            return "enough"
        if tried >= self.most:
            return "most"
        if self.patience and not passes and tried // self.shared >= self.patience:
            return "hopeless"
        return None

    def next(self, tried: int, passes: int) -> int:
        """The number of candidates in the next round: enough to expect `enough` passes, at most `size`.

        The expected pass rate is the posterior mean (passes + 1) / (tried + 2). A prompt without a pass never
        gets more than `patience` tries.
        """
        size = self.size
        if self.enough is not None:
            size = min(size, math.ceil((self.enough - passes) * (tried + 2) / (passes + 1)))
        if self.patience and not passes:
            size = min(size, max(1, self.patience * self.shared - tried))
        size = -(-size // self.shared) * self.shared  # whole trajectories only
        return min(size, self.most - tried)


AS_PAPER = Rounds(enough=None, risk=0.0, size=100)


@dataclass
class TripleResult(Generic[T]):
    """The result for a triple: the candidates that passed, and why it ended."""

    triple: Triple
    tried: int = 0
    passed: list[tuple[Candidate, T]] = field(default_factory=list)
    ended: Literal["enough", "hopeless", "most"] | None = None


def draw_in_rounds(
    triples: Sequence[Triple],
    rounds: Rounds,
    judge: Callable[[list[Candidate]], Sequence[T | None]],
    *,
    new: Callable[[Triple, int], Candidate] = candidate,
) -> list[TripleResult[T]]:
    """Draw candidates for all triples, one round of all active triples at a time, and judge them.

    `judge` draws and judges candidates of several triples. For each it returns what to keep, or None if it
    does not pass. The rounds of a triple depend only on its own candidates, so other triples do not change
    its result.
    """
    results = [TripleResult[T](triple) for triple in triples]
    plans = {triple.id: rounds.for_triple(triple) for triple in triples}
    while active := [result for result in results if result.ended is None]:
        batches = [
            [new(result.triple, result.tried + k) for k in range(size)]
            for result in active
            for size in [plans[result.triple.id].next(result.tried, len(result.passed))]
        ]
        answers = iter(judge([each for batch in batches for each in batch]))
        for result, batch in zip(active, batches, strict=True):
            kept = zip(batch, itertools.islice(answers, len(batch)), strict=True)
            result.passed += [(each, answer) for each, answer in kept if answer is not None]
            result.tried += len(batch)
            result.ended = plans[result.triple.id].verdict(result.tried, len(result.passed))
        assert next(answers, None) is None, "more answers than candidates"
    return results
