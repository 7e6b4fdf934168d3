"""Pruning inside `transformers.Trainer`, while the model is fine-tuned."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn, optim
from transformers import TrainerCallback
from transformers.training_args import ParallelMode

from .arch.load import describe
from .arch.spec import ArchSpec, Widths
from .config.pruning import StructPruneConfig
from .domains.load import Domain, load_domains
from .errors import StructPruneError
from .forward.hooks import before_load, intercept
from .pruner import AutoStructPruner
from .pruning.checks import TRAINER, check, check_config
from .surgery.followers import Average, check_state, slice_state_
from .surgery.plan import Plan
from .surgery.resize import resize_
from .widths.budget import widths_of
from .widths.schedule import next_legal, round_widths


if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer, TrainingArguments

# Their state is one number per weight, or one per parameter.
ELEMENTWISE = (optim.Adam, optim.AdamW, optim.SGD, optim.RMSprop, optim.Adagrad, optim.NAdam, optim.RAdam)


class StructPruneCallback(TrainerCallback):
    """Prunes the model that a Trainer trains, at some of its steps, with its optimizer's state.

    Every checkpoint is an ordinary one of the width of its step. Where a run is resumed from one, the model takes the
    checkpoint's widths before its weights are loaded. With `load_best_model_at_end`, only models since the last
    removal compete, because wider ones are nearly always better. After training, `plan` says what was kept.

    Args:
        config: What to remove and how; `schedule` divides it over the steps, and `rounds` is their number unless
            `every` is given.
        start: Step after which the first units go; a number below 1 is a share of all steps.
        end: Step after which the last units go, likewise; None removes everything at `start`.
        every: Steps from one removal to the next.
        calibration: `batches` judges units on the training text seen so far; `domains` on the domains of `config`.
        averages: Averages of the model's weights, such as an EMA in `torch.optim.swa_utils.AveragedModel`, which
            shrink with it. Others may be appended to the attribute while training.
    """

    def __init__(
        self,
        config: StructPruneConfig,
        start: int | float = 0.1,
        end: int | float | None = None,
        every: int | None = None,
        calibration: Literal["batches", "domains"] = "batches",
        averages: Sequence[nn.Module] = (),
    ):
        if calibration not in ("batches", "domains"):
            raise StructPruneError(f"calibration is 'batches' or 'domains', got {calibration!r}.")
        check_config(config, TRAINER)
        self.config = config
        self.start, self.end, self.every = start, end, every
        self.calibration = calibration
        self.averages = list(averages)
        self.plan: Plan | None = None
        self.steps: dict[int, Widths] = {}
        self._dense: tuple[ArchSpec, Widths] | None = None
        self._domains: list[Domain] = []
        self._seen: deque[Tensor] = deque()
        self._loading, self._watching = ExitStack(), ExitStack()

    def on_init_end(self, args, state, control, model: PreTrainedModel | None = None, **kwargs) -> None:
        """Remember the dense widths, and let a checkpoint's widths in.

        Raises:
            StructPruneError: If the model cannot be pruned as the config says.
        """
        if model is None:
            return
        arch = describe(model, self.config.arch_file)
        check(self.config, arch, model, TRAINER)
        self._dense = arch, widths_of(self.config, arch, model)
        self.plan = Plan(arch.model_type, {})
        self._loading.close()
        self._loading.enter_context(
            before_load(model, lambda module, state: resize_(module, describe(module, self.config.arch_file), state))
        )

    def on_train_begin(
        self, args, state, control, model=None, optimizer=None, processing_class=None, **kwargs
    ) -> None:
        """Check what the run is made of, and lay out its steps.

        Raises:
            StructPruneError: If training is sharded, distributed or compiled, the optimizer's state cannot be cut, or
                the steps do not fit into the run.
        """
        _check_run(args, model, _inner(optimizer))
        if self._dense is None:
            self.on_init_end(args, state, control, model)
        self.steps = self._schedule(state.max_steps, model)
        if self.calibration == "domains":
            vocab_size = model.config.get_text_config().vocab_size
            self._domains = load_domains(self.config, processing_class, vocab_size, model=model)
        self._watching.close()
        if self.calibration == "batches" and any(step > state.global_step for step in self.steps):
            self._watching.enter_context(intercept([model], lambda _, args, kwargs: self._take(model, args, kwargs)))

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        """Prune, if this is one of the steps."""
        if state.global_step not in self.steps:
            return
        if self.prune_(model, _inner(optimizer), self.steps[state.global_step]):
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None
            control.should_log = True
        if state.global_step == max(self.steps):
            self._watching.close()

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, model=None, **kwargs) -> None:
        """Put the number of parameters and the widths into what the Trainer logs."""
        arch = describe(model, self.config.arch_file)
        names = () if self._dense is None else self._dense[1]
        values: dict[str, float] = {
            f"structprune/width/{name}": fmean(space.width for space in arch.of(name)) for name in names
        }
        values["structprune/params"] = model.num_parameters()
        for entry in (logs, state.log_history[-1] if state.log_history else None):
            if entry is not None:
                entry.update(values)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Take the hooks off."""
        self._watching.close()
        self._loading.close()
        self._seen.clear()

    def prune_(self, model: PreTrainedModel, optimizer: optim.Optimizer, widths: Widths) -> bool:
        """Bring a model down to widths, and the optimizer's state and the averages with it.

        Args:
            model: The model that is changed; its parameters stay the same objects.
            optimizer: Holds them.
            widths: Number of units to keep, by space, in every layer or by layer.

        Returns:
            Whether anything was removed.
        """
        arch = describe(model, self.config.arch_file)
        smaller = {
            name: width
            for name, width in widths.items()
            if any(space.width_in(widths) < space.width for space in arch.of(name))
        }
        if not smaller:
            return False
        check_state(optimizer)
        averages = [Average(average, model, self.config.arch_file) for average in self.averages]
        pruner = AutoStructPruner.from_config(replace(self.config, rounds=1))
        plan = pruner.prune_to_(model, self._domains or [self._text()], smaller)
        slice_state_(optimizer, model, arch, plan)
        for average in averages:
            average.follow_(model, arch, plan)
        self.plan = plan if self.plan is None else self.plan.then(plan)
        return True

    def _schedule(self, max_steps: int, model: PreTrainedModel) -> dict[int, Widths]:
        assert self._dense is not None
        arch, widths = self._dense
        start, end = (
            round(max_steps * at) if isinstance(at, float) and at < 1 else int(at)
            for at in (self.start, self.start if self.end is None else self.end)
        )
        start = max(start, 1)
        end = max(start, end)
        if end > max_steps:
            raise StructPruneError(f"The last units go after step {end}, but training has {max_steps} steps.")
        count = (end - start) // self.every + 1 if self.every else self.config.rounds
        count = min(count, end - start + 1)
        at = [start + round((end - start) * i / max(count - 1, 1)) for i in range(count)]
        config = replace(self.config, rounds=count)
        stages = [next_legal(model.config, arch, stage) for stage in round_widths(config, arch, widths)]
        return dict(zip(at, stages, strict=True))

    def _take(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if not model.training or ids is None:
            return
        mask = kwargs.get("attention_mask")
        real = ids[mask.bool()] if mask is not None and mask.shape == ids.shape else ids
        self._seen.append(real.detach().flatten().cpu())
        most = self.config.num_samples * self.config.seq_length
        while len(self._seen) > 1 and sum(map(len, self._seen)) - len(self._seen[0]) >= most:
            self._seen.popleft()

    def _text(self) -> Domain:
        """The latest training tokens, packed."""
        length, seen = self.config.seq_length, list(self._seen)
        tokens = torch.cat(seen) if seen else torch.zeros(0, dtype=torch.long)
        samples = tokens[len(tokens) % length :].view(-1, length)[-self.config.num_samples :]
        if not len(samples):
            raise StructPruneError(
                f"Calibration takes at least one sample of seq_length={length} tokens, but training has shown "
                f"{len(tokens)} so far; start later, lower seq_length, or use calibration='domains'."
            )
        return Domain("training", 1.0, samples, samples[:0])


def attach_pruner(
    trainer: Trainer, config: StructPruneConfig, start: int | float = 0.1, **schedule: Any
) -> StructPruneCallback:
    """Make a Trainer prune while it trains: `Trainer(callbacks=[StructPruneCallback(…)])` for one that exists.

    Args:
        trainer: Any Trainer, before `train`.
        config: What to remove and how.
        start: See `StructPruneCallback`.
        schedule: `end`, `every`, `calibration` and `averages`, see `StructPruneCallback`.
    """
    callback = StructPruneCallback(config, start, **schedule)
    callback.on_init_end(trainer.args, trainer.state, trainer.control, cast("PreTrainedModel", trainer.model))
    trainer.callback_handler.callbacks.insert(0, callback)
    return callback


def _inner(optimizer: Any) -> optim.Optimizer:
    """The optimizer itself, inside what accelerate makes of it."""
    return getattr(optimizer, "optimizer", optimizer)


def _check_run(args: TrainingArguments, model: PreTrainedModel, optimizer: optim.Optimizer) -> None:
    reasons = {
        "FSDP": bool(args.fsdp),
        "DeepSpeed": bool(args.deepspeed),
        "torch.compile": args.torch_compile or hasattr(model, "_orig_mod"),
        "training on several devices": args.parallel_mode != ParallelMode.NOT_PARALLEL,
    }
    for what, present in reasons.items():
        if present:
            raise StructPruneError(
                f"{what} fixes the shapes of the parameters, so a model cannot be pruned under it: prune first "
                "(`structprune prune`), then train the pruned model with it."
            )
    if not isinstance(optimizer, ELEMENTWISE):
        names = ", ".join(cls.__name__ for cls in ELEMENTWISE)
        raise StructPruneError(
            f"The state of {type(optimizer).__name__} cannot be cut with its parameters; use optim='adamw_torch', or "
            f"another of {names}."
        )
