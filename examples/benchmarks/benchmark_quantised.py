"""Prune, then quantise: bytes and perplexity of models at 16 bits and fewer, in a real llama.cpp.

    python examples/benchmarks/benchmark_quantised.py DENSE PRUNED ... --heldout FILE ... [--other FILE ...]
        [--kinds Q8_0 Q4_0] [--num-samples 8] [--torch]

Each model is written as a GGUF file and quantised by llama.cpp itself, which then reads the text: what it says is what
it does when it serves the model. `make llama-cpp` installs it. With `--torch` transformers reads the quantised weights
and computes in fp32, which is three times as fast on one core; llama.cpp rounds activations too, which costs another
percent of perplexity. Perplexity is per token of the dense tokenizer, as a multiple of the dense model's at F16 on the
same samples, so that models with fewer tokens compare; ± is the standard error over samples. `--other` is text of
kinds that nothing was calibrated on. "Q4_0 pure" has all matrices in four bits, where "Q4_0" keeps the embedding in
more.

Give widths that are multiples of 32 (of 256 for K-quants): llama.cpp keeps a matrix in more bits whose rows are not.
Rows of only 32 values, as tiny models have, give NaN at 8 bits on CPUs with AMX (seen with node-llama-cpp 3.22.1).
"""

from __future__ import annotations

import math
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import llama_cpp
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from optimum_structprune import DomainConfig, export_gguf
from optimum_structprune.domains.packing import Passages
from optimum_structprune.evaluation.heldout import read_heldout
from optimum_structprune.forward.metrics import margin_of_error, row_losses


def read(file: Path) -> PreTrainedModel:
    """The quantised model, which computes in fp32."""
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)


def losses(file: Path, rows: list[Tensor], in_torch: bool) -> Tensor:
    """The loss of each sample in nats."""
    if in_torch:
        return row_losses(read(file), rows)
    answers = llama_cpp.ask(file, ids=[row.tolist() for row in rows])["logprobs"]
    return torch.tensor([-sum(token["logprob"] for token in row) for row in answers], dtype=torch.float64)


def ratio(more: Tensor) -> str:
    """By what perplexity is multiplied where a token of each sample costs so many nats more."""
    value, error = float(more.mean().exp()), margin_of_error(more)
    return f"{value:.3f}" + ("" if math.isnan(error) else f" ± {value * error:.3f}")  # too few samples have none


def files(model: PreTrainedModel, tokenizer, kinds: list[str]) -> Iterator[tuple[str, Path]]:
    """A GGUF file of each kind, while it is there."""
    with TemporaryDirectory() as folder:
        whole, small = Path(folder, "whole.gguf"), Path(folder, "small.gguf")
        export_gguf(model, whole, tokenizer)
        for kind in kinds:
            if kind != "F16":
                llama_cpp.quantize(whole, small, kind)
            yield kind, whole if kind == "F16" else small


def main(argv: list[str] | None = None) -> None:
    """Print one line for each model and kind."""
    kinds = ["F16", *llama_cpp.FILE_TYPES, *(f"{kind} pure" for kind in llama_cpp.FILE_TYPES)]
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", help="folders: the dense model, then pruned ones")
    parser.add_argument("--heldout", nargs="+", required=True, metavar="FILE", help="text, as DomainConfig takes it")
    parser.add_argument("--other", nargs="+", default=[], metavar="FILE", help="text of other kinds")
    parser.add_argument("--kinds", nargs="+", default=["Q8_0", "Q4_0"], choices=kinds)
    parser.add_argument("--num-samples", type=int, default=8, help="of each file")
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--torch", action="store_true", help="read the files in transformers, not in llama.cpp")
    args = parser.parse_args(argv)
    if (reason := llama_cpp.missing()) is not None:
        raise SystemExit(f"llama.cpp cannot run: {reason}")

    reader = AutoTokenizer.from_pretrained(args.models[0])
    texts, sizes = [], []
    for paths in (args.heldout, args.other):
        domains = [DomainConfig(name="text", source=path) for path in paths]
        samples = [read_heldout(of, reader, args.seq_length, args.num_samples).samples for of in domains]
        texts += [Passages([*of], reader) for of in samples]
        sizes.append(sum(map(len, samples)))
    print("| model | kind | MB | held-out | other kinds |\n|---|---|---|---|---|")
    dense = None
    for name in args.models:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float16)
        tokenizer = AutoTokenizer.from_pretrained(name)
        rows = [row for text in texts for row in text.rows(tokenizer, model)]
        for kind, file in files(model, tokenizer, args.kinds if dense is not None else ["F16", *args.kinds]):
            cost = losses(file, rows, args.torch) / (args.seq_length - 1)
            dense = cost if dense is None else dense
            values = " | ".join(ratio(group) for group in (cost - dense).split(sizes) if len(group))
            print(f"| {Path(name).name} | {kind} | {file.stat().st_size / 1e6:.1f} | {values} |", flush=True)


if __name__ == "__main__":
    main()
