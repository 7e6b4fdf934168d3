"""Zero-shot tasks through lm_eval: registered ones by name, and multiple choice from a local file."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from glob import escape
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import is_progress_bar_enabled

from ..domains.templates import chat_text
from ..errors import StructPruneError, one_line
from ..forward.generation import end_tokens, generating
from ..forward.metrics import evaluating, standard_error
from ..registry import did_you_mean


METRICS = ("acc", "acc_norm")
AT_ONCE = 8  # sequences in a pass at least: choices are short
FEWSHOT_SEED = 1234  # that of lm_eval's own command
REQUESTS = ("loglikelihood", "loglikelihood_rolling", "generate_until")  # what lm_eval may ask of a model
Scores = dict[str, dict[str, float]]


@dataclass(frozen=True)
class TaskScores:
    """What a model scores in tasks, `{"piqa": {"acc": …, "acc_stderr": …, "items": …}}`, and for metrics that are
    means over items, each of them: `{"piqa": {"acc": {0: 1.0, 1: 0.0, …}}}`.
    """

    scores: Scores
    items: dict[str, dict[str, dict[int, float]]]


class Tasks:
    """Tasks to score models on, with their data at hand."""

    def __init__(self, names: Sequence[str | Path]):
        try:
            from lm_eval import tasks as harness
        except ImportError as error:
            raise StructPruneError("Tasks need lm_eval: pip install lm_eval") from error
        tasks = [local_task(Path(name)) if Path(name).suffix == ".jsonl" else str(name) for name in names]
        registered = [task for task in tasks if isinstance(task, str)]
        labels = [task if isinstance(task, str) else task["task"] for task in tasks]
        if twice := {label for label in labels if labels.count(label) > 1}:
            raise StructPruneError(f"Two tasks are named {min(twice)!r}; rename one of the files.")
        with _quiet():
            # Indexing the thousands of tasks that lm_eval brings takes seconds.
            manager = harness.TaskManager(include_defaults=bool(registered))
            for name in registered:
                if name not in manager.all_tasks:
                    raise StructPruneError(
                        f"lm_eval has no task {name!r}, and a local one is a file that ends in .jsonl."
                        f"{did_you_mean(name, manager.all_tasks)}"
                    )
            try:
                self.loaded = manager.load(tasks)
            except (OSError, ValueError) as error:  # what `datasets` raises where the Hub or a data set is missing
                raise StructPruneError(f"The tasks cannot be loaded: {one_line(error)}") from error

    def score(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = AT_ONCE,
        limit: int | None = None,
    ) -> TaskScores:
        """Ask a model the tasks, or the first `limit` items of each."""
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        for task in self.loaded["tasks"].values():
            task.set_fewshot_seed(FEWSHOT_SEED)
        kinds = {task.OUTPUT_TYPE for task in self.loaded["tasks"].values()}
        chats = bool(tokenizer.chat_template) and kinds == {"generate_until"}
        if chats:
            chat_text(tokenizer, [{"role": "user", "content": "0"}], add_generation_prompt=True)  # which may refuse
        settings = {"eos_token_id": end_tokens(model, tokenizer) or None}
        with _quiet(), evaluating(model), generating(model, **settings):
            # Sums of bf16 log-probabilities would be too coarse. lm_eval sets a padding token on the tokenizer.
            asked = HFLM(
                pretrained=model,
                tokenizer=deepcopy(tokenizer),
                backend="causal",
                batch_size=max(batch_size, AT_ONCE),
                softmax_dtype="float32",
            )
            for kind in REQUESTS:  # lm_eval does not ask whether bars are wanted
                setattr(asked, kind, partial(getattr(asked, kind), disable_tqdm=not is_progress_bar_enabled()))
            results = lm_eval.evaluate(asked, self.loaded, limit=limit, log_samples=True, apply_chat_template=chats)
        counts = {name: sizes["effective"] for name, sizes in results["n-samples"].items()}
        scores = {
            name: {**_metrics(values), **({"items": counts[name]} if name in counts else {})}
            for name, values in {**results["results"], **results.get("groups", {})}.items()
        }
        items = {}
        for name, samples in results["samples"].items():
            items[name] = _by_item(samples)
            if by_item := _log_probabilities(self.loaded["tasks"][name], samples):
                items[name]["logprob"] = by_item
                values = torch.tensor([*by_item.values()])
                scores[name] |= {"logprob": float(values.mean()), "logprob_stderr": standard_error(values)}
        return TaskScores(scores, items)


def local_task(path: Path) -> dict[str, Any]:
    """A file of multiple-choice items as a task of lm_eval, named like the file: choices are judged by their
    log-likelihood after the query and a space, `acc` takes the likeliest, `acc_norm` the likeliest per character.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise StructPruneError(f"The task {path} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip() and not _is_item(line):
            raise StructPruneError(
                f"The task {path}, line {number}, is no item, which has a query, two choices or more and gold, the "
                f"index of the right one; got {line:.80}"
            )
    if not any(map(str.strip, lines)):
        raise StructPruneError(f"The task {path} has no items.")
    return {
        "task": path.stem,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": escape(str(path))}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": _query,
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "num_fewshot": 0,
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in METRICS],
    }


def _query(item: Mapping[str, Any]) -> str:
    query = item["query"].rstrip()
    asked = query.startswith("Question:") and not query.endswith("Answer:")
    return f"{query}\nAnswer:" if asked else query


def _is_item(line: str) -> bool:
    try:
        item = json.loads(line)
        query, choices, gold = item["query"], item["choices"], item["gold"]
        json.dumps(item, ensure_ascii=False).encode()  # half a character, which no tokenizer reads
    except (ValueError, KeyError, TypeError):
        return False
    if not (isinstance(query, str) and isinstance(choices, list) and type(gold) is int):
        return False
    texts = all(isinstance(choice, str) and choice for choice in choices)
    return texts and len(choices) > 1 and 0 <= gold < len(choices)


def _metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of lm_eval: `{"acc,none": 0.5, "alias": …}` becomes `{"acc": 0.5}`; the name of a filter stays."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in values.items()
        if "," in key and isinstance(value, (int, float))
    }


def _log_probabilities(task: Any, samples: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """The log-probability of the right choice of each item, given that it is one of the choices: two models that take
    the same ones may differ in it. Empty for what is no multiple choice, or is scored by code of the task's own.
    """
    if task.OUTPUT_TYPE != "multiple_choice" or callable(task.config.process_results):
        return {}
    by_item = {}
    for sample in samples:
        choices = task.doc_to_choice(sample["doc"])
        gold = task.doc_to_text(sample["doc"]) if task.multiple_input else sample["target"]
        right = [choices.index(of) if of in choices else of for of in (gold if isinstance(gold, list) else [gold])]
        # What lm_eval asks without the query as well, for `acc_mutual_info`, stands behind.
        likelihoods = torch.tensor([likelihood for likelihood, _ in sample["filtered_resps"][: len(choices)]])
        if all(isinstance(of, int) and 0 <= of < len(choices) for of in right):
            by_item[sample["doc_id"]] = float(likelihoods.double().log_softmax(-1)[right].logsumexp(-1))
    return by_item


def _by_item(samples: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """The scores of each item by metric, from what lm_eval logs; the name of a filter stays as in `_metrics`."""
    by_metric: dict[str, dict[int, float]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            if isinstance(value := sample[metric], (bool, int, float)):
                name = metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"
                by_metric.setdefault(name, {})[sample["doc_id"]] = float(value)
    return by_metric


@contextmanager
def _quiet() -> Iterator[None]:
    # lm_eval warns that a model which is already loaded is not loaded again.
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
