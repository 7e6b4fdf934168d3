"""`structprune evaluate`: how large, how good and how fast models are."""

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
from ..evaluation.evaluate import Evaluation, check_evaluation
from ..evaluation.heldout import told_apart
from ..evaluation.speed import cache_per_token, check_speed, measure_speed
from ..forward.generation import cache_name
from ..record.remarks import measurements_text
from ..record.table import side_by_side
from ..saving.card import EVALUATION_NAME, SPEED_NAME
from ..saving.page import check_result, write_report
from ..system.disk import check_folder
from ..system.fingerprint import vocabulary_hash
from ..system.stages import model_bytes
from .loading import SPREAD_DEVICES, Loading
from .output import Result


logger = logging.getLogger(__name__)


def evaluate(args: Namespace) -> Result:
    """Check all models by their configs, measure them, and write the files that are asked for."""
    is_judged = bool(args.domain or args.answers or args.pairs)
    if args.html:
        _check_page(args)
    loading, paths = Loading.of(args), _paths(args)
    speed_settings = _checked_speed(args, loading, paths) if args.speed else {}
    settings, notes = _check_quality(args, loading, paths) if is_judged else ({}, [])
    if args.html and not (is_judged or args.speed):
        return _with_page(args, "", {})
    # For speed, all models are in memory together, and none is loaded twice.
    load = cache(loading.model) if args.speed else loading.model
    record, evaluations = _measured(args, loading, load, paths, settings)
    # The sizes of one result are known from its pruning.
    shown = evaluations[0].to_dict() if len(evaluations) == 1 else record
    if args.html and is_judged:
        evaluations[0].save(Path(args.models[0], EVALUATION_NAME))
    if args.speed:
        speed = measure_speed({name: load(path) for name, path in paths.items()}, **speed_settings)
        shown = {**shown, **speed.to_dict()}
        if args.html:
            speed.save(Path(args.models[0], SPEED_NAME))
    notes = notes if shown.get("perplexity") else []  # of an encoder's vectors there is nothing to say
    values = {**record, **shown, "notes": notes}
    text = "\n".join([measurements_text(shown), *notes])
    return _with_page(args, text, values) if args.html else Result(text, values)


def _paths(args: Namespace) -> dict[str, str]:
    """The models by name, the dense one first."""
    if args.against and len(args.models) == 1:
        return {"dense": args.against, "model": args.models[0]}
    models = [*filter(None, [args.against]), *args.models]
    return dict(zip(names_of(models), models, strict=True)) if len(models) > 1 else {"model": models[0]}


def _check_page(args: Namespace) -> None:
    """Refuse a page that cannot be written, before a model is loaded in vain."""
    if len(args.models) > 1:
        raise StructPruneError(f"--html writes the page of one result, and {len(args.models)} models are named.")
    if args.speed and not args.against:
        raise StructPruneError("The page compares speed with the dense model's; name it by --against.")
    (folder,) = args.models
    check_result(folder)
    check_folder(folder)


def _with_page(args: Namespace, text: str, values: Mapping[str, object]) -> Result:
    page = write_report(args.models[0], dense=args.against or "")
    return Result("\n\n".join([*filter(None, [text]), f"the report is {page}"]), {**values, "report": str(page)})


def _check_quality(args: Namespace, loading: Loading, paths: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Refuse a measurement that cannot be made. Gives the settings of `evaluate`, and notes on tokenizers."""
    first, dense_tokenizer, notes = next(iter(paths.values())), None, []
    if len(paths) > 1:
        tokenizers = [loading.tokenizer(model) for model in args.models]
        try:
            dense_tokenizer = loading.tokenizer(first)
        except StructPruneError as error:
            logger.warning("%s The dense model reads with the tokenizer of the model that it is compared with.", error)
        if dense_tokenizer is not None and len({*map(vocabulary_hash, [dense_tokenizer, *tokenizers])}) > 1:
            notes = [f"vocabularies differ: perplexity is per token of {first}."]
    dense = {"dense": loading.without_weights(args.against)} if args.against else {}
    for model in args.models:
        shapes = {**dense, "model": loading.without_weights(model)}
        check_evaluation(shapes, args.domain, args.answers, args.seq_length, dense_tokenizer, args.pairs)
    names = ("seq_length", "num_samples", "batch_size", "limit", "answers", "max_new_tokens", "pairs")
    return {"dense_tokenizer": dense_tokenizer, **{name: vars(args)[name] for name in names}}, notes


def _measured(
    args: Namespace, loading: Loading, load: Callable[[str], PreTrainedModel], paths: Mapping[str, str], settings: Any
) -> tuple[dict[str, Any], list[Evaluation]]:
    """The sizes of all models, and with settings the evaluations of all but the dense one; one is there at a time."""
    records: list[tuple[Mapping[str, Any], Mapping[str, str]]] = []
    dense, evaluations = None, []
    for name, path in paths.items():
        is_dense = bool(args.against) and not records
        tokenizer = loading.tokenizer(path) if settings and not is_dense else None
        model = load(path)
        records.append((_sizes(model, name, args.arch_file), {name: name}))
        if is_dense:
            dense = model
        elif tokenizer is not None:
            evaluation = quality.evaluate(model, tokenizer, args.domain, dense, **settings)
            evaluations.append(evaluation)
            # Of several ratios to the dense model, the table shows the last one.
            records.append((evaluation.to_dict(), {"dense": next(iter(paths)), "model": name, "ratio": "ratio"}))
        del model
    return side_by_side(records), evaluations


def _sizes(model: PreTrainedModel, name: str, arch_file: str | None) -> dict[str, Any]:
    """The sizes of a model as a record, in which it has this name."""
    sizes: dict[str, Any] = {"parameters": model.num_parameters(), "weights": model_bytes(model)}
    if predicts_next(model) and cache_name(model) is not None:
        sizes["cache_per_token"] = cache_per_token(model)
    widths = {}
    with suppress(StructPruneError):  # a model that is not described has no widths that are known
        arch = describe(model, arch_file)
        sizes["layers"] = arch.num_layers
        widths = {kind: {name: [*arch.widths(kind).values()]} for kind in arch.names}
    return {**{field: {name: size} for field, size in sizes.items()}, "widths": widths}


def _checked_speed(args: Namespace, loading: Loading, paths: Mapping[str, str]) -> dict[str, Any]:
    """Gives the checked settings of `measure_speed`, by models without weights."""
    if loading.device in SPREAD_DEVICES:
        raise StructPruneError(f"--device {args.device} spreads a model, and speed is that of one device: name one.")
    settings = {name: vars(args)[name] for name in ("new_tokens", "repeats", "clock")}
    # A default of argparse would stay beside what is given.
    settings |= {"batch_sizes": [args.batch_size or 1], "prompts": args.prompt or [128]}
    named = zip(names_of([*paths.values()]), paths.values(), strict=True)
    shapes = {name: loading.without_weights(path) for name, path in named}
    check_speed(shapes, **settings, device=str(loading.device))
    return settings


def names_of(paths: Sequence[str]) -> list[str]:
    """A short name for each model: the last part of its path, or all of it, numbered where that is the same too."""
    names = told_apart([Path(path).name for path in paths], paths)
    taken = [*names, "ratio"]  # what a margin of error may be of beside models
    return [
        f"{name} ({names[:number].count(name) + 1})" if taken.count(name) > 1 else name
        for number, name in enumerate(names)
    ]
