"""Resolve a config for a model: compute the widths and tokens once, from shapes alone, and check the request.

This module raises before any text is read or any weight is touched. `config.pruning` checks each config by itself,
independently of the model. Optional features have their own checks: see `method.offloaded`, `recovery.recover` and
`trainer`.
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

from ..arch.devices import machine_name
from ..arch.inference import outputs_for, random_inputs
from ..arch.load import ModelInfo
from ..arch.meta import check_changeable, check_positions, is_offloaded, reads_images, reads_text, shrunk_skeleton
from ..arch.modules import module_files
from ..arch.shrink import layers_ahead
from ..arch.spec import EXPERT, HIDDEN, LAYER, MODEL, VOCAB, Widths
from ..config.pruning import AUTO, FILE, SPEED, RunOptions, StructPruneConfig
from ..criteria import CRITERIA, DEFAULT_CRITERIA
from ..domains.manifest import check_kinds, check_tokens, remember_text
from ..domains.packing import check_reads_any_text
from ..record.report import ShapeSpeed
from ..saving import file_size
from ..saving.gguf_types import BLOCKS, K_QUANTS
from ..system.errors import StructPruneError, capitalized, one_line, warn
from ..widths.allocation import widths_of
from ..widths.budget import Budget, UnreachableBudgetError, budget_of
from ..widths.speed import ShapeTimes, clock_for, shape_times


if TYPE_CHECKING:
    from ..vocabulary.choose import VocabularyRequest


# The uses of a request: a pruning, a dry run, or a pruning by a Trainer.
PRUNE = "prune"
DRY_RUN = "dry run"
TRAINER = "trainer"
# A request for a speed that keeps fewer units of a space gets a warning.
RUINOUS_SHARE = 0.5


@dataclass(frozen=True)
class PruningRequest:
    """The widths and tokens to prune, resolved from a config and the shapes of a model.

    Attributes:
        config: The resolved config. Its targets include the vocabulary if a budget takes tokens by default.
        model_info: The description of the model.
        use: The use of the request: `PRUNE`, `DRY_RUN` or `TRAINER`.
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
        """Compute the final widths. If calibration chooses the widths, these are other widths of the same total."""
        arch = self.model_info.arch
        model = self.model_info.plain_model
        if self.config.removes_tokens:
            from ..vocabulary.amount import widths_with_tokens  # most runs remove no tokens

            return widths_with_tokens(self.config, arch, model)
        return widths_of(self.config, arch, model)

    @cached_property
    def tokens(self) -> VocabularyRequest | None:
        """Return the tokens that may be removed, or None without a tokenizer or if all tokens are kept."""
        if VOCAB not in self.widths or self.tokenizer is None:
            return None

        from ..vocabulary.choose import VocabularyRequest

        return VocabularyRequest.of(self.config, self.model_info, self.tokenizer, self.widths)

    @cached_property
    def smaller(self) -> PreTrainedModel:
        """Return the model with the final widths in the same dtype, without weights."""
        model = self.model_info.plain_model
        smaller: Any = shrunk_skeleton(model, self.model_info.arch, self.widths)
        return smaller.to(model.dtype)

    @cached_property
    def budget(self) -> Budget:
        """Return the budget of the original model, without limits if the config has none."""
        return budget_of(self.config, self.model_info.arch, self.model_info.plain_model, list(self.widths))

    @cached_property
    def times(self) -> ShapeTimes | None:
        """Return the times of the shapes of the model, or None if the config does not limit them."""
        if SPEED not in (self.config.budget or {}):
            return None
        return shape_times(self.config, self.model_info.arch, self.model_info.plain_model)

    def speed_of(self, widths: Widths) -> ShapeSpeed | None:
        """Return the predicted and the measured speed-up of a shape, or None if the config does not limit it."""
        times = self.times
        if times is None:
            return None

        assert self.config.budget is not None
        predicted = 1 / times.predicted(widths)
        value, low, high = times.measured(widths)
        return ShapeSpeed(
            wish=self.config.budget[SPEED],
            predicted=predicted,
            measured=value,
            low=low,
            high=high,
            use=times.use_name,
            batch_size=times.use.batch_size,
            tokens=times.use.tokens,
            threads=torch.get_num_threads(),
            clock=clock_for(times.device),
            device=str(times.device),
            machine=machine_name(times.device),
        )

    def check(self) -> None:
        """Raise if the request cannot be met, before any text is read. Warn of options without effect."""
        info = self.model_info
        if self.use != DRY_RUN:
            self._check_weights()
            self._check_inputs()
        if self.use == PRUNE:
            self._check_forward()

        if info.offloaded:
            _check_offloaded(self.config, info, self.widths)

        self._check_removes_units()
        self._check_modules()
        self._check_criterion()
        self._check_refit()
        self._check_allocation()
        if self.use == PRUNE:
            self._check_run()

        self._warn()

        # Last, because it runs the model on a few tokens.
        if is_offloaded(info.plain_model):
            from ..method.offloaded import check_sequential

            check_sequential(info.plain_model, info.arch)

    def _warn_of_widths(self) -> None:
        """Warn if a speed needs so few units that the model would be useless."""
        assert self.config.budget is not None
        arch = self.model_info.arch
        for name in self.widths:
            full = sum(space.width for space in arch.of(name))
            width = sum(space.width_in(self.widths) for space in arch.of(name))
            if name != VOCAB and width < RUINOUS_SHARE * full:
                warn(
                    f"budget speed={self.config.budget[SPEED]} keeps {width / full:.0%} of the units of {name!r}, and "
                    "with less than half of them most models need a long training. Ask for less speed, add `targets`, "
                    "or quantize the model."
                )

    def _check_weights(self) -> None:
        """Raise if a Trainer cannot train the weights."""
        if self.use != TRAINER:
            return
        info = self.model_info
        if info.quantized:
            raise StructPruneError(f"{info.name} is quantized. Prune `model.dequantize()`, or load it unquantized.")
        if info.offloaded:
            raise StructPruneError(f"{info.name} is offloaded. Load it into memory, where a Trainer trains it.")

    def _check_inputs(self) -> None:
        """Raise if the model cannot read the calibration text, or `inputs` have token ids of another vocabulary."""
        if self.inputs is not None:
            if VOCAB in self.widths:
                raise StructPruneError(
                    f"{VOCAB!r} renumbers the token ids, so `inputs` cannot be used. Pass text through `domains`."
                )
            return

        model = self.model_info.plain_model
        check_positions(model, self.config.seq_length, f"seq_length={self.config.seq_length}")
        if self.use != PRUNE:
            return
        # If only tokens are removed, text is counted and does not run through the model.
        if list(self.widths) != [VOCAB]:
            check_reads_text(model)
        if self.tokenizer is None:
            raise StructPruneError("The domains are text, and reading them takes a tokenizer. Pass `tokenizer`.")

    def _check_removes_units(self) -> None:
        """Raise if the widths equal the current widths, so that a run would remove nothing."""
        arch = self.model_info.arch
        spaces = arch.model_spaces + arch.spaces
        if any(space.width_in(self.widths) < space.width for space in spaces):
            return

        sizes = [f"{name} {max(arch.widths(name).values())}" for name in self.widths]
        raise StructPruneError(
            f"The {arch.model_type} model has the requested widths already ({', '.join(sizes)}), so nothing would be "
            "removed. Choose smaller `widths`, a larger `sparsity`, or a smaller `round_to`."
        )

    def _check_modules(self) -> None:
        """Raise if layers are removed that a module of sentence-transformers reads."""
        if LAYER not in self.widths:
            return
        for path, text in module_files(self.model_info.plain_model.config).items():
            if '"num_hidden_layers"' in text:
                raise StructPruneError(
                    f"{path} belongs to a module that reads the hidden states of all layers. Prune units inside the "
                    f"layers, and remove {LAYER!r} from `targets` and `widths`."
                )

    def _check_forward(self) -> None:
        """Raise if the model cannot run on random tokens or images. The check of a saved model runs it on them."""
        info = self.model_info
        if info.quantized or info.offloaded or info.plain_model.device.type == "meta":
            return
        # A causal language model of transformers runs on tokens alone.
        if info.arch.causal and type(info.plain_model).__module__.startswith("transformers."):
            return
        try:
            outputs_for(info.plain_model)
        except Exception as error:  # every model class raises its own errors
            raise StructPruneError(
                f"{info.name} cannot run on a few tokens or an image alone, as it does before it is saved "
                f"({one_line(error)}). If its head needs other inputs, prune the base model and attach the head to "
                "the result."
            ) from error

    def _check_run(self) -> None:
        """Raise if the checkpoint folder or the recovery cannot be used."""
        if self.options.checkpoint_dir is not None:
            _check_folder(self.options.checkpoint_dir, self.config.rounds)
        if self.config.recovery is not None:
            from ..recovery.recover import check_recovery  # training libraries take seconds to import

            check_recovery(self.config.recovery, self.config, self.model_info.plain_model)

    def _check_criterion(self) -> None:
        """Raise if the criterion cannot score the spaces, or a Trainer cannot prune them."""
        config = self.config
        arch = self.model_info.arch
        criterion = CRITERIA.get(config.scored_by)
        if criterion.check is not None:
            criterion.check(config, arch, self.use)

        unit = criterion.judges
        unscored = [name for name in self.widths if name not in (unit, VOCAB)]
        if unit in DEFAULT_CRITERIA and unscored:
            raise StructPruneError(
                f"criterion={config.criterion!r} scores whole {unit}s only. Prune {unit!r} in a separate run, or pass "
                f"a criterion for {unscored[0]!r}. In that case {DEFAULT_CRITERIA[unit]!r} scores {unit!r}."
            )

        model_spaces = [space.name for space in arch.model_spaces if space.name in self.widths]
        if self.use == TRAINER and model_spaces:
            raise StructPruneError(
                f"{model_spaces[0]!r} belongs to the whole model, and a Trainer prunes only inside the layers. Prune "
                "it first (`structprune prune`), and then train."
            )

    def _check_refit(self) -> None:
        """Raise if the refit cannot update all consumers of the hidden channels."""
        refit = self.config.refit
        if HIDDEN in self.widths and refit not in ("none", "least_squares"):
            raise StructPruneError(
                f"refit={refit!r} is for consumers inside the layers, and the whole model reads {HIDDEN!r}. Use "
                "refit='least_squares' or 'none'."
            )

    def _check_allocation(self) -> None:
        """Raise if the allocation cannot choose the widths of the spaces of this model."""
        allocation = self.config.allocation
        arch = self.model_info.arch
        if allocation == "uniform":
            return
        if not arch.causal:
            raise StructPruneError(
                f"allocation={allocation!r} compares predictions of the next token, and a model of type "
                f"{arch.model_type!r} makes none. Use allocation='uniform'."
            )

        names = [name for name in self.widths if name != VOCAB]
        for name in names or self.widths:
            space = arch.of(name)[0]
            if not space.inside or space.layer == MODEL:
                raise StructPruneError(
                    f"allocation={allocation!r} chooses widths inside the layers, and {name!r} is not inside a layer. "
                    "Remove it from `targets` and `widths`."
                )

    def _warn(self) -> None:
        """Warn of options without effect, of small widths for speed, and of layers that transformers does not load."""
        if self.times is not None:
            self._warn_of_widths()

        options = list(without_effect(self.config, self.widths))
        if options and self.use != TRAINER:
            warn(f"These options have no effect here: {'; '.join(options)}.")

        ahead = layers_ahead(self.model_info.plain_model.config.get_text_config())
        if ahead:
            warn(
                f"transformers does not load the layers that predict tokens farther ahead ({', '.join(ahead)}), so "
                "the result has none, and its config says 0."
            )


def resolve_request(
    config: StructPruneConfig,
    model_info: ModelInfo,
    tokenizer: PreTrainedTokenizerBase | None = None,
    inputs: Mapping[str, Tensor] | None = None,
    use: str = PRUNE,
    options: RunOptions | None = None,
) -> PruningRequest:
    """Resolve a config for a model. Use the config of the returned request from here on.

    Args:
        config: The user's config.
        model_info: The description of the model.
        tokenizer: The tokenizer of the model, which reads the calibration text.
        inputs: Calibration inputs by domain instead of text.
        use: The use of the request: `PRUNE`, `DRY_RUN` or `TRAINER`.
        options: Runtime options.

    Raises:
        StructPruneError: If the request cannot be met; see `PruningRequest.check`.
    """
    if tokenizer is not None and FILE in (config.budget or {}):
        remember_text(model_info.plain_model, tokenizer)
    searches_type = config.gguf == AUTO
    if searches_type:
        config = replace(config, gguf=_nearest_type(config, model_info))
    if config.gguf is not None:
        _check_gguf(config, model_info, tokenizer)

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
        if searches_type:
            _advise_fewer_bits(config, model_info, error)
        raise
    return request


def _nearest_type(config: StructPruneConfig, model_info: ModelInfo) -> str:
    """Return the smallest data type whose file of the original model exceeds the budget. A search tries others too."""
    limit = (config.budget or {})[FILE]
    sizes = file_size.bytes_by_type(config, model_info.arch, model_info.plain_model)
    for kind, size in sizes.items():
        if size > limit:
            return kind
    raise StructPruneError(
        f"budget {FILE}={limit / 1e6:,.2f} MB is met by the original model as {kind}, with {size / 1e6:,.2f} MB. "
        f"Write it with `structprune export MODEL OUT.gguf --dtype {kind}`, or set a smaller budget."
    )


def _advise_fewer_bits(config: StructPruneConfig, model_info: ModelInfo, error: UnreachableBudgetError) -> None:
    """Raise with the data type in which the original model meets a budget that no pruned model meets, if any."""
    limit = (config.budget or {})[FILE]
    sizes = file_size.bytes_by_type(config, model_info.arch, model_info.plain_model)
    fitting = [kind for kind, size in sizes.items() if size <= limit]
    if fitting:
        raise StructPruneError(
            f"{error} The original model meets it as {fitting[-1]}, with {sizes[fitting[-1]] / 1e6:,.2f} MB: "
            f"`structprune export MODEL OUT.gguf --dtype {fitting[-1]}`."
        ) from error


def _check_gguf(config: StructPruneConfig, model_info: ModelInfo, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Raise if the GGUF file of a config cannot be written, or its size is not known before."""
    from ..saving.gguf_file import check_gguf  # most runs write no GGUF file

    check_gguf(model_info.plain_model.config, config.gguf, tokenizer)
    if FILE in (config.budget or {}) and config.gguf in K_QUANTS:
        raise StructPruneError(
            f"The budget {FILE!r} needs the size of the file before it is written, and llama.cpp chooses the types of "
            f"the tensors of {config.gguf}. Set gguf to one of {', '.join(BLOCKS)}."
        )


def check_config_kind(config: Any, options: Any = None) -> None:
    """Raise unless the config and the options have the right types, and validate both."""
    _check_type("config", config, StructPruneConfig)
    # A field may have been set after the object was made.
    config.validate()
    if options:
        _check_type("options", options, RunOptions)
        options.validate()


def _check_type(name: str, value: Any, expected: type) -> None:
    if not isinstance(value, expected):
        raise StructPruneError(
            f"`{name}` must be a {expected.__name__}, got {type(value).__name__}. "
            f"{expected.__name__}.from_dict converts a mapping."
        )


def check_arguments(model: Any, tokenizer: Any, inputs: Any = None, inplace: bool = False) -> None:
    """Raise unless a pruning can take the model, the tokenizer and the inputs."""
    check_kinds(model, tokenizer)
    if inputs is not None and not (isinstance(inputs, Mapping) and len(inputs) > 0):
        raise StructPruneError(
            f"`inputs` must be a mapping of names to tensors with at least one entry, got {type(inputs).__name__}. "
            "For example, pass {'text': ids}."
        )
    if "_original_forward" in vars(model):
        raise StructPruneError(
            "`model` computes in mixed precision, as accelerate prepared it, and a saved model would not. Pass "
            "`accelerator.unwrap_model(model, keep_fp32_wrapper=False)`. With a Trainer, the accelerator is "
            "`trainer.accelerator`."
        )

    check_tokens(model, tokenizer)
    if inputs is None:
        check_reads_any_text(tokenizer)
    if inplace:
        check_changeable(model)
    for name, samples in (inputs or {}).items():
        _check_samples(name, samples, model)


def check_reads_text(model: PreTrainedModel) -> None:
    """Raise if the text of domains cannot calibrate a model."""
    if not reads_text(model):
        raise StructPruneError(
            f"{type(model).__name__} reads {model.main_input_name}, and domains are text. Pass samples of its inputs "
            "in Python: StructPruner(config).prune_model(model, inputs={'name': samples})."
        )


def _check_samples(name: Any, samples: Any, model: Any) -> None:
    """Raise if the model cannot read the inputs of a domain."""
    if not isinstance(name, str):
        raise StructPruneError(f"The names of domains in `inputs` must be text, got {name!r}. Pass {str(name)!r}.")
    if not isinstance(samples, Tensor):
        raise StructPruneError(f"inputs[{name!r}] must be a tensor, got {type(samples).__name__}.")

    if reads_images(model):
        _check_images(name, samples, model)
    else:
        _check_ids(name, samples, model)


def _check_images(name: str, samples: Tensor, model: PreTrainedModel) -> None:
    """Raise unless samples have the shape of the model's images and are floating point."""
    expected = tuple(random_inputs(model).shape[1:])
    if samples.shape[1:] != expected or not samples.is_floating_point():
        raise StructPruneError(
            f"inputs[{name!r}] has images of shape {tuple(samples.shape[1:])} as {samples.dtype}. Pass the output of "
            f"the model's image processor, {expected} in floating point."
        )


def _check_ids(name: str, samples: Tensor, model: PreTrainedModel) -> None:
    """Raise unless samples are token ids of the model, of shape `(samples, tokens)`."""
    if samples.dim() != 2 or samples.dtype != torch.int64 or samples.shape[1] < 2:
        raise StructPruneError(
            f"inputs[{name!r}] has the shape {tuple(samples.shape)} and the type {samples.dtype}. Pass int64 token "
            "ids of shape (samples, tokens), with 2 tokens or more in each sample."
        )
    check_positions(model, samples.shape[1], f"A sample of inputs[{name!r}], {samples.shape[1]} tokens,")
    if not len(samples):
        return

    vocab_size = model.config.get_text_config().vocab_size
    smallest = int(samples.min())
    largest = int(samples.max())
    if smallest < 0 or largest >= vocab_size:
        raise StructPruneError(
            f"inputs[{name!r}] has token ids from {smallest} to {largest}, and the token ids of this model are from 0 "
            f"to {vocab_size - 1}."
        )


def _check_folder(folder: str, rounds: int) -> None:
    """Raise if a checkpoint folder holds a model or cannot be written, or if there are several rounds."""
    from ..system.disk import check_folder

    check_folder(folder)
    if Path(folder, "config.json").is_file():
        raise StructPruneError(f"{folder} holds a model. Pass another folder as `checkpoint_dir`.")
    if rounds > 1:
        raise StructPruneError(
            f"checkpoint_dir={folder!r} stores finished layers, and with rounds={rounds} no layer is finished before "
            "the last round. Set rounds=1, or remove checkpoint_dir (--resume)."
        )


def without_effect(config: StructPruneConfig, names: Collection[str]) -> Iterator[str]:
    """Yield the options that are set but have no effect with the other options, each with the reason."""
    reasons = {}
    if SPEED not in (config.budget or {}):
        reasons["speed_use"] = f"the budget has no {SPEED!r}"
    if config.widths is not None:
        reasons["targets"] = "`widths` names the spaces"
        if config.allocation == "uniform":
            reasons["round_to"] = "`widths` are not rounded"
    if VOCAB not in names:
        reasons["keep_tokens"] = f"no tokens are removed. Add {VOCAB!r} to `targets` or `widths`"
    if set(names) <= {LAYER, EXPERT, HIDDEN}:
        reasons["languages"] = "neither tokens nor units inside the layers are removed"
    if config.refit != "least_squares":
        reasons["error_feedback"] = f"refit={config.refit!r} corrects no error"

    defaults = {field.name: field.default for field in fields(config)}
    for name, reason in reasons.items():
        value = getattr(config, name)
        if value != defaults[name]:
            yield f"{name}={value!r}, because {reason}"


def _check_offloaded(config: StructPruneConfig, info: ModelInfo, widths: Widths) -> None:
    """Raise `StructPruneError` if a pruning needs all weights of an offloaded model at once."""
    name = info.name
    advice = "load the model in memory, or over several devices"

    if info.quantized:
        raise StructPruneError(f"{name} is offloaded and quantized, and is unpacked in memory. {capitalized(advice)}.")

    if CRITERIA.get(config.scored_by).whole_model_statistics is not None:
        raise StructPruneError(
            f"{name} is offloaded, and criterion={config.scored_by!r} takes all its layers at once. Choose "
            f"criterion='obs' or 'wanda', or {advice}."
        )

    for space in (HIDDEN, VOCAB):
        if space in widths:
            raise StructPruneError(
                f"{name} is offloaded, and {space!r} changes weights of all layers at once. Prune inside the layers, "
                f"or {advice}."
            )
