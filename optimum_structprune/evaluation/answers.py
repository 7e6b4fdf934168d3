"""Generate greedy answers of a model to questions, and judge them: correct, finished, repetitive."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.inference import evaluating
from ..arch.meta import check_positions, predicts_next
from ..domains.packing import prompt_ids
from ..domains.templates import question_messages, read_lines
from ..errors import StructPruneError, one_line, warn
from ..forward.generation import continuations
from ..measure.batches import IGNORED
from ..measure.losses import measure
from ..measure.text import Text
from ..record.figures import Answer, AnsweredQuestion, AnswersResult
from ..system.stages import stage
from ..vocabulary.token_alignment import TokenAlignment


BUILTIN = "builtin"
QUESTIONS = Path(__file__).with_name("questions.jsonl")
GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "use_cache": True}
# An answer loops if the same run of tokens occurs more often than this.
RUN_TOKENS = 4
MAX_REPEATS = 3
# The form of a line in a file of questions, for an error.
FORM = 'is not a question: it needs a "prompt" or "messages", and in "right" a regular expression ("" accepts all)'
# The minimum number of answers that are generated together.
MIN_BATCH = 32
# The short check of `prune` and `recover` asks the first questions. A run that reads fewer tokens than
# SHORT_CHECK_MIN_READ asks none, because answers would take most of its time.
SHORT_CHECK_QUESTIONS = 16
SHORT_CHECK_TOKENS = 64
SHORT_CHECK_MIN_READ = 4_096


@dataclass
class WrittenAnswer(Answer):
    """An answer with its token ids, which are not saved."""

    ids: list[int] = field(default_factory=list)

    def record(self) -> Answer:
        """Return the answer without its token ids."""
        return Answer(self.text, self.right, self.loops, self.stopped, self.tokens)


@dataclass(frozen=True)
class Question:
    """A question for chat models, and the same question as an opening that base models continue.

    Attributes:
        kind: The kind of question.
        messages: The messages of the chat.
        pattern: The pattern of correct answers.
        opening: The opening; empty if base models are not asked.
        continuation_pattern: The pattern of correct continuations of the opening.
    """

    kind: str
    messages: tuple[Mapping[str, str], ...]
    pattern: re.Pattern[str]
    opening: str
    continuation_pattern: re.Pattern[str]

    @classmethod
    def from_json(cls, line: str) -> Question:
        """Return the question in a line of JSON."""
        row = json.loads(line)
        messages = tuple(question_messages(row))
        # Built-in questions have a kind. A question of the user without an opening is its own opening.
        default_opening = "" if "kind" in row else messages[-1]["content"]

        return cls(
            kind=str(row.get("kind", "")),
            messages=messages,
            pattern=re.compile(row["right"], re.IGNORECASE),
            opening=str(row.get("opening", default_opening)),
            continuation_pattern=re.compile(row.get("continues", row["right"]), re.IGNORECASE),
        )

    @property
    def prompt(self) -> str:
        """Return the text of the question."""
        return self.messages[-1]["content"]

    def text(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """Return the question if the tokenizer has a chat template, or else the opening."""
        if tokenizer.chat_template:
            return self.prompt
        return self.opening

    def ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Return the token ids of the prompt."""
        return prompt_ids(self.messages, self.opening, tokenizer)


def read_questions(source: str | Path = BUILTIN, tokenizers: Iterable[PreTrainedTokenizerBase] = ()) -> list[Question]:
    """Read the questions of a file, or the built-in ones.

    If a tokenizer has no chat template, only the questions with an opening are returned.

    Args:
        source: A file with a question in each line of JSON, or "builtin".
        tokenizers: The tokenizers of the models that are asked.

    Raises:
        StructPruneError: If the file cannot be read, a line is not a question, or there are no questions.
    """
    path = QUESTIONS if source == BUILTIN else Path(source)
    questions = read_lines(path, Question.from_json, FORM)
    if not all(tokenizer.chat_template for tokenizer in tokenizers):
        questions = [question for question in questions if question.opening]

    if not questions:
        raise StructPruneError(f"The file {path} has no questions for this model.")
    return questions


def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    max_new_tokens: int,
    batch_size: int = MIN_BATCH,
) -> list[WrittenAnswer]:
    """Return the greedy answers of a model.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        questions: The questions.
        max_new_tokens: The maximum number of tokens in an answer.
        batch_size: The number of answers that are generated together.

    Raises:
        StructPruneError: If the model has too few positions.
    """
    prompts = [question.ids(tokenizer) for question in questions]
    check_positions(model, max_new_tokens, f"max_new_tokens={max_new_tokens}", max(map(len, prompts)))

    ids = _continued(model, tokenizer, prompts, max_new_tokens, batch_size)
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    is_chat = bool(tokenizer.chat_template)

    answers = []
    for question, answer_ids, text in zip(questions, ids, texts, strict=True):
        answers.append(_judged(question, answer_ids, text, max_new_tokens, is_chat))
    return answers


def _continued(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    batch_size: int,
) -> list[list[int]]:
    """Return the token ids that a model generates after each prompt."""
    settings: dict[str, Any] = dict(GREEDY)
    settings["max_new_tokens"] = max_new_tokens
    ids: list[list[int]] = [[] for _ in prompts]
    # Prompts of similar length run together, so that little is padded.
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))

    with evaluating(model), stage("answers"):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            label = f"Answering questions {start + 1} to {start + len(batch)} of {len(order)}"
            new_ids = continuations(model, tokenizer, [prompts[number] for number in batch], settings, label)
            for number, tokens in zip(batch, new_ids, strict=True):
                ids[number] = tokens

    return ids


def _judged(question: Question, ids: list[int], text: str, max_new_tokens: int, is_chat: bool) -> WrittenAnswer:
    """Return an answer with its figures. If a base model continues an opening, only the first line is judged.

    Args:
        question: The question.
        ids: The token ids of the answer.
        text: The text of the answer.
        max_new_tokens: The maximum number of tokens in an answer.
        is_chat: Whether the model was asked by messages.
    """
    text_to_match = text.strip()
    if is_chat:
        match = question.pattern.search(text_to_match)
    else:
        first_line = text_to_match.partition("\n")[0].strip()
        match = question.continuation_pattern.search(first_line)

    runs = Counter(tuple(ids[start : start + RUN_TOKENS]) for start in range(len(ids) - RUN_TOKENS + 1))
    loops = max(runs.values(), default=0) > MAX_REPEATS
    stopped = len(ids) < max_new_tokens
    return WrittenAnswer(text, match is not None, loops, stopped, len(ids), ids)


def answer_divergence(
    dense: PreTrainedModel,
    model: PreTrainedModel,
    parts: TokenAlignment,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[WrittenAnswer],
) -> float:
    """Return the mean KL(dense‖model) in nats per token of the original model's answers.

    Args:
        dense: The original model.
        model: The pruned model.
        parts: The tokens of the original model as parts of the pruned model's tokens.
        prompts: The token ids of each prompt.
        answers: The answers of the original model.
    """
    rows = []
    labels = []
    for prompt, answer in zip(prompts, answers, strict=True):
        if answer.ids:
            rows.append(torch.tensor(list(prompt) + answer.ids))
            labels.append(torch.tensor([IGNORED] * len(prompt) + answer.ids))

    if not rows:
        return 0.0
    measured = measure(model, Text(rows, labels=labels), dense, parts)
    return float(torch.cat(measured.kl).mean())


def answers_result(
    questions: Sequence[Question], answers: Mapping[str, Sequence[WrittenAnswer]], tokenizer: PreTrainedTokenizerBase
) -> AnswersResult:
    """Return questions with the answers of each model, without token ids.

    Args:
        questions: The questions.
        answers: The answers to these questions by the name of the model.
        tokenizer: The tokenizer of the first model.
    """
    answered_questions = []
    for number, question in enumerate(questions):
        answers_by_model = {name: model_answers[number].record() for name, model_answers in answers.items()}
        answered_questions.append(AnsweredQuestion(question.kind, question.text(tokenizer), answers_by_model))
    return AnswersResult(answered_questions)


class ShortCheck:
    """Asks the models of a run the same few questions.

    Args:
        tokenizer: The tokenizer of the model that is asked next.
        tokens: The number of tokens that the run reads. With fewer than `SHORT_CHECK_MIN_READ`, nothing is asked.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tokens: int):
        self.tokenizer = tokenizer
        self.questions: list[Question] = []
        if tokens >= SHORT_CHECK_MIN_READ:
            self.questions = read_questions(tokenizers=[tokenizer])[:SHORT_CHECK_QUESTIONS]
        self._answers: dict[str, list[WrittenAnswer]] = {}

    def ask(self, name: str, model: PreTrainedModel) -> None:
        """Ask one model. An error only causes a warning, and no other model is asked.

        Args:
            name: The name of the model.
            model: The model. If it does not predict the next token, it is not asked.
        """
        if not self.questions or not predicts_next(model):
            return

        try:
            self._answers[name] = ask(model, self.tokenizer, self.questions, SHORT_CHECK_TOKENS)
        except Exception as error:
            # A run of hours must not fail because of a few answers.
            self.questions = []
            # A model with too few positions needs no warning.
            if not isinstance(error, StructPruneError):
                warn(f"There are no answers of the {name} model: {one_line(error)}")

    def result(self, earlier: AnswersResult | None = None) -> AnswersResult | None:
        """Return the answers of all models, or None if none was asked.

        Args:
            earlier: The answers of an earlier run. They come first if its questions are the same.
        """
        if not self.questions or not self._answers:
            return None

        result = answers_result(self.questions, self._answers, self.tokenizer)
        if earlier is None or _prompts(earlier) != _prompts(result):
            return result

        for earlier_question, question in zip(earlier.questions, result.questions, strict=True):
            answers = dict(earlier_question.answers)
            answers.update(question.answers)
            question.answers = answers
        return result


def _prompts(answers: AnswersResult) -> list[str]:
    """Return the prompts of answered questions."""
    return [question.prompt for question in answers.questions]
