"""How good the training data is, measured on storybook edits, whose exact results are known.

    python -m benchmarks.data_quality quality|choose|ways|paper   the pairs of `ip2p synth pairs`
    python -m benchmarks.data_quality language-model              the edits in words
    python -m benchmarks.data_quality auto-mask                   the regions that `--auto-mask` finds
    python -m benchmarks.data_quality ablation                    editors trained with and without the filter

Each has --help.
"""

from __future__ import annotations

import argparse
import importlib

from benchmarks.common import new_parser

PAIRS = ("quality", "choose", "ways", "paper")
OTHERS = ("language-model", "auto-mask", "ablation")


def main(words: list[str] | None = None) -> None:
    first = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    first.add_argument("verb", choices=(*PAIRS, *OTHERS))
    first.add_argument("options", nargs=argparse.REMAINDER)
    chosen = first.parse_args(words)
    name = "pairs" if chosen.verb in PAIRS else chosen.verb.replace("-", "_")
    module = importlib.import_module(f"benchmarks.data_quality.{name}")
    parser = new_parser(module.__doc__)
    module.add_options(parser, *([chosen.verb] if chosen.verb in PAIRS else []))
    args = parser.parse_args(chosen.options)
    args.run(args)


if __name__ == "__main__":
    main()
