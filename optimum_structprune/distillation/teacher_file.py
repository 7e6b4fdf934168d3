"""Train from a teacher file, without the teacher in memory."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from os.path import commonprefix
from pathlib import Path
from sys import maxsize
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..arch.meta import meta_model
from ..domains.manifest import tokenizer_of
from ..measure.predictions import Predictor, StoredPredictions
from ..system.errors import StructPruneError
from ..system.fingerprint import vocabulary_hash
from ..system.stored import DamagedError, open_tensors
from ..vocabulary.token_alignment import TokenAlignment
from .teacher import loading_errors, tokens_of_teacher
from .teacher_file_format import TEACHER_FILE_NAME, TEACHER_NAME, TeacherManifest, predictions_of, shard_name


class TeacherFile:
    """A teacher file that is open for reading. Its tensors are memory-mapped.

    Args:
        folder: The folder.

    Raises:
        StructPruneError: If the folder holds no complete teacher file, or a shard is damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = TeacherManifest.load(self.folder)

        identity = self.manifest.sha256
        self._shards: list[Any] = []
        tokens: list[Tensor] = []
        # The shard of each row, its first prediction in the shard, and its first and last token in the file.
        self._rows: list[tuple[int, int, int, int]] = []
        for number, count in enumerate(self.manifest.shards):
            file = self._open(number, identity)
            lengths = file.get_tensor("lengths").tolist()
            if len(lengths) != count:
                raise StructPruneError(f"{self.folder / shard_name(number)} is damaged. Write the teacher file again.")
            self._shards.append(file)
            tokens.append(file.get_tensor("input_ids"))

            first = 0
            start = sum(map(len, tokens[:-1]))
            for length in lengths:
                self._rows.append((number, first, start, start + length))
                first += length - 1
                start += length

        self._tokens = torch.cat(tokens).numpy()
        # A sorted list finds the row that begins with the tokens of a document.
        self._sorted = sorted(range(len(self._rows)), key=self.tokens)

    def _open(self, number: int, identity: str) -> Any:
        path = self.folder / shard_name(number)
        try:
            file, settings = open_tensors(path)
        except DamagedError as error:
            raise StructPruneError(f"{error} Write the teacher file again.") from error
        if settings != identity:
            raise StructPruneError(f"{path} belongs to another teacher file than {TEACHER_FILE_NAME}. Write it again.")
        return file

    def tokens(self, row: int) -> list[int]:
        """Return the token ids of a row."""
        _, _, start, end = self._rows[row]
        return self._tokens[start:end].tolist()

    def predictions(self, ids: Sequence[int]) -> StoredPredictions:
        """Return the predictions after each token of a document but the last.

        Args:
            ids: The document, which is a row of the file or the beginning of a row.

        Raises:
            StructPruneError: If no row begins with the document.
        """
        ids = list(ids)
        place = bisect_left(self._sorted, ids, key=self.tokens)
        candidates = self._sorted[max(place - 1, 0) : place + 1]
        if place == len(self._sorted) or self.tokens(self._sorted[place])[: len(ids)] != ids:
            self._refuse(ids, candidates)

        number, first, _, _ = self._rows[self._sorted[place]]
        parts = {}
        for name in self._shards[number].keys():
            if name not in ("input_ids", "lengths"):
                parts[name] = self._shards[number].get_slice(name)[first : first + len(ids) - 1]
        return predictions_of(parts, torch.tensor(ids[1:], dtype=torch.int64), self.manifest)

    def _refuse(self, ids: list[int], candidates: Sequence[int]) -> NoReturn:
        """Raise for a document that is not in the file, with the first difference from the nearest row."""
        longest = -1
        difference = ""
        for row in candidates:
            tokens = self.tokens(row)
            shared = len(commonprefix([ids, tokens]))
            if shared > longest:
                longest = shared
                stored = f"{tokens[shared]}" if shared < len(tokens) else "the end of the row"
                difference = f"its token {shared} is {ids[shared]}, and the nearest row has {stored}"
        raise StructPruneError(
            f"A document of the batch is not in the teacher file {self.folder}: {difference}. Write the file from the "
            "data set of this Trainer, with the same tokenizer, chat template and packing."
        )


class StoredTeacher(Predictor):
    """A teacher whose predictions are in a file. It replaces a `Teacher`.

    Attributes:
        file: The teacher file.
        tokenizer: The tokenizer of the teacher.
        alignment: The spelling of the teacher's tokens if the trained model lacks some of them.
    """

    def __init__(
        self,
        file: TeacherFile,
        tokenizer: PreTrainedTokenizerBase | None = None,
        alignment: TokenAlignment | None = None,
    ):
        self.file = file
        self.model = None  # nothing runs
        self.tokenizer = tokenizer
        self.alignment = alignment

    @property
    def tokens_at_once(self) -> int:
        """Return no limit, because no logits are computed."""
        return maxsize

    def place(self, accelerator: Any) -> None:
        """Do nothing, because no weights are placed."""

    def predict(self, inputs: Mapping[str, Any], positions: Tensor) -> StoredPredictions:  # type: ignore[override]
        """Return the predictions at some positions of a batch; see `Predictor.predict`."""
        documents = list(documents_of(inputs))
        places = torch.cat([flat[:-1] for flat, _ in documents])
        parts = [self.file.predictions(ids) for _, ids in documents]

        stored = replace(
            parts[0],
            ids=torch.cat([part.ids for part in parts]),
            probabilities=torch.cat([part.probabilities for part in parts]),
            negative_entropy=torch.cat([part.negative_entropy for part in parts]),
            losses=torch.cat([part.losses for part in parts]),
        )
        index = torch.zeros(inputs["input_ids"].numel(), dtype=torch.int64)
        index[places] = torch.arange(len(places))
        return stored.at(index[positions.cpu()], positions.device)


def stored_teacher(
    folder: str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    temperature: float = 1.0,
) -> StoredTeacher:
    """Return the teacher of a teacher file for a model.

    Args:
        folder: The folder of the teacher file.
        model: The model that is trained.
        tokenizer: The tokenizer of `model`.
        teacher_tokenizer: The tokenizer of the teacher. By default it is read from the file.
        temperature: The temperature of the training.

    Raises:
        StructPruneError: If the file is not complete, has another temperature, or has tokens that `model` lacks.
    """
    file = TeacherFile(folder)
    manifest = file.manifest
    if manifest.temperature != temperature:
        raise StructPruneError(
            f"{folder} stores the predictions at the temperature {manifest.temperature:g}, and `temperature` is "
            f"{temperature:g}. Pass `temperature={manifest.temperature:g}`, or write another file."
        )

    if not (file.folder / TEACHER_NAME / "config.json").is_file():
        size = model.config.get_text_config().vocab_size
        if size == manifest.vocab_size:
            return StoredTeacher(file, tokenizer)
        raise StructPruneError(
            f"{folder} has predictions of {manifest.vocab_size} tokens, and the model has {size}. Write the file with "
            "the `config` and the `tokenizer` of the teacher."
        )

    with loading_errors(folder):
        teacher = meta_model(AutoConfig.from_pretrained(file.folder / TEACHER_NAME))
    teacher.name_or_path = str(file.folder / TEACHER_NAME)
    if teacher_tokenizer is None and manifest.tokenizer_sha256:
        teacher_tokenizer = tokenizer_of(teacher)
        if teacher_tokenizer is None or vocabulary_hash(teacher_tokenizer) != manifest.tokenizer_sha256:
            raise StructPruneError(f"The tokenizer in {file.folder} is damaged. Write the teacher file again.")
    return StoredTeacher(file, *tokens_of_teacher(teacher, model, tokenizer, teacher_tokenizer))


def documents_of(inputs: Mapping[str, Any]) -> Iterator[tuple[Tensor, list[int]]]:
    """Yield the places of the tokens of each document in a flattened batch, and their ids.

    A document begins where `position_ids` are 0. Padding, and documents of one token, are left out.

    Args:
        inputs: The batch: `input_ids`, shape `(batch, seq_length)`, and `attention_mask` or `position_ids`.
    """
    ids = inputs["input_ids"].cpu()
    is_token = torch.ones_like(ids, dtype=torch.bool)
    mask = inputs.get("attention_mask")
    if mask is not None and mask.shape == ids.shape:
        is_token = mask.cpu().bool()

    starts = torch.zeros_like(ids, dtype=torch.bool)
    positions = inputs.get("position_ids")
    if positions is not None:
        starts = positions.cpu().expand_as(ids) == 0

    for row in range(len(ids)):
        places = is_token[row].nonzero()[:, 0]
        bounds = starts[row, places].nonzero()[:, 0].tolist()
        if not bounds or bounds[0] > 0:
            bounds.insert(0, 0)
        for start, end in pairwise(bounds + [len(places)]):
            document = places[start:end]
            if len(document) > 1:
                yield row * ids.shape[1] + document, ids[row, document].tolist()
