"""Prune a model with several commands, and print the results as a table.

    python examples/benchmarks/pick_yours.py MODEL FOLDER [--row "FLAGS OF PRUNE" ...] [--other NAME=SOURCE ...]
        [--num-samples 8] [--questions 640]

The first row is the original model. Each other row is `structprune prune MODEL … FLAGS`. The script exports all models
in eight bits for llama.cpp, and shows both sizes. transformers evaluates the models in fp32. The table has the number
of correct answers of the original model that remain correct, the perplexity relative to the original model on
held-out text of the calibrated kinds and on `--other` text, and the tokens that one thread generates per second of CPU
time. The models are timed in turns. A language counts as lost if the original model knows it and its text needs over
2 % more bits. FOLDER keeps the models and rows. A later call adds new rows to the table and measures only these.
"""

from __future__ import annotations

import json
import shlex
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_structprune import evaluate, export_gguf, measure_speed
from optimum_structprune.commands.arguments import domain
from optimum_structprune.commands.cli import main as structprune
from optimum_structprune.record.figures import known_languages, mean_ratio, ratios_of
from optimum_structprune.record.report import Report


ROWS = ["--target vocab --budget parameters=0.9 --num-samples 24"]
OTHER = ["countries=builtin:countries", "letters=builtin:letters"]
# A larger ratio of bits means that a language is lost.
MAX_RATIO = 1.02
ORIGINAL = "the original model"
HEAD = [
    "model",
    "command",
    "parameters",
    "MB in 16 bits, in Q8_0",
    "tokens/s",
    "correct answers",
    "held-out",
    "other text",
    "languages lost",
]
# The model, the flags of `structprune prune`, and the figures.
Row = tuple[str, str, dict[str, Any]]


def load(folder: str | Path):
    """Load a model in fp32 and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


def size_figures(model, tokenizer, file: str) -> dict[str, Any]:
    """Export a model in eight bits, and return its number of parameters and the size of the file."""
    gguf = export_gguf(model, file, tokenizer, overwrite=True, dtype="q8_0")
    return {"parameters": model.num_parameters(), "bytes": gguf.bytes}


def measure_row(args: Namespace, flags: str, folder: Path) -> dict[str, Any]:
    """Return the figures of one row.

    Args:
        args: The arguments of the script.
        flags: The flags of `structprune prune`, or an empty text for the original model.
        folder: The folder of the pruned model. The model is pruned if the folder does not exist.
    """
    original, original_tokenizer = load(args.model)
    file = f"{folder}.gguf"
    if not flags:
        return size_figures(original, original_tokenizer, file)

    if not folder.exists():
        code = structprune(["prune", args.model, str(folder)] + shlex.split(flags))
        if code:
            raise SystemExit(code)

    model, tokenizer = load(folder)
    row = size_figures(model, tokenizer, file)

    evaluation = evaluate(
        model,
        tokenizer,
        [domain(text) for text in args.other],
        original=original,
        original_tokenizer=original_tokenizer,
        num_samples=args.num_samples,
        answers="builtin",
        limit=args.questions,
    )
    report = Report.load(folder / "report.json")
    row["before"] = original.num_parameters()
    row["same"] = mean_ratio(ratios_of(report.domains).values())[0]

    row["right_before"], row["right"] = evaluation.answers.counts("right")
    row["questions"] = len(evaluation.answers.questions)
    row["other"] = mean_ratio(ratios_of(evaluation.domains).values())[0]

    languages = dict(known_languages(report.languages))
    row["lost"] = sum(ratio > MAX_RATIO for ratio in languages.values())
    row["known"] = len(languages)
    return row


def measure_speeds(rows: Sequence[Row], folders: Sequence[str | Path]) -> None:
    """Measure the models in these folders in turns, and enter the speeds into their rows."""
    models = {}
    for folder in folders:
        models[str(folder)], _ = load(folder)
    torch.set_num_threads(1)

    speed = measure_speed(models, new_tokens=16, repeats=9, clock="cpu")
    (by_model,) = speed.decode.values()
    for (_, _, figures), model_speed in zip(rows, by_model.values(), strict=True):
        figures["tokens_per_second"] = model_speed.tokens_per_second


def cells_of(model: str, flags: str, row: dict[str, Any]) -> list[str]:
    """Return the cells of a row of the table."""
    megabytes = f"{2 * row['parameters'] / 1e6:.0f}, {row['bytes'] / 1e6:.0f}"
    speed = f"{row['tokens_per_second']:.1f}"
    if not flags:
        parameters = f"{row['parameters'] / 1e6:.0f}M"
        return [model, ORIGINAL, parameters, megabytes, speed, "–", "× 1", "× 1", "none"]

    removed = f"−{100 - 100 * row['parameters'] / row['before']:.0f} %"
    answers = f"{row['right_before']} → {row['right']} of {row['questions']}"
    languages = "none"
    if row["known"]:
        languages = f"{row['lost']} of {row['known']}"

    ratios = [f"× {row['same']:.2f}", f"× {row['other']:.2f}"]
    return [model, f"`{flags}`", removed, megabytes, speed, answers] + ratios + [languages]


def update_rows(args: Namespace) -> list[Row]:
    """Measure the rows that the folder does not contain, and return all rows."""
    args.folder.mkdir(parents=True, exist_ok=True)
    path = args.folder / "rows.json"
    rows: list[Row] = []
    if path.exists():
        rows = json.loads(path.read_text())

    measured = {(model, flags) for model, flags, _ in rows}
    has_new_rows = False
    for flags in [""] + (args.row or ROWS):
        if (args.model, flags) not in measured:
            figures = measure_row(args, flags, args.folder / f"row-{len(rows)}")
            rows.append((args.model, flags, figures))
            measured.add((args.model, flags))
            has_new_rows = True
            path.write_text(json.dumps(rows, indent=1))

    model_rows = []
    folders = []
    for number, (model, flags, figures) in enumerate(rows):
        if model == args.model:
            model_rows.append((model, flags, figures))
            if flags:
                folders.append(args.folder / f"row-{number}")
            else:
                folders.append(args.model)

    if has_new_rows or any("tokens_per_second" not in figures for _, _, figures in model_rows):
        measure_speeds(model_rows, folders)
        path.write_text(json.dumps(rows, indent=1))
    return rows


def main(argv: list[str] | None = None) -> None:
    """Read the arguments, measure the missing rows, and print the table."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a folder or an id on the Hub")
    parser.add_argument("folder", type=Path, help="the folder of the models and rows")
    parser.add_argument("--row", action="append", metavar="FLAGS", help="flags of `structprune prune`; repeatable")
    parser.add_argument("--other", nargs="+", default=OTHER, metavar="NAME=SOURCE", help="other text to evaluate on")
    parser.add_argument("--num-samples", type=int, default=8, help="samples of each text")
    parser.add_argument("--questions", type=int, default=640)

    args = parser.parse_args(argv)

    lines = [HEAD, ["---"] * len(HEAD)]
    for model, flags, figures in update_rows(args):
        lines.append(cells_of(Path(model).name, flags, figures))
    for cells in lines:
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
