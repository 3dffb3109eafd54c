"""The settings of `ip2p serve` and `ip2p ui`, each declared once."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from ip2p.base.errors import InputError
from ip2p.settings import (
    COMMON,
    MAX_COUNT,
    MAX_STEPS,
    MODEL,
    SERVER_PIXELS,
    WORKERS,
    CompileSettings,
    DeviceSettings,
    DTypeSettings,
    MemorySettings,
    PartsSettings,
    RaySettings,
    RunSettings,
    Texts,
    VaeSettings,
    setting,
)

Mark = Literal["iptc", "visible", "none"]
MIN_KEY = 16  # minimum characters of an API key, so that it cannot be guessed
ACCESS, LIMITS, RESULTS = "Access", "Limits", "Results"


class _Served(
    RunSettings,
    VaeSettings,
    PartsSettings,
    CompileSettings,
    MemorySettings,
    DTypeSettings,
    DeviceSettings,
):
    """Settings that `ip2p serve` and `ip2p ui` share."""

    port: int = setting(7860, "TCP port to listen on", ge=0, le=65535, group=COMMON)
    model: Texts = setting(
        ("storybook",),
        "model to serve, the default first; may be repeated",
        group=COMMON,
        metavar="[NAME=]MODEL",
    )
    tiny_vae: str | None = setting(
        None,
        "tiny autoencoder (TAESD) for previews: a folder or a Hugging Face id; default: the model's own",
        group=MODEL,
        metavar="MODEL",
        hidden=True,
    )
    max_pixels: int = setting(
        SERVER_PIXELS,
        "maximum size of a picture in pixels, checked before decoding",
        ge=1,
        le=2**40,
        group=LIMITS,
    )
    mark: Mark = setting(
        "iptc",
        "label results as AI-edited: iptc (a tag in the file), visible (also text in the picture) or none",
        group=RESULTS,
    )

    def models(self) -> dict[str, str]:
        """The models by their served names. Raises InputError if a name is used twice."""
        return parse_models(self.model)


class ServeConfig(RaySettings, _Served):
    """Serve the HTTP APIs and the web UI: ip2p serve --port 7860"""

    host: str = setting(
        "127.0.0.1",
        "address to listen on; 0.0.0.0 gives other machines access and requires an API key",
        group=COMMON,
    )
    api_key_file: Path | None = setting(
        None, "file with one API key per line; or set IP2P_API_KEY to one key", group=ACCESS, metavar="FILE"
    )
    public: bool = setting(False, "give other machines access without a key", group=ACCESS)
    allow_host: Texts = setting(
        (),
        "additional host name of the server; may be repeated",
        group=ACCESS,
        metavar="NAME",
    )
    allow_origin: Texts = setting(
        (),
        "origin of another page that may call the API, such as https://a.example; may be repeated",
        group=ACCESS,
        metavar="NAME",
    )
    max_steps: int = setting(150, "maximum sampling steps", ge=1, le=MAX_STEPS, group=LIMITS)
    max_count: int = setting(8, "maximum results per request", ge=1, le=MAX_COUNT, group=LIMITS)
    max_words: int = setting(
        2000, "maximum characters of an instruction", ge=1, le=10**6, group=LIMITS, hidden=True
    )
    max_mb: int = setting(64, "maximum size of a request in MB", ge=1, le=4096, group=LIMITS, hidden=True)
    queue: int = setting(64, "maximum number of waiting requests", ge=1, le=10**6, group=LIMITS)
    per_client: int = setting(
        16, "maximum requests of one client, waiting or running", ge=1, le=10**6, group=LIMITS, hidden=True
    )
    join: int | None = setting(
        None,
        "maximum number of pictures per network call; default: 4 on a CPU, else 8",
        ge=1,
        le=1024,
        example=8,
        group=MODEL,
        hidden=True,
    )
    keep_seconds: float = setting(600.0, "seconds to keep results", ge=1, le=1e9, group=RESULTS, hidden=True)
    store: Path | None = setting(None, "folder for results; default: a temporary one", group=RESULTS)
    store_mb: int = setting(
        1024,
        "maximum size of that folder; the oldest results are removed first",
        ge=1,
        le=10**9,
        group=RESULTS,
        hidden=True,
    )
    safety: str | None = setting(
        None,
        "image classifier that rejects unsafe results: a folder or a Hugging Face model id",
        group=RESULTS,
        metavar="MODEL",
    )
    drain_seconds: float = setting(
        30.0, "seconds to let running edits finish after SIGTERM or Ctrl-C", ge=0, le=86_400, hidden=True
    )
    replicas: int | None = setting(
        None,
        "number of Ray replicas, each with all models; default: one per GPU, else one",
        ge=1,
        le=4096,
        example=2,
        group=WORKERS,
    )
    replica_gpus: float | None = setting(
        None,
        "GPUs per replica; default: one if the cluster has any",
        ge=0,
        le=64,
        example=1.0,
        group=WORKERS,
        hidden=True,
    )
    replica_cpus: int = setting(
        1, "CPUs, and therefore threads, per replica", ge=1, le=1024, example=4, group=WORKERS, hidden=True
    )

    def check(self) -> None:
        """Raise InputError for invalid settings, and for access without a key unless --public is set."""
        self.models()
        if not is_loopback(self.host) and not self.public and not self.api_keys():
            raise InputError(
                f"--host {self.host} gives other machines access. Require an API key (set IP2P_API_KEY or "
                "--api-key-file FILE), or add --public."
            )
        for name in self.allow_host:
            if not name or set(name) & set("/@ ") or (":" in name and not is_address(name)):
                raise InputError(
                    f"--allow-host {name!r} is not a host name. Try --allow-host pictures.example.org."
                )
        for origin in self.allow_origin:
            scheme, colon, name = origin.partition("://")
            if scheme not in ("http", "https") or not colon or not name or set(name) & set("/@? "):
                raise InputError(
                    f"--allow-origin {origin!r} is not an origin. Try --allow-origin https://example.org."
                )
        for name in ("replicas", "replica_gpus", "replica_cpus"):
            if self.ray is None and getattr(self, name) != ServeConfig.model_fields[name].default:
                raise InputError(f"--{name.replace('_', '-')} requires --ray.")

    def api_keys(self, env: Mapping[str, str] = os.environ) -> tuple[str, ...]:
        """The keys in `--api-key-file`, or else the one in IP2P_API_KEY. Raises InputError for invalid keys.

        They are not settings, so they do not appear in `run.json` or in the process list.
        """
        if self.api_key_file is None:
            keys, source = [env["IP2P_API_KEY"]] if env.get("IP2P_API_KEY") else [], "IP2P_API_KEY"
        else:
            source = f"--api-key-file {self.api_key_file}"
            try:
                lines = self.api_key_file.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(
                    f"{source} cannot be read ({error}). It must contain one key per line."
                ) from None
            keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
            if not keys:
                raise InputError(f"{source} contains no key. Write one per line.")
        for key in keys:
            if len(key) < MIN_KEY or not key.isascii() or not key.isprintable() or " " in key:
                raise InputError(
                    f"a key of {source} is invalid: it needs at least {MIN_KEY} ASCII characters "
                    "without spaces. Try: openssl rand -hex 24"
                )
        return tuple(keys)


class UiConfig(_Served):
    """Edit in the browser: ip2p ui"""

    no_browser: bool = setting(False, "print the URL without opening it", group=COMMON)

    def check(self) -> None:
        """Raise InputError for invalid settings."""
        self.serving().check()

    def serving(self) -> ServeConfig:
        """The settings of the server, which listens only on this machine."""
        shared = set(ServeConfig.model_fields)
        return ServeConfig.read({name: value for name, value in self if name in shared})


def parse_models(listed: Sequence[str]) -> dict[str, str]:
    """Models by their served names, from NAME=MODEL or MODEL.

    Without NAME, a Hugging Face id is its own name, and a folder or a file is named after the last part of
    its path, without the suffix. Raises InputError if there is no model, if a name or a model is empty, or
    if a name is used twice.
    """
    models: dict[str, str] = {}
    for text in listed:
        name, equals, model = text.partition("=")
        if not equals:
            path, name, model = Path(text), text, text
            if path.suffix in (".safetensors", ".ckpt"):
                name = path.stem
            elif path.exists() or text.startswith((".", "/", "~")):
                name = path.resolve().name
        if not name.strip() or not model.strip():
            raise InputError(f"--model {text!r} names no model. Try --model mine=./my-editor.")
        if name in models:
            raise InputError(f"--model {text}: two models are called {name}. Try --model other={model}.")
        models[name] = model
    if not models:
        raise InputError("no model is named. Try --model storybook.")
    return models


def is_address(text: str) -> bool:
    """Whether `text` is an IP address, not a host name."""
    try:
        ipaddress.ip_address(text.strip("[]"))
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether a server that listens on `host` is reachable only from this machine."""
    return host == "localhost" or (is_address(host) and ipaddress.ip_address(host.strip("[]")).is_loopback)
