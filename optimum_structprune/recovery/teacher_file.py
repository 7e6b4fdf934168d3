"""Store the predictions of a teacher on disk, and train from them without the teacher in memory.

A teacher file is a folder with a manifest and safetensors shards. Each position holds the most probable tokens with
their log-probabilities, and tokens that are sampled from the rest, which share the probability of the rest. The stored
distribution is an unbiased estimate of the teacher's distribution, so the gradient of the divergence is unbiased too.
Without samples of the rest, the gradient has a systematic error (Anshumann et al., 2025,
https://arxiv.org/abs/2503.16870, section 3).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from os.path import commonprefix
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..config.fields import check_types, read_json
from ..errors import StructPruneError, one_line
from ..system.disk import is_write_error
from ..system.fingerprint import json_hash
from ..system.processes import is_first_rank, shard, wait_for_all
from ..system.stages import progress, say
from ..written import Record


MANIFEST_NAME = "teacher_file.json"
TEACHER_FORMAT = 1
# The number of stored tokens: the most probable ones, and samples of the rest.
TOP = 16
SAMPLES = 16
# A shard holds about this many tokens.
SHARD_TOKENS = 2**18
LOW_BITS = 16


@dataclass
class StoredPredictions:
    """Parts of a teacher's next-token distributions.

    Attributes:
        ids: The ids of the stored tokens, shape `(positions, top + samples)`, int64. Sampled tokens may be repeated.
        probabilities: Their probabilities, of the same shape, fp32. They sum to 1 at each position.
        negative_entropy: The negative entropy of the whole distribution in nats, shape `(positions,)`, fp32.
    """

    ids: Tensor
    probabilities: Tensor
    negative_entropy: Tensor

    def to(self, device: torch.device) -> StoredPredictions:
        """Return the predictions on a device."""
        return StoredPredictions(
            self.ids.to(device, non_blocking=True),
            self.probabilities.to(device, non_blocking=True),
            self.negative_entropy.to(device, non_blocking=True),
        )

    def __getitem__(self, places: slice | Tensor) -> StoredPredictions:
        return StoredPredictions(self.ids[places], self.probabilities[places], self.negative_entropy[places])

    def divergence(self, log_student: Tensor) -> Tensor:
        """Return an unbiased estimate of KL(teacher‖student) in nats, shape `(positions,)`, fp32.

        The entropy of the teacher is exact, and its cross-entropy with the student is estimated:
        `-H(p) - Σ_i p̂_i log q_i` over the stored tokens i.

        Args:
            log_student: The log-probabilities of the student, shape `(positions, vocab)`.
        """
        log_stored = log_student.gather(1, self.ids)
        return self.negative_entropy - (self.probabilities * log_stored).sum(-1)

    def distribution(self, size: int) -> Tensor:
        """Return the stored distribution over all tokens, shape `(positions, size)`, fp32."""
        whole = self.probabilities.new_zeros(len(self.ids), size)
        return whole.scatter_add_(1, self.ids, self.probabilities)


@torch.no_grad()
def compressed(logits: Tensor, top: int, samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return the parts of next-token distributions that a teacher file stores.

    The samples of the rest are systematic: their quantiles have equal distances (Madow, 1949), which has less variance
    than independent samples and is unbiased too.

    Args:
        logits: The logits of the teacher, divided by the temperature, shape `(positions, vocab)`.
        top: The number of the most probable tokens.
        samples: The number of tokens that are sampled from the rest.
        generator: The generator of the samples, on the CPU.

    Returns:
        The ids of the most probable and of the sampled tokens, shape `(positions, top + samples)`; the
        log-probabilities of the most probable tokens, shape `(positions, top)`, fp16; and the negative entropy, shape
        `(positions,)`, fp16.
    """
    log_all = logits.float().log_softmax(-1)
    all_probabilities = log_all.exp()
    negative_entropy = (all_probabilities * log_all).sum(-1)
    log_top, ids = log_all.topk(top, -1)
    log_top = log_top.half()

    if samples:
        rest = all_probabilities.scatter(1, ids, 0.0).double().cumsum(-1)
        offsets = torch.rand(len(rest), 1, generator=generator, dtype=torch.float64).to(rest.device)
        quantiles = (torch.arange(samples, device=rest.device) + offsets) / samples
        sampled = torch.searchsorted(rest, quantiles * rest[:, -1:], right=True)
        ids = torch.cat([ids, sampled.clamp(max=logits.shape[1] - 1)], 1)
    return ids, log_top, negative_entropy.half()


def high_bits(vocab_size: int) -> int:
    """Return the number of bits of a token id above the lower 16, as a divisor of 8."""
    bits = (vocab_size - 1).bit_length() - LOW_BITS
    for size in (0, 1, 2, 4, 8):
        if bits <= size:
            return size
    raise StructPruneError(f"The vocabulary of {vocab_size} tokens is too large for a teacher file.")


def pack_ids(ids: Tensor, bits: int) -> dict[str, Tensor]:
    """Return token ids as their lower 16 bits, and their upper bits packed into bytes.

    Args:
        ids: Token ids, shape `(positions, tokens)`.
        bits: The number of upper bits; see `high_bits`.
    """
    low = (ids & 0xFFFF).to(torch.int32).to(torch.int16)
    if not bits:
        return {"ids": low}

    per_byte = 8 // bits
    high = torch.nn.functional.pad(ids >> LOW_BITS, (0, -ids.shape[1] % per_byte))
    shifts = bits * torch.arange(per_byte)
    packed = (high.unflatten(1, (-1, per_byte)) << shifts).sum(-1)
    return {"ids": low, "ids_high": packed.to(torch.uint8)}


def unpack_ids(tensors: Mapping[str, Tensor], bits: int) -> Tensor:
    """Return the token ids of `pack_ids`, shape `(positions, tokens)`, int64."""
    ids = tensors["ids"].long() & 0xFFFF
    if not bits:
        return ids

    shifts = bits * torch.arange(8 // bits)
    high = (tensors["ids_high"].long()[..., None] >> shifts) & (2**bits - 1)
    return ids | high.flatten(1)[:, : ids.shape[1]] << LOW_BITS


def predictions_of(tensors: Mapping[str, Tensor], bits: int) -> StoredPredictions:
    """Return the predictions in the tensors of a shard, or of a part of it."""
    ids = unpack_ids(tensors, bits)
    probabilities = tensors["log_probabilities"].float().exp()
    num_sampled = ids.shape[1] - probabilities.shape[1]
    if num_sampled:
        # The log-probabilities are rounded, so the rest is what the stored probabilities leave.
        rest = (1 - probabilities.sum(1, keepdim=True)).clamp(min=0) / num_sampled
        probabilities = torch.cat([probabilities, rest.expand(-1, num_sampled)], 1)
    return StoredPredictions(ids, probabilities, tensors["negative_entropy"].float())


@dataclass
class TeacherManifest(Record):
    """The settings of a teacher file.

    Attributes:
        teacher: The id or the folder name of the teacher; empty if it is unknown.
        teacher_sha256: The hash of the teacher's config and weights; empty for rows of another engine.
        tokenizer_sha256: The hash of the teacher's vocabulary; empty without a tokenizer.
        vocab_size: The number of tokens of the teacher.
        text_sha256: The hash of all rows.
        rows: The number of rows.
        tokens: The number of tokens in all rows.
        longest: The number of tokens in the longest row.
        top: The number of the most probable tokens at each position.
        samples: The number of tokens that are sampled from the rest.
        temperature: The temperature of the distributions.
        seed: The seed of the samples.
        shards: The number of rows in each shard.
    """

    teacher: str
    teacher_sha256: str
    tokenizer_sha256: str
    vocab_size: int
    text_sha256: str
    rows: int
    tokens: int
    longest: int
    top: int = TOP
    samples: int = SAMPLES
    temperature: float = 1.0
    seed: int = 0
    shards: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_types(self)

    @property
    def bits(self) -> int:
        """Return the number of bits of a token id above the lower 16."""
        return high_bits(self.vocab_size)

    @property
    def bytes_per_token(self) -> float:
        """Return the bytes of a stored token, with its own id."""
        ids = (self.top + self.samples) * (LOW_BITS + self.bits) / 8
        return ids + 2 * self.top + 2 + 4

    @property
    def sha256(self) -> str:
        """Return the hash of the settings, which every shard repeats."""
        return json_hash(self.to_dict())

    @classmethod
    def load(cls, folder: Path) -> TeacherManifest:
        """Read the manifest of a teacher file.

        Raises:
            StructPruneError: If there is no complete teacher file in the folder.
        """
        path = folder / MANIFEST_NAME
        if not path.is_file():
            reason = "holds no teacher file"
            if (folder / shard_name(0)).is_file():
                reason = "holds a teacher file that is not complete. Run the command that writes it again, which resumes"
            raise StructPruneError(f"{folder} {reason}.")
        try:
            return cls(**read_json(path))
        except TypeError as error:
            raise StructPruneError(f"{path} is no manifest of a teacher file: {one_line(error)}.") from error


def is_teacher_file(folder: Any) -> bool:
    """Return whether a folder holds a teacher file, complete or not."""
    if not isinstance(folder, (str, Path)):
        return False
    return Path(folder, MANIFEST_NAME).is_file() or Path(folder, shard_name(0)).is_file()


def shard_name(number: int) -> str:
    """Return the name of a shard."""
    return f"shard-{number:05}.safetensors"


def rows_of(data: Iterable[Any]) -> list[list[int]]:
    """Return the documents in the rows of a tokenized data set, each once.

    A teacher sees a document from its start, so a packed row is split into its documents.

    Args:
        data: Lists of token ids, or rows with `input_ids`. A packed row has the `seq_lengths` or the `position_ids` of
            its documents, as TRL writes them.

    Raises:
        StructPruneError: If a row has no `input_ids`, or no row has two tokens.
    """
    documents: dict[tuple[int, ...], None] = {}
    for row in data:
        ids: Any = row
        lengths = None
        if isinstance(row, Mapping):
            if "input_ids" not in row:
                raise StructPruneError(f"A row needs `input_ids`, got the columns {', '.join(map(str, row))}.")
            ids = row["input_ids"]
            lengths = row.get("seq_lengths")
            positions = row.get("position_ids")
            if lengths is None and positions is not None:
                lengths = _lengths(positions)

        ids = [int(token) for token in ids]
        start = 0
        for length in lengths or [len(ids)]:
            document = tuple(ids[start : start + length])
            if len(document) > 1:
                documents[document] = None
            start += length

    if not documents:
        raise StructPruneError("The text has no row with two tokens, so a teacher has nothing to predict. Pass more.")
    return [list(document) for document in documents]


def _lengths(positions: Sequence[int]) -> list[int]:
    """Return the number of tokens of each document of a packed row. The positions of each begin at 0."""
    starts = [place for place, position in enumerate(positions) if int(position) == 0 or place == 0]
    return [end - start for start, end in pairwise(starts + [len(positions)])]


def divided(rows: Sequence[Sequence[int]]) -> list[int]:
    """Return the number of rows in each shard of about `SHARD_TOKENS` tokens."""
    shards = []
    num_rows = 0
    num_tokens = 0
    for row in rows:
        num_rows += 1
        num_tokens += len(row)
        if num_tokens >= SHARD_TOKENS:
            shards.append(num_rows)
            num_rows = 0
            num_tokens = 0
    if num_rows:
        shards.append(num_rows)
    return shards


# A function that computes the stored tensors of some rows, in the order of the rows, from a generator of samples.
RowTensors = Callable[[Sequence[Sequence[int]], torch.Generator], dict[str, Tensor]]


def write_shards(folder: Path, manifest: TeacherManifest, rows: Sequence[Sequence[int]], compute: RowTensors) -> None:
    """Write the shards of a teacher file, and its manifest last.

    Complete shards of the same settings are kept, so that a killed run resumes. Each process writes every N-th shard.

    Args:
        folder: The folder of the teacher file.
        manifest: The settings.
        rows: The documents.
        compute: A function that computes the tensors of some rows.

    Raises:
        StructPruneError: If the folder holds another teacher file, or the disk is full.
    """
    identity = manifest.sha256
    starts = [0] + list(accumulate(manifest.shards))
    numbers = [number for number in range(len(manifest.shards)) if not _is_written(folder, number, identity)]
    done = len(manifest.shards) - len(numbers)
    if done:
        say(f"Resuming after {done} of {len(manifest.shards)} shards")

    try:
        for number in progress(shard(numbers), desc="Writing predictions", unit="shard"):
            own_rows = rows[starts[number] : starts[number + 1]]
            generator = torch.Generator().manual_seed(manifest.seed + number)
            tensors = compute(own_rows, generator)
            tensors["input_ids"] = torch.cat([torch.tensor(row, dtype=torch.int32) for row in own_rows])
            tensors["lengths"] = torch.tensor([len(row) for row in own_rows], dtype=torch.int32)

            path = folder / shard_name(number)
            new = path.with_name(f".{path.name}.new")
            save_file(tensors, new, metadata={"settings": identity})
            new.replace(path)
        wait_for_all()
        if is_first_rank():
            manifest.save(folder / MANIFEST_NAME)
    except Exception as error:
        if not is_write_error(error):
            raise
        raise StructPruneError(
            f"{folder} could not be written: {one_line(error)}. Free some space, and run the command again, which "
            "resumes."
        ) from error
    wait_for_all()


def _is_written(folder: Path, number: int, identity: str) -> bool:
    """Return whether a shard is complete. Raise if it has other settings."""
    path = folder / shard_name(number)
    if not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            settings = (file.metadata() or {}).get("settings")
    except SafetensorError:
        return False
    if settings != identity:
        raise StructPruneError(
            f"{folder} holds the predictions of another teacher, or on other text. Choose another folder, or remove it."
        )
    return True


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
            file = safe_open(path, framework="pt")
            settings = (file.metadata() or {}).get("settings")
        except (OSError, SafetensorError) as error:
            raise StructPruneError(f"{path} cannot be read: {one_line(error)}. Write the file again.") from error
        if settings != identity:
            raise StructPruneError(f"{path} belongs to another teacher file than {MANIFEST_NAME}. Write it again.")
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
        return predictions_of(parts, self.manifest.bits)

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


class StoredTeacher:
    """A teacher whose predictions are in a file. It replaces a `Teacher` in the loss of a Trainer.

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
        self.tokenizer = tokenizer
        self.alignment = alignment

    def place(self, accelerator: Any) -> None:
        """Do nothing, because no weights are placed."""

    def predict(self, inputs: Mapping[str, Any], positions: Tensor) -> StoredPredictions:
        """Return the predictions at some positions of a batch; see `Teacher.predict`."""
        documents = list(documents_of(inputs))
        places = torch.cat([flat[:-1] for flat, _ in documents])
        parts = [self.file.predictions(ids) for _, ids in documents]

        stored = StoredPredictions(
            torch.cat([part.ids for part in parts]),
            torch.cat([part.probabilities for part in parts]),
            torch.cat([part.negative_entropy for part in parts]),
        )
        index = torch.full((inputs["input_ids"].numel(),), -1)
        index[places] = torch.arange(len(places))
        return stored[index[positions.cpu()]].to(positions.device)


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
