"""What each command makes of a model, as the rows of docs/pick_yours.md and of the README.

    python examples/benchmarks/pick_yours.py MODEL FOLDER [--row "FLAGS OF PRUNE" ...] [--other NAME=SOURCE ...]
        [--num-samples 8] [--questions 120]

The first row is the dense model, and each other one `structprune prune MODEL … FLAGS`. All are written in eight bits
for llama.cpp, and both sizes are shown. Answers, text and speed are those of the folder in transformers, in fp32:
right answers that stay right, perplexity as a multiple of the dense one, on held-out text of the kinds that were
calibrated on and on `--other` text, and the tokens that one thread writes in a second of the processor, where the
models take turns. A language is lost where the dense model knew it and its text takes over 2 % more bits. FOLDER keeps
the models and rows; a row that is there is not measured again, so a later call adds to the table.
"""

from __future__ import annotations

import json
import shlex
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_structprune import evaluate, export_gguf, measure_speed
from optimum_structprune.commands.arguments import domain
from optimum_structprune.commands.cli import main as structprune
from optimum_structprune.record.figures import known_languages, mean_ratio, ratios_of
from optimum_structprune.record.report import Report


ROWS = ("--target vocab --budget parameters=0.9 --num-samples 24",)
OTHER = ("countries=builtin:countries", "letters=builtin:letters")
LOST = 1.02
DENSE = "the dense model"
HEAD = ("model", "command", "parameters", "MB in 16 bits, in Q8_0", "tokens/s", "answers kept")
HEAD += ("held-out", "other text", "languages lost")
Row = tuple[str, str, dict[str, Any]]


def loaded(folder: str | Path):
    """A model in fp32 and its tokenizer."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def measured(args: Namespace, flags: str, small: Path) -> dict[str, Any]:
    """The figures of one row, whose model is in a folder or is put there."""
    dense, reader = loaded(args.model)
    model, tokenizer, report = dense, reader, None
    if flags:
        command = ["prune", args.model, str(small), *shlex.split(flags)]
        if not small.exists() and (code := structprune(command)):
            raise SystemExit(code)
        model, tokenizer = loaded(small)
        report = Report.load(small / "report.json")
    file = export_gguf(model, f"{small}.gguf", tokenizer, overwrite=True, dtype="q8_0")
    row = {"parameters": model.num_parameters(), "bytes": file.bytes}
    if not flags:
        return row
    found = evaluate(
        model,
        tokenizer,
        [domain(text) for text in args.other],
        dense=dense,
        dense_tokenizer=reader,
        num_samples=args.num_samples,
        answers="builtin",
        limit=args.questions,
    )
    assert report is not None and found.answers is not None
    right = [item for item in found.answers.questions if item.first.right]
    known = dict(known_languages(report.languages))
    return {
        **row,
        "before": dense.num_parameters(),
        "same": mean_ratio(ratios_of(report.domains).values())[0],
        "kept": sum(item.last.right for item in right),
        "of": len(right),
        "other": mean_ratio(ratios_of(found.domains).values())[0],
        "lost": sum(ratio > LOST for ratio in known.values()),
        "known": len(known),
    }


def time_(rows: list[Row], places: list[str | Path]) -> None:
    """Enter into rows how fast the models in these places write, which take turns."""
    models = {str(place): loaded(place)[0] for place in places}
    torch.set_num_threads(1)
    ((_, speeds),) = measure_speed(models, new_tokens=16, repeats=9, clock="cpu").decode.items()
    for (_, _, row), speed in zip(rows, speeds.values(), strict=True):
        row["tokens_per_second"] = speed.tokens_per_second


def cells(model: str, flags: str, row: dict[str, Any]) -> list[str]:
    """A row as text."""
    size = [f"{2 * row['parameters'] / 1e6:.0f}, {row['bytes'] / 1e6:.0f}", f"{row['tokens_per_second']:.1f}"]
    if not flags:
        return [model, DENSE, f"{row['parameters'] / 1e6:.0f}M", *size, "all", "× 1", "× 1", "none"]
    gone = f"−{100 - 100 * row['parameters'] / row['before']:.0f} %"
    text = [f"× {row['same']:.2f}", f"× {row['other']:.2f}"]
    languages = f"{row['lost']} of {row['known']}" if row["known"] else "none"
    return [model, f"`{flags}`", gone, *size, f"{row['kept']} of {row['of']}", *text, languages]


def main(argv: list[str] | None = None) -> None:
    """Measure what is not there, and print the table."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a folder or an id on the Hub")
    parser.add_argument("folder", type=Path, help="where models and rows are kept")
    parser.add_argument("--row", action="append", metavar="FLAGS", help="flags of `structprune prune`; repeatable")
    parser.add_argument("--other", nargs="+", default=OTHER, metavar="NAME=SOURCE", help="text to judge by")
    parser.add_argument("--num-samples", type=int, default=8, help="of each text")
    parser.add_argument("--questions", type=int, default=120)
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    path = args.folder / "rows.json"
    rows: list[Row] = json.loads(path.read_text()) if path.exists() else []
    known = len(rows)
    for flags in ("", *(args.row or ROWS)):
        if (args.model, flags) not in ((model, of) for model, of, _ in rows):
            rows.append((args.model, flags, measured(args, flags, args.folder / f"row-{len(rows)}")))
            path.write_text(json.dumps(rows, indent=1))
    own = [(row, args.folder / f"row-{place}") for place, row in enumerate(rows) if row[0] == args.model]
    if len(rows) > known or any("tokens_per_second" not in row for (_, _, row), _ in own):
        time_([row for row, _ in own], [place if row[1] else args.model for row, place in own])
        path.write_text(json.dumps(rows, indent=1))
    for line in (HEAD, ["---"] * len(HEAD), *(cells(Path(model).name, flags, row) for model, flags, row in rows)):
        print(f"| {' | '.join(line)} |")


if __name__ == "__main__":
    main()
