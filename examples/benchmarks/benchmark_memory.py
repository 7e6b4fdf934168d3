"""Peak memory of pruning against the estimate of `structprune plan --cost`: two layers of a Llama of random weights.

    python examples/benchmarks/benchmark_memory.py --ffn 8192 --domains 5

Measured is the highest resident set while pruning in place, less what was resident with the model loaded. Linux only,
because the high-water mark is reset through /proc.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

import torch
from benchmark_cost import load_libraries, reset_high_water_mark, resident
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from optimum_structprune import StructPruneConfig, StructPruner
from optimum_structprune.arch.load import ModelInfo
from optimum_structprune.pruning.memory import estimate_memory
from optimum_structprune.pruning.request import PruningRequest


def run(args: Namespace) -> None:
    """Measure and print."""
    load_libraries()
    torch.manual_seed(0)
    sizes = {"hidden_size": args.hidden, "num_attention_heads": 8, "num_key_value_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=1000, intermediate_size=args.ffn, num_hidden_layers=2, **sizes))
    model = model.eval().to(getattr(torch, args.dtype))
    config = StructPruneConfig(widths={"mlp": args.ffn * 2 // 3 // 64 * 64}, num_samples=20, seq_length=512)
    inputs = {f"domain {i}": torch.randint(1000, (20 // args.domains + 4, 512)) for i in range(args.domains)}
    found = estimate_memory(PruningRequest(config, ModelInfo.of(model), inputs=inputs))
    before = resident("VmRSS")
    reset_high_water_mark()
    StructPruner(config).prune_model(model, inputs=inputs, inplace=True)
    peak = resident("VmHWM") - before
    print(f"FFN {args.ffn}, {args.domains} domains: estimated {found.above / 1e6:,.0f} MB at its peak")
    print(f"measured {peak / 1e6:,.0f} MB, so the estimate is {found.above / peak - 1:+.1%} off")


def main(argv: list[str] | None = None) -> None:
    """Read the arguments and run."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--ffn", type=int, default=4096)
    parser.add_argument("--domains", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    disable_progress_bar()
    run(parser.parse_args(argv))


if __name__ == "__main__":
    main()
