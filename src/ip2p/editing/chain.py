"""Chained edits (`ip2p edit page.png "make it night" --then "make it snow"`), and their drift."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ip2p.base.files import replacing
from ip2p.pictures.images import MAX_PIXELS, flattened, resized, signed_psnr, to_tensor
from ip2p.settings import EditSettings

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ip2p.editing.arguments import EditArguments
    from ip2p.editing.editor import Callback, Editor
    from ip2p.models.clip import Clip


@dataclass(frozen=True, kw_only=True)
class ChainStep:
    """One edit of a chain; `instruction` is the model's input, `seed` its noise."""

    instruction: str
    seed: int
    image: Image.Image


@dataclass(frozen=True, kw_only=True)
class Drift:
    """The distance of a step from the first picture: PSNR in dB; CLIP similarity, None without a CLIP."""

    psnr: float
    clip: float | None


def edit_chain(
    editor: Editor,
    picture: Image.Image,
    instructions: Sequence[str],
    *,
    settings: EditSettings | None = None,
    from_original: bool = False,
    max_pixels: int | None = MAX_PIXELS,
    callback: Callback | None = None,
    **changes: Unpack[EditArguments],
) -> Iterator[ChainStep]:
    """Apply the instructions one after the other; each step edits the result of the previous one.

    The seed increases by one at each step, because repeating the same noise would leave its pattern in the
    picture. from_original: each step edits the first picture with all instructions so far, joined by commas,
    and the same seed; this avoids accumulated losses, but earlier changes may look different. settings,
    changes: as in `Editor.edit`.
    """
    shown = picture
    chosen = (settings or EditSettings()).changed(**changes)
    for k, instruction in enumerate(instructions):
        text = ", ".join(instructions[: k + 1]) if from_original else instruction
        seed = chosen.seed if from_original else chosen.seed + k
        [result] = editor.edit(
            picture if from_original else shown,
            text,
            seeds=[seed],
            settings=chosen,
            max_pixels=max_pixels,
            callback=callback,
        )
        yield ChainStep(instruction=text, seed=seed, image=result)
        shown = result


def measure_drift(start: Image.Image, step: Image.Image, clip: Clip | None) -> Drift:
    """PSNR in dB (at most 106), and the cosine similarity of the CLIP embeddings."""
    from ip2p.editing.rank import image_similarity

    start = resized(start, step.size)  # the sizes differ with --fit model
    error = (to_tensor(start) - to_tensor(step)).square().mean()
    return Drift(
        psnr=signed_psnr(error).item(), clip=None if clip is None else image_similarity(clip, start, step)
    )


def format_drift(drifts: Sequence[Drift], names: Sequence[str]) -> list[str]:
    """The lines of a table with the drift of each step."""
    width = max(len(name) for name in names)
    lines = [
        f"{'drift from the start':<{width + 2}}   PSNR" + ("   CLIP" if drifts[0].clip is not None else "")
    ]
    for name, drift in zip(names, drifts, strict=True):
        similarity = "" if drift.clip is None else f"  {drift.clip:.3f}"
        lines.append(f"{name:<{max(width + 2, 20)}}  {drift.psnr:4.1f} dB{similarity}")
    return lines


def save_animation(frames: Sequence[Image.Image], path: Path, *, frame_ms: int) -> Path:
    """Write a looping GIF or WebP at the size of the last picture, which is shown twice as long.

    WebP keeps transparency; GIF has no partial transparency, so there the pictures are on white.
    """
    durations = [frame_ms] * (len(frames) - 1) + [2 * frame_ms]
    size = frames[-1].size
    kind = {".gif": "GIF", ".webp": "WEBP"}[path.suffix.lower()]
    clear = any(frame.mode == "RGBA" for frame in frames)
    if clear and kind == "GIF":
        warnings.warn(
            "GIF has no partial transparency; the animation is on white. Write a .webp to keep it.",
            stacklevel=2,
        )
    keep = clear and kind == "WEBP"
    shown = [resized(frame.convert("RGBA") if keep else flattened(frame, "white"), size) for frame in frames]
    options: dict[str, Any] = {"quality": 90} if kind == "WEBP" else {"disposal": 1}
    if kind == "GIF":
        # One palette per frame; dithered, because 256 colors are few for a photograph.
        shown = [frame.quantize(256, dither=Image.Dither.FLOYDSTEINBERG) for frame in shown]
    with replacing(path) as partial:
        shown[0].save(
            partial, kind, save_all=True, append_images=shown[1:], duration=durations, loop=0, **options
        )
    return path
