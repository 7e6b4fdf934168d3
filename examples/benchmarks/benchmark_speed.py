"""Measure the speed of the same model at several FFN widths, relative to the first width.

    python examples/benchmarks/benchmark_speed.py MODEL [--widths 998 992 1000 1008 1024] [--dtype bfloat16]

The models run in turns. Each model has the first channels of every FFN, because speed does not depend on the choice of
the channels.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from copy import deepcopy

from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from optimum_structprune import measure_speed
from optimum_structprune.arch.load import describe
from optimum_structprune.arch.meta import shrunk_skeleton
from optimum_structprune.arch.modules import adopt_config_
from optimum_structprune.method.shrink import shrink_layer_


def narrow_copy(model, width: int):
    """Return a copy of the model with the first channels of every FFN."""
    narrow = deepcopy(model)
    arch = describe(model)
    keep = {(space.layer, "mlp"): tuple(range(width)) for space in arch.of("mlp")}
    skeleton = shrunk_skeleton(narrow, arch, {"mlp": width})
    for layer in range(arch.num_layers):
        shrink_layer_(narrow, arch, layer, keep, skeleton)
    adopt_config_(narrow, skeleton)
    return narrow


def run(args: Namespace) -> None:
    """Measure and print."""
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).eval().to(args.device)
    models = {f"mlp={width}": narrow_copy(model, width) for width in args.widths}
    # Free the memory of the original model.
    del model

    speed = measure_speed(
        models,
        batch_sizes=args.batch_sizes,
        prompts=args.prompts,
        new_tokens=args.new_tokens,
        repeats=args.repeats,
        clock=args.clock,
    )

    print(speed)
    if args.json:
        speed.save(args.json)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the arguments and run."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--widths", nargs="+", type=int, default=[998, 992, 1000, 1008, 1024])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1])
    parser.add_argument("--prompts", nargs="+", type=int, default=[128])
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--clock", default="wall", help="wall, or cpu if other jobs run")
    parser.add_argument("--dtype", default="auto", help="auto (as saved), float32, bfloat16 or float16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", help="file for all results")

    args = parser.parse_args(argv)
    disable_progress_bar()
    run(args)


if __name__ == "__main__":
    main()
