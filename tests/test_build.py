"""The build in its smallest preset: the whole path, stopping, resuming, damage."""

import json
from dataclasses import replace

import pytest
import torch

from ip2p.base.errors import InputError, ModelError
from ip2p.base.ledger import lock_folder
from ip2p.training import build, loop
from ip2p.training.checkpoints import Checkpoints


@pytest.fixture(autouse=True)
def steps_alone_set_the_pace(monkeypatch):
    """Minutes play no part here, so that a slow machine takes the same steps."""
    smoke = build.PRESETS["smoke"]
    stages = {s: replace(getattr(smoke, s), minutes=600) for s in build.STAGES}
    monkeypatch.setitem(build.PRESETS, "smoke", replace(smoke, save_every=0.0, **stages))


def quiet(text: str) -> None:
    pass


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("build")
    smoke = build.PRESETS["smoke"]
    stages = {s: replace(getattr(smoke, s), minutes=600) for s in build.STAGES}
    patch = pytest.MonkeyPatch()
    patch.setitem(build.PRESETS, "smoke", replace(smoke, save_every=0.0, **stages))
    assert build.run("smoke", folder, device="cpu", bundle=folder / "bundle", log=quiet)
    patch.undo()
    return folder


def test_diffusers_pipeline_opens_the_bundle_and_edits(built):
    from diffusers import StableDiffusionInstructPix2PixPipeline
    from PIL import Image

    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(built / "bundle")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.unet.config.in_channels == 8
    page = Image.new("RGB", (64, 64), "white")
    result = pipeline(
        "make it night", image=page, num_inference_steps=2, generator=torch.Generator().manual_seed(0)
    )
    assert result.images[0].size == (64, 64)


def test_our_editor_opens_the_bundle_and_edits(built):
    from PIL import Image

    from ip2p.editing.editor import Editor

    results = Editor.load(built / "bundle", device="cpu").edit(
        Image.new("RGB", (64, 64), "white"), "make it night", steps=2, seeds=[1, 2]
    )
    assert [r.size for r in results] == [(64, 64), (64, 64)]


def test_clip_folder_scores_pictures_and_captions(built):
    from transformers import CLIPModel

    clip = CLIPModel.from_pretrained(built / "bundle" / "clip")
    text = Checkpoints(built / "state" / "clip").load()["ema"]["average"]
    key = "text_projection.weight"
    torch.testing.assert_close(clip.state_dict()[key].float(), text[f"clip.{key}"], atol=2e-3, rtol=1e-2)


def test_card_says_how_it_was_made(built):
    card = json.loads((built / "bundle" / "ip2p.json").read_text())
    assert card["native_size"] == 64 and card["preset"] == "smoke"
    assert card["trained"]["unet"]["steps"] == build.PRESETS["smoke"].unet.steps


def test_the_bundle_names_no_path_of_this_machine(built):
    for path in (built / "bundle").rglob("*.json"):
        assert str(built) not in path.read_text(), path


def test_every_word_of_the_language_is_one_token(built):
    from transformers import CLIPTokenizer

    from ip2p_storybook.language import vocabulary

    tokenizer = CLIPTokenizer.from_pretrained(built / "bundle" / "tokenizer")
    for word in {w for entry in vocabulary() for w in entry.split() if w.isalpha()}:
        assert len(tokenizer(word).input_ids) == 3, word
    # An unknown word falls into smaller pieces instead of being lost.
    assert len(tokenizer("zyxqv").input_ids) > 3


def test_a_finished_build_says_so_and_changes_nothing(built):
    before = {p: p.stat().st_mtime_ns for p in built.rglob("*.safetensors")}
    said = []
    assert build.run("smoke", built, device="cpu", log=said.append)
    assert said == [f"{s}: finished already" for s in build.STAGES]
    assert before == {p: p.stat().st_mtime_ns for p in built.rglob("*.safetensors")}


@pytest.mark.parametrize("stage", build.STAGES)
def test_a_killed_stage_goes_on_to_the_same_weights(built, tmp_path, monkeypatch, stage):
    """2N steps equal N steps, a crash at any moment of the next one, and the rest; bit for bit."""
    for name in ("vae", "clip", "text_tower", "tokenizer"):
        if name != stage and not (stage == "clip" and name == "text_tower"):
            (tmp_path / name).symlink_to(built / name)
    real, calls = loop.learning_rate, []

    def crash_at_the_third(*args):
        calls.append(1)
        if len(calls) == 3:
            raise ConnectionAbortedError("killed")
        return real(*args)

    monkeypatch.setattr(loop, "learning_rate", crash_at_the_third)
    with pytest.raises(ConnectionAbortedError):
        build.run("smoke", tmp_path, stage=stage, device="cpu", log=quiet)
    said = []
    assert build.run("smoke", tmp_path, stage=stage, device="cpu", log=said.append)
    assert said[0] == f"{stage}: going on from step 2"
    ours, whole = (Checkpoints(folder / "state" / stage).load() for folder in (tmp_path, built))
    assert ours["step"] == whole["step"]
    for part in (ours["model"], whole["model"]), (ours["ema"]["average"], whole["ema"]["average"]):
        assert all(torch.equal(part[0][k], part[1][k]) for k in part[1])


def test_a_bundle_is_trained_further_from_its_weights(built, tmp_path, monkeypatch):
    said = []
    first = {}
    real = build.train_stage

    def note_the_start(run, stage, task, *args, **kwargs):
        first.update({k: v.clone() for k, v in task.state_dict().items()})
        return real(run, stage, task, *args, **kwargs)

    monkeypatch.setattr(build, "train_stage", note_the_start)
    bundle = tmp_path / "bundle"
    assert build.run(
        "smoke", tmp_path, start=str(built / "bundle"), device="cpu", bundle=bundle, log=said.append
    )
    assert said[:2] == ["vae: finished already", "clip: finished already"]
    assert said[-1] == "lm: finished already"
    for path in (built / "bundle" / "lm").iterdir():
        assert (bundle / "lm" / path.name).read_bytes() == path.read_bytes()
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    shipped = UNet2DConditionModel.from_pretrained(built / "bundle" / "unet").float().state_dict()
    assert all(torch.equal(first[f"unet.{k}"], shipped[k]) for k in shipped)
    text = CLIPTextModel.from_pretrained(built / "bundle" / "text_encoder").float().state_dict()
    assert all(torch.equal(first[f"text_encoder.{k}"], text[k]) for k in text)
    cards = [json.loads((folder / "ip2p.json").read_text()) for folder in (built / "bundle", bundle)]
    assert cards[1]["trained"]["unet"]["steps"] == 2 * cards[0]["trained"]["unet"]["steps"]
    assert cards[1]["trained"]["vae"] == cards[0]["trained"]["vae"]


def test_starting_in_a_folder_that_holds_another_build_is_refused(built, tmp_path):
    build.run("smoke", tmp_path, seconds=0.0, device="cpu", log=quiet)
    with pytest.raises(InputError, match="holds a build already"):
        build.run("smoke", tmp_path, start=str(built / "bundle"), device="cpu", log=quiet)


def test_a_bundle_of_another_preset_is_refused(built, tmp_path):
    with pytest.raises(ModelError, match="'smoke' at 64 px and does not fit preset 'cpu'"):
        build.run("cpu", tmp_path, start=str(built / "bundle"), device="cpu", log=quiet)


def test_the_packaged_model_can_be_trained_further(tmp_path):
    from ip2p.models.bundle import PACKAGED

    card = json.loads((PACKAGED / "storybook" / "ip2p.json").read_text())
    made = tmp_path / "bundle"
    assert not build.run(
        card["preset"],
        tmp_path,
        start="storybook",
        seconds=0.0,
        steps=1,
        device="cpu",
        bundle=made,
        log=quiet,
    )
    further = json.loads((made / "ip2p.json").read_text())
    assert further["trained"]["unet"]["steps"] == card["trained"]["unet"]["steps"]
    assert (further["native_size"], further["known_psnr"]) == (card["native_size"], card["known_psnr"])


def test_time_up_saves_and_the_next_call_goes_on(tmp_path):
    said = []
    assert not build.run("smoke", tmp_path, seconds=0.0, device="cpu", log=said.append)
    assert said[-1] == "vae: time is up; the same command goes on from here"
    assert Checkpoints(tmp_path / "state" / "vae").load()["step"] == 0


def test_the_language_model_in_the_bundle_reads_captions_and_writes(built):
    from ip2p.synth.instruct import Ask, LocalWriter

    writer = LocalWriter(built / "bundle" / "lm", device="cpu", max_tokens=5)
    answers = writer(
        [Ask(caption=text) for text in ("a red cat in the meadow", "an astronaut; 'Über' rides")]
    )
    assert len(answers) == 2
    assert writer.tokens == 10 or any(answer.finished for answer in answers)
    card = json.loads((built / "bundle" / "ip2p.json").read_text())
    assert card["trained"]["lm"]["steps"] == build.PRESETS["smoke"].lm.steps


def test_texts_of_the_language_model_come_back_from_their_tokens(built):
    from ip2p.synth.instruct import completion_of, load_lm, prompt_of
    from ip2p_storybook.captions import phrases
    from ip2p_storybook.triples import exact_triples

    _, tokenizer = load_lm(built / "bundle" / "lm")
    triples = [build.to_learn(triple) for triple in exact_triples(100, 9)]
    texts = [prompt_of(t.caption) + completion_of(t) for t in triples]
    texts += ["HE SHOULD HAVE SUNGLASSES!", "Over 3 elves' caps: (50%) in the cityscape", *phrases()]
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    # Letters beyond ASCII are lost and break nothing.
    assert tokenizer.decode(tokenizer("a caf\u00e9")["input_ids"], skip_special_tokens=True) == "a caf"
    for mark in ("\n##\n", "\n%%\n", "\nEND", *phrases()):
        assert len(tokenizer(mark)["input_ids"]) == 1, mark


def test_instructions_are_learnt_in_words_that_are_tokens():
    from dataclasses import replace as with_

    from ip2p_storybook.triples import exact_triples

    triple = next(iter(exact_triples(1, 0)))
    for typed, learnt in (
        ("MAKE IT NIGHT.", "Make it night"),
        ("Could You Make It Night?", "Could you make it night"),
        ("make it night. also add a cat", "Make it night. also add a cat"),
    ):
        told = with_(triple, edit=with_(triple.edit, instruction=typed))
        assert build.to_learn(told).instruction == learnt


def test_groups_of_triples_follow_from_their_number(built):
    from ip2p.synth.instruct import load_lm

    _, tokenizer = load_lm(built / "bundle" / "lm")
    late = next(iter(build.Triples(tokenizer, 2, seed=5, start=3)))
    again = build.Triples(tokenizer, 2, seed=5).make(3)
    assert len(late) == build.Triples.GROUPED
    assert all(
        torch.equal(a, b) for one, two in zip(late, again, strict=True) for a, b in zip(one, two, strict=True)
    )


def test_a_bundle_without_a_language_model_of_its_own_keeps_the_one_there(built, tmp_path):
    for path in built.iterdir():
        if path.name not in ("lm", "bundle", "state"):
            (tmp_path / path.name).symlink_to(path)
    target = tmp_path / "bundle"
    (target / "lm").mkdir(parents=True)
    (target / "lm" / "ip2p.json").write_text(json.dumps({"steps": 7, "samples": 28, "minutes": 0.1}))
    build.save_bundle(tmp_path, target, name="smoke", card={"name": "x"}, dtype=torch.float16)
    assert json.loads((target / "ip2p.json").read_text())["trained"]["lm"]["steps"] == 7
    assert (target / "lm" / "ip2p.json").exists()


def test_an_unfinished_unet_still_gives_a_bundle(built, tmp_path, monkeypatch):
    for name in ("vae", "clip", "text_tower", "tokenizer"):
        (tmp_path / name).symlink_to(built / name)
    (tmp_path / "state").mkdir()
    for stage in ("vae", "clip"):
        (tmp_path / "state" / f"{stage}.done.json").symlink_to(built / "state" / f"{stage}.done.json")
    assert not build.run("smoke", tmp_path, seconds=0.0, device="cpu", bundle=tmp_path / "bundle", log=quiet)
    assert (tmp_path / "bundle" / "unet" / "config.json").exists()


def test_other_numbers_are_refused_on_resume(tmp_path, monkeypatch):
    build.run("smoke", tmp_path, seconds=0.0, device="cpu", log=quiet)
    monkeypatch.setitem(build.PRESETS, "smoke", replace(build.PRESETS["smoke"], kl_weight=0.5))
    with pytest.raises(InputError, match="kl_weight"):
        build.run("smoke", tmp_path, device="cpu", log=quiet)


def test_two_builds_in_one_folder_the_second_is_refused(tmp_path):
    with lock_folder(tmp_path), pytest.raises(InputError, match="another ip2p is writing into"):
        build.run("smoke", tmp_path, device="cpu", log=quiet)


def test_unknown_preset_and_stage_are_named(tmp_path):
    with pytest.raises(InputError, match="'huge'.*smoke, cpu, h100"):
        build.run("huge", tmp_path)
    with pytest.raises(InputError, match="'gan'.*vae, clip, unet, lm"):
        build.run("smoke", tmp_path, stage="gan")


def test_batches_do_not_depend_on_where_the_stream_starts():
    pages = build.Pages("pair", 2, 32, seed=5)
    late = next(iter(build.Pages("pair", 2, 32, seed=5, start=3)))
    again = pages.make(3)
    assert late["instruction"] == again["instruction"]
    assert torch.equal(late["after"], again["after"])


def test_weights_fit_the_package():
    """Every preset's parts in half precision: 40 MiB in all, the UNet in shards under 16 MiB."""
    for name in ("cpu", "h100"):
        preset = build.PRESETS[name]
        with torch.device("meta"):
            unet, vae = build.new_unet(preset), build.new_vae(preset)
        unet_bytes, vae_bytes = (2 * sum(p.numel() for p in m.parameters()) for m in (unet, vae))
        assert unet_bytes + vae_bytes < 34 * 2**20, name
        inner, width = preset.lm_inner, preset.lm_width
        layer = 4 * width**2 + 3 * width * inner + 2 * width
        assert 2 * (build.LM_TOKENS * width + preset.lm_layers * layer + width) < 375_000, name
