"""Public benchmarks: tasks of lm-evaluation-harness for language models, and of MTEB for encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from itertools import chain
from math import isfinite
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..arch.meta import predicts_next
from ..record.report import Tasks, TaskScore
from ..system.errors import StructPruneError


LM_EVAL, MTEB = "lm-eval", "mteb"
LIBRARY_MODULES = {LM_EVAL: "lm_eval", MTEB: "mteb"}


def check_tasks(models: Mapping[str, PreTrainedModel], names: Sequence[str], new_tokens: int) -> str:
    """Return the library that measures tasks, or raise before a model is loaded.

    Args:
        models: The models by name, without weights.
        names: The names of the tasks; for lm-eval also files of tasks, which end in .yaml.
        new_tokens: The maximum number of tokens that a task generates.

    Raises:
        StructPruneError: If the models have no tasks in common, the library is not installed, or a name is unknown.
    """
    generate = {predicts_next(model) for model in models.values()}
    if len(generate) > 1:
        raise StructPruneError("`tasks` are measured for language models or for encoders, and the models are of both.")

    library = LM_EVAL if generate == {True} else MTEB
    if any(model.config.is_encoder_decoder for model in models.values()):
        raise StructPruneError("`tasks` of encoder-decoders are not supported. Run the harness on the folder.")
    if find_spec(LIBRARY_MODULES[library]) is None:
        raise StructPruneError(f"`tasks` need the package {library}: pip install {library}.")

    if library == MTEB:
        _mteb_tasks(names)
        return library

    for name, model in models.items():
        limit = getattr(_text_config(model), "max_position_embeddings", None)
        if limit is not None and new_tokens >= limit:
            raise StructPruneError(
                f"`task_new_tokens` must be less than the {limit} positions of {name}, got {new_tokens}."
            )

    from lm_eval.tasks import TaskManager

    known = TaskManager()
    for name in names:
        if not name.endswith(".yaml") and not known.match_tasks([name]):
            raise StructPruneError(f"lm-eval has no task {name!r}. `lm_eval ls tasks` lists the tasks.")
    return library


def measure_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str,
    names: Sequence[str],
    library: str,
    new_tokens: int,
    limit: int | None = None,
    batch_size: int | None = None,
) -> dict[str, TaskScore]:
    """Return the scores of one model by task and metric.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        path: Its folder or id, which sentence-transformers loads for MTEB.
        names: The names of the tasks.
        library: The library, from `check_tasks`.
        new_tokens: The maximum number of tokens that a task generates. It replaces the numbers of the tasks, because
            the default of lm-eval, 256, cuts long answers off.
        limit: The maximum number of questions of each task, for lm-eval only. The default is all of them.
        batch_size: The number of sequences in a forward pass.
    """
    if library == MTEB:
        return _mteb_scores(path, names, batch_size, str(model.device))

    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    positions = getattr(_text_config(model), "max_position_embeddings", None)
    results = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size or 1, max_length=positions),
        tasks=list(names),
        limit=limit,
        gen_kwargs={"max_gen_toks": new_tokens, "do_sample": False},
        log_samples=False,
    )
    return _lm_eval_scores(results)


def task_table(
    scores: Mapping[str, Mapping[str, TaskScore]], library: str, new_tokens: int, limit: int | None
) -> Tasks:
    """Return the record of the scores of several models.

    Args:
        scores: The scores by model, then by task and metric.
        library: The library.
        new_tokens: The maximum number of generated tokens.
        limit: The maximum number of questions.
    """
    by_task: dict[str, dict[str, TaskScore]] = {}
    for model, model_scores in scores.items():
        for name, score in model_scores.items():
            by_task.setdefault(name, {})[model] = score
    return Tasks(by_task, f"{library} {version(library)}", new_tokens if library == LM_EVAL else None, limit)


def _text_config(model: PreTrainedModel) -> PretrainedConfig:
    """Return the config of the language model."""
    return model.config.get_text_config()


def _lm_eval_scores(results: Mapping[str, Any]) -> dict[str, TaskScore]:
    """Return the scores of lm-eval, of groups without their single tasks."""
    parts = set(chain.from_iterable(results.get("group_subtasks", {}).values()))
    scores = {}
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            is_score = isinstance(value, (int, float)) and kind and not metric.endswith("_stderr")
            if task in parts or not is_score:
                continue

            label = f"{task}, {metric}"
            if kind != "none":
                label += f" ({kind})"
            error = values.get(f"{metric}_stderr,{kind}")
            if not isinstance(error, (int, float)) or not isfinite(error):
                error = None
            scores[label] = TaskScore(float(value), error)
    return scores


def _mteb_tasks(names: Sequence[str]) -> Any:
    """Return the tasks of MTEB, or raise if a name is unknown."""
    import mteb

    try:
        return mteb.get_tasks(tasks=list(names))
    except (KeyError, ValueError) as error:
        raise StructPruneError(f"MTEB does not know a task of {', '.join(names)}: {error}") from error


def _mteb_scores(path: str, names: Sequence[str], batch_size: int | None, device: str) -> dict[str, TaskScore]:
    """Return the main scores of MTEB, which has no standard errors."""
    import mteb
    from sentence_transformers import SentenceTransformer

    # Results of an earlier model in the same folder must not count, so there is no cache.
    result = mteb.evaluate(
        SentenceTransformer(path, device=device),
        _mteb_tasks(names),
        encode_kwargs={"batch_size": batch_size or 32},
        cache=None,
        show_progress_bar=False,
    )
    return {task.task_name: TaskScore(float(task.get_score())) for task in result.task_results}
