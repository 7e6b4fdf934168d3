"""Gates on units, which are trained to keep the predictions of the original model within a budget of units.

This is Deterministic Differentiable Pruning (Huang et al., ICML 2026, arXiv 2603.08065) with three deviations:

- The loss is the divergence from the original model alone, without the cross-entropy of the text.
- Gates begin at 1, without noise, and are at most `MOST`.
- The budget falls to its final value over the first steps.

With few training tokens, the loss and the bound prevent gates from learning the kind of text.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from math import cos, isfinite, pi, sqrt
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from optimum_structprune import StructPruneError, register_criterion
from optimum_structprune.arch.inference import evaluating
from optimum_structprune.arch.meta import is_offloaded
from optimum_structprune.arch.spec import MODEL, ArchSpec, Space
from optimum_structprune.config.pruning import REFITS, StructPruneConfig
from optimum_structprune.criteria import per_unit
from optimum_structprune.measure.kl import divergence
from optimum_structprune.measure.predictions import LOSS_TOKENS
from optimum_structprune.method.calibrate import Moments
from optimum_structprune.method.layers import run_model
from optimum_structprune.steps.data import CalibrationData
from optimum_structprune.system.offloading import compute_device
from optimum_structprune.system.processes import all_reduce_, shard
from optimum_structprune.widths.allocation import widths_of

from .gradients import frozen


DDP = "ddp"
# The range of a gate. Below 0 a unit is closed, and a gradient may open it again.
LEAST = -0.1
MOST = 2.0
# A gate of this value counts as half kept. The value falls from `SOFT` to `SHARP` during the training.
SOFT = 0.5
SHARP = 0.1
# The share of the steps in which the learning rates rise.
WARM_UP = 0.1
# The share of the steps in which the budget falls to its final value.
RAMP = 0.25
# The learning rate of the multipliers of squared violations, as a multiple of the learning rate of the gates.
SQUARED_RATE = 20.0


@dataclass(frozen=True)
class Settings:
    """The settings of the training of gates.

    Attributes:
        steps: The number of training steps.
        learning_rate: The maximum learning rate of the gates.
        tokens_per_step: The number of calibration tokens in a step, rounded down to whole samples. A step has at least
            one sample.
    """

    steps: int = 300
    learning_rate: float = 0.02
    tokens_per_step: int = 1024

    @classmethod
    def of_text(cls, text: str) -> Settings:
        """Return the settings of a text such as `steps=1000,learning_rate=0.05`, with defaults for the others."""
        kinds = {"steps": int, "learning_rate": float, "tokens_per_step": int}
        values = {}
        try:
            for part in text.split(","):
                if part:
                    name, _, value = part.partition("=")
                    values[name] = kinds[name](value)
        except (KeyError, ValueError) as error:
            raise StructPruneError(f"STRUCTPRUNE_GATES takes {', '.join(kinds)}, got {text!r} ({error}).") from error

        if not all(isfinite(value) and value > 0 for value in values.values()):
            raise StructPruneError(f"STRUCTPRUNE_GATES takes numbers greater than 0, got {text!r}.")
        return cls(**values)

    def samples_per_step(self, seq_length: int) -> int:
        """Return the number of samples in a step, if a sample has `seq_length` tokens."""
        return max(1, self.tokens_per_step // seq_length)


SETTINGS = Settings.of_text(os.environ.get("STRUCTPRUNE_GATES", ""))


@dataclass(frozen=True)
class Budget:
    """A budget for the units of some spaces together.

    Attributes:
        spaces: The spaces.
        kept: The share of the units to keep, weighted by their parameters.
    """

    spaces: tuple[Space, ...]
    kept: float


def gates_of(model: PreTrainedModel, arch: ArchSpec, data: CalibrationData) -> dict[tuple[int, str], Tensor]:
    """Return the gates of the original model, by layer and space. All rounds of a run use the gates of the first."""
    if DDP not in data.cache:
        check_learnable(data.config, arch)
        if is_offloaded(model):
            raise StructPruneError(
                f"Gates are learned by passes through all layers of {type(model).__name__} at once, which is "
                "offloaded; choose criterion='obs' or 'wanda'."
            )

        with evaluating(model), frozen(model):
            budgets = budgets_of(data.config, arch, model)
            data.cache[DDP] = learned_gates(model, data, budgets)
    return data.cache[DDP]


def check_learnable(config: StructPruneConfig, arch: ArchSpec) -> None:
    """Refuse models that do not predict the next token, whole layers, channels of the whole model, and experts."""
    cause = f"criterion={DDP!r}"
    if not arch.causal:
        raise StructPruneError(
            f"{cause} learns gates by the predictions of the next token, and a model of type {arch.model_type!r} "
            "makes none; choose criterion='obs' or 'wanda'."
        )

    names = config.targets
    if config.widths is not None:
        names = config.widths
    for name in names:
        spaces = arch.of(name)
        if spaces and (not spaces[0].inside or spaces[0].layer == MODEL):
            raise StructPruneError(
                f"{cause} learns gates on units inside the layers, and {name!r} is none of them; prune it in a run of "
                "its own."
            )
        if any(space.experts is not None for space in spaces):
            raise StructPruneError(
                f"{cause} learns gates on what a matrix reads, and the experts of {name!r} have their matrices in one "
                "parameter; leave it out of targets and widths, or choose criterion='obs' or 'wanda'."
            )


def budgets_of(config: StructPruneConfig, arch: ArchSpec, model: PreTrainedModel) -> list[Budget]:
    """Return a budget for each space that becomes narrower."""
    widths = widths_of(config, arch, model)
    budgets = []
    for space in arch.spaces:
        if space.kind in widths and space.layer not in config.skip_layers:
            share = space.width_in(widths) / space.width
            if share < 1:
                budgets.append(Budget((space,), kept=share))
    return budgets


def learned_gates(
    model: PreTrainedModel, data: CalibrationData, budgets: Sequence[Budget]
) -> dict[tuple[int, str], Tensor]:
    """Train the gates of all units, and return them. Units with low gates are removed first.

    A gate z multiplies the inputs of the consumers of a unit by max(z, 0), with the gradient of z. Each step uses
    some samples, in an order that depends on the seed. The loss is KL(original‖gated) per predicted token, plus the
    terms of an augmented Lagrangian (see `Gates.penalty`), whose multipliers ascend.

    Returns:
        By layer and name of the space, shape `(units,)`, fp64, on the CPU, between `LEAST` and `MOST`.
    """
    gates = Gates(budgets, compute_device(model))
    optimizer = _optimizer(gates)
    for step in tqdm(range(SETTINGS.steps), desc="learning gates", unit="step"):
        optimizer.zero_grad()
        _add_divergence_gradient(model, gates, data, step)
        gates.penalty((step + 1) / SETTINGS.steps).backward()

        for group in optimizer.param_groups:
            group["lr"] = group["scale"] * SETTINGS.learning_rate * _rate(step, SETTINGS.steps)
        optimizer.step()
        gates.clamp_()
    return gates.by_space()


class Gates:
    """The gates of all units of some spaces, and the multipliers of their budgets.

    Attributes:
        spaces: The spaces of all budgets.
        sizes: The number of units of each space.
        owner: The index of the budget of each unit, shape `(units,)`.
        price: The number of parameters of each unit, shape `(units,)`.
        kept: The share of each budget, shape `(budgets,)`.
        totals: The number of parameters of each budget, shape `(budgets,)`.
        values: The gates, shape `(units,)`, fp32.
        linear: The multipliers of the violation of each budget, and of the indecision of its units, shape
            `(2, budgets)`.
        squared: The multipliers of the squared violations, shape `(budgets,)`.
    """

    def __init__(self, budgets: Sequence[Budget], device: torch.device):
        self.spaces: list[Space] = []
        budget_indices: list[int] = []
        for index, budget in enumerate(budgets):
            self.spaces.extend(budget.spaces)
            budget_indices.extend([index] * len(budget.spaces))

        self.sizes = [space.size for space in self.spaces]
        sizes = torch.tensor(self.sizes)
        self.owner = torch.tensor(budget_indices).repeat_interleave(sizes).to(device)
        prices = torch.tensor([float(space.unit_params) for space in self.spaces])
        self.price = prices.repeat_interleave(sizes).to(device)
        self.kept = torch.tensor([budget.kept for budget in budgets], device=device)
        self.totals = torch.zeros_like(self.kept).index_add_(0, self.owner, self.price)

        self.values = torch.ones(sum(self.sizes), device=device, requires_grad=True)
        self.linear = torch.zeros(2, len(budgets), device=device, requires_grad=True)
        self.squared = torch.zeros(len(budgets), device=device, requires_grad=True)

    @property
    def opened(self) -> Tensor:
        """Return max(z, 0) for every gate z, with the gradient of z, shape `(units,)`."""
        return self.values + (self.values.relu() - self.values).detach()

    def factors(self) -> dict[str, Tensor]:
        """Return the factors of the consumers' inputs, by module, shape `(n,)`, with the gradient of the gates."""
        factors = {}
        for space, gates in zip(self.spaces, self.opened.split(self.sizes), strict=True):
            for axis in space.consumers:
                factors[axis.module] = gates.repeat_interleave(axis.per_unit)
        return factors

    def retention(self, done: float) -> Tensor:
        """Return the retention of every unit, from 0 (removed) to 1 (kept), shape `(units,)`.

        It is 1.2 σ(2.4 (z - μ) / μ) - 0.1, clamped to [0, 1], with the gradient of the value before clamping. μ falls
        from `SOFT` to `SHARP` with the root of `done`, the share of the steps that are done.
        """
        half = SOFT - (SOFT - SHARP) * sqrt(done)
        soft = 1.2 * torch.sigmoid((self.opened - half) * 2.4 / half) - 0.1
        return soft + (soft.clamp(0, 1) - soft).detach()

    def penalty(self, done: float) -> Tensor:
        """Return λ₁ v + λ₂ v² + λ₃ mean(s (1 - s)), averaged over all budgets.

        s is the retention, and v = mean(s) - target is the violation of a budget. The target falls from 1 to the share
        of the budget. Means are weighted by parameters.
        """
        target = 1 - (1 - self.kept) * min(done / RAMP, 1)
        retention = self.retention(done)
        violation = self._means(retention) - target
        indecision = self._means(retention * (1 - retention))
        terms = self.linear[0] * violation + self.squared * violation.square() + self.linear[1] * indecision
        return (terms * self.totals).sum() / self.totals.sum()

    @torch.no_grad()
    def clamp_(self) -> None:
        """Clamp the gates to their range."""
        self.values.clamp_(LEAST, MOST)

    def by_space(self) -> dict[tuple[int, str], Tensor]:
        """Return the gates of every space, by layer and name, shape `(units,)`, fp64, on the CPU."""
        values = self.values.detach().double().cpu().split(self.sizes)
        return {space.key: gates for space, gates in zip(self.spaces, values, strict=True)}

    def _means(self, values: Tensor) -> Tensor:
        """Return the mean of a value per unit in each budget, weighted by parameters, shape `(budgets,)`."""
        sums = torch.zeros_like(self.kept).index_add(0, self.owner, values * self.price)
        return sums / self.totals


def _optimizer(gates: Gates) -> torch.optim.Optimizer:
    """Return AdamW without decay. The learning rate of a group is `scale` times the learning rate of the gates."""
    groups = [
        {"params": [gates.values], "scale": 1.0},
        {"params": [gates.linear], "scale": 1.0, "maximize": True},
        {"params": [gates.squared], "scale": SQUARED_RATE, "maximize": True},
    ]
    return torch.optim.AdamW(groups, weight_decay=0.0)


def _rate(step: int, steps: int) -> float:
    """Return the learning rate as a share of its maximum. It rises linearly, and falls to 0 as a half cosine."""
    rise = min(1.0, (step + 1) / max(WARM_UP * steps, 1))
    fall = (1 + cos(pi * step / steps)) / 2
    return rise * fall


def _add_divergence_gradient(model: PreTrainedModel, gates: Gates, data: CalibrationData, step: int) -> None:
    """Set the gradient of the gates to the gradient of KL(original‖gated) per predicted token of a step."""
    num_tokens = 0
    for ids in _batches(data, step):
        with torch.no_grad():
            original_logits = run_model(model, ids).logits[:, :-1]
        with torch.enable_grad(), multiplying(model, gates.factors()):
            gated_logits = run_model(model, ids).logits[:, :-1]
        num_tokens += ids[:, 1:].numel()
        _backward(gated_logits.flatten(0, 1), original_logits.flatten(0, 1), step)

    gradient = gates.values.grad
    if gradient is None:
        gradient = torch.zeros_like(gates.values)
    count = gates.values.new_tensor(float(num_tokens))
    all_reduce_([gradient, count])
    gates.values.grad = gradient / count.clamp(min=1)


def _backward(gated_logits: Tensor, original_logits: Tensor, step: int) -> None:
    """Backpropagate the sum of KL(original‖gated) through the gated model.

    The divergence is computed for a few tokens at a time, to limit the memory for logits.
    """
    gradients = []
    gated_parts = gated_logits.detach().split(LOSS_TOKENS)
    original_parts = original_logits.split(LOSS_TOKENS)
    for gated_part, original_part in zip(gated_parts, original_parts, strict=True):
        loss = divergence(gated_part.requires_grad_(), original_part).sum()
        value = float(loss.detach())
        if not isfinite(value):
            raise StructPruneError(
                f"The divergence from the original model is {value:g} in step {step + 1} of the gates; "
                "load the model in float32 or bfloat16, or lower learning_rate in STRUCTPRUNE_GATES."
            )
        gradients += torch.autograd.grad(loss, gated_part)
    gated_logits.backward(torch.cat(gradients))


def _batches(data: CalibrationData, step: int) -> Iterator[Tensor]:
    """Yield the samples of a step that this process runs, in batches of samples of the same length."""
    samples: list[Tensor] = []
    for domain in data.domains:
        samples.extend(domain.samples)
    seq_length = data.domains[0].samples.shape[1]
    indices = _order(len(samples), step, SETTINGS.samples_per_step(seq_length), data.config.seed)

    samples_by_length: dict[int, list[Tensor]] = {}
    for index in shard(indices):
        ids = samples[index]
        samples_by_length.setdefault(len(ids), []).append(ids)

    for group in samples_by_length.values():
        for start in range(0, len(group), data.options.batch_size):
            yield torch.stack(group[start : start + data.options.batch_size])


def _order(count: int, step: int, per_step: int, seed: int) -> list[int]:
    """Return the indices of the samples of a step. Each epoch has all samples once, in a random order of its own."""
    orders: dict[int, list[int]] = {}
    indices = []
    for position in range(step * per_step, (step + 1) * per_step):
        epoch, place = divmod(position, count)
        if epoch not in orders:
            generator = torch.Generator().manual_seed(seed + epoch)
            orders[epoch] = torch.randperm(count, generator=generator).tolist()
        indices.append(orders[epoch][place])
    return indices


@contextmanager
def multiplying(model: nn.Module, factors: Mapping[str, Tensor]) -> Iterator[None]:
    """Multiply the inputs of modules by factors of shape `(n,)` inside `with`."""
    with ExitStack() as stack:
        for name, factor in factors.items():
            hook = partial(_multiply_input, factor)
            handle = model.get_submodule(name).register_forward_pre_hook(hook)
            stack.callback(handle.remove)
        yield


def _multiply_input(factor: Tensor, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments of a module with the first multiplied by a factor."""
    x = args[0]
    return (x * factor.to(x),) + args[1:]


def gates_by_module(model: PreTrainedModel, arch: ArchSpec, data: CalibrationData) -> dict[str, Tensor]:
    """Return the gates of the columns of the consumers, by module, shape `(domains, n)`, equal for all domains."""
    gates = gates_of(model, arch, data)
    gates_of_columns = {}
    for space in arch.spaces:
        if space.key in gates:
            for axis in space.consumers:
                columns = gates[space.key].repeat_interleave(axis.per_unit)
                gates_of_columns[axis.module] = columns.expand(len(data.domains), -1)
    return gates_of_columns


def _check(config: StructPruneConfig, arch: ArchSpec, use: str) -> None:
    """Refuse a pruning in a Trainer, measured widths, and everything that `check_learnable` refuses."""
    if use == "trainer":
        raise StructPruneError(
            "criterion='ddp' learns gates for the final widths before anything is removed, and a Trainer prunes "
            "in steps of its own; choose another criterion, or prune first (`structprune prune`)."
        )

    if config.allocation != "uniform":
        raise StructPruneError(
            "criterion='ddp' learns gates for widths that are known, and "
            f"allocation={config.allocation!r} measures which; use allocation='uniform'."
        )

    check_learnable(config, arch)


@REFITS.register("folded")
def folded_refit(
    weight: Tensor, bias: Tensor | None, moments: Moments, keep: Tensor, damping: float
) -> tuple[Tensor, Tensor | None]:
    """Multiply the kept columns by their gates.

    See `optimum_structprune.method.refit.least_squares` for the arguments.
    """
    assert moments.prior is not None, "refit='folded' goes with criterion='ddp'"
    factors = moments.prior.to(weight).clamp(min=0)
    return (weight * factors)[:, keep], bias


@register_criterion(DDP, whole_model_statistics=gates_by_module, check=_check)
def ddp(weight: Tensor, moments: Moments, columns_per_unit: int) -> Tensor:
    """Return the gate z of each unit; see `learned_gates`.

    The gates are trained as in Deterministic Differentiable Pruning (Huang et al., ICML 2026, arXiv 2603.08065). A
    gate also scales its unit: `refit="folded"` multiplies the columns of a kept unit by max(z, 0), as the code of the
    paper does. Every other refit starts from the original weights.
    """
    assert moments.prior is not None
    return per_unit(moments.prior.to(weight), columns_per_unit) / columns_per_unit
