"""Keep the samples of a recovery with the teacher's predictions on them, so that later recoveries need no teacher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel

from ..config.fields import read_json
from ..config.pruning import StructPruneConfig
from ..config.recovery import RecoveryConfig
from ..distillation.teacher import SameModelError
from ..distillation.teacher_file_format import TEACHER_FILE_NAME, TeacherManifest, is_teacher_file
from ..domains.manifest import Entry, Manifest
from ..domains.unseen import UnseenText
from ..measure.batches import IGNORED, Sample
from ..system.codec import from_plain
from ..system.disk import Output, used_paths, write_errors
from ..system.errors import StructPruneError
from ..system.fingerprint import file_hash, fingerprint, json_hash
from ..system.processes import rank_zero_first
from ..system.stored import DamagedError, open_tensors, write_tensors
from ..system.written import Record
from .resume import differences
from .text import text_config
from .training_data import RecoveryData


RECORD_NAME = "recovery_samples.json"
SAMPLES_NAME = "recovery_samples.safetensors"
TRAINING_NAME = "training"


@dataclass
class SampleRecord(Record):
    """The description of the samples in a teacher cache.

    Attributes:
        settings: The settings that the samples depend on.
        teacher: The hash of the teacher's files; empty for a teacher in memory.
        kinds: The kinds of measured text.
        validation: The kinds that compare checkpoints.
        unseen_source: The source of the unseen text.
        entries: The entries of the text in a manifest.
    """

    settings: dict[str, Any]
    teacher: str
    kinds: list[str]
    validation: list[str]
    unseen_source: str
    entries: list[Entry]


class StoredSamples(IterableDataset[Sample]):
    """Samples in a safetensors file, whose tensors are memory-mapped.

    Args:
        file: The open file.
        name: The prefix of the names of the tensors.
    """

    def __init__(self, file: Any, name: str):
        self.columns = [file.get_slice(f"{name}.{column}") for column in ("ids", "starts", "counts")]
        self.num_samples, self.seq_length = self.columns[0].get_shape()

    def __iter__(self) -> Iterator[Sample]:
        for number in range(self.num_samples):
            ids, starts, counts = (column[number] for column in self.columns)
            places = torch.arange(len(ids))
            first_places = (places * starts).cummax(0).values
            yield {
                "input_ids": ids.tolist(),
                "position_ids": (places - first_places).tolist(),
                "labels": ids.where(counts, IGNORED).tolist(),
            }


def _tensors_of(samples: Sequence[Sample], name: str) -> dict[str, Tensor]:
    """Return the tensors of samples of one length."""
    labels = torch.tensor([sample["labels"] for sample in samples])
    positions = torch.tensor([sample["position_ids"] for sample in samples])
    return {
        f"{name}.ids": torch.tensor([sample["input_ids"] for sample in samples], dtype=torch.int32),
        f"{name}.starts": positions == 0,
        f"{name}.counts": labels != IGNORED,
    }


class CachedData:
    """The data of a recovery in a teacher cache. It has the attributes of `RecoveryData` that a training uses."""

    def __init__(self, folder: Path, record: SampleRecord):
        try:
            file, settings = open_tensors(folder / SAMPLES_NAME)
            if settings != json_hash(record.to_dict()):
                raise DamagedError(f"{folder / RECORD_NAME} is damaged.")
        except DamagedError as error:
            raise StructPruneError(f"{error} Remove {folder}, and write it again.") from error

        self.stream = StoredSamples(file, TRAINING_NAME)
        self.measured = {kind: list(StoredSamples(file, f"measured.{kind}")) for kind in record.kinds}
        self.validation = list(chain.from_iterable(self.measured[kind] for kind in record.validation))
        self.unseen = UnseenText(record.unseen_source)
        self.entries = record.entries
        self.seq_length = self.stream.seq_length

    def documents(self) -> list[Sample]:
        """Return all samples, whose documents the teacher reads."""
        samples = list(self.stream)
        for measured in self.measured.values():
            samples += measured
        return samples


class TeacherCache:
    """A folder with the samples of a recovery, and the teacher's predictions on them.

    Args:
        folder: The folder.
        settings: The settings that the samples depend on; see `sample_settings`.

    Raises:
        StructPruneError: If the folder holds a model, another teacher file, or samples of other settings.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]):
        self.folder = Path(folder)
        self.settings = dict(settings)
        self.record: SampleRecord | None = None

        path = self.folder / RECORD_NAME
        if path.is_file():
            self.record = from_plain(SampleRecord, read_json(path), str(path))
            different = differences(self.record.settings, self.settings)
            if different:
                raise StructPruneError(
                    f"{folder} holds a teacher for another training: {'; '.join(different)}. Choose another folder, "
                    "or use the same settings."
                )
        elif is_teacher_file(folder) or (self.folder / "config.json").is_file():
            raise StructPruneError(
                f"{folder} holds a model, or a teacher file for other text. Choose another folder for the teacher "
                "cache."
            )

    @property
    def is_complete(self) -> bool:
        """Return whether the folder has all predictions."""
        return self.record is not None and (self.folder / TEACHER_FILE_NAME).is_file()

    @property
    def data(self) -> CachedData:
        """Return the samples."""
        assert self.record is not None
        return CachedData(self.folder, self.record)

    def check_teacher(self, teacher: PreTrainedModel | str | Path | None) -> None:
        """Raise `StructPruneError` if the predictions are those of another teacher."""
        if teacher is None or self.record is None:
            return

        if isinstance(teacher, (str, Path)):
            is_same = self.record.teacher == teacher_hash(teacher)
        else:
            is_same = not self.is_complete or TeacherManifest.load(self.folder).teacher_sha256 == fingerprint(teacher)
        if not is_same:
            raise StructPruneError(
                f"{self.folder} holds the predictions of another teacher. Choose another folder for the teacher cache."
            )

    def save(self, data: RecoveryData, teacher: str) -> None:
        """Save the samples of a recovery, in the first process.

        Args:
            data: The samples.
            teacher: The hash of the teacher's files; see `teacher_hash`.

        Raises:
            StructPruneError: If the folder cannot be written.
        """
        measured = {kind: samples for kind, samples in data.measured.items() if samples}
        self.record = SampleRecord(
            settings=self.settings,
            teacher=teacher,
            kinds=list(measured),
            validation=[kind for kind, samples in measured.items() if samples[0] in data.validation],
            unseen_source=data.unseen.source,
            entries=[],
        )
        tensors = _tensors_of(list(data.stream), TRAINING_NAME)
        for kind, samples in measured.items():
            tensors.update(_tensors_of(samples, f"measured.{kind}"))
        self.record.entries = data.entries  # all documents have been read now

        with rank_zero_first("the teacher cache") as first, write_errors(self.folder):
            if first:
                Output(self.folder).check_place(sum(tensor.nbytes for tensor in tensors.values()))
                self.folder.mkdir(parents=True, exist_ok=True)
                write_tensors(self.folder / SAMPLES_NAME, tensors, json_hash(self.record.to_dict()))
                self.record.save(self.folder / RECORD_NAME)


def sample_settings(
    config: RecoveryConfig, pruning: StructPruneConfig, seq_length: int, earlier: Manifest | None
) -> dict[str, Any]:
    """Return the settings that the samples of a recovery depend on, as plain values.

    Args:
        config: The config of the recovery.
        pruning: The config of the pruning.
        seq_length: The number of tokens in a sample.
        earlier: The text that the pruned model has seen.
    """
    text = text_config(config, pruning, seq_length)
    domains = text.domains or []
    contents: list[Any] = []
    for domain in domains:
        if isinstance(domain.source, list):
            contents.append(json_hash(list(map(str, domain.source))))
    for name in used_paths(RecoveryConfig(domains=domains, prompts=config.prompts, validation=config.validation)):
        contents += [file_hash(path) for path in sorted([Path(name), *Path(name).rglob("*")]) if path.is_file()]

    values: dict[str, Any] = {"domains": [domain.to_dict() for domain in domains], "text_sha256": json_hash(contents)}
    for name in ("tokens", "answer_share", "prompts", "validation"):
        values[name] = getattr(config, name)
    values["seq_length"] = seq_length
    values["pruning_seed"] = text.seed
    uses = {} if earlier is None else earlier.uses()
    values["calibration_text_sha256"] = json_hash(uses)
    return values


def check_other_files(folder: Any, teacher: Any) -> None:
    """Raise `StructPruneError` if a teacher is in the folder of the trained model, or has the same weights."""
    if not isinstance(folder, (str, Path)) or not isinstance(teacher, (str, Path)):
        return
    sizes = []
    for name in (folder, teacher):
        sizes.append(sorted(file.stat().st_size for file in Path(name).glob("*.safetensors")))
    if str(folder) == str(teacher) or (sizes[0] == sizes[1] and teacher_hash(folder) == teacher_hash(teacher)):
        raise SameModelError


def teacher_hash(teacher: PreTrainedModel | str | Path) -> str:
    """Return a hash of the weights in the folder of a teacher, or the id of a teacher on the Hub."""
    if not isinstance(teacher, (str, Path)):
        return ""
    files = sorted(Path(teacher).glob("*.safetensors"))
    if not files:
        return str(teacher)
    return json_hash([file_hash(file) for file in files])
