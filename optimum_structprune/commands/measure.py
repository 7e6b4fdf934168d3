"""`structprune evaluate`, `compare`, `report` and `benchmark`: how good and how fast models are."""

from __future__ import annotations

from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import ARCH, LOADING, SOURCES, Command, domain, number, switch, valued
from .output import Result, check_folder_of


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..evaluation.evaluate import Evaluation
    from ..evaluation.side_by_side import Facts
    from .loading import Loading

# Where the flags of `benchmark` name none; a default of argparse would stay beside what is given. `compare --speed`
# takes them too.
BATCH_SIZES, PROMPTS = [1], [128]


def evaluate(args: Namespace) -> Result:
    """Measure the model, alone or against the dense one."""
    evaluation = _measured(args, args.model, args.against)
    return Result(str(evaluation), evaluation.to_dict())


def report(args: Namespace) -> Result:
    """Measure what is asked for, write the page, and say where it is."""
    from ..record.records import EVALUATION_NAME, Records
    from ..saving.page import write_report
    from ..system.disk import check_folder

    Records.read(args.output)  # before a model is loaded in vain
    check_folder(args.output)
    lines, values = [], {}
    if args.domain or args.task:
        evaluation = _measured(args, args.output, args.dense)
        evaluation.save(Path(args.output, EVALUATION_NAME))
        lines, values = [str(evaluation)], {"evaluation": evaluation.to_dict()}
    page = write_report(args.output, dense=args.dense or "")
    return Result("\n".join([*lines, f"the report is {page}"]), {**values, "output": args.output, "report": str(page)})


def _measured(args: Namespace, model_name: str, dense_name: str | None) -> Evaluation:
    """What the flags of `QUALITY` ask for."""
    from .loading import Loading

    loading = Loading.of(args)
    model, tokenizer = loading.model_and_tokenizer(model_name)
    return _measured_of(args, model, tokenizer, loading.model(dense_name) if dense_name else None)


def _measured_of(
    args: Namespace,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dense: PreTrainedModel | None = None,
) -> Evaluation:
    """What `_measured` gives, of models that are loaded."""
    from ..evaluation.evaluate import evaluate

    return evaluate(
        model,
        tokenizer,
        args.domain,
        args.task,
        dense,
        seq_length=args.seq_length,
        num_samples=args.num_samples,
        batch_size=args.batch_size,
        limit=args.limit,
        items=args.items,
    )


def compare(args: Namespace) -> Result:
    """Check all models by their configs, then load and measure one after the other."""
    from ..evaluation.pictures import draw_quality
    from ..evaluation.side_by_side import SideBySide
    from ..evaluation.speed import measure_speed
    from .loading import Loading

    loading = Loading.of(args)
    paths = dict(zip(names_of(args.models), args.models, strict=True))
    _check_comparable(args, loading)
    models = SideBySide({name: _facts(path, args, loading) for name, path in paths.items()})
    if args.speed:
        loaded = {name: loading.model(path) for name, path in paths.items()}
        models.add_speed(measure_speed(loaded, batch_sizes=BATCH_SIZES, prompts=PROMPTS, arch_file=args.arch_file))
    if args.csv is not None:
        Path(args.csv).write_text(models.to_csv())
    if args.plot is not None:
        draw_quality(
            args.plot, models.points(), quality=str(models.quality), higher_is_better=models.quality == "accuracy"
        )
    return Result(str(models), models.to_dict())


def _check_comparable(args: Namespace, loading: Loading) -> None:
    """Refuse what cannot be compared, before a model is loaded."""
    from ..errors import StructPruneError
    from ..evaluation.pictures import check_picture
    from ..system.fingerprint import vocabulary_hash

    for path in args.models:
        loading.config(path)
    if args.csv is not None:
        check_folder_of(args.csv, f"--csv {args.csv}")
    if args.plot is not None:
        check_picture(args.plot)
        if not (args.domain or args.task):
            raise StructPruneError("--plot shows quality against size: name text (--domain) or a task (--task).")
    first, *others = args.models
    if args.domain and others:
        vocabulary = vocabulary_hash(loading.tokenizer(first))
        for path in others:
            if vocabulary_hash(loading.tokenizer(path)) != vocabulary:
                raise StructPruneError(
                    f"{path} has another vocabulary than {first}, and perplexity is per token of a vocabulary; "
                    "compare them by --task alone."
                )


def _facts(path: str, args: Namespace, loading: Loading) -> Facts:
    """The facts of one model; it is let go before the next is loaded."""
    from ..evaluation.side_by_side import Facts

    model, tokenizer = loading.model_and_tokenizer(path)
    evaluation = _measured_of(args, model, tokenizer) if args.domain or args.task else None
    return Facts.of(model, evaluation, args.arch_file)


def benchmark(args: Namespace) -> Result:
    """Check all models by their configs, load them, and let them take turns."""
    from ..errors import StructPruneError
    from ..evaluation.speed import check_clock, check_speed, measure_speed
    from .loading import SPREAD, Loading

    loading = Loading.of(args)
    if loading.device in SPREAD:
        raise StructPruneError(
            f"--device {args.device} spreads a model, and the time of one device is measured: name one."
        )
    check_clock(args.clock, str(loading.device))
    models = [args.dense, *args.models]
    paths = dict(zip(names_of(models), models, strict=True))
    batch_sizes, prompts = args.batch_size or BATCH_SIZES, args.prompt or PROMPTS
    shapes = {name: loading.shapes(path) for name, path in paths.items()}
    check_speed(shapes, batch_sizes, prompts, args.new_tokens, args.repeats, args.threads)
    speed = measure_speed(
        {name: loading.model(path) for name, path in paths.items()},
        batch_sizes=batch_sizes,
        prompts=prompts,
        new_tokens=args.new_tokens,
        repeats=args.repeats,
        threads=args.threads,
        clock=args.clock,
        folders={name: folder for name, path in paths.items() if (folder := _folder(path))},
        arch_file=args.arch_file,
    )
    return Result(str(speed), speed.to_dict())


def names_of(paths: Sequence[str]) -> list[str]:
    """A short name for each model: the last part of its path, or all of it, numbered where that is the same too.

    The same model twice shows how far the measurement is from 1 where nothing differs.
    """
    short = Counter(Path(path).name for path in paths)
    names = [Path(path).name if short[Path(path).name] == 1 else path for path in paths]
    return [
        f"{name} ({names[:number].count(name) + 1})" if names.count(name) > 1 else name
        for number, name in enumerate(names)
    ]


def _folder(path: str) -> Path | None:
    """The folder of a model's files; that of an id is where its config has been stored."""
    from transformers.utils import cached_file

    config = cached_file(path, "config.json", local_files_only=True, _raise_exceptions_for_missing_entries=False)
    return None if config is None else Path(config).parent


SEVERAL: dict[str, Any] = {"action": "append", "default": []}
QUALITY = {
    "--domain": valued(
        f"Text that is read in its own order. Repeatable. {SOURCES}", "NAME=SOURCE", type=domain, **SEVERAL
    ),
    "--task": valued(
        "A task of lm_eval, or a file of multiple-choice items in lines of JSON. Repeatable.", "NAME|FILE", **SEVERAL
    ),
    "--tasks": valued("Several of them.", "NAME|FILE", dest="task", action="extend", nargs="+"),
    "--items": valued(
        "A folder that keeps the answers to each item of a task, so that a run goes on where it was killed, and the "
        "dense model answers once for all models that are compared with it.",
        "FOLDER",
    ),
    "--seq-length": number("Tokens per sample (512).", default=512),
    "--num-samples": number("Samples per domain at most; by default each domain is read to its end."),
    "--limit": number("Items per task at most; by default all of them."),
    "--batch-size": number("Sequences per forward pass (1).", default=1),
    **ARCH,
    **LOADING,
}
EVALUATE = {
    "model": valued("Model id or folder."),
    "--against": valued("The dense model to compare with.", "DENSE"),
    **QUALITY,
}
COMPARE = {
    "models": valued("Model ids or folders.", "model", nargs="+"),
    **QUALITY,
    "--speed": switch("Also measure how fast they read and write tokens."),
    "--csv": valued("Write the table to a file of comma-separated values.", "FILE"),
    "--plot": valued(
        "Draw quality against size to an .svg, .png or .pdf file; joined are those that no other beats in both.",
        "FILE",
    ),
}
REPORT = {
    "output": valued("Folder of the pruned model."),
    "dense": valued("Id or folder of the dense model, to compare with and to name in the page.", nargs="?"),
    **QUALITY,
}
REPORT_HELP = (
    "Write report.html beside a pruned model, from the records that lie there; with --domain or --task, measure the "
    "model on further text first."
)
BENCHMARK = {
    "dense": valued("Model id or folder of the dense model, which the others are compared with."),
    "models": valued("Model ids or folders to compare with it.", "pruned", nargs="+"),
    "--batch-size": number("Sequences that run together (1). Repeatable.", action="append"),
    "--prompt": number("Tokens in each prompt (128). Repeatable.", action="append"),
    "--new-tokens": number("Tokens to write after it (32).", default=32),
    "--repeats": number("Timed runs of each model, in turns (9).", default=9),
    "--threads": number("Threads; by default what torch is set to."),
    "--clock": valued("wall (default), or cpu: time of the processor, where other jobs run too.", default="wall"),
    **ARCH,
    **LOADING,
}
COMMANDS = (
    Command(
        "evaluate",
        "Measure a model by perplexity and tasks, alone or against the dense one.",
        evaluate,
        EVALUATE,
        json_file=True,
    ),
    Command(
        "compare",
        "Show models side by side: size, widths, cache, perplexity, tasks and speed.",
        compare,
        COMPARE,
        json_file=True,
    ),
    Command("report", REPORT_HELP, report, REPORT),
    Command(
        "benchmark",
        "Measure how fast models read prompts and write tokens, against the dense one.",
        benchmark,
        BENCHMARK,
        reads_text=False,
        json_file=True,
    ),
)
