"""Text edits: a writer gets captions; its answers are parsed, then accepted or rejected with a reason.

A writer is anything that answers prompts in the format of the paper's code: a local language model
(`LocalWriter`), a server (`server.ServerWriter`), or a function.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, get_args

import torch

from ip2p.base.devices import pick_device, pick_dtype
from ip2p.base.errors import InputError, ModelError
from ip2p.models.bundle import called, find_folder, find_model, packaged_models
from ip2p.models.load import quiet, unreadable
from ip2p.settings import COMMAND_LINE
from ip2p.synth.captions import BLOCK_LIST, Caption, blocker, key_of
from ip2p.synth.kinds import Kind, kind_of
from ip2p.synth.records import Rejected, Triple, derived_seed, triple_id
from ip2p.synth.settings import SynthInstructConfig
from ip2p.synth.triples import examples, seed_triples

# Delimiters of the paper's code: after the caption, between the parts of the answer, after the answer.
SEPARATOR, MIDDLE, STOP = "\n##\n", "\n%%\n", "\nEND"
# Sampling settings of the paper's code.
TEMPERATURE, MAX_TOKENS = 0.7, 256

# Why an answer is rejected, in the order of the checks.
REASONS = {
    "refused": "the server rejected the prompt; it is not retried",
    "too_long": "the answer was cut off or has too many words",
    "unparsable": "the answer is not an instruction and a caption",
    "unchanged": "the edited caption equals the caption",
    "seed": "the edited caption repeats a seed triple",
    "block_list": "the answer contains a word on the block list",
    "spatial": "the edit moves, turns or crops, or changes the view, which Prompt-to-Prompt cannot do",
    "duplicate": "the caption already has the same edit",
}

# "END" on the caption's line, but not the END of "the WEST END".
_INLINE_END = re.compile(r"(?:(?<![A-Z\s])[ \t]+|(?<=[.!?]))END(?=\n|$)")

# Prompt-to-Prompt keeps the layout: it changes what is in the picture, not where it is. "Move him to the
# desert" is not spatial, "move him to the left" is. "Put the lamp in the corner" is spatial; "put a lamp in
# the corner" adds one and may work. Sides are always rejected: the model does not know left from right.
_SIDES = r"(?:far |top |bottom |upper |lower )*(?:left|right)"
_PLACES = rf"(?:{_SIDES}|centre|center|middle|top|bottom|edge|side|corner|foreground|background|front|back)"
_PICTURE = r"(?:the |this |that )?(?:picture|image|photo|photograph|frame|painting|drawing|scene|canvas|shot)"
_VIEWS = r"(?:above|below|behind|(?:the |a )?(?:front|back|side|air|top|distance))"
_POSSESSIVES = r"(?:the|this|that|these|those|its|his|her|their|my|your|our)"
_MOVE = r"(?:move|shift|slide|push|pull|nudge|send)s?\b"
# Objects that are already in the picture.
_PUT = rf"(?:put|place|bring|set|stand)s? (?:both|(?:all (?:of )?)?(?:{_POSSESSIVES}|it|him|them))\b"
_AT = (
    rf"(?:the |its |his |her |their )?{_PLACES}"
    rf"(?=$|[.,;!?]| (?:side|corner|half|edge|part|hand)\b| of {_PICTURE}\b)"
)
_BESIDE = (
    r"(?:next to|beside|alongside|behind|between|beneath|under(?:neath)?"
    r"|(?:in front|on top|(?:to|on) the (?:left|right|(?:other|far|opposite) side)) of)"
)
# Capitalized names, such as the Eiffel Tower, are scenes rather than objects; so are these.
_SOMEWHERE = (
    r"(?:stars|sky|sun|moon|clouds|rain|sea|ocean|waves|water|surface|ground|world|wheel|counter|bar)\b"
)
_SPATIAL = re.compile(
    r"\b(?:"
    # rotate or crop the whole picture
    r"(?:rotate|flip|mirror|crop|re-?cent(?:er|re)|re-?position)(?:d|ped)? "
    rf"(?:the|it|him|her|them|this|that|his|its|everything|{_PICTURE})\b"
    r"|(?:rotate|flip|mirror|turn|tilt|spin)s?\b[^.;]*?(?<! to) (?:"
    r"(?:\d+|ninety|forty-five) ?(?:degrees?\b|°)"
    r"|horizontally\b|vertically\b|(?:(?:counter|anti)-?)?clockwise\b)"
    rf"|(?:rotate|flip)s?(?: (?:to |towards? )?(?:the )?{_SIDES})?(?=$|[.,;!?])"
    r"|zoom(?:s|ed|ing)? (?:in|out)\b"
    r"|upside[ -]down\b|back to front\b"
    # move a person or a thing
    rf"|(?:{_MOVE}|{_PUT})[^.;]*? (?:to|towards?|into|in|on|at) {_AT}"
    rf"|turns?\b[^.;]*? (?:to|towards?) {_AT}"
    rf"|(?:{_MOVE}|{_PUT}|turns?\b)[^.;]*? (?:(?:closer|nearer|farther|further|apart)\b"
    r"|(?:sideways|backwards?|forwards?|around)(?=$|[.,;!?]))"
    r"|(?:move|shift|slide|nudge)s?\b[^.;]*? (?:up|upwards?|down|downwards?)(?=$|[.,;!?])"
    rf"|(?:{_MOVE}|{_PUT})[^.;]*? {_BESIDE} "
    rf"(?:{_POSSESSIVES} (?-i:(?![A-Z]))(?!{_SOMEWHERE})|it\b|him\b|them\b)"
    rf"|(?:on|to|from|at|in) the {_SIDES}(?:[ -]hand)?(?=$|[.,;!?]| (?:side|corner|half|edge|of|part)\b)"
    rf"|(?:in|to|at) the (?:\w+ )?(?:corner|edge|side) of {_PICTURE}\b"
    r"|(?:swap|switch|exchange|trade) (?:the |their |its )?(?:places?|positions?|sides?)\b"
    r"|(?:swap|switch) (?:the )?\w+ (?:and|with) the \w+(?: around| over)?(?=$|[.,;!?])"
    # look from elsewhere
    r"|(?:face|look)(?:ing)? (?:(?:to )?(?:the )?(?:left|right)|the other way|away)\b"
    r"|(?:show|seen?|view|viewed|camera|angle|viewpoint|perspective|shot|photograph|draw|paint)\b"
    rf"[^.;]*? from {_VIEWS}\b"
    r"|(?:change|shift|move|tilt|lower|raise) the (?:camera|viewpoint|view|angle|perspective)\b"
    r"|(?:bird'?s[ -]eye|aerial|side|rear) view\b|close[ -]?up\b|wide(?:r)? (?:angle|shot)\b"
    r")",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A request to a writer: edit `number` of a caption, attempt `attempt`."""

    caption: str
    number: int = 0
    attempt: int = 0

    @property
    def seed(self) -> int:
        """A 32-bit seed that depends only on the request, so answers are reproducible."""
        return derived_seed("instruct", self.caption, self.number, self.attempt)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A writer's text without the prompt.

    finished: it was not cut off. refused: the writer will never answer this prompt; the text is the reason.
    """

    text: str
    finished: bool = True
    refused: bool = False


class Writer(Protocol):
    """Answers requests in order. `name` becomes the source of the triples."""

    name: str

    def __call__(self, asks: Sequence[Ask]) -> list[Answer]: ...


@dataclass(frozen=True, kw_only=True)
class EditText:
    """A parsed answer."""

    instruction: str
    edited_caption: str
    kind: str = ""  # "whole" or "part" if the writer said so


@dataclass(frozen=True, kw_only=True)
class EditLimits:
    """Limits on accepted edits."""

    max_instruction_words: int = 40
    max_caption_words: int = 60  # CLIP reads 75 tokens
    block: Sequence[str] = BLOCK_LIST
    spatial: bool = True  # reject edits that Prompt-to-Prompt cannot do
    seeds: bool = True  # reject edited captions of the seed triples


@dataclass(frozen=True, kw_only=True)
class Written:
    """The result for one caption: its triples and the rejected answers."""

    caption: str
    triples: tuple[Triple, ...] = ()
    rejected: tuple[Rejected, ...] = ()


def prompt_of(caption: str, shots: Iterable[Triple] = ()) -> str:
    """The prompt: optional examples (for an untuned model), the caption and the separator."""
    shown = "".join(shot.caption + SEPARATOR + completion_of(shot) + "\n\n" for shot in shots)
    return shown + caption + SEPARATOR


def completion_of(triple: Triple) -> str:
    """The expected answer to `prompt_of` the caption."""
    return triple.instruction + MIDDLE + triple.edited_caption + STOP


def parse_answer(completion: str) -> EditText | None:
    """The parts of an answer; None unless there are exactly two, of one line each, and perhaps the kind."""
    # Text after the end marker is ignored.
    text = "\n".join(line.strip(" \t") for line in re.split(r"\r\n|\r|\n", completion))
    parts = text.split(STOP)[0].strip().split(MIDDLE)
    kind = parts.pop() if len(parts) == 3 and parts[2] in get_args(Kind) else ""
    if len(parts) != 2:
        return None
    instruction, edited = (part.strip() for part in parts)
    # Some models write END on the caption's line. Keep it if the instruction has an END, too (e.g. a sign).
    if not re.search(r"\bEND\b", instruction):
        edited = _INLINE_END.split(edited)[0]
    if not instruction or not edited or "\n" in instruction or "\n" in edited:
        return None
    if SEPARATOR.strip() in instruction + edited or MIDDLE.strip() in instruction + edited:
        return None
    instruction, edited = (" ".join(part.split()) for part in (instruction, edited))
    return EditText(instruction=instruction, edited_caption=edited, kind=kind)


def is_spatial(instruction: str) -> bool:
    """Whether an edit moves, turns or crops, or changes the view, which Prompt-to-Prompt cannot do."""
    return _SPATIAL.search(instruction) is not None


def reject(triple: Triple, limits: EditLimits | None = None) -> str | None:
    """Why a parsed triple is rejected (a key of REASONS); None if it is accepted."""
    limits = limits or EditLimits()
    instruction, edited = triple.instruction, triple.edited_caption
    if (
        len(instruction.split()) > limits.max_instruction_words
        or len(edited.split()) > limits.max_caption_words
    ):
        return "too_long"
    if key_of(edited) == key_of(triple.caption):
        return "unchanged"
    if limits.seeds and key_of(edited) in _seed_captions():
        return "seed"
    blocked = _blocker(tuple(limits.block))
    if blocked(instruction) or blocked(edited):
        return "block_list"
    if limits.spatial and is_spatial(instruction):
        return "spatial"
    return None


@lru_cache(1)
def _seed_captions() -> frozenset[str]:
    return frozenset(key_of(seed.edited_caption) for seed in seed_triples())


@lru_cache(4)
def _blocker(words: tuple[str, ...]) -> Callable[[str], str | None]:
    return blocker(words)


class Instruct:
    """The stage from captions to triples.

    writer: a writer, or a function that makes one (for other processes). edits: edits per caption. A rejected
    answer is retried up to `retries` times (3 in the paper's code), each with another seed, unless the writer
    refuses the prompt. The result for a caption depends only on the caption, provided that the writer's
    answers depend only on the request.
    """

    def __init__(
        self,
        writer: Writer | Callable[[], Writer],
        *,
        edits: int = 1,
        retries: int = 3,
        limits: EditLimits | None = None,
    ) -> None:
        SynthInstructConfig.read({"edits": edits, "retries": retries}, COMMAND_LINE)
        made: Any = writer if hasattr(writer, "name") else writer()  # type: ignore[call-arg]
        self.writer: Writer = made
        self.edits, self.retries = edits, retries
        self.limits = limits or EditLimits()

    def __call__(self, captions: Sequence[Caption | str]) -> list[Written]:
        """The edits of each caption, in order; a caption with only rejected answers has no triples."""
        texts = [caption if isinstance(caption, str) else caption.text for caption in captions]
        accepted: list[dict[int, Triple]] = [{} for _ in texts]
        rejected: list[list[Rejected]] = [[] for _ in texts]
        pending = [
            (row, Ask(caption=text, number=n)) for row, text in enumerate(texts) for n in range(self.edits)
        ]
        for _ in range(self.retries + 1):
            if not pending:
                break
            answers = self.writer([ask for _, ask in pending])
            again = []
            for (row, ask), answer in zip(pending, answers, strict=True):
                id = triple_id(ask.caption, ask.number)
                result = self._judge(ask, id, answer, accepted[row].values())
                if isinstance(result, Triple):
                    accepted[row][ask.number] = result
                    continue
                id = f"{id}-{ask.attempt}"
                rejected[row].append(Rejected(id=id, caption=ask.caption, text=answer.text, reason=result))
                if not answer.refused:
                    again.append((row, replace(ask, attempt=ask.attempt + 1)))
            pending = again
        return [
            Written(caption=text, triples=tuple(taken[n] for n in sorted(taken)), rejected=tuple(failed))
            for text, taken, failed in zip(texts, accepted, rejected, strict=True)
        ]

    def _judge(self, ask: Ask, id: str, answer: Answer, others: Iterable[Triple]) -> Triple | str:
        """The triple of an answer, or why it is rejected; others: the accepted edits of the caption."""
        if answer.refused:
            return "refused"
        if not answer.finished:
            return "too_long"
        edit = parse_answer(answer.text)
        if edit is None:
            return "unparsable"
        triple = Triple(
            id=id,
            caption=ask.caption,
            instruction=edit.instruction,
            edited_caption=edit.edited_caption,
            source=self.writer.name,
            kind=kind_of(edit.instruction, edit.kind),
        )
        return reject(triple, self.limits) or (
            "duplicate" if any(_same_edit(triple, other) for other in others) else triple
        )


def _same_edit(one: Triple, other: Triple) -> bool:
    return any(
        key_of(getattr(one, name)) == key_of(getattr(other, name))
        for name in ("edited_caption", "instruction")
    )


def reasons(written: Iterable[Written]) -> dict[str, int]:
    """The number of rejected answers by reason, in the order of REASONS."""
    counted = Counter(rejected.reason for each in written for rejected in each.rejected)
    return {reason: counted[reason] for reason in REASONS if counted[reason]}


# --- local models ---------------------------------------------------------------------------------

PACKAGED_LM = "lm"  # subfolder of a packaged model
LM_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")


class LocalWriter:
    """A causal language model (transformers), sampled in batches.

    model: a folder or a Hugging Face name. settings: device, dtype, batch, shots, temperature,
    frequency_penalty and max_tokens, as in `SynthInstructConfig`. Each request has its own random generator,
    so an answer does not depend on the rest of the batch (in fp32, up to rounding in matrix products, which
    changes a probability by about 1e-6). The frequency penalty counts the tokens of the answer. temperature 0
    is greedy. Raises InputError for settings out of range, and ModelError if it is not a language model.
    """

    def __init__(self, model: str | Path, *, revision: str | None = None, **settings: Any) -> None:
        self.config = SynthInstructConfig.read(settings, COMMAND_LINE)
        self.name = called(model)
        self.device = pick_device(self.config.device)
        self.model, self.tokenizer = load_lm(model, revision=revision)
        dtype = pick_dtype(self.device, self.config.dtype)
        self.model.to(self.device, dtype).eval().requires_grad_(False)
        self.tokenizer.padding_side = "left"
        self.context: int | None = getattr(self.model.config, "max_position_embeddings", None)
        self.tokens = 0  # generated so far

    def __call__(self, asks: Sequence[Ask]) -> list[Answer]:
        shots = self.config.shots or 0
        prompts = [prompt_of(ask.caption, examples(shots, ask.caption, ask.number)) for ask in asks]
        # Sort by length to reduce padding.
        order = sorted(range(len(asks)), key=lambda place: len(prompts[place]))
        answers: dict[int, Answer] = {}
        for start in range(0, len(order), self.config.batch):
            chosen = order[start : start + self.config.batch]
            written = self._write([prompts[i] for i in chosen], [asks[i].seed for i in chosen])
            answers.update(zip(chosen, written, strict=True))
        return [answers[place] for place in range(len(asks))]

    def _write(self, prompts: list[str], seeds: list[int]) -> list[Answer]:
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=True)
        length = inputs["input_ids"].shape[1]
        room = self.config.max_tokens
        if self.context is not None:
            room = min(room, self.context - length)
        if room < 1:
            raise InputError(
                f"{self.name} has a context of {self.context} tokens, but a prompt has {length}; "
                "use fewer --shots."
            )
        draw = _Draw(seeds, length, self.config.temperature, self.config.frequency_penalty)
        ended = _Ended(self.tokenizer, length)
        ends = self.model.generation_config.eos_token_id
        ends = [self.tokenizer.eos_token_id] if ends is None else ends
        config = GenerationConfig(
            max_new_tokens=room,
            do_sample=False,  # `_Draw` leaves one token to choose
            eos_token_id=ends,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        with torch.inference_mode(), quiet():
            out = self.model.generate(
                input_ids=inputs["input_ids"].to(self.device),
                attention_mask=inputs["attention_mask"].to(self.device),
                generation_config=config,
                logits_processor=LogitsProcessorList([draw]),
                stopping_criteria=StoppingCriteriaList([ended]),
            )
        answers = []
        stops = set(ends if isinstance(ends, list) else [ends]) - {None}
        for row in out[:, length:].tolist():
            end = next((place for place, token in enumerate(row) if token in stops), None)
            self.tokens += len(row) if end is None else end + 1
            text = self.tokenizer.decode(row[:end], skip_special_tokens=True)
            answers.append(Answer(text=text.split(STOP)[0], finished=end is not None or STOP in text))
        return answers


def load_lm(model: str | Path, *, revision: str | None = None) -> tuple[Any, Any]:
    """Load a causal language model in fp32 on the CPU, and its tokenizer; `find_lm` resolves the name.

    Only safetensors are loaded, and no code from the folder is executed. Raises ModelError.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = find_lm(model, revision=revision)
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            network = AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
            )
    except Exception as error:  # safetensors, tokenizers and transformers each raise their own
        raise ModelError(unreadable(folder, error)) from None
    if tokenizer.pad_token_id is None:
        # Padding is masked, so any token works.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return network, tokenizer


def find_lm(model: str | Path, *, revision: str | None = None) -> Path:
    """The folder of a language model: a local folder, a packaged model's, or one from the Hugging Face Hub.

    Raises ModelError.
    """
    if not Path(model).expanduser().exists() and str(model) in packaged_models():
        folder = find_model(model, revision=revision) / PACKAGED_LM
    else:
        folder = find_folder(model, LM_FILES, _is_lm, what="language model", revision=revision)
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} is not a language model: config.json is missing. Use the folder that contains it."
        )
    return folder


def _is_lm(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


class _Draw:
    """A LogitsProcessor that draws each row's next token with its own generator and masks all others."""

    def __init__(self, seeds: Sequence[int], start: int, temperature: float, penalty: float) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.start, self.temperature, self.penalty = start, temperature, penalty

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        scores = scores.float()
        written = input_ids[:, self.start :]
        if self.penalty and written.shape[1]:
            counts = torch.zeros_like(scores)
            counts.scatter_add_(1, written, torch.ones_like(written, dtype=scores.dtype))
            scores = scores - self.penalty * counts
        if self.temperature == 0:
            return scores
        # Inverse transform sampling: one uniform number per step.
        line = torch.softmax(scores / self.temperature, dim=1, dtype=torch.float64).cumsum(1)
        uniform = torch.stack([torch.rand(1, generator=g, dtype=torch.float64) for g in self.generators])
        chosen = torch.searchsorted(line, uniform.to(line) * line[:, -1:], right=True)
        chosen = chosen.clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


class _Ended:
    """A StoppingCriteria: which rows have generated STOP."""

    TAIL = 8  # enough tokens for STOP, even one token per character

    def __init__(self, tokenizer: Any, start: int) -> None:
        self.tokenizer, self.start = tokenizer, start

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        tails = input_ids[:, max(self.start, input_ids.shape[1] - self.TAIL) :]
        texts = self.tokenizer.batch_decode(tails, skip_special_tokens=True)
        return torch.tensor([STOP in text for text in texts], device=input_ids.device)
