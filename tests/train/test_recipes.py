"""The repository's recipes, read as `ip2p train --config` reads them."""

from pathlib import Path

import pytest
import yaml

from ip2p.cli.options import read_outer
from ip2p.training.settings import TrainConfig

RECIPES = Path(__file__).parents[2] / "recipes"


def read(name: str, **changes: object) -> TrainConfig:
    config = read_outer(TrainConfig, "train", file=RECIPES / name, env={})
    return config.changed(data="pairs", output=Path("editor"), **changes)


@pytest.mark.parametrize("name", ["paper.yaml", "code.yaml"])
def test_a_recipe_sets_every_field_that_it_names_and_passes_the_checks(name: str):
    config = read(name)
    written = yaml.safe_load((RECIPES / name).read_text(encoding="utf-8"))
    config.check()
    assert {key: getattr(config, key) for key in written} == written


@pytest.mark.parametrize("name", ["paper.yaml", "code.yaml"])
def test_every_value_of_a_recipe_names_its_source(name: str):
    lines = (RECIPES / name).read_text(encoding="utf-8").splitlines()
    values = [line for line in lines if line and not line.startswith("#")]
    unsourced = [line for line in values if len(line.partition(" # ")[2]) < 8]
    assert not unsourced


def test_the_two_recipes_differ_where_the_paper_and_its_code_do():
    paper, code = read("paper.yaml"), read("code.yaml")
    assert (paper.batch, paper.lr, paper.size, paper.warmup) == (1024, 1e-4, 256, 0)
    assert (code.batch, code.lr, code.size, code.warmup) == (1024, 1e-4, 256, 0)
    shares = (0.05, 0.05, 0.05)
    assert (paper.text_null, paper.image_null, paper.both_null) == shares
    assert (code.text_null, code.image_null, code.both_null) == shares
    assert (paper.steps, code.steps) == (10_000, 22_000)
    assert (paper.resize_to, code.resize_to) == (288, None)
    assert (paper.ema_updates, code.ema_updates) == (1, 4)
    assert code.batch == code.micro_batch * 4 * 8  # accumulation, GPUs
