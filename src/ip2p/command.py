"""What the verbs do around the functions they call: files in, files out."""

from __future__ import annotations

import dataclasses
import json
import logging
import typing
from pathlib import Path

from ip2p import config as configs
from ip2p import images, infotext
from ip2p.config import BuildConfig, EditConfig
from ip2p.errors import InputError
from ip2p.files import make_folder, write_text
from ip2p.terminal import progress

log = logging.getLogger("ip2p")


def edit(config: EditConfig) -> None:
    """Edit one picture `config.count` times; the paths of the results go to stdout.

    All that can be wrong with the input, the output and the numbers is told before a model is loaded.
    """
    if not config.image:
        raise InputError('no picture is named; write: ip2p edit page.png "make it night"')
    if not config.instruction.strip():
        raise InputError(
            'the instruction is empty; say what to change, as in: ip2p edit page.png "make it night"'
        )
    picture = images.load_image(config.image, max_pixels=config.max_pixels)
    paths = output_paths(config)
    for path in paths:
        images.check_output(path, overwrite=config.overwrite)

    from ip2p.editor import Editor  # imports torch

    editor = Editor.load(config.model, device=config.device, dtype=config.dtype)
    made = []
    at_once = config.batch_size or editor.batch_size
    with progress("editing", config.steps * -(-len(paths) // at_once)) as advance:
        for start in range(0, len(paths), at_once):
            batch = paths[start : start + at_once]
            seeds = [config.seed + start + i for i in range(len(batch))]
            results = editor.edit(
                picture,
                config.instruction,
                text_cfg=config.text_cfg,
                image_cfg=config.image_cfg,
                steps=config.steps,
                sampler=config.sampler,
                spacing=config.spacing,
                seeds=seeds,
                negative=config.negative,
                size=config.size,
                batch_size=len(seeds),
                callback=lambda step, steps, latents: advance(),
            )
            for path, seed, result in zip(batch, seeds, results, strict=True):
                images.save_image(result, path, overwrite=config.overwrite)
                made.append(
                    {"file": str(path), "seed": seed, "parameters": result.info.get("parameters", "")}
                )
                if not config.json:
                    print(path, flush=True)
    if config.json:
        print(
            json.dumps({"outputs": made, "settings": configs.as_dict(config)}, indent=2, ensure_ascii=False)
        )


def output_paths(config: EditConfig) -> list[Path]:
    """`out`, or out-1, out-2, … for several; IMAGE-edited where `out` is a folder or not given."""
    source = Path(config.image)
    suffix = source.suffix if source.suffix.lower() in images.WRITES else ".png"
    default = f"{source.stem}-edited{suffix}"
    if config.out is None:
        out = source.with_name(default)
    else:
        out = config.out / default if config.out.is_dir() else config.out
    if config.count == 1:
        return [out]
    return [out.with_name(f"{out.stem}-{k}{out.suffix}") for k in range(1, config.count + 1)]


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
    )


def storybook_build(config: BuildConfig) -> None:
    """Train into `config.out`, or go on there; `run.json` beside the model says with what."""
    make_folder(config.out)
    write_text(config.out / "run.json", configs.run_json(config))
    bundle = config.bundle or config.out / "bundle"

    from ip2p.build import run  # imports torch

    run(
        config.preset,
        config.out,
        seconds=config.seconds,
        stage=config.stage,
        device=config.device,
        steps=config.steps,
        start=config.start,
        bundle=bundle,
    )
    print(bundle)


def grid(config: configs.GridConfig) -> None:
    """Draw the results over two settings as one picture."""
    raise NotImplementedError
