"""Generate greedy answers of a model to questions, judge them, and compare them with the original model's answers."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.generation import continuations, end_tokens
from ..arch.inference import evaluating
from ..arch.meta import check_positions, positions_of, predicts_next
from ..domains.generated import RUN_TOKENS
from ..domains.packing import prompt_ids
from ..domains.templates import question_messages, read_lines
from ..measure.batches import IGNORED
from ..measure.losses import measure
from ..measure.text import Text
from ..record.figures import ORIGINAL, Answer, AnsweredQuestion, AnswersResult, Reading
from ..system.codec import from_plain, to_plain
from ..system.errors import StructPruneError, one_line, warn
from ..system.fingerprint import fingerprint, json_hash, vocabulary_hash
from ..system.stages import stage
from ..system.stored import TextCache


BUILTIN_QUESTIONS = "builtin"
QUESTIONS = Path(__file__).with_name("questions.jsonl")
GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "use_cache": True}
# An answer loops if the same run of `RUN_TOKENS` tokens occurs more often than this.
MAX_REPEATS = 3
# The form of a line in a file of questions, for an error.
FORM = 'is not a question: it needs a "prompt" or "messages", and in "right" a regular expression ("" accepts all)'
# The minimum number of answers that are generated together.
MIN_BATCH = 32
# The short check of `prune` and `recover` asks the first questions, two of each kind, because the kinds take turns. A
# run that reads fewer tokens than SHORT_CHECK_MIN_READ asks none, because answers would take most of its time.
SHORT_CHECK_QUESTIONS = 32
SHORT_CHECK_TOKENS = 64
SHORT_CHECK_MIN_READ = 4_096


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

    def is_right(self, text: str, is_chat: bool) -> bool:
        """Return whether an answer is right. If a base model continues an opening, only the first line is judged.

        Args:
            text: The answer.
            is_chat: Whether the model was asked by messages.
        """
        text = text.strip()
        if is_chat:
            return self.pattern.search(text) is not None
        first_line = text.partition("\n")[0].strip()
        return self.continuation_pattern.search(first_line) is not None


def read_questions(
    source: str | Path = BUILTIN_QUESTIONS, tokenizers: Iterable[PreTrainedTokenizerBase] = ()
) -> list[Question]:
    """Read the questions of a file, or the built-in ones.

    If a tokenizer has no chat template, only the questions with an opening are returned.

    Args:
        source: A file with a question in each line of JSON, or "builtin".
        tokenizers: The tokenizers of the models that are asked.

    Raises:
        StructPruneError: If the file cannot be read, a line is not a question, or there are no questions.
    """
    path = QUESTIONS if source == BUILTIN_QUESTIONS else Path(source)
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
    is_original: bool = False,
) -> list[Answer]:
    """Return the greedy answers of a model.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        questions: The questions.
        max_new_tokens: The maximum number of tokens in an answer.
        batch_size: The number of answers that are generated together.
        is_original: Whether later runs ask this model too. Its answers are cached, and have its own predictions.

    Raises:
        StructPruneError: If the model has too few positions.
    """
    prompts = [question.ids(tokenizer) for question in questions]
    check_positions(model, max_new_tokens, f"max_new_tokens={max_new_tokens}", max(map(len, prompts)))

    cache = None
    cached: dict[str, Answer] = {}
    if is_original:
        cache = _cache(model, tokenizer, max_new_tokens)
        cached = {name: from_plain(Answer, values) for name, values in cache.read().items()}
    names = [json_hash(prompt) for prompt in prompts]
    missing = [number for number, name in enumerate(names) if name not in cached]

    new_questions = [questions[number] for number in missing]
    new_prompts = [prompts[number] for number in missing]
    all_ids = _continued(model, tokenizer, new_prompts, max_new_tokens, batch_size)
    texts = tokenizer.batch_decode(all_ids, skip_special_tokens=True)
    new_answers = []
    for ids, text in zip(all_ids, texts, strict=True):
        new_answers.append(_answer(ids, text, max_new_tokens))
    if is_original:
        read_answers(model, tokenizer, new_questions, new_answers, new_answers)

    for number, answer in zip(missing, new_answers, strict=True):
        cached[names[number]] = answer
        if cache is not None:
            # A cache that cannot be written saves no time, and changes no answer.
            with suppress(StructPruneError):
                cache.add(names[number], to_plain(answer))

    answers = []
    for question, name in zip(questions, names, strict=True):
        is_right = question.is_right(cached[name].text, bool(tokenizer.chat_template))
        answers.append(replace(cached[name], right=is_right))
    return answers


def _cache(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> TextCache:
    """Return the cache of the greedy answers of a model, by the hash of the prompt."""
    settings = [vocabulary_hash(tokenizer), end_tokens(model, tokenizer), max_new_tokens]
    return TextCache("greedy", fingerprint(model), *settings)


@torch.no_grad()
def read_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    originals: Sequence[Answer],
    answers: Sequence[Answer],
) -> None:
    """Enter the predictions of a model along the original model's answers, from one forward pass.

    The tokenizer of the model spells the answers, so a model with another vocabulary can be measured too.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        questions: The questions.
        originals: The answers of the original model.
        answers: The answers of the model, which get the predictions.
    """
    rows = []
    labels = []
    read: list[Answer] = []
    for question, original, answer in zip(questions, originals, answers, strict=True):
        ids = tokenizer(original.text, add_special_tokens=False, verbose=False)["input_ids"]
        prompt = question.ids(tokenizer)
        if ids and len(prompt) + len(ids) <= positions_of(model):
            rows.append(torch.tensor(prompt + ids))
            labels.append(torch.tensor([IGNORED] * len(prompt) + ids))
            read.append(answer)
    if not rows:
        return

    measured = measure(model, Text(rows, labels=labels))
    for answer, losses, misses in zip(read, measured.loss, measured.misses, strict=True):
        num_tokens = len(losses)
        places = misses.nonzero()[:, 0].tolist()
        first = places[0] if places else num_tokens
        answer.reading = Reading(num_tokens, num_tokens - len(places), first, -float(losses.sum()))


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


def _answer(ids: list[int], text: str, max_new_tokens: int) -> Answer:
    """Return an answer that is not judged yet, from its token ids and its text."""
    runs = Counter(tuple(ids[start : start + RUN_TOKENS]) for start in range(len(ids) - RUN_TOKENS + 1))
    loops = max(runs.values(), default=0) > MAX_REPEATS
    return Answer(text, right=False, loops=loops, stopped=len(ids) < max_new_tokens, tokens=len(ids))


def answers_result(
    questions: Sequence[Question], answers: Mapping[str, Sequence[Answer]], tokenizer: PreTrainedTokenizerBase
) -> AnswersResult:
    """Return questions with the answers of each model.

    Args:
        questions: The questions.
        answers: The answers to these questions by the name of the model.
        tokenizer: The tokenizer of the first model.
    """
    answered_questions = []
    for number, question in enumerate(questions):
        answers_by_model = {name: model_answers[number] for name, model_answers in answers.items()}
        answered_questions.append(AnsweredQuestion(question.kind, question.text(tokenizer), answers_by_model))
    return AnswersResult(answered_questions)


class ShortCheck:
    """Asks the models of a run the same few questions.

    Args:
        tokenizer: The tokenizer of the model that is asked next.
        tokens: The number of tokens that the run reads. With fewer than `SHORT_CHECK_MIN_READ`, nothing is asked.
        earlier: The answers of an earlier run. They come first if its questions are the same.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tokens: int, earlier: AnswersResult | None = None):
        self.tokenizer = tokenizer
        self.questions: list[Question] = []
        if tokens >= SHORT_CHECK_MIN_READ:
            self.questions = read_questions(tokenizers=[tokenizer])[:SHORT_CHECK_QUESTIONS]
        self._answers: dict[str, list[Answer]] = {}

        prompts = [question.text(tokenizer) for question in self.questions]
        if earlier is not None and [question.prompt for question in earlier.questions] == prompts:
            for name in earlier.models:
                self._answers[name] = [question.answers[name] for question in earlier.questions]

    def ask(self, name: str, model: PreTrainedModel) -> None:
        """Ask one model. An error only causes a warning, and no other model is asked.

        Args:
            name: The name of the model.
            model: The model. If it does not predict the next token, it is not asked.
        """
        if not self.questions or not predicts_next(model):
            return

        try:
            is_original = name == ORIGINAL
            answers = ask(model, self.tokenizer, self.questions, SHORT_CHECK_TOKENS, is_original=is_original)
            if ORIGINAL in self._answers:
                read_answers(model, self.tokenizer, self.questions, self._answers[ORIGINAL], answers)
            self._answers[name] = answers
        except Exception as error:
            # A run of hours must not fail because of a few answers.
            self.questions = []
            # A model with too few positions needs no warning.
            if not isinstance(error, StructPruneError):
                warn(f"There are no answers of the {name} model: {one_line(error)}")

    def result(self) -> AnswersResult | None:
        """Return the answers of all models, or None if none was asked."""
        if not self.questions or not self._answers:
            return None
        return answers_result(self.questions, self._answers, self.tokenizer)
