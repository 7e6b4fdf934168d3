"""How fast models are: prompts read and tokens written per second, in turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
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

from ..arch.meta import positions_of, predicts_next
from ..errors import StructPruneError
from ..forward.generation import bytes_of, cache_bytes, cache_name, read_prompt, write_tokens
from ..forward.metrics import evaluating, input_device
from ..plain_json import Record
from ..record.table import aligned


# `torch`'s own clock waits for the accelerator. That of the processor stands still while other jobs run.
CLOCKS: dict[str, Callable[[], float]] = {"wall": wall_time, "cpu": process_time}
AT_LEAST = 0.1  # seconds that a repeat spends on reading prompts
COUNTED = "weights and cache of keys and values, counted; activations are not in it"
PEAK = "the model's weights and the most that CUDA's allocator held beside them in one run"


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The median and the quartiles of one number or more."""
        low, middle, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
        return cls(middle, low, high)


@dataclass(frozen=True)
class Timing:
    """The seconds of each repeat of one kind of work, the tokens of all sequences per second by their median, and how
    many times as fast as the first model this one is, measured in pairs.
    """

    seconds: tuple[float, ...]
    tokens_per_second: float
    speedup: Spread


@dataclass(frozen=True)
class ModelSize:
    """The parameters of a model, the dtype and bytes of its weights, and the bytes of keys and values per token."""

    parameters: int
    dtype: str
    weights: int
    cache_per_token: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelSize:
        """The sizes of a model."""
        dtype, weights = str(model.dtype).removeprefix("torch."), bytes_of(model.parameters())
        return cls(model.num_parameters(), dtype, weights, cache_per_token(model))


@dataclass(frozen=True)
class Measurement:
    """What one model did with prompts of one shape: `prefill` reads them and chooses the first token, `decode` writes
    the others, and `memory` is the bytes that `Speed.memory_is` names.
    """

    model: str
    batch_size: int
    prompt: int
    prefill: Timing
    decode: Timing
    memory: int


@dataclass(frozen=True)
class Speed(Record):
    """The numbers that `measure_speed` measured; `str` of it is three tables.

    Attributes:
        models: The sizes, by model; all speed-ups are over the first.
        measurements: The times, by batch size, prompt and model.
        new_tokens: The number of tokens written after each prompt.
        repeats: The number of times that each model ran, in turns with the others.
        threads: The number of threads of torch.
        clock: What the seconds are: `wall` is time that passes, `cpu` is time of the processor, over all threads.
        device: The device of the first model.
        memory_is: What `Measurement.memory` stands for.
    """

    models: dict[str, ModelSize]
    measurements: list[Measurement]
    new_tokens: int
    repeats: int
    threads: int
    clock: str
    device: str
    memory_is: str

    def __str__(self) -> str:
        """A table of sizes, one of prompts read, one of tokens written, and what the columns mean."""
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        first = next(iter(self.models))
        lines = [
            f"{self.device}, {threads}, {self.repeats} repeats in turns, {self.clock} time.",
            f"speed-up: the time of {first} over the model's, median and quartiles of the pairs.",
            f"memory: {self.memory_is}.",
        ]
        return "\n\n".join([self._sizes(), self._times("prefill"), self._times("decode"), "\n".join(lines)])

    def _sizes(self) -> str:
        rows = [["", "parameters", "dtype", "bytes of weights", "of cache per token"]]
        for name, size in self.models.items():
            rows.append([name, f"{size.parameters:,}", size.dtype, f"{size.weights:,}", f"{size.cache_per_token:,}"])
        return aligned(rows)

    def _times(self, stage: str) -> str:
        """The table of the reading of prompts (`prefill`) or of the writing of tokens (`decode`)."""
        reads, first = stage == "prefill", next(iter(self.models))
        title, unit = ("read a prompt", "first token") if reads else (f"write {self.new_tokens} tokens", "per token")
        rows = [[title, "batch", "prompt", "tokens/s", unit, "speed-up", "quartiles", *([] if reads else ["memory"])]]
        for measured in self.measurements:
            timing: Timing = getattr(measured, stage)
            spread = timing.speedup
            step = median(timing.seconds) * 1e3 / (1 if reads else self.new_tokens)
            row = [
                measured.model,
                f"{measured.batch_size}",
                f"{measured.prompt:,}",
                f"{timing.tokens_per_second:,.1f}",
            ]
            row.append(f"{step:,.1f} ms" if reads else f"{step:,.2f} ms")
            speedup = [f"x {spread.median:.3f}", f"{spread.low:.3f}-{spread.high:.3f}"]
            row += ["", ""] if measured.model == first else speedup
            rows.append(row if reads else [*row, f"{measured.memory / 2**20:,.0f} MiB"])
        return aligned(rows)


def measure_speed(
    models: Mapping[str, PreTrainedModel],
    *,
    batch_sizes: Sequence[int] = (1,),
    prompts: Sequence[int] = (128,),
    new_tokens: int = 32,
    repeats: int = 9,
    threads: int | None = None,
    clock: str = "wall",
    seed: int = 0,
) -> Speed:
    """Measure how fast causal language models read prompts and write tokens, against the first of them.

    The models take turns, so that what else the machine does meets all of them. `torch.utils.benchmark.Timer` times
    them, and lets each run before what counts, so that none profits from what the one before left in caches.

    Prompts are random token ids, and the likeliest tokens are written, whatever they are. Where a model chooses among
    experts, its speed depends on the text, and these numbers say little.

    Args:
        models: The models by name, on their devices; their training modes are left as they were.
        batch_sizes: The numbers of sequences that run together.
        prompts: The lengths of the prompts, in tokens.
        new_tokens: The number of tokens to write after each prompt.
        repeats: The number of timed runs of each model, for each batch size and prompt.
        threads: The number of threads; None takes what torch is set to.
        clock: What is timed: `wall` for time that passes, or `cpu` for time of the processor, over all threads, which
            other jobs on the machine disturb less.
        seed: The seed of the prompts.

    Returns:
        The times of each model in each shape, and their ratios to those of the first model.

    Raises:
        StructPruneError: If there is no model, a model does not predict the next token, keeps no cache, is spread over
            several devices or has too few positions, a number is below 1, or the clock is unknown or does not see the
            device.
    """
    check_speed(models, batch_sizes, prompts, new_tokens, repeats, threads)
    for model in models.values():
        check_clock(clock, input_device(model))
    threads = threads or torch.get_num_threads()
    how = {"num_threads": threads, "timer": CLOCKS[clock]}
    vocabulary = min(model.config.get_text_config().vocab_size for model in models.values())
    generator = torch.Generator().manual_seed(seed)
    first = next(iter(models))
    measurements: list[Measurement] = []
    with evaluating(*models.values()):
        sizes = {name: ModelSize.of(model) for name, model in models.items()}
        for batch_size, prompt in product(batch_sizes, prompts):
            ids = torch.randint(vocabulary, (batch_size, prompt), generator=generator)
            runs = {name: _Runs(model, ids, new_tokens, how) for name, model in models.items()}
            for _, run in product(range(repeats), runs.values()):
                run.repeat()
            measurements += [run.measured(name, runs[first]) for name, run in runs.items()]
    device = input_device(models[first])
    return Speed(
        models=sizes,
        measurements=measurements,
        new_tokens=new_tokens,
        repeats=repeats,
        threads=threads,
        clock=clock,
        device=str(device),
        memory_is=PEAK if device.type == "cuda" else COUNTED,
    )


def check_speed(
    models: Mapping[str, PreTrainedModel],
    batch_sizes: Sequence[int],
    prompts: Sequence[int],
    new_tokens: int,
    repeats: int,
    threads: int | None,
) -> None:
    """Refuse what `measure_speed` cannot measure."""
    for label, given in (("model", models), ("batch_size", batch_sizes), ("prompt", prompts)):
        if not given:
            raise StructPruneError(f"There is nothing to measure: name a {label}.")
    counts = {"new_tokens": [new_tokens], "repeats": [repeats], "threads": [] if threads is None else [threads]}
    for label, numbers in {"batch_size": batch_sizes, "prompt": prompts, **counts}.items():
        if min(numbers, default=1) < 1:
            raise StructPruneError(f"{label} has to be 1 or more, got {min(numbers)}.")
    for name, model in models.items():
        _check_model(name, model, max(prompts), new_tokens)


def check_clock(clock: str, device: torch.device | str) -> None:
    """Refuse a clock that is not one of `CLOCKS`, or that does not see what a device does."""
    if clock not in CLOCKS:
        raise StructPruneError(f"There is no clock {clock!r}; choose one of {', '.join(CLOCKS)}.")
    if clock == "cpu" and torch.device(device).type != "cpu":
        raise StructPruneError(f"The clock 'cpu' does not see what {device} does; choose 'wall'.")


def _check_model(name: str, model: PreTrainedModel, prompt: int, new_tokens: int) -> None:
    if not predicts_next(model):
        raise StructPruneError(
            f"{name} is a {type(model).__name__}, which does not predict the next token: only such models count."
        )
    if cache_name(model) is None:
        raise StructPruneError(
            f"{name} is a {type(model).__name__}, which takes no cache of keys and values: only models that do count."
        )
    if len(set(getattr(model, "hf_device_map", None) or {"": ""}.values())) > 1:
        raise StructPruneError(f"{name} is spread over several devices, and the time of one is measured: name one.")
    longest = positions_of(model)
    if (legal := longest - new_tokens) < prompt:
        nearest = f"the longest prompt is {legal}" if legal > 0 else f"new_tokens may be {longest - 1} at most"
        raise StructPruneError(
            f"prompt={prompt} and new_tokens={new_tokens} take {prompt + new_tokens} positions, and {name} has "
            f"{longest}: {nearest}."
        )


def cache_per_token(model: PreTrainedModel) -> int:
    """The bytes of keys and values that a causal language model keeps per token, read off the cache of one token."""
    _, cache = read_prompt(model, torch.zeros(1, 1, dtype=torch.long, device=input_device(model)))
    return cache_bytes(cache)


class _Runs:
    """The runs of one model over prompts of one shape. `ids` has the shape `(batch, prompt)`."""

    def __init__(self, model: PreTrainedModel, ids: Tensor, new_tokens: int, how: Mapping[str, Any]):
        self.ids, self.new_tokens = ids.to(input_device(model)), new_tokens
        read, write = partial(read_prompt, model, self.ids), partial(write_tokens, model, count=new_tokens)
        self.memory = self._memory(model, read, write)
        token, cache = read()
        names = {"read": read, "write": write, "token": token, "cache": cache, "deepcopy": deepcopy}
        # Writing changes the cache, and the setup is not timed: two copies are for the runs that do not count.
        copies = "caches = [deepcopy(cache) for _ in range(2)]"
        self.reading = Timer("read()", globals=names, **how)
        self.writing = Timer("write(token, caches.pop())", setup=copies, globals=names, **how)
        self.seconds: dict[str, list[float]] = {"prefill": [], "decode": []}
        self.tokens = {"prefill": self.ids.numel(), "decode": len(self.ids) * new_tokens}

    def repeat(self) -> None:
        """Time each kind of work once; a short prompt is read several times, and the median of these counts."""
        self.seconds["prefill"].append(self.reading.blocked_autorange(min_run_time=AT_LEAST).median)
        self.seconds["decode"].append(self.writing.timeit(1).median)

    def timing(self, stage: str, first: _Runs) -> Timing:
        """One kind of work, beside that of the first model."""
        seconds, theirs = self.seconds[stage], first.seconds[stage]
        pairs = [there / here for there, here in zip(theirs, seconds, strict=True)]
        return Timing(tuple(seconds), self.tokens[stage] / median(seconds), Spread.of(pairs))

    def measured(self, name: str, first: _Runs) -> Measurement:
        """What the repeats have shown."""
        reading, writing = (self.timing(stage, first) for stage in self.seconds)
        batch_size, prompt = self.ids.shape
        return Measurement(name, batch_size, prompt, reading, writing, self.memory)

    def _memory(self, model: PreTrainedModel, read: Callable[..., Any], write: Callable[..., Any]) -> int:
        weights = bytes_of(model.parameters()) + bytes_of(model.buffers())
        token, cache = read()
        write(token, cache)
        if self.ids.device.type != "cuda":
            return weights + cache_bytes(cache)
        # The libraries behind CUDA have taken the memory that they keep.
        del token, cache
        torch.cuda.reset_peak_memory_stats(self.ids.device)
        before = torch.cuda.memory_allocated(self.ids.device)
        write(*read())
        return weights + torch.cuda.max_memory_allocated(self.ids.device) - before
