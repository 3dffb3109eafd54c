"""`ip2p edit` and `ip2p grid`: files in, files out, around the functions of `editing`."""

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
from ip2p.editing import advice, chain
from ip2p.editing import batch as many
from ip2p.editing import grid as grids
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
        "", "picture to edit; or a folder or glob of pictures", positional=1, metavar="IMAGE", same_job=False
    )
    more: tuple[str, ...] = setting(
        (), "more pictures, folders or globs", positional=2, metavar="IMAGE", same_job=False
    )
    out: Path | None = setting(
        None,
        "file or folder; default: IMAGE-edited beside the picture",
        group=COMMON,
        flags=("-o",),
        same_job=False,
    )
    count: int = setting(
        1, "number of results; several are named out-1, out-2, …", ge=1, le=MAX_COUNT, example=4, group=COMMON
    )
    show_mask: Path | None = setting(
        None, "write the edited region as a picture", group="Mask", metavar="FILE"
    )
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
        "CLIP that ranks and measures drift; default: the model's own",
        group=RANKING,
        metavar="MODEL",
    )
    caption: str | None = setting(None, "what the picture shows", group=RANKING)
    edited_caption: str | None = setting(
        None, "what the result should show; default: the instruction", group=RANKING
    )
    then: Texts = setting(
        (),
        "edit the result again with this instruction; may be repeated",
        group=CHAIN,
        metavar="INSTRUCTION",
    )
    from_original: bool = setting(
        False, "start each step from the original, with all instructions so far joined", group=CHAIN
    )
    animation: Path | None = setting(
        None, "write the steps as an animated .gif or .webp", group=CHAIN, metavar="FILE"
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
        "take the settings and the instruction from this edited file",
        group=FILES,
        metavar="FILE",
        same_job=False,
    )
    max_pixels: int = setting(
        MAX_PIXELS, "refuse a larger picture before decoding it", ge=1, le=2**40, group=FILES, same_job=False
    )
    print_json: bool = setting(
        False, "print the outputs and their settings as JSON", group=OTHER, same_job=False, name="json"
    )
    examples: bool = setting(False, "print instructions that work, and advice", group=OTHER, same_job=False)

    @classmethod
    def inherited(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """The settings that the edited file of --from-settings carries."""
        source = values.get("from_settings")
        return {} if not source else settings_of_file(Path(source), given=values)

    def check(self) -> None:
        """Raise InputError for settings that cannot be used together."""
        if self.show_mask and not self.mask and self.auto_mask is None:
            raise InputError("--show-mask has no mask to show; add --mask FILE or --auto-mask.")
        if (self.controlnet is None) != (self.control_image is None):
            lacks = "--control-image FILE" if self.controlnet else "--controlnet MODEL"
            raise InputError(f"a ControlNet needs a model and a picture to read; add {lacks}.")
        if self.best is not None and self.best > self.count:
            raise InputError(
                f"--best {self.best} is more than --count {self.count}. Try --count {4 * self.best}."
            )
        if self.edited_caption is not None and self.caption is None:
            raise InputError(
                "--edited-caption says where to go; add --caption to say what the picture shows."
            )
        if self.caption is not None and self.best is None:
            raise InputError("--caption helps to rank results; add --count 8 --best 2.")
        if any(not words.strip() for words in self.then):
            raise InputError('an instruction after --then is empty; write: --then "make it snow"')
        if self.then and self.count > 1:
            raise InputError("--then goes on from one result; leave --count away.")
        if self.then and self.best is not None:
            raise InputError("--then goes on from one result, so there is none to choose; leave --best away.")
        if self.then and self.mask and self.fit == "model":
            raise InputError(
                "--fit model cuts the picture to the mask, which --then needs again; leave it away."
            )
        if (self.from_original or self.animation) and not self.then:
            flag = "--from-original" if self.from_original else "--animation"
            raise InputError(f'{flag} is for edits in a row; add --then "make it snow".')
        if self.animation and self.animation.suffix.lower() not in (".gif", ".webp"):
            raise InputError(f"{self.animation}: animations are written as .gif or .webp. Change the ending.")


class GridConfig(RunSettings, OverwriteSettings, ModelSettings, EditSettings):
    """Draw the results over two settings as one picture: ip2p grid page.png "make it night" -o grid.png"""

    image: str = setting("", "picture to edit", positional=1, metavar="IMAGE")
    out: Path | None = setting(
        None, "file of the grid; default: IMAGE-grid beside the picture", group=COMMON, flags=("-o",)
    )
    columns: str = setting(
        "text-cfg",
        "a setting that is a number; with values: text-cfg=3,5,7.5",
        group=COMMON,
        metavar="SETTING[=VALUES]",
    )
    rows: str = setting("image-cfg", "another setting", group=COMMON, metavar="SETTING[=VALUES]")
    cell: int = setting(
        256, "longer side of a picture in the grid, in pixels", ge=32, le=2048, group=FILES, hidden=True
    )
    max_pixels: int = setting(
        MAX_PIXELS, "refuse a larger picture before decoding it", ge=1, le=2**40, group=FILES
    )

    def check(self) -> None:
        """Raise InputError for axes that cannot be drawn."""
        columns, rows = (grids.parse_axis(f"--{name}", getattr(self, name)) for name in ("columns", "rows"))
        if columns[0] == rows[0]:
            shown = rows[0].replace("_", "-")
            raise InputError(f"--columns and --rows are both {shown}; choose another, as in: --rows seed")
        if len(columns[1] or ()) * len(rows[1] or ()) > MAX_COUNT:
            raise InputError(
                f"a grid has at most {MAX_COUNT} pictures; give --columns and --rows fewer values."
            )


def settings_of_file(source: Path, given: Collection[str] = ()) -> dict[str, Any]:
    """The settings that an edited file carries, by their names in EditConfig.

    given: settings that are named elsewhere; the file's values of these are not read, so that they may be
    ones that ip2p does not know. Raises InputError.
    """
    text = infotext.read_infotext(source)
    if text is None:
        raise InputError(f"{source} carries no settings; give a picture that ip2p edit wrote.")
    try:
        record = infotext.parse_infotext(text, without=given)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    names = [name for name in infotext.labeled_settings() if name not in given]
    carried = {name: getattr(record, name) for name in names}
    return carried if record.model else {name: value for name, value in carried.items() if name != "model"}


def run_edit(config: EditConfig) -> None:
    """Edit one picture or many; the paths of the results go to stdout.

    All that can be wrong with the input, the output and the numbers is told before a model is loaded.
    """
    if config.examples:
        print(advice.TEXT, end="")
        return
    check_words(config, "edit")
    if os.path.isfile(config.instruction):
        raise InputError(
            f"the instruction {config.instruction!r} is a file; the instruction comes last, as in: "
            'ip2p edit page.png "make it night"'
        )
    if many.is_many([config.image, *config.more]):
        edit_many(config)
    elif config.then:
        edit_in_a_row(config)
    else:
        edit_one(config)


def edit_one(config: EditConfig) -> None:
    """Edit a picture `config.count` times, and keep all results or the `config.best` of them."""
    picture = open_input(config)
    paths = output_paths(config, config.best or config.count)
    shown = numbered(config.show_mask, len(paths)) if config.show_mask else []
    check_outputs([*paths, *shown], config)
    clip = load_clip(config) if config.best else None
    editor = load_editor(config)
    results: list[tuple[int, Image.Image]] = []
    made: list[dict[str, Any]] = []

    def keep(seed: int, result: Image.Image) -> None:
        path = paths[len(made)]
        images.save_image(result, path, overwrite=config.overwrite)
        if shown:
            images.save_image(result.info["mask"], shown[len(made)], overwrite=config.overwrite)
        made.append({"file": str(path), "seed": seed, "parameters": result.info.get("parameters", "")})
        if not config.print_json:
            print(path, flush=True)

    at_once = config.batch_size or editor.batch_size
    settings = editor.resolved(config.part(EditSettings))
    with progress("editing", (settings.steps or 0) * -(-config.count // at_once)) as advance:
        for start in range(0, config.count, at_once):
            seeds = [config.seed + k for k in range(start, min(start + at_once, config.count))]
            some = editor.edit(
                picture,
                seeds=seeds,
                settings=settings,
                batch_size=len(seeds),
                max_pixels=config.max_pixels,
                callback=lambda step, steps, latents: advance(),
            )
            for seed, result in zip(seeds, some, strict=True):
                if clip is None:
                    keep(seed, result)
                else:
                    results.append((seed, result))
    candidates = [] if clip is None else best_first(clip, picture, results, config)
    for number, (seed, result, _) in enumerate(candidates[: len(paths)]):
        keep(seed, result)
        candidates[number][2]["file"] = str(paths[number])
    if candidates:
        say("seed  directional + image similarity = score")
    for _, _, row in candidates:
        say(
            f"{row['seed']:>4}  {row['directional']:.3f} + {row['image_similarity']:.3f} = {row['score']:.3f}"
            f"  {row.get('file', '')}"
        )
    print_json(config, outputs=made, **({"candidates": [row for _, _, row in candidates]} if clip else {}))


def best_first(
    clip: Clip, picture: Image.Image, results: Sequence[tuple[int, Image.Image]], config: EditConfig
) -> list[tuple[int, Image.Image, dict[str, Any]]]:
    """The results with their seeds and scores, the highest score first."""
    from ip2p.editing.rank import rank

    scores = rank(
        clip,
        picture,
        [result for _, result in results],
        instruction=config.instruction,
        caption=config.caption,
        edited_caption=config.edited_caption,
    )
    rows = [
        (seed, result, {"seed": seed, **vars(score), "score": score.total})
        for (seed, result), score in zip(results, scores, strict=True)
    ]
    return sorted(rows, key=lambda row: -row[2]["score"])


def edit_in_a_row(config: EditConfig) -> None:
    """Edit a picture by one instruction after the other; every step is saved, and its drift told."""
    picture = open_input(config)
    instructions = [config.instruction, *config.then]
    paths = output_paths(config, len(instructions))
    shown = numbered(config.show_mask, len(paths)) if config.show_mask else []
    check_outputs([*paths, *shown], config)
    if config.animation:
        check_output(config.animation, overwrite=config.overwrite)
    clip = load_clip(config, optional=True)
    editor = load_editor(config)
    frames, drifts, made = [picture], [], []
    settings = editor.resolved(config.part(EditSettings))
    with progress("editing", (settings.steps or 0) * len(instructions)) as advance:
        steps = chain.chain(
            editor,
            picture,
            instructions,
            settings=settings,
            from_original=config.from_original,
            max_pixels=config.max_pixels,
            callback=lambda step, steps, latents: advance(),
        )
        for k, step in enumerate(steps):
            images.save_image(step.image, paths[k], overwrite=config.overwrite)
            if shown:
                images.save_image(step.image.info["mask"], shown[k], overwrite=config.overwrite)
            frames.append(step.image)
            drifts.append(chain.drift(picture, step.image, clip))
            made.append(
                {
                    "file": str(paths[k]),
                    "instruction": step.instruction,
                    "seed": step.seed,
                    "drift": {"psnr": drifts[k].psnr, "clip": drifts[k].clip},
                    "parameters": step.image.info.get("parameters", ""),
                }
            )
            if not config.print_json:
                print(paths[k], flush=True)
    for line in chain.report(drifts, [path.name for path in paths]):
        say(line)
    if config.animation:
        chain.save_animation(frames, config.animation, frame_ms=config.frame_ms)
        if not config.print_json:
            print(config.animation, flush=True)
    animation = {"animation": str(config.animation)} if config.animation else {}
    print_json(config, outputs=made, **animation)


def edit_many(config: EditConfig) -> None:
    """Edit many pictures into the folder `config.out`, or go on there; what failed is told at the end."""
    for flag in ("mask", "show_mask", "control_image", "then", "best"):
        if getattr(config, flag):
            raise InputError(
                f"--{flag.replace('_', '-')} is for one picture, and {config.image} stands for many; "
                "edit them one by one."
            )
    folder = config.out
    if folder is None:
        if config.more or not Path(config.image).is_dir():
            raise InputError("many pictures need a folder to go into; name it with -o FOLDER.")
        folder = Path(config.image).with_name(f"{Path(config.image).resolve().name}-edited")
    pictures = many.find_pictures([config.image, *config.more], folder)
    check_models(config)
    seeds = [config.seed + k for k in range(config.count)]
    tasks = many.tasks(pictures, seeds)
    with many.open_job(config, folder) as job:
        done, todo = many.split(job, tasks, config.jobs, overwrite=config.overwrite)
        if done:
            say(f"{len(done)} of {len(tasks)} results are already in {folder}")
        made = [(task, True) for task in done]
        failed: dict[Path, str] = {}
        if todo:
            editor = load_editor(config)
            if isinstance(config.size, tuple):
                editor.working_size((512, 512), config.size)  # refused once, not once a picture
            with progress("editing", len(todo)) as advance:

                def told(task: many.Task, path: Path) -> None:
                    made.append((task, False))
                    advance()
                    if not config.print_json:
                        print(path, flush=True)

                def edit_some(some: Sequence[Image.Image], seeds: Sequence[int]) -> list[Image.Image]:
                    return editor.edit_batch(
                        some,
                        config.instruction,
                        seeds=seeds,
                        settings=config.part(EditSettings),
                        max_pixels=config.max_pixels,
                    )

                failed = many.run(
                    job,
                    todo,
                    edit=edit_some,
                    working_size=lambda pixels: editor.working_size(pixels, config.size),
                    batch_size=config.batch_size or editor.batch_size,
                    jobs=config.jobs,
                    max_pixels=config.max_pixels,
                    made=told,
                )
    print_json(
        config,
        outputs=[
            {
                "file": str(folder / task.name),
                "source": str(task.source),
                "seed": task.seed,
                "already": before,
            }
            for task, before in made
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
    """Draw the results over two settings as one picture; its path goes to stdout."""
    check_words(config, "grid")
    picture = images.load_image(config.image, max_pixels=config.max_pixels, background=config.background)
    source = local_path(config.image)
    out = place(config.out, source, f"{source.stem}-grid.png")
    images.check_output(out, overwrite=config.overwrite)
    check_models(config)
    editor = load_editor(config)
    settings = editor.resolved(config.part(EditSettings))
    columns, rows = (
        grids.Axis(setting=name, values=values or grids.default_values(name, settings))
        for name, values in (
            grids.parse_axis("--columns", config.columns),
            grids.parse_axis("--rows", config.rows),
        )
    )
    with progress("editing", len(columns.values) * len(rows.values)) as advance:
        sheet = grids.draw_grid(
            editor, picture, columns=columns, rows=rows, cell=config.cell, made=advance, settings=settings
        )
    images.save_image(sheet, out, overwrite=config.overwrite)
    print(out)


# --- what the verbs share -------------------------------------------------------------------------


def check_words(config: EditConfig | GridConfig, verb: str) -> None:
    """Raise InputError unless a picture is named and the instruction says something."""
    example = f'ip2p {verb} page.png "make it night"'
    if not config.image:
        raise InputError(f"no picture is named; write: {example}")
    if not config.instruction.strip():
        raise InputError(f"the instruction is empty; say what to change, as in: {example}")


def open_input(config: EditConfig) -> Image.Image:
    """The picture to edit, when it and every file that goes with it can be used. Raises as the files do."""
    picture = images.load_image(config.image, max_pixels=config.max_pixels, background=config.background)
    if config.mask:
        from ip2p.pictures.masks import load_mask  # imports torch

        load_mask(config.mask, picture.size, max_pixels=config.max_pixels)
    if config.control_image:
        images.load_image(config.control_image, max_pixels=config.max_pixels, background="white")
    check_models(config)
    return picture


def check_models(config: EditConfig | GridConfig) -> None:
    """Raise ModelError for a LoRA file that cannot be used: the model's weights take long to read."""
    if config.lora:
        from ip2p.models.lora import check_loras  # imports torch

        check_loras([parse_lora(text) for text in config.lora])


def load_editor(config: EditConfig | GridConfig) -> Editor:
    from ip2p.editing.editor import Editor  # imports torch

    return Editor.load(
        config.model,
        device=config.device,
        dtype=config.dtype,
        revision=config.revision,
        weights=config.weights,
        vae=config.vae,
        parts_from=config.parts_from,
        loras=config.lora,
        controlnet=config.controlnet,
        memory=config.memory,
        compile=config.compile,
    )


def load_clip(config: EditConfig, *, optional: bool = False) -> Clip | None:
    """The CLIP that `--clip` names, else the model's own; None when there is neither and it is optional."""
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


def check_outputs(paths: Sequence[Path], config: EditConfig) -> None:
    for path in paths:
        images.check_output(path, overwrite=config.overwrite)


def output_paths(config: EditConfig, count: int | None = None) -> list[Path]:
    """`out`, or out-1, out-2, … for several; IMAGE-edited where `out` is a folder or not given."""
    source = local_path(config.image)
    suffix = source.suffix if source.suffix.lower() in images.WRITES else ".png"
    # The steps of a chain have a name of their own: they are no choice of results.
    name = "chain" if config.then else "edited"
    out = place(config.out, source, f"{source.stem}-{name}{suffix}")
    return numbered(out, config.count if count is None else count)


def local_path(image: str) -> Path:
    """The path of a picture; of an address, its file name in the current folder."""
    return Path(file_name(image)) if is_url(image) else Path(image)


def place(out: Path | None, source: Path, name: str) -> Path:
    """`out`; or `name` in it where it is a folder, or beside `source` where nothing is given."""
    if out is None:
        return source.with_name(name)
    return out / name if out.is_dir() else out


def numbered(path: Path, count: int) -> list[Path]:
    """The path itself for one, path-1, path-2, … for several."""
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{k}{path.suffix}") for k in range(1, count + 1)]


def print_json(config: EditConfig, **said: object) -> None:
    if config.print_json:
        print(json.dumps({**said, "settings": config.as_dict()}, indent=2, ensure_ascii=False))
