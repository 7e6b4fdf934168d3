"""Greedy answers of a model to questions: are they right, do they end, and do they repeat themselves."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.meta import check_positions, predicts_next
from ..domains.packing import prompt_ids
from ..domains.templates import question_messages, read_lines
from ..errors import StructPruneError, one_line, warn
from ..forward.generation import continuations
from ..forward.metrics import evaluating, margin_of_share
from ..record.answers import Items
from ..system.stages import progress, stage
from ..vocabulary.token_alignment import TokenAlignment, divergence_from_dense


BUILTIN = "builtin"
QUESTIONS = Path(__file__).with_name("questions.jsonl")
# The figures of an answer that are true or false.
FIGURES = ("right", "stopped", "loops")
GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "use_cache": True}
# An answer loops if it has the same run of `RUN_TOKENS` tokens more than `MAX_REPEATS` times.
RUN_TOKENS = 4
MAX_REPEATS = 3
# The form of a line of a file of questions, for a refusal.
FORM = 'is no question, which has a "prompt" or "messages", and in "right" a regular expression ("" accepts all)'
AT_ONCE = 32  # the least number of answers that are generated together
# The short check of `prune` and `recover`: the number of questions, and the tokens of an answer. A run that reads less
# than `SHORT_CHECK_MIN_READ` tokens is a trial of the command, in which most of the time would go into answers.
SHORT_CHECK_QUESTIONS = 16
SHORT_CHECK_TOKENS = 64
SHORT_CHECK_MIN_READ = 4_096


# The text, the token ids, their number and the figures of an answer.
Answer = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """A question, as messages and as an opening for a base model, each with a pattern of right answers."""

    kind: str
    messages: tuple[Mapping[str, str], ...]
    right: re.Pattern[str]
    opening: str
    continues: re.Pattern[str]

    @property
    def prompt(self) -> str:
        """The text of the question."""
        return self.messages[-1]["content"]

    def ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Return the token ids of the prompt."""
        return prompt_ids(self.messages, self.opening, tokenizer)


def read_questions(source: str | Path = BUILTIN, tokenizers: Iterable[PreTrainedTokenizerBase] = ()) -> list[Question]:
    """Read questions.

    Args:
        source: A file of JSON lines, or "builtin".
        tokenizers: The tokenizers of all models. If one has no chat template, only questions with an opening are read.

    Raises:
        StructPruneError: If the file cannot be read, or has no question for these tokenizers.
    """
    path = QUESTIONS if source == BUILTIN else Path(source)
    questions = read_lines(path, _question, FORM)
    all_chat = all(tokenizer.chat_template for tokenizer in tokenizers)
    if not all_chat:
        questions = [question for question in questions if question.opening]
    if not questions:
        raise StructPruneError(f"The file {path} has no questions for this model.")
    return questions


def _question(line: str) -> Question:
    """Parse a line of a file of questions."""
    row = json.loads(line)
    messages = tuple(question_messages(row))
    right = re.compile(row["right"], re.IGNORECASE)
    continues = re.compile(row.get("continues", row["right"]), re.IGNORECASE)
    # Built-in questions have a kind. The text of a user's question is its opening, unless the line names another.
    is_builtin = "kind" in row
    default_opening = "" if is_builtin else messages[-1]["content"]
    opening = str(row.get("opening", default_opening))
    return Question(str(row.get("kind", "")), messages, right, opening, continues)


def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    max_new_tokens: int,
    batch_size: int = AT_ONCE,
) -> list[Answer]:
    """Generate the greedy answers of a model, and judge them.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        questions: The questions.
        max_new_tokens: The largest number of tokens in an answer.
        batch_size: The number of answers that are generated together.

    Raises:
        StructPruneError: If the model has too few positions for a question and its answer.
    """
    prompts = [question.ids(tokenizer) for question in questions]
    check_positions(model, max_new_tokens, f"max_new_tokens={max_new_tokens}", max(map(len, prompts)))
    answers: list[list[int]] = [[] for _ in prompts]
    # Prompts of similar lengths need little padding.
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    settings = {**GREEDY, "max_new_tokens": max_new_tokens}
    with evaluating(model), stage("answers"):
        for start in progress(range(0, len(order), batch_size), desc="answering"):
            batch = order[start : start + batch_size]
            texts = continuations(model, tokenizer, [prompts[number] for number in batch], settings)
            for number, ids in zip(batch, texts, strict=True):
                answers[number] = ids

    has_chat_template = bool(tokenizer.chat_template)
    decoded = tokenizer.batch_decode(answers, skip_special_tokens=True)
    judged = []
    for question, ids, text in zip(questions, answers, decoded, strict=True):
        stopped = len(ids) < max_new_tokens
        judged.append(_judged(question, ids, text, stopped, has_chat_template))
    return judged


def _judged(question: Question, ids: list[int], text: str, stopped: bool, has_chat_template: bool) -> Answer:
    """Return an answer with its figures. Of the continuation of an opening, only the first line is judged."""
    if has_chat_template:
        right = question.right.search(text.strip())
    else:
        first_line = text.strip().partition("\n")[0]
        right = question.continues.search(first_line.strip())
    runs = Counter(tuple(ids[start : start + RUN_TOKENS]) for start in range(len(ids) - RUN_TOKENS + 1))
    most_repeats = max(runs.values(), default=0)
    return {
        "text": text,
        "ids": ids,
        "tokens": len(ids),
        "right": right is not None,
        "stopped": stopped,
        "loops": most_repeats > MAX_REPEATS,
    }


def figures_of(answers: Sequence[Answer]) -> dict[str, float]:
    """Return the figures of a model: shares with their margins of error, and the median length of an answer."""
    figures: dict[str, float] = {}
    for name in FIGURES:
        values = torch.tensor([float(answer[name]) for answer in answers])
        figures[name] = float(values.mean())
        figures[f"{name}_margin"] = margin_of_share(values)
    figures["tokens"] = float(median(answer["tokens"] for answer in answers))
    return figures


def answer_divergence(
    dense: PreTrainedModel,
    model: PreTrainedModel,
    parts: TokenAlignment,
    prompts: list[list[int]],
    answers: Sequence[Answer],
) -> float:
    """Compute the mean KL(dense‖model) in nats per token of the dense model's answers.

    Args:
        dense: The dense model.
        model: A model that may have fewer tokens.
        parts: The alignment of both vocabularies.
        prompts: The token ids of the prompts.
        answers: The answers of the dense model.
    """
    texts: list[list[int]] = []
    contexts: list[int] = []
    for prompt, answer in zip(prompts, answers, strict=True):
        if answer["ids"]:
            texts.append([*prompt, *answer["ids"]])
            contexts.append(len(prompt))
    if not texts:
        return 0.0

    with evaluating(dense, model):
        divergences = divergence_from_dense(parts, dense, model, texts, contexts)
    num_tokens = sum(len(text) for text in texts) - sum(contexts)
    return float(divergences.sum()) / num_tokens


def items_of(questions: Sequence[Question], answers: Mapping[str, Sequence[Answer]]) -> list[dict[str, Any]]:
    """Return the questions with the answers of each model, as records hold them: without token ids."""
    items = []
    for number, question in enumerate(questions):
        by_model: dict[str, Answer] = {}
        for model_name, model_answers in answers.items():
            answer = model_answers[number]
            by_model[model_name] = {name: value for name, value in answer.items() if name != "ids"}
        items.append({"kind": question.kind, "prompt": question.prompt, "answers": by_model})
    return items


class ShortCheck:
    """Asks the models of a run a few questions. If one model cannot answer, all answers are dropped.

    Args:
        tokenizer: The tokenizer of the models.
        tokens: The number of tokens that the run reads. Short runs ask nothing.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tokens: int):
        self.tokenizer = tokenizer
        count = SHORT_CHECK_QUESTIONS if tokens >= SHORT_CHECK_MIN_READ else 0
        self.questions = read_questions(tokenizers=[tokenizer])[:count]
        self._answers: dict[str, list[Answer]] = {}

    def ask(self, name: str, model: PreTrainedModel) -> None:
        """Ask a model. A failure is a warning, and no error."""
        if not (self.questions and predicts_next(model)):
            return
        try:
            self._answers[name] = ask(model, self.tokenizer, self.questions, SHORT_CHECK_TOKENS)
        except Exception as error:  # the run, which may have taken hours, goes on without answers
            self.questions = []
            # A StructPruneError says that the model has too few positions.
            if not isinstance(error, StructPruneError):
                warn(f"There are no answers of the {name} model: {one_line(error)}")

    def items(self, earlier: Items = ()) -> Items:
        """Return the questions with the answers of all models.

        Args:
            earlier: The items of an earlier run. If the questions are the same, their answers are added.
        """
        if not (self.questions and self._answers):
            return []
        items = items_of(self.questions, self._answers)
        if [item["prompt"] for item in earlier] != [item["prompt"] for item in items]:
            return items
        for before, item in zip(earlier, items, strict=True):
            item["answers"] = {**before["answers"], **item["answers"]}
        return items
