"""A Trainer whose loss is the KL from a teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from math import ceil, inf, isnan
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

from ..config.fields import build
from ..config.recovery import LEARNING_RATES, TRAINING, RecoveryConfig
from ..errors import StructPruneError, one_line
from ..forward.metrics import KINDS_DIFFER, evaluating
from ..record.figures import DENSE, PRUNED, RECOVERED, DomainResult, Figure, perplexity_result, unseen_of
from ..record.report import CurvePoint, RecoveryReport
from ..system.disk import is_write_error
from .adapter import LIBRARY_ERRORS
from .samples import Sample, collate, counted_targets, logits_at, tokens_in
from .text import OTHER_TEXT, VALIDATION
from .training_data import ANSWERS, TrainingData


def training_arguments(config: RecoveryConfig, seed: int, on_cpu: bool, scratch: str) -> TrainingArguments:
    """Lays `config.training` over the defaults; without an `output_dir`, checkpoints go to `scratch`."""
    # A short training takes one sample in each step, and is measured at quarters.
    own, short = dict(config.training), config.tokens < 50_000
    if own.get("save_strategy") is False:
        own["save_strategy"] = "no"  # which YAML reads as False
    strategy, steps = own.get("save_strategy", "steps"), own.get("save_steps", 0.25 if short else 0.125)
    settings = {
        **TRAINING,
        **{"learning_rate": LEARNING_RATES[config.train], "per_device_train_batch_size": 1 if short else 4},
        # Measuring takes as long in a short training as in a long one.
        **{"save_strategy": strategy, "save_steps": steps, "save_total_limit": 1},
        # The best checkpoint is given back.
        **{"eval_strategy": strategy, "eval_steps": steps, "load_best_model_at_end": strategy != "no"},
        # All columns are the model's arguments, whatever the signature of an adapter around it says.
        **{"seed": seed, "use_cpu": on_cpu, "remove_unused_columns": False},
        # Nothing is resumed from a scratch folder.
        **({} if "output_dir" in own else {"output_dir": scratch, "save_only_model": True}),
        **own,
    }
    return build(TrainingArguments, settings)


class DistillTrainer(Trainer):
    """Trains what is trainable of a model, and measures its validation loss at each checkpoint."""

    def __init__(self, model: Any, arguments: TrainingArguments, data: TrainingData, callbacks: list[Any]):
        # The Trainer asks for the second of these and does not use it.
        samples: Any = {"train_dataset": data.samples, "eval_dataset": data.samples}
        use_cache = getattr(model.config, "use_cache", None)
        try:
            super().__init__(model=model, args=arguments, callbacks=callbacks, data_collator=collate, **samples)
        except LIBRARY_ERRORS as error:
            raise StructPruneError(f"TrainingArguments: {one_line(error)}") from error
        if use_cache is not None:
            model.config.use_cache = use_cache  # the Trainer turns it off for good; samples do for each call
        # The loss is a mean over as many places in each sample, so the Trainer may average over accumulation steps.
        self.model_accepts_loss_kwargs = False
        self.data, self.teacher = data, data.teacher
        self.stopped = ""

    def train(self, *args: Any, take_back: Callable[[], None] | None = None, **kwargs: Any) -> Any:
        """Train as `Trainer.train` does, at a lower rate where trials, which `take_back` undoes, find that better.

        A StructPruneError says what settings, a checkpoint or the disk end.
        """
        model: Any = self.model
        bare: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        if bare is model:
            # The Trainer loads a checkpoint by the model's own names and passes over all others, and the format that
            # is published has others for the experts of a mixture.
            model.save_pretrained = partial(model.save_pretrained, save_original_format=False)
        try:
            with evaluating(*([self.teacher.model] if self.teacher and self.teacher.model is not None else [])):
                if take_back is not None:
                    self._lower_rate(take_back)
                return super().train(*args, **kwargs)
        except Exception as error:
            resumed = kwargs.get("resume_from_checkpoint")  # a damaged file of it raises errors of many kinds
            if isinstance(error, StructPruneError) or not (resumed or isinstance(error, LIBRARY_ERRORS)):
                raise
            advice = f" If {resumed} is damaged, remove it, and the one before is taken." if resumed else ""
            if is_write_error(error):
                advice += f" If {self.args.output_dir} has no room for checkpoints, make some or set save_strategy=no."
            raise StructPruneError(
                f"Training stopped at step {self.state.global_step}, {type(error).__name__}: {one_line(error)}. The "
                f"model is as it was.{advice}"
            ) from error
        finally:
            vars(model).pop("save_pretrained", None)
            # accelerate leaves a `forward` that computes in mixed precision on the model itself.
            self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
            if self.args.gradient_checkpointing:  # the Trainer leaves it on
                for module in filter(lambda each: hasattr(each, "gradient_checkpointing"), bare.modules()):
                    module.gradient_checkpointing = False
                bare.disable_input_require_grads()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Make the optimizer as `Trainer.create_optimizer` does, but with 0.3 of the rate for rows of tokens."""
        made = self.optimizer is not None
        optimizer = super().create_optimizer(*args, **kwargs)
        model: Any = self.model
        rows = {id(parameter) for name, parameter in model.named_parameters() if "trainable_tokens_delta" in name}
        for group in [] if made else [*optimizer.param_groups]:
            own = [parameter for parameter in group["params"] if id(parameter) in rows]
            if own:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in rows]
                optimizer.add_param_group({**group, "params": own, "lr": 0.3 * group["lr"]})
        return optimizer

    def _lower_rate(self, take_back: Callable[[], None]) -> None:
        """Lower the rate to that of five behind whose first step the loss of four samples is least."""
        # That step of Adam moves every weight by the rate, however small its gradient is. Small weights bear less.
        stride = ceil(0.75 * max(4, self.data.batch_size))  # of texts and of answers
        batches = [collate([sample]) for sample in self.data.samples[: 4 * stride : stride]]
        model: Any = self.model
        groups = self.create_optimizer().param_groups

        def loss_of(batch: Sample) -> Tensor:
            with self.compute_loss_context_manager():  # anew, as autocast keeps the weights that it has cast
                return self.compute_loss(model, batch)

        @torch.no_grad()
        def loss_behind(share: float) -> float:
            for parameter, rate in ((each, group["lr"]) for group in groups for each in group["params"]):
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad.sign(), alpha=share * rate)
            loss = sum(float(loss_of(batch)) for batch in batches)
            take_back()
            return inf if isnan(loss) else loss

        with evaluating(model):
            for batch in batches:
                loss_of(batch).backward()
            best = broadcast_object_list([min((1.0, 0.3, 0.1, 0.03, 0.01), key=loss_behind)])[0]
        model.zero_grad()
        self.args.learning_rate *= best
        for group in groups:
            group["lr"] *= best

    def outcome(self, seconds: float) -> RecoveryReport:
        """Report a training of so many seconds: tokens, steps, and the step that is kept."""
        tokens = round((self.state.epoch or 0) * len(self.data.samples)) * tokens_in(self.data.samples[0])
        steps, rate = self.state.global_step, self.args.learning_rate
        kept = self.state.best_global_step or steps
        report = RecoveryReport(tokens, steps, seconds, kept_step=kept, stopped=self.stopped, learning_rate=rate)
        for entry in self.state.log_history:
            if "eval_loss" in entry:
                report.curve.append(CurvePoint(round(tokens * entry["step"] / max(steps, 1)), entry["eval_loss"]))
        return report

    def compute_loss(self, model: Any, inputs: Sample, return_outputs: bool = False, *args: Any, **kwargs: Any) -> Any:
        """Compute the mean KL from the teacher, or cross-entropy where there is none."""
        logits = logits_at(model, inputs)
        if self.teacher is None:
            loss = cross_entropy(logits.float(), counted_targets(inputs, logits))
        else:
            with torch.no_grad(), self.accelerator.autocast():
                taught = self.teacher.logits(inputs).to(logits.device)
            loss = self.teacher.kl(logits, taught, inputs).mean()
        if model.training:  # else it is that of a rate on trial
            self._check(loss.detach())
        return (loss, logits) if return_outputs else loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure the validation loss."""
        metrics = {"eval_loss": self.data.validation_loss(self.model)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _check(self, loss: Tensor) -> None:
        # Every process has to stop at the same step, or the others wait for it in vain.
        if not self.stopped and not self.accelerator.gather(loss.isfinite()[None]).all():
            self.stopped = (
                f"The loss of step {self.state.global_step + 1} is {float(loss):g}, and training stopped there; lower "
                "training['learning_rate'], or train in float32 or bfloat16."
            )
            self.control.should_training_stop = True


class NothingGainedWarning(UserWarning):
    """A training brought a model no nearer to its teacher, or ended early."""


def enter_measurements(
    report: RecoveryReport, before: Mapping[str, Mapping[str, Tensor]], after: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Enter the measurements of `measure_samples` before and after a training."""
    for name, pruned in before.items():
        recovered = after[name]
        if name in (ANSWERS, VALIDATION):
            result = DomainResult()
        else:
            losses = {DENSE: pruned["teacher"]} if "teacher" in pruned else {}
            losses.update({PRUNED: pruned["loss"], RECOVERED: recovered["loss"]})
            spread = KINDS_DIFFER if name == OTHER_TEXT else 0.0
            result = perplexity_result(losses, int(pruned["tokens"].sum()), spread=spread)
        if "kl" in pruned:
            result.divergence = Figure(pruned=float(pruned["kl"].mean()), recovered=float(recovered["kl"].mean()))

        if name == OTHER_TEXT:
            report.unseen = unseen_of(result, "")
        else:
            report.domains[name] = result
