"""Measure the prefill and decoding speed of models, which take turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from statistics import median, quantiles

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from ..arch.generation import cache_bytes, read_prompt, write_tokens
from ..arch.inference import evaluating, input_device
from ..arch.meta import check_positions, predicts_next
from ..record.report import Speed, Spread, Timing
from ..system.errors import StructPruneError
from ..widths.speed import CLOCKS, TimedRun, check_runs_text


COUNTED_MEMORY = "weights and cache of keys and values, counted without activations"
WEIGHTS = "weights"
PEAK_MEMORY = "weights and the peak of the memory that CUDA's allocator adds to them in a run"


def measure_speed(
    models: Mapping[str, PreTrainedModel],
    *,
    batch_sizes: Sequence[int] = (1,),
    prompts: Sequence[int] = (128,),
    new_tokens: int = 32,
    repeats: int = 9,
    clock: str = "wall",
    seed: int = 0,
) -> Speed:
    """Measure the speed of causal language models in reading prompts and generating tokens, or of encoders.

    The models take turns, so that other jobs of the machine slow down all of them.

    An encoder makes the hidden states of texts with the length of the prompts, and its rates are in texts per second.
    Prompts are random token ids, and decoding is greedy. The speed of a mixture of experts depends on the text, so its
    figures mean little.

    Args:
        models: The models by name, on their devices. Their training modes do not change.
        batch_sizes: The numbers of sequences that run together.
        prompts: The lengths of the prompts, in tokens.
        new_tokens: The number of tokens to generate after each prompt.
        repeats: The number of timed runs of each model, for each batch size and prompt.
        clock: The clock: `wall` for elapsed time, or `cpu` for the processor time over all threads, which other jobs
            on the machine disturb less.
        seed: The seed of the prompts.

    Returns:
        The times of each model in each shape, and the speed-ups over the first model.

    Raises:
        StructPruneError: If there is no model, the models are not all encoders of text or all causal language models
            with a cache, a model is spread over several devices or has too few positions, a number is below 1, or the
            clock is unknown or does not see the device.
    """
    check_speed(models, batch_sizes, prompts, new_tokens, repeats, clock)
    vocab_size = min(model.config.get_text_config().vocab_size for model in models.values())
    generator = torch.Generator().manual_seed(seed)

    prefill: dict[str, dict[str, Timing]] = {}
    decode: dict[str, dict[str, Timing]] = {}
    encode: dict[str, dict[str, Timing]] = {}
    memory: dict[str, dict[str, int]] = {}
    encodes = not predicts_next(next(iter(models.values())))
    with evaluating(*models.values()), torch.no_grad():
        for batch_size, prompt in product(batch_sizes, prompts):
            shape = f"batch {batch_size}, prompt {prompt:,}"
            ids = torch.randint(vocab_size, (batch_size, prompt), generator=generator)
            memory[shape] = {name: _memory(model, ids, new_tokens) for name, model in models.items()}

            reading = {name: TimedRun(model, ids, False, CLOCKS[clock]) for name, model in models.items()}
            if encodes:
                encode[shape] = _timings(_seconds(reading, repeats), batch_size)
                continue
            prefill[shape] = _timings(_seconds(reading, repeats), batch_size * prompt)

            writing = {name: TimedRun(model, ids, True, CLOCKS[clock], new_tokens) for name, model in models.items()}
            decode[shape] = _timings(_seconds(writing, repeats, new_tokens), batch_size * new_tokens)

    device = input_device(next(iter(models.values())))
    memory_is = PEAK_MEMORY if device.type == "cuda" else COUNTED_MEMORY
    return Speed(
        prefill=prefill,
        decode=decode,
        run_memory=memory,
        new_tokens=new_tokens,
        repeats=repeats,
        threads=torch.get_num_threads(),
        clock=clock,
        device=str(device),
        memory_is=WEIGHTS if encodes else memory_is,
        encode=encode,
    )


def check_speed(
    models: Mapping[str, PreTrainedModel],
    batch_sizes: Sequence[int],
    prompts: Sequence[int],
    new_tokens: int,
    repeats: int,
    clock: str,
    device: str | None = None,
) -> None:
    """Check the arguments of `measure_speed`.

    Args:
        models: The models, which may be without weights.
        batch_sizes: The numbers of sequences that run together.
        prompts: The lengths of the prompts.
        new_tokens: The number of tokens to generate.
        repeats: The number of timed runs.
        clock: The clock.
        device: The device that models without weights are loaded to.

    Raises:
        StructPruneError: If the measurement cannot be made.
    """
    if not models:
        raise StructPruneError("There is nothing to measure. Pass a model.")

    counts = {"batch_sizes": batch_sizes, "prompts": prompts, "new_tokens": [new_tokens], "repeats": [repeats]}
    for name, numbers in counts.items():
        if min(numbers, default=0) < 1:
            raise StructPruneError(f"`{name}` must be at least 1, got {list(numbers)}.")
    if clock not in CLOCKS:
        raise StructPruneError(f"There is no clock {clock!r}. Choose one of {', '.join(CLOCKS)}.")

    kinds = {predicts_next(model) for model in models.values()}
    if len(kinds) > 1:
        raise StructPruneError(
            "The speeds of encoders and of causal models are not compared. Pass models of one kind."
        )

    for name, model in models.items():
        check_runs_text(model, name)
        num_written = new_tokens if predicts_next(model) else 0
        check_positions(model, max(prompts), f"{name}: prompt={max(prompts)}", num_written)
        model_device = torch.device(device or input_device(model))
        if clock == "cpu" and model_device.type != "cpu":
            raise StructPruneError(f"The clock 'cpu' does not measure the work of {model_device}. Choose 'wall'.")


def cache_per_token(model: PreTrainedModel) -> int:
    """Return the bytes of keys and values per token of a causal language model, by the cache of one token."""
    _, cache = read_prompt(model, torch.zeros(1, 1, dtype=torch.long, device=input_device(model)))
    return cache_bytes(cache)


def _seconds(runs: Mapping[str, TimedRun], repeats: int, steps: int = 1) -> dict[str, list[float]]:
    """Return the seconds of a number of steps in each repeat, by model. The models take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            seconds[name].append(steps * run.seconds())
    return seconds


def _timings(seconds: Mapping[str, Sequence[float]], tokens: int) -> dict[str, Timing]:
    """Return the timing of each model, with its speed-up over the first model.

    Args:
        seconds: The durations of the repeats by model.
        tokens: The number of tokens in a repeat.
    """
    first_durations = next(iter(seconds.values()))
    timings = {}
    for name, durations in seconds.items():
        speedups = [baseline / duration for baseline, duration in zip(first_durations, durations, strict=True)]
        timings[name] = Timing(list(durations), tokens / median(durations), spread(speedups))
    return timings


def spread(values: Sequence[float]) -> Spread:
    """Return the median and the quartiles of one number or more."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])

    low, middle, high = quantiles(values, n=4, method="inclusive")
    return Spread(middle, low, high)


def _memory(model: PreTrainedModel, ids: Tensor, new_tokens: int) -> int:
    """Return the bytes of the weights, and of the memory that a run of a causal model needs in addition.

    Args:
        model: The model.
        ids: The token ids, shape `(batch, prompt)`.
        new_tokens: The number of tokens to generate after the prompts.
    """
    weight_bytes = int(model.get_memory_footprint())
    if not predicts_next(model):
        return weight_bytes

    device = input_device(model)
    if device.type == "cuda":
        # The first run allocates the workspaces that the CUDA libraries keep.
        _run(model, ids, new_tokens)
        torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device)
        _run(model, ids, new_tokens)
        return weight_bytes + torch.cuda.max_memory_allocated(device) - allocated
    return weight_bytes + cache_bytes(_run(model, ids, new_tokens))


def _run(model: PreTrainedModel, ids: Tensor, new_tokens: int) -> Cache:
    """Generate tokens after prompts, and return the cache."""
    token, cache = read_prompt(model, ids.to(input_device(model)))
    write_tokens(model, token, cache, new_tokens)
    return cache
