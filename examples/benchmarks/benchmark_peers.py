"""This package beside other tools for structured pruning: one model, one text, one number of parameters.

    python examples/benchmarks/benchmark_peers.py MODEL DATA out.json [--rows "optipfair*" ...] [--folder DIR] [--list]

DATA is as for `benchmark_table.py`. Every tool but this package gets a virtual environment of its own under
`--folder` (a temporary one otherwise), into which pip installs it; the environment that runs this script stays as it
is. Each row is pruned in a process of its tool's environment, and measured in a second one, which has transformers
and not the tool, and loads the result by plain `from_pretrained`. Where that fails, the tool prunes once more, and its
environment measures the result by the same code. All rows get the same tokens, in fp32. `out.json` keeps the rows, so
a run can be interrupted, and go on; a row that is removed from it is measured again. Linux only, since memory is read
from /proc.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import geometric_mean
from tempfile import TemporaryDirectory
from typing import Any

from quality import DOMAINS, SEQ_LENGTH, begin, calibration, evaluation_texts, show, write_json
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer

from optimum_structprune import StructPruneConfig, StructPruneError
from optimum_structprune.domains.load import load_domains


WORKER = Path(__file__).with_name("benchmark_peers_worker.py")
OURS = "optimum-structprune"
TEXTS = "texts.safetensors"
# What pip installs for each tool, beside torch and transformers.
INSTALLED = {
    "torch-pruning": ["torch-pruning==1.6.1"],
    "optipfair": ["optipfair==0.4.2"],
    "amd-quark": ["amd-quark==0.13"],
    "torch-kirigami": ["torch-kirigami==0.2.1"],
    # It imports requests, which pip does not install with it.
    "nvidia-modelopt": ["nvidia-modelopt==0.47.0", "requests"],
}
# Each row's tool, what differs from the tool's defaults, and the multiple that its width is rounded to.
ROWS: dict[str, tuple[str, dict[str, Any], int]] = {
    "dense": ("", {}, 1),
    f"{OURS}, defaults": (OURS, {}, 1),
    "torch-pruning, GroupMagnitude (default)": ("torch-pruning", {"importance": "GroupMagnitudeImportance"}, 1),
    "torch-pruning, GroupTaylor": ("torch-pruning", {"importance": "GroupTaylorImportance"}, 1),
    "optipfair, MAW (default)": ("optipfair", {}, 1),
    "optipfair, MAW with data": ("optipfair", {"data": True}, 1),
    f"{OURS}, flap + bias": (OURS, {"criterion": "flap", "refit": "bias"}, 1),
    # Quark itself rounds to multiples of 128, and has no setting for it.
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
    """The last line that says anything; pip's errors and Python's end with their reason."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["no message"])[-1]


def clean_environment() -> dict[str, str]:
    """The variables of this process without those that would lend this environment's packages to another."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return {**kept, "HF_HUB_OFFLINE": "1"}


def python_of(tool: str, folder: Path) -> str:
    """The Python of a tool's own environment, which is made if it is not there.

    Raises:
        StructPruneError: If it cannot be made.
    """
    home = folder / tool
    python, stamp = home / "bin" / "python", home / "installed"
    if not stamp.exists():
        print(f"making the environment {home}", file=sys.stderr, flush=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "torch", "transformers", *INSTALLED[tool]]
        for command in ([sys.executable, "-m", "venv", "--clear", str(home)], pip):
            done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True)
            if done.returncode:
                raise StructPruneError(f"not installed: {last_line(done.stderr or done.stdout)}")
        stamp.write_text(" ".join(INSTALLED[tool]))
    return str(python)


def work(step: str, python: str, job: dict[str, Any], scratch: Path, minutes: float) -> dict[str, Any]:
    """What a step of the worker answers, or `error`, the reason why it gave no answer."""
    job_file, answer = scratch / "job.json", scratch / "answer.json"
    answer.unlink(missing_ok=True)
    job_file.write_text(json.dumps({**job, "answer": str(answer)}))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"} if python == sys.executable else clean_environment()
    command = [python, str(WORKER), step, str(job_file)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60 * minutes)
    except subprocess.TimeoutExpired:
        return {"error": f"no result within {minutes:g} minutes"}
    if answer.exists():
        return json.loads(answer.read_text())
    return {"error": f"exit code {done.returncode}: {last_line(done.stderr)}"}


def row_of(name: str, args: Namespace, width: int, scratch: Path, folder: Path) -> dict[str, Any]:
    """Prune by one tool and measure the result."""
    tool, options, multiple = ROWS[name]
    out, width = scratch / "pruned", multiple * round(width / multiple)
    job = {"tool": tool, "options": options, "model": args.model, "width": width, "seed": args.seed}
    job |= {"texts": str(scratch / TEXTS), "out": str(out), "measure": False}
    if name == "dense":
        return work("evaluate", sys.executable, {**job, "out": args.model}, scratch, args.minutes)
    try:
        python = sys.executable if tool == OURS else python_of(tool, folder)
    except StructPruneError as error:
        return {"error": str(error)}
    row = work("prune", python, job, scratch, args.minutes)
    if "error" in row:
        return row
    job["probe"] = row["probe"]
    measured = work("evaluate", sys.executable, job, scratch, args.minutes)
    row["reloads"] = f"no: {measured['error']}" if "error" in measured else "yes"
    if "error" in measured and tool != OURS:
        again = work("prune", python, {**job, "measure": True}, scratch, args.minutes)
        measured = {name: again[name] for name in ("error", "perplexity") if name in again}
    return {**row, **measured}


def write_texts(args: Namespace, path: Path) -> list[str]:
    """Tokenise all text once, for every row, and return the names of what nobody calibrates on."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    fields = {"domains": calibration(args, args.domains), "num_samples": args.samples, "seq_length": SEQ_LENGTH}
    config = StructPruneConfig(**fields, sparsity=args.removed / 100, general_share=0.0, seed=args.seed)
    domains = {domain.name: domain.samples for domain in load_domains(config, tokenizer)}
    texts, unseen = evaluation_texts(args, args.domains, tokenizer)
    probe = next(iter(texts.values()))[:1, :256]
    tensors = {"probe": probe.clone()}
    for kind, samples in (("calibration", domains), ("texts", texts)):
        for number, (name, part) in enumerate(samples.items()):
            tensors[f"{kind}/{number:02d}/{name}"] = part.contiguous()
    save_file(tensors, path)
    return unseen


def run(args: Namespace) -> None:
    """Measure the rows that are missing and print the table."""
    same = ("model", "data", "domains", "samples", "eval_samples", "removed", "seed")
    results = begin(args.out, args, same, rows={})
    chosen = [name for name in ROWS if any(fnmatchcase(name, pattern) for pattern in args.rows)]
    with TemporaryDirectory() as scratch:
        folder = Path(args.folder or scratch).resolve()
        results["unseen"] = write_texts(args, Path(scratch) / TEXTS)
        width = round(AutoConfig.from_pretrained(args.model).intermediate_size * (100 - args.removed) / 100)
        for name in chosen:
            if name in results["rows"]:
                continue
            print(f"measuring {name}", file=sys.stderr, flush=True)
            results["rows"][name] = row_of(name, args, width, Path(scratch), folder)
            write_json(args.out, results)
    table(results)


def table(results: dict[str, Any]) -> None:
    """Print one Markdown row per result, in the order of `ROWS`."""
    columns = ["parameters", "FFN width", "held-out", "unseen", "CPU s", "s", "peak MiB", "plain from_pretrained"]
    show("row", columns)
    show("---", ["---" for _ in columns])
    rows, dense = results["rows"], means(results, "dense")
    for name in (name for name in ROWS if name in rows):
        row, quality = rows[name], means(results, name)
        if not quality:
            show(name, [""] * (len(columns) - 1) + [row["error"]])
            continue
        texts = [f"{value:,.2f} ({value / dense.get(kind, value):,.2f})" for kind, value in quality.items()]
        cost = [f"{row[field]:.1f}" if field in row else "" for field in ("cpu_seconds", "seconds")]
        peak = f"{row['peak'] / 2**20:.0f}" if "peak" in row else ""
        sizes = sorted({*row.get("widths", [])})
        width = "" if not sizes else str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]}-{sizes[-1]}"
        show(name, [f"{row['parameters']:,}", width, *texts, *cost, peak, row.get("reloads", "yes")])
    used = sorted({f"{tool} {version}" for row in rows.values() for tool, version in row.get("versions", {}).items()})
    print(f"\n{', '.join(used)}")


def means(results: dict[str, Any], name: str) -> dict[str, float]:
    """The geometric means of a row's perplexities on held-out and on unseen text; none of a row that has no result."""
    perplexity = results["rows"].get(name, {}).get("perplexity", {})
    kinds = {"held-out": False, "unseen": True}
    values = {kind: [v for n, v in perplexity.items() if (n in results["unseen"]) is of] for kind, of in kinds.items()}
    return {kind: geometric_mean(found) if found else float("nan") for kind, found in values.items() if perplexity}


def missing(args: Namespace) -> list[str]:
    """What of the model and the text is not there."""
    needed = [Path(args.model), *(Path(args.data) / part for part in ("calibration", "heldout", "unseen"))]
    return [str(path) for path in needed if not path.exists()]


def main(argv: list[str] | None = None) -> None:
    """Read the arguments and run."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder of a Llama-like model")
    parser.add_argument("data")
    parser.add_argument("out", help="JSON file with the results")
    parser.add_argument("--rows", nargs="+", default=["*"], help='patterns such as "optipfair*"')
    parser.add_argument("--list", action="store_true", help="name the rows and stop")
    parser.add_argument("--folder", help="where the environments of the tools are made, and stay")
    parser.add_argument("--removed", type=float, default=35, help="FFN channels, in percent")
    parser.add_argument("--domains", nargs="+", default=list(DOMAINS), help="names of files in DATA/calibration")
    parser.add_argument("--samples", type=int, default=60, help="calibration samples of 512 tokens in all")
    parser.add_argument("--eval-samples", type=int, default=8, help="samples of 512 tokens per evaluation file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60, help="the longest that one step of a row may take")
    args = parser.parse_args(argv)
    if args.list:
        print("\n".join(ROWS))
    elif absent := missing(args):
        print(f"skipped: {', '.join(absent)} not there")
    else:
        run(args)


if __name__ == "__main__":
    main()
