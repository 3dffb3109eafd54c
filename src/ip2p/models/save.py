"""Writes a trained editor as a diffusers folder with a model card."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ip2p.base.errors import ModelError
from ip2p.models.bundle import Bundle, is_hub_model
from ip2p.models.export import Item, folder_name, write_folder
from ip2p.models.load import NETWORKS, SECOND, empty_network, pipeline_index, texts_of

# Text encoders written with the prefix `text_model.`, which every version of transformers reads.
PREFIXED = ("text_encoder", "text_encoder_2")
# The fields of a scheduler's config that describe the noise in training, not the sampling.
NOISE = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"),
    *("prediction_type", "rescale_betas_zero_snr"),
)
EULER = "EulerAncestralDiscreteScheduler"


def save_editor(
    bundle: Bundle,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float16,
    unet_state: Mapping[str, Tensor] | None = None,
    card: Mapping[str, Any] | None = None,
    readme: str = "",
    files: Mapping[str, Path] | None = None,
    shard: int = 5 * 10**9,
) -> None:
    """Write an editor atomically; it replaces all contents of `folder`.

    unet_state: weights to write instead of the UNet's own, such as the EMA or `lora.merged`. card: fields of
    `ip2p.json`, in addition to or instead of the base's. files: further files by name, such as the card's
    picture. dtype: of all weights. shard: maximum bytes per weight file. Raises ModelError for weights that
    do not belong to the UNet.
    """
    networks = {name: network for name in NETWORKS if (network := getattr(bundle, name)) is not None}
    tokenizers = {name: getattr(bundle, name) for name in ("tokenizer", SECOND[1]) if getattr(bundle, name)}
    own = {key: value for key, value in asdict(bundle.card).items() if value is not None and key != "name"}
    # The base's own CLIP, which ranks results (`ip2p edit --best`).
    clip = bundle.folder / "clip"
    write_editor(
        folder,
        networks,
        tokenizers,
        edit_scheduler(bundle.scheduler_config),
        dtype=dtype,
        states={} if unet_state is None else {"unet": unet_state},
        card={"name": folder.name, **own, **(card or {})},
        index={"force_zeros_for_empty_prompt": bundle.zero_empty_text} if bundle.kind == "sdxl" else {},
        readme=readme,
        files={**({"clip": clip} if clip.is_dir() else {}), **(files or {})},
        shard=shard,
    )


def write_editor(
    folder: Path,
    networks: Mapping[str, nn.Module],
    tokenizers: Mapping[str, Any],
    scheduler: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    states: Mapping[str, Mapping[str, Tensor]] | None = None,
    card: Mapping[str, Any],
    index: Mapping[str, Any] | None = None,
    readme: str = "",
    files: Mapping[str, Path] | None = None,
    shard: int | None = None,
) -> None:
    """Write networks, by the names of their parts, as a diffusers folder; otherwise as `save_editor`.

    A part that no pipeline knows, such as `clip`, is written too. states: weights to write instead of a
    network's own. index: further fields of `model_index.json`. No path of this machine is written. Raises
    ModelError.
    """
    configs = {name: _config(network) for name, network in networks.items()}
    configs["scheduler"] = portable_config(scheduler)
    parts = {
        name: _items(name, network, (states or {}).get(name), configs[name], dtype)
        for name, network in networks.items()
    }
    configs["model_index"] = pipeline_index(configs) | _version() | dict(index or {})
    write_folder(
        folder,
        configs,
        parts,
        {name: _texts(tokenizer) for name, tokenizer in tokenizers.items()},
        card=dict(card),
        texts={"README.md": readme} if readme else {},
        files=files,
        shard=shard,
    )


def edit_scheduler(config: Mapping[str, Any]) -> dict[str, Any]:
    """The scheduler of an editor: the released sampler and spacing, with the base's noise schedule.

    A base's own scheduler (PNDM with leading steps) starts below the maximum noise of the training.
    """
    name = str(config.get("_class_name", ""))
    if name == EULER or name.startswith("EDM"):
        return dict(config)
    noise = {key: config[key] for key in NOISE if key in config}
    # diffusers' ancestral sampler does not take a network that predicts x0.
    name = "EulerDiscreteScheduler" if config.get("prediction_type") == "sample" else EULER
    return {"_class_name": name, "timestep_spacing": "linspace", "steps_offset": 0, **noise, **_version()}


def portable_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A part's config without this machine's paths, in fp32.

    transformers loads in the config's dtype and diffusers in fp32, so another dtype would mix the two.
    """
    kept = {
        key: portable_config(value) if isinstance(value, dict) else value for key, value in config.items()
    }
    return {
        key: "float32" if key in ("dtype", "torch_dtype") else value
        for key, value in kept.items()
        if key not in ("_name_or_path", "name_or_path", "_use_default_values", "_commit_hash")
    }


def _version() -> dict[str, Any]:
    import diffusers

    return {"_diffusers_version": diffusers.__version__}


def _config(network: Any) -> dict[str, Any]:
    if hasattr(network, "to_json_string"):  # diffusers' own
        return portable_config(json.loads(network.to_json_string()))
    text = json.loads(network.config.to_json_string())
    return portable_config(text | {"architectures": [type(network).__name__], "dtype": "float32"})


def _items(
    part: str,
    network: nn.Module,
    state: Mapping[str, Tensor] | None,
    config: Mapping[str, Any],
    dtype: torch.dtype,
) -> list[Item]:
    weights: Mapping[str, Tensor] = network.state_dict() if state is None else state
    if part == "unet":
        expected = {name: tensor.shape for name, tensor in empty_network(part, config).state_dict().items()}
        wrong = sorted(expected.keys() ^ weights.keys())
        wrong += [name for name in expected if name in weights and weights[name].shape != expected[name]]
        if wrong:
            raise ModelError(
                f"{len(wrong)} weights are not the UNet's, {wrong[0]} first. Save a UNet of its own config, "
                "with any LoRA merged."
            )
    items = []
    for name, tensor in weights.items():
        number = dtype if tensor.is_floating_point() else tensor.dtype
        written = folder_name(name, part, PREFIXED)
        items.append(Item(written, tuple(tensor.shape), number, partial(tensor.to, number)))
    return items


def _texts(tokenizer: Any) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer.save_pretrained(temporary)
        texts = texts_of(Path(temporary))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if name in texts:
            texts[name] = (
                json.dumps(portable_config(json.loads(texts[name])), indent=2, ensure_ascii=False) + "\n"
            )
    return with_word_lists(texts)


def with_word_lists(texts: Mapping[str, str]) -> dict[str, str]:
    """A tokenizer's files with `vocab.json` and `merges.txt`, which transformers 4 needs.

    transformers 5 writes only `tokenizer.json`, which contains both.
    """
    if "tokenizer.json" not in texts or {"vocab.json", "merges.txt"} <= texts.keys():
        return dict(texts)
    model = json.loads(texts["tokenizer.json"]).get("model", {})
    words, merges = model.get("vocab"), model.get("merges")
    if not isinstance(words, dict) or not isinstance(merges, list):
        return dict(texts)  # another type of tokenizer
    lines = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    return {
        "vocab.json": json.dumps(words, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *lines]) + "\n",
    } | dict(texts)


# --- the card ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Data:
    """Training data: `rows` pairs were used, `quarantined` broken ones were skipped.

    name: as the user typed it. license: the hub's identifier, or None if unknown.
    """

    name: str
    rows: int | None = None
    quarantined: int = 0
    license: str | None = None


def model_card(
    *,
    name: str,
    base: str | None,
    data: Sequence[Data],
    recipe: Mapping[str, Any],
    kind: str = "sd",
    native_size: int = 512,
    text_cfg: float = 7.5,
    image_cfg: float = 1.5,
    curves: Sequence[Mapping[str, float]] = (),
    picture: str | None = None,
    license: str | None = None,
    base_license: str | None = None,
    lora: str | None = None,
    notes: str = "",
    distilled: bool = False,
) -> str:
    """The README.md of a trained editor, with the hub's metadata header.

    base: the model that training started from, or None for a randomly initialized UNet. recipe: every setting
    by name. curves: the validation metrics, a row per validation, with its `step`. picture, lora: file names
    in the folder. distilled: its UNet takes the guidance scales, which diffusers' pipeline does not pass.
    Paths are cut to their last part, since the card is for other machines.
    """
    from huggingface_hub import ModelCardData

    header = ModelCardData(
        license=license or "unknown",
        base_model=base if base and _on_hub(base) else None,
        datasets=[one.name for one in data if _on_hub(one.name)] or None,
        tags=["instruct-pix2pix", "image-editing", "ip2p", *(["lora"] if lora else [])],
        pipeline_tag="image-to-image",
        library_name="diffusers",
    ).to_yaml()
    start = _here(base) if base else "nothing: its UNet began as noise"
    rows = [
        [
            _here(one.name),
            "not counted" if one.rows is None else str(one.rows),
            str(one.quarantined),
            one.license or "not stated",
        ]
        for one in data
    ]
    sections = [
        f"---\n{header}\n---",
        f"# {name}",
        "Edits a picture as an instruction says "
        "([InstructPix2Pix](https://arxiv.org/abs/2211.09800)). "
        f"{'Distilled' if distilled else 'Trained'} with ip2p from {start}.",
        *([notes] if notes else []),
        "## Use",
        f'```sh\nip2p edit photo.jpg "make it snow" --model {name}\n```',
        *(
            ["diffusers opens its networks, but no pipeline there passes two guidance scales to the UNet."]
            if distilled
            else [
                "With diffusers:",
                f"```python\n{_snippet(name, kind, native_size, text_cfg, image_cfg)}```",
            ]
        ),
        f"It was trained at {native_size} pixels; pictures near that size come out best.",
        *([f"`{lora}` is the LoRA alone, for {start}: `--lora {lora}`."] if lora else []),
        "## Data",
        _table(["data", "pairs", "left out as broken", "licence"], rows) if rows else "None is named.",
        "## Recipe",
        _table(["setting", "value"], [[key, _here(value)] for key, value in recipe.items()]),
    ]
    if curves or picture:
        sections.append("## Validation")
    if curves:
        columns = list(dict.fromkeys(key for row in curves for key in row))
        cells = [[_number(row[key]) if key in row else "" for key in columns] for row in curves]
        sections.append(_table(columns, cells))
    if picture:
        sections.append(f"![Validation while it was trained]({picture})")
    sections += [
        "## Licences",
        _table(
            ["of", "licence"],
            [
                ["this model", license or "not stated"],
                ["its base", (base_license or "not stated") if base else "there is none"],
                *[[f"data: {_here(one.name)}", one.license or "not stated"] for one in data],
            ],
        ),
        "A model may be used only as its base and its data allow; what is not stated has to be looked up.",
    ]
    return "\n\n".join(sections) + "\n"


def _snippet(name: str, kind: str, native_size: int, text_cfg: float, image_cfg: float) -> str:
    pipeline = f"StableDiffusion{'XL' if kind == 'sdxl' else ''}InstructPix2PixPipeline"
    return (
        f"from diffusers import {pipeline}\n"
        "from PIL import Image\n\n"
        f'editor = {pipeline}.from_pretrained("{name}")\n'
        'picture = Image.open("photo.jpg").convert("RGB")\n'
        f"picture.thumbnail(({native_size}, {native_size}))  # larger takes far more time and memory\n"
        "edited = editor(\n"
        '    "make it snow", image=picture,\n'
        f"    guidance_scale={text_cfg:g}, image_guidance_scale={image_cfg:g},\n"
        # SDXL's pipeline makes pictures square by default.
        + ("    height=picture.height, width=picture.width,\n" if kind == "sdxl" else "")
        + ").images[0]\n"
        'edited.save("snow.png")\n'
    )


def _on_hub(name: str) -> bool:
    return not Path(name).expanduser().exists() and is_hub_model(name)


def _here(value: Any) -> str:
    """A value as text, without the folders of this machine."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_here, value))
    if isinstance(value, float):
        return _number(value)
    text = str(value)
    path = Path(text).expanduser()
    return path.name if path.is_absolute() and path.name else text


def _number(value: float) -> str:
    return f"{value:.5g}" if math.isfinite(value) else str(value)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(columns), line(["---"] * len(columns)), *map(line, rows)])
