"""What pruning costs, as ratios measured in one process.

    python examples/benchmarks/benchmark_cost.py MODEL [--width mlp=1152] [--num-samples 36] [--allocation sensitivity]
    python examples/benchmarks/benchmark_cost.py MODEL --num-samples 12 24 48 --layers 10 20 30 --domains 1 5

Time: calibration, scoring, refit and removal, and what chooses the widths of single layers, against plain forward
passes of the dense model over the same tokens. The ratio has the time in it in which the model writes a fifth of the
text itself, which is also shown apart. Of several numbers of samples and of layers each pair is measured, and a
straight line is fitted to the times; of several numbers of domains the same samples are divided into so many.
Memory: the highest resident set while pruning in place, less what was resident before the model was loaded, against
the model's own size. Linux only, because the high-water mark is reset through /proc.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, process_time
from unittest.mock import patch

import numpy as np
import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from optimum_structprune import RunOptions, StructPruneConfig, StructPruner
from optimum_structprune.arch.load import describe
from optimum_structprune.domains.load import WRITTEN, load_domains
from optimum_structprune.domains.packing import Domain
from optimum_structprune.search.sensitivity import choose_shape
from optimum_structprune.sources.data import CalibrationData
from optimum_structprune.steps.base import RunState
from optimum_structprune.widths.allocation import widths_of


# The time that passes, or that the processor spends in all threads.
CLOCKS = {"wall": perf_counter, "cpu": process_time}


def resident(field: str) -> int:
    """Bytes of `VmRSS` (now) or `VmHWM` (the highest since the last reset)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def reset_high_water_mark() -> None:
    """Start a new high-water mark at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def load_libraries() -> None:
    """Prune a model of a few numbers, so that the code this brings into memory is not counted as the model's."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    tiny = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=1, **sizes))
    config = StructPruneConfig(widths={"mlp": 32}, seq_length=32, num_samples=4)
    StructPruner(config).prune_model(tiny, inputs={"random": torch.randint(64, (8, 32))})


@torch.no_grad()
def forward_seconds(model, samples: torch.Tensor, batch_size: int, clock=perf_counter) -> float:
    """Time of the decoder's plain forward passes, without the output head, which pruning does not run either."""
    start = clock()
    for ids in samples.split(batch_size):
        model.base_model(ids, use_cache=False)
    return clock() - start


@dataclass(frozen=True)
class Cost:
    """What one pruning cost.

    Attributes:
        samples: The number of calibration samples.
        layers: The number of layers of the model.
        domains: The number of domains.
        tokens: The number of calibration tokens.
        forward: The seconds of plain forward passes over them: before and after the pruning.
        pruning: The seconds of calibration, scores, refit and removal.
        choosing: The seconds that the choice of widths took.
        writing: The seconds in which the model wrote its own share of the text.
        model: The bytes of the model.
        hidden: The bytes of the hidden states of all samples.
        moments: The bytes of the moments of one consumer.
        peak: The bytes that the process took at its peak, above those before the model was loaded.
    """

    samples: int
    layers: int
    domains: int
    tokens: int
    forward: tuple[float, float]
    pruning: float
    choosing: float
    writing: float
    model: int
    hidden: int
    moments: int
    peak: int

    @property
    def row(self) -> str:
        """One row of the table."""
        mean = sum(self.forward) / 2
        beside = self.peak - self.hidden - self.moments
        return (
            f"| {self.samples} | {self.tokens:,} | {self.layers} | {self.domains} | {mean:.1f} | {self.pruning:.1f} | "
            f"{(self.pruning + self.writing) / mean:.2f} | {self.choosing / mean:.2f} | {self.writing / mean:.2f} | "
            f"{self.peak / 2**20:.0f} | "
            f"{self.peak / self.model:.2f} | {beside / self.model:.2f} |"
        )


HEAD = (
    "| samples | tokens | layers | domains | forward s | pruning s | × forward | choosing × forward | of it writing | "
    "peak MiB | × model | × model without hidden states and moments |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def load(args: Namespace, layers: int | None) -> PreTrainedModel:
    """The model, or its first layers, out of the memory-mapped file, whose pages would stay resident."""
    fewer = {} if layers is None else {"num_hidden_layers": layers}
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto", **fewer).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def divided(domains: Sequence[Domain], count: int | None) -> list[Domain]:
    """The same samples in another number of domains, of equal weight."""
    if count is None:
        return list(domains)
    parts = torch.cat([domain.samples for domain in domains]).tensor_split(count)
    like = replace(domains[0], weight=1 / count)
    return [replace(like, name=f"part {number}", samples=part) for number, part in enumerate(parts)]


def measure(args: Namespace, settings: StructPruneConfig, layers: int | None, count: int | None) -> Cost:
    """Prune once."""
    clock = CLOCKS[args.clock]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    with TemporaryDirectory() as empty, patch.object(constants, "HF_HOME", empty):
        author, start = load(args, layers), clock()
        domains = divided(load_domains(settings, tokenizer, model=author), count)
        writing = clock() - start if args.general_share else 0.0
        del author
    samples = torch.cat([domain.samples for domain in domains])
    before = resident("VmRSS")
    model = load(args, layers)
    arch, size = describe(model), sum(parameter.nbytes for parameter in model.parameters())
    batch_size = RunOptions().batch_size
    forward_seconds(model, samples[:batch_size], batch_size)
    first = forward_seconds(model, samples, batch_size, clock)

    reset_high_water_mark()
    start = clock()
    state = RunState.start(model, arch, CalibrationData(settings, domains))
    chosen = widths_of(settings, arch, model)
    if settings.allocation != "uniform":
        chosen = choose_shape(state, settings)
    choosing = clock() - start
    StructPruner(settings).prune_to_(model, domains, chosen)
    spent = clock() - start - choosing
    peak = resident("VmHWM") - before
    second = forward_seconds(load(args, layers), samples, batch_size, clock)
    streams = 2 if settings.error_feedback else 1
    return Cost(
        samples=len(samples),
        layers=arch.num_layers,
        domains=len(domains),
        tokens=samples.numel(),
        forward=(first, second),
        pruning=spent,
        choosing=choosing,
        writing=writing,
        model=size,
        hidden=streams * samples.numel() * model.config.hidden_size * model.dtype.itemsize,
        moments=min(len(domains), 2) * max(space.size for space in arch.spaces) ** 2 * 4,
        peak=peak,
    )


def fitted(costs: Sequence[Cost]) -> str:
    """The least-squares fit of the times to a number of seconds per layer, and one per layer and 1,000 tokens."""
    terms = np.array([[cost.layers, cost.layers * cost.tokens / 1000] for cost in costs])
    seconds = np.array([cost.pruning for cost in costs])
    forward = np.array([sum(cost.forward) / 2 for cost in costs])
    (fixed, rate), *_ = np.linalg.lstsq(terms, seconds, rcond=None)
    (pass_rate,), *_ = np.linalg.lstsq(terms[:, 1:], forward, rcond=None)
    off = np.abs(terms @ [fixed, rate] / seconds - 1).max()
    return (
        f"\nseconds = layers x ({fixed:.3f} + {rate:.3f} x tokens / 1000), at most {off:.1%} off; "
        f"forward passes: layers x {pass_rate:.3f} x tokens / 1000; ratio for many tokens: {rate / pass_rate:.2f}"
    )


def run(args: Namespace) -> None:
    """Measure and print."""
    widths = dict(pair.split("=") for pair in args.width)
    settings = StructPruneConfig(
        widths={name: int(width) for name, width in widths.items()},
        seq_length=args.seq_length,
        criterion=args.criterion,
        rounds=args.rounds,
        error_feedback=args.error_feedback,
        allocation=args.allocation,
        general_share=args.general_share,
        general_text=WRITTEN if args.general_share else None,
    )
    load_libraries()
    costs = []
    print(HEAD)
    for count, layers, domains in product(args.num_samples, args.layers, args.domains):
        cost = measure(args, replace(settings, num_samples=count), layers, domains)
        print(cost.row, flush=True)
        costs.append(cost)
    if len(args.num_samples) > 1:
        print(fitted(costs))


def main(argv: list[str] | None = None) -> None:
    """Read the arguments and run."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--width", nargs="+", default=["mlp=1152"])
    parser.add_argument("--num-samples", type=int, nargs="+", default=[36])
    parser.add_argument("--layers", type=int, nargs="+", default=[None], help="the first layers of the model alone")
    parser.add_argument("--domains", type=int, nargs="+", default=[None], help="divides the samples anew")
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--criterion")
    parser.add_argument("--general-share", type=float, default=0.2, help="the share of the text that the model writes")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--error-feedback", type=float, default=0.5, help="0 leaves the dense residual stream out")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu where other jobs run beside it")
    parser.add_argument("--allocation", default="uniform", help="as in StructPruneConfig")
    disable_progress_bar()
    set_verbosity_error()  # the layers that --layers leaves out are no news
    run(parser.parse_args(argv))


if __name__ == "__main__":
    main()
