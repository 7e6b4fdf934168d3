"""Share the text, the models and the files of results between the benchmarks of quality."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_structprune import DomainConfig, StructPruneConfig, StructPruneError, StructPruner
from optimum_structprune.evaluation.heldout import read_heldout


DOMAINS = ("wiki", "code", "math", "dialogue", "web")
SEQ_LENGTH = 512


def load_model(args: Namespace):
    """Load the model in the dtype of the arguments, and its tokenizer."""
    if args.dtype == "bfloat16":
        # PyTorch then multiplies fp32 matrices in bf16. The second moments are of bf16 activations and lose nothing.
        # The refit changes by about half a percent, as it does when its result is stored in bf16.
        torch.set_float32_matmul_precision("medium")

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype, device_map=args.device)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    return model, tokenizer


def unseen_files(data: str | Path) -> list[Path]:
    """Return the files of kinds of text that no benchmark calibrates on."""
    return sorted(Path(data, "unseen").glob("*.jsonl"))


def read_samples(domains: Sequence[DomainConfig], tokenizer, length: int, count: int) -> dict[str, Tensor]:
    """Return the first samples of each domain, by its name."""
    return {domain.name: read_heldout(domain, tokenizer, length, count).samples for domain in domains}


def evaluation_domains(data: str | Path, names: Sequence[str]) -> list[DomainConfig]:
    """Return the held-out text of the named domains and all unseen text."""
    paths = [Path(data, "heldout", f"{name}.jsonl") for name in names]
    paths += unseen_files(data)
    return [DomainConfig(name=path.stem, source=str(path)) for path in paths]


def evaluation_texts(args: Namespace, names: Sequence[str], tokenizer) -> tuple[dict[str, Tensor], list[str]]:
    """Return the first samples of every evaluation file by its name, and the names of the unseen ones."""
    domains = evaluation_domains(args.data, names)
    texts = read_samples(domains, tokenizer, SEQ_LENGTH, args.eval_samples)
    unseen = [path.stem for path in unseen_files(args.data)]
    return texts, unseen


def calibration_domains(args: Namespace, names: Sequence[str]) -> list[DomainConfig]:
    """Return the calibration domains.

    Args:
        args: The arguments of the benchmark.
        names: Names of files in DATA/calibration, or sources with a colon. `self:any@2` has the weight 2.
    """
    folder = Path(args.data, "calibration")
    domains = []
    for name in names:
        source, _, weight = name.partition("@")

        path = source
        if ":" not in source:
            path = str(folder / f"{source}.jsonl")
        domains.append(DomainConfig(name=source.replace(":", "-"), source=path, weight=float(weight or 1)))

    return domains


def prune_with(model, tokenizer, config: StructPruneConfig):
    """Return a pruned copy of the model and the seconds of the pruning."""
    if config.refit == "bias":
        # The methods of FLAP are in the sister package.
        from structprune_sisters.flap import with_biases

        model = with_biases(model)

    start = perf_counter()
    pruned = StructPruner(config).prune_model(model, tokenizer)
    return pruned, perf_counter() - start


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Return whether a name matches one of the patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def load_results(path: str | Path, args: Namespace, names: Sequence[str], **empty: Any) -> dict[str, Any]:
    """Return the results in a file, or new ones if there is no file.

    Args:
        path: The file.
        args: The arguments of the benchmark.
        names: The arguments that results in one file have in common.
        empty: The fields of new results.

    Raises:
        StructPruneError: If the results in the file come from other settings.
    """
    setting = {name: getattr(args, name) for name in names}
    if not Path(path).exists():
        return dict(setting=setting, **empty)

    results = json.loads(Path(path).read_text())
    differences = [name for name in names if results["setting"].get(name) != setting[name]]
    if differences:
        raise StructPruneError(f"{path} has results of other settings: {', '.join(differences)}. Name another place.")
    return results


def write_json(path: str | Path, data) -> None:
    """Replace a file in one step, so that an interrupted run leaves the former file intact."""
    part = Path(f"{path}.part")
    part.write_text(json.dumps(data, indent=2) + "\n")
    part.replace(path)


def print_row(name: str, values: Sequence[str | float]) -> None:
    """Print one row of a Markdown table."""
    cells = [name]
    for value in values:
        if not isinstance(value, str):
            value = f"{value:.3f}"
        cells.append(value)

    print(f"| {' | '.join(cells)} |", flush=True)


def print_head(name: str, columns: Sequence[str]) -> None:
    """Print the head of a Markdown table."""
    print_row(name, columns)
    print_row("---", ["---"] * len(columns))


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments that all benchmarks of quality have."""
    parser.add_argument("data")
    parser.add_argument("--dtype", default="auto", help="auto (as saved), float32, bfloat16 or float16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--eval-samples", type=int, default=8, help="samples of 512 tokens per evaluation file")
