"""What the verbs do around the functions they call: files in, files out."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ip2p import config as configs
from ip2p.base.errors import InputError, ModelError
from ip2p.base.files import check_output
from ip2p.base.terminal import progress, say
from ip2p.config import EditConfig, GridConfig
from ip2p.editing import advice, chain
from ip2p.editing import batch as many
from ip2p.editing import grid as grids
from ip2p.pictures import images, infotext

if TYPE_CHECKING:
    from ip2p.editing.editor import Editor
    from ip2p.models.clip import Clip

log = logging.getLogger("ip2p")


def edit(config: EditConfig) -> None:
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
    picture = open_picture(config)
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
        if not config.json:
            print(path, flush=True)

    at_once = config.batch_size or editor.batch_size
    settings = editor.resolve(**edit_settings(config))
    with progress("editing", settings["steps"] * -(-config.count // at_once)) as advance:
        for start in range(0, config.count, at_once):
            seeds = [config.seed + k for k in range(start, min(start + at_once, config.count))]
            some = editor.edit(
                picture,
                config.instruction,
                seeds=seeds,
                batch_size=len(seeds),
                callback=lambda step, steps, latents: advance(),
                **settings,
            )
            for seed, result in zip(seeds, some, strict=True):
                sign(result, config)
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
    picture = open_picture(config)
    instructions = [config.instruction, *config.then]
    paths = output_paths(config, len(instructions))
    shown = numbered(config.show_mask, len(paths)) if config.show_mask else []
    check_outputs([*paths, *shown], config)
    if config.animation:
        check_output(config.animation, overwrite=config.overwrite)
    clip = load_clip(config, optional=True)
    editor = load_editor(config)
    frames, drifts, made = [picture], [], []
    settings = editor.resolve(**edit_settings(config))
    with progress("editing", settings["steps"] * len(instructions)) as advance:
        steps = chain.chain(
            editor,
            picture,
            instructions,
            seed=config.seed,
            from_original=config.from_original,
            callback=lambda step, steps, latents: advance(),
            **settings,
        )
        for k, step in enumerate(steps):
            sign(step.image, config)
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
            if not config.json:
                print(paths[k], flush=True)
    for line in chain.report(drifts, [path.name for path in paths]):
        say(line)
    if config.animation:
        chain.save_animation(frames, config.animation, frame_ms=config.frame_ms)
        if not config.json:
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
            say(f"{len(done)} of {len(tasks)} results lie in {folder} already")
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
                    if not config.json:
                        print(path, flush=True)

                def edit_some(some: Sequence[Image.Image], seeds: Sequence[int]) -> list[Image.Image]:
                    results = editor.edit_batch(
                        some, config.instruction, seeds=seeds, **edit_settings(config)
                    )
                    for result in results:
                        sign(result, config)
                    return results

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
            f"{len(failed)} of {len(pictures)} pictures could not be edited; the other results lie in "
            f"{folder}."
        )


def grid(config: GridConfig) -> None:
    """Draw the results over two settings as one picture; its path goes to stdout."""
    check_words(config, "grid")
    picture = images.load_image(config.image, max_pixels=config.max_pixels)
    source = Path(config.image)
    out = place(config.out, source, f"{source.stem}-grid.png")
    images.check_output(out, overwrite=config.overwrite)
    check_models(config)
    editor = load_editor(config)
    settings = editor.resolve(**edit_settings(config))
    scales = {name: settings[name] for name in ("text_cfg", "image_cfg")}
    axes = []
    for flag, text in (("--columns", config.columns), ("--rows", config.rows)):
        setting, values = configs.parse_axis(flag, text)
        axes.append(
            grids.Axis(
                setting=setting,
                values=values or grids.default_values(setting, **scales, seed=config.seed),
            )
        )
    columns, rows = axes
    with progress("editing", len(columns.values) * len(rows.values)) as advance:
        sheet = grids.draw(
            editor,
            picture,
            config.instruction,
            columns=columns,
            rows=rows,
            cell=config.cell,
            made=advance,
            seed=config.seed,
            # Its cells are small: the photograph's own pixels would not be seen.
            **settings | {"fit": "model"},
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


def open_picture(config: EditConfig) -> Image.Image:
    """The picture to edit, when it and every file that goes with it can be used. Raises as the files do."""
    picture = images.load_image(config.image, max_pixels=config.max_pixels)
    if config.mask:
        from ip2p.pictures.masks import load_mask  # imports torch

        load_mask(config.mask, picture.size, max_pixels=config.max_pixels)
    if config.control_image:
        images.load_image(config.control_image, max_pixels=config.max_pixels)
    check_models(config)
    return picture


def check_models(config: EditConfig | GridConfig) -> None:
    """Raise ModelError for a LoRA file that cannot be used: the model's weights take long to read."""
    if config.lora:
        from ip2p.models.lora import check_loras  # imports torch

        check_loras([configs.parse_lora(text) for text in config.lora])


def load_editor(config: EditConfig | GridConfig) -> Editor:
    from ip2p.editing.editor import Editor  # imports torch

    return Editor.load(
        config.model,
        device=config.device,
        dtype=config.dtype,
        revision=config.revision,
        weights=config.weights,
        vae=config.vae,
        loras=[configs.parse_lora(text) for text in config.lora],
        controlnet=getattr(config, "controlnet", None),
        memory=config.memory,
    )


def edit_settings(config: EditConfig | GridConfig) -> dict[str, Any]:
    """What `Editor.edit` is told beside the picture, the instruction and the seeds."""
    names = [
        *("text_cfg", "image_cfg", "steps", "sampler", "spacing", "negative", "size", "max_pixels"),
        *("text_cfg_rescale", "cfg_interval", "auto_mask"),
        *("mask", "mask_padding", "feather", "fit", "control_image", "control_scale"),
    ]
    return {name: getattr(config, name) for name in names if hasattr(config, name)}


def sign(result: Image.Image, config: EditConfig) -> None:
    """Add to the settings in a result what the editor was made from and the names of files that went in."""
    result.info["parameters"] = infotext.amend(
        result.info["parameters"],
        revision=config.revision,
        weights=config.weights,
        vae=config.vae,
        loras=config.lora,
        controlnet=config.controlnet,
        mask=_name(config.mask),
        control_image=_name(config.control_image),
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
    source = Path(config.image)
    suffix = source.suffix if source.suffix.lower() in images.WRITES else ".png"
    out = place(config.out, source, f"{source.stem}-edited{suffix}")
    return numbered(out, config.count if count is None else count)


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
    if config.json:
        print(json.dumps({**said, "settings": configs.as_dict(config)}, indent=2, ensure_ascii=False))


def _name(path: Path | None) -> str | None:
    return None if path is None else path.as_posix()


def with_settings(config: EditConfig, source: Path) -> EditConfig:
    """The config with the settings that the edited file `source` carries."""
    text = infotext.read_infotext(source)
    if text is None:
        raise InputError(f"{source} carries no settings; give a picture that ip2p edit wrote.")
    found = infotext.parse_infotext(text)
    samplers = typing.get_args(configs.SamplerName)
    if found.sampler not in samplers:
        raise InputError(
            f"{source} names the sampler {found.sampler!r}; --sampler takes {', '.join(samplers)}."
        )
    if found.fit not in typing.get_args(configs.Fit) or found.weights not in typing.get_args(configs.Weights):
        raise InputError(
            f"{source} has settings of another version of ip2p ({found.version}); write them out."
        )
    return dataclasses.replace(
        config,
        instruction=found.instruction,
        negative=found.negative,
        steps=found.steps,
        sampler=typing.cast(configs.SamplerName, found.sampler),
        text_cfg=found.text_cfg,
        image_cfg=found.image_cfg,
        seed=found.seed,
        size=found.size,
        spacing=typing.cast(configs.Spacing, found.spacing),
        model=found.model or config.model,
        text_cfg_rescale=found.text_cfg_rescale,
        cfg_interval=found.cfg_interval,
        mask=_path(found.mask),
        mask_padding=found.mask_padding,
        feather=found.feather,
        auto_mask=found.auto_mask,
        fit=typing.cast(configs.Fit, found.fit),
        revision=found.revision,
        weights=typing.cast(configs.Weights, found.weights),
        vae=found.vae,
        lora=found.loras,
        controlnet=found.controlnet,
        control_image=_path(found.control_image),
        control_scale=found.control_scale,
    )


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)
