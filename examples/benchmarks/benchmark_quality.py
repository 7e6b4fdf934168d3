"""Quality after pruning, by criterion, refit, domains and rounds, all in one run.

    python examples/benchmarks/benchmark_quality.py MODEL DATA [--cells NAME ...] [--dtype bfloat16] [--json out.json]

DATA holds `calibration/`, `heldout/` and `unseen/` with one JSON-lines file per domain. Perplexity is given as a
multiple of the dense model's. `heldout/` has other documents of the calibration domains, `unseen/` has domains that no
calibration set contains; neither is ever used for calibration. Of each file the first samples count, in file order.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from statistics import geometric_mean
from time import perf_counter

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from optimum_structprune import DomainConfig, StructPruneConfig, StructPruner, perplexity
from optimum_structprune.evaluation.heldout import read_heldout


THREE = ("wiki", "code", "math")
FIVE = (*THREE, "dialogue", "web")
SAMPLES_PER_DOMAIN = 12
SEQ_LENGTH = 512


def cells(mlp: int, attention: int) -> dict[str, dict]:
    """Every row of the table: its name and what differs from the defaults."""
    both = {"widths": {"mlp": mlp, "attention": attention}}
    rows = {
        "defaults, 3 domains": {},
        "defaults, 5 domains": {"domains": FIVE},
        "wanda, 5 domains": {"domains": FIVE, "criterion": "wanda"},
        "wanda, error_feedback=0, 3 domains": {"criterion": "wanda", "error_feedback": 0.0},
        "wanda, error_feedback=0, 5 domains": {"criterion": "wanda", "error_feedback": 0.0, "domains": FIVE},
        "with attention, 5 domains": {"domains": FIVE, **both},
        "with attention, wanda, 5 domains": {"domains": FIVE, "criterion": "wanda", **both},
        "no refit, 5 domains": {"domains": FIVE, "refit": "none"},
        "error_feedback=0, 3 domains": {"error_feedback": 0.0},
        "error_feedback=0, 5 domains": {"error_feedback": 0.0, "domains": FIVE},
        "damping=0.01, 3 domains": {"damping": 0.01},
        "damping=0.01, 5 domains": {"damping": 0.01, "domains": FIVE},
        "random, no refit": {"criterion": "random", "refit": "none"},
        "magnitude, no refit": {"criterion": "magnitude", "refit": "none"},
        "flap + bias": {"criterion": "flap", "refit": "bias"},
    }
    for criterion in ("wanda", "flap", "obs"):
        for refit in ("none", "least_squares"):
            for domains in (THREE, *((domain,) for domain in THREE)):
                name = f"{criterion}, {refit}, {'+'.join(domains)}"
                rows[name] = {"criterion": criterion, "refit": refit, "domains": domains}
        rows[f"{criterion}, least_squares, rounds=3"] = {"criterion": criterion, "rounds": 3}
        rows[f"{criterion}, none, rounds=3"] = {"criterion": criterion, "rounds": 3, "refit": "none"}
    return {name: {"widths": {"mlp": mlp}, **fields} for name, fields in rows.items()}


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
    start = perf_counter()
    pruned = StructPruner(config).prune_model(model, tokenizer)
    return pruned, perf_counter() - start


def write_json(path: str | None, data) -> None:
    """Replace a file as a whole, so that a kill leaves the former one."""
    if path:
        Path(f"{path}.part").write_text(json.dumps(data, indent=2) + "\n")
        Path(f"{path}.part").replace(path)


def run(args: Namespace) -> dict[str, dict]:
    """Prune once per row and evaluate."""
    model, tokenizer = load(args)
    texts, unseen = evaluation_texts(args, THREE, tokenizer)
    dense = {name: perplexity(model, samples) for name, samples in texts.items()}
    results = {"dense": {"perplexity": dense}}
    columns = ["held-out", *THREE, "worst", "unseen", *unseen, "seconds"]
    show("row", columns)
    show("---", ["---" for _ in columns])
    for name, fields in cells(args.mlp, args.attention).items():
        if args.cells and name not in args.cells:
            continue
        names = fields.get("domains", THREE)
        count = SAMPLES_PER_DOMAIN * (len(THREE) if len(names) == 1 else len(names))
        more = {"domains": calibration(args, names), "num_samples": count, "general_share": 0.0}
        config = StructPruneConfig(**{**fields, **more, "seq_length": SEQ_LENGTH, "seed": args.seed})
        pruned, seconds = pruned_by(model, tokenizer, config)
        # A row calibrated on one domain answers how it does on the three; the rest would double its time.
        measured = {text: samples for text, samples in texts.items() if len(names) > 1 or text in THREE}
        ratio = {text: perplexity(pruned, samples) / dense[text] for text, samples in measured.items()}
        held, other = [ratio[n] for n in THREE], [ratio[n] for n in unseen if n in ratio]
        elsewhere = [geometric_mean(other), *other] if other else ["" for _ in ["mean", *unseen]]
        results[name] = {"ratio": ratio, "seconds": seconds}
        show(name, [geometric_mean(held), *held, max(held), *elsewhere, f"{seconds:.0f}"])
        write_json(args.json, results)
    return results


def show(name: str, values: list) -> None:
    """One row of a Markdown table."""
    cells_ = [value if isinstance(value, str) else f"{value:.3f}" for value in values]
    print(f"| {name} | {' | '.join(cells_)} |", flush=True)


def add_arguments(parser: ArgumentParser) -> None:
    """What every benchmark of quality takes."""
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--dtype", default="auto", help="auto (as saved), float32, bfloat16 or float16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--eval-samples", type=int, default=8, help="samples of 512 tokens per evaluation file")


def main(argv: list[str] | None = None) -> None:
    """Read the arguments and run."""
    parser = ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--mlp", type=int, default=1152, help="FFN width to keep")
    parser.add_argument("--attention", type=int, default=2, help="KV groups to keep, in rows that prune attention")
    parser.add_argument("--cells", nargs="*", help="only these rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="file for the results")
    disable_progress_bar()
    run(parser.parse_args(argv))


if __name__ == "__main__":
    main()
