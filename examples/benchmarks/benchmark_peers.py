"""Compare this package with other tools for structured pruning: one model, one text, one number of parameters.

    python examples/benchmarks/benchmark_peers.py MODEL DATA out.json [--rows "optipfair*" ...] [--folder DIR] [--list]

DATA has the structure that `benchmark_table.py` describes. Every other tool has its own virtual environment under
`--folder`, by default a temporary folder, and pip installs the tool there. The environment of this script does not
change. For each row, one process prunes in the environment of the tool. A second process measures the result: it has
transformers but not the tool, and loads the result with plain `from_pretrained`. If this fails, the tool prunes once
more, and the same code measures the result in the environment of the tool. All rows use the same tokens, in fp32.
`out.json` keeps the rows, so an interrupted run can continue. To measure a row again, remove it from the file. The
script runs on Linux only, because it reads memory from /proc.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from statistics import geometric_mean
from tempfile import TemporaryDirectory
from typing import Any

from quality import (
    DOMAINS,
    SEQ_LENGTH,
    calibration_domains,
    evaluation_texts,
    load_results,
    matches,
    print_head,
    print_row,
    write_json,
)
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer

from optimum_structprune import StructPruneConfig, StructPruneError
from optimum_structprune.domains.load import load_domains


WORKER = Path(__file__).with_name("benchmark_peers_worker.py")
OURS = "optimum-structprune"
TEXTS = "texts.safetensors"
# The packages of each tool, in addition to torch and transformers.
INSTALLED = {
    "torch-pruning": ["torch-pruning==1.6.1"],
    "optipfair": ["optipfair==0.4.2"],
    "amd-quark": ["amd-quark==0.13"],
    "torch-kirigami": ["torch-kirigami==0.2.1"],
    # The package imports requests but does not require it.
    "nvidia-modelopt": ["nvidia-modelopt==0.47.0", "requests"],
}
# The tool of each row, the options that differ from its defaults, and the divisor of its FFN width.
ROWS: dict[str, tuple[str, dict[str, Any], int]] = {
    "original": ("", {}, 1),
    f"{OURS}, defaults": (OURS, {}, 1),
    "torch-pruning, GroupMagnitude (default)": ("torch-pruning", {"importance": "GroupMagnitudeImportance"}, 1),
    "torch-pruning, GroupTaylor": ("torch-pruning", {"importance": "GroupTaylorImportance"}, 1),
    "optipfair, MAW (default)": ("optipfair", {}, 1),
    "optipfair, MAW with data": ("optipfair", {"data": True}, 1),
    f"{OURS}, flap + bias": (OURS, {"criterion": "flap", "refit": "bias"}, 1),
    # Quark rounds the width to multiples of 128, and no option changes this.
    "amd-quark, OSSCAR (default)": ("amd-quark", {}, 128),
    f"{OURS}, defaults, Quark's width": (OURS, {}, 128),
    "torch-pruning, GroupTaylor, ranked over all layers": (
        "torch-pruning",
        {"importance": "GroupTaylorImportance", "global_pruning": True},
        1,
    ),
    "optipfair, VOW": ("optipfair", {"neuron_selection_method": "VOW"}, 1),
    "optipfair, PON": ("optipfair", {"neuron_selection_method": "PON"}, 1),
    "optipfair, L2": ("optipfair", {"neuron_selection_method": "L2"}, 1),
    "torch-kirigami, GroupMagnitude": ("torch-kirigami", {}, 1),
    "nvidia-modelopt, mcore_minitron": ("nvidia-modelopt", {}, 1),
}


def last_line(log: str) -> str:
    """Return the last line with text. The errors of pip and of Python end with their reason."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    if errors:
        return errors[-1]
    if lines:
        return lines[-1]
    return "no message"


def clean_environment() -> dict[str, str]:
    """Return the environment variables without the paths of the packages of this process."""
    variables = dict(os.environ, HF_HUB_OFFLINE="1")
    variables.pop("PYTHONPATH", None)
    variables.pop("VIRTUAL_ENV", None)
    return variables


def python_of(tool: str, folder: Path) -> str:
    """Return the Python of a tool's environment, and make the environment if it does not exist.

    Raises:
        StructPruneError: If the installation fails.
    """
    home = folder / tool
    python = str(home / "bin" / "python")
    stamp = home / "installed"
    if stamp.exists():
        return python

    print(f"making the environment {home}", file=sys.stderr, flush=True)

    venv = [sys.executable, "-m", "venv", "--clear", str(home)]
    pip = [python, "-m", "pip", "install", "--quiet", "torch", "transformers"] + INSTALLED[tool]
    for command in (venv, pip):
        process = subprocess.run(command, env=clean_environment(), capture_output=True, text=True)
        if process.returncode:
            raise StructPruneError(f"not installed: {last_line(process.stderr or process.stdout)}")

    stamp.write_text(" ".join(INSTALLED[tool]))
    return python


def call_worker(step: str, python: str, job: dict[str, Any], scratch: Path, minutes: float) -> dict[str, Any]:
    """Run a step of the worker, and return its answer or the reason of its failure as `error`."""
    job_file = scratch / "job.json"
    answer_file = scratch / "answer.json"
    answer_file.unlink(missing_ok=True)
    job_file.write_text(json.dumps(dict(job, answer=str(answer_file))))

    environment = clean_environment()
    if python == sys.executable:
        environment = dict(os.environ, HF_HUB_OFFLINE="1")
    command = [python, str(WORKER), step, str(job_file)]
    try:
        process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60 * minutes)
    except subprocess.TimeoutExpired:
        return {"error": f"no result within {minutes:g} minutes"}

    if answer_file.exists():
        return json.loads(answer_file.read_text())
    return {"error": f"exit code {process.returncode}: {last_line(process.stderr)}"}


def measure_row(name: str, args: Namespace, width: int, scratch: Path, folder: Path) -> dict[str, Any]:
    """Prune with one tool and measure the result.

    Args:
        name: The name of the row.
        args: The arguments of the benchmark.
        width: The FFN width, before it is rounded for the tool.
        scratch: A folder for temporary files.
        folder: The folder of the environments.
    """
    tool, options, divisor = ROWS[name]
    job = {
        "tool": tool,
        "options": options,
        "model": args.model,
        "width": divisor * round(width / divisor),
        "seed": args.seed,
        "texts": str(scratch / TEXTS),
        "out": str(scratch / "pruned"),
        "measure": False,
    }
    if name == "original":
        job["out"] = args.model
        return call_worker("evaluate", sys.executable, job, scratch, args.minutes)

    python = sys.executable
    if tool != OURS:
        try:
            python = python_of(tool, folder)
        except StructPruneError as error:
            return {"error": str(error)}

    row = call_worker("prune", python, job, scratch, args.minutes)
    if "error" in row:
        return row

    job["probe"] = row["probe"]
    evaluation = call_worker("evaluate", sys.executable, job, scratch, args.minutes)
    row["reloads"] = "yes"
    if "error" in evaluation:
        row["reloads"] = f"no: {evaluation['error']}"
        if tool != OURS:
            job["measure"] = True
            second_answer = call_worker("prune", python, job, scratch, args.minutes)
            evaluation = {field: second_answer[field] for field in ("error", "perplexity") if field in second_answer}

    row.update(evaluation)
    return row


def write_texts(args: Namespace, path: Path) -> list[str]:
    """Tokenize the text of all rows, write it to a file, and return the names of the unseen texts."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    config = StructPruneConfig(
        domains=calibration_domains(args, args.domains),
        num_samples=args.samples,
        seq_length=SEQ_LENGTH,
        sparsity=args.removed / 100,
        general_share=0.0,
        seed=args.seed,
    )
    calibration = {domain.name: domain.samples for domain in load_domains(config, tokenizer)}

    texts, unseen = evaluation_texts(args, args.domains, tokenizer)

    first_text = next(iter(texts.values()))
    tensors = {"probe": first_text[:1, :256].clone()}
    for kind, samples_by_name in (("calibration", calibration), ("texts", texts)):
        for number, (name, samples) in enumerate(samples_by_name.items()):
            tensors[f"{kind}/{number:02d}/{name}"] = samples.contiguous()
    save_file(tensors, path)
    return unseen


def run(args: Namespace) -> None:
    """Measure the rows that have no result, and print the table."""
    names = ["model", "data", "domains", "samples", "eval_samples", "removed", "seed"]
    results = load_results(args.out, args, names, rows={})
    full_width = AutoConfig.from_pretrained(args.model).intermediate_size
    width = round(full_width * (100 - args.removed) / 100)

    with TemporaryDirectory() as scratch:
        folder = Path(args.folder or scratch).resolve()
        results["unseen"] = write_texts(args, Path(scratch, TEXTS))
        for name in ROWS:
            if matches(name, args.rows) and name not in results["rows"]:
                print(f"measuring {name}", file=sys.stderr, flush=True)
                results["rows"][name] = measure_row(name, args, width, Path(scratch), folder)
                write_json(args.out, results)

    print_table(results)


def print_table(results: dict[str, Any]) -> None:
    """Print one row for each result, in the order of `ROWS`, and the versions of the tools."""
    columns = ["parameters", "FFN width", "held-out", "unseen", "CPU s", "s", "peak MiB", "plain from_pretrained"]
    print_head("row", columns)

    rows = results["rows"]
    for name in ROWS:
        if name not in rows:
            continue
        if "perplexity" in rows[name]:
            print_row(name, cells_of(results, name))
        else:
            print_row(name, [""] * (len(columns) - 1) + [rows[name]["error"]])

    versions = set()
    for row in rows.values():
        for tool, version in row.get("versions", {}).items():
            versions.add(f"{tool} {version}")
    print(f"\n{', '.join(sorted(versions))}")


def cells_of(results: dict[str, Any], name: str) -> list[str]:
    """Return the cells of a row that has a result."""
    row = results["rows"][name]
    cells = [f"{row['parameters']:,}", width_text(row.get("widths", []))]
    original = mean_perplexities(results, "original")
    for kind, value in mean_perplexities(results, name).items():
        ratio = value / original.get(kind, value)
        cells.append(f"{value:,.2f} ({ratio:,.2f})")

    for field in ("cpu_seconds", "seconds"):
        if field in row:
            cells.append(f"{row[field]:.1f}")
        else:
            cells.append("")

    peak = ""
    if "peak" in row:
        peak = f"{row['peak'] / 2**20:.0f}"
    return cells + [peak, row.get("reloads", "yes")]


def width_text(widths: list[int]) -> str:
    """Return the FFN width or, of different widths, the least and the largest."""
    if not widths:
        return ""
    low = min(widths)
    high = max(widths)
    if low == high:
        return str(low)
    return f"{low}-{high}"


def mean_perplexities(results: dict[str, Any], name: str) -> dict[str, float]:
    """Return the geometric means of a row's perplexities on held-out and on unseen text, if the row has a result."""
    perplexities = results["rows"].get(name, {}).get("perplexity")
    if not perplexities:
        return {}

    values: dict[str, list[float]] = {"held-out": [], "unseen": []}
    for text, perplexity in perplexities.items():
        if text in results["unseen"]:
            values["unseen"].append(perplexity)
        else:
            values["held-out"].append(perplexity)

    means = dict.fromkeys(values, float("nan"))
    for kind, kind_values in values.items():
        if kind_values:
            means[kind] = geometric_mean(kind_values)
    return means


def missing_paths(args: Namespace) -> list[str]:
    """Return the paths of the model and the text that do not exist."""
    paths = [Path(args.model)]
    for folder in ("calibration", "heldout", "unseen"):
        paths.append(Path(args.data, folder))
    return [str(path) for path in paths if not path.exists()]


def main(argv: list[str] | None = None) -> None:
    """Read the arguments and run."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder of a Llama-like model")
    parser.add_argument("data")
    parser.add_argument("out", help="JSON file with the results")
    parser.add_argument("--rows", nargs="+", default=["*"], help='patterns such as "optipfair*"')
    parser.add_argument("--list", action="store_true", help="print the names of the rows and stop")
    parser.add_argument("--folder", help="folder for the environments of the tools")
    parser.add_argument("--removed", type=float, default=35, help="FFN channels, in percent")
    parser.add_argument("--domains", nargs="+", default=list(DOMAINS), help="names of files in DATA/calibration")
    parser.add_argument("--samples", type=int, default=60, help="total number of calibration samples of 512 tokens")
    parser.add_argument("--eval-samples", type=int, default=8, help="samples of 512 tokens per evaluation file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60, help="time limit for one step of a row")

    args = parser.parse_args(argv)

    if args.list:
        print("\n".join(ROWS))
        return

    missing = missing_paths(args)
    if missing:
        print(f"skipped: {', '.join(missing)} not there")
    else:
        run(args)


if __name__ == "__main__":
    main()
