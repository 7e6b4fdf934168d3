"""Requests: the widths and tokens that a config asks of a model, computed once and from shapes alone.

A request that cannot be met is refused here, before any text is read or any weight is touched.

A config that contradicts itself, whatever the model, is refused when it is made: see `config.pruning`. What an
optional room cannot do, it refuses itself: see `sources.offloaded`, `recovery.recover` and `trainer`.
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


if TYPE_CHECKING:
    from ..vocabulary.choose import VocabularyRequest


# What the model is to be used for: pruned, only looked at, or pruned by a Trainer.
PRUNE, DRY_RUN, TRAINER = "prune", "dry run", "trainer"


@dataclass(frozen=True)
class Request:
    """Says what is to go from a model, by its config and its shapes; each answer is computed once."""

    config: StructPruneConfig  # with the spaces that the model takes
    model_info: ModelInfo
    use: str = PRUNE
    tokenizer: PreTrainedTokenizerBase | None = None
    inputs: Mapping[str, Tensor] | None = None  # for calibration, by domain, in place of text
    options: RunOptions = field(default_factory=RunOptions)

    @cached_property
    def widths(self) -> Widths:
        """The final widths; where calibration will choose them, others of the same total stand for them."""
        config, arch, model = self.config, self.model_info.arch, self.model_info.plain_model
        if config.removes_tokens:
            from ..vocabulary.amount import widths_with_tokens  # which most runs do without

            return widths_with_tokens(config, arch, model)
        return widths_of(config, arch, model)

    @cached_property
    def tokens(self) -> VocabularyRequest | None:
        """The tokens that may go; None if all stay, or without a tokenizer."""
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
        """Refuse what cannot be met, before text is read; options without effect are warned of."""
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
        if self.use != TRAINER and (unused := [*without_effect(config, widths)]):
            warn(f"These options have no effect here: {'; '.join(unused)}.")
        if ahead := layers_ahead(info.plain_model.config.get_text_config()):
            warn(
                f"transformers does not load the layers that predict tokens farther ahead ({', '.join(ahead)}), so "
                "the result has none, and its config says 0."
            )
        if is_offloaded(info.plain_model):  # last, as it runs the model on a few tokens
            from ..sources.offloaded import check_sequential

            check_sequential(info.plain_model, info.arch)

    def _check_model(self) -> None:
        """Refuse weights unfit for a Trainer, unreadable text, and a head with more inputs than tokens."""
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
            if use == PRUNE and [*self.widths] != [VOCAB]:  # whose text is counted, not run
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
        """Refuse a criterion, a refit or an allocation that does not go with the spaces or the type of model."""
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


def ask(
    config: StructPruneConfig,
    model_info: ModelInfo,
    tokenizer: PreTrainedTokenizerBase | None = None,
    inputs: Mapping[str, Tensor] | None = None,
    use: str = PRUNE,
    options: RunOptions | None = None,
) -> Request:
    """Gives what is asked of a model once it can be met; see `Request.check`."""
    if LOSS in (config.budget or {}):
        is_judged = inputs is None and (model_info.arch.causal or reads_text(model_info.plain_model))
        if use != PRUNE or not is_judged:
            text = "inputs are not" if inputs is not None else "this model does not read alone"
            reason = f"they are judged on text, which {text}" if use == PRUNE else f"a {use} has none"
            raise StructPruneError(
                f"budget {LOSS} is met by prunings on trial, and {reason}; give a size, such as parameters=0.9."
            )
        config = replace(config, budget={"parameters": 0.999})  # which stands for a size that is not found yet
    reads_text_of_user = inputs is None and (use == DRY_RUN or tokenizer is not None)
    if config.may_remove_tokens and reads_text_of_user:
        from ..vocabulary.amount import with_tokens  # which most runs do without

        config = with_tokens(config, model_info, tokenizer)
    request = Request(config, model_info, use, tokenizer, inputs, options or RunOptions())
    request.check()
    if use != TRAINER:
        _ = request.tokens  # what cannot stay is refused now
    return request


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
    least, most = (int(samples.min()), int(samples.max())) if len(samples) else (0, 0)
    if not 0 <= least <= most < vocab_size:
        raise StructPruneError(
            f"inputs[{name!r}] holds token ids from {least} to {most}, and those of this model lie between 0 and "
            f"{vocab_size - 1}."
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
    """The options that are set and have no effect beside the others, each with the reason."""
    default = {field.name: field.default for field in fields(config)}
    explicit = config.widths is not None
    reasons = {
        "targets": (explicit, "widths names the spaces"),
        "keep_tokens": (VOCAB not in names, f"no tokens go; name {VOCAB!r} in targets or widths"),
        "languages": ({*names} <= {LAYER, EXPERT, HIDDEN}, "neither tokens go nor units inside the layers"),
        "round_to": (explicit and config.allocation == "uniform", "widths are taken as they are"),
        "error_feedback": (config.refit != "least_squares", f"refit={config.refit!r} makes up for no error"),
    }
    for name, (idle, reason) in reasons.items():
        value = getattr(config, name)
        if idle and value != default[name]:
            yield f"{name}={value!r}, because {reason}"
