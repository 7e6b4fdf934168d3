"""Quality after pruning, by criterion, refit, domains and rounds, all in one run.

    python examples/benchmark_quality.py MODEL DATA [--cells NAME ...] [--json out.json]

DATA holds `calibration/`, `heldout/` and `unseen/` with one JSON-lines file per domain. Perplexity is given as a
multiple of the dense model's. `heldout/` has other documents of the calibration domains, `unseen/` has domains that no
calibration set contains; neither is ever used for calibration. Of each file the first blocks count, in file order.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from math import exp, log
from pathlib import Path
from statistics import fmean
from time import perf_counter

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from optimum_structprune import DomainConfig, StructPruneConfig, StructPruner, perplexity
from optimum_structprune.calibration.blocks import prefix_token


THREE = ("wiki", "code", "math")
FIVE = (*THREE, "dialogue", "web")
BLOCKS_PER_DOMAIN = 12
SEQ_LENGTH = 512


def cells(mlp: int) -> dict[str, dict]:
    """Every row of the table: its name and what differs from the defaults."""
    rows = {
        "defaults, 3 domains": {},
        "defaults, 5 domains": {"domains": FIVE},
        "no refit, 5 domains": {"domains": FIVE, "refit": "none"},
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


def evaluation_blocks(folder: Path, names: list[str], tokenizer, count: int) -> dict[str, torch.Tensor]:
    """The first `count` token blocks of each file, in the file's order, each with the tokenizer's prefix token."""
    return {name: first_blocks(folder / f"{name}.jsonl", tokenizer, count) for name in names}


def first_blocks(path: Path, tokenizer, count: int) -> torch.Tensor:
    """Documents in order, an EOS token between them, cut into blocks; shape `(count, SEQ_LENGTH)`."""
    prefix, body, tokens = prefix_token(tokenizer), SEQ_LENGTH - 1, []
    with path.open() as lines:
        while len(tokens) < count * body:
            text = json.loads(next(lines))["text"]
            tokens += [*tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], tokenizer.eos_token_id]
    return torch.tensor([[prefix, *tokens[i * body : (i + 1) * body]] for i in range(count)])


def geometric_mean(values) -> float:
    """Of positive numbers."""
    return exp(fmean(log(value) for value in values))


def run(args: Namespace) -> dict[str, dict]:
    """Prune once per row and evaluate."""
    data = Path(args.data)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = evaluation_blocks(data / "heldout", list(THREE), tokenizer, args.eval_blocks)
    unseen = sorted(path.stem for path in (data / "unseen").glob("*.jsonl"))
    texts |= evaluation_blocks(data / "unseen", unseen, tokenizer, args.eval_blocks)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto", device_map=args.device)
    dense = {name: perplexity(model, blocks) for name, blocks in texts.items()}
    results = {"dense": {"perplexity": dense}}
    columns = ["held-out", *THREE, "worst", "unseen", *unseen, "seconds"]
    show("row", columns)
    show("---", ["---" for _ in columns])
    for name, fields in cells(args.mlp).items():
        if args.cells and name not in args.cells:
            continue
        names = fields.get("domains", THREE)
        domains = [DomainConfig(name=n, source=str(data / "calibration" / f"{n}.jsonl")) for n in names]
        samples = BLOCKS_PER_DOMAIN * (len(THREE) if len(names) == 1 else len(names))
        config = StructPruneConfig(
            **{**fields, "domains": domains, "num_samples": samples, "seq_length": SEQ_LENGTH, "seed": args.seed}
        )
        start = perf_counter()
        pruned = StructPruner(config).prune_model(model, tokenizer)
        seconds = perf_counter() - start
        # A row calibrated on one domain answers how it does on the three; the rest would double its time.
        asked = {text: blocks for text, blocks in texts.items() if len(names) > 1 or text in THREE}
        ratio = {text: perplexity(pruned, blocks) / dense[text] for text, blocks in asked.items()}
        held, other = [ratio[n] for n in THREE], [ratio[n] for n in unseen if n in ratio]
        elsewhere = [geometric_mean(other), *other] if other else ["" for _ in ["mean", *unseen]]
        results[name] = {"ratio": ratio, "seconds": seconds}
        show(name, [geometric_mean(held), *held, max(held), *elsewhere, f"{seconds:.0f}"])
        if args.json:
            Path(args.json).write_text(json.dumps(results, indent=2) + "\n")
    return results


def show(name: str, values: list) -> None:
    """One row of a Markdown table."""
    cells_ = [value if isinstance(value, str) else f"{value:.3f}" for value in values]
    print(f"| {name} | {' | '.join(cells_)} |", flush=True)


def main() -> None:
    """Read the arguments and run."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--mlp", type=int, default=1152, help="FFN width to keep")
    parser.add_argument("--eval-blocks", type=int, default=8, help="blocks of 512 tokens per evaluation file")
    parser.add_argument("--cells", nargs="*", help="only these rows")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json")
    disable_progress_bar()
    run(parser.parse_args())


if __name__ == "__main__":
    main()
