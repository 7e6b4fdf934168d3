"""`structprune evaluate`: how large, how good and how fast models are."""

from __future__ import annotations

import json
import logging
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import __version__
from ..arch.load import describe
from ..errors import StructPruneError
from ..evaluation import evaluate as quality
from ..evaluation.evaluate import Evaluation, check_evaluation
from ..evaluation.speed import Speed, cache_per_token, check_clock, check_speed, measure_speed
from ..forward.generation import bytes_of, cache_name
from ..record.table import as_csv, as_text, side_by_side
from ..saving.page import PAGE_NAME, check_result, write_report
from ..saving.shown import EVALUATION_NAME, SPEED_NAME
from ..system.disk import check_folder
from ..system.fingerprint import vocabulary_hash
from ..written import check_unchanged
from .loading import SPREAD, Loading
from .output import MARK, Result


logger = logging.getLogger(__name__)

# Where `--prompt` is not given; a default of argparse would stay beside what is given.
PROMPTS = [128]


def evaluate(args: Namespace) -> Result:
    """Check all models by their configs, measure one after the other, then all in turns where speed is asked for, and
    write the files that are asked for.
    """
    is_judged = bool(args.domain or args.answers)
    if args.html:
        _check_page(args, is_judged)
        if not (is_judged or args.speed or args.csv):
            return _with_page(args, [], {})
    loading, models = Loading.of(args), [*filter(None, [args.against]), *args.models]
    paths = dict(zip(names_of(models), models, strict=True))
    if args.speed:
        _check_speed(args, loading, paths)
    reader, notes = _check_quality(args, loading, models) if is_judged else (None, [])
    sections: list[str] = []
    values: dict[str, Any] = {}
    if is_judged or args.csv is not None or not args.speed:
        record, evaluations = _measured(args, loading, paths, reader, is_judged)
        # One model that is judged is shown by itself, and several side by side.
        shown = next(iter(evaluations.values())) if len(evaluations) == 1 else None
        sections = ["\n".join([as_text(record) if shown is None else str(shown), *notes])]
        values = {**record, **({} if shown is None else shown.to_dict()), "notes": notes}
        if args.csv is not None:
            Path(args.csv).write_text(as_csv(record), encoding="utf-8")
        if args.items is not None:
            _write_items(args.items, evaluations)
        if args.html and is_judged:
            evaluations[names_of(models)[-1]].save(Path(args.models[0], EVALUATION_NAME))
    if args.speed:
        speed = _speed(args, loading, paths)
        sections, values = [*sections, str(speed)], {**values, "speed": speed.to_dict()}
        if args.html:
            speed.save(Path(args.models[0], SPEED_NAME))
    return _with_page(args, sections, values) if args.html else Result("\n\n".join(sections), values)


def _check_page(args: Namespace, is_judged: bool) -> None:
    """Refuse a page that cannot be written, before a model is loaded in vain."""
    if len(args.models) > 1:
        raise StructPruneError(f"--html writes the page of one result, and {len(args.models)} models are named.")
    if args.speed and not args.against:
        raise StructPruneError("The page compares speed with the dense model's; name it by --against.")
    (folder,) = args.models
    check_result(folder)
    check_folder(folder)
    written = {PAGE_NAME: True, EVALUATION_NAME: is_judged, SPEED_NAME: args.speed}
    check_unchanged(*(Path(folder, name) for name, is_due in written.items() if is_due))


def _with_page(args: Namespace, sections: Sequence[str], values: Mapping[str, object]) -> Result:
    page = write_report(args.models[0], dense=args.against or "")
    return Result("\n\n".join([*sections, f"the report is {page}"]), {**values, "report": str(page)})


def _check_quality(
    args: Namespace, loading: Loading, models: Sequence[str]
) -> tuple[PreTrainedTokenizerBase | None, list[str]]:
    """Refuse what cannot be measured; the first model's tokenizer, by whose tokens perplexity is counted where there
    are several models, and a note where another one differs.
    """
    reader: PreTrainedTokenizerBase | None = None
    notes = []
    if len(models) > 1:
        tokenizers = [loading.tokenizer(model) for model in args.models]
        try:
            reader = loading.tokenizer(models[0])
        except StructPruneError as error:
            logger.warning("%s The dense model reads with the tokenizer of the model that it is compared with.", error)
        if reader is not None and len({*map(vocabulary_hash, [reader, *tokenizers])}) > 1:
            notes = [f"vocabularies differ: perplexity is per token of {models[0]}."]
    for model in args.models:
        names = {"dense": args.against, "model": model} if args.against else {"model": model}
        shapes = {which: loading.without_weights(name) for which, name in names.items()}
        check_evaluation(shapes, args.domain, args.answers, args.seq_length, reader)
    return reader, notes


def _measured(
    args: Namespace,
    loading: Loading,
    paths: Mapping[str, str],
    reader: PreTrainedTokenizerBase | None,
    is_judged: bool,
) -> tuple[dict[str, Any], dict[str, Evaluation]]:
    """What is known of all models, and the evaluations of all but the dense one; each is let go before the next."""
    known: dict[str, tuple[Mapping[str, Any], str]] = {}
    evaluations, names = {}, list(paths)
    dense = loading.model(args.against) if args.against else None
    if dense is not None:
        known[names[0]] = (_sizes(dense, "dense", args.arch_file), "dense")
    for name in names[len(known) :]:
        sizes, evaluation = _of_one(args, loading, paths[name], dense, reader, is_judged)
        judged = {} if evaluation is None else evaluation.to_dict()
        known[name] = ({**sizes, **judged}, "model")
        if evaluation is not None:
            evaluations[name] = evaluation
        if dense is not None:
            known[names[0]] = ({**known[names[0]][0], **judged}, "dense")
    return side_by_side(known), evaluations


def _of_one(
    args: Namespace,
    loading: Loading,
    path: str,
    dense: PreTrainedModel | None,
    reader: PreTrainedTokenizerBase | None,
    is_judged: bool,
) -> tuple[dict[str, Any], Evaluation | None]:
    """The sizes of a model, and its evaluation where one is asked for."""
    model, tokenizer = loading.model_and_tokenizer(path)
    sizes = _sizes(model, "model", args.arch_file)
    if not is_judged:
        return sizes, None
    names = ("seq_length", "num_samples", "batch_size", "limit", "answers", "max_new_tokens", "show")
    how = {name: vars(args)[name] for name in names}
    return sizes, quality.evaluate(model, tokenizer, args.domain, dense, dense_tokenizer=reader, **how)


def _sizes(model: PreTrainedModel, name: str, arch_file: str | None) -> dict[str, Any]:
    """The sizes of a model as a record, in which it has this name."""
    sizes: dict[str, Any] = {"parameters": model.num_parameters(), "weights": bytes_of(model.parameters())}
    if cache_name(model) is not None:
        sizes["cache_per_token"] = cache_per_token(model)
    widths = {}
    with suppress(StructPruneError):  # a model that is not described has no widths that are known
        arch = describe(model, arch_file)
        sizes["layers"] = arch.num_layers
        widths = {kind: {name: [*arch.widths(kind).values()]} for kind in arch.names}
    return {**{field: {name: size} for field, size in sizes.items()}, "widths": widths}


def _write_items(file: str, evaluations: Mapping[str, Evaluation]) -> None:
    """A line of JSON for each question and model."""
    lines = [
        json.dumps({MARK: __version__, "model": name, **item}, ensure_ascii=False) + "\n"
        for name, evaluation in evaluations.items()
        for item in evaluation.answers
    ]
    Path(file).write_text("".join(lines), encoding="utf-8")


def _check_speed(args: Namespace, loading: Loading, paths: Mapping[str, str]) -> None:
    if loading.device in SPREAD:
        raise StructPruneError(
            f"--device {args.device} spreads a model, and the time of one device is measured: name one."
        )
    check_clock(args.clock, str(loading.device))
    without_weights = {name: loading.without_weights(path) for name, path in paths.items()}
    check_speed(
        without_weights, [args.batch_size], args.prompt or PROMPTS, args.new_tokens, args.repeats, args.threads
    )


def _speed(args: Namespace, loading: Loading, paths: Mapping[str, str]) -> Speed:
    """The speed of all models in turns; speed-ups are over the first."""
    return measure_speed(
        {name: loading.model(path) for name, path in paths.items()},
        batch_sizes=[args.batch_size],
        prompts=args.prompt or PROMPTS,
        new_tokens=args.new_tokens,
        repeats=args.repeats,
        threads=args.threads,
        clock=args.clock,
    )


def names_of(paths: Sequence[str]) -> list[str]:
    """A short name for each model: the last part of its path, or all of it, numbered where that is the same too."""
    short = Counter(Path(path).name for path in paths)
    names = [Path(path).name if short[Path(path).name] == 1 else path for path in paths]
    return [
        f"{name} ({names[:number].count(name) + 1})" if names.count(name) > 1 else name
        for number, name in enumerate(names)
    ]
