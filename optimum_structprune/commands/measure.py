"""`structprune evaluate`: measures the size, the quality and the speed of models."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..arch.load import describe
from ..arch.meta import predicts_next
from ..errors import StructPruneError
from ..evaluation import evaluate as quality
from ..evaluation.evaluate import check_evaluation
from ..evaluation.heldout import told_apart
from ..evaluation.speed import cache_per_token, check_speed, measure_speed
from ..forward.generation import cache_name
from ..record.evaluation import ORIGINAL, MeasuredModel, Measurement
from ..record.figures import PRUNED, SizeResult
from ..record.measured import measurement_lines
from ..saving.names import EVALUATION_NAME, SPEED_NAME
from ..saving.page import check_result, write_report
from ..system.disk import check_folder
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
    speed_settings = _checked_speed(args, loading, paths) if args.speed else {}
    settings: dict[str, Any] = {}
    notes: list[str] = []
    if measures_quality:
        settings, notes = _check_quality(args, loading, paths)
    if args.html and not (measures_quality or args.speed):
        return _with_page(args, [], {})

    # For speed, all models are in memory together, and none is loaded twice.
    load = cache(loading.model) if args.speed else loading.model
    measurement = _measured(args, loading, load, paths, settings)
    if args.speed:
        measurement.speed = measure_speed({name: load(path) for name, path in paths.items()}, **speed_settings)

    # The vectors of encoders do not depend on the tokenizer.
    evaluations = measurement.evaluations
    has_loss = any(domain.perplexity for evaluation in evaluations.values() for domain in evaluation.domains.values())
    notes = notes if has_loss else []
    values = {**measurement.to_dict(), "notes": notes}
    lines = [*measurement_lines(measurement), *notes]
    if not args.html:
        return Result("\n".join(lines), values)

    folder = Path(args.models[0])
    for evaluation in evaluations.values():
        evaluation.save(folder / EVALUATION_NAME)
    if measurement.speed is not None:
        measurement.speed.save(folder / SPEED_NAME)
    return _with_page(args, lines, values)


def _paths(args: Namespace) -> dict[str, str]:
    """Return the models by name, the original one first."""
    if args.against and len(args.models) == 1:
        return {ORIGINAL: args.against, PRUNED: args.models[0]}
    models = [args.against, *args.models] if args.against else list(args.models)
    if len(models) == 1:
        return {"model": models[0]}
    return dict(zip(names_of(models), models, strict=True))


def _check_page(args: Namespace) -> None:
    """Refuse a page that cannot be written, before a model is loaded in vain."""
    if len(args.models) > 1:
        raise StructPruneError(f"--html writes the page of one result, and {len(args.models)} models are named.")
    if args.speed and not args.against:
        raise StructPruneError("The page compares speed with the dense model's; name it by --against.")
    (folder,) = args.models
    check_result(folder)
    check_folder(folder)


def _with_page(args: Namespace, lines: list[str], values: Mapping[str, object]) -> Result:
    """Return a result with the page about it."""
    page = write_report(args.models[0], dense=args.against or "")
    return Result("\n".join([*lines, f"Report: {page}"]), {**values, "report": str(page)})


def _check_quality(args: Namespace, loading: Loading, paths: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Refuse a measurement that cannot be made.

    Returns:
        The settings of `evaluate`, and notes on tokenizers.
    """
    first = next(iter(paths.values()))
    dense_tokenizer = None
    notes = []
    if len(paths) > 1:
        tokenizers = [loading.tokenizer(model) for model in args.models]
        try:
            dense_tokenizer = loading.tokenizer(first)
        except StructPruneError as error:
            logger.warning("%s The tokenizer of the compared model reads the text for the original one.", error)
        readers = tokenizers if dense_tokenizer is None else [dense_tokenizer, *tokenizers]
        if dense_tokenizer is not None and len({vocabulary_hash(reader) for reader in readers}) > 1:
            notes = [f"The vocabularies differ; perplexity is per token of {first}."]

    original = [loading.without_weights(args.against)] if args.against else []
    for model in args.models:
        models = [*original, loading.without_weights(model)]
        check_evaluation(models, args.domain, args.answers, args.seq_length, dense_tokenizer, args.pairs)
    names = ("seq_length", "num_samples", "batch_size", "limit", "answers", "max_new_tokens", "pairs")
    settings = {name: getattr(args, name) for name in names}
    return {**settings, "dense_tokenizer": dense_tokenizer}, notes


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
        settings: The settings of `evaluate`; without any, only sizes are measured.
    """
    measurement = Measurement()
    original = None
    for number, (name, path) in enumerate(paths.items()):
        is_original = bool(args.against) and number == 0
        reads_text = bool(settings) and not is_original
        tokenizer = loading.tokenizer(path) if reads_text else None
        model = load(path)
        measured = _sizes(model, path, args.arch_file)
        if is_original:
            original = model
        elif tokenizer is not None:
            measured.evaluation = quality.evaluate(model, tokenizer, args.domain, original, **settings)
        measurement.models[name] = measured
        # The next model is loaded after this one has left the memory.
        del model
    return measurement


def _sizes(model: PreTrainedModel, path: str, arch_file: str | None) -> MeasuredModel:
    """Return the sizes of a model."""
    size = SizeResult(model.num_parameters(), bytes=model_bytes(model))
    if predicts_next(model) and cache_name(model) is not None:
        size.cache_per_token = cache_per_token(model)
    measured = MeasuredModel(path, size)
    # The widths of a model that no file describes are unknown.
    with suppress(StructPruneError):
        arch = describe(model, arch_file)
        size.layers = arch.num_layers
        size.layer_parameters = sum(arch.layer_params)
        measured.widths = {kind: [*arch.widths(kind).values()] for kind in arch.names}
    return measured


def _checked_speed(args: Namespace, loading: Loading, paths: Mapping[str, str]) -> dict[str, Any]:
    """Return the checked settings of `measure_speed`, by models without weights."""
    if loading.device in SPREAD_DEVICES:
        raise StructPruneError(f"--device {args.device} spreads a model, and speed is that of one device: name one.")
    settings = {
        "new_tokens": args.new_tokens,
        "repeats": args.repeats,
        "clock": args.clock,
        "batch_sizes": [args.batch_size or 1],
        # argparse would append the prompts to a default.
        "prompts": args.prompt or [128],
    }
    names = names_of(list(paths.values()))
    models = {name: loading.without_weights(path) for name, path in zip(names, paths.values(), strict=True)}
    check_speed(models, **settings, device=str(loading.device))
    return settings


def names_of(paths: Sequence[str]) -> list[str]:
    """Return a short name for each model: the last part of its path, or the path, numbered where it occurs again."""
    names = told_apart([Path(path).name for path in paths], paths)
    numbered = []
    for number, name in enumerate(names):
        is_repeated = names.count(name) > 1
        numbered.append(f"{name} ({names[:number].count(name) + 1})" if is_repeated else name)
    return numbered
