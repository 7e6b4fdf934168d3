"""`structprune evaluate`: measure the size, the quality and the speed of models."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.generation import cache_name
from ..arch.load import describe
from ..arch.meta import predicts_next
from ..domains.templates import distinct_names
from ..evaluation import evaluate as quality
from ..evaluation.evaluate import check_evaluation, default_seq_length
from ..evaluation.speed import cache_per_token, check_speed, measure_speed
from ..record.figures import ORIGINAL, PRUNED, SizeResult
from ..record.report import EVALUATION_NAME, SPEED_NAME, MeasuredModel, Measurement
from ..saving.page import check_result, write_report
from ..system.disk import check_folder
from ..system.errors import StructPruneError
from ..system.fingerprint import vocabulary_hash
from ..system.stages import model_bytes
from .loading import SPREAD_DEVICES, Loading
from .output import Result


logger = logging.getLogger(__name__)


def evaluate(args: Namespace) -> Result:
    """Check all models by their configs, measure them, and write the requested files."""
    measures_quality = bool(args.domain or args.answers or args.pairs)
    if args.html:
        _check_page(args)

    loading = Loading.of(args)
    paths = _paths(args)
    speed_settings: dict[str, Any] = {}
    if args.speed:
        speed_settings = _checked_speed(args, loading, paths)
    settings: dict[str, Any] = {}
    notes: list[str] = []
    if measures_quality:
        settings, notes = _check_quality(args, loading, paths)
    if args.html and not (measures_quality or args.speed):
        return _with_page(args, [], {})

    load = loading.model
    if args.speed:
        # All models are in memory together, so none has to be loaded twice.
        load = cache(loading.model)
    measurement = _measured(args, loading, load, paths, settings)
    if args.speed:
        models = {name: load(path) for name, path in paths.items()}
        measurement.speed = measure_speed(models, **speed_settings)

    # The vectors of encoders do not depend on the tokenizer.
    if not any(evaluation.has_perplexity for evaluation in measurement.evaluations):
        notes = []
    lines = [str(measurement)]
    lines += notes
    values = measurement.to_dict()
    values["notes"] = notes
    if not args.html:
        return Result("\n".join(lines), values)

    _save_records(measurement, Path(args.models[0]))
    return _with_page(args, lines, values)


def _save_records(measurement: Measurement, folder: Path) -> None:
    """Save the evaluation and the speed in the folder of the result."""
    for evaluation in measurement.evaluations:
        evaluation.save(folder / EVALUATION_NAME)
    if measurement.speed is not None:
        measurement.speed.save(folder / SPEED_NAME)


def _paths(args: Namespace) -> dict[str, str]:
    """Return the models by name, the original model first."""
    if args.against and len(args.models) == 1:
        return {ORIGINAL: args.against, PRUNED: args.models[0]}

    models = list(args.models)
    if args.against:
        models.insert(0, args.against)
    if len(models) == 1:
        return {"model": models[0]}
    return dict(zip(names_of(models), models, strict=True))


def _check_page(args: Namespace) -> None:
    """Raise `StructPruneError` if the page cannot be written, before a model is loaded."""
    if len(args.models) > 1:
        raise StructPruneError(f"--html writes the page of one result, and {len(args.models)} models are named.")
    if args.speed and not args.against:
        raise StructPruneError(
            "The page compares the speed with the speed of the original model. Pass the original model with --against."
        )

    (folder,) = args.models
    check_result(folder)
    check_folder(folder)


def _with_page(args: Namespace, lines: list[str], values: dict[str, Any]) -> Result:
    """Write the page, and return the result with its path."""
    page = write_report(args.models[0], original=args.against or "")

    lines.append(f"Report: {page}")
    values["report"] = str(page)
    return Result("\n".join(lines), values)


def _check_quality(args: Namespace, loading: Loading, paths: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Check the arguments of an evaluation.

    Returns:
        The settings of `evaluate`, and notes on tokenizers.

    Raises:
        StructPruneError: If the evaluation cannot be made.
    """
    original_tokenizer = None
    notes: list[str] = []
    if len(paths) > 1:
        original_tokenizer, notes = _first_tokenizer(args, loading, next(iter(paths.values())))

    original = [loading.without_weights(args.against)] if args.against else []
    models = [loading.without_weights(model) for model in args.models]
    for model in models:
        check_evaluation(
            [*original, model], args.domain, args.answers, args.seq_length, original_tokenizer, args.pairs
        )

    names = ("num_samples", "batch_size", "limit", "answers", "max_new_tokens", "pairs")
    settings = {name: getattr(args, name) for name in names}
    settings["seq_length"] = args.seq_length or default_seq_length(original + models)
    settings["original_tokenizer"] = original_tokenizer
    return settings, notes


def _first_tokenizer(args: Namespace, loading: Loading, path: str) -> tuple[PreTrainedTokenizerBase | None, list[str]]:
    """Return the tokenizer of the first model.

    Args:
        args: The arguments of the command.
        loading: Loads tokenizers.
        path: The first model.

    Returns:
        The tokenizer, or None if it cannot be loaded, and a note if the vocabularies of the models differ.
    """
    tokenizers = [loading.tokenizer(model) for model in args.models]
    try:
        tokenizer = loading.tokenizer(path)
    except StructPruneError as error:
        logger.warning("%s The tokenizer of the compared model reads the text for the original one.", error)
        return None, []

    hashes = {vocabulary_hash(tokenizer)}
    hashes.update(map(vocabulary_hash, tokenizers))
    if len(hashes) == 1:
        return tokenizer, []
    return tokenizer, [f"The vocabularies differ; perplexity is per token of {path}."]


def _measured(
    args: Namespace,
    loading: Loading,
    load: Callable[[str], PreTrainedModel],
    paths: Mapping[str, str],
    settings: Mapping[str, Any],
) -> Measurement:
    """Measure the models one after the other.

    Args:
        args: The arguments of the command.
        loading: Loads tokenizers.
        load: Loads models.
        paths: The models by name.
        settings: The settings of `evaluate`. If they are empty, only sizes are measured.
    """
    measurement = Measurement()
    original = None

    for number, (name, path) in enumerate(paths.items()):
        is_original = bool(args.against) and number == 0
        tokenizer = None
        if settings and not is_original:
            tokenizer = loading.tokenizer(path)

        model = load(path)
        result = _sizes(model, path, args.arch_file)
        if is_original:
            original = model
        elif tokenizer is not None:
            result.evaluation = quality.evaluate(model, tokenizer, args.domain, original, **settings)
        measurement.models[name] = result

        # Free the memory before the next model is loaded.
        del model

    return measurement


def _sizes(model: PreTrainedModel, path: str, arch_file: str | None) -> MeasuredModel:
    """Return the measurements of a model with its sizes."""
    size = SizeResult(model.num_parameters(), bytes=model_bytes(model))
    if predicts_next(model) and cache_name(model) is not None:
        size.cache_per_token = cache_per_token(model)
    result = MeasuredModel(path, size)

    # The widths of a model without a description are unknown.
    with suppress(StructPruneError):
        arch = describe(model, arch_file)
        size.layers = arch.num_layers
        size.layer_parameters = sum(arch.layer_params)
        result.widths = {kind: list(arch.widths(kind).values()) for kind in arch.names}
    return result


def _checked_speed(args: Namespace, loading: Loading, paths: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings of `measure_speed`, after a check with models without weights."""
    if loading.device in SPREAD_DEVICES:
        raise StructPruneError(
            f"--device {args.device} spreads a model over several devices, and speed is measured on one. Name a "
            "device."
        )

    settings = {
        "new_tokens": args.new_tokens,
        "repeats": args.repeats,
        "clock": args.clock,
        "batch_sizes": [args.batch_size or 1],
        # argparse would append the prompts to a default.
        "prompts": args.prompt or [128],
    }
    models = {}
    for name, path in zip(names_of(list(paths.values())), paths.values(), strict=True):
        models[name] = loading.without_weights(path)
    check_speed(models, **settings, device=str(loading.device))
    return settings


def names_of(paths: Sequence[str]) -> list[str]:
    """Return a short name for each model: the last part of its path, or the path if another model has that name.

    A path that occurs more than once is numbered.
    """
    names = distinct_names([Path(path).name for path in paths], paths)
    unique_names = []

    for number, name in enumerate(names):
        if names.count(name) > 1:
            occurrence = names[:number].count(name) + 1
            name = f"{name} ({occurrence})"
        unique_names.append(name)

    return unique_names
