"""Prune a model inside `transformers.Trainer` while it is fine-tuned."""

from __future__ import annotations

from collections import deque
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from functools import wraps
from statistics import fmean
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn, optim
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.training_args import ParallelMode

from .arch.hooks import before_load, before_next_call
from .arch.load import ModelInfo, describe
from .arch.meta import check_no_adapter
from .arch.spec import ArchSpec, Widths
from .config.pruning import RunOptions, StructPruneConfig
from .domains.load import load_domains
from .domains.packing import Domain
from .method.plan import Plan
from .method.resize import cut_state_, resize_
from .pruner import StructPruner
from .pruning.request import TRAINER, check_arguments, check_config_kind, check_reads_text, resolve_request
from .system.errors import StructPruneError, warn
from .system.processes import across_processes, broadcast_, broadcast_object, gather_objects
from .system.stages import say
from .widths.schedule import legal_round_widths, removal_steps


# The key of the plan in the state of a Trainer. It must not be the name of the callback, because transformers would
# replace the callback by a new one without its text. transformers warns that it ignores any other key.
PLAN = "plan of structprune, which its callback reads itself"
# The maximum number of tokens, including padding, on the device before they are copied to the CPU together.
MAX_PENDING_TOKENS = 2**20


@dataclass
class RecentText:
    """The latest training tokens, enough for `num_samples` calibration samples of `seq_length` tokens.

    Token ids are copied to the CPU in groups, because the host waits for the device in each copy.
    """

    num_samples: int
    seq_length: int
    _rows: deque[Tensor] = field(default_factory=deque)
    _pending: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Add the token ids of a call of the model, without masked tokens."""
        ids = kwargs.get("input_ids")
        if "input_ids" not in kwargs and args:
            ids = args[0]
        if ids is None:
            return

        mask = kwargs.get("attention_mask")
        if mask is None or mask.shape != ids.shape:
            mask = torch.ones_like(ids)
        self._pending.append((ids.detach().flatten(), mask.detach().flatten()))

        if sum(len(row) for row, _ in self._pending) > MAX_PENDING_TOKENS:
            self._copy_pending()

    def _copy_pending(self) -> None:
        """Copy the pending tokens to the CPU, without masked tokens, and release the oldest tokens."""
        if not self._pending:
            return

        device = self._pending[0][0].device
        ids = torch.cat([row.to(device) for row, _ in self._pending]).cpu()
        masks = torch.cat([mask.to(device).bool() for _, mask in self._pending]).cpu()
        sizes = [len(row) for row, _ in self._pending]
        self._pending.clear()
        for row, mask in zip(ids.split(sizes), masks.split(sizes), strict=True):
            self._rows.append(row[mask])

        max_tokens = self.num_samples * self.seq_length
        total = sum(map(len, self._rows))
        while len(self._rows) > 1 and total - len(self._rows[0]) >= max_tokens:
            total -= len(self._rows.popleft())

    def __len__(self) -> int:
        """Return the number of tokens."""
        self._copy_pending()
        return sum(map(len, self._rows))

    def of_all_processes(self) -> RecentText:
        """Return the text of all processes, call by call, in the order of a run with one process."""
        self._copy_pending()
        by_process = gather_objects(list(self._rows))
        num_calls = min(len(rows) for rows in by_process)

        ordered: deque[Tensor] = deque()
        for call in range(-num_calls, 0):
            ordered.extend(rows[call] for rows in by_process)
        return replace(self, _rows=ordered, _pending=[])

    def domain(self) -> Domain:
        """Return the tokens as one domain without held-out text."""
        self._copy_pending()
        tokens = torch.zeros(0, dtype=torch.long)
        if self._rows:
            tokens = torch.cat(list(self._rows))

        incomplete = len(tokens) % self.seq_length
        samples = tokens[incomplete:].view(-1, self.seq_length)[-self.num_samples :]

        if len(samples) < self.num_samples:
            warn(
                f"Units are scored and refitted on only {len(samples)} samples of {self.seq_length} tokens instead of "
                f"num_samples={self.num_samples}, because training has read no more text so far. Start later, or use "
                "calibration='domains'."
            )
        return Domain("training", 1.0, samples, samples[:0])


class StructPruneCallback(TrainerCallback):
    """A callback that prunes the model of a Trainer, and the state of its optimizer, at some steps of the training.

    A checkpoint is an ordinary checkpoint with the widths of its step. When a run is resumed, the model is resized to
    the widths of the checkpoint before weights are loaded. With `load_best_model_at_end`, only models since the last
    removal compete, because wider models are nearly always better. After training, `plan` has the kept units.

    Use `attach_pruner`, which puts this callback before all other callbacks. A Trainer calls callbacks in order, and
    callbacks of `report_to` come before the callbacks in `callbacks=[…]`, so TensorBoard would miss the widths.
    `attach_pruner` also adapts the DDP or torch.compile wrapper of a Trainer at each removal.

    Args:
        config: The widths to prune to, and the method. `rounds` is the number of removals, unless `every` is set.
            `recovery` has no effect, because the Trainer trains the model.
        start: The step after which the first units are removed. A float from 0.0 to 1.0 is a share of all steps.
        end: The step after which the last units are removed, or a share. None removes all units at `start`. If the
            config has one round, four removals are made.
        every: The number of steps between two removals. No removal comes after `end`.
        calibration: "batches" scores units on the latest training text, "domains" on the domains of `config`.
        options: Runtime options. The default is `RunOptions()`.

    Raises:
        StructPruneError: If a Trainer does not support the config.
    """

    # `attach_teacher` looks for this attribute.
    prunes_model = True

    def __init__(
        self,
        config: StructPruneConfig,
        start: int | float = 0.1,
        end: int | float | None = None,
        every: int | None = None,
        calibration: Literal["batches", "domains"] = "batches",
        options: RunOptions | None = None,
    ):
        check_config_kind(config)
        if calibration not in ("batches", "domains"):
            raise StructPruneError(f"`calibration` must be 'batches' or 'domains', got {calibration!r}.")
        _check_config(config, options)

        self.config = config
        self.options = options
        self.start = start
        self.end = end
        self.every = every
        self.calibration = calibration

        self.plan: Plan | None = None
        self.steps: dict[int, Widths] = {}
        self.text = RecentText(config.num_samples, config.seq_length)
        self._original: tuple[ArchSpec, Widths] | None = None
        self._due: dict[int, Widths] = {}
        self._domains: list[Domain] = []
        self.hooks = ExitStack()
        self.trainer: Trainer | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Record the original widths, and resize the model when a checkpoint with other widths is loaded into it."""
        self.begin(model)
        self.hooks.close()
        self.hooks.enter_context(self.resizing(model))

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Check the run, and schedule its removals. A checkpoint has been loaded by now."""
        self.hooks.close()
        _check_run(args, model, self.trainer)
        arch = describe(model, self.config.arch_file)
        is_restart = state.global_step == 0 and self._original is not None and arch == self._original[0]
        if self._original is None or is_restart:
            self.begin(model)
        _adapt_(self._wrapped(model))  # the same Trainer may have resumed from other widths
        check_reads_text(model)
        if state.global_step and PLAN in state.stateful_callbacks:
            self.plan = self._resumed(state)
        assert self._original is not None and self.plan is not None

        original, widths = self._original
        removals = removal_steps(self.config, self.start, self.end, self.every, state.max_steps)
        round_config = replace(self.config, rounds=len(removals))
        widths_of_rounds = legal_round_widths(round_config, original, model.config, widths)
        self.steps = dict(zip(removals, widths_of_rounds, strict=True))
        self._due = dict(self.steps)
        state.stateful_callbacks[PLAN] = self.plan.to_dict()

        if self.calibration == "domains":
            tokenizer = kwargs["processing_class"]
            check_arguments(model, tokenizer)
            with across_processes():
                self._domains = load_domains(self.config, tokenizer, model)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Record the next batch, if units may be scored on it."""
        if self.calibration == "batches" and self._due:
            self.hooks.callback(before_next_call(self._wrapped(model), self.text.add_call).remove)

    on_substep_end = on_step_begin

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Prune if a removal is due and training has read enough text for one sample."""
        self.hooks.close()

        steps = list(self.steps)
        for step in [step for step in self._due if step <= state.global_step]:
            # Another callback may have pruned since.
            self.plan = Plan.from_dict(state.stateful_callbacks[PLAN])
            with across_processes():
                if not self._domains and not self._has_sample(is_first=step == state.global_step, step=step):
                    return
                say(f"Removal {steps.index(step) + 1} of {len(steps)}, after step {state.global_step}")
                pruned = self.prune_(model, getattr(optimizer, "optimizer", optimizer), self._due.pop(step))
            if pruned:
                _adapt_(self._wrapped(model))
                state.stateful_callbacks[PLAN] = self.plan.to_dict()
                state.best_metric = state.best_model_checkpoint = state.best_global_step = None
                control.should_log = True

    def _has_sample(self, is_first: bool, step: int) -> bool:
        """Return whether training has read a complete sample. If not, warn at the step of a removal."""
        text = self.text.of_all_processes()
        if len(text) >= self.config.seq_length:
            return True

        if is_first:
            warn(
                f"The removal at step {step} is postponed: it needs a sample of seq_length={self.config.seq_length} "
                f"tokens, and training has read {len(text)} so far. Start later, lower seq_length, or use "
                "calibration='domains'."
            )
        return False

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, model: Any = None, **kwargs: Any
    ) -> None:
        """Log the number of parameters and the widths. The metrics that `train` returns do not change."""
        arch = describe(model, self.config.arch_file)
        values = {}
        for name in next(iter(self.steps.values()), {}):
            values[f"structprune/width/{name}"] = fmean(space.width for space in arch.of(name))
        values["structprune/params"] = model.num_parameters()
        state.log_history[-1].update(values)
        if logs is not None and "loss" in logs:
            logs.update(values)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove the hooks, release the text, and warn of removals that were not made."""
        self.hooks.close()
        self.plan = Plan.from_dict(state.stateful_callbacks[PLAN])  # with the removals of other callbacks
        self.text = RecentText(self.config.num_samples, self.config.seq_length)
        if self._due:
            warn(
                f"Training ended after step {state.global_step} without the removals at step "
                f"{', '.join(map(str, self._due))}: the model is wider than asked for."
            )

    def resizing(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """Resize a model to the widths of every state dict that is loaded into it inside `with`."""

        def adapt(module: Any, state: Any) -> None:
            resize_(module, describe(module, self.config.arch_file), state)

        return before_load(model, adapt)

    def begin(self, model: PreTrainedModel) -> None:
        """Record the widths of an original model. Raise `StructPruneError` if the config does not fit it."""
        request = resolve_request(self.config, ModelInfo.of(model, self.config.arch_file), use=TRAINER)
        self._original = request.model_info.arch, request.widths
        self.plan = Plan.of(model, request.model_info.arch)

    def _resumed(self, state: Any) -> Plan:
        """Return the plan of a checkpoint: the kept units of the original model of its run."""
        checkpoint = f"The checkpoint of step {state.global_step}"
        plan = Plan.from_dict(state.stateful_callbacks[PLAN])
        if self.plan is not None and plan.sizes != self.plan.sizes:
            raise StructPruneError(
                f"{checkpoint} is from a run that began with a model of widths {dict(plan.sizes)}, and this model has "
                f"{dict(self.plan.sizes)}. Resume with the model that the run began with, not with the model of a "
                "checkpoint."
            )

        if self.calibration == "batches" and not len(self.text):
            warn(f"{checkpoint} holds no text, so removals are calibrated on the training text after it.")
        return plan

    def prune_(self, model: PreTrainedModel, optimizer: optim.Optimizer, widths: Widths) -> bool:
        """Prune a model and the state of its optimizer in place. Return whether units were removed."""
        arch = describe(model, self.config.arch_file)
        shrinking = {space.kind for space in arch.spaces if space.width_in(widths) < space.width}
        new_widths = {name: width for name, width in widths.items() if name in shrinking}
        if not new_widths:
            return False

        pruner = StructPruner(replace(self.config, rounds=1), self.options)
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        domains = self._domains or [self.text.of_all_processes().domain()]
        plan = broadcast_object(pruner.prune_to_(model, domains, new_widths))
        for tensor in model.state_dict().values():
            # Devices may round differently, and DDP does not compare weights again.
            broadcast_(tensor)

        is_first = self.plan is None or not self.plan.keep
        has_state = cut_state_(optimizer, model, arch, plan, shapes)
        if is_first and not has_state:
            warn(
                f"The state of {type(optimizer).__name__} cannot be pruned, so it is reset for each pruned parameter. "
                "Use optim='adamw_torch' to keep the state of the kept weights."
            )

        if self.plan is not None:
            plan = self.plan.then(plan)
        self.plan = plan
        return True

    def _wrapped(self, model: nn.Module) -> nn.Module:
        """Return the DDP or torch.compile wrapper of the model in the Trainer, or the model without a Trainer."""
        if self.trainer is None:
            return model
        return self.trainer.model_wrapped


def attach_pruner(
    trainer: Trainer, config: StructPruneConfig, start: int | float = 0.1, **schedule: Any
) -> StructPruneCallback:
    """Make a Trainer prune while it trains. The callback is called before all others, so that they log the widths.

    Args:
        trainer: Any Trainer, before `train`.
        config: The widths to prune to, and the method.
        start: The step after which the first units are removed; see `StructPruneCallback`.
        schedule: `end`, `every`, `calibration` and `options`; see `StructPruneCallback`.

    Returns:
        The callback.
    """
    callback = StructPruneCallback(config, start, **schedule)
    callback.trainer = trainer
    callback.begin(cast("PreTrainedModel", trainer.model))
    trainer.callback_handler.callbacks.insert(0, callback)
    train = trainer.train
    model_init = trainer.model_init

    @wraps(train)
    def resizing_train(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            stack.enter_context(callback.hooks)
            stack.enter_context(callback.resizing(cast("PreTrainedModel", trainer.model)))
            if model_init is not None:

                @wraps(model_init)
                def init(*args: Any) -> Any:  # `train` makes a new model before it loads a checkpoint
                    model = model_init(*args)
                    stack.enter_context(callback.resizing(model))
                    return model

                trainer.model_init = init
                stack.callback(setattr, trainer, "model_init", model_init)
            return train(*args, **kwargs)

    trainer.train = resizing_train  # type: ignore[method-assign]
    return callback


def _adapt_(wrapped: nn.Module) -> None:
    """Adapt the torch.compile or DDP wrapper of a model to the new shapes of its parameters."""
    if hasattr(wrapped, "_orig_mod"):
        torch.compiler.reset()  # torch.compile stops compiling after a few shapes
    elif isinstance(wrapped, DistributedDataParallel):
        state = dict(wrapped.__getstate__())
        # A static graph is recorded again. Otherwise, the processes would not exchange their gradients.
        state["_static_graph_delay_allreduce_enqueued"] = False
        # Autograd uses the old shapes as long as the old reducer waits for gradients.
        del wrapped.reducer, wrapped.logger
        wrapped.__setstate__(state)


def _check_run(args: TrainingArguments, model: PreTrainedModel, trainer: Trainer | None) -> None:
    """Raise `StructPruneError` if parameters cannot change their shapes in this run."""
    try:
        check_no_adapter(model)  # an adapter may have been added after the callback
    except StructPruneError as error:
        raise StructPruneError(
            f"{error} Or prune first (`structprune prune`), then train an adapter with `attach_teacher`."
        ) from error

    is_parallel = args.parallel_mode != ParallelMode.NOT_PARALLEL
    is_compiled = hasattr(model, "_orig_mod") or (args.torch_compile and is_parallel)
    wrappers = {
        "FSDP": bool(args.fsdp),
        "DeepSpeed": bool(args.deepspeed),
        "torch.compile before the Trainer, or on several devices,": is_compiled,
    }
    for name, is_active in wrappers.items():
        if is_active:
            raise StructPruneError(
                f"{name} fixes the shapes of the parameters, so a model cannot be pruned under it. Prune first "
                "(`structprune prune`), then train the pruned model with `attach_teacher`, see "
                "docs/recovery_many_gpus.md."
            )

    has_ddp = trainer is None or isinstance(trainer.model_wrapped, DistributedDataParallel)
    if is_parallel and not has_ddp:
        raise StructPruneError(
            "The Trainer uses several devices without DDP, and a model cannot be pruned under `nn.DataParallel`. "
            "Start the script with `torchrun`, or set CUDA_VISIBLE_DEVICES to one device. Under `torchrun`, call "
            "`train` before `evaluate`."
        )

    if trainer is None and (args.torch_compile or is_parallel):
        raise StructPruneError(
            "A callback does not reach the wrapper of torch.compile or DDP around the model. Use "
            "attach_pruner(trainer, config) instead."
        )


def _check_config(config: StructPruneConfig, options: RunOptions | None) -> None:
    """Raise `StructPruneError` if a Trainer does not support a config, independently of the model."""
    if options is not None and options.checkpoint_dir is not None:
        raise _unsupported("checkpoint_dir", "spans the layers of one pruning, and a Trainer prunes at several steps")
    if config.allocation != "uniform":
        raise _unsupported(f"allocation={config.allocation!r}", "measures losses of the original model")
    if config.recovery is not None:
        warn(
            "`recovery` has no effect here, because the Trainer trains the model. Call `attach_teacher` to train "
            "towards the original model."
        )


def _unsupported(name: str, reason: str) -> StructPruneError:
    return StructPruneError(f"{name} {reason}. Remove it, or prune first (`structprune prune`).")
