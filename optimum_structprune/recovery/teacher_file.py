"""Store the predictions of a teacher on disk, and train from them without the teacher in memory.

A teacher file is a folder with a manifest and safetensors shards. Each position holds the most probable tokens with
their log-probabilities, and tokens that are sampled from the rest, which share the probability of the rest. The stored
distribution is an unbiased estimate of the teacher's distribution, so the gradient of the divergence is unbiased too.
Without samples of the rest, the gradient has a systematic error (Anshumann et al., 2025,
https://arxiv.org/abs/2503.16870, section 3).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import nlargest
from itertools import accumulate, pairwise
from math import nan
from operator import itemgetter
from os.path import commonprefix
from pathlib import Path
from sys import maxsize
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..arch.inference import evaluating
from ..arch.load import describe
from ..arch.meta import check_positions, meta_model, predicts_next
from ..config.domains import CHAT, DomainConfig
from ..config.fields import read_json
from ..domains.manifest import tokenizer_of
from ..domains.sources import documents
from ..measure.losses import batches_of, predicted
from ..measure.predictions import Predictor, StoredPredictions, tokens_per_pass
from ..measure.text import Text
from ..system.codec import from_plain
from ..system.disk import Output, write_errors
from ..system.errors import StructPruneError, one_line
from ..system.fingerprint import fingerprint, json_hash, vocabulary_hash
from ..system.processes import is_first_rank, shard, wait_for_all
from ..system.stages import progress, readable_size, say, stage
from ..system.written import Record, without_folders
from ..vocabulary.token_alignment import TokenAlignment
from .teacher import check_weights, tokens_of_teacher


TEACHER_FILE_NAME = "teacher_file.json"
# The folder inside with the config and the tokenizer of the teacher.
TEACHER_NAME = "teacher"
MAX_SAMPLES = 1024
# The number of stored tokens: the most probable ones, and samples of the rest.
TOP = 16
SAMPLES = 16
# A shard holds about this many tokens.
SHARD_TOKENS = 2**18
LOW_BITS = 16


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
        `(positions,)`, fp32.
    """
    log_all = logits.float().log_softmax(-1)
    all_probabilities = log_all.exp()
    log_top, ids = log_all.topk(min(top, logits.shape[1]), -1)

    rest = all_probabilities.scatter(1, ids, 0.0).double().cumsum(-1)
    offsets = torch.rand(len(rest), 1, generator=generator, dtype=torch.float64).to(rest.device)
    quantiles = (torch.arange(samples, device=rest.device) + offsets) / samples
    sampled = torch.searchsorted(rest, quantiles * rest[:, -1:], right=True)
    ids = torch.cat([ids, sampled.clamp(max=logits.shape[1] - 1)], 1)
    return ids, log_top.half(), (all_probabilities * log_all).sum(-1)


def high_bits(vocab_size: int) -> int:
    """Return the number of bits of a token id above the lower 16, as a divisor of 8."""
    bits = (vocab_size - 1).bit_length() - LOW_BITS
    for size in (0, 1, 2, 4, 8):
        if bits <= size:
            return size
    raise StructPruneError(f"The vocabulary of {vocab_size} tokens is too large for a teacher file.")


def bytes_per_token(vocab_size: int, top: int = TOP, samples: int = SAMPLES) -> float:
    """Return the bytes of a stored token: ids, log-probabilities, the entropy, and its own loss and id."""
    ids = (top + samples) * (LOW_BITS + high_bits(vocab_size)) / 8
    return ids + 2 * top + 4 + 2 + 4


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


def predictions_of(tensors: Mapping[str, Tensor], targets: Tensor, manifest: TeacherManifest) -> StoredPredictions:
    """Return the predictions in the tensors of a shard, or of a part of it.

    Args:
        tensors: The stored tensors.
        targets: The token of the text at each position, shape `(positions,)`, int64.
        manifest: The settings of the file.
    """
    ids = unpack_ids(tensors, high_bits(manifest.vocab_size))
    probabilities = tensors["log_probabilities"].float().exp()
    losses = tensors["losses"].float()
    has_rest = not manifest.samples
    if not has_rest:
        # The loss is the exact log-probability of the text's own token, so it replaces a sample of this token.
        is_target = ids == targets[:, None]
        own = (-losses).exp()[:, None]
        top = probabilities.masked_fill(is_target[:, : probabilities.shape[1]], 0)

        is_other = ~is_target[:, probabilities.shape[1] :]
        rest = (1 - top.sum(1, keepdim=True) - own).clamp(min=0)
        sampled = is_other * rest / is_other.sum(1, keepdim=True).clamp(min=1)

        ids = torch.cat([ids, targets[:, None]], 1)
        probabilities = torch.cat([top, sampled, own], 1)
    return StoredPredictions(ids, probabilities, tensors["negative_entropy"], losses, manifest.vocab_size, has_rest)


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

    @property
    def bytes_per_token(self) -> float:
        """Return the bytes of a stored token."""
        return bytes_per_token(self.vocab_size, self.top, self.samples)

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
        path = folder / TEACHER_FILE_NAME
        if not path.is_file():
            reason = "holds no teacher file. Write one with `structprune teacher`, or check the path"
            if any(folder.glob("shard-*.safetensors")):
                reason = "holds a teacher file that is not complete. Run the same command again, which resumes"
            raise StructPruneError(f"{folder} {reason}.")
        return from_plain(cls, read_json(path), str(path))


def is_teacher_file(folder: Any) -> bool:
    """Return whether a folder holds a teacher file, complete or not.

    Raises:
        StructPruneError: If it holds a model too.
    """
    if not isinstance(folder, (str, Path)) or not Path(folder).is_dir():
        return False
    is_file = Path(folder, TEACHER_FILE_NAME).is_file() or any(Path(folder).glob("shard-*.safetensors"))
    if is_file and Path(folder, "config.json").is_file():
        raise StructPruneError(f"{folder} holds both a model and a teacher file. Move one of them to another folder.")
    return is_file


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


def text_rows(domains: Iterable[DomainConfig], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[list[int]]:
    """Return the token ids of the documents of domains, as TRL's `SFTTrainer` tokenizes them.

    A text ends with the token that ends a sequence, and a conversation is written by the chat template.

    Args:
        domains: The sources.
        tokenizer: The tokenizer.
        max_length: The maximum number of tokens of a document.
    """
    rows = []
    for domain in domains:
        is_chat = domain.template == CHAT
        for text in documents(domain, None, tokenizer):
            if not is_chat and tokenizer.eos_token and not text.endswith(tokenizer.eos_token):
                text += tokenizer.eos_token
            ids = tokenizer(text, add_special_tokens=not is_chat, truncation=True, max_length=max_length)["input_ids"]
            rows.append(ids)
    return rows


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


def check_ids(rows: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Raise `StructPruneError` if a teacher lacks a token of the text."""
    largest = max(map(max, rows))
    if largest >= vocab_size:
        raise StructPruneError(
            f"The text has the token id {largest}, and the teacher has {vocab_size} tokens. Tokenize it with the "
            "tokenizer of the teacher."
        )


def _manifest(
    rows: Sequence[Sequence[int]], vocab_size: int, tokenizer: PreTrainedTokenizerBase | None
) -> TeacherManifest:
    """Return the manifest of a text, without the settings of the predictions."""
    return TeacherManifest(
        teacher="",
        teacher_sha256="",
        tokenizer_sha256="" if tokenizer is None else vocabulary_hash(tokenizer),
        vocab_size=vocab_size,
        text_sha256=json_hash(rows),
        rows=len(rows),
        tokens=sum(map(len, rows)),
        longest=max(map(len, rows)),
        shards=divided(rows),
    )


# A function that computes the stored tensors of some rows, in the order of the rows, from a generator of samples.
RowTensors = Callable[[Sequence[Sequence[int]], torch.Generator], dict[str, Tensor]]


def write_shards(
    folder: Path,
    manifest: TeacherManifest,
    rows: Sequence[Sequence[int]],
    compute: RowTensors,
    teacher: Sequence[Any] = (),
) -> None:
    """Write the shards of a teacher file, and its manifest last.

    Complete shards of the same settings are kept, so that a killed run resumes. Each process writes every N-th shard.

    Args:
        folder: The folder of the teacher file.
        manifest: The settings.
        rows: The documents.
        compute: A function that computes the tensors of some rows.
        teacher: The config and the tokenizer of the teacher, or None for an unknown one.

    Raises:
        StructPruneError: If the folder holds another teacher file or a model, or the disk is too small.
    """
    identity = manifest.sha256
    size = round(manifest.tokens * manifest.bytes_per_token)
    is_teacher_file(folder)
    if (folder / "config.json").is_file():
        raise StructPruneError(f"{folder} holds a model. Choose another folder for the teacher file.")
    Output(folder).check_place(size)
    folder.mkdir(parents=True, exist_ok=True)
    say(f"{manifest.tokens:,} tokens in {manifest.rows:,} rows take {readable_size(size)}")
    starts = [0] + list(accumulate(manifest.shards))
    numbers = [number for number in range(len(manifest.shards)) if not _is_written(folder, number, identity)]
    done = len(manifest.shards) - len(numbers)
    if done:
        say(f"Resuming after {done} of {len(manifest.shards)} shards")

    with write_errors(folder):
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
            for part in teacher:
                if part is not None:
                    part.save_pretrained(folder / TEACHER_NAME)
            manifest.save(folder / TEACHER_FILE_NAME)
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
            f"{folder} holds predictions of another teacher or on other text. Choose another folder, or remove it."
        )
    return True


@torch.no_grad()
def write_teacher(
    teacher: PreTrainedModel,
    data: Iterable[Any],
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    top: int = TOP,
    samples: int = SAMPLES,
    temperature: float = 1.0,
    seed: int = 0,
) -> TeacherManifest:
    """Write the predictions of a teacher on a tokenized data set into a folder; `attach_teacher` reads them.

    A run that was killed resumes if the call is repeated. Processes that `torchrun` has started each write a part.
    The weights of a teacher that accelerate offloads are loaded once for each shard of about 262,144 tokens.

    Args:
        teacher: A causal language model.
        data: Lists of token ids, or rows with `input_ids`, such as the `train_dataset` of a Trainer; see `rows_of`.
            A document that a Trainer truncates later is found too.
        folder: The folder of the teacher file.
        tokenizer: The tokenizer of the teacher, which is needed for a student with a trimmed vocabulary. By default
            it is read from the folder of the teacher.
        top: The number of the most probable tokens at each position, whose probabilities are stored.
        samples: The number of tokens that are sampled from the rest. With 0, the estimate of the divergence is biased.
        temperature: The temperature of the distributions, as in `attach_teacher`.
        seed: The seed of the samples.

    Returns:
        The manifest of the file.

    Raises:
        StructPruneError: If an argument is out of range, the folder holds something else, or the disk is too small.
    """
    check_weights(temperature, 0.0)
    if not predicts_next(teacher):
        raise StructPruneError(f"`teacher` must be a causal language model, got {type(teacher).__name__}.")
    vocab_size = int(teacher.config.get_text_config().vocab_size)
    if not 1 <= top <= vocab_size:
        raise StructPruneError(f"`top` must be from 1 to the vocabulary of {vocab_size} tokens, got {top}.")
    if not 0 <= samples <= MAX_SAMPLES:
        raise StructPruneError(f"`samples` must be from 0 to {MAX_SAMPLES}, got {samples}.")

    rows = rows_of(data)
    check_ids(rows, vocab_size)
    check_positions(teacher, max(map(len, rows)), f"A row of {max(map(len, rows))} tokens")

    reader = tokenizer or tokenizer_of(teacher, trust_remote_code=False)
    manifest = replace(
        _manifest(rows, vocab_size, reader),
        teacher=without_folders(teacher.name_or_path or ""),
        teacher_sha256=fingerprint(teacher),
        top=top,
        samples=samples,
        temperature=float(temperature),
        seed=seed,
    )

    predictor = Predictor(teacher)
    arch = describe(teacher)
    tokens = tokens_per_pass(teacher)

    def compute(own_rows: Sequence[Sequence[int]], generator: torch.Generator) -> dict[str, Tensor]:
        text = Text([torch.tensor(row) for row in own_rows])
        parts: dict[int, list[Tensor]] = {}
        for batch, predictions in predicted(predictor, batches_of(text, range(len(own_rows)), tokens), arch):
            chunks = []
            for start in range(0, sum(batch.counts), predictor.tokens_at_once):
                logits = predictions.logits(start, start + predictor.tokens_at_once).float() / temperature
                targets = batch.targets[start : start + predictor.tokens_at_once].to(logits.device)
                losses = cross_entropy(logits, targets, reduction="none").half()
                parts_of_chunk = (*compressed(logits, top, samples, generator), losses)
                chunks.append([part.cpu() for part in parts_of_chunk])

            columns = [torch.cat(column).split(batch.counts) for column in zip(*chunks, strict=True)]
            for place, number in enumerate(batch.numbers):
                parts[number] = [column[place] for column in columns]

        parts_in_order = [parts[number] for number in range(len(own_rows))]
        ids, log_probabilities, negative_entropy, losses = map(torch.cat, zip(*parts_in_order, strict=True))
        tensors = pack_ids(ids, high_bits(vocab_size))
        tensors["log_probabilities"] = log_probabilities
        tensors["negative_entropy"] = negative_entropy
        tensors["losses"] = losses
        return tensors

    with Output(folder).locked(), evaluating(teacher), stage("teacher", {}):
        write_shards(Path(folder), manifest, rows, compute, (teacher.config, reader))
    return manifest


def write_teacher_rows(
    rows: Iterable[tuple[Sequence[int], Sequence[Mapping[int, float]]]],
    folder: str | Path,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    top: int = TOP,
    temperature: float = 1.0,
) -> TeacherManifest:
    """Write a teacher file from predictions that another engine has computed.

    Only the most probable tokens and the mass of the rest are stored, because an engine returns no samples of the
    rest. The divergence counts the other tokens as one token, so its gradient is biased: the rest of the vocabulary
    gets no order. Prefer `write_teacher` where it runs.

    Args:
        rows: For each document, its token ids, and the log-probabilities by token id after each token but the last.
            Each position needs at least `top` tokens.
        folder: The folder of the teacher file.
        config: The config of the teacher.
        tokenizer: The tokenizer of the teacher, which is needed for a student with a trimmed vocabulary.
        top: The number of the most probable tokens that are stored at each position.
        temperature: The temperature at which the engine computed the log-probabilities.

    Returns:
        The manifest of the file.

    Raises:
        StructPruneError: If an argument is out of range, a row does not match its predictions, or the folder holds
            something else.
    """
    check_weights(temperature, 0.0)
    vocab_size = int(config.get_text_config().vocab_size)
    if not 1 <= top < vocab_size:
        raise StructPruneError(f"`top` must be from 1 to {vocab_size - 1}, got {top}.")

    by_document: dict[tuple[int, ...], Sequence[Mapping[int, float]]] = {}
    for ids, predictions in rows:
        if len(predictions) != len(ids) - 1:
            raise StructPruneError(
                f"A row of {len(ids)} tokens needs {len(ids) - 1} predictions, got {len(predictions)}."
            )
        fewest = min(map(len, predictions), default=top)
        if fewest < top:
            raise StructPruneError(
                f"A position has {fewest} log-probabilities, and `top` is {top}. Request at least `top` of them."
            )
        by_document[tuple(map(int, ids))] = predictions

    documents = rows_of(by_document)
    check_ids(documents, vocab_size)
    manifest = _manifest(documents, vocab_size, tokenizer)
    manifest = replace(
        manifest,
        teacher=without_folders(config.name_or_path or ""),
        teacher_sha256="",
        text_sha256=json_hash([[list(ids), _sorted(by_document[ids])] for ids in map(tuple, documents)]),
        top=top,
        samples=0,
        temperature=float(temperature),
    )

    def compute(own_rows: Sequence[Sequence[int]], generator: torch.Generator) -> dict[str, Tensor]:
        ids: list[list[int]] = []
        values: list[list[float]] = []
        losses: list[float] = []
        for row in own_rows:
            for token, prediction in zip(row[1:], by_document[tuple(row)], strict=True):
                best = nlargest(top, prediction.items(), key=itemgetter(1))
                ids.append([best_token for best_token, _ in best])
                values.append([value for _, value in best])
                losses.append(-prediction.get(token, nan))

        log_probabilities = torch.tensor(values)
        probabilities = log_probabilities.exp()
        rest = (1 - probabilities.sum(1)).clamp(min=0)
        tensors = pack_ids(torch.tensor(ids), high_bits(vocab_size))
        tensors["log_probabilities"] = log_probabilities.half()
        tensors["negative_entropy"] = (probabilities * log_probabilities).sum(1) + torch.xlogy(rest, rest)
        tensors["losses"] = torch.tensor(losses).half()
        return tensors

    with Output(folder).locked():
        write_shards(Path(folder), manifest, documents, compute, (config, tokenizer))
    return manifest


def _sorted(predictions: Sequence[Mapping[int, float]]) -> list[list[tuple[int, float]]]:
    """Return predictions as plain values in one order."""
    plain = []
    for prediction in predictions:
        pairs = [(int(token), float(value)) for token, value in prediction.items()]
        plain.append(sorted(pairs))
    return plain


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

    teacher = meta_model(AutoConfig.from_pretrained(file.folder / TEACHER_NAME))
    teacher.name_or_path = str(file.folder / TEACHER_NAME)
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
