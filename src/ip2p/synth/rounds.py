"""Candidates in rounds: a prompt ends when enough of its pairs pass, or early when it is hopeless.

The paper makes 100 candidates of every prompt, and 31% of its prompts keep none of them. Here a prompt is
given up when it had no pass in so many tries that a prompt worth going on with would be unlucky: see
`Rounds.patience`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from ip2p.synth.records import Candidate, Triple, candidate

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """How many candidates a prompt gets.

    A prompt of which at least the share `worth` of the tries would pass is given up with a probability of
    at most `risk`. A try is a candidate, or all of those that share a trajectory. Prompts below that are the
    ones meant to be given up, though some of those would have had a pass in the end. One that had a pass
    goes on to `most`.

    Stopping at enough passes has a price too: the best `enough` of all candidates are better, by the
    directional similarity, than the first.
    """

    most: int = 100  # candidates, the paper's number
    enough: int | None = 4  # passes; None: all candidates are made
    size: int = 8  # candidates a round and prompt, at most
    worth: float = 0.1
    risk: float = 0.05  # 0: no prompt is given up
    shared: int = 1  # candidates with one source trajectory, which do not pass independently: one try

    @classmethod
    def of(cls, how: Mapping[str, Any]) -> Rounds:
        """From settings by the names of `synth pairs`, where enough 0 has all candidates made."""
        return cls(
            most=how["most"],
            enough=how["enough"] or None,
            size=how["round_size"],
            worth=how["worth"],
            risk=how["risk"],
            shared=how["p_per_source"],
        )

    @property
    def patience(self) -> int | None:
        """Tries without a pass after which a prompt is given up, None for never.

        The least n with (1 - worth)^n ≤ risk. A prompt of pass rate q ≥ worth has no pass in its first n
        tries with probability (1 - q)^n ≤ risk; later passes cannot be taken back, and a round only puts the
        verdict off, so that this is all that it risks, whatever the rounds.
        """
        return math.ceil(math.log(self.risk) / math.log1p(-self.worth)) if self.risk else None

    def verdict(self, tried: int, passes: int) -> Literal["enough", "hopeless", "most"] | None:
        """Why a prompt ends after `tried` candidates of which `passes` passed, None when it goes on."""
        if self.enough is not None and passes >= self.enough:
            return "enough"
        if tried >= self.most:
            return "most"
        if self.patience and not passes and tried // self.shared >= self.patience:
            return "hopeless"
        return None

    def next(self, tried: int, passes: int) -> int:
        """How many candidates the next round has: those by which enough should pass, `size` at most.

        By the mean of the pass rate after what was seen, (passes + 1) / (tried + 2). None is made beyond the
        tries after which a prompt without a pass is given up.
        """
        size = self.size
        if self.enough is not None:
            size = min(size, math.ceil((self.enough - passes) * (tried + 2) / (passes + 1)))
        if self.patience and not passes:
            size = min(size, max(1, self.patience * self.shared - tried))
        size = -(-size // self.shared) * self.shared  # trajectories are begun only to be used whole
        return min(size, self.most - tried)


AS_PAPER = Rounds(enough=None, risk=0.0, size=100)


@dataclass
class Prompt(Generic[T]):
    """What became of a triple: its candidates that passed, and why no more were made."""

    triple: Triple
    tried: int = 0
    passed: list[tuple[Candidate, T]] = field(default_factory=list)
    ended: Literal["enough", "hopeless", "most"] | None = None


def run(
    triples: Sequence[Triple],
    rounds: Rounds,
    judge: Callable[[list[Candidate]], Sequence[T | None]],
    *,
    new: Callable[[Triple, int], Candidate] = candidate,
) -> list[Prompt[T]]:
    """Make candidates of all triples, a round of all that go on at a time, and judge them.

    `judge` makes and judges a list of candidates, of several triples, and gives for each what is to be
    kept of it, or None when it does not pass. A triple's rounds depend on its own candidates alone, so
    that the result is the same whatever triples stand beside it.
    """
    prompts = [Prompt[T](triple) for triple in triples]
    while going := [prompt for prompt in prompts if prompt.ended is None]:
        sizes = [rounds.next(prompt.tried, len(prompt.passed)) for prompt in going]
        tries = [
            [new(prompt.triple, prompt.tried + k) for k in range(size)]
            for prompt, size in zip(going, sizes, strict=True)
        ]
        together = [each for one in tries for each in one]
        judged = judge(together)
        assert len(judged) == len(together), "a candidate was not judged"
        answers = iter(judged)
        for prompt, made in zip(going, tries, strict=True):
            for each in made:
                if (kept := next(answers)) is not None:
                    prompt.passed.append((each, kept))
            prompt.tried += len(made)
            prompt.ended = rounds.verdict(prompt.tried, len(prompt.passed))
    return prompts
