"""Measure the bytes and the perplexity of quantized models, original and pruned, in a real llama.cpp.

    python examples/benchmarks/benchmark_quantized.py ORIGINAL PRUNED ... --heldout FILE ... [--other FILE ...]
        [--kinds Q8_0 Q4_0] [--num-samples 8] [--torch]

The script exports each model as a GGUF file. llama.cpp quantizes the file and then evaluates the text, so the figures
are those of a served model. `make llama-cpp` installs it. With `--torch`, transformers reads the quantized weights and
computes in fp32. This is three times as fast on one core. llama.cpp also rounds activations, which increases the
perplexity by another percent. Perplexity is per token of the original tokenizer and relative to the original model at
F16 on the same samples, so that models with fewer tokens are comparable. ± is the standard error over samples.
`--other` is unseen text. In "Q4_0 pure", all matrices have four bits. In "Q4_0", the embedding has more bits.

Use widths that are multiples of 32 (of 256 for K-quants). llama.cpp stores a matrix with other rows in more bits. Rows
of only 32 values, as in tiny models, produce NaN at 8 bits on CPUs with AMX (seen with node-llama-cpp 3.22.1).
"""

from __future__ import annotations

import math
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import llama_cpp
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from optimum_structprune import DomainConfig, export_gguf
from optimum_structprune.evaluation.heldout import read_heldout
from optimum_structprune.measure.losses import measure, totals
from optimum_structprune.measure.text import Text
from optimum_structprune.system.margins import margin_of_error


# The model in 16 bits.
FULL = "F16"


def read_gguf(file: Path) -> PreTrainedModel:
    """Read a quantized model, which computes in fp32."""
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)


def sample_losses(file: Path, rows: list[Tensor], in_torch: bool) -> Tensor:
    """Return the loss of each sample in nats."""
    if in_torch:
        return totals(measure(read_gguf(file), Text(rows)).loss)

    answer = llama_cpp.ask(file, ids=[row.tolist() for row in rows])
    losses = []
    for tokens in answer["logprobs"]:
        losses.append(-sum(token["logprob"] for token in tokens))
    return torch.tensor(losses, dtype=torch.float64)


def ratio_text(differences: Tensor) -> str:
    """Return the ratio of two perplexities with its standard error.

    Args:
        differences: The difference of the losses in nats per token, for each sample.
    """
    ratio = float(differences.mean().exp())
    error = margin_of_error(differences)
    if math.isnan(error):
        # Too few samples have no standard error.
        return f"{ratio:.3f}"
    return f"{ratio:.3f} ± {ratio * error:.3f}"


def gguf_files(model: PreTrainedModel, tokenizer, kinds: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """Yield each kind with its GGUF file. The file exists until the next step of the iteration."""
    with TemporaryDirectory() as folder:
        full = Path(folder, "full.gguf")
        quantized = Path(folder, "quantized.gguf")

        export_gguf(model, full, tokenizer)
        for kind in kinds:
            if kind == FULL:
                yield kind, full
            else:
                llama_cpp.quantize(full, quantized, kind)
                yield kind, quantized


def main(argv: list[str] | None = None) -> None:
    """Read the arguments and print one row for each model and kind."""
    kinds = [FULL]
    kinds += llama_cpp.FILE_TYPES
    kinds += [f"{kind} pure" for kind in llama_cpp.FILE_TYPES]

    parser = ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", help="folders of the original model and of pruned models")
    parser.add_argument(
        "--heldout", nargs="+", required=True, metavar="FILE", help="text, as a source of DomainConfig"
    )
    parser.add_argument("--other", nargs="+", default=[], metavar="FILE", help="text of other kinds")
    parser.add_argument("--kinds", nargs="+", default=["Q8_0", "Q4_0"], choices=kinds)
    parser.add_argument("--num-samples", type=int, default=8, help="samples of each file")
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--torch", action="store_true", help="read the files in transformers, not in llama.cpp")

    args = parser.parse_args(argv)

    reason = llama_cpp.missing()
    if reason is not None:
        raise SystemExit(f"llama.cpp cannot run: {reason}")

    original_tokenizer = AutoTokenizer.from_pretrained(args.models[0])
    texts = []
    sizes = []
    for paths in (args.heldout, args.other):
        size = 0
        for path in paths:
            domain = DomainConfig(name="text", source=path)
            samples = read_heldout(domain, original_tokenizer, args.seq_length, args.num_samples).samples
            texts.append(Text.of(samples, original_tokenizer))
            size += len(samples)

        sizes.append(size)

    print("| model | kind | MB | held-out | other kinds |\n|---|---|---|---|---|")
    original_losses = None
    for name in args.models:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float16)
        tokenizer = AutoTokenizer.from_pretrained(name)

        rows = []
        for text in texts:
            rows += text.for_tokenizer(tokenizer, model).rows

        model_kinds = list(args.kinds)
        if original_losses is None:
            model_kinds.insert(0, FULL)
        for kind, file in gguf_files(model, tokenizer, model_kinds):
            losses = sample_losses(file, rows, args.torch) / (args.seq_length - 1)
            if original_losses is None:
                original_losses = losses

            groups = (losses - original_losses).split(sizes)
            values = " | ".join(ratio_text(group) for group in groups if len(group))
            print(f"| {Path(name).name} | {kind} | {file.stat().st_size / 1e6:.1f} | {values} |", flush=True)


if __name__ == "__main__":
    main()
