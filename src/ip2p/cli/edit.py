"""`ip2p edit` and `ip2p grid`: read and write files around the functions of `editing`."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ip2p.base.errors import InputError, ModelError
from ip2p.base.files import check_output
from ip2p.base.terminal import progress, say
from ip2p.editing import advice, batch, chain, grid
from ip2p.pictures import images, infotext
from ip2p.pictures.address import file_name, is_url
from ip2p.settings import (
    COMMON,
    MAX_COUNT,
    MAX_PIXELS,
    OTHER,
    EditSettings,
    ModelSettings,
    OverwriteSettings,
    RunSettings,
    Texts,
    parse_lora,
    setting,
)

if TYPE_CHECKING:
    from ip2p.editing.editor import Editor
    from ip2p.models.clip import Clip

log = logging.getLogger("ip2p")
RANKING, CHAIN, FILES = "Keep the best", "Chained edits", "Files"


class EditConfig(RunSettings, OverwriteSettings, ModelSettings, EditSettings):
    """Edit a picture with an instruction: ip2p edit page.png "make it night" -o night.png"""

    image: str = setting(
        "", "picture to edit, or a folder or glob of pictures", positional=1, metavar="IMAGE", same_job=False
    )
    more: tuple[str, ...] = setting(
        (), "more pictures, folders or globs", positional=2, metavar="IMAGE", same_job=False
    )
    out: Path | None = setting(
        None,
        "output file or folder; default: IMAGE-edited next to the picture",
        group=COMMON,
        flags=("-o",),
        same_job=False,
    )
    count: int = setting(
        1, "number of results; several are named out-1, out-2, …", ge=1, le=MAX_COUNT, example=4, group=COMMON
    )
    show_mask: Path | None = setting(None, "save the mask of the edited region", group="Mask", metavar="FILE")
    best: int | None = setting(
        None,
        "keep this many of the --count results, ranked by CLIP",
        ge=1,
        le=MAX_COUNT,
        example=2,
        group=RANKING,
    )
    clip: str | None = setting(
        None,
        "CLIP for ranking and drift; default: the one that comes with the model",
        group=RANKING,
        metavar="MODEL",
    )
    caption: str | None = setting(None, "description of the input picture", group=RANKING)
    edited_caption: str | None = setting(
        None, "description of the desired result; default: the instruction", group=RANKING
    )
    then: Texts = setting(
        (),
        "apply another instruction to the result; may be repeated",
        group=CHAIN,
        metavar="INSTRUCTION",
    )
    from_original: bool = setting(
        False, "start each step from the original, with all instructions so far combined", group=CHAIN
    )
    animation: Path | None = setting(
        None, "save the steps as an animated .gif or .webp", group=CHAIN, metavar="FILE"
    )
    frame_ms: int = setting(
        1000, "milliseconds per step of the animation", ge=20, le=60_000, group=CHAIN, hidden=True
    )
    jobs: int = setting(
        2, "threads that read and write files", ge=1, le=64, group=FILES, same_job=False, hidden=True
    )
    batch_size: int | None = setting(
        None,
        "results per batch; default: 1 on a CPU, 4 elsewhere",
        ge=1,
        le=MAX_COUNT,
        example=4,
        group="Model",
        same_job=False,
    )
    from_settings: Path | None = setting(
        None,
        "use the settings and the instruction stored in this edited picture",
        group=FILES,
        metavar="FILE",
        same_job=False,
    )
    max_pixels: int = setting(
        MAX_PIXELS, "reject larger pictures before decoding them", ge=1, le=2**40, group=FILES, same_job=False
    )
    print_json: bool = setting(
        False, "print the outputs and their settings as JSON", group=OTHER, same_job=False, name="json"
    )
    examples: bool = setting(False, "print example instructions and advice", group=OTHER, same_job=False)

    @classmethod
    def inherited(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """The settings stored in the picture of --from-settings."""
        source = values.get("from_settings")
        return {} if not source else settings_of_file(Path(source), given=values)

    def check(self) -> None:
        """Raise InputError for options that cannot be combined."""
        if self.show_mask and not self.mask and self.auto_mask is None:
            raise InputError("--show-mask needs a mask; add --mask FILE or --auto-mask.")
        if (self.controlnet is None) != (self.control_image is None):
            missing = "--control-image FILE" if self.controlnet else "--controlnet MODEL"
            raise InputError(f"a ControlNet needs both a model and a control image; add {missing}.")
        if self.best is not None and self.best > self.count:
            raise InputError(
                f"--best {self.best} is more than --count {self.count}. Try --count {4 * self.best}."
            )
        if self.edited_caption is not None and self.caption is None:
            raise InputError("--edited-caption needs a description of the input picture; add --caption.")
        if self.caption is not None and self.best is None:
            raise InputError("--caption is used to rank results; add --count 8 --best 2.")
        if any(not words.strip() for words in self.then):
            raise InputError('the instruction of --then is empty; try --then "make it snow".')
        if self.then and self.count > 1:
            raise InputError("--then continues from a single result; remove --count.")
        if self.then and self.best is not None:
            raise InputError("--then continues from a single result; remove --best.")
        if self.then and self.mask and self.fit == "model":
            raise InputError(
                "--fit model crops the picture to the mask, which --then needs again; remove it."
            )
        if (self.from_original or self.animation) and not self.then:
            flag = "--from-original" if self.from_original else "--animation"
            raise InputError(f'{flag} is for chained edits; add --then "make it snow".')
        if self.animation and self.animation.suffix.lower() not in (".gif", ".webp"):
            raise InputError(f"{self.animation}: animations must be .gif or .webp. Change the extension.")


class GridConfig(RunSettings, OverwriteSettings, ModelSettings, EditSettings):
    """Draw the results over two settings as one picture: ip2p grid page.png "make it night" -o grid.png"""

    image: str = setting("", "picture to edit", positional=1, metavar="IMAGE")
    out: Path | None = setting(
        None, "output file; default: IMAGE-grid next to the picture", group=COMMON, flags=("-o",)
    )
    columns: str = setting(
        "text-cfg",
        "a numeric setting, optionally with values: text-cfg=3,5,7.5",
        group=COMMON,
        metavar="SETTING[=VALUES]",
    )
    rows: str = setting("image-cfg", "another setting", group=COMMON, metavar="SETTING[=VALUES]")
    cell: int = setting(
        256, "longer side of each picture in the grid, in pixels", ge=32, le=2048, group=FILES, hidden=True
    )
    max_pixels: int = setting(
        MAX_PIXELS, "reject larger pictures before decoding them", ge=1, le=2**40, group=FILES
    )

    def check(self) -> None:
        """Raise InputError for invalid axes."""
        columns, rows = (grid.parse_axis(f"--{name}", getattr(self, name)) for name in ("columns", "rows"))
        if columns[0] == rows[0]:
            shown = rows[0].replace("_", "-")
            raise InputError(f"--columns and --rows are both {shown}; change one, for example --rows seed")
        if len(columns[1] or ()) * len(rows[1] or ()) > MAX_COUNT:
            raise InputError(
                f"a grid can have at most {MAX_COUNT} pictures; use fewer values for --columns and --rows."
            )


def settings_of_file(source: Path, given: Collection[str] = ()) -> dict[str, Any]:
    """The settings stored in an edited picture, by their names in EditConfig.

    given: settings from other sources; their values in the picture are ignored, and may be unknown to ip2p.
    Raises InputError.
    """
    text = infotext.read_infotext(source)
    if text is None:
        raise InputError(f"{source} contains no settings; give a picture that ip2p edit wrote.")
    try:
        record = infotext.parse_infotext(text, without=given)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    names = [name for name in infotext.labeled_settings() if name not in given]
    return {name: getattr(record, name) for name in names if name != "model" or record.model}


def run_edit(config: EditConfig) -> None:
    """Edit one or more pictures and print the paths of the results.

    All inputs, outputs and settings are checked before a model is loaded.
    """
    if config.examples:
        print(advice.TEXT, end="")
        return
    check_words(config, "edit")
    if os.path.isfile(config.instruction):
        raise InputError(
            f"the instruction {config.instruction!r} is a file; the instruction must come last, as in: "
            'ip2p edit page.png "make it night"'
        )
    if batch.is_batch([config.image, *config.more]):
        edit_pictures(config)
    elif config.then:
        edit_steps(config)
    else:
        edit_one(config)


def edit_one(config: EditConfig) -> None:
    """Edit a picture `config.count` times, and keep all results or the `config.best` of them."""
    picture = open_input(config)
    paths, mask_paths = check_outputs(config, config.best or config.count)
    clip = load_clip(config) if config.best else None
    editor = load_editor(config)
    results: list[tuple[int, Image.Image]] = []
    outputs: list[dict[str, Any]] = []

    def keep(seed: int, result: Image.Image) -> None:
        path = paths[len(outputs)]
        save_result(config, result, path, mask_paths[len(outputs)])
        outputs.append({"file": str(path), "seed": seed, "parameters": result.info.get("parameters", "")})

    batch_size = config.batch_size or editor.batch_size
    settings = editor.resolved(config.part(EditSettings))
    with progress("editing", (settings.steps or 0) * -(-config.count // batch_size)) as advance:
        for start in range(0, config.count, batch_size):
            seeds = [config.seed + k for k in range(start, min(start + batch_size, config.count))]
            edited = editor.edit(
                picture,
                seeds=seeds,
                settings=settings,
                batch_size=len(seeds),
                max_pixels=config.max_pixels,
                callback=lambda step, steps, latents: advance(),
            )
            for seed, result in zip(seeds, edited, strict=True):
                if clip is None:
                    keep(seed, result)
                else:
                    results.append((seed, result))
    if clip is None:
        print_json(config, outputs=outputs)
        return
    candidates = score_results(clip, picture, results, config)
    say("seed  directional + image similarity = score")
    for number, (result, row) in enumerate(candidates):
        if number < len(paths):
            keep(row["seed"], result)
            row["file"] = str(paths[number])
        say(
            f"{row['seed']:>4}  {row['directional']:.3f} + {row['image_similarity']:.3f} = {row['score']:.3f}"
            f"  {row.get('file', '')}"
        )
    print_json(config, outputs=outputs, candidates=[row for _, row in candidates])


def score_results(
    clip: Clip, picture: Image.Image, results: Sequence[tuple[int, Image.Image]], config: EditConfig
) -> list[tuple[Image.Image, dict[str, Any]]]:
    """The results with their seeds and scores, the highest score first."""
    from ip2p.editing.rank import rank_results

    scores = rank_results(
        clip,
        picture,
        [result for _, result in results],
        instruction=config.instruction,
        caption=config.caption,
        edited_caption=config.edited_caption,
    )
    rows = [
        (result, {"seed": seed, **vars(score), "score": score.total})
        for (seed, result), score in zip(results, scores, strict=True)
    ]
    return sorted(rows, key=lambda row: -row[1]["score"])


def edit_steps(config: EditConfig) -> None:
    """Apply the instructions one after the other. Saves each step and reports its drift."""
    picture = open_input(config)
    instructions = [config.instruction, *config.then]
    paths, mask_paths = check_outputs(config, len(instructions))
    if config.animation:
        check_output(config.animation, overwrite=config.overwrite)
    clip = load_clip(config, optional=True)
    editor = load_editor(config)
    frames, drifts, outputs = [picture], [], []
    settings = editor.resolved(config.part(EditSettings))
    with progress("editing", (settings.steps or 0) * len(instructions)) as advance:
        steps = chain.edit_chain(
            editor,
            picture,
            instructions,
            settings=settings,
            from_original=config.from_original,
            max_pixels=config.max_pixels,
            callback=lambda step, steps, latents: advance(),
        )
        for step, path, mask_path in zip(steps, paths, mask_paths, strict=True):
            save_result(config, step.image, path, mask_path)
            drift = chain.measure_drift(picture, step.image, clip)
            frames.append(step.image)
            drifts.append(drift)
            outputs.append(
                {
                    "file": str(path),
                    "instruction": step.instruction,
                    "seed": step.seed,
                    "drift": {"psnr": drift.psnr, "clip": drift.clip},
                    "parameters": step.image.info.get("parameters", ""),
                }
            )
    for line in chain.format_drift(drifts, [path.name for path in paths]):
        say(line)
    if config.animation:
        chain.save_animation(frames, config.animation, frame_ms=config.frame_ms)
        if not config.print_json:
            print(config.animation, flush=True)
    animation = {"animation": str(config.animation)} if config.animation else {}
    print_json(config, outputs=outputs, **animation)


def edit_pictures(config: EditConfig) -> None:
    """Edit many pictures into a folder, or resume. Raises InputError at the end if some failed."""
    for flag in ("mask", "show_mask", "control_image", "then", "best"):
        if getattr(config, flag):
            raise InputError(
                f"--{flag.replace('_', '-')} is for one picture, and {config.image} means a batch; edit the "
                "pictures one by one."
            )
    folder = config.out
    if folder is None:
        if config.more or not Path(config.image).is_dir():
            raise InputError("a batch of pictures needs an output folder; add -o FOLDER.")
        folder = Path(config.image).with_name(f"{Path(config.image).resolve().name}-edited")
    pictures = batch.find_pictures([config.image, *config.more], folder)
    check_models(config)
    seeds = [config.seed + k for k in range(config.count)]
    tasks = batch.list_tasks(pictures, seeds)
    with batch.open_job(config, folder) as job:
        done, todo = batch.split_tasks(job, tasks, config.jobs, overwrite=config.overwrite)
        if done:
            say(f"{len(done)} of {len(tasks)} results already exist in {folder}")
        results = [(task, True) for task in done]
        failed: dict[Path, str] = {}
        if todo:
            editor = load_editor(config)
            if isinstance(config.size, tuple):
                editor.working_size((512, 512), config.size)  # reject it once, not for each picture
            with progress("editing", len(todo)) as advance:

                def report(task: batch.Task, path: Path) -> None:
                    results.append((task, False))
                    advance()
                    if not config.print_json:
                        print(path, flush=True)

                def edit(images: Sequence[Image.Image], seeds: Sequence[int]) -> list[Image.Image]:
                    return editor.edit_batch(
                        images,
                        config.instruction,
                        seeds=seeds,
                        settings=config.part(EditSettings),
                        max_pixels=config.max_pixels,
                    )

                failed = batch.run_batch(
                    job,
                    todo,
                    edit=edit,
                    working_size=lambda pixels: editor.working_size(pixels, config.size),
                    batch_size=config.batch_size or editor.batch_size,
                    jobs=config.jobs,
                    max_pixels=config.max_pixels,
                    on_result=report,
                )
    print_json(
        config,
        outputs=[
            {
                "file": str(folder / task.name),
                "source": str(task.source),
                "seed": task.seed,
                "already": existed,
            }
            for task, existed in results
        ],
        failed=[{"source": str(source), "error": error} for source, error in failed.items()],
    )
    for error in failed.values():
        say(f"error: {' '.join(error.split())}")
    if failed:
        raise InputError(
            f"{len(failed)} of {len(pictures)} pictures could not be edited; the other results are in "
            f"{folder}."
        )


def run_grid(config: GridConfig) -> None:
    """Draw the results over two settings as one picture and print its path."""
    check_words(config, "grid")
    picture = images.load_image(config.image, max_pixels=config.max_pixels, background=config.background)
    source = local_path(config.image)
    out = output_path(config.out, source, f"{source.stem}-grid.png")
    images.check_picture_output(out, overwrite=config.overwrite)
    check_models(config)
    editor = load_editor(config)
    settings = editor.resolved(config.part(EditSettings))
    columns, rows = (
        grid.Axis(setting=name, values=values or grid.default_values(name, settings))
        for name, values in (
            grid.parse_axis("--columns", config.columns),
            grid.parse_axis("--rows", config.rows),
        )
    )
    with progress("editing", len(columns.values) * len(rows.values)) as advance:
        sheet = grid.draw_grid(
            editor,
            picture,
            columns=columns,
            rows=rows,
            cell=config.cell,
            on_result=advance,
            settings=settings,
        )
    images.save_image(sheet, out, overwrite=config.overwrite)
    print(out)


# --- shared by the verbs --------------------------------------------------------------------------


def check_words(config: EditConfig | GridConfig, verb: str) -> None:
    """Raise InputError if the picture or the instruction is missing."""
    example = f'ip2p {verb} page.png "make it night"'
    if not config.image:
        raise InputError(f"no picture is given; write: {example}")
    if not config.instruction.strip():
        raise InputError(f"the instruction is empty; say what to change, as in: {example}")


def open_input(config: EditConfig) -> Image.Image:
    """Load the picture to edit, and check all other input files. Raises InputError and ModelError."""
    picture = images.load_image(config.image, max_pixels=config.max_pixels, background=config.background)
    if config.mask:
        from ip2p.pictures.masks import load_mask  # imports torch

        load_mask(config.mask, picture.size, max_pixels=config.max_pixels)
    if config.control_image:
        images.load_image(config.control_image, max_pixels=config.max_pixels, background="white")
    check_models(config)
    return picture


def check_models(config: EditConfig | GridConfig) -> None:
    """Raise ModelError for an unusable LoRA file, before the weights of the model are read."""
    if config.lora:
        from ip2p.models.lora import check_loras  # imports torch

        check_loras([parse_lora(text) for text in config.lora])


def load_editor(config: EditConfig | GridConfig) -> Editor:
    from ip2p.editing.editor import Editor  # imports torch

    chosen = dict(config.part(ModelSettings))
    return Editor.load(loras=chosen.pop("lora"), **chosen)


def load_clip(config: EditConfig, *, optional: bool = False) -> Clip | None:
    """The CLIP of `--clip`, else of the model; None if there is neither and it is optional."""
    from ip2p.base.devices import pick_device
    from ip2p.editing.rank import find_clip
    from ip2p.models.clip import Clip

    try:
        folder = find_clip(config.clip, config.model, revision=config.revision)
    except ModelError as error:
        if not optional or config.clip is not None:
            raise
        log.info("%s", error)
        return None
    return Clip.load(folder, pick_device(config.device))


def check_outputs(config: EditConfig, count: int) -> tuple[list[Path], Sequence[Path | None]]:
    """The paths of `count` results and of their masks, if --show-mask is given. Raises InputError."""
    paths = output_paths(config, count)
    mask_paths = numbered(config.show_mask, count) if config.show_mask else []
    for path in [*paths, *mask_paths]:
        images.check_picture_output(path, overwrite=config.overwrite)
    return paths, mask_paths or [None] * count


def save_result(config: EditConfig, result: Image.Image, path: Path, mask_path: Path | None) -> None:
    """Save a result and its mask, and print its path unless --json is given."""
    images.save_image(result, path, overwrite=config.overwrite)
    if mask_path is not None:
        images.save_image(result.info["mask"], mask_path, overwrite=config.overwrite)
    if not config.print_json:
        print(path, flush=True)


def output_paths(config: EditConfig, count: int | None = None) -> list[Path]:
    """The path `out`, or out-1, out-2, … for several results; default: IMAGE-edited or IMAGE-chain."""
    source = local_path(config.image)
    suffix = source.suffix if source.suffix.lower() in images.WRITES else ".png"
    # Chains have another name, because their steps are not alternatives.
    name = "chain" if config.then else "edited"
    out = output_path(config.out, source, f"{source.stem}-{name}{suffix}")
    return numbered(out, config.count if count is None else count)


def local_path(image: str) -> Path:
    """The path of a picture; for an address, its file name in the current folder."""
    return Path(file_name(image)) if is_url(image) else Path(image)


def output_path(out: Path | None, source: Path, name: str) -> Path:
    """The file `out`; `name` in it if it is a folder, or next to `source` if it is None."""
    if out is None:
        return source.with_name(name)
    return out / name if out.is_dir() else out


def numbered(path: Path, count: int) -> list[Path]:
    """[path] for a count of 1, else [path-1, path-2, …]."""
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{k}{path.suffix}") for k in range(1, count + 1)]


def print_json(config: EditConfig, **report: object) -> None:
    if config.print_json:
        print(json.dumps({**report, "settings": config.as_dict()}, indent=2, ensure_ascii=False))
