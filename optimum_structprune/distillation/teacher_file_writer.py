"""Write a teacher file: from a teacher that runs, or from the predictions of another engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from heapq import nlargest
from itertools import accumulate, pairwise
from math import nan
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..arch.inference import evaluating
from ..arch.load import describe
from ..arch.meta import check_positions, predicts_next
from ..config.domains import CHAT, DomainConfig
from ..domains.manifest import tokenizer_of
from ..domains.sources import documents
from ..measure.losses import batches_of, predicted
from ..measure.predictions import Predictor, tokens_per_pass
from ..measure.text import Text
from ..system.disk import Output, write_errors
from ..system.errors import StructPruneError
from ..system.fingerprint import fingerprint, json_hash, vocabulary_hash
from ..system.processes import is_first_rank, shard, wait_for_all
from ..system.stages import progress, readable_size, say, stage
from ..system.stored import DamagedError, open_tensors, write_tensors
from ..system.written import without_folders
from .teacher import check_weights
from .teacher_file_format import (
    SAMPLES,
    TEACHER_FILE_NAME,
    TEACHER_NAME,
    TOP,
    TeacherManifest,
    compressed,
    high_bits,
    is_teacher_file,
    pack_ids,
    shard_name,
)


MAX_SAMPLES = 1024
# A shard holds about this many tokens.
SHARD_TOKENS = 2**18


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
            if not tensors["negative_entropy"].isfinite().all():
                first = starts[number]
                raise StructPruneError(
                    f"Some predictions of the teacher on the rows {first} to {first + len(own_rows) - 1} are infinite "
                    "or NaN. Load the teacher in bfloat16 or float32."
                )
            tensors["input_ids"] = torch.cat([torch.tensor(row, dtype=torch.int32) for row in own_rows])
            tensors["lengths"] = torch.tensor([len(row) for row in own_rows], dtype=torch.int32)

            path = folder / shard_name(number)
            new = path.with_name(f".{path.name}.new")
            write_tensors(new, tensors, identity)
            new.replace(path)
        wait_for_all()
        if is_first_rank():
            for part in teacher:
                if part is not None:
                    part.save_pretrained(folder / TEACHER_NAME)
            manifest.save(folder / TEACHER_FILE_NAME)
    wait_for_all()


def _is_written(folder: Path, number: int, identity: str) -> bool:
    """Return whether a shard is complete and intact. Raise if it has other settings."""
    try:
        _, settings = open_tensors(folder / shard_name(number))
    except DamagedError:
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
