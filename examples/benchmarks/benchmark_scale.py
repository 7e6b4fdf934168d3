"""Pruning at the shapes of large models, with random weights: peak memory and time per layer, in memory and streamed.

    python examples/benchmarks/benchmark_scale.py FOLDER --shape 7B --layers 2 --offload none disk --domains 1 5

A checkpoint of the shape is written to FOLDER, with as many layers as are asked for and no more than one of them in
memory, and pruned in a process of its own for each row of the table. Weights are random, so the figures are of memory
and time alone. Linux only, because the high-water mark of memory is read from /proc.
"""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, process_time

import torch
from benchmark_cost import load_libraries, reset_high_water_mark, resident
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config
from transformers.utils.logging import disable_progress_bar

from optimum_structprune import StructPruneConfig, StructPruner
from optimum_structprune.arch.load import describe
from optimum_structprune.arch.meta import meta_model
from optimum_structprune.sources.offloaded import layer_device_map


# Family, hidden size, FFN width, layers, heads, KV groups and vocabulary: a deeper TinyLlama, Qwen2.5-7B and -32B, and
# one that runs in seconds.
SHAPES = {
    "1.5B": (LlamaConfig, 2048, 5632, 32, 32, 4, 32000),
    "7B": (Qwen2Config, 3584, 18944, 28, 28, 4, 152064),
    "32B": (Qwen2Config, 5120, 27648, 64, 40, 8, 152064),
    "tiny": (LlamaConfig, 64, 256, 4, 4, 2, 512),
}
SHARE = 2 / 3


def shape_config(shape: str, layers: int | None) -> PretrainedConfig:
    """The config of a shape, with fewer layers where a number is given."""
    family, hidden, ffn, depth, heads, groups, vocabulary = SHAPES[shape]
    return family(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers or depth,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=[family.__name__.replace("Config", "ForCausalLM")],
    )


def write_checkpoint(config: PretrainedConfig, folder: Path) -> int:
    """Write random weights, one file per layer, and return their size in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    model = meta_model(config)
    arch, generator = describe(model), torch.Generator().manual_seed(0)
    prefixes = [arch.layer_prefix(layer) for layer in range(arch.num_layers)]
    parts: dict[str, list[str]] = {}
    for name in model.state_dict():
        part = next((prefix for prefix in prefixes if name.startswith(prefix)), name)
        parts.setdefault(part, []).append(name)
    files, size = {}, 0
    for number, names in enumerate(parts.values()):
        tensors = {name: random_weight(model.state_dict()[name], name, generator) for name in names}
        files |= dict.fromkeys(names, f"model-{number:05d}.safetensors")
        save_file(tensors, folder / f"model-{number:05d}.safetensors", {"format": "pt"})
        size += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return size


def random_weight(like: Tensor, name: str, generator: torch.Generator) -> Tensor:
    """Ones for norms, small random numbers for everything else, in bfloat16."""
    if "norm" in name:
        return torch.ones(like.shape, dtype=torch.bfloat16)
    return torch.empty(like.shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)


@torch.no_grad()
def forward_seconds(model, ids: Tensor) -> float:
    """The processor's time for plain forward passes, without the head."""
    start = process_time()
    for part in ids.split(4):
        model.base_model(part, use_cache=False)
    return process_time() - start


def measure(args: Namespace) -> dict[str, float]:
    """Prune the checkpoint once, in this process."""
    disable_progress_bar()
    load_libraries()
    config = AutoConfig.from_pretrained(args.folder)
    samples = args.tokens // args.seq_length
    per_domain = max(samples // args.domains, 1)
    inputs = {
        f"domain {number}": torch.randint(config.vocab_size, (per_domain + 2, args.seq_length))
        for number in range(args.domains)
    }
    width = int(config.intermediate_size * SHARE) // 64 * 64
    settings = StructPruneConfig(widths={"mlp": width}, seq_length=args.seq_length)
    with TemporaryDirectory() as scratch:
        before = resident("VmRSS")
        reset_high_water_mark()
        places: str | dict[str, str] = "cpu"
        if args.offload == "disk":
            places = layer_device_map(config, "cpu", "disk")
        model = AutoModelForCausalLM.from_pretrained(
            args.folder, device_map=places, offload_folder=scratch, dtype="auto"
        )
        forward = 0.0
        if args.offload == "none":
            # Out of the memory-mapped files, whose pages stay resident, though reclaimable.
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()
            ids = torch.cat([samples[:-2] for samples in inputs.values()])
            forward_seconds(model, ids[:1])
            forward = forward_seconds(model, ids)
            reset_high_water_mark()
        pruner = StructPruner(settings)
        start, spent = perf_counter(), process_time()
        small = pruner.prune_model(model, inputs=inputs, inplace=True)
        seconds, spent = perf_counter() - start, process_time() - spent
        peak = resident("VmHWM") - before
        pruning = sum(value for name, value in pruner.report.seconds.items() if name.startswith("round"))
        measuring = pruner.report.seconds["perplexity"]
        del model, small
    return {
        "peak": peak,
        "seconds": seconds,
        "per layer": pruning / config.num_hidden_layers,
        "measuring": measuring,
        "forwards": (spent * pruning / seconds) / forward if forward else float("nan"),
    }


def rows(args: Namespace) -> Iterator[str]:
    """One row for each way, measured in a process of its own."""
    size = write_checkpoint(shape_config(args.shape, args.layers), args.folder)
    _, _, ffn, depth, *_ = SHAPES[args.shape]
    layers, gram = args.layers or depth, 4 * ffn**2
    yield (
        f"{args.shape}, {layers} of {depth} layers, {size / 1e9:.2f} GB in bfloat16, {args.tokens:,} tokens, "
        f"one Gram matrix {gram / 1e9:.2f} GB\n"
    )
    yield (
        "| layers are | domains | peak GB | × checkpoint | beyond it, in Gram matrices | s per layer | "
        f"min for all {depth} layers | × forward |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for offload in args.offload:
        for domains in args.domains:
            options = {"offload": offload, "domains": domains, "tokens": args.tokens, "seq-length": args.seq_length}
            given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
            command = [sys.executable, __file__, str(args.folder), "--measure", *given]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            beyond = (found["peak"] - (size if offload == "none" else 0)) / gram
            where = "in memory" if offload == "none" else f"on the {offload}"
            yield (
                f"| {where} | {domains} | {found['peak'] / 1e9:.2f} | {found['peak'] / size:.2f} | {beyond:.2f} | "
                f"{found['per layer']:.1f} | {found['per layer'] * depth / 60:.1f} | {found['forwards']:.2f} |"
            )


def main(argv: list[str] | None = None) -> None:
    """Read the arguments and run."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="1.5B")
    parser.add_argument("--layers", type=int, help="by default all of the shape")
    parser.add_argument("--offload", nargs="+", choices=("none", "disk"), default=["none", "disk"])
    parser.add_argument("--domains", nargs="+", type=int, default=[1, 5])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--measure", action="store_true", help="measure one way in this process")
    args = parser.parse_args(argv)
    if args.measure:
        args.offload, args.domains = args.offload[0], args.domains[0]
        print(json.dumps(measure(args)))
        return
    for row in rows(args):
        print(row, flush=True)


if __name__ == "__main__":
    main()
