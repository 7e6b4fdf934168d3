"""What pruning costs, as ratios measured in one process.

    python examples/benchmark_cost.py MODEL [--width mlp=1152] [--num-samples 36] [--allocation sensitivity]

Time: calibration, scoring, refit and removal, and what chooses the widths of single layers, against plain forward
passes of the dense model over the same tokens.
Memory: the highest resident set while pruning in place, less what was resident before the model was loaded, against
the model's own size. Linux only, because the high-water mark is reset through /proc.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from time import perf_counter, process_time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from optimum_structprune import StructPruneConfig, StructPruner
from optimum_structprune.arch.load import describe
from optimum_structprune.domains.load import load_domains
from optimum_structprune.pruning.choose import choose_widths
from optimum_structprune.pruning.evidence import Evidence
from optimum_structprune.saving.report import Report


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


def run(args: Namespace) -> None:
    """Measure and print."""
    widths = dict(pair.split("=") for pair in args.width)
    config = StructPruneConfig(
        widths={name: int(width) for name, width in widths.items()},
        num_samples=args.num_samples,
        seq_length=args.seq_length,
        criterion=args.criterion,
        rounds=args.rounds,
        error_feedback=args.error_feedback,
        allocation=args.allocation,
    )
    clock = CLOCKS[args.clock]
    load_libraries()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    domains = load_domains(config, tokenizer)
    samples = torch.cat([domain.samples for domain in domains])
    before = resident("VmRSS")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").eval()
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    streams = 2 if config.error_feedback else 1
    hidden = streams * samples.numel() * model.config.hidden_size * model.dtype.itemsize
    moments = min(len(config.texts), 2) * max(space.size for space in describe(model).spaces) ** 2 * 4
    # Out of the memory-mapped file, whose pages stay resident, though reclaimable, until the whole file is dropped.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    forward_seconds(model, samples[: config.batch_size], config.batch_size)
    seconds = [forward_seconds(model, samples, config.batch_size, clock)]

    reset_high_water_mark()
    report = Report(model.config.model_type, config.scored_by)
    start = clock()
    chosen = choose_widths(config, describe(model), model, Evidence.of(config, domains, model.device), report)
    choosing = clock() - start
    StructPruner(config).prune_to_(model, domains, chosen)
    spent = clock() - start - choosing
    peak = resident("VmHWM") - before
    dense = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").eval()
    seconds.append(forward_seconds(dense, samples, config.batch_size, clock))
    mean = sum(seconds) / len(seconds)
    print(f"tokens                      {samples.numel():,}")
    print(f"forward passes              {mean:.1f} s (before {seconds[0]:.1f}, after {seconds[1]:.1f})")
    print(f"calibration and pruning     {spent:.1f} s = {spent / mean:.2f} x forward")
    print(f"widths of single layers     {choosing:.1f} s = {choosing / mean:.2f} x forward")
    print(f"model                       {size / 2**20:.0f} MiB")
    print(f"calibration hidden states   {hidden / 2**20:.0f} MiB")
    print(f"moments of one layer        {moments / 2**20:.0f} MiB")
    print(
        f"peak while pruning in place {peak / 2**20:.0f} MiB = {peak / size:.2f} x model, "
        f"{(peak - hidden - moments) / size:.2f} x without hidden states and moments"
    )


def main(argv: list[str] | None = None) -> None:
    """Read the arguments and run."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--width", nargs="+", default=["mlp=1152"])
    parser.add_argument("--num-samples", type=int, default=36)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--criterion")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--error-feedback", type=float, default=0.5, help="0 leaves the dense residual stream out")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu where other jobs run beside it")
    parser.add_argument("--allocation", default="uniform", help="uniform, global or sensitivity")
    disable_progress_bar()
    run(parser.parse_args(argv))


if __name__ == "__main__":
    main()
