"""The shell recipes and the guide to making training data contain only valid commands.

The recipes run with stand-ins for their programs, so the commands parsed are those they would call.
"""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from ip2p.cli import main as cli
from ip2p.synth.filter import PRESETS
from ip2p.synth.settings import PAIRS, PAIRS_AS_PAPER, PAIRS_STORYBOOK

ROOT = Path(__file__).parents[1]
STAND_IN = '#!/usr/bin/env python3\nimport json, sys\nprint(json.dumps(sys.argv), file=open({log!r}, "a"))\n'


def recorded_calls(recipe: str, *words: str, log: Path, **environment: str) -> list[list[str]]:
    """The arguments of each ip2p call that a recipe makes; it runs from a copy in the folder of `log`."""
    here = log.parent
    shutil.copytree(ROOT / "recipes", here / "recipes", dirs_exist_ok=True)
    (here / "bin").mkdir(exist_ok=True)
    for name in ("ip2p", "accelerate", "python"):
        stand_in = here / "bin" / name
        stand_in.write_text(STAND_IN.format(log=str(log)))
        stand_in.chmod(0o755)
    path = {"PATH": f"{here / 'bin'}:/usr/bin:/bin", "PYTHON": str(here / "bin" / "python")}
    process = subprocess.run(
        ["bash", str(here / "recipes" / recipe), *words],
        env=path | environment,
        cwd=here,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    calls = [json.loads(line) for line in log.read_text().splitlines()]
    return [call[call.index("-m") + 2 :] if "-m" in call else call[1:] for call in calls]


def parse(words: list[str]) -> str:
    """Check a command's arguments and return its verb."""
    verb = next(verb for verb in cli.VERBS if words[: len(verb.split())] == verb.split())
    config = cli.parse(verb, words[len(verb.split()) :])
    if hasattr(config, "check"):
        config.check()
    return verb


MAKE = ["synth pairs", "synth filter", "synth inspect"]


@pytest.mark.parametrize(
    ("recipe", "words", "environment", "verbs"),
    [
        (
            "storybook.sh",
            ["out"],
            {},
            ["storybook draw", "synth instruct", *MAKE, "train", "storybook score"],
        ),
        ("storybook_build.sh", ["out"], {}, ["storybook build", "storybook score"]),
        ("storybook_gpu.sh", ["100", "out", "smoke", "2"], {}, ["storybook build"]),
        ("paper.sh", ["out"], {"GPUS": "8"}, ["synth tune-lm", "synth instruct", *MAKE, "train"]),
        ("paper.sh", ["out", "--steps", "5"], {}, ["synth tune-lm", "synth instruct", *MAKE, "train"]),
        ("paper.sh", ["pairs", "out"], {"GPUS": "8"}, ["train"]),
        ("paper.sh", ["pairs", "out"], {"MACHINES": "2", "RANK": "1", "HEAD": "a", "GPUS": "8"}, ["train"]),
        ("synth.sh", ["out"], {}, ["synth tune-lm", "synth instruct", *MAKE]),
        ("synth.sh", ["out"], {"RAY": "a:6379", "AS_PAPER": "1"}, ["synth tune-lm", "synth instruct", *MAKE]),
        ("synth.sh", ["out"], {"SERVER": "http://a/v1", "MODEL": "m"}, ["synth instruct", *MAKE]),
    ],
)
def test_every_command_of_a_recipe_is_valid(recipe, words, environment, verbs, here):
    calls = recorded_calls(recipe, *words, log=here / "calls.jsonl", **environment)
    assert [parse(call) for call in calls] == verbs


def test_the_paper_recipe_trains_on_the_pairs_that_it_made(here):
    *made, train = recorded_calls("paper.sh", "out", log=here / "calls.jsonl")
    config = cli.parse("train", train[1:])
    assert (config.data, str(config.output)) == ("out/kept", "out/editor")
    [kept] = [call for call in made if call[:2] == ["synth", "filter"]]
    assert cli.parse("synth filter", kept[2:]).out == Path(config.data)


def test_the_paper_recipe_on_several_machines_requires_a_data_set(here):
    process = subprocess.run(
        ["bash", str(ROOT / "recipes" / "paper.sh"), "out"],
        env={"PATH": "/usr/bin:/bin", "MACHINES": "2"},
        cwd=here,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 2 and "recipes/paper.sh out/kept out/editor" in process.stderr
    assert not list(here.iterdir())


def test_an_unknown_flag_in_a_recipe_is_detected(here):
    calls = recorded_calls("storybook_build.sh", "out", log=here / "calls.jsonl")
    with pytest.raises(cli.InputError, match="no-such"):
        parse([*calls[0], "--no-such", "1"])


def test_synth_sh_as_paper_has_the_papers_scale(here):
    calls = recorded_calls("synth.sh", "out", log=here / "calls.jsonl", AS_PAPER="1")
    instruct, pairs, kept = (
        cli.parse(f"synth {verb}", next(call for call in calls if call[1] == verb)[2:])
        for verb in ("instruct", "pairs", "filter")
    )
    assert (instruct.sample, instruct.edits, instruct.temperature) == (454_445, 1, 0.7)
    assert (instruct.frequency_penalty, instruct.max_tokens) == (0.1, 256)
    how = pairs.how()
    assert (how["most"], how["enough"], how["steps"], how["risk"]) == (100, 0, 100, 0)
    assert (pairs.p, pairs.scale, pairs.size) == ((0.1, 0.9), None, 512)
    assert (pairs.clip, pairs.vae) == ("openai/clip-vit-large-patch14", "stabilityai/sd-vae-ft-mse")
    assert (kept.preset, kept.top) == ("paper", 4)


def guide() -> str:
    return (ROOT / "docs" / "synth.md").read_text(encoding="utf-8")


def test_every_command_of_the_guide_is_valid(here):
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", guide(), re.S)).replace("\\\n", " ")
    inline = re.findall(r"`(ip2p synth [^`…]*? -[^`…]*)`", guide())
    lines = [line for line in blocks.splitlines() if line.startswith("ip2p ")]
    assert len(lines) > 10 and inline
    for line in [*lines, *(" ".join(each.split()) for each in inline)]:
        parse(shlex.split(line, comments=True)[1:])


def test_every_flag_in_the_guide_exists(here):
    known = {
        "--" + name.replace("_", "-") for verb in cli.VERBS for name in cli.config_class(verb).model_fields
    }
    others = {"--host", "--port", "--head", "--address"}  # of transformers serve and ray start
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", guide()))
    assert named - known - others == set()


def test_the_guide_lists_the_actual_defaults():
    [table] = re.findall(r"\n\| flag \| default (.*?)\n\n", guide(), re.S)
    rows = re.findall(r"^\| (`--[^|]*) \| ([^|]*) \| ([^|]*) \| ([^|]*) \|", table, re.M)
    documented = {}
    for flags, *columns in rows:
        names = [flag.strip("` -").replace("-", "_") for flag in flags.split(", ")]
        values = zip(*(column.split(", ") for column in columns), strict=True)
        documented |= dict(zip(names, values, strict=True))
    tables = (PAIRS, PAIRS_STORYBOOK, PAIRS_AS_PAPER)

    def typed(value: object) -> str:
        return " ".join(f"{each:g}" for each in value) if isinstance(value, tuple) else str(value)

    expected = {name: tuple(typed(defaults[name]) for defaults in tables) for name in PAIRS}
    del expected["attention"]  # it has its own table
    assert documented == expected
    for name, thresholds in PRESETS.items():
        row = re.search(rf"^\| `{name}` \| (\S+) \| (\S+) \| (\S+) \|", guide(), re.M)
        assert row and tuple(map(float, row.groups())) == (
            thresholds.image,
            thresholds.caption,
            thresholds.directional,
        )


def test_the_guide_shows_the_actual_diversity_of_the_seed_triples():
    from ip2p.synth.triples import measure_diversity, seed_triples

    [shown] = re.findall(r"```\n(753 triples.*?)```", guide(), re.S)
    lines = [line.removesuffix("…") for line in shown.splitlines()]
    for line, found in zip(lines, measure_diversity(seed_triples()).lines(), strict=True):
        assert found.startswith(line)


def test_the_yaml_recipes_use_only_settings_of_train():
    known = set(cli.config_class("train").model_fields)
    for path in (ROOT / "recipes").glob("*.yaml"):
        assert set(yaml.safe_load(path.read_text())) <= known
