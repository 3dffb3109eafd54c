"""From the fields of the page to requests of the service, and their progress in words."""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from anyio import to_thread
from PIL import Image

from ip2p.base.errors import InputError
from ip2p.pictures.infotext import EditRecord
from ip2p.pictures.masks import load_mask
from ip2p.serve.requests import EditRequest
from ip2p.serve.session import uploaded
from ip2p.settings import AUTO_MASK, MAX_COUNT, MAX_SEED, EditSettings, parse_size

if TYPE_CHECKING:
    from ip2p.serve.jobs import Job
    from ip2p.serve.queue import Place
    from ip2p.serve.service import Service

RANDOM_SEEDS = 1_000_000  # a random seed is below this: short enough to be read out
SURPRISE = 0.8, 1.2  # the released app's 6 to 9 and 1.2 to 1.8, as shares of its 7.5 and 1.5
Region = Literal["everywhere", "painted", "file", "found"]


@dataclass(frozen=True, kw_only=True)
class Controls:
    """The fields of the page as they stand, in the order in which they are listed there.

    text_cfg, image_cfg: None for the model's own. seed: −1 for a random one; the candidates count up from
    it. size: empty, a side, or width and height as 576x384. region: where the edit may go; painted is
    what was drawn, mask the path of a picture, auto_mask the threshold of the model's own search.
    """

    instruction: str = ""
    negative: str = ""
    count: int = 4
    text_cfg: float | None = None
    image_cfg: float | None = None
    steps: int = 20
    seed: int = -1
    sampler: str = "euler_ancestral"
    spacing: str = "linspace"
    size: str = ""
    region: Region = "everywhere"
    painted: dict[str, Any] | None = None
    mask: str | None = None
    auto_mask: float = AUTO_MASK
    model: str | None = None

    def seeds(self) -> tuple[int, ...]:
        """As many as candidates; never two numbers the same."""
        count = _whole("Candidates", self.count)
        if not 1 <= count <= MAX_COUNT:  # before so many numbers are written down
            raise InputError(
                f"Candidates is {count}; it must be 1 to {MAX_COUNT}, or what the server allows."
            )
        seed = _whole("Seed", self.seed)
        first = random.randrange(RANDOM_SEEDS) if seed < 0 else seed
        if first + count - 1 > MAX_SEED:
            raise InputError(f"Seed {first} is out of range; use −1 (random) or 0 to {MAX_SEED}.")
        return tuple(range(first, first + count))

    def request(self, picture: Image.Image, *, previews: int | None = None) -> EditRequest:
        """The request for these fields. Raises InputError for what cannot be read as a number or a mask."""
        if not (self.instruction or "").strip():
            raise InputError('The instruction is empty. Say what to change, for example "make it night".')
        steps = _whole("Steps", self.steps)
        settings = EditSettings.read(
            {
                "instruction": self.instruction.strip(),
                "steps": steps,
                "sampler": self.sampler,
                "schedule": self.spacing,
                "text_cfg": self.text_cfg,
                "image_cfg": self.image_cfg,
                "negative": (self.negative or "").strip(),
                "size": read_size(self.size or ""),
                "mask": self._mask(picture.size),
                "auto_mask": self.auto_mask if self.region == "found" else None,
            }
        )
        return EditRequest(
            image=picture,
            settings=settings,
            seeds=self.seeds(),
            model=self.model or None,
            # Ten pictures on the way say as much as a hundred, and cost a tenth.
            previews=max(1, steps // 10) if previews is None else previews,
        )

    def _mask(self, size: tuple[int, int]) -> Image.Image | None:
        if self.region == "painted":
            mask = painted_mask(self.painted, size)
            if mask is None:
                raise InputError("Nothing is painted yet. Paint where the edit may go, or edit everywhere.")
            return mask
        if self.region == "file":
            if self.mask is None:
                raise InputError("There is no mask file yet. Give one, white where the edit may go.")
            return load_mask(uploaded(self.mask), size)
        return None


def painted_mask(drawn: dict[str, Any] | None, size: tuple[int, int]) -> Image.Image | None:
    """What was painted in any layer of a gr.ImageEditor, at `size`, white on black; None for nothing."""
    whole = Image.new("L", size)
    for layer in (drawn or {}).get("layers") or []:
        alpha = layer.convert("RGBA").getchannel("A").resize(size, Image.Resampling.BILINEAR)
        whole.paste(255, mask=alpha.point(lambda level: 255 if level > 127 else 0))
    return whole if whole.getbbox() else None


def read_size(text: str) -> int | tuple[int, int] | None:
    """ "" → None, "256" → 256, "576x384" → (576, 384). Raises InputError."""
    if not text.strip():
        return None
    try:
        return parse_size(text.strip())
    except ValueError:
        raise InputError(
            f"Size {text.strip()!r} is not read. Leave it empty, or write a side (512) or 576x384."
        ) from None


def _whole(name: str, value: float | None) -> int:
    if value is None or int(value) != value:
        raise InputError(f"{name} needs a whole number; it is {value!r}.")
    return int(value)


def from_settings(settings: EditRecord, models: list[str]) -> dict[str, Any]:
    """The fields that make an edited file again; a model that is not served here is left as it stands.

    A mask is not in the file: for such an edit the fields ask for one that is painted.
    """
    region: Region = "everywhere" if settings.mask is None else "painted"
    fields: dict[str, Any] = {
        "instruction": settings.instruction,
        "negative": settings.negative,
        "count": 1,
        "text_cfg": settings.text_cfg,
        "image_cfg": settings.image_cfg,
        "steps": settings.steps,
        "seed": settings.seed,
        "sampler": settings.sampler,
        "spacing": settings.schedule,
        "size": "x".join(map(str, settings.size)) if isinstance(settings.size, tuple) else "",
        "region": region if settings.auto_mask is None else "found",
    }
    if settings.auto_mask is not None:
        fields["auto_mask"] = settings.auto_mask
    if settings.model in models:
        fields["model"] = settings.model
    return fields


def surprise(own: tuple[float, float]) -> tuple[float, float]:
    """Text and image CFG drawn around a model's own ones."""
    text, image = (scale * random.uniform(*SURPRISE) for scale in own)
    return round(text, 1), round(image, 2)


# --- running -------------------------------------------------------------------------------------


async def run(
    service: Service, request: EditRequest, *, client: str, place: Place | None = None
) -> AsyncGenerator[Job, None]:
    """Hand in a request and yield its job at every change; a reader that goes away cancels it.

    place: what `Service.room` kept for it.
    """
    job = await to_thread.run_sync(lambda: service.submit(request, client=client, place=place))
    try:
        yield job
        async for _ in job.aevents():
            yield job
    finally:
        if job.active:
            service.cancel(job.id)


def progress(job: Job) -> str:
    """Where a job is, in words."""
    if job.state == "waiting":
        before = "" if not job.position else f", {job.position} before it"
        return f"Waiting{before}"
    if job.state == "running":
        left = "" if job.seconds_left is None else f" · about {duration(job.seconds_left)} left"
        return f"Step {job.step} of {job.steps}{left}"
    return {"done": "Done", "cancelled": "Stopped", "failed": "Failed"}[job.state]


def duration(seconds: float) -> str:
    """8.2 → "9 s", 100 → "2 min"."""
    whole = max(1, -int(-seconds // 1))
    return f"{whole} s" if whole < 100 else f"{round(whole / 60)} min"
