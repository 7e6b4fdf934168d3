"""Resolve a config for a model: the widths and tokens that are asked of it, computed once and from shapes alone.

A request that cannot be met is refused here, before any text is read or any weight is touched. A config that
contradicts itself, whatever the model, is refused when it is made: see `config.pruning`. Optional parts refuse
themselves what they cannot do: see `sources.offloaded`, `recovery.recover` and `trainer`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.load import ModelInfo
from ..arch.meta import check_changeable, check_positions, is_offloaded, reads_images, reads_text, shrunk_skeleton
from ..arch.shrink import layers_ahead
from ..arch.spec import EXPERT, HIDDEN, LAYER, MODEL, VOCAB, Widths
from ..config.pruning import LOSS, RunOptions, StructPruneConfig
from ..criteria import CRITERIA, DEFAULT_CRITERIA
from ..domains.manifest import check_kinds, check_tokens
from ..errors import StructPruneError, one_line, warn
from ..forward.metrics import outputs_for, random_inputs
from ..widths.allocation import widths_of
from ..widths.budget import UnreachableBudgetError


if TYPE_CHECKING:
    from ..vocabulary.choose import VocabularyRequest


# What the model is to be used for: pruned, only looked at, or pruned by a Trainer.
PRUNE = "prune"
DRY_RUN = "dry run"
TRAINER = "trainer"
# The budget of a request while prunings on trial have not found the size for a loss.
SIZE_TO_BE_FOUND = {"parameters": 0.999}


@dataclass(frozen=True)
class PruningRequest:
    """What is asked of a model, from a config and the shapes of the model.

    Attributes:
        config: The resolved config, which also names spaces that the user's config leaves open.
        model_info: The facts about the model.
        use: What the model is used for: `PRUNE`, `DRY_RUN` or `TRAINER`.
        tokenizer: The tokenizer of the model.
        inputs: Calibration inputs by domain instead of text.
        options: Runtime options.
    """

    config: StructPruneConfig
    model_info: ModelInfo
    use: str = PRUNE
    tokenizer: PreTrainedTokenizerBase | None = None
    inputs: Mapping[str, Tensor] | None = None
    options: RunOptions = field(default_factory=RunOptions)

    @cached_property
    def widths(self) -> Widths:
        """The final widths. If calibration chooses them, these are other widths of the same total."""
        config, arch, model = self.config, self.model_info.arch, self.model_info.plain_model
        if config.removes_tokens:
            from ..vocabulary.amount import widths_with_tokens  # most runs remove no tokens

            return widths_with_tokens(config, arch, model)
        return widths_of(config, arch, model)

    @cached_property
    def tokens(self) -> VocabularyRequest | None:
        """The tokens that may be removed, or None if all are kept or there is no tokenizer."""
        if VOCAB not in self.widths or self.tokenizer is None:
            return None
        from ..vocabulary.choose import VocabularyRequest

        return VocabularyRequest.of(self.config, self.model_info, self.tokenizer, self.widths)

    @cached_property
    def smaller(self) -> PreTrainedModel:
        """The model with the final widths, without weights."""
        model, arch = self.model_info.plain_model, self.model_info.arch
        return shrunk_skeleton(model, arch, self.widths)

    def check(self) -> None:
        """Raise if the request cannot be met, before any text is read. Warn of options without effect."""
        config, info, widths = self.config, self.model_info, self.widths
        if self.use != DRY_RUN:
            self._check_model()
        if info.offloaded:
            from ..sources.offloaded import check_offloaded

            check_offloaded(config, info, widths)
        self._check_spaces()
        if self.use == PRUNE and self.options.checkpoint_dir is not None:
            _check_folder(self.options.checkpoint_dir, config.rounds)
        if self.use == PRUNE and config.recovery is not None:
            from ..recovery.recover import check_recovery  # training libraries take seconds to import

            check_recovery(config.recovery, config, info.plain_model)

        unused = list(without_effect(config, widths))
        if unused and self.use != TRAINER:
            warn(f"These options have no effect here: {'; '.join(unused)}.")
        ahead = layers_ahead(info.plain_model.config.get_text_config())
        if ahead:
            warn(
                f"transformers does not load the layers that predict tokens farther ahead ({', '.join(ahead)}), so "
                "the result has none, and its config says 0."
            )
        # Last, because it runs the model on a few tokens.
        if is_offloaded(info.plain_model):
            from ..sources.offloaded import check_sequential

            check_sequential(info.plain_model, info.arch)

    def _check_model(self) -> None:
        """Raise if the use does not fit the weights, the text cannot be read, or the model needs more than tokens."""
        info, model, use = self.model_info, self.model_info.plain_model, self.use
        if use == TRAINER and info.quantized:
            raise StructPruneError(f"{info.name} is quantized; prune `model.dequantize()`, or load it unquantized.")
        if use == TRAINER and info.offloaded:
            raise StructPruneError(f"{info.name} is offloaded, and a Trainer trains weights in memory; load it there.")
        if self.inputs is not None and VOCAB in self.widths:
            raise StructPruneError(
                f"{VOCAB!r} numbers the tokens anew, and inputs holds ids as they were; name the text in domains."
            )
        if self.inputs is None:
            check_positions(model, self.config.seq_length, f"seq_length={self.config.seq_length}")
            # Where only tokens are removed, text is counted and does not run through the model.
            if use == PRUNE and list(self.widths) != [VOCAB]:
                check_reads_text(model)
            if use == PRUNE and self.tokenizer is None:
                raise StructPruneError("The domains are text; reading them takes a tokenizer: pass the model's own.")
        if use == PRUNE and not (info.quantized or info.offloaded or model.device.type == "meta"):
            try:
                outputs_for(model)
            except Exception as error:  # every model class raises its own errors
                raise StructPruneError(
                    f"{info.name} cannot run on a few tokens or an image alone, as it does before it is saved "
                    f"({one_line(error)}); if its head asks for more, prune the base model, and give the head the "
                    "result."
                ) from error

    def _check_spaces(self) -> None:
        """Raise if the criterion, the refit or the allocation does not fit the spaces or the type of the model."""
        config, arch, widths = self.config, self.model_info.arch, self.widths
        criterion = CRITERIA.get(config.scored_by)
        if criterion.check is not None:
            criterion.check(config, arch, self.use)
        others = [name for name in widths if name not in (criterion.judges, VOCAB)]
        if criterion.judges in DEFAULT_CRITERIA and others:
            whole, score = criterion.judges, DEFAULT_CRITERIA[criterion.judges]
            raise StructPruneError(
                f"criterion={config.criterion!r} judges whole {whole}s, and nothing else; prune {whole!r} in a run of "
                f"its own, or choose a criterion for {others[0]!r}: {whole!r} is judged by {score!r} then."
            )
        of_model = [space.name for space in arch.model_spaces if space.name in widths]
        if self.use == TRAINER and of_model:
            raise StructPruneError(
                f"{of_model[0]!r} belongs to the whole model, and a Trainer prunes inside the layers only; prune it "
                "first (`structprune prune`), then train."
            )
        if HIDDEN in widths and config.refit not in ("none", "least_squares"):
            raise StructPruneError(
                f"refit={config.refit!r} is for consumers inside the layers, and {HIDDEN!r} is read all over the "
                "model; use refit='least_squares' or 'none'."
            )
        if config.allocation == "uniform":
            return
        if not arch.causal:
            raise StructPruneError(
                f"allocation={config.allocation!r} measures how far the predictions of the next token move, and a "
                f"model of type {arch.model_type!r} makes none; use allocation='uniform'."
            )
        for name in [name for name in widths if name != VOCAB] or widths:
            if not arch.of(name)[0].inside or arch.of(name)[0].layer == MODEL:
                raise StructPruneError(
                    f"allocation={config.allocation!r} chooses widths inside the layers, and {name!r} is none of "
                    "them; leave it out of targets and widths."
                )


def resolve_request(
    config: StructPruneConfig,
    model_info: ModelInfo,
    tokenizer: PreTrainedTokenizerBase | None = None,
    inputs: Mapping[str, Tensor] | None = None,
    use: str = PRUNE,
    options: RunOptions | None = None,
) -> PruningRequest:
    """Return what is asked of a model. Its config is the one to use from here on.

    Args:
        config: The user's config.
        model_info: The facts about the model.
        tokenizer: Its tokenizer, which reads the calibration text.
        inputs: Calibration inputs by domain instead of text.
        use: What the model is used for: `PRUNE`, `DRY_RUN` or `TRAINER`.
        options: Runtime options.

    Raises:
        StructPruneError: If the request cannot be met; see `PruningRequest.check`.
    """
    loss = (config.budget or {}).get(LOSS)
    if loss is not None:
        _check_loss_budget(model_info, inputs, use)
        config = replace(config, budget=SIZE_TO_BE_FOUND)

    has_text = inputs is None and (use == DRY_RUN or tokenizer is not None)
    if config.may_remove_tokens and has_text:
        from ..vocabulary.amount import with_tokens  # most runs remove no tokens

        config = with_tokens(config, model_info, tokenizer)

    request = PruningRequest(config, model_info, use, tokenizer, inputs, options or RunOptions())
    try:
        request.check()
        if use != TRAINER:
            # Computed now, because it raises if the number of tokens is not possible.
            _ = request.tokens
    except UnreachableBudgetError as error:
        if loss is None:
            raise
        targets = list(config.targets_or_default)
        raise StructPruneError(
            f"budget {LOSS}={loss} finds nothing to remove: no smaller widths of targets={targets} remove a "
            f"thousandth of the parameters; {error.advice or 'prune another model'}."
        ) from error
    return request


def _check_loss_budget(model_info: ModelInfo, inputs: Mapping[str, Tensor] | None, use: str) -> None:
    """Raise if no prunings on trial can find the size of a model with a certain loss."""
    if use != PRUNE:
        reason = f"a {use} has none"
    elif inputs is not None:
        reason = "they are judged on text, which inputs are not"
    elif not model_info.arch.causal and not reads_text(model_info.plain_model):
        reason = "they are judged on text, which this model does not read alone"
    else:
        return
    raise StructPruneError(
        f"budget {LOSS} is met by prunings on trial, and {reason}; give a size, such as parameters=0.9."
    )


def check_config_kind(config: Any, options: Any = None) -> None:
    """Refuse objects that are no config and no options, such as a mapping or a tokenizer."""
    for name, value, kind in (("config", config, StructPruneConfig), ("options", options or RunOptions(), RunOptions)):
        if not isinstance(value, kind):
            advice = f"a mapping becomes one with {kind.__name__}.from_dict"
            raise StructPruneError(f"{name} takes a {kind.__name__}, got {type(value).__name__}; {advice}.")
        value.validate()  # a field may have been set since


def check_arguments(model: Any, tokenizer: Any, inputs: Any = None, inplace: bool = False) -> None:
    """Refuse a model, a tokenizer or inputs of another kind than a pruning takes."""
    check_kinds(model, tokenizer)
    if inputs is not None and not (isinstance(inputs, Mapping) and len(inputs) > 0):
        raise StructPruneError(
            f"inputs takes a mapping of names to tensors, got {type(inputs).__name__}; pass one or more, such as "
            "{'text': ids}."
        )
    if "_original_forward" in vars(model):
        raise StructPruneError(
            "model computes in mixed precision, as accelerate prepared it, and what is saved would not; pass "
            "`accelerator.unwrap_model(model, keep_fp32_wrapper=False)`, of a Trainer `trainer.accelerator`."
        )
    check_tokens(model, tokenizer)
    if inplace:
        check_changeable(model)
    for name, samples in (inputs or {}).items():
        _check_samples(name, samples, model)


def check_reads_text(model: PreTrainedModel) -> None:
    """Refuse a model that the text of domains cannot calibrate."""
    if not reads_text(model):
        raise StructPruneError(
            f"{type(model).__name__} reads {model.main_input_name}, and domains are text; prune it from Python with "
            "samples of what it reads: StructPruner(config).prune_model(model, inputs={'name': samples})."
        )


def _check_samples(name: Any, samples: Any, model: Any) -> None:
    """Raise if the inputs of a domain are not what the model reads."""
    if not isinstance(name, str):
        raise StructPruneError(f"inputs takes names of domains as text, got {name!r}; write {str(name)!r}.")
    if not isinstance(samples, Tensor):
        raise StructPruneError(f"inputs[{name!r}] takes a tensor, got {type(samples).__name__}.")
    if samples.layout != torch.strided or samples.is_meta:
        kind = "on the meta device" if samples.is_meta else f"of layout {samples.layout}"
        raise StructPruneError(f"inputs[{name!r}] is {kind}; pass a dense tensor with values.")
    if reads_images(model):
        expected = tuple(random_inputs(model).shape[1:])
        if samples.shape[1:] != expected or not samples.is_floating_point():
            raise StructPruneError(
                f"inputs[{name!r}] holds images of shape {tuple(samples.shape[1:])} as {samples.dtype}; pass what the "
                f"model's image processor gives, {expected} in floating point."
            )
        return
    if samples.dim() != 2 or samples.dtype != torch.int64 or samples.shape[1] < 2:
        raise StructPruneError(
            f"inputs[{name!r}] holds {samples.dtype} of the shape {tuple(samples.shape)}; pass (samples, tokens), the "
            "ids as int64, and 2 tokens or more in each sample."
        )
    check_positions(model, samples.shape[1], f"A sample of inputs[{name!r}], {samples.shape[1]} tokens,")
    vocab_size = model.config.get_text_config().vocab_size
    smallest = int(samples.min()) if len(samples) else 0
    largest = int(samples.max()) if len(samples) else 0
    if smallest < 0 or largest >= vocab_size:
        raise StructPruneError(
            f"inputs[{name!r}] holds token ids from {smallest} to {largest}, and those of this model lie between 0 "
            f"and {vocab_size - 1}."
        )


def _check_folder(folder: str, rounds: int) -> None:
    """Refuse a folder for checkpoints that holds a model or cannot be written, and several rounds."""
    from ..system.disk import check_folder

    check_folder(folder)
    if Path(folder, "config.json").is_file():
        raise StructPruneError(
            f"{folder} holds a model; what a run remembers takes a folder of its own: name another."
        )
    if rounds > 1:
        raise StructPruneError(
            f"checkpoint_dir={folder!r} remembers layers that are finished, and with rounds={rounds} none is "
            "before the last round; set rounds=1, or leave checkpoint_dir (--resume) out."
        )


def without_effect(config: StructPruneConfig, names: Collection[str]) -> Iterator[str]:
    """Yield the options that are set and have no effect with the others, each with the reason."""
    reasons = {}
    if config.widths is not None:
        reasons["targets"] = "widths names the spaces"
        if config.allocation == "uniform":
            reasons["round_to"] = "widths are taken as they are"
    if VOCAB not in names:
        reasons["keep_tokens"] = f"no tokens go; name {VOCAB!r} in targets or widths"
    if set(names) <= {LAYER, EXPERT, HIDDEN}:
        reasons["languages"] = "neither tokens go nor units inside the layers"
    if config.refit != "least_squares":
        reasons["error_feedback"] = f"refit={config.refit!r} makes up for no error"

    defaults = {field.name: field.default for field in fields(config)}
    for name, reason in reasons.items():
        value = getattr(config, name)
        if value != defaults[name]:
            yield f"{name}={value!r}, because {reason}"
