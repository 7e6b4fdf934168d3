"""How long a model takes at several widths, for a budget of milliseconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from ..arch.load import describe
from ..arch.meta import skeleton
from ..arch.shrink import shrunk_config
from ..arch.spec import LAYER, ArchSpec, Widths
from ..config.pruning import TIMES, StructPruneConfig
from ..errors import StructPruneError
from ..forward.metrics import input_device
from ..widths.allocation import alike, legal_widths
from ..widths.latency import Latency, Times
from .speed import Measurement, measure_speed


# The shares of a width that are measured, each to the nearest legal width.
SHARES = (0.75, 0.5, 0.25)
# As large as the weights of a new model: what they are does not change the time, but zeros could.
SCALE = 0.02


def measure_latency(
    model: PreTrainedModel,
    *,
    targets: Sequence[str] | None = None,
    batch_size: int = 1,
    prompt: int = 128,
    new_tokens: int = 32,
    repeats: int = 9,
    threads: int | None = None,
    clock: str = "wall",
    arch_file: str | Path | None = None,
) -> Latency:
    """Measure how long a model takes to read a prompt and to write a token, and smaller ones of random weights.

    Each space in turn has three quarters, a half and a quarter of its width in every layer; and one model has half of
    the layers. Each of them takes turns with the dense model (see `measure_speed`), so that what else the machine does
    meets both. Memory: the model and one smaller one.

    Args:
        model: A causal language model, on the device that is to be measured.
        targets: The kinds of space; None takes those of a config's default that the model has.
        batch_size: The number of sequences that run together.
        prompt: The number of tokens in each prompt.
        new_tokens: The number of tokens to write after each prompt.
        repeats: The number of timed runs of each model.
        threads: The number of threads; None takes what torch is set to.
        clock: What is timed: `wall` for time that passes, or `cpu` for time of the processor.
        arch_file: Descriptions of your own, see `families.yaml`.

    Returns:
        The times, for `StructPruneConfig.latency_file` once they are saved.

    Raises:
        StructPruneError: If layers differ in width, a target is not there or lies in experts, or `measure_speed`
            refuses the model or a number.
    """
    arch = describe(model, arch_file)
    legal = legal_targets(arch, model, targets)
    how = {"batch_size": batch_size, "prompt": prompt, "new_tokens": new_tokens, "repeats": repeats, "clock": clock}
    shapes: list[Widths] = [
        {name: width} for name, widths in legal.items() for width in measured_widths(widths, arch.widths(name)[0])
    ]
    shapes += [{LAYER: arch.num_layers // 2}] if LAYER in arch.offered and arch.num_layers > 1 else []
    pairs: list[tuple[Widths, list[Measurement]]] = []
    for widths in tqdm(shapes, desc="latency", unit="shape"):
        models = {"dense": model, "smaller": smaller_model(model, arch, widths)}
        speed = measure_speed(
            models,
            batch_sizes=[batch_size],
            prompts=[prompt],
            new_tokens=new_tokens,
            repeats=repeats,
            threads=threads,
            clock=clock,
            arch_file=arch_file,
        )
        pairs.append((widths, speed.measurements))
    how |= {"threads": speed.threads, "device": _device_name(model), "dtype": str(model.dtype).removeprefix("torch.")}
    return Latency(
        arch.model_type,
        arch.num_layers,
        {name: arch.widths(name)[0] for name in legal},
        {name: _times(name, pairs, arch.num_layers, new_tokens) for name in TIMES},
        how,
    )


def legal_targets(arch: ArchSpec, model: PreTrainedModel, targets: Sequence[str] | None) -> dict[str, list[int]]:
    """The legal widths of what is measured, ascending, by kind of space; shapes of the model are enough."""
    default = StructPruneConfig(sparsity=0.5).targets
    names = [name for name in default if name in arch.offered] if targets is None else [*targets]
    legal = legal_widths(StructPruneConfig(sparsity=0.5, targets=names), arch, model.config)
    for name in legal:
        if not arch.of(name)[0].inside or any(space.experts is not None for space in arch.of(name)):
            raise StructPruneError(
                f"The time that {name!r} takes is not measured: only widths inside of layers are, and none in "
                "experts, whose speed depends on the text."
            )
    if not alike(arch, list(legal)):
        raise StructPruneError(f"The layers of this {arch.model_type} model differ in width; measure the dense model.")
    return legal


def measured_widths(legal: Sequence[int], size: int) -> list[int]:
    """The legal widths that are nearest to the measured shares of a width, descending, without the full one."""
    near = {min((abs(width - share * size), width) for width in legal)[1] for share in SHARES}
    return sorted(near - {size}, reverse=True)


def smaller_model(model: PreTrainedModel, arch: ArchSpec, widths: Widths) -> PreTrainedModel:
    """A model of random weights with smaller widths, in the dtype and on the device of the dense one."""
    small: Any = skeleton(model, shrunk_config(model.config, arch, widths), buffers=True)
    device, generator = input_device(model), torch.Generator().manual_seed(0)
    for name, parameter in [*small.named_parameters()]:
        values = torch.empty(parameter.shape, dtype=model.dtype).normal_(std=SCALE, generator=generator)
        set_module_tensor_to_device(small, name, device, value=values, dtype=model.dtype)
    small.tie_weights()
    return small.to(device).eval()


def _times(name: str, pairs: Sequence[tuple[Widths, list[Measurement]]], layers: int, new_tokens: int) -> Times:
    """The times of one kind of work: the dense model's is the median over all pairs, a smaller one's follows from its
    speed-up, so that a slow minute of the machine does not count for one of them alone.
    """
    stage, tokens = ("decode", new_tokens) if name == "ms_per_token" else ("prefill", 1)
    timings = [(widths, *(getattr(one, stage) for one in measured)) for widths, measured in pairs]
    dense = median(1e3 * median(whole.seconds) / tokens for _, whole, _ in timings)
    layer, spaces = 0.0, dict[str, dict[int, float]]()
    for widths, _, smaller in timings:
        ((kind, width),) = widths.items()
        assert isinstance(width, int)
        time = dense / smaller.speedup.median
        if kind == LAYER:
            layer = (dense - time) / (layers - width)
        else:
            spaces.setdefault(kind, {})[width] = time
    return Times(dense, layer, spaces)


def _device_name(model: PreTrainedModel) -> str:
    device = input_device(model)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def table_of(latency: Latency) -> list[list[str]]:
    """What was measured, as the rows of a table, the heads first."""
    rows = [["", *TIMES, "speed-up"]]
    dense = {name: latency.times[name].dense for name in TIMES}

    def row(label: str, times: Mapping[str, float]) -> list[str]:
        gains = " / ".join(f"x {dense[name] / times[name]:.3f}" for name in TIMES)
        return [label, *(f"{times[name]:,.3f}" for name in TIMES), gains]

    rows.append(row("dense", dense))
    for kind in latency.sizes:
        for width in latency.times[TIMES[0]].spaces[kind]:
            rows.append(row(f"{kind}={width}", {name: latency.times[name].spaces[kind][width] for name in TIMES}))
    less = {name: dense[name] - latency.times[name].layer for name in TIMES}
    return [*rows, row("a layer less", less)]
