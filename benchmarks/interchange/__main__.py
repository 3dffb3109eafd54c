"""Open a folder that ip2p wrote with transformers 4, in an environment of its own.

    python -m benchmarks.interchange FOLDER
    python -m benchmarks.interchange FOLDER --python OTHER/bin/python

Installs transformers 4 into a temporary folder, which a second process puts before the packages of this one.
With --python, the second process runs in an environment that has torch and transformers 4. There the
tokenizers (fast and slow) and the text encoders are loaded, and their results are compared with ours.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGES = ("transformers>=4.50,<5", "tokenizers>=0.21,<0.23", "huggingface_hub>=0.30,<1")
TEXTS = ("make it night", "a café at 7:30 — won't it?", "turn the sky purple, please")
# Runs under transformers 4: prints the ids and the sums of hidden states as JSON.
READER = """
import json, sys
import torch, transformers
assert transformers.__version__.startswith("4."), transformers.__version__
folder, texts = sys.argv[1], json.loads(sys.argv[2])
slow = transformers.CLIPTokenizer.from_pretrained(folder + "/tokenizer")
fast = transformers.CLIPTokenizerFast.from_pretrained(folder + "/tokenizer")
encoder = transformers.CLIPTextModel.from_pretrained(folder + "/text_encoder", torch_dtype=torch.float32)
ids = [slow(text).input_ids for text in texts]
assert ids == [fast(text).input_ids for text in texts]
batch = slow(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
with torch.no_grad():
    hidden = encoder(batch)[0]
print(json.dumps({"version": transformers.__version__, "ids": ids, "hidden": hidden.double().tolist()}))
"""


def main() -> None:
    """Print the largest difference; exit with 1 if the ids differ or a hidden state by more than 1e-4."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a model's folder in the diffusers format")
    parser.add_argument(
        "--installed", type=Path, help="a folder with transformers 4 in it; none is installed"
    )
    parser.add_argument(
        "--python", help="the interpreter of an environment with torch and transformers 4; none is installed"
    )
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = settings.installed or Path(temporary)
        if settings.installed is None and settings.python is None:
            command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(place)]
            subprocess.run([*command, *PACKAGES], check=True)
        theirs = read_with(settings.folder, settings.python, place)
    ids, hidden = read_here(settings.folder)
    import torch

    far = (torch.tensor(theirs["hidden"], dtype=torch.float64) - hidden).abs().max().item()
    same = ids == theirs["ids"]
    verdict = "equal" if same else "differ"
    print(f"transformers {theirs['version']}: ids {verdict}, hidden states within {far:.1e}")
    sys.exit(0 if same and far < 1e-4 else 1)


def read_with(folder: Path, python: str | None, packages: Path) -> dict:
    """What transformers 4 of the interpreter `python`, or else of `packages`, reads from the folder."""
    path = "" if python else os.pathsep.join([str(packages), os.environ.get("PYTHONPATH", "")])
    words = [python or sys.executable, "-c", READER, str(folder.resolve()), json.dumps(TEXTS)]
    done = subprocess.run(words, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"transformers 4 cannot read {folder}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def read_here(folder: Path):  # type: ignore[no-untyped-def]
    """The ids of the texts, and their hidden states [text, token, feature]."""
    import torch

    from ip2p.models.bundle import load_bundle

    bundle = load_bundle(folder)
    batch = bundle.tokenizer(
        list(TEXTS), padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        hidden = bundle.text_encoder(batch)[0].double()
    return [bundle.tokenizer(text).input_ids for text in TEXTS], hidden


if __name__ == "__main__":
    main()
