"""How long a model of given widths takes, from times that were measured on the machine that serves it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from math import isfinite
from pathlib import Path
from typing import Any

from ..arch.spec import LAYER, ArchSpec, Widths
from ..config.fields import read_mapping
from ..config.pruning import TIMES
from ..errors import StructPruneError, one_line
from ..plain_json import replace_json, unversioned, versioned


ADVICE = "measure them with `structprune latency MODEL FILE`"


@dataclass(frozen=True)
class Times:
    """How long one kind of work takes, in milliseconds.

    Attributes:
        dense: The time of the dense model.
        layer: What of it goes with one layer.
        spaces: The time where a space has a smaller width in every layer, and all else is dense; by kind of space and
            width.
    """

    dense: float
    layer: float
    spaces: Mapping[str, Mapping[int, float]]

    def saved(self, kind: str, size: int, width: int) -> float:
        """What goes where a space of a size has a width in every layer.

        Between measured widths it is a straight line, and beyond the smallest the line goes on. A narrower model that
        was measured to be slower counts as equally fast, so that a larger width never takes less.
        """
        known = sorted(self.spaces[kind].items(), reverse=True)
        widths = [size, *(one for one, _ in known)]
        times = [*accumulate((self.dense, *(time for _, time in known)), min)]
        last = len(widths) - 1
        after = next((place for place in range(1, last) if width >= widths[place]), last)
        (wide, narrow), (slow, fast) = widths[after - 1 : after + 1], times[after - 1 : after + 1]
        return self.dense - slow + (slow - fast) * (wide - width) / (wide - narrow)


@dataclass(frozen=True)
class Latency:
    """The times of a dense model and of smaller ones, as `evaluation.latency.measure_latency` measures them.

    Attributes:
        model_type: The Hugging Face model type.
        layers: The number of layers.
        sizes: The full width of each kind of space that was measured.
        times: The times by what they are of, the names in `TIMES`.
        how: What was measured: device, threads, dtype and the like.
    """

    model_type: str
    layers: int
    sizes: Mapping[str, int]
    times: Mapping[str, Times]
    how: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str | Path) -> Latency:
        """Read what `save` wrote.

        Raises:
            StructPruneError: If the file is missing, is no such file, or is of a later version.
        """
        found = unversioned(read_mapping(Path(path), json.loads))
        try:
            sizes = {str(kind): int(size) for kind, size in found["sizes"].items()}
            times = {name: _times(found["times"][name], sizes) for name in TIMES}
            return cls(str(found["model_type"]), int(found["layers"]), sizes, times, dict(found["how"]))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise StructPruneError(f"{path} holds no measured times ({one_line(error)}); {ADVICE}.") from error

    def save(self, path: str | Path) -> None:
        """Write the times to a JSON file, which replaces a former one in one step.

        Raises:
            StructPruneError: If it cannot be written.
        """
        try:
            replace_json(Path(path), versioned(asdict(self)))
        except OSError as error:
            raise StructPruneError(f"Measured times cannot be written to {path}: {error.strerror}.") from error

    def gauge(self, name: str, arch: ArchSpec) -> Callable[[Widths], float]:
        """A function of the widths: the time of a model that has them, in milliseconds.

        What several spaces and layers save is taken to add up.

        Args:
            name: What the time is of, one of `TIMES`.
            arch: The description of the model.

        Raises:
            StructPruneError: If the times are those of another model.
        """
        self._check(arch)
        times = self.times[name]

        def time(widths: Widths) -> float:
            layers = widths.get(LAYER, self.layers)
            assert isinstance(layers, int)  # the number of layers is one for the model
            total = times.dense - (self.layers - layers) * times.layer
            for kind, size in self.sizes.items():
                given = widths.get(kind, size)
                each = [given if isinstance(given, int) else given.get(place, size) for place in range(layers)]
                total -= sum(times.saved(kind, size, width) for width in each) / self.layers
            return total

        return time

    def _check(self, arch: ArchSpec) -> None:
        found = {kind: sorted({*arch.widths(kind).values()}) for kind in self.sizes if kind in arch.offered}
        own = {kind: widths[0] if len(widths) == 1 else widths for kind, widths in found.items()}
        if (arch.model_type, arch.num_layers, own) != (self.model_type, self.layers, {**self.sizes}):
            raise StructPruneError(
                f"The times were measured on a {self.model_type} model of {self.layers} layers with widths "
                f"{dict(self.sizes)}, and this is a {arch.model_type} model of {arch.num_layers} layers with {own}; "
                f"{ADVICE}."
            )


def _times(found: Mapping[str, Any], sizes: Mapping[str, int]) -> Times:
    spaces = {kind: {int(width): float(ms) for width, ms in found["spaces"][kind].items()} for kind in sizes}
    for kind, size in sizes.items():
        if not spaces[kind] or not all(0 < width < size for width in spaces[kind]):
            raise ValueError(f"the widths of {kind!r} have to lie between 0 and {size}, found {[*spaces[kind]]}")
    times = Times(float(found["dense"]), float(found["layer"]), spaces)
    numbers = [times.dense, times.layer, *(ms for by_width in spaces.values() for ms in by_width.values())]
    if not all(map(isfinite, numbers)) or times.dense <= 0:
        raise ValueError("a time is not a positive number")
    return times
