"""What a model has answered, item by item, in a file that outlives the run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import StructPruneError
from ..plain_json import FORMAT_VERSION
from ..system.fingerprint import fingerprint, vocabulary_hash


# The log-likelihood of a choice, and whether it is what the model would have written itself.
Answer = tuple[float, bool]


class ItemFile:
    """The log-likelihoods that one model has given to the choices of items, one item per line of JSON.

    Each line is written as soon as its item is finished. So a run that was killed goes on at the next item, and a
    later run with other tasks or another model to compare with computes only what is not there.

    Attributes:
        path: The file.
    """

    def __init__(self, folder: str | Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        # The tokenizer decides what is asked, so it is part of the name.
        both = sha256(f"{fingerprint(model)} {vocabulary_hash(tokenizer)}".encode()).hexdigest()
        self.path = Path(folder) / f"{both[:16]}.jsonl"
        self._answers: dict[str, list[Answer]] = {}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                self._read()
            else:
                self._append({"format_version": FORMAT_VERSION, "model": model.name_or_path, "fingerprint": both})
        except OSError as error:
            raise StructPruneError(f"The items in {self.path} cannot be kept: {error.strerror or error}.") from error

    def get(self, context: str, choices: Sequence[str]) -> list[Answer] | None:
        """The answers to an item, one for each choice; None where there are none yet."""
        return self._answers.get(_key(context, choices))

    def add(self, label: tuple[str, int], context: str, choices: Sequence[str], answers: Sequence[Answer]) -> None:
        """Keep the answers to an item."""
        key = _key(context, choices)
        self._answers[key] = list(answers)
        likelihoods, greedy = zip(*answers, strict=True)
        task, item = label
        self._append({"task": task, "item": item, "sha256": key, "loglikelihood": likelihoods, "greedy": greedy})

    def _append(self, line: dict) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _read(self) -> None:
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # a kill has cut the last line
            self.path.write_text(whole, encoding="utf-8")
        for number, line in enumerate(whole.splitlines()[1:], start=2):
            try:
                found = json.loads(line)
                pairs = zip(found["loglikelihood"], found["greedy"], strict=True)
                self._answers[found["sha256"]] = [(float(value), bool(greedy)) for value, greedy in pairs]
            except (ValueError, KeyError, TypeError) as error:
                raise StructPruneError(
                    f"{self.path}, line {number}, holds no answers to an item; remove the file to score anew."
                ) from error


def _key(context: str, choices: Sequence[str]) -> str:
    return sha256(json.dumps([context, *choices]).encode()).hexdigest()
