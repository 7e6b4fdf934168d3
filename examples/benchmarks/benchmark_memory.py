"""Compare the peak memory of pruning with the estimate of `structprune plan --cost`.

    python examples/benchmarks/benchmark_memory.py --ffn 8192 --domains 5

The model is a Llama with two layers and random weights. The script measures the peak resident set during pruning in
place, less the resident set with the loaded model. It runs on Linux only, because it resets the high-water mark
through /proc.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

import torch
from benchmark_cost import load_libraries, reset_high_water_mark, resident
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from optimum_structprune import StructPruneConfig, StructPruner
from optimum_structprune.arch.load import ModelInfo
from optimum_structprune.pruning.cost import pruning_cost
from optimum_structprune.pruning.request import PruningRequest


VOCABULARY = 1000
NUM_SAMPLES = 20
SEQ_LENGTH = 512


def run(args: Namespace) -> None:
    """Measure and print."""
    load_libraries()

    torch.manual_seed(0)
    sizes = {"hidden_size": args.hidden, "num_attention_heads": 8, "num_key_value_heads": 8, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, intermediate_size=args.ffn, **sizes))
    model = model.eval().to(getattr(torch, args.dtype))

    width = args.ffn * 2 // 3 // 64 * 64
    config = StructPruneConfig(widths={"mlp": width}, num_samples=NUM_SAMPLES, seq_length=SEQ_LENGTH)
    # Each domain has more samples than the calibration uses, because the pruning holds some out.
    count = NUM_SAMPLES // args.domains + 4
    inputs = {}
    for number in range(args.domains):
        inputs[f"domain {number}"] = torch.randint(VOCABULARY, (count, SEQ_LENGTH))

    memory = pruning_cost(PruningRequest(config, ModelInfo.of(model), inputs=inputs)).memory
    estimate = memory["hidden states"] + memory["working memory"]

    resident_before = resident("VmRSS")
    reset_high_water_mark()
    StructPruner(config).prune_model(model, inputs=inputs, inplace=True)
    peak = resident("VmHWM") - resident_before

    print(f"FFN {args.ffn}, {args.domains} domains: estimated {estimate / 1e6:,.0f} MB at its peak")
    print(f"measured {peak / 1e6:,.0f} MB, so the estimate is {estimate / peak - 1:+.1%} off")


def main(argv: list[str] | None = None) -> None:
    """Read the arguments and run."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--ffn", type=int, default=4096)
    parser.add_argument("--domains", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])

    args = parser.parse_args(argv)
    disable_progress_bar()
    run(args)


if __name__ == "__main__":
    main()
