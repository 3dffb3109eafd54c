import numpy as np
import pytest

from ip2p.evaluation.storybook import OTHER_ANSWERS, SPLITS, as_text, cases, judge, psnr, table
from ip2p_storybook.edits import EDIT_KINDS

SIZE = 64


@pytest.fixture(scope="module")
def some_cases():
    return list(cases(30, seed=0, size=SIZE, split="test"))


def test_every_kind_comes_in_turn_with_enough_other_answers(some_cases):
    assert [c.edit.kind for c in some_cases] == [*EDIT_KINDS, *EDIT_KINDS]
    assert all(len(c.others) >= OTHER_ANSWERS for c in some_cases)


def test_the_exact_answer_succeeds_and_keeps_the_page(some_cases):
    for case in some_cases:
        verdict = judge(case, case.exact)
        assert verdict.success
        assert verdict.preservation in (None, float("inf"))


def test_copying_the_page_never_succeeds(some_cases):
    assert not any(judge(case, case.page).success for case in some_cases)


def test_each_other_answer_fails(some_cases):
    for case in some_cases:
        assert not any(judge(case, other).success for other in case.others)


def test_noise_far_below_the_difference_does_not_turn_the_verdict(some_cases):
    rng = np.random.default_rng(0)
    for case in some_cases:
        noisy = case.exact + rng.normal(0, 2, case.exact.shape)
        assert judge(case, noisy.clip(0, 255).round().astype(np.uint8)).success


def test_what_lies_outside_the_region_does_not_count(some_cases):
    case = next(c for c in some_cases if not c.region.all())
    output = case.exact.copy()
    output[~case.region] = 0
    assert judge(case, output).success


def test_preservation_is_psnr_where_nothing_may_change(some_cases):
    case = next(c for c in some_cases if c.fixed.mean() > 0.3)
    output = case.page.astype(int)
    output = np.where(output >= 128, output - 10, output + 10).astype(np.uint8)
    kept = judge(case, output).preservation
    assert abs(kept - 20 * np.log10(255 / 10)) < 1e-4


def test_psnr_of_a_known_error():
    a = np.zeros((4, 4), np.uint8)
    assert psnr(a, a) == float("inf")
    assert abs(psnr(a, a + 255)) < 1e-9


def test_same_seed_same_cases():
    for split in SPLITS:
        first, second = (list(cases(3, seed=4, size=32, split=split)) for _ in range(2))
        assert [c.edit for c in first] == [c.edit for c in second]


def test_table_counts_shares(some_cases):
    verdicts = [judge(c, c.exact if i % 2 else c.page) for i, c in enumerate(some_cases)]
    rows = table(verdicts)
    assert rows["overall"]["count"] == 30 and rows["overall"]["success"] == 0.5
    assert set(rows) == {*EDIT_KINDS, "overall"}


def test_score_of_a_random_model_is_a_whole_table(tiny_model_dir):
    from ip2p.editing.editor import Editor
    from ip2p.evaluation.storybook import score

    editor = Editor.load(tiny_model_dir, device="cpu", dtype="fp32")
    result = score(editor, count=3, steps=1, size=64, batch_size=2)
    for split in SPLITS:
        assert result[split]["copy"]["overall"]["success"] == 0
        assert result[split]["model"]["overall"]["count"] == 3
    assert "overall" in as_text(result)
