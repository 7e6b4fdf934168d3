"""The measured speed of models."""

from __future__ import annotations

from dataclasses import dataclass

from .report import ResultRecord


@dataclass
class Spread:
    """The median and the quartiles of several measurements.

    Attributes:
        median: The median.
        low: The lower quartile.
        high: The upper quartile.
    """

    median: float
    low: float
    high: float

    @property
    def contains_one(self) -> bool:
        """Return whether the quartiles lie on both sides of 1, so that no speed-up is shown."""
        return self.low <= 1 <= self.high


@dataclass
class Timing:
    """The speed of one model on one shape.

    Attributes:
        seconds: The duration of each repeat.
        tokens_per_second: The tokens of all sequences divided by the median duration.
        speedup: The speed-up over the first model, with quartiles over the pairs of runs.
    """

    seconds: list[float]
    tokens_per_second: float
    speedup: Spread


@dataclass
class Speed(ResultRecord):
    """The result of `measure_speed`. `str(speed)` is a table.

    Attributes:
        prefill: The speed of reading a prompt and choosing the first token, by shape (such as "batch 1, prompt 128")
            and model.
        decode: The speed of generating the next tokens, by shape and model.
        run_memory: The bytes of memory, by shape and model. `memory_is` describes them.
        new_tokens: The number of tokens generated after each prompt.
        repeats: The number of runs of each model. The models take turns.
        threads: The number of threads of torch.
        clock: The unit of the seconds: `wall` is elapsed time, `cpu` is processor time over all threads.
        device: The device of the first model.
        memory_is: The meaning of `run_memory`.
    """

    prefill: dict[str, dict[str, Timing]]
    decode: dict[str, dict[str, Timing]]
    run_memory: dict[str, dict[str, int]]
    new_tokens: int
    repeats: int
    threads: int
    clock: str
    device: str
    memory_is: str

    @property
    def models(self) -> list[str]:
        """Return the names of the models."""
        return list(next(iter(self.run_memory.values()), {}))

    def __str__(self) -> str:
        """Return a table of tokens per second, speed-ups and memory, with an explanation."""
        from .measured import speed_lines

        return "\n".join(speed_lines(self))
