"""Gates on units, learned so that the predictions of the dense model are kept while a budget of units is met.

This is Deterministic Differentiable Pruning (Huang et al., ICML 2026, arXiv 2603.08065) with choices of ours: the loss
is the divergence from the dense model alone, without the cross-entropy of the text; gates begin at 1, without noise,
and are at most `MOST`; and the budget comes down to what is wanted over the first steps. The loss and the bound keep
gates that are learned on few tokens from learning the kind of text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import cos, isfinite, pi, sqrt
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from ..arch.spec import ArchSpec, Space
from ..calibration.gradients import frozen
from ..config.pruning import LEARNED, StructPruneConfig
from ..criteria import CRITERIA
from ..errors import StructPruneError
from ..forward.divergence import divergence
from ..forward.hooks import multiplying
from ..forward.metrics import TOKENS_AT_ONCE, evaluating, run_model
from ..record.report import Report
from ..system.offloading import compute_device
from ..system.processes import add_up_, own_part
from ..system.resume import Resume
from ..widths.budget import widths_of
from .evidence import Evidence
from .rounds import run_key


# The range of a gate; below 0 a unit is closed, and a gradient may open it again.
LEAST, MOST = -0.1, 2.0
# The gate at which a unit counts as half kept falls from the first number to the second.
SOFT, SHARP = 0.5, 0.1
# The share of the steps in which learning rates rise, and in which the budget comes down to what is wanted.
WARM_UP, RAMP = 0.1, 0.25
# The learning rate of the multiplier of a squared violation, as a multiple of that of the gates.
SQUARED_RATE = 20.0
# How many times a training is put on disk.
SAVES = 10


@dataclass(frozen=True)
class Budget:
    """A part of the model that keeps a share of its units, however they lie in it.

    Attributes:
        spaces: The spaces.
        kept: The share that is kept, of the parameters that go with all units.
    """

    spaces: tuple[Space, ...]
    kept: float


def learns(config: StructPruneConfig) -> bool:
    """Whether a config chooses widths or units by gates that are learned."""
    name = config.scored_by
    return config.allocation == LEARNED or (name in CRITERIA.names() and CRITERIA.get(name).learned)


def with_gates(evidence: Evidence, arch: ArchSpec, model: PreTrainedModel, report: Report) -> Evidence:
    """The evidence with the gates of the dense model, where its config chooses anything by gates."""
    config = evidence.config
    if not learns(config):
        return evidence
    folder = None
    if config.checkpoint_dir is not None:
        key = run_key(config, model, evidence.entries(), widths_of(config, arch, model))
        folder = Resume(Path(config.checkpoint_dir), key, "step-of-gates")
    with report.timed("gates"), evaluating(model), frozen(model):
        gates = learned_gates(model, evidence, budgets_of(config, arch, model), folder)
    return replace(evidence, gates=gates)


def budgets_of(config: StructPruneConfig, arch: ArchSpec, model: PreTrainedModel) -> list[Budget]:
    """What keeps which share: each space by itself where its width is known, all layers together elsewhere."""
    widths = widths_of(config, arch, model)
    spaces = [space for space in arch.spaces if space.kind in widths and space.layer not in config.skip_layers]
    if config.allocation != LEARNED:
        shares = [(space, space.width_in(widths) / space.width) for space in spaces]
        return [Budget((space,), kept) for space, kept in shares if kept < 1]
    together = [(name,) for name in widths] if config.widths is not None else [tuple(widths)]
    return [_together([space for space in spaces if space.kind in names], widths) for names in together]


def _together(spaces: Sequence[Space], widths: Mapping) -> Budget:
    left = sum(space.unit_params * space.width_in(widths) * space.scale for space in spaces)
    return Budget(tuple(spaces), left / sum(space.unit_params * space.size for space in spaces))


def learned_gates(
    model: PreTrainedModel, evidence: Evidence, budgets: Sequence[Budget], folder: Resume | None = None
) -> dict[tuple[int, str], Tensor]:
    """The gate of every unit after training: the lower, the sooner a unit goes.

    A gate z multiplies what the consumers read of a unit by max(z, 0), with the gradient of z. Each step takes some
    samples, in an order that follows from the seed, and adds to KL(dense‖gated) per predicted token the terms of an
    augmented Lagrangian (see `Gates.penalty`), whose multipliers ascend.

    Returns:
        By layer and name of the space, shape `(units,)`, fp64, on the CPU; from `LEAST` to `MOST`.
    """
    settings, gates = evidence.config.gates, Gates(budgets, compute_device(model))
    optimizer = _optimizer(gates)
    begin = 0 if folder is None else _resume(folder, gates, optimizer)
    every = -(-settings.steps // SAVES)
    for step in tqdm(range(begin, settings.steps), desc="learning gates", unit="step", initial=begin):
        optimizer.zero_grad()
        _descend(model, gates, evidence, step)
        gates.penalty((step + 1) / settings.steps).backward()
        for group in optimizer.param_groups:
            group["lr"] = group["scale"] * settings.learning_rate * _rate(step, settings.steps)
        optimizer.step()
        gates.clamp_()
        if folder is not None and ((step + 1) % every == 0 or step + 1 == settings.steps):
            folder.save(step + 1, {}, _tensors(gates, optimizer))
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
            for axis in space.into
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


def _descend(model: PreTrainedModel, gates: Gates, evidence: Evidence, step: int) -> None:
    """Give the gates the gradient of KL(dense‖gated), in the mean over the predicted tokens of a step."""
    tokens = 0
    for ids, mask in _batches(evidence, step):
        with torch.no_grad():
            theirs = run_model(model, ids).logits[:, :-1]
        with torch.enable_grad(), multiplying(model, gates.factors()):
            mine = run_model(model, ids).logits[:, :-1]
        predicted = mask[:, 1:].to(mine.device)
        tokens += int(predicted.sum())
        if predicted.any():
            _backward(mine[predicted], theirs[predicted], step)
    count = gates.values.new_tensor(float(tokens))
    slope = torch.zeros_like(gates.values) if gates.values.grad is None else gates.values.grad
    add_up_([slope, count])
    gates.values.grad = slope / count.clamp(min=1)


def _backward(mine: Tensor, theirs: Tensor, step: int) -> None:
    """Send the gradient of the sum of KL(theirs‖mine) back through the model, a few tokens' logits at a time."""
    slopes = []
    for part, target in zip(mine.detach().split(TOKENS_AT_ONCE), theirs.split(TOKENS_AT_ONCE), strict=True):
        loss = divergence(part.requires_grad_(), target) * len(part)
        if not isfinite(float(loss.detach())):
            raise StructPruneError(
                f"The divergence from the dense model is {float(loss.detach()):g} in step {step + 1} of the gates; "
                "load the model in float32 or bfloat16, or lower learning_rate in gates."
            )
        slopes += torch.autograd.grad(loss, part)
    mine.backward(torch.cat(slopes))


def _batches(evidence: Evidence, step: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The samples of a step that this process runs, each with one value per token, true where it is calibrated on."""
    config, domains = evidence.config, evidence.domains
    rows = [(domain, row) for domain, one in enumerate(domains) for row in range(len(one.samples))]
    chosen = own_part(_order(len(rows), step, config.gates.samples_per_step(domains[0].samples.shape[1]), config.seed))
    by_length: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for domain, row in (rows[index] for index in chosen):
        ids, mask = domains[domain].samples[row], domains[domain].mask
        one = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask[row]
        by_length.setdefault(len(ids), []).append((ids, one))
    for pairs in by_length.values():
        for start in range(0, len(pairs), config.samples_at_once):
            ids, masks = zip(*pairs[start : start + config.samples_at_once], strict=True)
            yield torch.stack(ids), torch.stack(masks)


def _order(count: int, step: int, per_step: int, seed: int) -> list[int]:
    """The samples of a step: each comes once before any comes again, in an order that every epoch draws anew."""
    orders: dict[int, list[int]] = {}
    places = [divmod(number, count) for number in range(step * per_step, (step + 1) * per_step)]
    for epoch in {epoch for epoch, _ in places}:
        generator = torch.Generator().manual_seed(seed + epoch)
        orders[epoch] = torch.randperm(count, generator=generator).tolist()
    return [orders[epoch][place] for epoch, place in places]


def _tensors(gates: Gates, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Gates, multipliers and what the optimizer knows of each, by name."""
    named = {"values": gates.values, "linear": gates.linear, "squared": gates.squared}
    found = {name: parameter.detach() for name, parameter in named.items()}
    for name, parameter in named.items():
        found |= {f"{name}.{field}": tensor for field, tensor in optimizer.state[parameter].items()}
    return {name: tensor.cpu().contiguous() for name, tensor in found.items()}


def _resume(folder: Resume, gates: Gates, optimizer: torch.optim.Optimizer) -> int:
    """Take over what was saved last, and return the number of its steps; 0 where nothing was."""
    saved = folder.load()
    if saved is None:
        return 0
    with folder.readable():
        _take(saved.tensors, gates, optimizer)
    return saved.number


@torch.no_grad()
def _take(tensors: Mapping[str, Tensor], gates: Gates, optimizer: torch.optim.Optimizer) -> None:
    """Inverse of `_tensors`."""
    for name in ("values", "linear", "squared"):
        parameter = getattr(gates, name)
        if tensors[name].shape != parameter.shape:
            raise ValueError(f"{name} has the shape {tuple(tensors[name].shape)}, not {tuple(parameter.shape)}")
        parameter.copy_(tensors[name])
        fields = {full.removeprefix(f"{name}."): one for full, one in tensors.items() if full.startswith(f"{name}.")}
        # The number of steps is kept on the CPU, as torch does.
        optimizer.state[parameter] = {
            field: one.clone() if field == "step" else one.to(parameter.device, copy=True)
            for field, one in fields.items()
        }
