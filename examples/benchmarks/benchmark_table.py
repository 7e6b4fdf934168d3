"""Measure models, shares of their FFN channels, methods and seeds, and print the results as one table.

    python examples/benchmarks/benchmark_table.py DATA OUT --models SmolLM2-135M=FOLDER Gemma-3-270M=FOLDER
        [--cells "SmolLM2*, 35 %, *" ...] [--seeds 0 1 2] [--answers] [--write PAGE] [--list]

DATA contains `calibration/`, `heldout/` and `unseen/` with one JSON-lines file per domain. `heldout/` has other
documents of the calibration domains, `unseen/` has domains that no calibration set contains, and the script calibrates
on neither. It reads the first samples of each file. OUT keeps one file per cell. The script writes the file when the
cell is complete and skips cells that have a file, so an interrupted run can continue. `--cells none` runs no cell.
Then the script prints the table of all results, and writes the rows that match `--rows` into the page of `--write`,
between `<!-- table: begin -->` and `<!-- table: end -->`.

Perplexity is relative to the original model, ± the standard deviation over seeds or, of one seed, the standard error
over samples. "Of FLAP's loss" is the ratio of its logarithm to the logarithm for FLAP with the same seed. "Correct
answers" counts the built-in questions, and "original" those of the original model. Forms with fewer than 16 bits are
files that llama.cpp quantized.
"""

from __future__ import annotations

import json
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from itertools import groupby
from math import exp
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import llama_cpp
import torch
from benchmark_domains import METHODS, add_grid_arguments, spread
from benchmark_quantized import gguf_files, ratio_text, read_gguf
from quality import (
    SEQ_LENGTH,
    add_arguments,
    calibration_domains,
    evaluation_texts,
    load_model,
    load_results,
    matches,
    prune_with,
    write_json,
)
from transformers.utils.logging import disable_progress_bar

from optimum_structprune import StructPruneConfig, StructPruneError
from optimum_structprune.arch.load import describe
from optimum_structprune.evaluation.answers import ask, read_questions
from optimum_structprune.measure.losses import means
from optimum_structprune.measure.losses import measure as measure_text
from optimum_structprune.measure.text import Text


ORIGINAL = "original"
OURS = "defaults"
FLAP = "FLAP"
FULL = "16 bits"
# The published methods have no text in addition to the domains.
ROWS: dict[str, dict[str, Any]] = {
    ORIGINAL: {},
    OURS: {},
    "widths by measured loss": {"allocation": "sensitivity"},
    FLAP: dict(METHODS["flap + bias"], general_share=0.0),
    "wanda": dict(METHODS["wanda"], general_share=0.0),
    "SlimLLM": dict(METHODS["slimllm"], general_share=0.0),
    # PIP in ten rounds takes ten times as long.
    "PIP at once": dict(METHODS["pip"], general_share=0.0),
}
# The original model in three bits is about as large as a model in four bits without a fifth of its channels.
FORMS = {ORIGINAL: (FULL, "Q4_K_M", "Q3_K_M"), OURS: (FULL, "Q4_K_M")}
HEAD = ["of all parameters", "MB", "same kinds", "other kinds", "of FLAP's loss", "right answers", "minutes", "seeds"]
MARKED = re.compile("(<!-- table: begin -->\n).*(<!-- table: end -->)", re.DOTALL)


class Cell(NamedTuple):
    """One result."""

    model: str
    removed: int
    method: str
    seed: int
    form: str

    @property
    def row(self) -> str:
        """Return the name without the seed."""
        parts = [self.model]
        if self.removed:
            parts.append(f"{self.removed} %")
        parts.append(self.method)
        if self.form != FULL:
            parts.append(self.form)
        return ", ".join(parts)

    @property
    def name(self) -> str:
        """Return the name."""
        return f"{self.row}, seed {self.seed}"

    @property
    def original(self) -> Cell:
        """Return the cell of the original model."""
        return Cell(self.model, 0, ORIGINAL, 0, FULL)

    def path(self, args: Namespace) -> Path:
        """Return the path of the file with the result."""
        return Path(args.out, f"{self.name}.json")


def all_cells(args: Namespace) -> list[Cell]:
    """Return all cells. The seed changes last, so that an interrupted run has results of every row."""
    cells = []
    for seed in args.seeds:
        for model in args.models:
            # The original model needs one seed.
            if seed == args.seeds[0]:
                cells += [Cell(model, 0, ORIGINAL, 0, form) for form in FORMS[ORIGINAL]]

            for removed in args.removed:
                for method in ROWS:
                    if method != ORIGINAL:
                        forms = FORMS.get(method, (FULL,))
                        cells += [Cell(model, removed, method, seed, form) for form in forms]

    return cells


def with_model(args: Namespace, name: str) -> Namespace:
    """Return the arguments with the folder of one model."""
    return Namespace(**vars(args), model=args.models[name])


def run(args: Namespace, cells: Sequence[Cell]) -> None:
    """Run the cells that have no file."""
    Path(args.out).mkdir(parents=True, exist_ok=True)
    names = ["model", "data", "dtype", "domains", "samples", "eval_samples", "round_to", "answers"]
    for name in args.models:
        path = Path(args.out, f"{name}.json")
        write_json(path, load_results(path, with_model(args, name), names))

    missing = [cell for cell in cells if not cell.path(args).exists()]
    reason = llama_cpp.missing()
    if reason is not None and any(cell.form != FULL for cell in missing):
        print(f"no cell is quantized: {reason}", flush=True)
        missing = [cell for cell in missing if cell.form == FULL]

    for _, group in groupby(missing, key=lambda cell: cell._replace(form=FULL)):
        for cell, result in measure(args, list(group)):
            write_json(cell.path(args), result)
            print(f"{cell.name}: {result['seconds']:.0f} s", flush=True)


def measure(args: Namespace, cells: Sequence[Cell]) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Prune once and yield the result of each form."""
    args = with_model(args, cells[0].model)
    model, tokenizer = load_model(args)
    texts, unseen = evaluation_texts(args, args.domains, tokenizer)
    seconds = 0.0
    if cells[0].removed:
        model, seconds = prune_with(model, tokenizer, config_of(args, cells[0], model))

    for cell in cells:
        converted, size = convert(model, tokenizer, cell.form)
        losses = {}
        for name, samples in texts.items():
            losses[name] = means(measure_text(converted, Text(list(samples))).loss).tolist()

        correct = []
        if args.answers and tokenizer.chat_template:
            correct = [answer.right for answer in ask(converted, tokenizer, read_questions(), 120)]

        result = {
            "parameters": model.num_parameters(),
            "bytes": size,
            "seconds": seconds,
            "unseen": unseen,
            "losses": losses,
            "right": correct,
        }
        yield cell, result


def config_of(args: Namespace, cell: Cell, model) -> StructPruneConfig:
    """Return the config of a cell."""
    channels = describe(model).of("mlp")[0].size * (100 - cell.removed) / 100

    fields: dict[str, Any] = {
        "domains": calibration_domains(args, args.domains),
        "num_samples": args.samples,
        "seq_length": SEQ_LENGTH,
        "widths": {"mlp": args.round_to * round(channels / args.round_to)},
        "seed": cell.seed,
    }
    fields.update(ROWS[cell.method])
    return StructPruneConfig.from_dict(fields)


def convert(model, tokenizer, form: str) -> tuple[Any, int]:
    """Return the model in a form, and its size in bytes."""
    size = 2 * model.num_parameters()
    if form != FULL:
        for _, file in gguf_files(model, tokenizer, [form]):
            model = read_gguf(file)
            size = file.stat().st_size
    return model, size


def table(args: Namespace, patterns: Sequence[str]) -> str:
    """Return the rows that match a pattern as Markdown, without the columns that have no figure."""
    results = read_results(args)
    rows: dict[str, list[Cell]] = {}
    for cell in results:
        if cell.original in results and matches(cell.row, patterns):
            rows.setdefault(cell.row, []).append(cell)

    lines = [[""] + HEAD]
    for row, cells in rows.items():
        lines.append([row] + figures(results, cells))

    columns = []
    for head, *values in zip(*lines, strict=True):
        if set(values) != {"-"}:
            columns.append([head, "---"] + values)
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*columns, strict=True))


def read_results(args: Namespace) -> dict[Cell, dict[str, Any]]:
    """Return the results that have a file."""
    results = {}
    for cell in all_cells(args):
        path = cell.path(args)
        if path.exists():
            results[cell] = json.loads(path.read_text())
    return results


def figures(results: dict[Cell, dict[str, Any]], cells: Sequence[Cell]) -> list[str]:
    """Return the figures of one row. "-" stands for a missing figure.

    Args:
        results: The results of all cells.
        cells: The cells of the row, one for each seed.
    """
    original = results[cells[0].original]
    row = [results[cell] for cell in cells]
    parameters = fmean(result["parameters"] for result in row) / original["parameters"]

    removed = "-"
    minutes = "-"
    if parameters != 1:
        removed = f"{-100 * (1 - parameters):.1f} %"
        minutes = f"{fmean(result['seconds'] for result in row) / 60:.1f}"

    answers = "-"
    if original["right"]:
        number = fmean(sum(result["right"]) for result in row)
        answers = f"{number:.0f} of {len(original['right'])}, original {sum(original['right'])}"

    megabytes = f"{fmean(result['bytes'] for result in row) / 1e6:.1f}"
    same_kinds, other_kinds = perplexity_texts(row, original)
    flap = share_of_flap(results, cells)
    return [removed, megabytes, same_kinds, other_kinds, flap, answers, minutes, f"{len(cells)}"]


def perplexity_texts(row: Sequence[dict[str, Any]], original: dict[str, Any]) -> list[str]:
    """Return the perplexity relative to the original model, on the calibrated kinds and on other kinds."""
    differences = [extra_losses(result, original) for result in row]
    texts = []
    for losses in zip(*differences, strict=True):
        if len(losses) == 1:
            texts.append(ratio_text(losses[0]))
        else:
            texts.append(spread([exp(loss.mean()) for loss in losses]))

    return texts


def share_of_flap(results: dict[Cell, dict[str, Any]], cells: Sequence[Cell]) -> str:
    """Return the losses relative to FLAP with the same seed, on the calibrated kinds and on other kinds."""
    original = results[cells[0].original]
    ratios = []
    for cell in cells:
        flap = results.get(cell._replace(method=FLAP, form=FULL))
        if flap is not None:
            pairs = zip(extra_losses(results[cell], original), extra_losses(flap, original), strict=True)
            ratios.append([float(loss.mean() / flap_loss.mean()) for loss, flap_loss in pairs])

    if not ratios:
        return "-"
    return " / ".join(f"{fmean(kind):.2f}" for kind in zip(*ratios, strict=True))


def extra_losses(result: dict[str, Any], original: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the increase of each sample's loss in nats per token, on the calibrated kinds and on other kinds."""
    same_kinds: list[float] = []
    other_kinds: list[float] = []
    for name, losses in result["losses"].items():
        pairs = zip(losses, original["losses"][name], strict=True)
        differences = [loss - original_loss for loss, original_loss in pairs]
        if name in result["unseen"]:
            other_kinds += differences
        else:
            same_kinds += differences

    return torch.tensor(same_kinds), torch.tensor(other_kinds)


def write_table(page: Path, text: str) -> None:
    """Write a table between the two marks of a page."""
    page.write_text(MARKED.sub(lambda match: f"{match[1]}\n{text}\n\n{match[2]}", page.read_text()))


def main(argv: list[str] | None = None) -> None:
    """Read the arguments, run the cells and print the table."""
    parser = ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("out", help="folder for the results")
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=FOLDER")
    add_grid_arguments(parser, '"SmolLM2*, 35 %%, *" or "* defaults, seed 0"', samples=128)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--round-to", type=int, default=32, help="the divisor of all widths; llama.cpp needs 32")
    parser.add_argument("--answers", action="store_true", help="ask a chat model the built-in questions")
    parser.add_argument("--write", metavar="PAGE", help="write the rows of --rows between the two marks of this page")
    parser.add_argument("--rows", nargs="+", default=[f"* {OURS}", f"* {ORIGINAL}, Q4*"], help="patterns for --write")

    args = parser.parse_args(argv)

    models = {}
    for text in args.models:
        name, _, folder = text.partition("=")
        if not Path(folder, "config.json").is_file():
            parser.error(f"--models needs NAME=FOLDER with the folder of a model, got {text!r}")
        models[name] = folder

    args.models = models

    cells = [cell for cell in all_cells(args) if matches(cell.name, args.cells)]
    if args.list:
        print("\n".join(cell.name for cell in cells))
        return
    if args.write and not MARKED.search(Path(args.write).read_text()):
        raise StructPruneError(f"{args.write} has no line <!-- table: begin --> before a line <!-- table: end -->.")

    disable_progress_bar()
    run(args, cells)
    print(f"\n{table(args, ['*'])}")
    if args.write:
        write_table(Path(args.write), table(args, args.rows))


if __name__ == "__main__":
    main()
