"""Prune, save, recover, evaluate and decode models on a GPU, and measure each stage.

    python examples/benchmarks/benchmark_gpu.py [MODEL ...] [--output gpu.json]

By default the models have 0.6, 1.7 and 8 billion parameters. A model is an id of the Hub or a folder. The script
measures the seconds and the peak memory of each stage. It writes all figures, the GPU and the versions of the
libraries into one JSON file, and updates the file after each model. If a stage fails, the script records the error and
continues with the next model.

All text is built in. First, the script prunes a small random model on the CPU and on the GPU, and compares the
results. `--device cpu` runs everything on the CPU, without peak memory.
"""

from __future__ import annotations

import gc
import json
import platform
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from optimum_structprune import (
    DomainConfig,
    Recovery,
    RecoveryConfig,
    StructPruneConfig,
    StructPruner,
    evaluate,
    measure_speed,
)
from optimum_structprune.commands.loading import Loading


MODELS = ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B", "Qwen/Qwen3-8B")
LIBRARIES = ("optimum-structprune", "torch", "transformers", "accelerate", "peft", "datasets", "safetensors")
# The text of the evaluation. "warnings" of the result name the documents that the pruning or the training has read.
EVALUATED = DomainConfig(name="countries", source="builtin:countries")
SMALL = {
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
    "max_position_embeddings": 512,
}
# The largest difference between the CPU and a GPU in fp32, relative to the largest weight of a tensor.
TOLERANCE = 1e-3


class Stages:
    """Measures the seconds and the peak memory of named stages on a device."""

    def __init__(self, device: torch.device):
        self.device = device
        self.figures: dict[str, dict[str, float]] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the code inside `with`."""
        on_gpu = self.device.type == "cuda"
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)

        start = perf_counter()
        try:
            yield
        finally:
            if on_gpu:
                torch.cuda.synchronize(self.device)
            figures = {"seconds": perf_counter() - start}
            if on_gpu:
                figures["peak_bytes"] = torch.cuda.max_memory_allocated(self.device)
                figures["peak_reserved_bytes"] = torch.cuda.max_memory_reserved(self.device)
            self.figures[name] = figures
            print(f"  {name}: {figures['seconds']:.1f} s, {figures.get('peak_bytes', 0) / 1e9:.2f} GB", flush=True)


def run_model(args: Namespace, name: str, folder: Path) -> dict[str, Any]:
    """Prune, save, recover and measure one model, and return its figures or the error."""
    stages = Stages(torch.device(args.device))
    result: dict[str, Any] = {"model": name, "stages": stages.figures}
    try:
        measure_model(args, name, folder, stages, result)
    except Exception as error:  # The other models run after an error.
        result["error"] = f"{type(error).__name__}: {error}"
        print(f"  {result['error']}", file=sys.stderr, flush=True)

    return result


def measure_model(args: Namespace, name: str, folder: Path, stages: Stages, result: dict[str, Any]) -> None:
    """Run all stages of one model, and enter the figures into `result`."""
    loading = Loading(dtype=args.dtype, device=args.device, attn_implementation=args.attn_implementation)

    with stages.stage("load"):
        model, tokenizer = loading.model_and_tokenizer(name)
    result["dtype"] = str(model.dtype)
    result["attn_implementation"] = model.config._attn_implementation

    config = StructPruneConfig(
        sparsity=args.sparsity, targets=("mlp",), num_samples=args.num_samples, seq_length=args.seq_length
    )
    pruner = StructPruner(config)
    with stages.stage("prune"):
        pruned = pruner.prune_model(model, tokenizer, inplace=True)
    result["parameters"] = {
        "original": pruner.result.report.original.parameters,
        "pruned": pruner.result.report.pruned.parameters,
    }
    result["pruning_seconds"] = pruner.result.report.seconds
    result["domains"] = pruner.result.report.to_dict()["domains"]
    # Free the memory for the original model.
    del model

    with stages.stage("save"):
        pruner.save(pruned, folder / "pruned", tokenizer=tokenizer)

    with stages.stage("load original"):
        original = loading.model(name)
    with stages.stage("recover"):
        training = {"output_dir": str(folder / "checkpoints"), "save_strategy": "no"}
        recovery_config = RecoveryConfig(tokens=args.tokens, training=training)
        recovery = Recovery(recovery_config, config, pruned=folder / "pruned")
        pruned = recovery.recover_model(pruned, tokenizer, original)

    result["recovery"] = {
        "tokens": recovery.report.tokens,
        "steps": recovery.report.steps,
        "domains": recovery.report.to_dict()["domains"],
    }
    with stages.stage("save recovered"):
        recovery.save(pruned, folder / "recovered", tokenizer=tokenizer)

    with stages.stage("evaluate"):
        evaluation = evaluate(
            pruned, tokenizer, [EVALUATED], original, seq_length=args.seq_length, num_samples=args.eval_samples
        )

    result["evaluation"] = {"text": EVALUATED.name}
    result["evaluation"].update(evaluation.to_dict()["domains"][EVALUATED.name])
    result["evaluation"]["warnings"] = evaluation.warnings

    with stages.stage("speed"):
        speed = measure_speed(
            {"original": original, "pruned": pruned},
            batch_sizes=args.batch_sizes,
            prompts=(args.prompt,),
            new_tokens=args.new_tokens,
            repeats=args.repeats,
        )

    result["speed"] = speed.to_dict()


def compare_with_cpu(device: str) -> dict[str, float]:
    """Prune a small random model on the CPU and on a device, and compare the remaining units and the weights."""
    config = AutoConfig.for_model("qwen2", **SMALL, tie_word_embeddings=False)
    torch.manual_seed(0)
    cpu_model = AutoModelForCausalLM.from_config(config).eval()
    device_model = deepcopy(cpu_model).to(device)
    ids = torch.randint(SMALL["vocab_size"], (16, 128))

    cpu_units = prune_small(cpu_model, ids)
    device_units = prune_small(device_model, ids)

    other_units = 0
    for place, units in cpu_units.items():
        other_units += len(set(units) - set(device_units[place]))

    largest_difference = 0.0
    device_weights = device_model.state_dict()
    for name, weight in cpu_model.state_dict().items():
        difference = float((weight - device_weights[name].cpu()).abs().max())
        largest = float(weight.abs().max().clamp(min=1e-9))
        largest_difference = max(largest_difference, difference / largest)

    return {"other_units": other_units, "largest_difference": largest_difference}


def prune_small(model, ids: torch.Tensor):
    """Prune the small model in place, and return the units that remain."""
    config = StructPruneConfig(widths={"mlp": 480}, num_samples=len(ids), seq_length=ids.shape[1])
    pruner = StructPruner(config)
    pruner.prune_model(model, inputs={"random": ids}, inplace=True)
    return pruner.result.plan.keep


def versions() -> dict[str, str | None]:
    """Return the versions of Python, of CUDA and of the libraries."""
    numbers: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in LIBRARIES:
        try:
            numbers[name] = version(name)
        except PackageNotFoundError:
            numbers[name] = None

    return numbers


def device_figures(device: str) -> dict[str, Any]:
    """Return the name and the memory of a device."""
    if device == "cpu":
        return {"name": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}

    properties = torch.cuda.get_device_properties(device)
    return {"name": properties.name, "total_bytes": properties.total_memory}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all models and write the file. Return 1 if a result is wrong or a stage failed."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(MODELS), metavar="MODEL", help="Ids or folders.")
    parser.add_argument("--output", default="gpu.json", help="The file for all figures.")
    parser.add_argument("--device", default="cuda", help="cuda, a GPU such as cuda:1, or cpu.")
    parser.add_argument("--dtype", default="auto", help="The dtype; auto uses the dtype of the files.")
    parser.add_argument("--attn-implementation", help="The attention kernels; by default those of transformers.")
    parser.add_argument("--folder", help="A folder for temporary files; by default the temporary folder.")
    parser.add_argument("--sparsity", type=float, default=0.25, help="The share of the FFN channels to remove.")
    parser.add_argument("--num-samples", type=int, default=128, help="Calibration samples.")
    parser.add_argument("--seq-length", type=int, default=512, help="Tokens in a sample.")
    parser.add_argument("--tokens", type=int, default=100_000, help="Tokens of the recovery.")
    parser.add_argument("--eval-samples", type=int, default=16, help="Samples of the evaluation.")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16], help="Batch sizes of the decoding.")
    parser.add_argument("--prompt", type=int, default=512, help="Tokens in each prompt.")
    parser.add_argument("--new-tokens", type=int, default=64, help="Tokens to decode.")
    parser.add_argument("--repeats", type=int, default=5, help="Timed runs of each model.")

    args = parser.parse_args(argv)

    if args.device != "cpu" and not torch.cuda.is_available():
        parser.error("There is no GPU here. Run it where `torch.cuda.is_available()`, or pass --device cpu.")

    disable_progress_bar()

    settings = dict(vars(args))
    for name in ("models", "output", "folder"):
        del settings[name]
    record: dict[str, Any] = {
        "device": device_figures(args.device),
        "versions": versions(),
        "settings": settings,
        "same_as_cpu": compare_with_cpu(args.device),
        "models": [],
    }

    for name in args.models:
        print(name, flush=True)
        with TemporaryDirectory(dir=args.folder) as folder:
            record["models"].append(run_model(args, name, Path(folder)))
        Path(args.output).write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")

    comparison = record["same_as_cpu"]
    is_right = comparison["other_units"] == 0 and comparison["largest_difference"] <= TOLERANCE
    print(f"as on the CPU: {is_right}; written to {args.output}")
    has_errors = any("error" in result for result in record["models"])
    return int(has_errors or not is_right)


if __name__ == "__main__":
    sys.exit(main())
