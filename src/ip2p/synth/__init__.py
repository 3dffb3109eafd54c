"""Generates training data: text edits by a language model, image pairs by Prompt-to-Prompt, filtering.

The names below are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ip2p.synth.captions import read_captions
    from ip2p.synth.filter import Thresholds, filter_pairs
    from ip2p.synth.instruct import LocalWriter
    from ip2p.synth.pairs import PairMaker
    from ip2p.synth.records import Triple, read_triples, write_triples
    from ip2p.synth.server import ServerWriter
    from ip2p.synth.tune import tune_lm

_PLACES = {
    "LocalWriter": "instruct",
    "PairMaker": "pairs",
    "ServerWriter": "server",
    "Thresholds": "filter",
    "Triple": "records",
    "filter_pairs": "filter",
    "read_captions": "captions",
    "read_triples": "records",
    "tune_lm": "tune",
    "write_triples": "records",
}
__all__ = [
    "LocalWriter",
    "PairMaker",
    "ServerWriter",
    "Thresholds",
    "Triple",
    "filter_pairs",
    "read_captions",
    "read_triples",
    "tune_lm",
    "write_triples",
]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(f"ip2p.synth.{_PLACES[name]}"), name)
    raise AttributeError(f"module 'ip2p.synth' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
