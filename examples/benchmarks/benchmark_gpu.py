"""What pruning does on a GPU: right results, how much memory it takes, how fast it and its results are. One table.

    python examples/benchmarks/benchmark_gpu.py [--device cuda] [--cap 24] [--folder FOLDER]

A model of the shape of Qwen2.5-7B with random weights is made on the disk first, 15 GB, and pruned as it is, and then
with its layers in the CPU's memory and on the disk while the GPU may take no more than `--cap` GB. Beside 15 GB of the
CPU's memory it takes 45 GB of the disk, and a card of 48 GB, where the dense model stays beside the pruned one at
first. `--device cpu --tiny` goes through the same motions anywhere.
"""

from __future__ import annotations

import gc
import json
import platform
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
from safetensors.torch import save_file
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from optimum_structprune import StructPruneConfig, StructPruner, measure_speed
from optimum_structprune.commands.loading import Loading
from optimum_structprune.forward.generation import read_prompt


QWEN_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 4096,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 512,
}
SMALL = {**TINY, "hidden_size": 256, "intermediate_size": 640}
# How far weights and perplexity may lie from those of the CPU, as shares, and how many units may be others.
TOLERANCE = {"float32": (1e-3, 1e-4, 0.0), "bfloat16": (None, 2e-2, 0.1)}
Row = tuple[str, str, bool]


def make_model(shape: dict, folder: Path, dtype: torch.dtype) -> None:
    """Write a random model with a file for each layer, of which only one is in memory at a time."""
    config = AutoConfig.for_model("qwen2", **shape, tie_word_embeddings=False, dtype=dtype)
    config.architectures = ["Qwen2ForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        tensors = AutoModelForCausalLM.from_config(config).state_dict()
    files: dict[str, list[str]] = {}
    for name in tensors:
        layer = name.split(".")[2] if name.startswith("model.layers.") else "around"
        files.setdefault(f"model-{layer}.safetensors", []).append(name)
    generator = torch.Generator().manual_seed(0)
    for file, names in files.items():
        values = {name: random_weight(name, tensors[name].shape, generator).to(dtype) for name in names}
        save_file(values, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, names in files.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def random_weight(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """As the model would be initialized: norms are one, biases zero."""
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    # A normal distribution of the same width takes ten times as long to draw.
    return torch.empty(shape).uniform_(-0.035, 0.035, generator=generator)


def samples(shape: dict, count: int, length: int) -> torch.Tensor:
    """Random calibration text."""
    return torch.randint(shape["vocab_size"], (count, length), generator=torch.Generator().manual_seed(1))


def pruned(model, shape: dict, ids: torch.Tensor, inplace: bool = False):
    """A quarter of the FFN goes."""
    width = shape["intermediate_size"] * 3 // 4
    settings = {"num_samples": len(ids), "seq_length": ids.shape[1]}
    pruner = StructPruner(StructPruneConfig(widths={"mlp": width}, **settings))
    return pruner, pruner.prune_model(model, inplace=inplace, inputs={"random": ids})


def perplexity(pruner: StructPruner) -> float:
    return pruner.report.domains["random"].perplexity.pruned


def unlike(first: StructPruner, second: StructPruner) -> float:
    """The share of the kept units that two runs do not both keep."""
    pairs = [(set(units), set(second.plan.keep[place])) for place, units in first.plan.keep.items()]
    return sum(len(mine - theirs) for mine, theirs in pairs) / sum(len(mine) for mine, _ in pairs)


def compared(args: Namespace) -> Iterator[Row]:
    """Pruning on the device against pruning on the CPU."""
    for name, (of_weights, of_perplexity, of_units) in TOLERANCE.items():
        dtype, ids = getattr(torch, name), samples(SMALL, 16, 128)
        with TemporaryDirectory(dir=args.folder) as folder:
            make_model(SMALL, Path(folder), dtype)
            runs = [pruned(Loading(device=device).model(folder), SMALL, ids) for device in ("cpu", args.device)]
        (on_cpu, theirs), (on_device, ours) = runs
        others = unlike(on_cpu, on_device)
        apart = abs(perplexity(on_device) / perplexity(on_cpu) - 1)
        right = others <= of_units and apart <= of_perplexity
        text = f"{others:.1%} other units, perplexity off by {apart:.1e}"
        if of_weights is not None:
            pairs = zip(theirs.state_dict().values(), ours.state_dict().values(), strict=True)
            off = max(float((a - b.cpu()).abs().max() / a.abs().max().clamp(min=1e-9)) for a, b in pairs)
            right, text = right and off <= of_weights, f"{text}, weights by {off:.1e} (at most {of_weights:.0e})"
        yield f"{name}: {args.device} against the CPU", text, right


def timed(device: str, work: Callable) -> tuple:
    """What some work gives, the seconds that it takes, and the GB of the GPU's memory that it takes at most."""
    gc.collect()
    if device == "cpu":
        tokenize_with_prefix = perf_counter()
        return work(), perf_counter() - tokenize_with_prefix, 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    tokenize_with_prefix = perf_counter()
    result = work()
    torch.cuda.synchronize()
    return result, perf_counter() - tokenize_with_prefix, torch.cuda.max_memory_allocated() / 1e9


def matrix_rate(device: str, dtype: torch.dtype, size: int) -> float:
    """The floating-point operations per second of one large product of matrices."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    timer = Timer("left @ right", globals={"left": left, "right": right})
    return 2 * size**3 / timer.blocked_autorange(min_run_time=0.5).median


def in_memory(args: Namespace, model: Path, shape: dict, ids: torch.Tensor, rows: list[Row]) -> StructPruner:
    """Pruning with all weights on the device, and the speed of what comes of it."""
    dense = Loading(device=args.device).model(str(model))
    (pruner, small), seconds, peak = timed(args.device, lambda: pruned(dense, shape, ids))
    rows.append(("pruned in memory, beside the dense model", f"{seconds:.0f} s, {peak:.1f} GB", True))
    rate = matrix_rate(args.device, dense.dtype, 256 if args.tiny else 8192)
    rows.append(("rate of a large product of matrices", f"{rate / 1e12:.1f} TFLOP/s", True))
    prompt = 32 if args.tiny else 2048
    models = {"dense": dense, "pruned": small}
    speed = measure_speed(models, batch_sizes=(4,), prompts=(prompt,), new_tokens=8 if args.tiny else 32, repeats=5)
    ((_, reading),), ((_, writing),) = speed.prefill.items(), speed.decode.items()
    for name, model in models.items():
        read, write = reading[name], writing[name]
        share = 4 * prompt_flops(model, prompt) / median(read["seconds"]) / rate
        text = f"reads {read.tokens_per_second:,.0f} tokens/s ({share:.0%} of that rate), "
        text += f"writes {write.tokens_per_second:,.0f} tokens/s"
        if name == "pruned":
            text += f": x {read.speedup.median:.2f} and x {write.speedup.median:.2f}"
        rows.append((name, text, True))
    return pruner


def prompt_flops(model, tokens: int) -> int:
    """The floating-point operations to read a prompt: of its logits the last alone, where a model can do so."""
    with FlopCounterMode(display=False) as counter:
        read_prompt(model, torch.zeros(1, tokens, dtype=torch.long, device=model.device))
    return counter.get_total_flops()


def offloaded(
    args: Namespace, model: Path, shape: dict, ids: torch.Tensor, place: str, expected: StructPruner
) -> Iterator[Row]:
    """Pruning with the layers elsewhere, up to a saved result that loads plainly."""

    def run(scratch: str) -> StructPruner:
        dense = Loading(device=args.device, offload=place).model(str(model), scratch)
        pruner, small = pruned(dense, shape, ids, inplace=True)
        pruner.save(small, Path(scratch) / "small")
        return pruner

    with TemporaryDirectory(dir=args.folder) as scratch:
        pruner, seconds, peak = timed(args.device, lambda: run(scratch))
    others, apart = unlike(expected, pruner), abs(perplexity(pruner) / perplexity(expected) - 1)
    text = f"{seconds:.0f} s, {peak:.1f} GB, {others:.1%} other units, perplexity off by {apart:.1e}"
    right = others <= TOLERANCE["bfloat16"][2] and apart <= TOLERANCE["bfloat16"][1]
    yield f"pruned with its layers on --offload {place}, and saved", text, right and peak <= args.cap


def rows_of(args: Namespace) -> list[Row]:
    """All measurements."""
    shape = TINY if args.tiny else QWEN_7B
    ids = samples(shape, 16, 64 if args.tiny else 1024)
    rows = list(compared(args))
    with TemporaryDirectory(dir=args.folder) as folder:
        model = Path(folder)
        _, seconds, _ = timed("cpu", lambda: make_model(shape, model, torch.bfloat16))
        rows.append(
            (f"random model of {shape['num_hidden_layers']} layers, bfloat16", f"made in {seconds:.0f} s", True)
        )
        pruner = in_memory(args, model, shape, ids, rows)
        gc.collect()
        if args.device != "cpu":
            torch.cuda.empty_cache()
            total = torch.cuda.get_device_properties(args.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, args.cap * 1e9 / total))
        for place in ("disk",) if args.device == "cpu" else ("cpu", "disk"):
            rows += offloaded(args, model, shape, ids, place, pruner)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and say with the exit code whether all results are right."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="A tiny model in place of the large one.")
    parser.add_argument("--cap", type=float, default=24, help="GB of the GPU's memory that offloading may take.")
    parser.add_argument("--folder", help="Where the model is made; the default is the folder for temporary files.")
    args = parser.parse_args(argv)
    disable_progress_bar()
    card = platform.processor() or platform.machine() if args.device == "cpu" else torch.cuda.get_device_name()
    rows = rows_of(args)
    print(f"| {card}, torch {torch.__version__} | | |\n|---|---|---|")
    for name, text, right in rows:
        print(f"| {name} | {text} | {'' if right else 'WRONG'} |")
    return 0 if all(right for *_, right in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
