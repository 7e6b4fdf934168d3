"""Does it help to mix domains, to weigh them, and to prune in rounds? A grid of cells over seeds and widths.

    python examples/benchmarks/benchmark_domains.py run MODEL DATA out.json [--cells "mix, *" ...] [--seeds 0 1 2]
    python examples/benchmarks/benchmark_domains.py run MODEL DATA left.json --leave-one-out [--cells "mix*, *" ...]
    python examples/benchmarks/benchmark_domains.py table out.json [more.json ...]

DATA is as for `benchmark_table.py`. A cell is a calibration text, a number
of rounds and a method, such as `mix, one-shot, wanda + refit`; `run … --list` names them all. Every cell gets the same
number of calibration tokens. `run` leaves out what `out.json` already holds, so it can be interrupted and go on, and
`table` shows what is there so far: means ± standard deviations over seeds. Several files of the same settings, such as
those of runs side by side, make one table.

With `--leave-one-out`, each cell calibrates on all kinds of text but one and looks at that one, for every kind in
turn. Only DATA/calibration is read, and a fifth of its documents is set aside to look at, so that a choice can be made
without the evaluation text. Built-in and self-written text of about the same kind is left out with it.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from math import exp, log
from pathlib import Path
from statistics import fmean, geometric_mean, stdev
from typing import Any

from quality import (
    DOMAINS,
    SEQ_LENGTH,
    add_arguments,
    begin,
    calibration,
    evaluation_texts,
    load,
    pruned_by,
    show,
    write_json,
)
from set_aside import divided
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from optimum_structprune import DomainConfig, StructPruneConfig, StructPruneError, perplexity
from optimum_structprune.arch.load import describe
from optimum_structprune.config.domains import BUILTIN
from optimum_structprune.domains.load import texts_of
from optimum_structprune.domains.sources import builtin_kinds
from optimum_structprune.evaluation.heldout import read_heldout


sys.path.append(str(Path(__file__).parents[1] / "sisters"))  # where that package is not installed
import structprune_sisters  # noqa: E402, F401, I001  # registers the methods of other papers


SELF = ("self:prose", "self:code", "self:math", "self:dialogue", "self:reasoning")
# What each part of a cell's name adds to the config. `domains` are names in DATA/calibration, or sources of their own.
MIXES: dict[str, dict[str, Any]] = {
    "mix": {},
    "self-generated": {"domains": SELF},
    "built-in": {"domains": ("builtin:prose", "builtin:code", "builtin:math")},
    "mix + a fifth general": {"general_share": 0.2, "general_text": "builtin:general"},
    "mix + two fifths general": {"general_share": 0.4, "general_text": "builtin:general"},
}
ROUNDS: dict[str, dict[str, Any]] = {
    "one-shot": {"rounds": 1},
    "iterative": {"rounds": 3},
    "10 rounds": {"rounds": 10},
}
METHODS: dict[str, dict[str, Any]] = {
    "flap + bias": {"criterion": "flap", "refit": "bias"},
    "flap + refit": {"criterion": "flap", "refit": "least_squares"},
    "wanda": {"criterion": "wanda", "refit": "none"},
    "wanda + refit": {"criterion": "wanda", "refit": "least_squares"},
    "wanda + refit without error feedback": {"criterion": "wanda", "refit": "least_squares", "error_feedback": 0.0},
    "obs": {"criterion": "obs", "refit": "none"},
    "obs + refit": {"criterion": "obs", "refit": "least_squares"},
    "obs_drive": {"criterion": "obs_drive", "refit": "none"},
    "obs_drive + refit": {"criterion": "obs_drive", "refit": "least_squares"},
    "taylor": {"criterion": "taylor", "refit": "none"},
    "taylor + refit": {"criterion": "taylor", "refit": "least_squares"},
    "slimllm": {"criterion": "slimllm", "refit": "slope"},
    "slimllm + refit": {"criterion": "slimllm", "refit": "least_squares"},
    "pip": {"criterion": "pip", "refit": "none"},
    "pip + refit": {"criterion": "pip", "refit": "least_squares"},
    "iterative norm": {"criterion": "iterative_norm", "refit": "none"},
    "iterative norm + refit": {"criterion": "iterative_norm", "refit": "least_squares"},
    "ddp": {"criterion": "ddp", "refit": "folded"},
    "ddp + refit": {"criterion": "ddp", "refit": "least_squares"},
    "obs by sensitivity + refit": {"criterion": "obs", "refit": "least_squares", "allocation": "sensitivity"},
    "obs_drive by sensitivity + refit": {
        "criterion": "obs_drive",
        "refit": "least_squares",
        "allocation": "sensitivity",
    },
}
# Sources that are left out together with a domain: `prose` is the docstrings of the files that `code` is made of.
NEAR = {
    "wiki": ("encyclopedia", "countries", "self:prose"),
    "code": ("code", "programs", "prose", "self:code"),
    "math": ("math", "self:math"),
    "dialogue": ("dialogue", "self:dialogue"),
    "web": ("web", "news", "self:prose"),
    "stories": ("fiction", "self:prose"),
}


def cells(domains: list[str]) -> dict[str, dict[str, Any]]:
    """Every cell: its name and its part of the config."""
    alone = {f"{name} only": {"domains": (name,)} for name in domains}
    # A domain beside n others of weight 1 has a fifth of the tokens with the weight n / 4, and two fifths with 2n / 3.
    few, many = (f"self:any@{weight * len(domains)}" for weight in (1 / 4, 2 / 3))
    written = {
        "mix + self": {"domains": (*domains, *SELF)},
        "mix + a fifth self:any": {"domains": (*domains, few)},
        "mix + two fifths self:any": {"domains": (*domains, many)},
    }
    texts = {**alone, **MIXES, **written}
    return {
        f"{text}, {rounds}, {method}": {"domains": tuple(domains), **texts[text], **ROUNDS[rounds], **METHODS[method]}
        for text in texts
        for rounds in ROUNDS
        for method in METHODS
        if rounds != "10 rounds" or "pip" in method
    }


def chosen(args: Namespace) -> dict[str, dict[str, Any]]:
    """The cells that match one of the patterns."""
    every = cells(args.domains)
    return {name: cell for name, cell in every.items() if any(fnmatchcase(name, pattern) for pattern in args.cells)}


def keys(results: dict[str, Any]) -> set[tuple]:
    """What is there already."""
    return {(row["cell"], row["removed"], row["seed"], row.get("left_out")) for row in results["runs"]}


def config_of(
    args: Namespace, cell: dict[str, Any], width: int, seed: int, left_out: str | None = None
) -> StructPruneConfig:
    """Return the whole config of one run."""
    # A cell has the text that its name says, and no other beside it.
    fields = {"num_samples": args.samples, "seq_length": args.seq_length, "seed": seed, "widths": {"mlp": width}}
    cell = {"general_share": 0.0, **cell}
    config = StructPruneConfig.from_dict({**cell, **fields, "domains": calibration(args, cell["domains"])})
    return config if left_out is None else without(args, config, left_out)


def without(args: Namespace, config: StructPruneConfig, left_out: str) -> StructPruneConfig:
    """The same config without one kind of text, and without the documents that are set aside of the others."""
    near = NEAR.get(left_out, ())
    own = [domain for domain in config.domains or () if domain.name != left_out]
    domains = []
    for domain in texts_of(replace(config, domains=own)):
        if domain.source.startswith(BUILTIN):
            names = [name for name in builtin_kinds(domain.source.removeprefix(BUILTIN)) if name not in near]
            domains += [replace(domain, source=BUILTIN + "+".join(names))] if names else []
        elif domain.name in args.domains:
            domains.append(replace(domain, source=aside(args, domain.name)[0]))
        elif domain.source not in near:
            domains.append(domain)
    return replace(config, domains=domains, general_share=0.0, general_text=None)


def aside(args: Namespace, name: str) -> tuple[list[str], list[str]]:
    """The documents of a calibration file to calibrate on, and those that are set aside."""
    parts = divided(Path(args.data) / "calibration" / f"{name}.jsonl")
    return tuple([json.loads(line)["text"] for line in part] for part in parts)


def aside_texts(args: Namespace, tokenizer) -> dict[str, Tensor]:
    """The first samples of what is set aside of every calibration file."""
    texts = [DomainConfig(name, aside(args, name)[1]) for name in args.domains]
    return {text.name: read_heldout(text, tokenizer, args.seq_length, args.eval_samples).samples for text in texts}


def run(args: Namespace) -> None:
    """Prune and evaluate what is missing."""
    names = chosen(args)
    if args.list:
        print("\n".join(names))
        return
    for cell in names.values():
        config_of(args, cell, 1, 0)  # an illegal cell shows before hours have gone by
    same = ("model", "data", "dtype", "domains", "samples", "eval_samples", "seq_length")
    results = begin(args.out, args, (*same, "leave_one_out"), runs=[])
    model, tokenizer = load(args)
    size = describe(model).of("mlp")[0].size
    texts, unseen = (
        (aside_texts(args, tokenizer), []) if args.leave_one_out else evaluation_texts(args, args.domains, tokenizer)
    )

    def measured(measured_model) -> dict[str, Any]:
        return {"perplexity": {name: perplexity(measured_model, samples) for name, samples in texts.items()}}

    if "dense" not in results:
        results |= {"unseen": unseen, "dense": measured(model)}
    # Seeds come last, so that an interrupted run has a first answer to everything.
    todo = [
        (seed, removed, name, left)
        for seed in args.seeds
        for removed in args.removed
        for name in names
        for left in (args.domains if args.leave_one_out else [None])
        if names[name]["domains"] != (left,)
    ]
    for seed, removed, name, left in todo:
        if (name, removed, seed, left) in keys(results):
            continue
        width = 8 * round(size * (100 - removed) / 100 / 8)
        pruned, seconds = pruned_by(model, tokenizer, config_of(args, names[name], width, seed, left))
        about = {"cell": name, "removed": removed, "width": width, "seed": seed, "parameters": pruned.num_parameters()}
        row = {**about, "seconds": seconds, **measured(pruned)}
        row |= {} if left is None else {"left_out": left}
        results["runs"].append(row)
        write_json(args.out, results)
        kind = "" if left is None else f" without {left}"
        print(f"{name}{kind}, {removed} %, seed {seed}: {summary(results, row)}", flush=True)


def columns(results: dict[str, Any], row: dict[str, Any]) -> dict[str, float]:
    """What a row of the table says about one run: multiples of the dense perplexity."""
    ratio = {name: value / results["dense"]["perplexity"][name] for name, value in row["perplexity"].items()}
    unseen = [row["left_out"]] if "left_out" in row else results["unseen"]
    held = {name: value for name, value in ratio.items() if name not in unseen}
    means = {"held-out": geometric_mean(held.values()), "worst": max(held.values())}
    if unseen:
        means["unseen"] = geometric_mean(ratio[name] for name in unseen)
    return {**means, **ratio, "seconds": row["seconds"]}


def summary(results: dict[str, Any], row: dict[str, Any]) -> str:
    """The first columns in a line."""
    values = columns(results, row)
    return ", ".join(f"{name} {values[name]:.3f}" for name in ("held-out", "worst", "unseen") if name in values)


def groups(results: dict[str, Any], removed: int) -> Iterator[tuple[str, list[dict[str, float]]]]:
    """Cells with their runs of all seeds, the best on held-out text first."""
    runs_by_cell: dict[str, list[dict[str, float]]] = {}
    for row in results["runs"]:
        if row["removed"] == removed:
            runs_by_cell.setdefault(row["cell"], []).append(columns(results, row))
    yield from sorted(runs_by_cell.items(), key=lambda cell: fmean(run["held-out"] for run in cell[1]))


def merged(files: list[dict[str, Any]]) -> dict[str, Any]:
    """The runs of several files together."""
    first = files[0]
    for other in files[1:]:
        if differing := [name for name, value in first["setting"].items() if other["setting"].get(name) != value]:
            raise StructPruneError(f"the files were made with different settings: {', '.join(differing)}")
    return {**first, "runs": [row for file in files for row in file["runs"]]}


def table(args: Namespace) -> None:
    """One Markdown table for each share of channels removed."""
    results = merged([json.loads(Path(path).read_text()) for path in args.out])
    for removed in sorted({row["removed"] for row in results["runs"]}):
        print(f"\n{removed} % of the FFN channels removed\n")
        if results["setting"]["leave_one_out"]:
            left_out_table(results, removed, args.against)
            continue
        rows = list(groups(results, removed))
        names = list(rows[0][1][0])
        show("cell", ["seeds", *names])
        show("---", ["---"] * (len(names) + 1))
        dense = dict.fromkeys(results["dense"]["perplexity"], 1.0)
        show("dense", ["", *(dense.get(name, "") for name in names)])
        for cell, runs in rows:
            show(cell, [str(len(runs)), *(spread([values[name] for values in runs]) for name in names)])


def left_out_table(results: dict[str, Any], removed: int, against: str) -> None:
    """One row for each cell: the loss on the kinds that were left out and on those that were not.

    A loss is the mean logarithm of the multiples of the dense perplexity. "Of the reference's" compares the same kinds
    and seeds, and its spread is over these.
    """
    losses = left_out_losses(results, removed)
    kinds_left = results["setting"]["domains"]
    show("cell", ["runs", "left out", "of the reference's", "own", "of the reference's", *kinds_left, "seconds"])
    show("---", ["---"] * (len(kinds_left) + 6))
    for cell, found in sorted(losses.items(), key=lambda item: fmean(run["left out"] for run in item[1].values())):
        values: list[str | float] = [str(len(found))]
        for column in ("left out", "own"):
            pairs = [
                (run[column], losses[against][key][column])
                for key, run in found.items()
                if key in losses.get(against, {})
            ]
            values.append(exp(fmean(run[column] for run in found.values())))
            values.append(compared(pairs))
        for kind in kinds_left:
            left = [run["left out"] for (left, _), run in found.items() if left == kind]
            values.append(exp(fmean(left)) if left else "")
        show(cell, [*values, f"{fmean(run['seconds'] for run in found.values()):.0f}"])


def left_out_losses(results: dict[str, Any], removed: int) -> dict[str, dict[tuple, dict[str, float]]]:
    """The losses of each cell by the kind that was left out and the seed."""
    losses: dict[str, dict[tuple, dict[str, float]]] = {}
    dense = results["dense"]["perplexity"]
    for row in results["runs"]:
        if row["removed"] == removed:
            loss = {name: log(value / dense[name]) for name, value in row["perplexity"].items()}
            run_ = {"left out": loss.pop(row["left_out"]), "own": fmean(loss.values()), "seconds": row["seconds"]}
            losses.setdefault(row["cell"], {})[row["left_out"], row["seed"]] = run_
    return losses


def compared(pairs: list[tuple[float, float]]) -> str:
    """The sum of losses as a share of the reference's, and the standard deviation of the shares."""
    if not pairs:
        return ""
    share = sum(loss for loss, _ in pairs) / sum(reference for _, reference in pairs)
    apart = f" ± {stdev(loss / reference for loss, reference in pairs):.3f}" if len(pairs) > 1 else ""
    return f"{share:.3f}{apart}"


def spread(values: list[float]) -> str:
    """Mean and, where there are several, standard deviation."""
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def add_grid_arguments(parser: ArgumentParser, patterns: str, samples: int) -> None:
    """Which cells of a grid are run, and on how much text.

    Args:
        parser: The parser of the run.
        patterns: Patterns that the help gives as examples.
        samples: The default number of calibration samples.
    """
    parser.add_argument("--cells", nargs="+", default=["*"], help=f"patterns such as {patterns}")
    parser.add_argument("--list", action="store_true", help="name the cells and stop")
    parser.add_argument("--domains", nargs="+", default=list(DOMAINS), help="names of files in DATA/calibration")
    parser.add_argument("--removed", nargs="+", type=int, default=[20, 35, 50], help="FFN channels, in percent")
    parser.add_argument("--samples", type=int, default=samples, help="calibration samples in all")


def main(argv: list[str] | None = None) -> None:
    """Read the arguments and run or show."""
    parser = ArgumentParser(description=__doc__)
    modes = parser.add_subparsers(required=True)
    running, showing = modes.add_parser("run"), modes.add_parser("table")
    running.set_defaults(mode=run)
    showing.set_defaults(mode=table)
    running.add_argument("model")
    add_arguments(running)
    running.add_argument("out", help="JSON file with the results")
    showing.add_argument("out", nargs="+", help="JSON files with the results")
    showing.add_argument("--against", default="mix, one-shot, obs + refit", help="the reference of --leave-one-out")
    add_grid_arguments(running, '"mix, *, wanda*"', samples=60)
    running.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    running.add_argument("--seq-length", type=int, default=SEQ_LENGTH, help="tokens in a calibration sample")
    running.add_argument("--leave-one-out", action="store_true", help="look at the kind that is not calibrated on")
    args = parser.parse_args(argv)
    disable_progress_bar()
    args.mode(args)


if __name__ == "__main__":
    main()
