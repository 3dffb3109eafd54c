import math
import random

import pytest

from ip2p.synth.records import Triple, candidate
from ip2p.synth.rounds import AS_PAPER, Rounds, draw_in_rounds
from ip2p.synth.settings import PAIRS, PAIRS_STORYBOOK


def triple(number: int) -> Triple:
    return Triple(
        id=f"t{number}", caption=f"a cat {number}", instruction="make it red", edited_caption="a red cat"
    )


class Judge:
    """Passes the listed candidates, and records its calls."""

    def __init__(self, passing):
        self.passing, self.rounds = passing, []

    def __call__(self, candidates):
        self.rounds.append([(c.triple.id, c.number) for c in candidates])
        return [c.number * 10 if (c.triple.id, c.number) in self.passing else None for c in candidates]

    def numbers_of(self, id):
        return [number for candidates in self.rounds for owner, number in candidates if owner == id]


def test_a_prompt_ends_with_enough_passes_when_hopeless_or_at_the_maximum():
    judge = Judge({("t0", k) for k in range(100)} | {("t2", 3)})
    easy, hopeless, hard = draw_in_rounds([triple(0), triple(1), triple(2)], Rounds(), judge)
    assert [prompt.ended for prompt in (easy, hopeless, hard)] == ["enough", "hopeless", "most"]
    # The patience is 29 tries without a pass; no round goes beyond it.
    assert [prompt.tried for prompt in (easy, hopeless, hard)] == [8, 29, 100]
    assert [(c, kept) for c, kept in hard.passed] == [(candidate(triple(2), 3), 30)]
    assert [c.number for c, _ in easy.passed] == list(range(8))
    for prompt in (easy, hopeless, hard):
        assert judge.numbers_of(prompt.triple.id) == list(range(prompt.tried))


def test_the_candidates_of_a_prompt_do_not_depend_on_other_prompts():
    rng = random.Random(0)
    rates = [0.0, 0.05, 0.1, 0.3, 0.7]
    passing = {(f"t{n}", k) for n, rate in enumerate(rates) for k in range(100) if rng.random() < rate}
    together = draw_in_rounds([triple(n) for n in range(5)], Rounds(), Judge(passing))
    alone = [draw_in_rounds([triple(n)], Rounds(), Judge(passing))[0] for n in range(5)]
    assert together == alone
    assert len({prompt.tried for prompt in together}) > 3


def test_as_paper_draws_100_candidates_of_every_prompt_at_once():
    judge = Judge({("t0", k) for k in range(100)})
    assert [prompt.tried for prompt in draw_in_rounds([triple(0), triple(1)], AS_PAPER, judge)] == [100, 100]
    assert len(judge.rounds) == 1


def test_a_round_has_as_many_candidates_as_should_give_enough_passes():
    rounds = Rounds(enough=4, size=8)
    assert rounds.next(0, 0) == 8
    assert rounds.next(8, 3) == 3  # one more, at a rate of 4 in 10
    assert rounds.next(8, 1) == 8
    assert rounds.next(96, 1) == 4
    assert Rounds(enough=4, size=8, shared=3).next(0, 0) == 9


@pytest.mark.parametrize("how", [PAIRS, PAIRS_STORYBOOK])
def test_the_defaults_stop_a_hopeless_prompt_before_all_candidates_are_drawn(how):
    rounds = Rounds.of(how)
    [prompt] = draw_in_rounds([triple(0)], rounds, Judge(set()))
    assert (prompt.tried, prompt.ended) == (rounds.patience, "hopeless")
    assert prompt.tried <= 0.75 * rounds.most


def test_candidates_of_one_trajectory_count_as_one_try():
    assert Rounds().verdict(29, 0) == "hopeless"
    assert Rounds().verdict(28, 0) is None
    four = Rounds(shared=4, most=1000)
    assert four.verdict(4 * 29 - 1, 0) is None
    assert four.verdict(4 * 29, 0) == "hopeless"


@pytest.mark.parametrize(("worth", "risk", "patience"), [(0.1, 0.05, 29), (0.05, 0.05, 59), (0.5, 0.01, 7)])
def test_patience_is_the_smallest_number_of_tries_that_keeps_the_risk(worth, risk, patience):
    assert Rounds(worth=worth, risk=risk).patience == patience
    assert (1 - worth) ** patience <= risk < (1 - worth) ** (patience - 1)


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("rate", [0.1, 0.12, 0.2])
def test_worthwhile_prompts_are_abandoned_no_more_often_than_the_risk(size, rate):
    """By simulation, with several round sizes: at most the risk, and near it at the limit."""
    rounds, prompts = Rounds(size=size, worth=0.1, risk=0.05), 8000
    rng = random.Random(size)

    def is_abandoned() -> bool:
        tried = passes = 0
        while (ended := rounds.verdict(tried, passes)) is None:
            count = rounds.next(tried, passes)
            passes += sum(rng.random() < rate for _ in range(count))
            tried += count
        return ended == "hopeless"

    share = sum(is_abandoned() for _ in range(prompts)) / prompts
    error = math.sqrt(0.05 * 0.95 / prompts)
    assert share <= 0.05 + 3 * error
    if rate == 0.1:
        assert share >= 0.03  # the rule is as strict as stated, except for round sizes


@pytest.mark.parametrize("size", [1, 3, 8])
def test_hopeless_prompts_cost_exactly_their_patience(size):
    rounds = Rounds(size=size, risk=0.05)
    [prompt] = draw_in_rounds([triple(0)], rounds, Judge(set()))
    assert (prompt.tried, prompt.ended) == (29, "hopeless")
    [prompt] = draw_in_rounds([triple(0)], Rounds(size=size, shared=2, most=80), Judge(set()))
    assert (prompt.tried, prompt.ended) == (58, "hopeless")
    [prompt] = draw_in_rounds([triple(0)], Rounds(risk=0.0), Judge(set()))
    assert (prompt.tried, prompt.ended) == (100, "most")
