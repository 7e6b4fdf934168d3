"""Gates on units, learned so that the predictions of the dense model are kept while a budget of units is met.

This is Deterministic Differentiable Pruning (Huang et al., ICML 2026, arXiv 2603.08065) with choices of ours: the loss
is the divergence from the dense model alone, without the cross-entropy of the text; gates begin at 1, without noise,
and are at most `MOST`; and the budget comes down to what is wanted over the first steps. The loss and the bound keep
gates that are learned on few tokens from learning the kind of text.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import cos, isfinite, pi, sqrt
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from optimum_structprune import StructPruneError, register_criterion
from optimum_structprune.arch.meta import is_offloaded
from optimum_structprune.arch.spec import MODEL, ArchSpec, Space
from optimum_structprune.config.pruning import REFITS, StructPruneConfig
from optimum_structprune.criteria import per_unit
from optimum_structprune.forward.metrics import TOKENS_AT_ONCE, divergence, evaluating
from optimum_structprune.method.calibrate import Moments
from optimum_structprune.method.layers import run_model
from optimum_structprune.sources.data import CalibrationData
from optimum_structprune.system.offloading import compute_device
from optimum_structprune.system.processes import all_reduce_, shard
from optimum_structprune.widths.allocation import widths_of

from .gradients import frozen


DDP = "ddp"
# The range of a gate; below 0 a unit is closed, and a gradient may open it again.
LEAST, MOST = -0.1, 2.0
# The gate at which a unit counts as half kept falls from the first number to the second.
SOFT, SHARP = 0.5, 0.1
# The share of the steps in which learning rates rise, and in which the budget comes down to what is wanted.
WARM_UP, RAMP = 0.1, 0.25
# The learning rate of the multiplier of a squared violation, as a multiple of that of the gates.
SQUARED_RATE = 20.0


@dataclass(frozen=True)
class Settings:
    """How gates are learned.

    Attributes:
        steps: The number of training steps.
        learning_rate: The largest learning rate of the gates.
        tokens_per_step: The number of calibration tokens in a step, rounded down to whole samples, of which there is
            at least one.
    """

    steps: int = 300
    learning_rate: float = 0.02
    tokens_per_step: int = 1024

    @classmethod
    def of_text(cls, text: str) -> Settings:
        """The settings from a text such as `steps=1000,learning_rate=0.05`; what it leaves out is as usual."""
        kinds = {"steps": int, "learning_rate": float, "tokens_per_step": int}
        values = dict(part.split("=", 1) if "=" in part else (part, "") for part in filter(None, text.split(",")))
        try:
            settings = cls(**{name: kinds[name](value) for name, value in values.items()})
        except (KeyError, ValueError) as error:
            raise StructPruneError(f"STRUCTPRUNE_GATES takes {', '.join(kinds)}, got {text!r} ({error}).") from error
        if not all(isfinite(value) and value > 0 for value in vars(settings).values()):
            raise StructPruneError(f"STRUCTPRUNE_GATES takes numbers greater than 0, got {text!r}.")
        return settings

    def samples_per_step(self, seq_length: int) -> int:
        """The number of samples of so many tokens in a step."""
        return max(1, self.tokens_per_step // seq_length)


SETTINGS = Settings.of_text(os.environ.get("STRUCTPRUNE_GATES", ""))


@dataclass(frozen=True)
class Budget:
    """A part of the model that keeps a share of its units, however they lie in it.

    Attributes:
        spaces: The spaces.
        kept: The share that is kept, of the parameters that go with all units.
    """

    spaces: tuple[Space, ...]
    kept: float


def gates_of(model: PreTrainedModel, arch: ArchSpec, data: CalibrationData) -> dict[tuple[int, str], Tensor]:
    """The gates of the dense model, by layer and space; all rounds of a run go by those that were learned first."""
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
    """Refuse what has no gates: predictions of no next token, whole layers or channels of the model, and experts."""
    cause = f"criterion={DDP!r}"
    if not arch.causal:
        raise StructPruneError(
            f"{cause} learns gates by the predictions of the next token, and a model of type {arch.model_type!r} "
            "makes none; choose criterion='obs' or 'wanda'."
        )
    for name in config.targets if config.widths is None else config.widths:
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
    """The share that each space keeps, those that lose something."""
    widths = widths_of(config, arch, model)
    spaces = [space for space in arch.spaces if space.kind in widths and space.layer not in config.skip_layers]
    shares = [(space, space.width_in(widths) / space.width) for space in spaces]
    return [Budget((space,), kept) for space, kept in shares if kept < 1]


def learned_gates(
    model: PreTrainedModel, data: CalibrationData, budgets: Sequence[Budget]
) -> dict[tuple[int, str], Tensor]:
    """The gate of every unit after training: the lower, the sooner a unit goes.

    A gate z multiplies what the consumers read of a unit by max(z, 0), with the gradient of z. Each step takes some
    samples, in an order that follows from the seed, and adds to KL(dense‖gated) per predicted token the terms of an
    augmented Lagrangian (see `Gates.penalty`), whose multipliers ascend.

    Returns:
        By layer and name of the space, shape `(units,)`, fp64, on the CPU; from `LEAST` to `MOST`.
    """
    gates = Gates(budgets, compute_device(model))
    optimizer = _optimizer(gates)
    for step in tqdm(range(SETTINGS.steps), desc="learning gates", unit="step"):
        optimizer.zero_grad()
        _descend(model, gates, data, step)
        gates.penalty((step + 1) / SETTINGS.steps).backward()
        for group in optimizer.param_groups:
            group["lr"] = group["scale"] * SETTINGS.learning_rate * _rate(step, SETTINGS.steps)
        optimizer.step()
        gates.clamp_()
    return gates.by_space()


class Gates:
    """One gate for every unit of some spaces, and the multipliers that hold their budgets.

    Attributes:
        values: The gates, shape `(units,)`, fp32.
        linear: The multipliers of each budget's violation and of how undecided its units are, shape `(2, budgets)`.
        squared: The multipliers of the squared violations, shape `(budgets,)`.
    """

    def __init__(self, budgets: Sequence[Budget], device: torch.device):
        self.spaces = [space for budget in budgets for space in budget.spaces]
        self.sizes = [space.size for space in self.spaces]
        sizes, owners = torch.tensor(self.sizes), [n for n, budget in enumerate(budgets) for _ in budget.spaces]
        self.owner = torch.tensor(owners).repeat_interleave(sizes).to(device)
        price = torch.tensor([float(space.unit_params) for space in self.spaces])
        self.price = price.repeat_interleave(sizes).to(device)
        self.kept = torch.tensor([budget.kept for budget in budgets], device=device)
        self.totals = torch.zeros_like(self.kept).index_add_(0, self.owner, self.price)
        self.values = torch.ones(sum(self.sizes), device=device, requires_grad=True)
        self.linear = torch.zeros(2, len(budgets), device=device, requires_grad=True)
        self.squared = torch.zeros(len(budgets), device=device, requires_grad=True)

    @property
    def opened(self) -> Tensor:
        """max(z, 0) for every gate z, with the gradient of z, shape `(units,)`."""
        return self.values + (self.values.relu() - self.values).detach()

    def factors(self) -> dict[str, Tensor]:
        """What multiplies the input of every consumer, by module, shape `(n,)`; the gradient is that of the gates."""
        return {
            axis.module: gate.repeat_interleave(axis.per_unit)
            for space, gate in zip(self.spaces, self.opened.split(self.sizes), strict=True)
            for axis in space.consumers
        }

    def retention(self, done: float) -> Tensor:
        """How far each unit counts as kept, from 0 to 1, shape `(units,)`.

        With μ falling from `SOFT` to `SHARP` as the root of the share of the steps, it is 1.2 σ(2.4 (z - μ) / μ) - 0.1
        between 0 and 1, and its gradient goes on beyond.
        """
        half = SOFT - (SOFT - SHARP) * sqrt(done)
        soft = 1.2 * torch.sigmoid((self.opened - half) * 2.4 / half) - 0.1
        return soft + (soft.clamp(0, 1) - soft).detach()

    def penalty(self, done: float) -> Tensor:
        """λ₁ v + λ₂ v² + λ₃ mean(s (1 - s)), in the mean over all budgets.

        s is the retention and v = mean(s) - kept the violation of a budget. Means count units by their parameters.
        """
        kept = 1 - (1 - self.kept) * min(done / RAMP, 1)
        found = self.retention(done)
        violation = self._means(found) - kept
        undecided = self._means(found * (1 - found))
        terms = self.linear[0] * violation + self.squared * violation.square() + self.linear[1] * undecided
        return (terms * self.totals).sum() / self.totals.sum()

    @torch.no_grad()
    def clamp_(self) -> None:
        """Bring the gates back to their range."""
        self.values.clamp_(LEAST, MOST)

    def by_space(self) -> dict[tuple[int, str], Tensor]:
        """The gates of every space, by layer and name, shape `(units,)`, fp64, on the CPU."""
        values = self.values.detach().double().cpu().split(self.sizes)
        return {(space.layer, space.name): gate for space, gate in zip(self.spaces, values, strict=True)}

    def _means(self, values: Tensor) -> Tensor:
        sums = torch.zeros_like(self.kept).index_add(0, self.owner, values * self.price)
        return sums / self.totals


def _optimizer(gates: Gates) -> torch.optim.Optimizer:
    """AdamW without decay; `scale` is the learning rate of a group as a multiple of that of the gates."""
    groups = [
        {"params": [gates.values], "scale": 1.0},
        {"params": [gates.linear], "scale": 1.0, "maximize": True},
        {"params": [gates.squared], "scale": SQUARED_RATE, "maximize": True},
    ]
    return torch.optim.AdamW(groups, weight_decay=0.0)


def _rate(step: int, steps: int) -> float:
    """The learning rate as a share of the largest: it rises linearly, and falls as a half cosine to 0."""
    return min(1.0, (step + 1) / max(WARM_UP * steps, 1)) * (1 + cos(pi * step / steps)) / 2


def _descend(model: PreTrainedModel, gates: Gates, data: CalibrationData, step: int) -> None:
    """Give the gates the gradient of KL(dense‖gated), in the mean over the predicted tokens of a step."""
    tokens = 0
    for ids in _batches(data, step):
        with torch.no_grad():
            theirs = run_model(model, ids).logits[:, :-1]
        with torch.enable_grad(), multiplying(model, gates.factors()):
            mine = run_model(model, ids).logits[:, :-1]
        tokens += ids[:, 1:].numel()
        _backward(mine.flatten(0, 1), theirs.flatten(0, 1), step)
    count = gates.values.new_tensor(float(tokens))
    slope = torch.zeros_like(gates.values) if gates.values.grad is None else gates.values.grad
    all_reduce_([slope, count])
    gates.values.grad = slope / count.clamp(min=1)


def _backward(mine: Tensor, theirs: Tensor, step: int) -> None:
    """Send the gradient of the sum of KL(theirs‖mine) back through the model, a few tokens' logits at a time."""
    slopes = []
    for part, target in zip(mine.detach().split(TOKENS_AT_ONCE), theirs.split(TOKENS_AT_ONCE), strict=True):
        loss = divergence(part.requires_grad_(), target) * len(part)
        if not isfinite(float(loss.detach())):
            raise StructPruneError(
                f"The divergence from the dense model is {float(loss.detach()):g} in step {step + 1} of the gates; "
                "load the model in float32 or bfloat16, or lower learning_rate in STRUCTPRUNE_GATES."
            )
        slopes += torch.autograd.grad(loss, part)
    mine.backward(torch.cat(slopes))


def _batches(data: CalibrationData, step: int) -> Iterator[Tensor]:
    """The samples of a step that this process runs."""
    config, domains = data.config, data.domains
    rows = [(domain, row) for domain, one in enumerate(domains) for row in range(len(one.samples))]
    chosen = shard(_order(len(rows), step, SETTINGS.samples_per_step(domains[0].samples.shape[1]), config.seed))
    by_length: dict[int, list[Tensor]] = {}
    for domain, row in (rows[index] for index in chosen):
        by_length.setdefault(len(ids := domains[domain].samples[row]), []).append(ids)
    for samples in by_length.values():
        for start in range(0, len(samples), data.options.batch_size):
            yield torch.stack(samples[start : start + data.options.batch_size])


def _order(count: int, step: int, per_step: int, seed: int) -> list[int]:
    """The samples of a step: each comes once before any comes again, in an order that every epoch draws anew."""
    orders: dict[int, list[int]] = {}
    places = [divmod(number, count) for number in range(step * per_step, (step + 1) * per_step)]
    for epoch in {epoch for epoch, _ in places}:
        generator = torch.Generator().manual_seed(seed + epoch)
        orders[epoch] = torch.randperm(count, generator=generator).tolist()
    return [orders[epoch][place] for epoch, place in places]


@contextmanager
def multiplying(model: nn.Module, factors: Mapping[str, Tensor]) -> Iterator[None]:
    """Multiply the input of modules inside `with`. `factors` has the shape `(n,)`."""
    with ExitStack() as stack:
        for name, factor in factors.items():

            def hook(module: nn.Module, args: tuple[Any, ...], factor: Tensor = factor) -> tuple[Any, ...]:
                return (args[0] * factor.to(args[0]), *args[1:])

            stack.callback(model.get_submodule(name).register_forward_pre_hook(hook).remove)
        yield


def gates_by_module(model: PreTrainedModel, arch: ArchSpec, data: CalibrationData) -> dict[str, Tensor]:
    """The gate of every column of the consumers, by module, the same for all domains, shape `(domains, n)`."""
    gates, domains = gates_of(model, arch, data), len(data.domains)
    return {
        axis.module: gates[space.layer, space.name].repeat_interleave(axis.per_unit).expand(domains, -1)
        for space in arch.spaces
        if (space.layer, space.name) in gates
        for axis in space.consumers
    }


def _check(config: StructPruneConfig, arch: ArchSpec, use: str) -> None:
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
    """Multiply the kept columns by their gates; see `optimum_structprune.method.refit.least_squares`."""
    assert moments.prior is not None, "refit='folded' goes with criterion='ddp'"
    return (weight * moments.prior.to(weight).clamp(min=0))[:, keep], bias


@register_criterion(DDP, whole_model_statistics=gates_by_module, check=_check)
def ddp(weight: Tensor, moments: Moments, columns_per_unit: int) -> Tensor:
    """The score of a unit is its gate z, learned as in Deterministic Differentiable Pruning (Huang et al., ICML 2026,
    arXiv 2603.08065).

    A gate also scales: with `refit="folded"` the columns of a kept unit are multiplied by max(z, 0), as that paper's
    code does when it folds gates into weights. Every other refit starts from the dense weights.
    """
    assert moments.prior is not None
    return per_unit(moments.prior.to(weight), columns_per_unit) / columns_per_unit
