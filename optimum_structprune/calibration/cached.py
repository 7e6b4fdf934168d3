"""Caches what the parts of a layer give before any pruned part has run: the smaller layer gives the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..forward.hooks import intercept, replaying


# A part is worth keeping its output if it has this share of the layer's parameters; a norm has far less.
LEAST_SHARE = 0.02


class CachedOutputs:
    """Outputs of the parts of one layer, such as its attention, that run before the parts that are pruned.

    Memory: one tensor of the size of the hidden states for each part that is kept.
    """

    def __init__(self, device: torch.device | None):
        self.device = device
        self.changed: set[str] = set()
        self.outputs: dict[str, dict[int, Any]] = {}

    def forget(self) -> None:
        """Begin with another layer."""
        self.changed, self.outputs = set(), {}

    @contextmanager
    def recording(self, layer: nn.Module, changed: Iterable[str], index: Callable[[], int]) -> Iterator[None]:
        """Keep what the parts of a layer give inside `with`, for one pass or several over different batches."""
        self.changed |= {name.partition(".")[0] for name in changed}
        parts = dict(layer.named_children())
        self.outputs = {name: outputs for name, outputs in self.outputs.items() if name not in self.changed}
        if not self.changed <= set(parts):
            # A hook cannot see when the layer uses a parameter of no part.
            self.outputs = {}
            yield
            return
        names = [name for name, part in parts.items() if name in self.changed or _is_large(part, layer)]
        order: list[str] = []

        def before(number: int, args: Any, kwargs: Any) -> None:
            if number == 0:
                order.clear()
            else:
                order.append(names[number - 1])

        def after(number: int, output: Any) -> None:
            # Before a pruned part has run, everything is as it will be in the smaller layer.
            if number and not self.changed & set(order) and order.count(order[-1]) == 1 and _is_plain(output):
                # A copy, since the layer may go on to change its output.
                self.outputs.setdefault(names[number - 1], {})[index()] = _mapped(
                    output, lambda tensor: tensor.detach().to(self.device or tensor.device, copy=True)
                )

        with intercept([layer, *(parts[name] for name in names)], before, after):
            yield

    @contextmanager
    def replayed(self, layer: nn.Module, index: int, device: torch.device) -> Iterator[None]:
        """The parts that are kept do not run inside `with`, but give what they gave for a batch."""
        cached = {name: outputs[index] for name, outputs in self.outputs.items() if index in outputs}
        outputs = [_mapped(output, lambda tensor: tensor.to(device)) for output in cached.values()]
        with replaying([layer.get_submodule(name) for name in cached], outputs):
            yield


def _is_large(part: nn.Module, layer: nn.Module) -> bool:
    sizes = [sum(parameter.numel() for parameter in module.parameters()) for module in (part, layer)]
    return sizes[0] >= LEAST_SHARE * sizes[1]


def _is_plain(output: Any) -> bool:
    """Whether an output is a tensor, or a tuple of a tensor and nothing else."""
    if isinstance(output, tuple):
        return bool(output) and _is_plain(output[0]) and all(item is None for item in output[1:])
    return isinstance(output, Tensor)


def _mapped(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)
