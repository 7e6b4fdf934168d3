"""What the benchmarks of quality share: text, the model, a pruned copy of it, and results that a kill leaves whole."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
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


def load(args: Namespace):
    """The model in the dtype that was asked for, and its tokenizer."""
    if args.dtype == "bfloat16":
        # Products of fp32 matrices then run on the units for bf16. Second moments of bf16 activations lose nothing,
        # and what the refit changes about half a percent, as much as storing it in bf16 does.
        torch.set_float32_matmul_precision("medium")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype, device_map=args.device)
    return model, AutoTokenizer.from_pretrained(args.model)


def evaluation_texts(args: Namespace, domains: Sequence[str], tokenizer) -> tuple[dict[str, Tensor], list[str]]:
    """The first samples of every evaluation file by name, and which of the names nobody calibrates on."""
    data = Path(args.data)
    unseen = sorted(path.stem for path in (data / "unseen").glob("*.jsonl"))
    paths = [
        *(data / "heldout" / f"{name}.jsonl" for name in domains),
        *(data / "unseen" / f"{n}.jsonl" for n in unseen),
    ]
    texts = [DomainConfig(name=path.stem, source=str(path)) for path in paths]
    return {t.name: read_heldout(t, tokenizer, SEQ_LENGTH, args.eval_samples).samples for t in texts}, unseen


def calibration(args: Namespace, names: Sequence[str]) -> list[DomainConfig]:
    """Domains by their names in DATA/calibration; a name with a colon is a source of its own, `self:math@2` one of
    weight 2.
    """
    folder = Path(args.data) / "calibration"
    domains = []
    for name in names:
        source, _, weight = name.partition("@")
        path = source if ":" in source else str(folder / f"{source}.jsonl")
        domains.append(DomainConfig(name=source.replace(":", "-"), source=path, weight=float(weight or 1)))
    return domains


def pruned_by(model, tokenizer, config: StructPruneConfig):
    """A smaller copy of the model and the seconds that it took."""
    if config.refit == "bias":  # of the sister package, as FLAP has it
        from structprune_sisters.flap import with_biases

        model = with_biases(model)
    start = perf_counter()
    pruned = StructPruner(config).prune_model(model, tokenizer)
    return pruned, perf_counter() - start


def begin(path: str | Path, args: Namespace, same: Sequence[str], **empty: Any) -> dict[str, Any]:
    """The results so far in a file, which have to come from the same settings."""
    setting = {name: getattr(args, name) for name in same}
    if not Path(path).exists():
        return {"setting": setting, **empty}
    results = json.loads(Path(path).read_text())
    if differing := [name for name in same if results["setting"].get(name) != setting[name]]:
        raise StructPruneError(f"{path} was made with other settings: {', '.join(differing)}; name another place.")
    return results


def write_json(path: str | Path, data) -> None:
    """Replace a file as a whole, so that a kill leaves the former one."""
    Path(f"{path}.part").write_text(json.dumps(data, indent=2) + "\n")
    Path(f"{path}.part").replace(path)


def show(name: str, values: list) -> None:
    """One row of a Markdown table."""
    cells_ = [value if isinstance(value, str) else f"{value:.3f}" for value in values]
    print(f"| {name} | {' | '.join(cells_)} |", flush=True)


def add_arguments(parser: ArgumentParser) -> None:
    """What every benchmark of quality takes beside the model."""
    parser.add_argument("data")
    parser.add_argument("--dtype", default="auto", help="auto (as saved), float32, bfloat16 or float16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--eval-samples", type=int, default=8, help="samples of 512 tokens per evaluation file")
