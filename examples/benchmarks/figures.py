"""Measure the figures of the docs by one protocol, and write the tables of the docs from one data file.

    python examples/benchmarks/figures.py measure ORIGINAL DATA FOLDER [FOLDER ...] [--speed]
    python examples/benchmarks/figures.py render [--check]

`docs/figures.yaml` holds every figure with the command that produced it. A page shows a table between the lines
`<!-- figures: NAME -->` and `<!-- figures: end -->`, and `render` replaces the lines in between. `--check` fails if a
page differs.

The protocol uses the first 8 samples of 512 tokens of each file in DATA/heldout (the domains wiki, code, math,
dialogue and web) and in DATA/unseen. Perplexity is relative to the original model, per token of the original
tokenizer, as the geometric mean over the files. KL is the mean over the files in nats per token. The models answer all
built-in questions with at most 64 tokens. Intervals are 95 % confidence intervals over questions. Speed is the speed
of decoding at batch size 1 on one thread.
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
ANSWER_TOKENS = 64
ANSWER_BATCH = 128
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
    commands = []
    for row in table["rows"]:
        for name in re.findall(r"\{([\w-]+)\[", " ".join(row)):
            command = figures[name]["command"].strip()
            if command not in commands:
                commands.append(command)

    lines = "\n".join(commands).splitlines()
    comments = "".join(f"# {line}\n" for line in lines)
    return f"\n```bash\n{comments}```\n"


def render_page(page: str, data: Mapping[str, Any]) -> str:
    """Return the text of a page with its current tables."""

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
        new_text = render_page(text, data)
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
    return {"heldout": as_domains(heldout), "unseen": as_domains(unseen)}


def as_domains(paths: list[Path]) -> list[dict[str, Any]]:
    """Return a domain for each file."""
    return [{"name": path.stem, "source": str(path)} for path in paths]


def measure(args: Namespace) -> Iterator[dict[str, Any]]:
    """Yield the figures of each folder, relative to the original model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    original = AutoModelForCausalLM.from_pretrained(args.original, dtype=args.dtype)
    original_tokenizer = AutoTokenizer.from_pretrained(args.original)

    for folder in args.folders:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=args.dtype)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        parameters = model.num_parameters() / original.num_parameters() - 1

        row: dict[str, Any] = {"folder": Path(folder).name, "parameters": round(100 * parameters, 1)}
        row["megabytes"] = round(2 * model.num_parameters() / 1e6, 1)
        if not args.answers_only:
            row.update(quality_figures(args, model, tokenizer, original, original_tokenizer))
        if args.answers or args.answers_only:
            row.update(answer_figures(args, model, tokenizer, original, original_tokenizer))
        if args.speed:
            row["speedup"] = speedup_of(model, original)
        yield row


def quality_figures(args: Namespace, model, tokenizer, original, original_tokenizer) -> dict[str, float]:
    """Return the perplexity relative to the original model and the KL, on held-out and on unseen text."""
    from optimum_structprune import evaluate

    figures = {}
    for name, domains in domains_of(Path(args.data)).items():
        evaluation = evaluate(
            model,
            tokenizer,
            domains,
            original,
            original_tokenizer=original_tokenizer,
            seq_length=SEQ_LENGTH,
            num_samples=SAMPLES,
        )

        results = evaluation.domains.values()
        ratios = [result.perplexity.ratio for result in results]
        figures[name] = round(exp(fmean(map(log, ratios))), 3)
        figures[f"{name}_worst"] = round(max(ratios), 3)

        divergences = [result.divergence.pruned for result in results if result.divergence is not None]
        if divergences:
            figures[f"{name}_kl"] = round(fmean(divergences), 3)

    return figures


def answer_figures(args: Namespace, model, tokenizer, original, original_tokenizer) -> dict[str, Any]:
    """Return the correct answers of a model and of the original model, and how the model follows its answers."""
    from optimum_structprune import evaluate
    from optimum_structprune.record.answers import followed, right_by_kind, right_difference

    answers = evaluate(
        model,
        tokenizer,
        original=original,
        original_tokenizer=original_tokenizer,
        answers="builtin",
        limit=args.questions,
        max_new_tokens=ANSWER_TOKENS,
        batch_size=ANSWER_BATCH,
    ).answers
    original, pruned = answers.counts("right")
    figures: dict[str, Any] = {"right": pruned, "right_of_original": original, "questions": len(answers.questions)}
    figures["points"] = [round(100 * end, 1) for end in right_difference(answers)]

    result = followed(answers, "pruned")
    for name, interval in result._asdict().items():
        figures[name] = round(interval.value, 3)
        figures[f"{name}_margin"] = round((interval.high - interval.low) / 2, 3)

    kinds = {name: right_by_kind(answers, name) for name in answers.models}
    figures["kinds"] = {kind: [kinds["original"][kind][0], right] for kind, (right, _) in kinds["pruned"].items()}
    return figures


def speedup_of(model, original) -> float:
    """Return the speed of decoding, relative to the original model."""
    import torch

    from optimum_structprune import measure_speed

    torch.set_num_threads(1)

    models = {"original": original, "model": model}
    speed = measure_speed(models, prompts=[16], new_tokens=16, repeats=9, clock="cpu")
    (by_model,) = speed.decode.values()
    return round(by_model["model"].speedup.median, 2)


def main(argv: list[str] | None = None) -> None:
    """Run a subcommand."""
    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    measuring = commands.add_parser("measure", help="measure pruned models by the protocol of the docs")
    measuring.add_argument("original", help="the original model")
    measuring.add_argument("data", help="a folder with heldout/ and unseen/")
    measuring.add_argument("folders", nargs="+", help="pruned models")
    measuring.add_argument("--dtype", default="float32")
    measuring.add_argument("--answers", action="store_true", help="ask the built-in questions too")
    measuring.add_argument(
        "--answers-only", action="store_true", help="ask the built-in questions, and measure no text"
    )
    measuring.add_argument("--questions", type=int, help="ask only the first questions")
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
