"""Scores an editor on storybook edits, whose exact answers are known: `ip2p storybook score`.

- *Nearest*: in the region where any candidate differs from the page, the output is nearer to the exact answer
  than to the unedited page and to at least 15 other exact answers of the same kind of edit.
- *Strict*: nearest, the change has three to five quarters of its strength, and the rest of the page is kept.
- *Sharpness*: the edges of the outputs divided by those of the exact answers, in that region.
- *Preservation*: PSNR between output and page outside the region that the edit may change.
- *Reconstruction*: PSNR of the autoencoder on the exact answers.

The equations are in `ip2p_storybook.metrics`. The `BASELINES` are outputs made from the answers themselves;
they show what each metric can and cannot distinguish.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from ip2p_storybook import edits, metrics
from ip2p_storybook.draw import draw
from ip2p_storybook.edits import EDIT_KINDS, Edit, alternatives, change_mask, is_unique, sample_edit
from ip2p_storybook.metrics import page_psnr
from ip2p_storybook.scene import rng_for

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from ip2p.editing.editor import Editor
    from ip2p.settings import EditSettings

SPLITS = tuple(split for split in edits.SPLITS if split != "train")
BASELINES = ("copy", "hedger", "blurred answer", "ceiling")
OTHER_ANSWERS = 15
ROWS_SHOWN = 48
SAMPLING = ("steps", "sampler", "schedule", "text_cfg", "image_cfg", "cfg_interval")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One edit to score, with everything needed to judge an output.

    page, exact: uint8 [size, size, 3]. others: uint8 [n, size, size, 3], n >= 15. region: bool [size, size],
    where any candidate differs from the page. fixed: bool [size, size], what must not change.
    """

    edit: Edit
    page: NDArray[np.uint8]
    exact: NDArray[np.uint8]
    others: NDArray[np.uint8]
    region: NDArray[np.bool_]
    fixed: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The metrics of one output.

    preservation: PSNR in dB to the page where nothing may change, infinite for equal pixels; None if the edit
    may change the whole page. distance: PSNR in dB to the exact answer over the whole page. edges,
    exact_edges: edge energy of the output and of the exact answer in the region.
    """

    kind: str
    nearest: bool
    gain: float
    preservation: float | None
    distance: float
    edges: float
    exact_edges: float

    @property
    def strict(self) -> bool:
        return metrics.is_strict(self.nearest, self.gain, self.preservation)


def make_case(edit: Edit, size: int) -> Case:
    """Draw the page, the exact answer and the other answers of an edit."""
    page, exact = draw(edit.before, size), draw(edit.after, size)
    others: list[NDArray[np.uint8]] = []
    for scene in alternatives(edit):
        picture = draw(scene, size)
        # Two scenes may look the same, for example if a thing is recolored in a blueprint.
        if not any(np.array_equal(picture, seen) for seen in (exact, page, *others)):
            others.append(picture)
        if len(others) >= OTHER_ANSWERS + 1:
            break
    stack = np.stack(others)
    region = (exact != page).any(axis=-1) | (stack != page).any(axis=(0, 3))
    return Case(
        edit=edit, page=page, exact=exact, others=stack, region=region, fixed=~change_mask(edit, size)
    )


def cases(count: int, seed: int, size: int, split: str) -> Iterator[Case]:
    """`count` edits with a unique and visible answer, cycling through the kinds."""
    return (find_case(number, seed, size, split) for number in range(count))


def find_case(number: int, seed: int, size: int, split: str) -> Case:
    """Edit `number` of a seed, with a unique and visible answer; its kind depends on `number`."""
    rng = rng_for("score", split, seed, number)
    while True:
        edit = sample_edit(rng, kind=EDIT_KINDS[number % len(EDIT_KINDS)], split=split)
        if not is_unique(edit):
            continue
        case = make_case(edit, size)
        # An invisible change, such as a color in a blueprint, cannot be scored.
        if len(case.others) >= OTHER_ANSWERS and visible(case.page, case.exact):
            return case


def visible(page: NDArray[np.uint8], exact: NDArray[np.uint8]) -> bool:
    """Whether at least a thousandth of the page changes by more than 16 of 255 in some channel."""
    apart = np.abs(page.astype(np.int16) - exact.astype(np.int16)).max(axis=-1) > 16
    return float(apart.mean()) > 0.001


def judge(case: Case, output: NDArray[np.uint8]) -> Verdict:
    """Compare an output, uint8 [size, size, 3], with all candidates."""
    kept = page_psnr(output[case.fixed], case.page[case.fixed]) if case.fixed.mean() > 0.01 else None
    return Verdict(
        kind=case.edit.kind,
        nearest=metrics.is_nearest(output, case.exact, (case.page, *case.others), case.region),
        gain=metrics.gain(output, case.page, case.exact, case.region),
        preservation=kept,
        distance=page_psnr(output, case.exact),
        edges=metrics.edge_energy(output, case.region),
        exact_edges=metrics.edge_energy(case.exact, case.region),
    )


# --- baselines ----------------------------------------------------------------------------------


def hedged_answer(case: Case) -> NDArray[np.uint8]:
    """The per-pixel median of the exact and the other answers, which commits to none of them."""
    median = np.median(np.concatenate([case.exact[None], case.others]), axis=0)
    return median.round().astype(np.uint8)


def blurred_answer(case: Case) -> NDArray[np.uint8]:
    """The exact answer with a Gaussian blur of size / 64 pixels; the page where nothing may change."""
    from PIL import Image, ImageFilter

    blur = ImageFilter.GaussianBlur(case.page.shape[0] / 64)
    blurred = np.asarray(Image.fromarray(case.exact).filter(blur))
    return np.where(case.fixed[..., None], case.page, blurred)


# --- tables -------------------------------------------------------------------------------------


def summarize(verdicts: Sequence[Verdict]) -> dict[str, dict[str, Any]]:
    """Each metric for each kind of edit and overall, as JSON values.

    {kind: {"count": n, metric: {"value", "low", "high", "count"}}}. nearest, strict: shares. sharpness: the
    sum of the outputs' edges over that of the exact answers'. gain: mean. preservation, distance: mean dB,
    each at most 60. A metric that no output has is None.
    """
    rows: dict[str, dict[str, Any]] = {}
    for kind in (*EDIT_KINDS, "overall"):
        some = [v for v in verdicts if kind in (v.kind, "overall")]
        if not some:
            continue
        found = {
            "nearest": metrics.share([v.nearest for v in some]),
            "strict": metrics.share([v.strict for v in some]),
            "sharpness": metrics.ratio([v.edges for v in some], [v.exact_edges for v in some]),
            "gain": metrics.mean([v.gain for v in some]),
            "preservation": _mean_psnr([v.preservation for v in some if v.preservation is not None]),
            "distance": _mean_psnr([v.distance for v in some]),
        }
        rows[kind] = {"count": len(some)} | {n: None if e is None else asdict(e) for n, e in found.items()}
    return rows


def _mean_psnr(values: Sequence[float]) -> metrics.Estimate | None:
    return metrics.mean([min(value, metrics.MAX_PSNR) for value in values])


def edit_tensors(
    editor: Editor,
    pictures: Tensor,
    instructions: Sequence[str],
    *,
    seeds: Sequence[int],
    settings: EditSettings,
) -> Tensor:
    """Edit pictures [batch, 3, h, w] in [-1, 1] at their own size, each by its instruction.

    settings: of which those in SAMPLING are used; None means the model's defaults.
    Returns the decoded results, which are not clamped to [-1, 1].
    """

    from ip2p.base.devices import NoiseStream
    from ip2p.models.text import join_prompts

    images = editor.encode_image(pictures)
    latents = editor.edit_latents(
        images,
        join_prompts([editor.encode_text(text) for text in instructions]),
        editor.encode_text(""),
        noise=NoiseStream(list(seeds), images.shape[1:], editor.device),
        settings=settings,
    )
    for last in latents:
        final = last
    return editor.decode(final)


def _signed(pages: NDArray[np.uint8]) -> Tensor:
    import torch

    return torch.from_numpy(pages.transpose(0, 3, 1, 2).astype(np.float32)) / 127.5 - 1


def _pixels(signed: Tensor) -> list[NDArray[np.uint8]]:
    return list(((signed.clamp(-1, 1) + 1) * 127.5).round().byte().cpu().permute(0, 2, 3, 1).numpy())


def score(
    editor: Editor,
    *,
    count: int,
    seed: int = 0,
    size: int | None = None,
    batch_size: int = 16,
    splits: Sequence[str] = SPLITS,
    baselines: Sequence[str] = BASELINES,
    advance: Callable[[], None] | None = None,
    rows: list[tuple[Case, NDArray[np.uint8]]] | None = None,
    keep_rows: int = 0,
    settings: EditSettings | None = None,
) -> dict[str, Any]:
    """Score an editor on `count` edits of each split; returns the tables as JSON values.

    settings: as in `edit_tensors`. The result has them and, under "splits", for each split: "model" and each
    baseline (`summarize`), "edits" (the metrics of each edit) and, with the ceiling, "reconstruction" (mean
    PSNR in dB of the autoencoder on the exact answers). `rows` receives the first `keep_rows` (case, output)
    of the first split.
    """
    size = size or editor.bundle.card.native_size
    settings = editor.resolved(settings)
    sampling = {name: getattr(settings, name) for name in SAMPLING}
    result: dict[str, Any] = {"count": count, "seed": seed, "size": size, **sampling, "splits": {}}
    for split in splits:
        found: list[tuple[Case, Verdict]] = []
        verdicts: dict[str, list[Verdict]] = {name: [] for name in baselines}
        remaining = cases(count, seed, size, split)
        while batch := list(islice(remaining, batch_size)):
            first = len(found)
            results = edit_tensors(
                editor,
                _signed(np.stack([case.page for case in batch])),
                [case.edit.instruction for case in batch],
                seeds=[seed * 1_000_003 + first + i for i in range(len(batch))],
                settings=settings,
            )
            outputs = _pixels(results)
            for case, output in zip(batch, outputs, strict=True):
                found.append((case, judge(case, output)))
                if rows is not None and split == splits[0] and len(rows) < keep_rows:
                    rows.append((case, output))
            for name in baselines:
                answers = _answer_all(editor, name, batch)
                verdicts[name] += [judge(case, answer) for case, answer in zip(batch, answers, strict=True)]
            for _ in batch:
                if advance:
                    advance()
        tables = {"model": summarize([verdict for _, verdict in found])}
        tables |= {name: summarize(some) for name, some in verdicts.items()}
        if "ceiling" in tables:
            tables["reconstruction"] = tables["ceiling"]["overall"]["distance"]
        result["splits"][split] = tables | {"edits": [_as_record(*each) for each in found]}
    return result


def _answer_all(editor: Editor, baseline: str, batch: Sequence[Case]) -> list[NDArray[np.uint8]]:
    """A baseline's outputs for a batch of cases."""
    if baseline == "ceiling":
        latents = editor.encode_image(_signed(np.stack([case.exact for case in batch])))
        return _pixels(editor.decode(latents * editor.bundle.latent_scale))
    answer: Callable[[Case], NDArray[np.uint8]] = {
        "copy": lambda case: case.page,
        "hedger": hedged_answer,
        "blurred answer": blurred_answer,
    }[baseline]
    return [answer(case) for case in batch]


def _as_record(case: Case, verdict: Verdict) -> dict[str, Any]:
    """One edit as JSON values; the preservation of an unchanged page is 60 dB."""
    numbers = asdict(verdict) | {"strict": verdict.strict}
    for name in ("preservation", "distance"):
        if numbers[name] is not None:
            numbers[name] = min(numbers[name], metrics.MAX_PSNR)
    return {"instruction": case.edit.instruction, **numbers}


def as_text(result: dict[str, Any]) -> str:
    """The score as text, one table of at most 100 columns per split."""
    low, high = result["cfg_interval"]
    between = "" if (low, high) == (0, 1) else f" between noise levels {low:g} and {high:g}"
    lines = [
        f"{result['count']} edits per split at {result['size']} px, seed {result['seed']}",
        f"{result['steps']} steps of {result['sampler']} ({result['schedule']}), "
        f"text CFG {result['text_cfg']:g}, image CFG {result['image_cfg']:g}{between}",
        "number correct, percentage, and 95% interval in parentheses",
    ]
    for split, tables in result["splits"].items():
        head = f"{split:<20}{'nearest':>20}{'strict':>26}{'sharpness':>17}{'preservation, dB':>17}"
        lines += ["", head, "-" * len(head)]
        named = list(tables["model"].items())
        named += [(name, tables[name]["overall"]) for name in BASELINES if name in tables]
        for name, row in named:
            if name == BASELINES[0]:
                lines.append("-" * len(head))
            lines.append(
                f"{name:<14}{_share_text(row['nearest']):>26}{_share_text(row['strict']):>26}"
                f"{_mean_text(row['sharpness'], '.2f'):>17}{_mean_text(row['preservation'], '.1f'):>17}"
            )
        if "reconstruction" in tables:
            rebuilt = _mean_text(tables["reconstruction"], ".1f")
            lines.append(f"autoencoder on the exact answers: {rebuilt} dB")
    return "\n".join(lines)


def _share_text(share: dict[str, float]) -> str:
    """7/10 70% (40-89); decimals would suggest more precision than the interval has."""
    right = round(share["value"] * share["count"])
    low, high = (f"{100 * share[end]:.0f}" for end in ("low", "high"))
    return f"{right}/{share['count']} {share['value']:4.0%} {f'({low}-{high})':>8}"


def _mean_text(mean: dict[str, float | None] | None, form: str) -> str:
    """24.8 (23.1-26.5), or - for a metric that no output has."""
    if mean is None:
        return "-"
    ends = [mean[end] for end in ("low", "high")]
    if None in ends:
        return f"{mean['value']:{form}} (1 edit)"
    return f"{mean['value']:{form}} ({ends[0]:{form}}-{ends[1]:{form}})"


def rows_picture(rows: Sequence[tuple[Case, NDArray[np.uint8]]]) -> Any:
    """A sheet with page, result and exact answer of each edit, and whether the result is nearest."""
    from PIL import Image

    from ip2p.data.check import sheet_in_columns
    from ip2p.pictures.images import resized

    shown = [
        [resized(Image.fromarray(pixels), (128, 128)) for pixels in (case.page, output, case.exact)]
        for case, output in rows
    ]
    labels = [
        f"{'right' if judge(case, output).nearest else 'wrong'}: {case.edit.instruction}"
        for case, output in rows
    ]
    return sheet_in_columns(shown, labels, header=("page", "result", "exact answer"), columns=2, letters=64)
