"""Answers are parsed and refused by reason; a model's answers do not depend on the batch."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from ip2p.base.errors import InputError, ModelError
from ip2p.synth.captions import Caption
from ip2p.synth.instruct import (
    REASONS,
    Answer,
    Ask,
    EditLimits,
    EditText,
    Instruct,
    LocalWriter,
    Rejected,
    Triple,
    completion_of,
    is_spatial,
    load_lm,
    parse_answer,
    prompt_of,
    reasons,
    reject,
)
from ip2p.synth.records import triple_id
from ip2p.synth.triples import examples, seed_triples
from ip2p.synth.tune import new_lm

FOX = "a red fox in the snow"


def triple(instruction="make it a wolf", edited="a red wolf in the snow", caption=FOX):
    return Triple(id=triple_id(caption, 0), caption=caption, instruction=instruction, edited_caption=edited)


# --- parsing --------------------------------------------------------------------------------------


def test_prompt_and_completion_have_the_delimiters_of_the_papers_code():
    assert prompt_of(FOX) == "a red fox in the snow\n##\n"
    assert completion_of(triple()) == "make it a wolf\n%%\na red wolf in the snow\nEND"
    shown = prompt_of("a cat", [triple()])
    assert (
        shown == "a red fox in the snow\n##\nmake it a wolf\n%%\na red wolf in the snow\nEND\n\na cat\n##\n"
    )


@pytest.mark.parametrize(
    "text",
    [
        "make it a wolf\n%%\na red wolf in the snow\nEND",
        " make it  a wolf\n%%\na red wolf in the snow\n",
        "make it a wolf\n%%\na red wolf in the snow\nEND\n\nanother caption\n##\nx\n%%\ny",
        "make it a wolf\r\n%%\r\na red wolf in the snow\r\nEND\r\n\r\nanother caption\r\n##\r\nx",
        "make it a wolf\r%%\ra red wolf in the snow\rEND",
        "make it a wolf \n %% \n a red wolf in the snow \n END",
        "make it a wolf\n%%\na red wolf in the snow END",
        "make it a wolf\n%%\na red wolf in the snow  END \n\nanother caption\n##\nx",
    ],
)
def test_an_answer_is_parsed(text):
    assert parse_answer(text) == EditText(
        instruction="make it a wolf", edited_caption="a red wolf in the snow"
    )


@pytest.mark.parametrize(
    ("text", "edited"),
    [
        ("make it a wolf\n%%\na red wolf.END", "a red wolf."),
        ("light up the film's THE END\n%%\na screen that says end END\nEND", "a screen that says end END"),
        ("make it rain\n%%\nrain on the WEST END\nEND", "rain on the WEST END"),
        ("make it rain\n%%\nrain on the bend\nEND", "rain on the bend"),
    ],
)
def test_an_end_marker_on_the_captions_line_is_removed_unless_it_is_part_of_the_text(text, edited):
    parsed = parse_answer(text)
    assert parsed is not None and parsed.edited_caption == edited


@pytest.mark.parametrize(
    "text",
    [
        *("", "make it a wolf", "make it a wolf %% a red wolf", "a\n%%\nb\n%%\nc", "\n%%\nb", "a\n%%\n"),
        *("a\nb\n%%\nc", "a\n%%\nb\nc", "a\n%%\nb ## c", "a %%\n%%\nb"),
    ],
)
def test_an_answer_without_exactly_two_one_line_parts_is_not_parsed(text):
    assert parse_answer(text) is None


def test_every_seed_survives_a_round_trip_through_a_completion():
    for seed in seed_triples():
        edit = parse_answer(completion_of(seed))
        assert edit == EditText(instruction=seed.instruction, edited_caption=seed.edited_caption)


# --- rejecting ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"edited_caption": "A red  fox in the snow."}, "unchanged"),
        ({"edited_caption": seed_triples()[5].edited_caption + "!"}, "seed"),
        ({"edited_caption": "a nude fox in the snow"}, "block_list"),
        ({"instruction": "cover it in gore"}, "block_list"),
        ({"instruction": "move the fox to the left"}, "spatial"),
        ({"edited_caption": "word " * 61}, "too_long"),
        ({"instruction": "word " * 41}, "too_long"),
    ],
)
def test_a_triple_is_rejected_with_its_reason(changed, reason):
    assert reject(replace(triple(), **changed)) == reason
    assert reason is None or reason in REASONS


def test_limits_can_be_relaxed():
    assert reject(triple("flip the picture"), EditLimits(spatial=False)) is None
    assert reject(triple(edited="a nude fox"), EditLimits(block=())) is None
    assert reject(triple(edited=seed_triples()[5].edited_caption), EditLimits(seeds=False)) is None


@pytest.mark.parametrize(
    "instruction",
    [
        *("move the cat to the left", "Flip the image", "rotate the chair", "zoom in on the face"),
        *("crop the picture", "swap the dog and the cat", "put a bird in the top right corner"),
        *("add a tree on the left", "turn the car around", "make it upside down", "show it from above"),
        *("change the camera angle", "move the tree closer", "have him face the other way"),
        *("Move the boat to the background", "swap their positions", "make it an aerial view"),
        *("place the lamp at the bottom of the picture", "make the dog look to the right"),
        *("rotate 90 degrees", "rotate by 45°", "turn it 180 degrees", "Flip horizontally.", "rotate"),
        *("mirror it vertically", "rotate clockwise", "rotate to the left", "move the cat next to the dog"),
        *("put the cat behind the tree", "place the dog on top of the car", "put it under the table"),
        *("move her between the trees", "put the lamp in the corner", "set the cup beside his plate"),
        *("put both cats in the background", "move the sun down", "put the dog to the left of the cat"),
        *("move the boat to the other side of the lake", "stand the boy in front of the house"),
    ],
)
def test_edits_of_position_and_viewpoint_are_spatial(instruction):
    assert is_spatial(instruction)


@pytest.mark.parametrize(
    "instruction",
    [
        *("make it snow", "move them to the beach", "send him to the top of Mount Everest"),
        *("swap the dog for a cat", "make his left hand a claw", "replace the background with a forest"),
        *("turn the lights on", "shift it to winter", "put the singer in front of a crowd"),
        *("place it at the bottom of the sea", "put a cat on the side table", "switch the logs for mirrors"),
        *("put mountains in the background", "place a lamp in the corner", "put a cherry on top"),
        *("turn the lights down", "put some flowers in the foreground", "put an owl in the middle"),
        *("put a cat behind the tree", "put the singer in front of the Eiffel Tower", "turn the lamp on"),
        *("turn the oven to 200 degrees", "pull the blinds down", "put her under the stars"),
        *("put the king on the throne", "put her hair up", "bring some colour to the background"),
        *("turn the lights on in the background", "put snow on top of the hill", "set the house on fire"),
    ],
)
def test_edits_of_content_are_not_spatial(instruction):
    assert not is_spatial(instruction)


def test_no_seed_would_be_rejected():
    assert Counter(reject(seed, EditLimits(seeds=False)) for seed in seed_triples()) == {
        None: len(seed_triples())
    }


# --- the stage ------------------------------------------------------------------------------------


class Script:
    """A writer that answers from a table by caption, number and attempt, and records its requests."""

    name = "script"

    def __init__(self, table):
        self.table, self.asked = table, []

    def __call__(self, asks):
        self.asked.append(list(asks))
        answers = [self.table.get((a.caption, a.number, a.attempt), "nothing") for a in asks]
        return [answer if isinstance(answer, Answer) else Answer(text=answer) for answer in answers]


GOOD, OTHER = "make it a wolf\n%%\na red wolf in the snow", "make it rain\n%%\na red fox in the rain"


def test_rejected_answers_are_retried_and_counted():
    cut = Answer(text=GOOD, finished=False)
    script = Script({(FOX, 0, 1): cut, (FOX, 0, 2): GOOD, ("a cat", 0, 0): "make it\n%%\na cat."})
    written = Instruct(script, retries=2)([Caption(text=FOX), "a cat"])
    assert [each.caption for each in written] == [FOX, "a cat"]
    assert written[0].triples == (replace(triple(), source="script", kind="part"),)
    assert [each.reason for each in written[0].rejected] == ["unparsable", "too_long"]
    assert written[1].triples == ()
    first = triple_id("a cat", 0)
    assert written[1].rejected[0] == Rejected(
        id=f"{first}-0", caption="a cat", text="make it\n%%\na cat.", reason="unchanged"
    )
    assert reasons(written) == {"too_long": 1, "unparsable": 3, "unchanged": 1}
    assert [len(batch) for batch in script.asked] == [2, 2, 2]
    assert len({ask.seed for batch in script.asked for ask in batch}) == 6


def test_requests_that_the_writer_refuses_are_counted_and_not_retried():
    no = Answer(text="400 (content_filter)", refused=True)
    script = Script({(FOX, 0, 0): no, ("a cat", 0, 0): "make it a hen\n%%\na hen"})
    written = Instruct(script)([FOX, "a cat"])
    assert reasons(written) == {"refused": 1} and [len(batch) for batch in script.asked] == [2]
    assert written[0].rejected == (
        Rejected(id=f"{triple_id(FOX, 0)}-0", caption=FOX, text="400 (content_filter)", reason="refused"),
    )
    assert written[0].triples == () and len(written[1].triples) == 1


def test_several_edits_of_a_caption_differ_from_each_other():
    table = {(FOX, 0, 0): GOOD, (FOX, 1, 0): GOOD + ".", (FOX, 2, 0): OTHER, (FOX, 1, 1): "x\n%%\ny"}
    written = Instruct(Script(table), edits=3)([FOX])[0]
    assert [each.instruction for each in written.triples] == ["make it a wolf", "x", "make it rain"]
    assert [each.id for each in written.triples] == [triple_id(FOX, number) for number in range(3)]
    assert [each.reason for each in written.rejected] == ["duplicate"]


def test_the_result_for_a_caption_does_not_depend_on_other_captions():
    table = {(FOX, 0, 0): "no", (FOX, 0, 1): GOOD, ("a cat", 0, 0): "make it a hen\n%%\na hen"}
    together = Instruct(Script(table))([FOX, "a cat"])
    assert together == [Instruct(Script(table))([caption])[0] for caption in (FOX, "a cat")]


def test_a_writer_can_be_given_as_a_factory_and_edits_must_be_positive():
    assert Instruct(lambda: Script({(FOX, 0, 0): GOOD}))([FOX])[0].triples
    with pytest.raises(InputError, match="--edits is 0"):
        Instruct(Script({}), edits=0)


# --- a local model --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm") / "tiny"
    texts = [text for seed in seed_triples()[:20] for text in (seed.caption, seed.instruction)]
    new_lm(texts, folder, vocabulary=320, width=32, layers=2, heads=2, context=256)
    return folder


def local(lm, **settings):
    return LocalWriter(lm, device="cpu", dtype="fp32", **({"max_tokens": 24} | settings))


def test_answers_do_not_depend_on_the_batch(lm):
    asks = [Ask(caption=seed.caption, number=n % 2) for n, seed in enumerate(seed_triples()[:5])]
    together = local(lm)(asks)
    assert len({answer.text for answer in together}) == 5 and together == local(lm, batch=2)(asks)
    assert together == [local(lm)([ask])[0] for ask in asks]
    assert together == local(lm)(asks[::-1])[::-1]
    assert local(lm)([replace(asks[0], attempt=1)]) != together[:1]


def test_at_temperature_zero_the_answer_equals_transformers_greedy_search(lm):
    model, tokenizer = load_lm(lm)
    inputs = tokenizer(prompt_of(FOX), return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    expected = tokenizer.decode(expected[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    writer = local(lm, temperature=0, frequency_penalty=0)
    assert writer([Ask(caption=FOX)]) == [Answer(text=expected, finished=False)] and writer.tokens == 24


def test_tokens_are_sampled_with_their_probabilities(lm):
    model, tokenizer = load_lm(lm)
    # A low temperature, so that some tokens of an untrained model are drawn often.
    writer = local(lm, temperature=0.05, max_tokens=1, batch=500)
    inputs = tokenizer(prompt_of(FOX), return_tensors="pt")
    with torch.inference_mode():
        probabilities = torch.softmax(model(**inputs).logits[0, -1] / 0.05, dim=0)
    drawn = Counter(answer.text for answer in writer([Ask(caption=FOX, attempt=n) for n in range(500)]))
    for token in probabilities.topk(5).indices.tolist():
        share, text = probabilities[token].item(), tokenizer.decode([token])
        # Five standard deviations of 500 draws.
        assert abs(drawn[text] / 500 - share) < 5 * (share * (1 - share) / 500) ** 0.5


def test_the_frequency_penalty_reduces_repeated_tokens(lm):
    plain, punished = (
        local(lm, temperature=0, frequency_penalty=penalty)([Ask(caption=FOX)])[0].text for penalty in (0, 2)
    )
    tokenizer = load_lm(lm)[1]
    most, least = (max(Counter(tokenizer(text)["input_ids"]).values()) for text in (plain, punished))
    assert least < most


def test_an_answer_ends_at_the_stop_text_and_is_unfinished_without_it(lm, monkeypatch):
    writer = local(lm)
    tokens = writer.tokenizer("make it a wolf\n%%\na wolf\nEND and more")["input_ids"]

    def generate(input_ids, logits_processor, stopping_criteria, **_):
        # A model that always writes the same tokens; only when it stops is tested.
        out = input_ids
        for token in tokens:
            out = torch.cat([out, torch.full((len(out), 1), token)], dim=1)
            if stopping_criteria[0](out, None).all():
                break
        return out

    monkeypatch.setattr(writer.model, "generate", generate)
    answers = writer([Ask(caption=FOX), Ask(caption="a cat")])
    assert answers == [Answer(text="make it a wolf\n%%\na wolf")] * 2
    assert writer.tokens < 2 * len(tokens)
    tokens = tokens[:6]
    assert not writer([Ask(caption=FOX)])[0].finished


def test_shots_are_added_to_the_prompt(lm, monkeypatch):
    writer, seen = local(lm, shots=3), []
    monkeypatch.setattr(
        writer, "_write", lambda prompts, seeds: seen.extend(prompts) or [Answer(text="")] * len(prompts)
    )
    writer([Ask(caption=FOX)])
    assert seen == [prompt_of(FOX, examples(3, FOX, 0))] and seen[0].count("\nEND\n\n") == 3


def test_invalid_language_models_and_settings_are_refused(lm, tmp_path):
    with pytest.raises(ModelError, match="no such language model. Did you mean"):
        LocalWriter(lm.parent / "tinny")
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        LocalWriter(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be read"):
        LocalWriter(tmp_path)
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE|cannot be reached"):
        LocalWriter("someone/something")
    with pytest.raises(InputError, match="--temperature is -1"):
        LocalWriter(lm, temperature=-1)
    with pytest.raises(InputError, match="use fewer --shots"):
        local(lm, shots=9)([Ask(caption=FOX)])
