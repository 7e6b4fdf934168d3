"""Find the devices that hold the weights of a model, and check that they can compute a pruning."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from .errors import StructPruneError


def devices_of(model: nn.Module) -> list[torch.device]:
    """List the devices of a model's weights in the order of its modules, without the meta device."""
    devices = dict.fromkeys(parameter.device for parameter in model.parameters())
    return [device for device in devices if device.type != "meta"]


def is_spread(model: nn.Module) -> bool:
    """Return whether accelerate has spread the weights of a model over several devices."""
    return len(devices_of(model)) > 1


def bytes_by_device(model: nn.Module) -> dict[torch.device, int]:
    """Count the bytes of a model's weights on each device, without the meta device."""
    sizes: Counter[torch.device] = Counter()
    for parameter in model.parameters():
        if parameter.device.type != "meta":
            sizes[parameter.device] += parameter.nbytes
    return dict(sizes)


def check_float64(device: torch.device | str) -> None:
    """Raise `StructPruneError` if a device does not compute in float64, such as Apple's MPS."""
    if torch.device(device).type == "mps":
        raise StructPruneError(
            "MPS does not compute in float64, which calibration and losses need. Use the CPU: `--device cpu`, or "
            "`model.to('cpu')`."
        )


def check_devices(model: nn.Module) -> None:
    """Raise `StructPruneError` if a model has weights on a device that does not compute in float64."""
    for device in devices_of(model):
        check_float64(device)
