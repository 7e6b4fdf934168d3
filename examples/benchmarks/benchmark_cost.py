"""Measure the time and the memory of pruning, as ratios within one process.

    python examples/benchmarks/benchmark_cost.py MODEL [--width mlp=1152] [--num-samples 36] [--allocation sensitivity]
    python examples/benchmarks/benchmark_cost.py MODEL --num-samples 12 24 48 --layers 10 20 30 --domains 1 5

Time is relative to plain forward passes of the original model over the same tokens. It includes calibration, scores,
refit and removal, and the time in which the model generates a fifth of the text, which has a column too. The choice of
the widths of single layers has its own column. With several numbers of samples, the script measures each combination
with a number of layers and fits a straight line to the times. With several numbers of domains, it divides the same
samples into different numbers of domains.

Memory is the peak resident set during pruning in place, less the resident set before the model was loaded, relative to
the size of the model. The script runs on Linux only, because it resets the high-water mark through /proc.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
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
from optimum_structprune.steps.base import RunState
from optimum_structprune.steps.data import CalibrationData
from optimum_structprune.widths.allocation import widths_of


# The wall clock, and the time of the processor in all threads.
CLOCKS = {"wall": perf_counter, "cpu": process_time}
HEAD = (
    "| samples | tokens | layers | domains | forward s | pruning s | × forward | choosing × forward | of it writing | "
    "peak MiB | × model | × model without hidden states and moments |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def resident(field: str) -> int:
    """Return the current (`VmRSS`) or the peak (`VmHWM`) resident set in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no field {field}")


def reset_high_water_mark() -> None:
    """Set the peak of the resident set to its current size."""
    Path("/proc/self/clear_refs").write_text("5")


def load_libraries() -> None:
    """Prune a tiny model, so that the memory of the imported code is excluded from the measurement."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    tiny = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=1, **sizes))
    config = StructPruneConfig(widths={"mlp": 32}, seq_length=32, num_samples=4)
    StructPruner(config).prune_model(tiny, inputs={"random": torch.randint(64, (8, 32))})


def copy_weights(model: PreTrainedModel) -> None:
    """Copy the weights out of the memory-mapped file, because the pages of the file stay resident."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


@torch.no_grad()
def forward_seconds(
    model: PreTrainedModel, samples: torch.Tensor, batch_size: int, clock: Callable[[], float] = perf_counter
) -> float:
    """Return the time of plain forward passes without the output head, which pruning does not run either."""
    start = clock()
    for ids in samples.split(batch_size):
        model.base_model(ids, use_cache=False)
    return clock() - start


@dataclass(frozen=True)
class Cost:
    """The cost of one pruning.

    Attributes:
        samples: The number of calibration samples.
        layers: The number of layers of the model.
        domains: The number of domains.
        tokens: The number of calibration tokens.
        forward: The seconds of plain forward passes over the tokens, before and after the pruning.
        pruning: The seconds of calibration, scores, refit and removal.
        choosing: The seconds of the choice of widths.
        writing: The seconds in which the model generated its share of the text.
        model: The bytes of the model.
        hidden: The bytes of the hidden states of all samples.
        moments: The bytes of the moments of one consumer.
        peak: The peak of the process in bytes, less the bytes before the model was loaded.
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
    def mean_forward(self) -> float:
        """Return the mean seconds of the forward passes."""
        return sum(self.forward) / 2

    @property
    def row(self) -> str:
        """Return the row of the table."""
        forward = self.mean_forward
        without_states = self.peak - self.hidden - self.moments

        cells = [
            f"{self.samples}",
            f"{self.tokens:,}",
            f"{self.layers}",
            f"{self.domains}",
            f"{forward:.1f}",
            f"{self.pruning:.1f}",
            f"{(self.pruning + self.writing) / forward:.2f}",
            f"{self.choosing / forward:.2f}",
            f"{self.writing / forward:.2f}",
            f"{self.peak / 2**20:.0f}",
            f"{self.peak / self.model:.2f}",
            f"{without_states / self.model:.2f}",
        ]
        return f"| {' | '.join(cells)} |"


def load_model(args: Namespace, layers: int | None) -> PreTrainedModel:
    """Load the model or its first layers."""
    fields = {}
    if layers is not None:
        fields["num_hidden_layers"] = layers
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto", **fields).eval()
    copy_weights(model)
    return model


def divide(domains: Sequence[Domain], count: int | None) -> list[Domain]:
    """Divide the same samples into another number of domains of equal weight."""
    if count is None:
        return list(domains)

    parts = torch.cat([domain.samples for domain in domains]).tensor_split(count)
    template = replace(domains[0], weight=1 / count)
    return [replace(template, name=f"part {number}", samples=part) for number, part in enumerate(parts)]


def read_domains(
    args: Namespace, settings: StructPruneConfig, layers: int | None, count: int | None
) -> tuple[list[Domain], float]:
    """Return the calibration domains, and the seconds in which the model generated text."""
    clock = CLOCKS[args.clock]
    tokenizer = AutoTokenizer.from_pretrained(args.model)

    # An empty cache contains no generated text of earlier runs.
    with TemporaryDirectory() as cache, patch.object(constants, "HF_HOME", cache):
        model = load_model(args, layers)
        start = clock()
        domains = divide(load_domains(settings, tokenizer, model=model), count)
        seconds = clock() - start

    if not args.general_share:
        seconds = 0.0
    return domains, seconds


def measure(args: Namespace, settings: StructPruneConfig, layers: int | None, count: int | None) -> Cost:
    """Prune once and return the cost."""
    clock = CLOCKS[args.clock]
    domains, writing = read_domains(args, settings, layers, count)
    samples = torch.cat([domain.samples for domain in domains])

    resident_before = resident("VmRSS")
    model = load_model(args, layers)

    arch = describe(model)
    size = sum(parameter.nbytes for parameter in model.parameters())
    batch_size = RunOptions().batch_size
    forward_seconds(model, samples[:batch_size], batch_size)

    first_forward = forward_seconds(model, samples, batch_size, clock)

    reset_high_water_mark()
    start = clock()

    state = RunState.start(model, arch, CalibrationData(settings, domains))
    widths = widths_of(settings, arch, model)
    if settings.allocation != "uniform":
        widths = choose_shape(state, settings)
    choosing = clock() - start

    StructPruner(settings).prune_to_(model, domains, widths)
    pruning = clock() - start - choosing
    peak = resident("VmHWM") - resident_before
    second_forward = forward_seconds(load_model(args, layers), samples, batch_size, clock)

    hidden = samples.numel() * model.config.hidden_size * model.dtype.itemsize
    if settings.error_feedback:
        # The states of the original model are in memory too.
        hidden *= 2

    largest = max(space.size for space in arch.spaces)
    return Cost(
        samples=len(samples),
        layers=arch.num_layers,
        domains=len(domains),
        tokens=samples.numel(),
        forward=(first_forward, second_forward),
        pruning=pruning,
        choosing=choosing,
        writing=writing,
        model=size,
        hidden=hidden,
        moments=min(len(domains), 2) * largest**2 * 4,
        peak=peak,
    )


def fit(costs: Sequence[Cost]) -> str:
    """Fit the times by least squares: seconds per layer, and seconds per layer and 1,000 tokens."""
    terms = np.array([[cost.layers, cost.layers * cost.tokens / 1000] for cost in costs])
    seconds = np.array([cost.pruning for cost in costs])
    forward = np.array([cost.mean_forward for cost in costs])

    fixed, rate = np.linalg.lstsq(terms, seconds, rcond=None)[0]
    (forward_rate,) = np.linalg.lstsq(terms[:, 1:], forward, rcond=None)[0]
    error = np.abs(terms @ [fixed, rate] / seconds - 1).max()
    return (
        f"\nseconds = layers x ({fixed:.3f} + {rate:.3f} x tokens / 1000), at most {error:.1%} off; "
        f"forward passes: layers x {forward_rate:.3f} x tokens / 1000; "
        f"ratio for many tokens: {rate / forward_rate:.2f}"
    )


def run(args: Namespace) -> None:
    """Measure every combination and print the table."""
    widths = {}
    for text in args.width:
        name, width = text.split("=")
        widths[name] = int(width)
    general_text = None
    if args.general_share:
        general_text = WRITTEN

    settings = StructPruneConfig(
        widths=widths,
        seq_length=args.seq_length,
        criterion=args.criterion,
        rounds=args.rounds,
        error_feedback=args.error_feedback,
        allocation=args.allocation,
        general_share=args.general_share,
        general_text=general_text,
    )

    load_libraries()
    costs = []
    print(HEAD)
    for num_samples, layers, domains in product(args.num_samples, args.layers, args.domains):
        cost = measure(args, replace(settings, num_samples=num_samples), layers, domains)
        print(cost.row, flush=True)
        costs.append(cost)

    if len(args.num_samples) > 1:
        print(fit(costs))


def main(argv: list[str] | None = None) -> None:
    """Read the arguments and run."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--width", nargs="+", default=["mlp=1152"])
    parser.add_argument("--num-samples", type=int, nargs="+", default=[36])
    parser.add_argument(
        "--layers", type=int, nargs="+", default=[None], help="keep the first layers of the model only"
    )
    parser.add_argument("--domains", type=int, nargs="+", default=[None], help="divide the samples into these numbers")
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--criterion")
    parser.add_argument("--general-share", type=float, default=0.2, help="the share of text that the model generates")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--error-feedback", type=float, default=0.5, help="0 omits the original residual stream")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="use cpu if other jobs run")
    parser.add_argument("--allocation", default="uniform", help="as in StructPruneConfig")

    args = parser.parse_args(argv)

    disable_progress_bar()
    # transformers warns about the layers that --layers removes.
    set_verbosity_error()
    run(args)


if __name__ == "__main__":
    main()
