"""Measure the speed of shapes of a model, and predict the speed of all others.

Models with random weights take turns, so a measurement needs no checkpoint and no text. `ShapeTimes` measures one
shape for each space and predicts the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from math import ceil
from statistics import median
from time import process_time
from timeit import Timer
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.benchmark import timer as wall_time
from transformers import PretrainedConfig, PreTrainedModel

from ..arch.devices import default_device
from ..arch.generation import cache_name, read_prompt
from ..arch.inference import input_device, last_states
from ..arch.meta import positions_of, predicts_next, reads_text, skeleton
from ..arch.modules import set_zeros_
from ..arch.shrink import legal_sizes, shrunk_config
from ..arch.spec import LAYER, ArchSpec, Widths
from ..config.pruning import CAUSAL_USES, ENCODER_USES, SPEED, StructPruneConfig
from ..system.errors import StructPruneError
from ..system.margins import interval_of_median
from ..system.stages import say
from .budget import FIGURES, Figure, Shapes
from .legal import choices


# torch's clock waits for the accelerator. CPU time does not include the time of other jobs.
CLOCKS: dict[str, Callable[[], float]] = {"wall": wall_time, "cpu": process_time}
# The shortest duration of a timed run, in seconds.
MIN_SECONDS = 0.1
# The number of pairs of runs. While the error is not below `MAX_ERROR`, there are up to `MOST_PAIRS`, and further ones
# as long as all runs took less than `MOST_SECONDS`.
PAIRS = 5
MOST_PAIRS = 15
MAX_ERROR = 0.03
MOST_SECONDS = 10.0
# The standard deviation of random weights, and the number of different values. Zeros would take less time.
SPREAD = 0.02
NUM_VALUES = 2**16
# The share of a space that the measured shape keeps.
HALF = 0.5
KEPT_SHARES = {LAYER: 0.8}
# A space with a smaller speed-up is not pruned for speed.
MIN_GAIN = 1.04
# A prediction is corrected if the measured time is this much longer than the limit, or shorter than the prediction.
MAX_MISS = 0.005
MAX_SURPLUS = 0.04


# The times of the models of this process, by class, dtype, device, use and shapes.
TIMES: dict[str, ShapeTimes] = {}


class Use(NamedTuple):
    """A use of a model.

    Attributes:
        batch_size: The number of texts that run together.
        tokens: The number of tokens in each text.
        decodes: Whether the next token after the text is timed, and not the text.
    """

    batch_size: int
    tokens: int
    decodes: bool = False


USES = {
    "encode": Use(32, 128),
    "query": Use(1, 32),
    "decode": Use(1, 128, decodes=True),
    "prompt": Use(1, 128),
}


class SpeedUp(NamedTuple):
    """The speed-up of one model over another.

    Attributes:
        value: The median over pairs of runs.
        low: The lower end of its 90 % confidence interval.
        high: The upper end of the interval.
    """

    value: float
    low: float
    high: float


class TimedRun:
    """A step of a model that is timed: encoding texts, reading prompts, or decoding the next token.

    Args:
        model: The model, in eval mode.
        ids: The token ids, shape `(batch, tokens)`.
        decodes: Whether the next tokens after these are timed, and not these.
        clock: A function that returns a time in seconds.
        steps: The number of steps in a run. By default, a run takes at least 0.1 s.
    """

    def __init__(
        self, model: PreTrainedModel, ids: Tensor, decodes: bool, clock: Callable[[], float], steps: int | None = None
    ):
        self.model = model
        self.ids = ids.to(input_device(model))
        self.start = read_prompt(model, self.ids) if decodes else None
        self.state: Any = None
        self.timer = Timer(self._step, self._prepare, timer=clock)

        # The first run is not counted, because it allocates memory.
        self.timer.timeit(1)
        self.steps = steps or ceil(MIN_SECONDS / max(self.timer.timeit(1), MIN_SECONDS / 1000))
        if steps is None and decodes:
            self.steps = int(min(self.steps, positions_of(model) - ids.shape[1]))

    def seconds(self) -> float:
        """Return the seconds of a step, as the mean over a run."""
        return self.timer.timeit(self.steps) / self.steps

    def _prepare(self) -> None:
        """Copy the cache of the prompt, because decoding changes it. This is not timed."""
        self.state = deepcopy(self.start)

    def _step(self) -> None:
        """Run the step once."""
        if self.start is not None:
            self.state = read_prompt(self.model, *self.state)
        elif predicts_next(self.model):
            read_prompt(self.model, self.ids)
        else:
            last_states(self.model, self.ids)


def check_runs_text(model: PreTrainedModel, name: str) -> None:
    """Raise `StructPruneError` if the speed of a model cannot be measured. `name` is its name in the message."""
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


def random_model(model: PreTrainedModel, config: PretrainedConfig, device: torch.device) -> PreTrainedModel:
    """Return a model of the same class and dtype with another config and random weights, in eval mode."""
    new_model = skeleton(model, config, buffers=True)
    values = SPREAD * torch.randn(NUM_VALUES, generator=torch.Generator().manual_seed(0)).to(model.dtype)

    set_zeros_(new_model)
    new_model.tie_weights()
    for parameter in new_model.parameters():
        # Drawing every weight would take longer than the measurement.
        count = parameter.numel()
        weights = values.expand(ceil(count / NUM_VALUES), NUM_VALUES).flatten()[:count].clone()
        parameter.data = weights.reshape(parameter.shape)
    new_model.to(device)  # type: ignore[arg-type]
    return new_model.eval()


def measured_speed_up(
    model: PreTrainedModel, config: PretrainedConfig, new_config: PretrainedConfig, use: Use, device: torch.device
) -> SpeedUp:
    """Measure the speed-up of a shape over the original shape.

    Both models have random weights. They take turns, so that other jobs of the machine slow down both of them: 5 pairs
    of runs, and up to 15 or 10 seconds of runs as long as the half-width of the confidence interval is 3 % or more.

    Args:
        model: A model of the class and the dtype.
        config: The config of the original model.
        new_config: The config of the other shape.
        use: The use that is timed.
        device: The device.
    """
    vocab_size = min(each.get_text_config().vocab_size for each in (config, new_config))
    generator = torch.Generator().manual_seed(0)
    clock = CLOCKS[clock_for(device)]

    models = [random_model(model, deepcopy(shape), device) for shape in (config, new_config)]
    tokens = int(min(use.tokens, positions_of(model) // 2))
    ids = torch.randint(vocab_size, (use.batch_size, tokens), generator=generator)
    with torch.no_grad():
        original, candidate = (TimedRun(candidate, ids, use.decodes, clock) for candidate in models)
        return speed_up(original, candidate)


def speed_up(original: TimedRun, candidate: TimedRun) -> SpeedUp:
    """Return the speed-up of a step over the same step of the original model; see `measured_speed_up`."""
    ratios: list[float] = []
    total = 0.0
    while True:
        seconds = original.seconds()
        candidate_seconds = candidate.seconds()
        ratios.append(seconds / candidate_seconds)
        total += seconds * original.steps + candidate_seconds * candidate.steps
        if len(ratios) < PAIRS:
            continue

        result = SpeedUp(median(ratios), *interval_of_median(ratios))
        is_exact = result.high - result.low < 2 * MAX_ERROR * result.value
        if is_exact or (len(ratios) >= MOST_PAIRS and total >= MOST_SECONDS):
            return result


def clock_for(device: torch.device) -> str:
    """Return the clock: CPU time counts the time of all threads, so it needs a single one."""
    if device.type == "cpu" and torch.get_num_threads() == 1:
        return "cpu"
    return "wall"


class ShapeTimes:
    """The times of the shapes of a model, relative to the original shape.

    A prediction is linear in the shares of units that are removed:

        time = 1 - correction * sum over spaces (saving * removed share)

    The saving of a space is measured on one shape, which keeps half of its units or 80 % of the layers. It is 0 if
    this shape is not faster than the original one. The correction is 1 until a predicted shape has been measured.

    Args:
        config: The config of the pruning, which has the use and the multiples of widths.
        arch: The description of the original model.
        model: The original model, with or without weights.
        device: The device.
        measure: The function that measures a speed-up.
    """

    def __init__(
        self,
        config: StructPruneConfig,
        arch: ArchSpec,
        model: PreTrainedModel,
        device: torch.device,
        measure: Callable[..., SpeedUp] | None = None,
    ):
        self.use_name = use_of(config, model)
        self.use = USES[self.use_name]
        self.device = device
        self._config = config
        self._arch = arch
        # Pruning in place would change the model and its config.
        self._model = skeleton(model, deepcopy(model.config)).to(model.dtype)  # type: ignore[arg-type]
        self._measure = measure or measured_speed_up
        self._measured: dict[str, SpeedUp] = {}
        self._savings: dict[str, float] = {}
        self._correction = 1.0

    def predicted(self, widths: Widths) -> float:
        """Return the predicted time of a shape."""
        saved = 0.0
        for name in widths:
            removed = self._removed_share(name, widths)
            if removed:
                saved += self._saving(name) * removed
        return 1 - self._correction * saved

    def measured(self, widths: Widths) -> SpeedUp:
        """Return the measured speed-up of a shape. A shape is measured once."""
        widths = {name: width for name, width in widths.items() if self._removed_share(name, widths)}
        key = repr(sorted(widths.items()))
        if key not in self._measured:
            config = self._model.config
            shape = ", ".join(f"{name} {_text(width)}" for name, width in widths.items())
            new_config = shrunk_config(config, self._arch, widths)
            result = self._measure(self._model, config, new_config, self.use, self.device)
            say(f"speed of {shape}: {result.value:.2f} times the original ({result.low:.2f} to {result.high:.2f})")
            self._measured[key] = result
        return self._measured[key]

    def correct(self, widths: Widths, limit: float) -> bool:
        """Measure a shape whose predicted time is within a limit, and correct the predictions if they are wrong.

        Returns:
            Whether the predictions have changed.
        """
        # Other spaces do not change the time, so fewer shapes are measured.
        widths = {name: width for name, width in widths.items() if self._saving(name)}
        predicted = self.predicted(widths)
        time = 1 / self.measured(widths).value
        is_met = time <= limit * (1 + MAX_MISS)
        if is_met and time > predicted * (1 - MAX_SURPLUS):
            return False
        if predicted >= 1 or abs(time - predicted) < MAX_MISS:
            return False

        # A shape that is no faster at all says that much more has to be removed.
        self._correction *= max(1 - time, 0.2 * (1 - predicted)) / (1 - predicted)
        return True

    def _saving(self, name: str) -> float:
        """Return the time that a space would save if all of its units were removed."""
        if name not in self._savings:
            width = self._trial_width(name)
            removed = self._removed_share(name, {name: width})
            saving = 0.0
            if removed:
                speed_up = self.measured({name: width})
                if speed_up.low > 1 and speed_up.value >= MIN_GAIN:
                    saving = (1 - 1 / speed_up.value) / removed
            self._savings[name] = saving
        return self._savings[name]

    def _trial_width(self, name: str) -> int:
        """Return the width that is measured for the prediction."""
        goal = KEPT_SHARES.get(name, HALF) * self._arch.of(name)[0].width
        widths = choices(self._config, self._arch, name, legal_sizes(self._model.config, self._arch, name))
        return min(widths, key=lambda width: abs(width - goal))

    def _removed_share(self, name: str, widths: Widths) -> float:
        """Return the share of the units of a space that is removed, over all layers."""
        spaces = self._arch.of(name)
        removed = sum(space.width - space.width_in(widths) for space in spaces)
        return removed / sum(space.width for space in spaces)


def _text(width: Any) -> str:
    """Return a width, or the mean of the widths of the layers, as text."""
    if isinstance(width, int):
        return f"{width:,}"
    return f"{sum(width.values()) / len(width):,.0f} on average"


def use_of(config: StructPruneConfig, model: PreTrainedModel) -> str:
    """Return the name of the use whose speed a config limits.

    Raises:
        StructPruneError: If the model is not used in this way, or its speed cannot be measured.
    """
    check_runs_text(model, "The model")
    uses = CAUSAL_USES if predicts_next(model) else ENCODER_USES
    name = config.speed_use or uses[0]
    if name not in uses:
        raise StructPruneError(
            f"speed_use={name!r} does not fit a {type(model).__name__}. Choose {' or '.join(map(repr, uses))}."
        )
    return name


def shape_times(config: StructPruneConfig, arch: ArchSpec, model: PreTrainedModel) -> ShapeTimes:
    """Return the times of the shapes of a model, which are measured once in a process."""
    device = model.device
    if device.type == "meta":
        device = default_device()
    settings = (config.round_to, config.tensor_parallel, use_of(config, model))
    # A loaded model has another config than a model that was built from the config alone.
    weights = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    key = repr((type(model), model.dtype, device, settings, weights))
    if key not in TIMES:
        TIMES[key] = ShapeTimes(config, arch, model, device)
    return TIMES[key]


@FIGURES.register(SPEED)
def _speed(shapes: Shapes) -> Figure:
    """Return the predicted time relative to the original model, whose text is the speed-up."""
    times = shape_times(shapes.config, shapes.arch, shapes.model)
    return Figure(times.predicted, lambda time: f"{1 / time:.2f}×", times.correct)
