"""The whole table: models, shares of their FFN channels, methods and seeds; it can be stopped, and goes on.

    python examples/benchmarks/benchmark_table.py DATA OUT --models SmolLM2-135M=FOLDER Gemma-3-270M=FOLDER
        [--cells "SmolLM2*, 35 %, *" ...] [--seeds 0 1 2] [--answers] [--write PAGE] [--list]

DATA holds `calibration/`, `heldout/` and `unseen/` with one JSON-lines file per domain: `heldout/` has other documents
of the calibration domains, `unseen/` has domains that no calibration set contains, and neither is calibrated on. Of
each file the first samples count. OUT keeps one file per cell, written when the cell is complete; a cell that has one
is not run again, and `--cells none` runs none. Then the table of what is there is printed, and its rows that match
`--rows` are written into the page of `--write`, between `<!-- table: begin -->` and `<!-- table: end -->`.

Perplexity is a multiple of the dense model's, ± the standard deviation over seeds or, of one seed, the standard error
over samples. "Of FLAP's loss" is the ratio of its logarithm to that of FLAP with the same seed; "answers kept" are of
the built-in questions that the dense model answers rightly. Forms other than 16 bits are files quantised by llama.cpp.
"""

from __future__ import annotations

import json
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from fnmatch import fnmatchcase
from itertools import groupby, product
from math import exp
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import llama_cpp
import torch
from benchmark_domains import METHODS, add_grid_arguments, spread
from benchmark_quantised import files, ratio, read
from quality import SEQ_LENGTH, add_arguments, begin, calibration, evaluation_texts, load, pruned_by, write_json
from transformers.utils.logging import disable_progress_bar

from optimum_structprune import StructPruneConfig, StructPruneError
from optimum_structprune.arch.load import describe
from optimum_structprune.evaluation.answers import ask, read_questions
from optimum_structprune.forward.metrics import row_losses


DENSE, OURS, FLAP, FULL = "dense", "defaults", "FLAP", "16 bits"
ALONE = {"general_share": 0.0}  # what is published has no text beside the domains
ROWS: dict[str, dict[str, Any]] = {
    DENSE: {},
    OURS: {},
    "widths by measured loss": {"allocation": "sensitivity"},
    FLAP: {**ALONE, **METHODS["flap + bias"]},
    "wanda": {**ALONE, **METHODS["wanda"]},
    "SlimLLM": {**ALONE, **METHODS["slimllm"]},
    "PIP at once": {**ALONE, **METHODS["pip"]},  # in ten rounds, it takes ten times as long
}
# The dense model in three bits has about the bytes of one with a fifth of its channels less in four.
FORMS = {DENSE: (FULL, "Q4_K_M", "Q3_K_M"), OURS: (FULL, "Q4_K_M")}
HEAD = "of all parameters, MB, same kinds, other kinds, of FLAP's loss, answers kept, minutes, seeds"
MARKED = re.compile("(<!-- table: begin -->\n).*(<!-- table: end -->)", re.DOTALL)


class Cell(NamedTuple):
    """One result: its file has the name of its row and the seed."""

    model: str
    removed: int
    method: str
    seed: int
    form: str

    @property
    def row(self) -> str:
        """The name without the seed."""
        parts = (self.model, f"{self.removed} %", self.method, self.form)
        return ", ".join(part for part in parts if part not in ("0 %", FULL))

    def path(self, args: Namespace) -> Path:
        """Its file."""
        return Path(args.out, f"{self.row}, seed {self.seed}.json")


def cells(args: Namespace) -> list[Cell]:
    """All cells; seeds come last, so that an interrupted run has a first answer to everything."""
    return [
        Cell(model, removed, method, seed if removed else 0, form)
        for seed, model, removed, method in product(args.seeds, args.models, (0, *args.removed), ROWS)
        for form in FORMS.get(method, (FULL,))
        if (method == DENSE) == (removed == 0) and (removed or seed == args.seeds[0])
    ]


def run(args: Namespace, chosen: list[Cell]) -> None:
    """Run the cells that have no file."""
    Path(args.out).mkdir(parents=True, exist_ok=True)
    same = ("model", "data", "dtype", "domains", "samples", "eval_samples", "round_to", "answers")
    for name, folder in args.models.items():
        setting = Path(args.out, f"{name}.json")
        write_json(setting, begin(setting, Namespace(**vars(args), model=folder), same))
    todo = [cell for cell in chosen if not cell.path(args).exists()]
    if (reason := llama_cpp.missing()) and any(cell.form != FULL for cell in todo):
        print(f"no cell is quantised: {reason}", flush=True)
        todo = [cell for cell in todo if cell.form == FULL]
    for (name, *_), group in groupby(todo, key=lambda cell: cell[:-1]):
        for cell, result in results(Namespace(**vars(args), model=args.models[name]), [*group]):
            write_json(cell.path(args), result)
            print(f"{cell.path(args).stem}: {result['seconds']:.0f} s", flush=True)


def results(args: Namespace, group: list[Cell]) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Prune once and measure each form."""
    (model, tokenizer), seconds, cell = load(args), 0.0, group[0]
    texts, unseen = evaluation_texts(args, args.domains, tokenizer)
    if cell.removed:
        kept = describe(model).of("mlp")[0].size * (100 - cell.removed) / 100
        text = {"domains": calibration(args, args.domains), "num_samples": args.samples, "seq_length": SEQ_LENGTH}
        fields = {"widths": {"mlp": args.round_to * round(kept / args.round_to)}, "seed": cell.seed}
        config = StructPruneConfig.from_dict({**text, **fields, **ROWS[cell.method]})
        model, seconds = pruned_by(model, tokenizer, config)
    for cell in group:
        measured, size = model, 2 * model.num_parameters()
        for _, file in files(model, tokenizer, [cell.form] if cell.form != FULL else []):
            measured, size = read(file), file.stat().st_size
        losses = {name: (row_losses(measured, rows) / (SEQ_LENGTH - 1)).tolist() for name, rows in texts.items()}
        asked = read_questions() if args.answers and tokenizer.chat_template else []
        right = [answer.right for answer in ask(measured, tokenizer, asked, 120)] if asked else []
        about = {"parameters": model.num_parameters(), "bytes": size, "seconds": seconds, "unseen": unseen}
        yield cell, {**about, "losses": losses, "right": right}


def table(args: Namespace, patterns: list[str]) -> str:
    """The rows that match a pattern, with a result and a dense model to compare with; no column is without figures."""
    found = {cell: json.loads(path.read_text()) for cell in cells(args) if (path := cell.path(args)).exists()}
    rows = {c.row: [of for of in found if of.row == c.row] for c in found if Cell(c.model, 0, DENSE, 0, FULL) in found}
    rows = {row: of for row, of in rows.items() if any(fnmatchcase(row, pattern) for pattern in patterns)}
    lines = [["", *HEAD.split(", ")], *([row, *figures(found, seeds)] for row, seeds in rows.items())]
    columns = [(head, "---", *of) for head, *of in zip(*lines, strict=True) if {*of} != {"-"}]
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*columns, strict=True))


def figures(found: dict[Cell, dict[str, Any]], seeds: list[Cell]) -> list[str]:
    """The figures of one row; "-" where there is none."""
    values, dense = [found[cell] for cell in seeds], found[Cell(seeds[0].model, 0, DENSE, 0, FULL)]
    gone = 1 - fmean(of["parameters"] for of in values) / dense["parameters"]
    losses = {cell: more(found[cell], dense) for cell in seeds}
    by_kind = [*zip(*losses.values(), strict=True)]
    kinds = [ratio(of[0]) if len(of) == 1 else spread([exp(loss.mean()) for loss in of]) for of in by_kind]
    flap = {cell: found.get(cell._replace(method=FLAP, form=FULL)) for cell in seeds}
    pairs = [(losses[cell], more(of, dense)) for cell, of in flap.items() if of]
    shares = [f"{fmean(float(x[kind].mean() / y[kind].mean()) for x, y in pairs):.2f}" for kind in (0, 1) if pairs]
    kept = fmean(sum(now and then for now, then in zip(of["right"], dense["right"], strict=True)) for of in values)
    return [
        f"{-100 * gone:.1f} %" if gone else "-",
        f"{fmean(of['bytes'] for of in values) / 1e6:.1f}",
        *kinds,
        " / ".join(shares) or "-",
        f"{kept:.0f} of {sum(dense['right'])}" if dense["right"] else "-",
        f"{fmean(of['seconds'] for of in values) / 60:.1f}" if gone else "-",
        f"{len(seeds)}",
    ]


def more(result: dict[str, Any], dense: dict[str, Any]) -> list[torch.Tensor]:
    """The nats that a token of each sample costs more than before, on the kinds calibrated on and on others."""
    pairs = [
        (name in result["unseen"], now - before)
        for name, losses in result["losses"].items()
        for now, before in zip(losses, dense["losses"][name], strict=True)
    ]
    return [torch.tensor([value for other, value in pairs if other is of]) for of in (False, True)]


def main(argv: list[str] | None = None) -> None:
    """Read the arguments, run, and show."""
    parser = ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("out", help="folder for the results")
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=FOLDER")
    add_grid_arguments(parser, '"SmolLM2*, 35 %%, *" or "* defaults, seed 0"', samples=128)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--round-to", type=int, default=32, help="widths are multiples of it; llama.cpp needs 32")
    parser.add_argument("--answers", action="store_true", help="ask the built-in questions, of a chat model")
    parser.add_argument("--write", metavar="PAGE", help="write the rows of --rows between the two lines in this page")
    parser.add_argument("--rows", nargs="+", default=[f"* {OURS}", f"* {DENSE}, Q4*"], help="for --write")
    args = parser.parse_args(argv)
    if wrong := [text for text in args.models if not Path(text.partition("=")[2], "config.json").is_file()]:
        parser.error(f"--models takes NAME=FOLDER of a model, got {wrong[0]!r}")
    args.models = dict(text.split("=", 1) for text in args.models)
    chosen = [c for c in cells(args) if any(fnmatchcase(c.path(args).stem, pattern) for pattern in args.cells)]
    if args.list:
        return print(*(cell.path(args).stem for cell in chosen), sep="\n")
    if args.write and not MARKED.search(Path(args.write).read_text()):
        raise StructPruneError(f"{args.write} has no line <!-- table: begin --> with <!-- table: end --> behind it.")
    disable_progress_bar()
    run(args, chosen)
    print(f"\n{table(args, ['*'])}")
    if args.write:
        page, written = Path(args.write), table(args, args.rows)
        page.write_text(MARKED.sub(lambda found: f"{found[1]}\n{written}\n\n{found[2]}", page.read_text()))


if __name__ == "__main__":
    main()
