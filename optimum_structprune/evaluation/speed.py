"""Measure the prefill and decoding speed of models, which take turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from itertools import product
from statistics import median, quantiles
from time import process_time
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer
from torch.utils.benchmark import timer as wall_time
from transformers import PreTrainedModel

from ..arch.generation import cache_bytes, cache_name, read_prompt, write_tokens
from ..arch.inference import evaluating, input_device, last_states
from ..arch.meta import check_positions, predicts_next, reads_text
from ..record.report import Speed, Spread, Timing
from ..system.errors import StructPruneError


# torch's clock waits for the accelerator. CPU time does not include the time of other jobs.
CLOCKS: dict[str, Callable[[], float]] = {"wall": wall_time, "cpu": process_time}
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

    The models take turns, so that other jobs of the machine slow down all of them. `torch.utils.benchmark.Timer` runs
    each model once before the timed run, so that no model benefits from caches that another model has filled.

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

    prefill: dict[str, dict[str, Any]] = {}
    decode: dict[str, dict[str, Any]] = {}
    memory: dict[str, dict[str, int]] = {}
    encode: dict[str, dict[str, Any]] = {}
    encodes = not predicts_next(next(iter(models.values())))
    with evaluating(*models.values()):
        for batch_size, prompt in product(batch_sizes, prompts):
            shape = f"batch {batch_size}, prompt {prompt:,}"
            ids = torch.randint(vocab_size, (batch_size, prompt), generator=generator)
            if encodes:
                encode[shape] = _timings(_encoding_seconds(models, ids, repeats, clock), batch_size)
                memory[shape] = {name: int(model.get_memory_footprint()) for name, model in models.items()}
                continue
            runs = {name: _Runs(model, ids, new_tokens, clock) for name, model in models.items()}

            for _ in range(repeats):
                for run in runs.values():
                    run.repeat()

            prefill_seconds = {name: run.prefill_seconds for name, run in runs.items()}
            decode_seconds = {name: run.decode_seconds for name, run in runs.items()}
            prefill[shape] = _timings(prefill_seconds, batch_size * prompt)
            decode[shape] = _timings(decode_seconds, batch_size * new_tokens)
            memory[shape] = {name: run.memory for name, run in runs.items()}

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


def _encoding_seconds(
    models: Mapping[str, PreTrainedModel], ids: Tensor, repeats: int, clock: str
) -> dict[str, list[float]]:
    """Return the durations of the forward passes of encoders, which take turns.

    Args:
        models: The models by name.
        ids: Token ids, shape `(batch, tokens)`.
        repeats: The number of durations of each model.
        clock: The clock.
    """
    timers = {}
    for name, model in models.items():
        names = {"last_states": last_states, "model": model, "ids": ids.to(input_device(model))}
        options: dict[str, Any] = {"num_threads": torch.get_num_threads(), "timer": CLOCKS[clock]}
        timers[name] = Timer("last_states(model, ids)", globals=names, **options)

    seconds: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for _ in range(repeats):
            for name, timer in timers.items():
                seconds[name].append(timer.blocked_autorange(min_run_time=0.1).median)
    return seconds


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
        _check_model(model, name)
        num_written = new_tokens if predicts_next(model) else 0
        check_positions(model, max(prompts), f"{name}: prompt={max(prompts)}", num_written)
        model_device = torch.device(device or input_device(model))
        if clock == "cpu" and model_device.type != "cpu":
            raise StructPruneError(f"The clock 'cpu' does not measure the work of {model_device}. Choose 'wall'.")


def _check_model(model: PreTrainedModel, name: str) -> None:
    """Raise `StructPruneError` if the speed of a model cannot be measured."""
    kind = type(model).__name__
    if not predicts_next(model) and (model.config.is_encoder_decoder or not reads_text(model)):
        raise StructPruneError(
            f"{name} is a {kind}, which does not predict the next token and is no encoder of text. Pass one of these."
        )
    if predicts_next(model) and cache_name(model) is None:
        raise StructPruneError(f"{name} is a {kind}, which has no cache of keys and values. Pass a model with one.")

    devices = set(getattr(model, "hf_device_map", {}).values())
    if len(devices) > 1:
        raise StructPruneError(
            f"{name} is spread over several devices, and speed is measured on one. Load it on a single device."
        )


def cache_per_token(model: PreTrainedModel) -> int:
    """Return the bytes of keys and values per token of a causal language model, by the cache of one token."""
    _, cache = read_prompt(model, torch.zeros(1, 1, dtype=torch.long, device=input_device(model)))
    return cache_bytes(cache)


class _Runs:
    """The runs of one model on prompts of one shape. `ids` has the shape `(batch, prompt)`."""

    def __init__(self, model: PreTrainedModel, ids: Tensor, new_tokens: int, clock: str):
        prefill = partial(read_prompt, model, ids.to(input_device(model)))
        decode = partial(write_tokens, model, count=new_tokens)
        self.memory = _memory(model, prefill, decode)

        token, cache = prefill()
        names = {"prefill": prefill, "decode": decode, "token": token, "cache": cache, "deepcopy": deepcopy}
        options: dict[str, Any] = {"num_threads": torch.get_num_threads(), "timer": CLOCKS[clock]}
        self._prefill = Timer("prefill()", globals=names, **options)
        # Decoding changes the cache. The setup is not timed; it copies the cache for the untimed and the timed run.
        setup = "caches = [deepcopy(cache) for _ in range(2)]"
        self._decode = Timer("decode(token, caches.pop())", setup=setup, globals=names, **options)

        self.prefill_seconds: list[float] = []
        self.decode_seconds: list[float] = []

    def repeat(self) -> None:
        """Time the prefill, as the median of runs for 0.1 s, and the decoding once."""
        self.prefill_seconds.append(self._prefill.blocked_autorange(min_run_time=0.1).median)
        self.decode_seconds.append(self._decode.timeit(1).median)


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


def _memory(model: PreTrainedModel, prefill: Callable[[], Any], decode: Callable[..., Any]) -> int:
    """Return the bytes of the weights, and of the memory that a run needs in addition.

    Args:
        model: The model.
        prefill: Reads the prompts.
        decode: Generates tokens after the prompts.
    """
    weight_bytes = int(model.get_memory_footprint())
    token, cache = prefill()
    decode(token, cache)
    if token.device.type != "cuda":
        return weight_bytes + cache_bytes(cache)

    # The first run has allocated the workspaces that the CUDA libraries keep.
    device = token.device
    del token, cache
    torch.cuda.reset_peak_memory_stats(device)
    allocated = torch.cuda.memory_allocated(device)
    token, cache = prefill()
    decode(token, cache)
    return weight_bytes + torch.cuda.max_memory_allocated(device) - allocated
