"""Measure peak memory and time of pruning at the shapes of large models, in memory and streamed from the disk.

    python examples/benchmarks/benchmark_scale.py FOLDER --shape 7B --layers 2 --offload none disk --domains 1 5

The script writes a checkpoint of the shape to FOLDER with the requested number of layers, one layer at a time. For
each row of the table, a new process prunes the checkpoint. Weights are random, so only memory and time are meaningful.
The script runs on Linux only, because it reads the high-water mark of memory from /proc.
"""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, process_time

import torch
from benchmark_cost import copy_weights, forward_seconds, load_libraries, reset_high_water_mark, resident
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen2Config
from transformers.utils.logging import disable_progress_bar

from optimum_structprune import StructPruneConfig, StructPruner
from optimum_structprune.arch.load import describe
from optimum_structprune.arch.meta import meta_model
from optimum_structprune.method.offloaded import layer_device_map


# Family, hidden size, FFN width, layers, heads, KV groups and vocabulary of a deeper TinyLlama, of Qwen2.5-7B, of
# Qwen2.5-32B, and of a model that is pruned within seconds.
SHAPES = {
    "1.5B": (LlamaConfig, 2048, 5632, 32, 32, 4, 32000),
    "7B": (Qwen2Config, 3584, 18944, 28, 28, 4, 152064),
    "32B": (Qwen2Config, 5120, 27648, 64, 40, 8, 152064),
    "tiny": (LlamaConfig, 64, 256, 4, 4, 2, 512),
}
# The remaining share of the FFN channels.
SHARE = 2 / 3
# The samples of each domain in addition to the calibration samples. The pruning holds samples out.
EXTRA_SAMPLES = 2
BATCH_SIZE = 4
HEAD = (
    "| layers are | domains | peak GB | × checkpoint | beyond it, in Gram matrices | s per layer | "
    "min for all {depth} layers | × forward |\n"
    "|---|---|---|---|---|---|---|---|"
)


def shape_config(shape: str, layers: int | None = None) -> PretrainedConfig:
    """Return the config of a shape, by default with all layers."""
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
    """Write random weights with one file per layer, and return their size in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    model = meta_model(config)
    weights = model.state_dict()
    generator = torch.Generator().manual_seed(0)
    weight_map = {}
    size = 0

    for number, names in enumerate(weights_by_layer(model)):
        tensors = {name: random_weight(weights[name].shape, name, generator) for name in names}
        file = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
        size += sum(tensor.nbytes for tensor in tensors.values())

    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return size


def weights_by_layer(model: PreTrainedModel) -> list[list[str]]:
    """Return the names of the weights of each layer, and of each weight outside the layers."""
    arch = describe(model)
    prefixes = [arch.layer_prefix(layer) for layer in range(arch.num_layers)]

    parts: dict[str, list[str]] = {}
    for name in model.state_dict():
        part = name
        for prefix in prefixes:
            if name.startswith(prefix):
                part = prefix
        parts.setdefault(part, []).append(name)

    return list(parts.values())


def random_weight(shape: torch.Size, name: str, generator: torch.Generator) -> Tensor:
    """Return ones for norms and small random numbers for other weights, in bfloat16."""
    if "norm" in name:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)


def random_inputs(args: Namespace, vocabulary: int) -> dict[str, Tensor]:
    """Return random token ids for each domain."""
    samples = args.tokens // args.seq_length
    per_domain = max(samples // args.domains, 1)
    inputs = {}
    for number in range(args.domains):
        inputs[f"domain {number}"] = torch.randint(vocabulary, (per_domain + EXTRA_SAMPLES, args.seq_length))
    return inputs


def measure(args: Namespace) -> dict[str, float]:
    """Prune the checkpoint once in this process, and return the figures."""
    disable_progress_bar()
    load_libraries()
    config = AutoConfig.from_pretrained(args.folder)
    inputs = random_inputs(args, config.vocab_size)

    width = int(config.intermediate_size * SHARE) // 64 * 64
    pruner = StructPruner(StructPruneConfig(widths={"mlp": width}, seq_length=args.seq_length))

    with TemporaryDirectory() as scratch:
        resident_before = resident("VmRSS")
        reset_high_water_mark()

        places: str | dict[str, str] = "cpu"
        if args.offload == "disk":
            places = layer_device_map(config, "cpu", "disk")
        model = AutoModelForCausalLM.from_pretrained(
            args.folder, device_map=places, offload_folder=scratch, dtype="auto"
        )

        forward = float("nan")
        if args.offload == "none":
            copy_weights(model)
            ids = torch.cat([samples[:-EXTRA_SAMPLES] for samples in inputs.values()])
            forward_seconds(model, ids[:1], BATCH_SIZE)
            forward = forward_seconds(model, ids, BATCH_SIZE, process_time)
            reset_high_water_mark()

        start = perf_counter()
        cpu_start = process_time()
        pruner.prune_model(model, inputs=inputs, inplace=True)

        seconds = perf_counter() - start
        cpu_seconds = process_time() - cpu_start
        peak = resident("VmHWM") - resident_before
        # The files of the offloaded weights are in the folder, so the model ends before it.
        del model

    stages = pruner.result.report.seconds
    pruning = sum(stage_seconds for stage, stage_seconds in stages.items() if stage.startswith("round"))
    return {
        "peak": peak,
        "seconds": seconds,
        "per layer": pruning / config.num_hidden_layers,
        "measuring": stages["perplexity"],
        "forwards": cpu_seconds * pruning / seconds / forward,
    }


def measure_in_process(args: Namespace, offload: str, domains: int) -> dict[str, float]:
    """Measure in a new process, so that the memory of earlier rows is excluded."""
    command = [sys.executable, __file__, str(args.folder), "--measure", "--offload", offload]
    command += ["--domains", str(domains), "--tokens", str(args.tokens), "--seq-length", str(args.seq_length)]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(process.stdout.splitlines()[-1])


def print_table(args: Namespace) -> None:
    """Write the checkpoint, and print one row for each way."""
    config = shape_config(args.shape, args.layers)

    size = write_checkpoint(config, args.folder)
    depth = shape_config(args.shape).num_hidden_layers
    gram = 4 * config.intermediate_size**2
    print(
        f"{args.shape}, {config.num_hidden_layers} of {depth} layers, {size / 1e9:.2f} GB in bfloat16, "
        f"{args.tokens:,} tokens, one Gram matrix {gram / 1e9:.2f} GB\n"
    )
    print(HEAD.format(depth=depth), flush=True)

    for offload in args.offload:
        for domains in args.domains:
            figures = measure_in_process(args, offload, domains)

            place = f"on the {offload}"
            extra = figures["peak"]
            if offload == "none":
                place = "in memory"
                extra -= size

            cells = [
                place,
                f"{domains}",
                f"{figures['peak'] / 1e9:.2f}",
                f"{figures['peak'] / size:.2f}",
                f"{extra / gram:.2f}",
                f"{figures['per layer']:.1f}",
                f"{figures['per layer'] * depth / 60:.1f}",
                f"{figures['forwards']:.2f}",
            ]
            print(f"| {' | '.join(cells)} |", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Read the arguments and run."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="1.5B")
    parser.add_argument("--layers", type=int, help="by default all layers of the shape")
    parser.add_argument("--offload", nargs="+", choices=("none", "disk"), default=["none", "disk"])
    parser.add_argument("--domains", nargs="+", type=int, default=[1, 5])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--measure", action="store_true", help="measure one way in this process")

    args = parser.parse_args(argv)

    if args.measure:
        args.offload = args.offload[0]
        args.domains = args.domains[0]
        print(json.dumps(measure(args)))
    else:
        print_table(args)


if __name__ == "__main__":
    main()
