"""The build with its smallest preset, end to end: stopping, resuming, damage."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from ip2p.base.errors import InputError, ModelError
from ip2p.base.ledger import lock_folder
from ip2p.models.bundle import RECOMMENDED
from ip2p.training import loop
from ip2p.training.checkpoints import Checkpoints
from ip2p.training.storybook import build, editor, stage
from ip2p.training.storybook.autoencoder import new_autoencoder
from ip2p.training.storybook.data import Crops, Pages
from ip2p.training.storybook.language_model import LM_TOKENS, Triples, to_learn
from ip2p.training.storybook.presets import PRESETS, StageConfig


def smoke_without_time_limits():
    """The smoke preset with lengths in steps only: a cosine over time is not reproducible."""
    smoke = PRESETS["smoke"]
    stages = {
        key: replace(value, minutes=1e9)
        for key, value in vars(smoke).items()
        if isinstance(value, StageConfig)
    }
    return replace(smoke, save_every=0.0, perception_most=1e9, **stages)


@pytest.fixture(autouse=True)
def steps_alone_set_the_pace(monkeypatch):
    monkeypatch.setitem(PRESETS, "smoke", smoke_without_time_limits())


def quiet(text: str) -> None:
    pass


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("build")
    patch = pytest.MonkeyPatch()
    patch.setitem(PRESETS, "smoke", smoke_without_time_limits())
    assert build.build_model("smoke", folder, device="cpu", bundle=folder / "bundle", log=quiet)
    patch.undo()
    return folder


def test_diffusers_pipeline_loads_the_bundle_and_edits(built):
    from diffusers import StableDiffusionInstructPix2PixPipeline
    from PIL import Image

    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(built / "bundle")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.unet.config.in_channels == 2 * pipeline.vae.config.latent_channels == 32
    page = Image.new("RGB", (64, 64), "white")
    result = pipeline(
        "make it night", image=page, num_inference_steps=2, generator=torch.Generator().manual_seed(0)
    )
    assert result.images[0].size == (64, 64)


def test_our_editor_loads_the_bundle_and_edits(built):
    from PIL import Image

    from ip2p.editing.editor import Editor

    results = Editor.load(built / "bundle", device="cpu").edit(
        Image.new("RGB", (64, 64), "white"), "make it night", steps=2, seeds=[1, 2]
    )
    assert [r.size for r in results] == [(64, 64), (64, 64)]


def test_the_clip_folder_has_the_averaged_text_projection(built):
    from transformers import CLIPModel

    clip = CLIPModel.from_pretrained(built / "bundle" / "clip")
    average = Checkpoints(built / "state" / "clip").load()["ema"]["average"]
    key = "text_projection.weight"
    torch.testing.assert_close(clip.state_dict()[key].float(), average[f"clip.{key}"], atol=2e-3, rtol=1e-2)


def test_the_card_records_size_preset_and_training(built):
    card = json.loads((built / "bundle" / "ip2p.json").read_text())
    assert card["native_size"] == 64 and card["preset"] == "smoke"
    assert card["trained"]["unet"]["steps"] == PRESETS["smoke"].unet.steps
    assert set(card["trained"]["perception"]) >= {"steps", "kind", "colour", "change"}


def test_the_bundle_contains_no_local_path(built):
    for path in (built / "bundle").rglob("*.json"):
        assert str(built) not in path.read_text(), path


def test_every_word_of_the_language_is_one_token(built):
    from transformers import CLIPTokenizer

    from ip2p_storybook.language import vocabulary

    tokenizer = CLIPTokenizer.from_pretrained(built / "bundle" / "tokenizer")
    for word in {w for entry in vocabulary() for w in entry.split() if w.isalpha()}:
        assert len(tokenizer(word).input_ids) == 3, word
    # An unknown word is split into smaller tokens instead of being lost.
    assert len(tokenizer("zyxqv").input_ids) > 3


def test_the_tokenizer_is_deterministic(built, tmp_path):
    from ip2p.training.storybook.text import learn_merges, write_tokenizer

    write_tokenizer(tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (built / "tokenizer" / path.name).read_bytes()
    assert learn_merges(["aab", "ab"]) == [("a", "b</w>"), ("a", "ab</w>")]


def test_a_finished_build_is_reported_and_left_unchanged(built):
    before = {p: p.stat().st_mtime_ns for p in built.rglob("*.safetensors")}
    messages = []
    assert build.build_model("smoke", built, device="cpu", log=messages.append)
    assert messages == [f"{s}: finished already" for s in build.STAGES]
    assert before == {p: p.stat().st_mtime_ns for p in built.rglob("*.safetensors")}


# The name of each stage's first state, and the finished stages that it needs.
KILLED = {
    "decoder": ("decoder_crops", ()),
    "text": ("text", ()),
    "perception": ("perception", ("encoder", "text")),
    "unet": ("unet", ("encoder", "text", "perception")),
    "decay": ("decay-00000006", ("encoder", "text", "perception", "unet")),
    "clip": ("clip", ("text",)),
    "lm": ("lm", ()),
}


def link_finished_stages(built, folder, names):
    """Link the files and states of finished stages into `folder`."""
    (folder / "state").mkdir()
    for name in ("vae", "text_tower", "tokenizer", "latents"):
        needed = {"vae": "encoder", "latents": "encoder"}.get(name, "text")
        if needed in names:
            (folder / name).symlink_to(built / name)
    for name in names:
        (folder / "state" / f"{name}.done.json").symlink_to(built / "state" / f"{name}.done.json")
        if (built / "state" / name).exists():
            (folder / "state" / name).symlink_to(built / "state" / name)


@pytest.mark.parametrize("name", [name for name in build.STAGES if name != "encoder"])
def test_a_killed_stage_resumes_to_bit_identical_weights(built, tmp_path, monkeypatch, name):
    """N steps, a crash in the next one, and the rest equal all steps at once, bit for bit."""
    first, needs = KILLED[name]
    link_finished_stages(built, tmp_path, needs)
    if name == "decoder":
        build.build_model("smoke", tmp_path, stage="encoder", device="cpu", log=quiet)
    original, calls = loop.learning_rate, []
    crash_at = 3

    def crash(*args):
        calls.append(1)
        if len(calls) == crash_at:
            raise ConnectionAbortedError("killed")
        return original(*args)

    monkeypatch.setattr(loop, "learning_rate", crash)
    with pytest.raises(ConnectionAbortedError):
        build.build_model("smoke", tmp_path, stage=name, device="cpu", log=quiet)
    messages = []
    assert build.build_model("smoke", tmp_path, stage=name, device="cpu", log=messages.append)
    assert messages[0] == f"{first}: resuming from step {crash_at - 1}"
    state = {"decay": first, "decoder": "decoder-00000004"}.get(name, name)
    resumed, uninterrupted = (Checkpoints(folder / "state" / state).load() for folder in (tmp_path, built))
    assert resumed["step"] == uninterrupted["step"]
    for part in (
        (resumed["model"], uninterrupted["model"]),
        (resumed["ema"]["average"], uninterrupted["ema"]["average"]),
    ):
        assert all(torch.equal(part[0][k], part[1][k]) for k in part[1])


def test_a_run_can_resume_with_another_precision(built, tmp_path, monkeypatch):
    """A machine with bf16 units resumes a run of one without them."""
    link_finished_stages(built, tmp_path, ("encoder", "text"))
    smoke = PRESETS["smoke"]
    short = replace(smoke, perception=replace(smoke.perception, steps=2))
    monkeypatch.setitem(PRESETS, "smoke", short)
    build.build_model("smoke", tmp_path, stage="perception", device="cpu", log=quiet)
    (tmp_path / "state" / "perception.done.json").unlink()
    monkeypatch.setitem(PRESETS, "smoke", replace(smoke, precision="bf16"))
    messages = []
    assert build.build_model("smoke", tmp_path, stage="perception", device="cpu", log=messages.append)
    assert messages[0] == "perception: resuming from step 2"


def test_an_extended_unet_is_decayed_again(built, tmp_path, monkeypatch):
    link_finished_stages(built, tmp_path, ("encoder", "text", "perception"))
    assert build.build_model("smoke", tmp_path, stage="unet", device="cpu", log=quiet)
    assert build.build_model("smoke", tmp_path, stage="decay", device="cpu", log=quiet)
    first = json.loads((tmp_path / "state" / "decay.done.json").read_text())
    smoke = PRESETS["smoke"]
    monkeypatch.setitem(PRESETS, "smoke", replace(smoke, unet=replace(smoke.unet, steps=8)))
    messages = []
    assert build.build_model("smoke", tmp_path, stage="unet", minutes=600, device="cpu", log=messages.append)
    assert messages[0] == "unet: resuming from step 6"
    assert build.build_model("smoke", tmp_path, stage="decay", device="cpu", log=messages.append)
    second = json.loads((tmp_path / "state" / "decay.done.json").read_text())
    assert (first["steps_before"], second["steps_before"]) == (6, 8)
    assert [path.name for path in (tmp_path / "state").glob("decay-*")] == ["decay-00000008"]
    # Only the copy decays; the run that can be extended keeps its state.
    assert Checkpoints(tmp_path / "state" / "unet").load()["step"] == 8
    assert build.build_model("smoke", tmp_path, stage="decay", device="cpu", log=messages.append)
    assert messages[-1] == "decay: finished already"


def test_minutes_without_a_stage_are_refused(tmp_path):
    with pytest.raises(InputError, match="--minutes sets the length of one stage"):
        build.build_model("smoke", tmp_path, minutes=3.0, device="cpu", log=quiet)


def test_missed_gates_are_reported_and_training_continues_to_the_maximum_minutes(
    built, tmp_path, monkeypatch
):
    link_finished_stages(built, tmp_path, ("encoder", "text"))
    smoke = PRESETS["smoke"]
    brief = replace(smoke.perception, minutes=600)
    strict = replace(smoke, gates={"kind": 0.9, "change": 0.7}, perception=brief, perception_most=700)
    monkeypatch.setitem(PRESETS, "smoke", strict)
    messages = []
    assert build.build_model("smoke", tmp_path, stage="perception", device="cpu", log=messages.append)
    assert any("below 90%" in line and "training to 700 minutes" in line for line in messages)
    summary = json.loads((tmp_path / "state" / "perception.done.json").read_text())
    assert [line.split()[0] for line in summary["missed"]] == ["kind", "change"]


def test_a_bundle_can_be_trained_further_from_its_weights(built, tmp_path, monkeypatch):
    messages = []
    start_weights = {}
    original_fit = stage.fit

    def record_start(task, *args, **kwargs):
        if kwargs["name"] == "unet":
            start_weights.update({k: v.clone() for k, v in task.state_dict().items()})
        return original_fit(task, *args, **kwargs)

    monkeypatch.setattr(stage, "fit", record_start)
    bundle = tmp_path / "bundle"
    assert build.build_model(
        "smoke", tmp_path, start=str(built / "bundle"), device="cpu", bundle=bundle, log=messages.append
    )
    assert messages[:5] == [
        f"{name}: finished already" for name in ("encoder", "decoder", "text", "clip", "perception")
    ]
    assert messages[-1] == "lm: finished already"
    for path in (built / "bundle" / "lm").iterdir():
        assert (bundle / "lm" / path.name).read_bytes() == path.read_bytes()
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    shipped = UNet2DConditionModel.from_pretrained(built / "bundle" / "unet").float().state_dict()
    assert all(torch.equal(start_weights[f"unet.{k}"], shipped[k]) for k in shipped)
    text = CLIPTextModel.from_pretrained(built / "bundle" / "text_encoder").float().state_dict()
    assert all(torch.equal(start_weights[f"text_encoder.{k}"], text[k]) for k in text)
    cards = [json.loads((folder / "ip2p.json").read_text()) for folder in (built / "bundle", bundle)]
    assert cards[1]["trained"]["unet"]["steps"] == 2 * cards[0]["trained"]["unet"]["steps"]
    assert cards[1]["trained"]["decoder"] == cards[0]["trained"]["decoder"]


def test_the_decoder_of_a_bundle_can_be_trained_further_alone(built, tmp_path):
    def weights(folder):
        return {str(p.relative_to(folder)): load_file(p) for p in sorted(folder.rglob("*.safetensors"))}

    bundle = tmp_path / "bundle"
    for minutes in (100, 200):  # the second call trains on, and the part on whole pages starts again
        assert build.build_model(
            "smoke",
            tmp_path,
            start=str(built / "bundle"),
            stage="decoder",
            minutes=minutes,
            steps=minutes // 25,
            device="cpu",
            bundle=bundle,
            log=quiet,
        )
    before, after = weights(built / "bundle"), weights(bundle)
    changed = {
        f"{name}: {key}"
        for name in before
        for key in before[name]
        if not torch.equal(before[name][key], after[name][key])
    }
    assert changed and all(" decoder." in key or " post_quant_conv." in key for key in changed)
    cards = [json.loads((folder / "ip2p.json").read_text()) for folder in (built / "bundle", bundle)]
    steps = [card["trained"]["decoder"]["steps"] for card in cards]
    assert steps[1] == steps[0] + 8 + 8  # on crops and on whole pages
    assert [p.name for p in (tmp_path / "state").glob("decoder-*")] == ["decoder-00000008"]


def test_starting_in_a_folder_with_another_build_is_refused(built, tmp_path):
    build.build_model("smoke", tmp_path, seconds=0.0, device="cpu", log=quiet)
    with pytest.raises(InputError, match="holds a build already"):
        build.build_model("smoke", tmp_path, start=str(built / "bundle"), device="cpu", log=quiet)


def test_a_model_not_made_by_the_build_is_refused(built, tmp_path, tiny_model_dir):
    with pytest.raises(ModelError, match="was not made by ip2p storybook build"):
        build.build_model("cpu", tmp_path / "a", start=str(tiny_model_dir), device="cpu", log=quiet)


def test_the_packaged_model_can_be_trained_further_with_another_preset(tmp_path, monkeypatch):
    """The networks are the model's; the preset sets steps, batch and learning rate. It can resume, too."""
    from diffusers import UNet2DConditionModel

    from ip2p.models.bundle import find_model

    monkeypatch.setitem(PRESETS, "smoke", replace(smoke_without_time_limits(), save_every=1e9))
    shared = {"start": "storybook", "device": "cpu", "bundle": tmp_path / "model", "log": quiet}
    assert not build.build_model("smoke", tmp_path / "build", seconds=0.0, **shared)
    assert build.build_model("smoke", tmp_path / "build", **shared)
    folders = [find_model("storybook"), tmp_path / "model"]
    before, after = (UNet2DConditionModel.from_pretrained(folder / "unet").float() for folder in folders)
    configs = [{k: v for k, v in unet.config.items() if not k.startswith("_")} for unet in (before, after)]
    assert configs[0] == configs[1]
    changed_count = sum(
        not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)
    )
    assert changed_count > 50
    cards = [json.loads((folder / "ip2p.json").read_text()) for folder in folders]
    steps = [card["trained"]["unet"]["steps"] for card in cards]
    assert steps[1] == steps[0] + PRESETS["smoke"].unet.steps
    for key in ("native_size", "known_psnr", *RECOMMENDED):
        assert cards[1].get(key) == cards[0].get(key), key
    schedulers = [
        json.loads((folder / "scheduler" / "scheduler_config.json").read_text()) for folder in folders
    ]
    assert schedulers[1]["prediction_type"] == schedulers[0]["prediction_type"]


def test_a_time_limit_saves_the_state_and_says_how_to_resume(tmp_path):
    messages = []
    assert not build.build_model("smoke", tmp_path, seconds=0.0, device="cpu", log=messages.append)
    assert messages[-1] == "decoder: the time limit is reached; run the same command again to resume"
    assert Checkpoints(tmp_path / "state" / "decoder_crops").load()["step"] == 0


def test_the_bundled_language_model_answers_captions(built):
    from ip2p.synth.instruct import Ask, LocalWriter

    writer = LocalWriter(built / "bundle" / "lm", device="cpu", max_tokens=5)
    answers = writer(
        [Ask(caption=text) for text in ("a red cat in the meadow", "an astronaut; 'Über' rides")]
    )
    assert len(answers) == 2
    assert writer.tokens == 10 or any(answer.finished for answer in answers)
    card = json.loads((built / "bundle" / "ip2p.json").read_text())
    assert card["trained"]["lm"]["steps"] == PRESETS["smoke"].lm.steps


def test_texts_of_the_language_model_survive_a_tokenizer_round_trip(built):
    from ip2p.synth.instruct import completion_of, load_lm, prompt_of
    from ip2p_storybook.captions import phrases
    from ip2p_storybook.triples import exact_triples

    _, tokenizer = load_lm(built / "bundle" / "lm")
    triples = [to_learn(triple) for triple in exact_triples(100, 9)]
    texts = [prompt_of(t.caption) + completion_of(t) for t in triples]
    texts += ["HE SHOULD HAVE SUNGLASSES!", "Over 3 elves' caps: (50%) in the cityscape", *phrases()]
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    # Non-ASCII letters are dropped without an error.
    assert tokenizer.decode(tokenizer("a caf\u00e9")["input_ids"], skip_special_tokens=True) == "a caf"
    for mark in ("\n##\n", "\n%%\n", "\nEND", *phrases()):
        assert len(tokenizer(mark)["input_ids"]) == 1, mark


def test_instructions_are_normalized_in_case_and_punctuation():
    from dataclasses import replace as with_

    from ip2p_storybook.triples import exact_triples

    triple = next(iter(exact_triples(1, 0)))
    for typed, learned in (
        ("MAKE IT NIGHT.", "Make it night"),
        ("Could You Make It Night?", "Could you make it night"),
        ("make it night. also add a cat", "Make it night. also add a cat"),
    ):
        retyped = with_(triple, edit=with_(triple.edit, instruction=typed))
        assert to_learn(retyped).instruction == learned


def test_groups_of_triples_depend_only_on_seed_and_number(built):
    from ip2p.synth.instruct import load_lm

    _, tokenizer = load_lm(built / "bundle" / "lm")
    late = next(iter(Triples(tokenizer, 2, seed=5, start=3)))
    again = Triples(tokenizer, 2, seed=5).make(3)
    assert len(late) == Triples.GROUPED
    assert all(
        torch.equal(a, b) for one, two in zip(late, again, strict=True) for a, b in zip(one, two, strict=True)
    )


def test_saving_a_build_without_a_language_model_keeps_the_existing_one(built, tmp_path):
    for path in built.iterdir():
        if path.name not in ("lm", "bundle", "state"):
            (tmp_path / path.name).symlink_to(path)
    target = tmp_path / "bundle"
    (target / "lm").mkdir(parents=True)
    (target / "lm" / "ip2p.json").write_text(json.dumps({"steps": 7, "samples": 28, "minutes": 0.1}))
    build.save_bundle(tmp_path, target, PRESETS["smoke"], card={"name": "x"}, dtype=torch.float16)
    assert json.loads((target / "ip2p.json").read_text())["trained"]["lm"]["steps"] == 7
    assert (target / "lm" / "ip2p.json").exists()


@pytest.mark.parametrize("name", ["perception", "unet"])
def test_an_unfinished_editor_is_still_saved_as_a_bundle(built, tmp_path, name):
    link_finished_stages(
        built, tmp_path, ("encoder", "text", "perception")[: 2 if name == "perception" else 3]
    )
    (tmp_path / "clip").symlink_to(built / "clip")
    bundle = tmp_path / "bundle"
    assert not build.build_model(
        "smoke", tmp_path, stage=name, seconds=0.0, device="cpu", bundle=bundle, log=quiet
    )
    assert (bundle / "unet" / "config.json").exists()


def test_a_changed_preset_is_refused_on_resume(tmp_path, monkeypatch):
    build.build_model("smoke", tmp_path, seconds=0.0, device="cpu", log=quiet)
    monkeypatch.setitem(PRESETS, "smoke", replace(PRESETS["smoke"], hue_weight=0.5))
    with pytest.raises(InputError, match="hue_weight"):
        build.build_model("smoke", tmp_path, device="cpu", log=quiet)


def test_a_second_build_in_the_same_folder_is_refused(tmp_path):
    with lock_folder(tmp_path), pytest.raises(InputError, match="another ip2p process is writing to"):
        build.build_model("smoke", tmp_path, device="cpu", log=quiet)


def test_an_unknown_preset_or_stage_is_reported_with_the_known_ones(tmp_path):
    with pytest.raises(InputError, match="'huge'.*smoke, cpu, h100"):
        build.build_model("huge", tmp_path)
    with pytest.raises(InputError, match="'gan'.*encoder, decoder, text, clip, perception, unet, decay, lm"):
        build.build_model("smoke", tmp_path, stage="gan")


def test_batches_do_not_depend_on_where_the_stream_starts():
    for kind, more in ((Pages, {}), (Crops, {"crop": 16})):
        late = next(iter(kind(2, 32, seed=5, start=3, **more)))
        assert torch.equal(late, kind(2, 32, seed=5, **more).make(3))


def test_weights_fit_the_package():
    """Every preset's UNet has at most 17 million parameters, all parts in half precision at most 46 MiB."""
    for name in ("cpu", "h100"):
        preset = PRESETS[name]
        with torch.device("meta"):
            unet, vae = editor.new_unet(preset), new_autoencoder(preset)
        sizes = {
            part: sum(p.numel() for p in network.parameters())
            for part, network in (("unet", unet), ("vae", vae))
        }
        assert sizes["unet"] <= 17_000_000, (name, sizes)
        width, layers = preset.text_width, preset.text_layers + preset.clip_layers
        # Both text towers, CLIP's image tower, and their embeddings of at most 5,000 tokens.
        towers = 2 * 5000 * width + (layers + preset.text_layers) * 10 * width**2
        inner, lm = preset.lm_inner, preset.lm_width
        layer = 4 * lm**2 + 3 * lm * inner + 2 * lm
        assert 2 * (LM_TOKENS * lm + preset.lm_layers * layer + lm) < 375_000, name
        assert 2 * (sum(sizes.values()) + towers) + 375_000 < 46 * 2**20, (name, sizes)
