"""The metrics of `ip2p evaluate`: plain functions, and a table of their names.

Pictures are fp32 [3, height, width] in [0, 1]. A region is bool [height, width]; averages are over its pixels
only. A metric without a value for a row (no caption, an empty region) is NaN. `ip2p train` uses the same
functions for validation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor

from ip2p.base.errors import InputError, ModelError
from ip2p.evaluation.encoders import IMAGENET, Encoders, Picture, normalized
from ip2p.models.clip import similarities
from ip2p.pictures.images import signed_psnr, to_pil, to_tensor

if TYPE_CHECKING:
    from ip2p.evaluation.storybook import Case, Verdict

Region = Bool[Tensor, "height width"]
WINDOW, SIGMA = 11, 1.5  # of SSIM
K1, K2 = 0.01, 0.03
HALF = WINDOW // 2


@dataclass(kw_only=True)
class Shot:
    """One edit to measure: its input, its output, and what is known about the answer.

    before, output, target: pictures, which may differ in size. mask: where the edit may change the picture.
    case: for a storybook edit with an exact answer. kind: of edit.
    """

    before: Picture
    output: Picture
    instruction: str = ""
    target: Picture | None = None
    mask: Region | None = None
    caption: str = ""
    edited_caption: str = ""
    case: Case | None = None
    kind: str = ""

    @functools.cached_property
    def verdict(self) -> Verdict:
        """The verdict on the output of a storybook edit, which must have the size of the page."""
        import numpy as np

        from ip2p.evaluation.storybook import judge

        assert self.case is not None
        return judge(self.case, np.asarray(to_pil(self.output * 2 - 1)))


# --- pixels ---------------------------------------------------------------------------------------


def l1(one: Picture, other: Picture, region: Region | None = None) -> float:
    """mean |a - b|, 0 to 1 (MagicBrush, section 5)."""
    return _mean((one - other).abs().mean(dim=0), region)


def l2(one: Picture, other: Picture, region: Region | None = None) -> float:
    """mean (a - b)², 0 to 1: the mean squared error, without a root (MagicBrush's evaluator)."""
    return _mean((one - other).square().mean(dim=0), region)


def psnr(one: Picture, other: Picture, region: Region | None = None) -> float:
    """10 log10(1 / l2) in dB, at most 106 (equal pictures)."""
    return float(signed_psnr(torch.tensor(4 * l2(one, other, region), dtype=torch.float64)))


def ssim(one: Picture, other: Picture, region: Region | None = None) -> float:
    """Structural similarity, -1 to 1 (Wang et al. 2004): a Gaussian window of 11 pixels, sigma 1.5.

    (2 μaμb + c1)(2 σab + c2) / ((μa² + μb² + c1)(σa² + σb² + c2)), c1 = 0.01², c2 = 0.03², averaged over
    colors and pixels; the picture is mirrored at its border, as in torchmetrics 1.9. region: only windows
    entirely inside it count. NaN if there are none.
    """
    if min(one.shape[-2:]) < WINDOW:
        return math.nan
    a, b = (_mirrored(picture.double())[:, None] for picture in (one, other))
    offsets = torch.arange(WINDOW, dtype=torch.float64) - HALF
    line = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    line = line / line.sum()
    # The window is separable; two 1D convolutions take a fifth of the time.
    maps = torch.cat([a, b, a * a, b * b, a * b])
    maps = F.conv2d(F.conv2d(maps, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))
    mean_a, mean_b, square_a, square_b, product = maps.split(len(a))
    # Rounding can make the variance of a flat window slightly negative.
    spread_a = (square_a - mean_a**2).clamp_min(0)
    spread_b = (square_b - mean_b**2).clamp_min(0)
    both = product - mean_a * mean_b
    top = (2 * mean_a * mean_b + K1**2) * (2 * both + K2**2)
    low = (mean_a**2 + mean_b**2 + K1**2) * (spread_a + spread_b + K2**2)
    if region is not None:
        inside = _mirrored(region.double()[None])[None]
        region = F.avg_pool2d(inside, WINDOW, stride=1)[0, 0] > 1 - 0.5 / WINDOW**2
    return _mean((top / low).mean(dim=(0, 1)), region)


def _mirrored(picture: Tensor) -> Tensor:
    return F.pad(picture[None], (HALF, HALF, HALF, HALF), mode="reflect")[0]


@functools.lru_cache(maxsize=2)
def _lpips(net: str) -> Any:
    try:
        import lpips as library  # type: ignore[import-not-found]
    except ImportError:
        raise ModelError(
            "the metric lpips needs a package with its weights: pip install 'ip2p[lpips]'"
        ) from None
    from ip2p.models.load import quiet

    with quiet():
        return library.LPIPS(net=net, verbose=False, spatial=True).eval().requires_grad_(False)


def lpips(one: Picture, other: Picture, region: Region | None = None, *, net: str = "alex") -> float:
    """Learned perceptual distance (Zhang et al. 2018), version 0.1 of the package `lpips`, AlexNet.

    Its maps, scaled up to the picture, are averaged over the region. Pictures are not resized first. Raises
    ModelError if the package is not installed.
    """
    with torch.inference_mode():
        maps = _lpips(net)(one[None] * 2 - 1, other[None] * 2 - 1)
    return _mean(maps[0, 0], region)


def _mean(values: Tensor, region: Region | None) -> float:
    if region is not None:
        values = values[region]
    return float(values.double().mean()) if values.numel() else math.nan


# --- networks -------------------------------------------------------------------------------------


def directional_similarity(shot: Shot, encoders: Encoders, slot: str = "clip") -> float:
    """cos(CLIP(output) - CLIP(before), CLIP(edited caption) - CLIP(caption)): section 3.1.2 of the paper.

    Embeddings have unit length. NaN without two different captions, because the direction is unknown.
    """
    if not (shot.caption.strip() and shot.edited_caption.strip()) or shot.caption == shot.edited_caption:
        return math.nan
    rows = (
        *(encoders.image(slot, picture) for picture in (shot.before, shot.output)),
        *(encoders.text(slot, text) for text in (shot.caption, shot.edited_caption)),
    )
    return float(similarities(*(row.cpu()[None] for row in rows)).directional)


def image_similarity_of(one: Picture, other: Picture, encoders: Encoders, slot: str = "clip") -> float:
    """Cosine of the embeddings of two pictures: of CLIP, or the class tokens of DINO or DINOv2.

    For input and output with CLIP, this is the vertical axis of the paper's figure 8, which copying the input
    maximizes. For output and target, it is MagicBrush's CLIP-I or, with DINO, its DINO.
    """
    return float(encoders.image(slot, one) @ encoders.image(slot, other))


def text_similarity(shot: Shot, encoders: Encoders, slot: str = "clip") -> float:
    """cos(CLIP(output), CLIP(edited caption)), -1 to 1.

    Unlike torchmetrics' CLIPScore, which is 100 max(cos, 0). NaN without an edited caption.
    """
    if not shot.edited_caption.strip():
        return math.nan
    text = encoders.text(slot, shot.edited_caption).cpu()
    return float(encoders.image(slot, shot.output) @ text)


def structure_distance(one: Picture, other: Picture, encoders: Encoders, *, levels: float = 1.0) -> float:
    """Mean squared difference of the self-similarities of DINO's keys (Tumanyan et al. 2022, eq. 3).

    S[i, j] = cos(k_i, k_j) for the tokens of the last attention layer of DINO ViT-B/8, with a shorter side of
    224 pixels. levels: the value of white before ImageNet's normalization; 255 in PIE-Bench's evaluator.
    """
    maps = []
    for picture in (one, other):
        ready = encoders.prepared("structure", picture)
        if levels != 1.0:
            mean, std = (ready.new_tensor(values).view(3, 1, 1) for values in IMAGENET)
            ready = normalized((ready * std + mean) * levels, *IMAGENET)
        keys = F.normalize(encoders.keys(ready), dim=-1)
        maps.append(keys @ keys.T)
    return float((maps[0] - maps[1]).square().mean())


# --- the table ----------------------------------------------------------------------------------

Measure = Callable[[Shot, Encoders], float]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A column of the report.

    higher: whether higher is better. needs: fields of a row without which it is NaN. slots: the encoders it
    uses. weight: the metric that weights the rows in its average. hidden: used only as a weight.
    """

    measure: Measure
    higher: bool
    about: str
    needs: tuple[str, ...] = ()
    slots: tuple[str, ...] = ()
    weight: str = ""
    hidden: bool = False


def _fitted(picture: Picture, like: Picture) -> Picture:
    """A picture resized to another one's size with Pillow's bicubic, as MagicBrush does with the target."""
    if picture.shape == like.shape:
        return picture
    size = like.shape[2], like.shape[1]
    return (to_tensor(to_pil(picture * 2 - 1).resize(size))[0] + 1) / 2


def _pixel(function: Callable[..., float], to: str, side: str) -> Measure:
    def measure(shot: Shot, encoders: Encoders) -> float:
        other = getattr(shot, to)
        if other is None:
            return math.nan
        region = shot.mask
        if side:
            if region is None:
                return math.nan
            region = region if side == "inside" else ~region
        return function(_fitted(shot.output, other), other, region if side else None)

    return measure


def _same(to: str, slot: str) -> Measure:
    def measure(shot: Shot, encoders: Encoders) -> float:
        other = getattr(shot, to)
        return math.nan if other is None else image_similarity_of(other, shot.output, encoders, slot)

    return measure


def _pixel_metrics() -> dict[str, Metric]:
    found = {}
    for function, higher in ((l1, False), (l2, False), (psnr, True), (ssim, True), (lpips, False)):
        name, definition = function.__name__, (function.__doc__ or "").partition("\n")[0].rstrip(".")
        found[name] = Metric(
            measure=_pixel(function, "target", ""),
            higher=higher,
            needs=("target",),
            about=f"to the target: {definition}",
        )
        found[f"{name}_input"] = Metric(
            measure=_pixel(function, "before", ""), higher=higher, about=f"to the input: {definition}"
        )
        for side in ("outside", "inside"):
            found[f"{name}_{side}"] = Metric(
                measure=_pixel(function, "before", side),
                higher=higher == (side == "outside"),
                needs=("mask",),
                about=f"to the input, {side} the mask: {definition}",
            )
    return found


def _network_metrics() -> dict[str, Metric]:
    found = {}
    for slot in ("clip", "clip_b32", "dino", "dinov2"):
        for to, name in (("before", "image"), ("target", "target")):
            found[f"{slot}_{name}"] = Metric(
                measure=_same(to, slot),
                higher=True,
                needs=("target",) if to == "target" else (),
                slots=(slot,),
                about=f"cosine of the output and the {'input' if to == 'before' else to}",
            )
    for slot in ("clip", "clip_b32"):
        found[f"{slot}_directional"] = Metric(
            measure=functools.partial(_by_slot, directional_similarity, slot),
            higher=True,
            needs=("caption", "edited_caption"),
            slots=(slot,),
            about="cosine of the change in pictures and the change in captions",
        )
        found[f"{slot}_text"] = Metric(
            measure=functools.partial(_by_slot, text_similarity, slot),
            higher=True,
            needs=("edited_caption",),
            slots=(slot,),
            about="cosine of the output and the edited caption",
        )
    found["structure"] = Metric(
        measure=lambda shot, encoders: structure_distance(
            shot.before, _fitted(shot.output, shot.before), encoders
        ),
        higher=False,
        slots=("structure",),
        about="distance of DINO's self-similarity between input and output",
    )
    return found


def _by_slot(function: Callable[..., float], slot: str, shot: Shot, encoders: Encoders) -> float:
    return function(shot, encoders, slot)


def _of_verdict(name: str) -> Measure:
    def measure(shot: Shot, encoders: Encoders) -> float:
        if shot.case is None:
            return math.nan
        value = getattr(shot.verdict, name)
        return math.nan if value is None else float(value)

    return measure


def _sharpness(shot: Shot, encoders: Encoders) -> float:
    if shot.case is None or not shot.verdict.exact_edges:
        return math.nan
    return shot.verdict.edges / shot.verdict.exact_edges


def _exact_metrics() -> dict[str, Metric]:
    about = {
        "nearest": "the output is nearer to the exact answer than to all others",
        "strict": "nearest, with the right strength, and the rest of the page kept",
        "gain": "fraction of the requested change that was made",
    }
    found = {
        name: Metric(measure=_of_verdict(name), higher=True, needs=("case",), about=text)
        for name, text in about.items()
    }
    found["sharpness"] = Metric(
        measure=_sharpness,
        higher=True,
        needs=("case",),
        weight="exact_edges",
        about="edges of the outputs divided by those of the exact answers",
    )
    found["exact_edges"] = Metric(
        measure=_of_verdict("exact_edges"), higher=True, needs=("case",), about="", hidden=True
    )
    return found


METRICS: dict[str, Metric] = _network_metrics() | _pixel_metrics() | _exact_metrics()
USUAL = ("clip_directional", "clip_image", "clip_text", "l1", "psnr", "ssim", "l1_outside")
EXACT = ("strict", "nearest", "gain", "sharpness")


def chosen_metrics(names: Sequence[str], known: dict[str, Metric] | None = None) -> dict[str, Metric]:
    """Metrics by name, with their weights. Raises InputError with the nearest name for an unknown one."""
    import difflib

    known = known or METRICS
    found: dict[str, Metric] = {}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}."
            raise InputError(f"there is no metric {name!r}; {hint}")
        found[name] = known[name]
        if weight := known[name].weight:
            found[weight] = known[weight]
    return found


def measure_shots(
    shots: Sequence[Shot], metrics: dict[str, Metric], encoders: Encoders
) -> list[dict[str, float]]:
    """Every metric of every shot. Each picture is embedded once, in batches."""
    for slot in dict.fromkeys(slot for metric in metrics.values() for slot in metric.slots):
        if slot != "structure":
            pictures = [picture for shot in shots for picture in (shot.before, shot.output)]
            if any(metric.needs == ("target",) for metric in metrics.values() if slot in metric.slots):
                pictures += [shot.target for shot in shots if shot.target is not None]
            encoders.embed(slot, pictures)
    return [{name: metric.measure(shot, encoders) for name, metric in metrics.items()} for shot in shots]
