"""Measure the quality of a model by the number of tokens in its vocabulary. All other weights stay the same.

    python examples/benchmarks/benchmark_vocabulary.py MODEL DATA --sizes 156928 131072 94592 [--samples 4] [--speed]
    python examples/benchmarks/benchmark_vocabulary.py MODEL DATA --folders PRUNED ... [--domains wiki code math]

DATA contains `calibration/`, `heldout/` and `unseen/` with one JSON-lines file per domain. Only the calibration text
determines the choice of tokens. Perplexity is per token of the original tokenizer and relative to the original model,
on the same text: held-out text is of the calibrated kinds, unseen text is of other kinds. With `--folders`, the script
measures pruned models on the same text. `--domains` names the kinds that these models were calibrated on.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from math import exp
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from optimum_structprune import DomainConfig, StructPruneConfig, StructPruner, measure_speed
from optimum_structprune.evaluation.heldout import read_heldout
from optimum_structprune.measure.losses import measure as measure_text
from optimum_structprune.measure.losses import totals
from optimum_structprune.measure.text import Text


# The values of each text, by folder and name.
Texts = Mapping[str, Mapping[str, Text]]
Losses = Mapping[str, Mapping[str, float]]


def domains_of(args: Namespace, folder: str) -> list[DomainConfig]:
    """Return the domains in a folder of DATA."""
    return [DomainConfig(name=path.stem, source=str(path)) for path in sorted(Path(args.data, folder).glob("*.jsonl"))]


def calibrated_domains(args: Namespace) -> list[DomainConfig]:
    """Return the calibration domains that `--domains` names, by default all."""
    domains = domains_of(args, "calibration")
    if args.domains:
        domains = [domain for domain in domains if domain.name in args.domains]
    return domains


def read_texts(args: Namespace, tokenizer) -> Texts:
    """Return the first samples of the unseen files, and of the held-out files of calibrated kinds."""
    kinds = {domain.name for domain in calibrated_domains(args)}
    domains = {
        "heldout": [domain for domain in domains_of(args, "heldout") if domain.name in kinds],
        "unseen": domains_of(args, "unseen"),
    }

    texts: dict[str, dict[str, Text]] = {}
    for folder, folder_domains in domains.items():
        texts[folder] = {}
        for domain in folder_domains:
            samples = read_heldout(domain, tokenizer, args.seq_length, args.samples).samples
            texts[folder][domain.name] = Text.of(samples, tokenizer)

    return texts


def mean_losses(model, tokenizer, texts: Texts) -> Losses:
    """Return the mean loss of a sample in nats for each text."""
    losses: dict[str, dict[str, float]] = {}
    for folder, folder_texts in texts.items():
        losses[folder] = {}
        for name, text in folder_texts.items():
            losses[folder][name] = float(totals(measure_text(model, text.for_tokenizer(tokenizer, model)).loss).mean())
    return losses


def relative_perplexities(args: Namespace, losses: Losses, original_losses: Losses) -> dict[str, float]:
    """Return the perplexity relative to the original model, by folder."""
    ratios = {}
    for folder, by_name in original_losses.items():
        difference = fmean(losses[folder][name] - loss for name, loss in by_name.items())
        ratios[folder] = exp(difference / (args.seq_length - 1))
    return ratios


def trim(args: Namespace, model, tokenizer, size: int, texts: Texts, original_losses: Losses) -> dict[str, Any]:
    """Trim the vocabulary to a number of tokens, and return the figures."""
    config = StructPruneConfig(
        widths={"vocab": size},
        domains=calibrated_domains(args),
        general_share=0,
        num_samples=args.calibration,
        seq_length=args.seq_length,
    )

    pruner = StructPruner(config)
    start = perf_counter()
    trimmed = pruner.prune_model(model, tokenizer)
    figures = {
        "seconds": perf_counter() - start,
        "widths": pruner.result.report.widths,
        "tokens": trimmed.config.vocab_size,
        "parameters": trimmed.num_parameters() / model.num_parameters() - 1,
    }

    losses = mean_losses(trimmed, pruner.result.tokenizer, texts)
    figures.update(relative_perplexities(args, losses, original_losses))
    if args.speed:
        figures["speed"] = decoding_speed(model, trimmed)
    return figures


def decoding_speed(model, trimmed) -> float:
    """Return the speed of decoding on one thread, relative to the original model."""
    torch.set_num_threads(1)
    speed = measure_speed({"original": model, "small": trimmed}, prompts=[16], new_tokens=16, repeats=5)
    (by_model,) = speed.decode.values()
    return by_model["small"].speedup.median


def measure_folder(args: Namespace, model, folder: str, texts: Texts, original_losses: Losses) -> dict[str, Any]:
    """Return the figures of a pruned model."""
    start = perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pruned = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    figures = {"tokens": len(tokenizer), "parameters": pruned.num_parameters() / model.num_parameters() - 1}

    losses = mean_losses(pruned, tokenizer, texts)
    figures.update(relative_perplexities(args, losses, original_losses))
    figures["seconds"] = perf_counter() - start
    return figures


def measure(args: Namespace) -> Iterator[dict[str, Any]]:
    """Yield the figures of each number of tokens or of each folder."""
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = read_texts(args, tokenizer)
    original_losses = mean_losses(model, tokenizer, texts)
    if args.folders:
        for folder in args.folders:
            yield measure_folder(args, model, folder, texts, original_losses)
    else:
        for size in args.sizes:
            yield trim(args, model, tokenizer, size, texts, original_losses)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the arguments and print a row for each number of tokens or each folder."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data")
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--sizes", nargs="+", type=int, help="numbers of tokens")
    group.add_argument("--folders", nargs="+", help="pruned models")
    parser.add_argument("--domains", nargs="+", help="names of calibration files; the default is all")
    parser.add_argument("--calibration", type=int, default=256, help="calibration samples; all text is counted")
    parser.add_argument("--samples", type=int, default=4, help="samples of each evaluation file")
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--speed", action="store_true", help="measure decoding at batch size 1 too")
    parser.add_argument("--json", help="file for all results")

    args = parser.parse_args(argv)

    disable_progress_bar()

    rows = []
    print("tokens | parameters | held-out | unseen | seconds | decoding", flush=True)
    for row in measure(args):
        rows.append(row)
        cells = [
            f"{row['tokens']:,}",
            f"{row['parameters']:+.1%}",
            f"{row['heldout']:.3f}",
            f"{row['unseen']:.3f}",
            f"{row['seconds']:.0f}",
            f"{row.get('speed', float('nan')):.2f}",
        ]
        print(" | ".join(cells), flush=True)

    if args.json:
        Path(args.json).write_text(json.dumps({"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
