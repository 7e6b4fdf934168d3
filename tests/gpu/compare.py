"""Run the same work on the CPU and on simulated GPUs, and compare the results."""

from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import torch
from accelerate import dispatch_model
from gpu.simulator import Gpus, simulated_gpus
from transformers import PreTrainedModel

from optimum_structprune.arch.load import describe


TOLERANCE = 1e-4  # relative to the largest value of a tensor
FIRST = ("embed", "wte", "wpe", "rotary", "shared")  # parts of the names of modules in front of the layers


def on_gpu(model: PreTrainedModel, device: str = "cuda") -> PreTrainedModel:
    """Put a whole model on one device."""
    return model.to(device)


def device_map(model: PreTrainedModel, count: int) -> dict[str, Any]:
    """Spread a model over devices: each device holds an equal part of the layers.

    Modules in front of the layers are on the first device, and modules behind the layers on the last device. A head
    that is tied to the embeddings is on the device of the embeddings.
    """
    stacks = dict(describe(model).stacks)
    tied_head = None
    if model.config.get_text_config().tie_word_embeddings:
        tied_head = model.get_output_embeddings()
    places: dict[str, Any] = {}

    def place(name: str, module: torch.nn.Module) -> None:
        prefix = f"{name}." if name else ""
        if name in stacks:
            layers = len(module)
            for layer in range(layers):
                places[f"{name}.{layer}"] = layer * count // layers
        elif any(stack.startswith(prefix) for stack in stacks):
            for tensor, _ in chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False)):
                places[prefix + tensor] = 0
            for child_name, child in module.named_children():
                place(prefix + child_name, child)
        elif module is tied_head or any(word in name for word in FIRST):
            places[name] = 0
        else:
            places[name] = count - 1

    place("", model)
    return places


def spread(count: int) -> Callable[[PreTrainedModel], PreTrainedModel]:
    """Return a function that spreads a model over devices, as `device_map="auto"` does with a large one."""
    return lambda model: dispatch_model(model, device_map(model, count), main_device=0)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copy the weights of a model to the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def assert_same_on_gpus(
    work: Callable[[Any], Any],
    make: Callable[[], Any],
    count: int = 1,
    place: Callable[[Any], Any] | None = None,
    tolerance: float = TOLERANCE,
    float64: bool = True,
) -> Gpus:
    """Assert that `work(make())` has the same result on the CPU and on simulated GPUs.

    Args:
        work: The code under test. It returns tensors, numbers, and text, also in mappings and lists.
        make: Makes the model, or all models.
        count: The number of GPUs that the process sees.
        place: Puts the result of `make` on the GPUs. By default it puts a model on `cuda`, or spreads the model over
            all GPUs if `count` is above 1.
        tolerance: The largest difference, relative to the largest value of a tensor.
        float64: Whether the GPUs compute in fp64.

    Returns:
        The GPUs with their counts.
    """
    if place is None:
        place = on_gpu if count == 1 else spread(count)

    expected = work(make())
    with simulated_gpus(count, float64) as gpus:
        actual = work(place(make()))
        assert_same(actual, expected, tolerance)

    assert gpus.products, "No matrix product ran on a GPU."
    return gpus


def assert_same(actual: Any, expected: Any, tolerance: float = TOLERANCE, path: str = "result") -> None:
    """Assert that two results are equal, numbers within a relative tolerance."""
    if isinstance(expected, Mapping):
        assert list(actual) == list(expected), path
        for name, value in expected.items():
            assert_same(actual[name], value, tolerance, f"{path}[{name!r}]")
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), path
        for index, value in enumerate(expected):
            assert_same(actual[index], value, tolerance, f"{path}[{index}]")
    elif isinstance(expected, (torch.Tensor, float)):
        assert_close(torch.as_tensor(actual), torch.as_tensor(expected), tolerance, path)
    else:
        assert actual == expected, path


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, path: str) -> None:
    """Assert that two tensors have the same shape, and that their largest difference is within the tolerance."""
    actual = actual.detach().cpu().double()
    expected = expected.detach().cpu().double()
    assert actual.shape == expected.shape, path
    if actual.numel() == 0:
        return

    scale = expected.abs().max().clamp(min=1e-12)
    difference = float((actual - expected).abs().max() / scale)
    assert difference <= tolerance, f"{path} differs by {difference:.2g}"
