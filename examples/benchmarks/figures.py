"""Measure the figures of the docs by one protocol, and write the tables of the docs from one data file.

    python examples/benchmarks/figures.py measure DENSE DATA FOLDER [FOLDER ...] [--speed]
    python examples/benchmarks/figures.py render [--check]

`docs/figures.yaml` holds every figure with the command that produced it. A page shows a table between the lines
`<!-- figures: NAME -->` and `<!-- figures: end -->`, and `render` replaces the lines in between. `--check` fails if a
page differs.

The protocol: the first 8 samples of 512 tokens of each file in DATA/heldout (the domains wiki, code, math, dialogue
and web) and in DATA/unseen. Perplexity is relative to the original model, per token of the original tokenizer, as the
geometric mean over the files. KL is the mean over the files in nats per token. Answers are to the first 60 built-in
questions. Speed is decoding at batch size 1 on one thread.
"""

from __future__ import annotations

import json
import re
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping
from math import exp, log
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml


ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "docs" / "figures.yaml"
DOMAINS = ("wiki", "code", "math", "dialogue", "web")
SAMPLES = 8
SEQ_LENGTH = 512
QUESTIONS = 60
BLOCK = re.compile(r"(<!-- figures: ([\w-]+) -->\n).*?(<!-- figures: end -->)", re.DOTALL)


def table_text(table: Mapping[str, Any], figures: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a table as Markdown.

    Args:
        table: `head`, a list of headings, and `rows`, lists of cells. A cell may refer to a figure as
            `{NAME[FIELD]:.2f}`.
        figures: The fields of each figure, by its name.
    """
    lines = [table["head"], ["---"] * len(table["head"])]

    for row in table["rows"]:
        lines.append([cell.format_map(figures) for cell in row])

    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def command_text(table: Mapping[str, Any], figures: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the commands of the figures that a table shows, as a block of comments in Bash."""
    cells = " ".join(cell for row in table["rows"] for cell in row)
    commands = []

    for name in re.findall(r"\{([\w-]+)\[", cells):
        command = figures[name]["command"]
        if command not in commands:
            commands.append(command)

    lines = "".join(f"# {line}\n" for command in commands for line in command.strip().splitlines())
    return f"\n```bash\n{lines}```\n"


def rendered(page: str, data: Mapping[str, Any]) -> str:
    """Return the text of a page with its tables written anew."""

    def replacement(match: re.Match[str]) -> str:
        table = data["tables"][match[2]]
        text = table_text(table, data["figures"])

        if table.get("commands", True):
            text += command_text(table, data["figures"])

        return f"{match[1]}\n{text}\n{match[3]}"

    return BLOCK.sub(replacement, page)


def pages() -> Iterator[Path]:
    """Yield the README and the pages of the docs."""
    yield ROOT / "README.md"
    yield from sorted((ROOT / "docs").rglob("*.md"))


def render(check: bool) -> list[Path]:
    """Write the tables of all pages, and return the pages that differed.

    Args:
        check: Compare only, and write nothing.
    """
    data = yaml.safe_load(FIGURES.read_text())
    changed = []

    for page in pages():
        text = page.read_text()
        new_text = rendered(text, data)
        if new_text == text:
            continue

        changed.append(page)
        if not check:
            page.write_text(new_text)

    return changed


def domains_of(data: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the evaluation domains by folder, as arguments of `evaluate`."""
    heldout = [data / "heldout" / f"{name}.jsonl" for name in DOMAINS]
    unseen = sorted((data / "unseen").glob("*.jsonl"))
    folders = {"heldout": heldout, "unseen": unseen}
    return {folder: [{"name": path.stem, "source": str(path)} for path in paths] for folder, paths in folders.items()}


def measure(args: Namespace) -> Iterator[dict[str, Any]]:
    """Yield the figures of each folder, relative to the original model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from optimum_structprune import evaluate, measure_speed

    dense = AutoModelForCausalLM.from_pretrained(args.dense, dtype=args.dtype)
    dense_tokenizer = AutoTokenizer.from_pretrained(args.dense)

    for folder in args.folders:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=args.dtype)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        parameters = model.num_parameters() / dense.num_parameters() - 1
        row: dict[str, Any] = {"folder": Path(folder).name, "parameters": round(100 * parameters, 1)}
        row["megabytes"] = round(2 * model.num_parameters() / 1e6, 1)

        for name, domains in domains_of(Path(args.data)).items():
            evaluation = evaluate(
                model,
                tokenizer,
                domains,
                dense,
                dense_tokenizer=dense_tokenizer,
                seq_length=SEQ_LENGTH,
                num_samples=SAMPLES,
            )
            results = evaluation.domains.values()
            ratios = [result.perplexity.ratio for result in results]
            row[name] = round(exp(fmean(map(log, ratios))), 3)
            row[f"{name}_worst"] = round(max(ratios), 3)
            divergences = [result.divergence.pruned for result in results if result.divergence is not None]
            if divergences:
                row[f"{name}_kl"] = round(fmean(divergences), 3)

        if args.answers:
            evaluation = evaluate(
                model, tokenizer, dense=dense, dense_tokenizer=dense_tokenizer, answers="builtin", limit=QUESTIONS
            )
            questions = evaluation.answers.questions
            row["right"] = sum(question.answers["pruned"].right for question in questions)
            row["right_of_dense"] = sum(question.answers["dense"].right for question in questions)

        if args.speed:
            torch.set_num_threads(1)
            models = {"dense": dense, "model": model}
            speed = measure_speed(models, prompts=[16], new_tokens=16, repeats=9, clock="cpu")
            (by_model,) = speed.decode.values()
            row["speedup"] = round(by_model["model"].speedup.median, 2)

        yield row


def main(argv: list[str] | None = None) -> None:
    """Run a subcommand."""
    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure", help="measure pruned models by the protocol of the docs")
    measuring.add_argument("dense", help="the original model")
    measuring.add_argument("data", help="a folder with heldout/ and unseen/")
    measuring.add_argument("folders", nargs="+", help="pruned models")
    measuring.add_argument("--dtype", default="float32")
    measuring.add_argument("--answers", action="store_true", help="ask the built-in questions too")
    measuring.add_argument("--speed", action="store_true", help="measure decoding too")
    rendering = commands.add_parser("render", help="write the tables of the README and the docs")
    rendering.add_argument("--check", action="store_true", help="write nothing, and fail if a page differs")
    args = parser.parse_args(argv)

    if args.command == "measure":
        for row in measure(args):
            print(json.dumps(row), flush=True)
        return

    changed = render(args.check)
    if changed and args.check:
        names = ", ".join(str(page.relative_to(ROOT)) for page in changed)
        sys.exit(f"These pages differ from docs/figures.yaml: {names}. Run examples/benchmarks/figures.py render.")


if __name__ == "__main__":
    main()
