"""Prune, then quantise: size and perplexity of models at 16, 8 and 4 bits, in a real llama.cpp.

    python examples/benchmarks/benchmark_quantised.py MODEL ... --text FILE ... [--kinds F16 Q8_0 Q4_0]

Each model is written as a GGUF file and quantised by llama.cpp itself, which then reads the held-out text: what it
says is what it does when it serves the model. `make llama-cpp` installs it. Give widths that are multiples of 32
(`--round-to 32`): llama.cpp keeps a matrix in more bits whose rows are not. Rows of only 32 values, as tiny models
have, give NaN at 8 bits on CPUs with AMX (seen with node-llama-cpp 3.22.1).
"""

from __future__ import annotations

import math
from argparse import ArgumentParser
from pathlib import Path
from tempfile import TemporaryDirectory

import llama_cpp
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_structprune import DomainConfig, export_gguf
from optimum_structprune.evaluation.heldout import read_heldout


def perplexity(file: Path, samples: list[list[int]]) -> float:
    """The perplexity of a GGUF file over samples of token ids."""
    losses = [-token["logprob"] for row in llama_cpp.ask(file, ids=samples)["logprobs"] for token in row]
    return math.exp(sum(losses) / len(losses))


def main(argv: list[str] | None = None) -> None:
    """Print one line for each model and kind."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", help="folders of the dense and of pruned models")
    parser.add_argument(
        "--text", nargs="+", required=True, metavar="FILE", help="held-out text, as DomainConfig takes it"
    )
    parser.add_argument("--kinds", nargs="+", default=["F16", "Q8_0", "Q4_0"], choices=["F16", *llama_cpp.FILE_TYPES])
    parser.add_argument("--num-samples", type=int, default=4)
    parser.add_argument("--seq-length", type=int, default=256)
    args = parser.parse_args(argv)
    if (reason := llama_cpp.missing()) is not None:
        raise SystemExit(f"llama.cpp cannot run: {reason}")

    names = [Path(text).stem for text in args.text]
    print(f"| model | kind | MB | {' | '.join(names)} |\n|{'---|' * (3 + len(names))}")
    for model in args.models:
        tokenizer = AutoTokenizer.from_pretrained(model)
        texts = [
            read_heldout(DomainConfig(name=name, source=text), tokenizer, args.seq_length, args.num_samples).samples
            for name, text in zip(names, args.text, strict=True)
        ]
        with TemporaryDirectory() as folder:
            whole, small = Path(folder, "whole.gguf"), Path(folder, "small.gguf")
            export_gguf(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float16), whole, tokenizer)
            for kind in args.kinds:
                if kind != "F16":
                    llama_cpp.quantize(whole, small, kind)
                file = whole if kind == "F16" else small
                values = " | ".join(f"{perplexity(file, samples.tolist()):.2f}" for samples in texts)
                print(f"| {Path(model).name} | {kind} | {file.stat().st_size / 1e6:.1f} | {values} |", flush=True)


if __name__ == "__main__":
    main()
