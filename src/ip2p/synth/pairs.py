"""Image pairs for text edits: Stable Diffusion draws both captions together (paper, section 3.1.2).

Both pictures start from the same noise and share attention for a fraction p of the steps (`synth.attention`).
A source picture that several candidates share is drawn once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ip2p.base.devices import NoiseStream, pick_device, pick_dtype
from ip2p.base.errors import ModelError, translated_errors
from ip2p.data.records import Pair
from ip2p.diffusion import Latent, Sigma
from ip2p.diffusion.denoiser import TextInputs, UNetDenoiser, text_inputs
from ip2p.diffusion.samplers import sampler_for
from ip2p.diffusion.schedule import SPACINGS
from ip2p.editing.editor import Editor
from ip2p.models.bundle import Bundle, check_tiny, find_model, load_tiny, make_bundle, open_parts
from ip2p.models.load import Choice, open_model
from ip2p.models.text import encode_prompts
from ip2p.pictures.images import to_pil
from ip2p.synth.attention import (
    Alignment,
    Sharing,
    WordMaps,
    WordSharing,
    blend_latents,
    changed_tokens,
    refinement,
    replacement,
    share_attention,
    shares,
)
from ip2p.synth.records import Candidate
from ip2p.synth.settings import PAIRS_AS_PAPER, SynthPairsConfig

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny
    from numpy.typing import NDArray
    from typing_extensions import Unpack

    from ip2p.synth.arguments import PairsArguments

# The outcome of a candidate: drawn; rejected half-way; rejected at the end; not finite.
Fate = Literal["made", "early", "judged", "overflow"]
Pictures = Float[Tensor, "batch 3 height width"]
# Maps candidates and their pictures before and after, in [0, 1], to which of them to keep.
Judge = Callable[[Sequence[Candidate], Tensor, Tensor], "Sequence[bool] | Tensor"]
CPU_BATCH, BATCH = 4, 8  # candidates per batch
MAPS = 4  # side of the latents over side of the maps for local blend, as in the published code


@dataclass(frozen=True, kw_only=True)
class CandidateResult:
    """The result for one candidate.

    before, after: uint8 [height, width, 3]. latents: the sampler's latents of both, fp32 [2, channels, h, w]
    on the CPU. All three are None unless `fate` is "made". evaluations: of the UNet, two per guided step;
    those of a shared source picture count for its first candidate.
    """

    candidate: Candidate
    fate: Fate
    evaluations: int
    before: NDArray[np.uint8] | None = None
    after: NDArray[np.uint8] | None = None
    latents: Tensor | None = None

    def pair(self, **scores: float) -> Pair:
        """A row of training data with the seed, p, guidance scale and the given `scores`."""
        assert self.before is not None and self.after is not None, f"it was not made: {self.fate}"
        one, triple = self.candidate, self.candidate.triple
        known: dict[str, float] = {"seed": one.seed, "p2p_threshold": one.p, "cfg_scale": one.scale}
        return Pair(
            id=one.id,
            before=self.before,
            after=self.after,
            instruction=triple.instruction,
            caption=triple.caption,
            edited_caption=triple.edited_caption,
            scores=known | scores,
        )


class PairMaker:
    """Draws image pairs for candidates. This is a stage: it loads the model once and is called on batches.

    model: anything that `models.load.open_model` reads (Stable Diffusion, or an editor, which gets no input
    picture), or a Bundle. settings: the model and drawing settings of `SynthPairsConfig`, by default as in
    the paper's code; config: all of them instead. size None is the model's native size. batch_size:
    candidates per batch; None is 4 on a CPU and 8 elsewhere. In fp32 the result depends on it only through
    rounding.

    attention: what a pair shares: self-attention maps (the paper's code), cross-attention maps of words at
    the same position ("replace") or of common words ("refine"; Hertz et al. 2022), or both. reweight:
    multiplies the maps of the new words while cross-attention is shared. blend: local blend: after each step,
    the edit is its source where the attention to the changed words is below this fraction of its maximum.
    Edits of the whole picture are not blended.

    early: rejects candidates after the fraction `early_at` of the steps (by default half), from the predicted
    clean pictures. judge: rejects candidates at the end. Both look at pictures decoded by tiny_vae if it is
    given (an AutoencoderTiny, its folder or its hub name); kept pictures are decoded by the model's own
    autoencoder. Rejected candidates cost no further work and do not change the others.

    Attributes: evaluations counts pictures that went through the UNet, decoded and previewed those decoded by
    the model's autoencoder and by tiny_vae. Raises ModelError for a UNet that takes neither noise alone nor
    noise and a picture, and InputError for settings out of range.
    """

    def __init__(
        self,
        model: str | Path | Bundle,
        config: SynthPairsConfig | None = None,
        *,
        early: Judge | None = None,
        judge: Judge | None = None,
        tiny_vae: AutoencoderTiny | str | Path | None = None,
        **settings: Unpack[PairsArguments],
    ) -> None:
        if config is None:
            config = SynthPairsConfig.read(PAIRS_AS_PAPER | {"early_at": 0.5} | dict(settings))
        how = config.how()
        if not isinstance(model, Bundle):
            names = ("device", "dtype", "revision", "weights", "vae", "parts_from")
            model = open_painter(model, **{name: getattr(config, name) for name in names})
        unet: Any = model.unet
        taken, latent = unet.config.in_channels, model.vae.config.latent_channels
        if taken not in (latent, 2 * latent):
            raise _not_a_painter(model.folder, taken, latent)
        share_attention(unet)
        # Used only to encode texts and to decode latents within the available memory.
        self.editor = Editor(model)
        self.device = self.editor.device
        self.network = UNetDenoiser(
            unet if taken == 2 * latent else _WithoutPicture(unet), self.editor.schedule
        )
        self.steps, self.sampler, self.attention = how["steps"], how["sampler"], how["attention"]
        self.reweight, self.blend, self.interval = config.reweight, config.blend, how["cfg_interval"]
        self.sigmas = SPACINGS[how["schedule"]](self.editor.schedule, self.steps)
        native = model.card.native_size
        self.size = self.editor.working_size((native, native), config.size)
        self.batch_size = config.batch_size or (CPU_BATCH if self.device.type == "cpu" else BATCH)
        self.early, self.judge = early, judge
        # There is no prediction before the first step, and no work left to save after the last one.
        self.early_step = min(max(1, math.ceil(how["early_at"] * self.steps)), self.steps - 1)
        self.tiny_vae = None if tiny_vae is None else _open_tiny(tiny_vae, model)
        self.evaluations = self.decoded = self.previewed = 0

    def __call__(self, candidates: Sequence[Candidate]) -> list[CandidateResult]:
        """Draw the pairs in the order of the candidates. Raises ResourceError when memory runs out."""
        # Candidates with the same source picture go into the same batch.
        groups: dict[_Source, list[int]] = {}
        for place, one in enumerate(candidates):
            groups.setdefault(_source(one), []).append(place)
        order = list(chain.from_iterable(groups.values()))
        made: dict[int, CandidateResult] = {}
        for start in range(0, len(order), self.batch_size):
            places = order[start : start + self.batch_size]
            what = f"{len(places)} pairs at once of {self.size[0]}x{self.size[1]}"
            half = max(1, len(places) // 2)
            with translated_errors(memory=f"Out of memory with {what}. Try --batch-size {half}."):
                some = self._draw([candidates[place] for place in places])
            made |= dict(zip(places, some, strict=True))
        return [made[place] for place in range(len(candidates))]

    @torch.inference_mode()
    def _draw(self, candidates: Sequence[Candidate]) -> list[CandidateResult]:
        """Draw one batch: first one row for each source picture, then one row for each edit."""
        sources = list(dict.fromkeys(_source(one) for one in candidates))
        batch = _Batch(candidates, torch.tensor([sources.index(_source(one)) for one in candidates]))
        denoise = self._denoiser(batch, sources)
        bundle = self.editor.bundle
        sides = (side // bundle.latent_factor for side in reversed(self.size))
        shape = (bundle.vae.config.latent_channels, *sides)
        stream = NoiseStream([source.seed for source in sources], shape, self.device)
        whose = torch.cat([torch.arange(len(sources)), batch.owners]).to(self.device)

        def noise() -> Tensor:
            return stream()[whose]  # the paper's code: one noise for both pictures, at every step

        start = noise() * self.sigmas[0]
        last = start
        sampling = sampler_for(self.sampler, self.editor.schedule)(denoise, start, self.sigmas, noise)
        for step, x in enumerate(sampling, 1):
            last = x
            if self.blend is not None:
                denoise.blend(x, self.blend)  # in place: the sampler goes on from it
            if self.early is not None and step == self.early_step:
                assert denoise.x0 is not None
                self._ask(self.early, denoise.x0, batch, "early")
            if not batch.alive.any():
                break
        batch.drop_overflown(last)
        if self.judge is not None:
            self._ask(self.judge, last, batch, "judged")
        kept = batch.made()
        shown: dict[int, tuple[Tensor, Tensor]] = {}
        if kept:
            before, after = self._pictures(last, batch, kept, preview=False)
            shown = {place: (before[k], after[k]) for k, place in enumerate(kept)}
            overflown = [place for place, both in shown.items() if not all(p.isfinite().all() for p in both)]
            batch.drop(overflown, "overflow")
        self.evaluations += int(batch.evaluations.sum())
        return [batch.result(place, last, shown.get(place)) for place in range(len(candidates))]

    def _ask(self, judge: Judge, latents: Latent, batch: _Batch, fate: Fate) -> None:
        """Show the remaining candidates to a judge and drop those that it rejects."""
        batch.drop_overflown(latents)
        places = batch.made()
        if not places:
            return
        before, after = self._pictures(latents, batch, places, preview=True)
        answer = [bool(yes) for yes in judge([batch.candidates[place] for place in places], before, after)]
        assert len(answer) == len(places), "a judge must return one answer for each candidate"
        batch.drop([place for place, yes in zip(places, answer, strict=True) if not yes], fate)

    def _denoiser(self, batch: _Batch, sources: Sequence[_Source]) -> _PairDenoiser:
        bundle, candidates = self.editor.bundle, batch.candidates
        captions = [source.caption for source in sources]
        texts = captions + [one.triple.edited_caption for one in candidates]
        unique = list(dict.fromkeys(texts))
        every = text_inputs(encode_prompts(bundle, unique, self.size), len(unique))
        rows = torch.tensor([unique.index(text) for text in texts], device=self.device)
        scales = [source.scale for source in sources] + [one.scale for one in candidates]
        return _PairDenoiser(
            self.network,
            batch,
            text={name: value.to(self.device)[rows] for name, value in every.items()},
            null=text_inputs(encode_prompts(bundle, [""], self.size), 1),
            scale=torch.tensor(scales, dtype=torch.float32, device=self.device),
            interval=self.interval,
            sigmas=self.sigmas,
            share_self="self" in self.attention,
            alignments=None if self.attention == "self" else [self._align(one) for one in candidates],
            seen=None if self.blend is None else self._word_maps(batch, sources),
        )

    def _align(self, one: Candidate) -> Alignment:
        tokenizer, triple = self.editor.bundle.tokenizer, one.triple
        caption, edited = triple.caption, triple.edited_caption
        found = replacement(tokenizer, caption, edited) if "replace" in self.attention else None
        # Captions of different lengths have no word-by-word alignment.
        found = found or refinement(tokenizer, caption, edited)
        if self.reweight == 1:
            return found
        return found.weighted(changed_tokens(tokenizer, caption, edited)[1], self.reweight)

    def _word_maps(self, batch: _Batch, sources: Sequence[_Source]) -> WordMaps:
        """Collects the maps of the words in which a candidate's captions differ, for source and edit."""
        tokenizer = self.editor.bundle.tokenizer
        words = torch.zeros(len(batch.alive), tokenizer.model_max_length, dtype=torch.bool)
        for place, one in enumerate(batch.candidates):
            before, after = changed_tokens(tokenizer, one.triple.caption, one.triple.edited_caption)
            words[batch.owners[place]] |= before
            words[batch.edits[place]] = after
        config: Any = self.editor.bundle.unet.config
        levels = [2**k for k, block in enumerate(config.down_block_types) if "CrossAttn" in block]
        factor = min(levels, key=lambda level: abs(level - MAPS))
        height, width = (side // self.editor.bundle.latent_factor // factor for side in reversed(self.size))
        return WordMaps(words.to(self.device), (height, width))

    def _pictures(
        self, latents: Latent, batch: _Batch, kept: Sequence[int], *, preview: bool
    ) -> tuple[Pictures, Pictures]:
        """The pictures before and after, in [0, 1], of the candidates `kept`; each is decoded once."""
        both = torch.cat([batch.owners[kept], batch.edits[kept]])
        rows, places = both.unique(return_inverse=True)
        tiny = self.tiny_vae if preview else None
        parts = []
        for some in rows.to(self.device).split(2 * self.batch_size):
            if tiny is None:
                self.decoded += len(some)
                pixels = self.editor.decode(latents[some])
            else:
                self.previewed += len(some)
                scaled = latents[some] / tiny.config.scaling_factor
                pixels = tiny.decode(scaled.to(tiny.dtype), return_dict=False)[0].float()
            parts.append(((pixels + 1) / 2).clamp(0, 1))
        before, after = torch.cat(parts)[places.to(self.device)].chunk(2)
        return before, after


class _Source(NamedTuple):
    """What determines a source picture; candidates with equal sources share it."""

    caption: str
    seed: int
    scale: float


def _source(one: Candidate) -> _Source:
    return _Source(one.triple.caption, one.seed, one.scale)


class _Batch:
    """The candidates of a batch, their fates, and their rows: one for each source, then one for each edit.

    owners, edits: the rows of each candidate's source and edit. alive: rows that are still being drawn.
    evaluations: how often each row went through the network.
    """

    def __init__(self, candidates: Sequence[Candidate], owners: Int[Tensor, " edits"]) -> None:
        self.candidates, self.owners = candidates, owners
        self.sources = int(owners.max()) + 1
        self.edits = torch.arange(len(owners)) + self.sources
        self.fates: list[Fate] = ["made"] * len(owners)
        rows = self.sources + len(owners)
        self.alive: Bool[Tensor, rows] = torch.ones(rows, dtype=torch.bool)
        self.evaluations: Int[Tensor, rows] = torch.zeros(rows, dtype=torch.long)

    def made(self) -> list[int]:
        """The positions of the candidates that were not dropped."""
        return [place for place, fate in enumerate(self.fates) if fate == "made"]

    def drop(self, places: Sequence[int], fate: Fate) -> None:
        """Stop drawing some candidates, and the sources that no other candidate needs."""
        for place in places:
            self.fates[place] = fate
        kept = self.made()
        self.alive[:] = False
        self.alive[self.edits[kept]] = True
        self.alive[self.owners[kept]] = True

    def drop_overflown(self, latents: Latent) -> None:
        fine = latents.isfinite().flatten(1).all(dim=1).cpu()
        lost = [k for k in self.made() if not (fine[self.owners[k]] and fine[self.edits[k]])]
        self.drop(lost, "overflow")

    def result(self, place: int, latents: Latent, shown: tuple[Tensor, Tensor] | None) -> CandidateResult:
        owner, edit = int(self.owners[place]), int(self.edits[place])
        work = int(self.evaluations[edit])
        if owner not in self.owners[:place]:
            work += int(self.evaluations[owner])
        candidate, fate = self.candidates[place], self.fates[place]
        if fate != "made" or shown is None:
            return CandidateResult(candidate=candidate, fate=fate, evaluations=work)
        before, after = (np.asarray(to_pil(picture * 2 - 1)) for picture in shown)
        pair = latents[[owner, edit]].float().cpu()
        return CandidateResult(
            candidate=candidate, fate=fate, evaluations=work, before=before, after=after, latents=pair
        )


class _PairDenoiser:
    """The denoiser of a batch of pairs, with classifier-free guidance; rows that are not alive do not change.

    text, null: network inputs for the texts of all rows, and for the empty text. scale: guidance scales
    [rows]. interval: noise levels with guidance, as in `guidance.guided`. x0: the last prediction.
    """

    def __init__(
        self,
        network: UNetDenoiser,
        batch: _Batch,
        *,
        text: TextInputs,
        null: TextInputs,
        scale: Float[Tensor, " rows"],
        interval: tuple[float, float],
        sigmas: Float[Tensor, " steps"],
        share_self: bool,
        alignments: Sequence[Alignment] | None,
        seen: WordMaps | None,
    ) -> None:
        self.network, self.batch, self.text, self.null, self.scale = network, batch, text, null, scale
        self.p = torch.tensor([one.p for one in batch.candidates], dtype=torch.float64)
        crossing = [one.p if one.p_cross is None else one.p_cross for one in batch.candidates]
        self.p_cross = torch.tensor(crossing, dtype=torch.float64)
        self.seen, self.interval = seen, interval
        self.sigmas, self.share_self = sigmas, share_self
        self.moved = self.kept = None
        if alignments is not None:
            self.moved = torch.stack([one.moved for one in alignments]).to(scale.device)
            self.kept = torch.stack([one.kept for one in alignments]).to(scale.device)
        self.x0: Latent | None = None

    def __call__(self, x: Latent, sigma: Sigma) -> Latent:
        low, high = self.interval
        passes = 2 if low <= self.network.schedule.share(sigma) <= high else 1
        rows = self.batch.alive.nonzero()[:, 0]
        self.batch.evaluations[rows] += passes
        place = rows.to(x.device)
        some, count = x[place], len(rows)
        sharing = self._sharing(rows, int((self.sigmas > sigma).sum()), passes).arguments()
        if self.seen is not None:
            self.seen.rows = place
        network = replace(self.network, control=lambda *_: sharing)
        words = {name: value[place] for name, value in self.text.items()}
        if passes == 2:
            for name, value in words.items():
                null = self.null[name].to(value).expand(count, *value.shape[1:])
                words[name] = torch.cat([value, null])
        inputs = some.repeat(passes, 1, 1, 1)
        # An editor gets a zero image latent: no input picture.
        predicted = network.predict_from_inputs(inputs, sigma, words, torch.zeros_like(inputs))
        if passes == 2:
            full, neither = predicted.chunk(2)
            predicted = neither + self.scale[place].view(-1, 1, 1, 1) * (full - neither)
        self.x0 = x.index_copy(0, place, network.x0(some, predicted, sigma))
        return self.x0

    def _sharing(self, rows: Int[Tensor, " alive"], step: int, passes: int) -> Sharing:
        """What the rows share in a step: first the rows with their text, then those of a pass without it."""
        batch, device, steps = self.batch, self.scale.device, len(self.sigmas) - 1
        place = torch.zeros(len(batch.alive), dtype=torch.long).index_copy(0, rows, torch.arange(len(rows)))

        def edits_that_share(p: Float[Tensor, "edits"]) -> Int[Tensor, "some"]:
            return (shares(p, step, steps) & batch.alive[batch.edits]).nonzero()[:, 0]

        maps = words = None
        if self.share_self and len(some := edits_that_share(self.p)):
            whose = torch.arange(len(batch.alive)).index_copy(0, batch.edits[some], batch.owners[some])
            half = place[whose[rows]]
            maps = torch.cat([half + k * len(rows) for k in range(passes)]).to(device)
        if self.moved is not None and self.kept is not None and len(some := edits_that_share(self.p_cross)):
            # The rows without text have no words to share; Hertz et al. leave that half unchanged, too.
            moved, kept = (each[some.to(device)] for each in (self.moved, self.kept))
            edits, owners = place[batch.edits[some]], place[batch.owners[some]]
            words = WordSharing(edits.to(device), owners.to(device), moved, kept)
        return Sharing(maps, words, self.seen)

    def blend(self, x: Latent, threshold: float) -> None:
        """Local blend, in place: an edit of a part is its source where no changed word of either is."""
        assert self.seen is not None, "local blend needs maps"
        batch = self.batch
        some = [k for k, one in enumerate(batch.candidates) if not one.triple.is_whole]
        region = self.seen.region((x.shape[2], x.shape[3]), threshold)
        edits, owners = (rows[some].to(x.device) for rows in (batch.edits, batch.owners))
        mask = torch.maximum(region[edits], region[owners])
        x[edits] = blend_latents(x[owners], x[edits], mask)


class _WithoutPicture(nn.Module):
    """A text-to-image UNet behind an editor's interface: it ignores the image channels."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, channels: Tensor, *arguments: Any, **more: Any) -> Any:
        return self.unet(channels[:, : channels.shape[1] // 2], *arguments, **more)


def open_painter(
    model: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    weights: Choice = "auto",
    vae: str | Path | None = None,
    parts_from: str | Path | None = None,
) -> Bundle:
    """Open a model that draws from a caption: Stable Diffusion, or any editor that `load_bundle` opens.

    Raises ModelError for another number of input channels, before the weights are read.
    """
    stored = open_model(find_model(model, revision=revision), weights=weights, parts=open_parts(parts_from))
    channels, needed = stored.channels
    if channels not in (needed // 2, needed):
        raise _not_a_painter(stored.path, channels, needed // 2)
    place = pick_device(device)
    return make_bundle(stored, str(model), device=place, dtype=pick_dtype(place, dtype), vae=vae)


def _not_a_painter(path: Path, channels: int, latent: int) -> ModelError:
    return ModelError(
        f"{path}: its UNet takes {channels} channels; drawing pairs needs a UNet that takes {latent} (Stable "
        f"Diffusion) or {2 * latent} (an editor). Choose another --model."
    )


def _open_tiny(tiny: AutoencoderTiny | str | Path, bundle: Bundle) -> AutoencoderTiny:
    if isinstance(tiny, (str, Path)):
        return load_tiny(tiny, bundle)
    check_tiny(tiny, bundle)
    return tiny.to(bundle.vae.device)
