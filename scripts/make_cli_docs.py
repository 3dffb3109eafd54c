"""Write docs/cli.md from the configs; with --check, fail when it is not what would be written."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
from pathlib import Path

from ip2p.cli import main as cli
from ip2p.cli.options import hidden_settings

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
HEAD = """\
# The command line

<!-- Made by scripts/make_cli_docs.py from the settings classes; write there, then `make docs`. -->

A setting comes from the flag, else from an `IP2P_*` variable (`IP2P_STEPS=30`), else from the verb's
table in `ip2p.toml` (in the working folder, or `--config FILE`), else from the default shown here.

```toml
[edit]
steps = 30
image-cfg = 1.2
lora = ["style.safetensors:0.8"]

[storybook.draw]
size = 512
```

Results go to stdout, all else to stderr; there is no progress bar without a terminal, no colour with
`NO_COLOR`. `HF_HOME`, `HF_HUB_OFFLINE` and `HF_TOKEN` mean what they mean elsewhere.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | a bug in ip2p |
| 2 | a picture, instruction or option that cannot be used |
| 3 | a model that is missing, unreadable or of the wrong kind, or the network that is needed for it |
| 4 | out of memory, disk or time |
| 130, 143 | stopped by Ctrl-C, by SIGTERM; no half-written file is left |

## Many pictures

```sh
ip2p edit photos "make it snow" -o snow                   # the pictures in a folder, not in its folders
ip2p edit 'photos/**/*.jpg' "make it snow" -o snow        # a glob, in quotes
ip2p edit a.png b.jpg c.webp "make it snow" -o snow       # the instruction comes last
```

Results have the names of the pictures (GIF and others that are not written become NAME.png). Sizes may be
mixed; pictures of one working size go through the network together (`--batch-size`), while others are read
and written (`--jobs`). A picture that cannot be edited stops nothing: its error is told at the end, and the
exit code is 2.

Stopped or killed at any time, the same command goes on: what lies whole in the folder is not made again. The
folder's `manifest.jsonl` is the truth, with the checksum of each result and of the picture it was made from;
`run.json` has the settings. With other settings the command is refused and says which one differs;
`--overwrite` begins anew.
"""


KEYS = "| key | meaning |\n|---|---|\n"


def page() -> str:
    """The whole page: the head, then every verb's help as the terminal shows it."""
    os.environ["COLUMNS"] = "100"
    parts = [HEAD]
    with tempfile.TemporaryDirectory() as empty:  # no ip2p.toml there, so the defaults are the code's
        os.chdir(empty)
        for name in [name for name in os.environ if name.startswith("IP2P_")]:
            del os.environ[name]
        for verb in cli.VERBS:
            shown = io.StringIO()
            with contextlib.redirect_stdout(shown):
                cli.parse(verb, ["--help"])
            text = "\n".join(line.rstrip() for line in shown.getvalue().strip().splitlines())
            parts.append(f"\n## ip2p {verb}\n\n```text\n{text}\n```\n")
            hidden = list(hidden_settings(cli.config_class(verb)))
            if hidden:
                rows = "".join(f"| `{name}` | {words} |\n" for name, words in hidden)
                parts.append(f"\nKeys for a settings file or an `IP2P_*` variable alone:\n\n{KEYS}{rows}")
        os.chdir(PAGE.parent)
    return "".join(parts)


if __name__ == "__main__":
    text = page()
    if "--check" in sys.argv[1:]:
        if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
            sys.exit(f"{PAGE} is not up to date; write it anew: make docs")
    else:
        PAGE.write_text(text, encoding="utf-8")
