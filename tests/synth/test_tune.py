"""A small language model learns its training triples, fully or as a LoRA, and loads like any other."""

import json
import math

import pytest
import torch

from ip2p.base.errors import InputError
from ip2p.synth import tune
from ip2p.synth.instruct import Ask, EditLimits, Instruct, LocalWriter, load_lm, prompt_of
from ip2p.synth.triples import seed_triples
from ip2p.synth.tune import new_lm, order, rate_at, row_of, tune_lm

SHOWN = [seed for seed in seed_triples() if len(seed.caption + seed.edited_caption) < 60][:3]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tune") / "base"
    texts = [text for seed in SHOWN for text in (seed.caption, seed.instruction, seed.edited_caption)]
    new_lm(texts, folder, vocabulary=320, width=64, layers=2, heads=2, context=128)
    return folder


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned") / "lm"
    messages = []
    tuning = {"epochs": 80, "batch": 3, "rate": 1e-2}  # 50 are too few on some processors
    result = tune_lm(base, folder, SHOWN, **tuning, backend="plain", device="cpu", say=messages.append)
    return folder, result, messages


def test_a_tuned_model_reproduces_its_training_triples(tuned):
    folder, result, messages = tuned
    assert result.steps == len(result.losses) == 80 and result.left_out == 0
    assert result.losses[0] > 4 and result.losses[-1] < 0.2 and "loss" in messages[-1]
    writer = LocalWriter(folder, device="cpu", dtype="fp32", temperature=0, frequency_penalty=0)
    written = Instruct(writer, retries=0, limits=EditLimits(seeds=False))([seed.caption for seed in SHOWN])
    for each, seed in zip(written, SHOWN, strict=True):
        assert [(t.instruction, t.edited_caption) for t in each.triples] == [
            (seed.instruction, seed.edited_caption)
        ]
        assert each.triples[0].source == "lm"


def test_the_saved_model_has_sampling_settings_and_no_local_paths(tuned, tmp_path):
    folder = tuned[0]
    config = json.loads((folder / "generation_config.json").read_text())
    assert config["do_sample"] and config["temperature"] == 0.7 and config["max_new_tokens"] == 256
    card = json.loads((folder / tune.CARD).read_text())
    assert card["triples"] == 3 and card["tuning"]["rate"] == 1e-2 and card["base"] == "base"
    assert [path.name for path in folder.parent.iterdir()] == ["lm"]
    for path in folder.glob("*.json"):
        assert str(folder.parents[1]) not in path.read_text()


def test_the_loss_covers_the_answer_and_not_the_caption(base):
    model, tokenizer = load_lm(base)
    row = row_of(SHOWN[0], tokenizer)
    assert tokenizer.decode(row.tokens[: row.start]) == prompt_of(SHOWN[0].caption)
    assert row.tokens[-1] == tokenizer.eos_token_id
    rows = [row, row_of(SHOWN[1], tokenizer)]
    tokens, mask, labels = tune.batch_of(rows, tokenizer.pad_token_id)
    with torch.inference_mode():
        loss = model(input_ids=tokens, attention_mask=mask, labels=labels).loss.item()
        # By hand: each answer token given the tokens before it, one row at a time.
        total, count = 0.0, 0
        for each in rows:
            logits = model(input_ids=torch.tensor([each.tokens])).logits[0].log_softmax(-1)
            for place in range(each.start, len(each)):
                total -= logits[place - 1, each.tokens[place]].item()
                count += 1
    assert loss == pytest.approx(total / count, rel=1e-4)


def test_a_lora_is_merged_into_a_full_model(base, tmp_path):
    tuning = {"lora": 8, "epochs": 20, "batch": 3, "rate": 2e-2}
    result = tune_lm(base, tmp_path / "lora", SHOWN, **tuning, backend="plain", device="cpu")
    assert result.losses[-1] < result.losses[0] - 0.5
    before, after = load_lm(base)[0].state_dict(), load_lm(tmp_path / "lora")[0].state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert changed and all("proj" in name for name in changed)


def test_tuning_is_deterministic_and_replaces_the_old_model(base, tmp_path):
    folder = tmp_path / "lm"
    states = []
    for epochs in (1, 2, 2):
        tune_lm(base, folder, SHOWN, epochs=epochs, batch=2, backend="plain", device="cpu")
        states.append(load_lm(folder)[0].state_dict())
    same = [all(torch.equal(one[name], states[2][name]) for name in one) for one in states]
    assert same == [False, True, True]
    assert [path.name for path in tmp_path.iterdir()] == ["lm"]


def test_every_row_comes_once_per_epoch_in_a_new_order():
    steps = order(10, epochs=2.5, batch=4, seed=0)
    places = [place for step in steps for place in step]
    assert [len(step) for step in steps] == [4] * 6 + [1]
    assert sorted(places[:10]) == sorted(places[10:20]) == list(range(10)) and places[:10] != places[10:20]
    assert len(set(places[20:])) == 5
    assert order(10, epochs=2.5, batch=4, seed=0) == steps != order(10, epochs=2.5, batch=4, seed=1)


def test_the_learning_rate_warms_up_and_then_follows_a_cosine():
    rates = [rate_at(step, 100, 0.1) for step in range(100)]
    assert rates[:10] == sorted(rates[:10]) and rates[10] == 1 and rates[10:] == sorted(rates[10:])[::-1]
    assert rates[55] == pytest.approx(0.5) and 0 < rates[-1] < 0.001 and min(rates) > 0
    assert rate_at(0, 1, 0.03) > 0


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"batch": 0}, "--batch is 0"),
        ({"rate": math.nan}, "--rate is nan"),
        ({"lora": 0}, "--lora is 0"),
        ({"max_length": 9}, "all 3 triples are longer than 9 tokens"),
        ({"triples": []}, "no triples"),
        ({"rate": 1, "weight_decay": 10, "epochs": 60, "batch": 1}, "use a lower --rate"),
    ],
)
def test_invalid_settings_are_refused_and_nothing_is_written(base, tmp_path, settings, expected):
    settings = {"triples": SHOWN, "backend": "plain", "device": "cpu"} | settings
    with pytest.raises(InputError, match=expected):
        tune_lm(base, tmp_path / "lm", **settings)
    assert not (tmp_path / "lm").exists()


def test_a_missing_trl_is_reported_with_the_command_that_installs_it(base, tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "_has_trl", lambda: False)
    with pytest.raises(InputError, match=r"pip install 'ip2p\[llm\]'"):
        tune_lm(base, tmp_path / "lm", SHOWN, backend="trl")


def test_long_triples_are_skipped_and_reported(base, tmp_path):
    _, tokenizer = load_lm(base)
    lengths = sorted(len(row_of(seed, tokenizer)) for seed in SHOWN)
    messages = []
    result = tune_lm(
        base,
        tmp_path / "lm",
        SHOWN,
        max_length=lengths[1],
        epochs=1,
        backend="plain",
        device="cpu",
        say=messages.append,
    )
    assert result.left_out == 1 and "skipping 1 triples longer than" in messages[0]


def test_settings_of_a_new_model_are_checked(tmp_path):
    with pytest.raises(InputError, match="use 300 or more"):
        new_lm(["a"], tmp_path / "lm", vocabulary=100)
    with pytest.raises(InputError, match="a multiple of 8"):
        new_lm(["a"], tmp_path / "lm", width=30, heads=4)


def test_a_new_models_tokenizer_round_trips_any_text(base):
    tokenizer = load_lm(base)[1]
    for text in (prompt_of("a café, naïve 写真"), "a\n%%\nb\nEND", "  two  blanks"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert Ask(caption="a").seed != Ask(caption="b").seed
