"""`structprune evaluate`, `compare`, `report` and `benchmark`: how good and how fast models are."""

from __future__ import annotations

import json
import logging
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import __version__
from ..arch.load import describe
from ..errors import StructPruneError
from ..evaluation import evaluate as quality
from ..evaluation.evaluate import Evaluation, check_evaluation
from ..evaluation.speed import cache_per_token, check_clock, check_speed, measure_speed
from ..forward.generation import bytes_of, cache_name
from ..record.facts import Facts, as_csv, as_text
from ..record.records import EVALUATION_NAME, SPEED_NAME, Records
from ..saving.page import PAGE_NAME, write_report
from ..system.disk import check_folder
from ..system.fingerprint import vocabulary_hash
from ..written import check_unchanged
from .loading import SPREAD, Loading
from .output import MARK, Result


logger = logging.getLogger(__name__)

# Where the flags of `benchmark` name none; a default of argparse would stay beside what is given. `compare --speed`
# takes them too.
BATCH_SIZES, PROMPTS = [1], [128]


def evaluate(args: Namespace) -> Result:
    """Measure the model, alone or against the dense one."""
    evaluation = _measured(args, Loading.of(args), args.model, args.against)
    if args.items is not None:
        lines = [json.dumps({MARK: __version__, **item}, ensure_ascii=False) + "\n" for item in evaluation.answers]
        Path(args.items).write_text("".join(lines), encoding="utf-8")
    return Result(str(evaluation), evaluation.to_dict())


def report(args: Namespace) -> Result:
    """Measure what is asked for, write the page, and say where it is."""
    Records.read(args.output)  # before a model is loaded in vain
    check_folder(args.output)
    measured = bool(args.domain or args.task or args.answers)
    written = {PAGE_NAME: True, EVALUATION_NAME: measured, SPEED_NAME: args.speed}
    check_unchanged(*(Path(args.output, name) for name, is_due in written.items() if is_due))
    if args.speed and not args.dense:
        raise StructPruneError("--speed compares with the dense model; name it behind the folder.")
    lines, values = [], {}
    if measured:
        evaluation = _measured(args, Loading.of(args), args.output, args.dense)
        evaluation.save(Path(args.output, EVALUATION_NAME))
        lines, values = [str(evaluation)], {"evaluation": evaluation.to_dict()}
    if args.speed:
        loading = Loading.of(args)
        models = {"dense": loading.model(args.dense), "pruned": loading.model(args.output)}
        speed = measure_speed(models, batch_sizes=BATCH_SIZES, prompts=PROMPTS)
        speed.save(Path(args.output, SPEED_NAME))
        lines, values = [*lines, str(speed)], {**values, "speed": speed.to_dict()}
    page = write_report(args.output, dense=args.dense or "")
    return Result("\n".join([*lines, f"the report is {page}"]), {**values, "output": args.output, "report": str(page)})


def _measured(args: Namespace, loading: Loading, model_name: str, dense_name: str | None) -> Evaluation:
    """What the flags of quality ask for, of a model by itself or against the dense one."""
    reader, names = None, {"dense": dense_name, "model": model_name} if dense_name else {"model": model_name}
    try:
        reader = loading.tokenizer(dense_name) if dense_name else None
    except StructPruneError as error:
        logger.warning("%s Both models read with that of %s.", error, model_name)
    shapes = {which: loading.without_weights(name) for which, name in names.items()}
    check_evaluation(shapes, args.domain, args.task, args.answers, args.seq_length, reader)
    model, tokenizer = loading.model_and_tokenizer(model_name)
    return _of_loaded(args, model, tokenizer, loading.model(dense_name) if dense_name else None, reader)


def _of_loaded(
    args: Namespace,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dense: PreTrainedModel | None = None,
    dense_tokenizer: PreTrainedTokenizerBase | None = None,
) -> Evaluation:
    names = ("seq_length", "num_samples", "batch_size", "limit", "answers", "max_new_tokens", "show")
    how = {name: vars(args)[name] for name in names if name in vars(args)}
    return quality.evaluate(model, tokenizer, args.domain, args.task, dense, dense_tokenizer=dense_tokenizer, **how)


def compare(args: Namespace) -> Result:
    """Check all models by their configs, then load and measure one after the other."""
    loading = Loading.of(args)
    paths = dict(zip(names_of(args.models), args.models, strict=True))
    first, notes = _check_comparable(args, loading)
    models = {name: _facts(path, args, loading, first) for name, path in paths.items()}
    if args.speed:
        loaded = {name: loading.model(path) for name, path in paths.items()}
        speed = measure_speed(loaded, batch_sizes=BATCH_SIZES, prompts=PROMPTS)
        for measured in speed.measurements:
            facts = models[measured.model]
            facts.read, facts.write = measured.prefill.tokens_per_second, measured.decode.tokens_per_second
        shape = f"batch {BATCH_SIZES[0]}, a prompt of {PROMPTS[0]} tokens, {speed.new_tokens} written"
        notes += [f"speed: {shape}, {speed.device}, threads: {speed.threads}."]
    if args.csv is not None:
        Path(args.csv).write_text(as_csv(models), encoding="utf-8")
    values = {"models": {name: asdict(facts) for name, facts in models.items()}, "notes": notes}
    return Result("\n".join([as_text(models, compared=len(models) == 2), *notes]), values)


def _check_comparable(args: Namespace, loading: Loading) -> tuple[PreTrainedTokenizerBase | None, list[str]]:
    """Refuse what cannot be compared; the first model's tokenizer where text is read, and notes on the others."""
    for path in args.models:
        model = loading.without_weights(path)
        if args.domain or args.task:
            check_evaluation({"model": model}, args.domain, args.task, None, args.seq_length, None)
    if not args.domain:
        return None, []
    tokenizers = [loading.tokenizer(path) for path in args.models]
    if len(set(map(vocabulary_hash, tokenizers))) == 1:
        return tokenizers[0], []
    return tokenizers[0], [f"vocabularies differ: perplexity is per token of {args.models[0]}."]


def _facts(path: str, args: Namespace, loading: Loading, first: PreTrainedTokenizerBase | None) -> Facts:
    """The facts of one model, which is let go; perplexity is per token of the first model's tokenizer."""
    model, tokenizer = loading.model_and_tokenizer(path)
    facts = Facts(parameters=model.num_parameters(), weights=bytes_of(model.parameters()))
    if cache_name(model) is not None:
        facts.cache_per_token = cache_per_token(model)
    with suppress(StructPruneError):  # a model that is not described has no widths that are known
        arch = describe(model, args.arch_file)
        facts.layers = arch.num_layers
        facts.widths = {name: [*arch.widths(name).values()] for name in arch.names}
    if args.domain or args.task:
        evaluation = _of_loaded(args, model, tokenizer, None, first)
        facts.perplexity = {name: ppl["model"] for name, ppl in evaluation.perplexity.items()}
        facts.bits_per_byte = {name: bits["model"] for name, bits in evaluation.bits_per_byte.items()}
        facts.tasks = {name: {**scores["model"]} for name, scores in evaluation.tasks.items()}
    return facts


def benchmark(args: Namespace) -> Result:
    """Check all models by their configs, load them, and let them take turns."""
    loading = Loading.of(args)
    if loading.device in SPREAD:
        raise StructPruneError(
            f"--device {args.device} spreads a model, and the time of one device is measured: name one."
        )
    check_clock(args.clock, str(loading.device))
    models = [args.dense, *args.models]
    paths = dict(zip(names_of(models), models, strict=True))
    batch_sizes, prompts = args.batch_size or BATCH_SIZES, args.prompt or PROMPTS
    without_weights = {name: loading.without_weights(path) for name, path in paths.items()}
    check_speed(without_weights, batch_sizes, prompts, args.new_tokens, args.repeats, args.threads)
    speed = measure_speed(
        {name: loading.model(path) for name, path in paths.items()},
        batch_sizes=batch_sizes,
        prompts=prompts,
        new_tokens=args.new_tokens,
        repeats=args.repeats,
        threads=args.threads,
        clock=args.clock,
    )
    return Result(str(speed), speed.to_dict())


def names_of(paths: Sequence[str]) -> list[str]:
    """A short name for each model: the last part of its path, or all of it, numbered where that is the same too."""
    short = Counter(Path(path).name for path in paths)
    names = [Path(path).name if short[Path(path).name] == 1 else path for path in paths]
    return [
        f"{name} ({names[:number].count(name) + 1})" if names.count(name) > 1 else name
        for number, name in enumerate(names)
    ]
