"""Read the text of a recovery: a stream of training samples, held-out text, and validation text."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from math import ceil

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.devices import default_device
from ..arch.meta import positions_of, predicts_next
from ..config.domains import BUILTIN, GENERAL, DomainConfig, written_by_model
from ..config.pruning import StructPruneConfig
from ..config.recovery import RecoveryConfig
from ..distillation.chunked_loss import device_kind
from ..domains.load import WRITTEN, builtin_source_except, load_domains, texts_of
from ..domains.manifest import TRAINED, Entry, Manifest
from ..domains.packing import HELDOUT, Domain, SampleFormat, check_vocabulary, tokenised
from ..domains.sources import documents, endless, resolve
from ..system.errors import StructPruneError, warn


# A model is measured on one token of each kind of text per this number of training tokens, between these bounds.
TRAINING_PER_MEASURED = 50
MIN_MEASURED_TOKENS = 512
MAX_HELDOUT_TOKENS = 1_024
MAX_VALIDATION_TOKENS = 2_048
MAX_HELDOUT_SAMPLES = 8
VALIDATION = "validation text"
# The kind of validation text if the training text has all other built-in kinds.
OTHER_KIND = f"{BUILTIN}news"
# The maximum number of passes over a text. More passes teach little (Muennighoff et al., 2023, arXiv 2305.16264).
MAX_PASSES = 4
# The default length of a sample by the kind of device.
SEQ_LENGTHS = {"cpu": 512, "gpu": 1_024}
# A training has at least this number of samples, unless they would be shorter than the minimum.
MIN_SAMPLES = 100
MIN_SEQ_LENGTH = 128


def sample_length(config: RecoveryConfig, model: PreTrainedModel) -> int:
    """Return the number of tokens in a sample.

    The default depends on the device, the positions of the model and the number of training tokens.
    """
    if config.seq_length is not None:
        return config.seq_length

    device = model.device
    if device.type == "meta":
        device = default_device()
    length = min(SEQ_LENGTHS[device_kind(device)], max(MIN_SEQ_LENGTH, config.tokens // MIN_SAMPLES // 32 * 32))
    return int(min(length, positions_of(model)))


def measured_tokens(training_tokens: int, maximum: int) -> int:
    """Return the number of tokens of a kind of text to measure a model on. A short training is measured on less."""
    return max(MIN_MEASURED_TOKENS, min(maximum, training_tokens // TRAINING_PER_MEASURED))


def text_config(config: RecoveryConfig, pruning: StructPruneConfig, seq_length: int) -> StructPruneConfig:
    """Return the config that reads the training text, in samples of `seq_length` tokens.

    The seed of the pruning determines the documents that are held out.

    Raises:
        StructPruneError: If there are not enough tokens for one sample of each domain.
    """
    if pruning.general_text == WRITTEN:
        # It takes long to write, and it did not help (benchmarks/LOG.md).
        pruning = replace(pruning, general_share=0.0, general_text=None)

    domains = resolve(config.domains or texts_of(pruning))
    if config.validation is None and _is_mixed(domains):
        without = f"-{OTHER_KIND.removeprefix(BUILTIN)}"
        for place, domain in enumerate(domains):
            if _is_mixed([domain]):
                domains[place] = replace(domain, source=f"{domain.source}{without}")

    samples = config.tokens // seq_length
    if samples < len(domains):
        raise StructPruneError(
            f"`tokens`={config.tokens} is less than one sample of {seq_length} tokens for each of the "
            f"{len(domains)} domains. Set `tokens` to at least {seq_length * len(domains)}."
        )

    return replace(
        pruning,
        domains=domains,
        num_samples=samples,
        seq_length=seq_length,
        general_share=0.0,
        general_text=None,
        allocation="uniform",  # reserves no probe text, because a recovery chooses no widths
    )


def _is_mixed(domains: Sequence[DomainConfig]) -> bool:
    return any(str(domain.source).startswith(BUILTIN + GENERAL) for domain in domains)


def answer_samples(config: RecoveryConfig, num_samples: int) -> int:
    """Return the number of answers among the samples of a training with a teacher."""
    if config.answer_share == 0:
        return 0
    return max(1, round(config.answer_share * num_samples))


def check_training_text(
    config: RecoveryConfig,
    pruning: StructPruneConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    earlier: Manifest | None,
) -> None:
    """Raise `StructPruneError` if there is too little text to train with a teacher. Call this before the pruning.

    Args:
        config: How the model will be trained.
        pruning: How it will be pruned.
        model: The original model. It may be on the meta device.
        tokenizer: Its tokenizer.
        earlier: The text of the pruning.
    """
    text = text_config(config, pruning, sample_length(config, model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the training itself repeats the warnings
        stream = TextStream(text, tokenizer, model, earlier, writes=False)
        num_answers = answer_samples(config, text.num_samples) if predicts_next(model) else 0
        stream.check_enough(text.num_samples - num_answers)


class TextStream:
    """A stream of training samples from domains, by their weights. Documents are tokenized when they are needed.

    Held-out documents are skipped. A domain that ends is read again, at most `MAX_PASSES` times in all.

    Args:
        config: The config of the text; see `text_config`.
        tokenizer: The tokenizer that reads it.
        model: The model that writes domains of its own text.
        earlier: The text that an earlier run has used.
        writes: Whether the model writes. If not, held-out text of domains of its own text is left out.

    Attributes:
        heldout: The held-out samples of each domain, and a first sample of the training text.
    """

    def __init__(
        self,
        config: StructPruneConfig,
        tokenizer: PreTrainedTokenizerBase | None,
        model: PreTrainedModel,
        earlier: Manifest | None = None,
        writes: bool = True,
    ):
        domains = config.domains or []
        training_tokens = config.num_samples * config.seq_length
        num_heldout = measured_tokens(training_tokens, MAX_HELDOUT_TOKENS) // config.seq_length
        num_heldout = max(1, min(MAX_HELDOUT_SAMPLES, num_heldout))
        one_sample_each = replace(config, num_samples=len(domains))
        self.heldout: list[Domain] = load_domains(
            one_sample_each, tokenizer, model, num_heldout, earlier, writes=writes
        )

        assert tokenizer is not None  # or the domains could not be read
        self.config = config
        self.domains = domains
        self.tokenizer = tokenizer
        self.model = model

        self.frame = SampleFormat.of(tokenizer, config.seq_length)
        self.vocab_size = model.config.get_text_config().vocab_size

        # The hashes of the documents that were read, by domain.
        self.documents: dict[str, dict[str, None]] = {domain.name: {} for domain in domains}
        self._skipped: set[str] = set()

        for domain in self.heldout:
            self._skipped.update(domain.heldout_documents)
        if earlier is not None:
            self._skipped.update(name for name, use in earlier.uses().items() if use == HELDOUT)

    def skip(self, hashes: Iterable[str]) -> None:
        """Skip further documents, which have another use."""
        self._skipped.update(hashes)

    def entries(self, num_samples: int) -> list[Entry]:
        """Return the manifest's entries of the domains for a number of samples, with the documents read so far."""
        counts = Counter(self._turns(num_samples))
        entries = []
        for place, domain in enumerate(self.heldout):
            documents = tuple(self.documents[domain.name])
            entry = Entry.of(replace(domain, documents=documents), TRAINED)
            entry.calibration_tokens = counts[place] * self.config.seq_length
            entries.append(entry)
        return entries

    def check_enough(self, num_samples: int) -> None:
        """Raise `StructPruneError` if a domain has too little text for `MAX_PASSES` passes, and warn of repeats.

        Text from the Hub and text that a model writes are not counted, because they may not end.
        """
        for domain in self.domains:
            if endless(domain) or written_by_model(domain):
                continue

            need = self._samples_of(domain, num_samples)
            count = sum(1 for _ in islice(self._one_pass(domain, 0), need))
            if count * MAX_PASSES < need:
                possible = int(count * MAX_PASSES * self._total_weight / domain.weight) * self.config.seq_length
                raise StructPruneError(
                    f"The domain {domain.name!r} has {count:,} samples of {self.config.seq_length} tokens to train "
                    f"on, and {need:,} are needed, which is more than {MAX_PASSES} passes. Add text to it, or set "
                    f"`tokens` to at most {possible}."
                )
            if count < need:
                warn(f"The text of the domain {domain.name!r} is read {-(-need // count)} times.")

    def samples(self, num_samples: int) -> Iterator[list[int]]:
        """Yield samples of token ids. The domains take turns by their weights."""
        streams = [self._repeated(domain) for domain in self.domains]
        for place in self._turns(num_samples):
            yield next(streams[place])

    def _turns(self, num_samples: int) -> Iterator[int]:
        """Yield the number of the domain of each sample, which has the smallest part of its share so far."""
        weights = [domain.weight for domain in self.domains]
        counts = [0] * len(weights)
        for _ in range(num_samples):
            domain = min(range(len(weights)), key=lambda place: (counts[place] + 0.5) / weights[place])
            counts[domain] += 1
            yield domain

    def openings(self, num_samples: int) -> Iterator[list[int]]:
        """Yield about `num_samples` samples by the weights of the domains. Each domain is read at most once."""
        for domain in self.domains:
            yield from islice(self._one_pass(domain, 0), self._samples_of(domain, num_samples))

    @property
    def _total_weight(self) -> float:
        return sum(domain.weight for domain in self.domains)

    def _samples_of(self, domain: DomainConfig, num_samples: int) -> int:
        """Return the number of samples of a domain among `num_samples` samples of all domains."""
        return ceil(num_samples * domain.weight / self._total_weight)

    def _repeated(self, domain: DomainConfig) -> Iterator[list[int]]:
        for number in range(MAX_PASSES):
            yield from self._one_pass(domain, number)
        raise StructPruneError(
            f"The text of the domain {domain.name!r} ended after {MAX_PASSES} passes. Add text to it, or lower "
            "`tokens`."
        )

    def _one_pass(self, domain: DomainConfig, number: int) -> Iterator[list[int]]:
        """Yield the samples of one pass over a domain, in another order each time."""
        write = None
        if written_by_model(domain):
            from ..domains.generated import self_documents

            need = self.config.num_samples * self.config.seq_length
            write = partial(self_documents, self.model, self.tokenizer, tokens=need)
        texts = documents(domain, self.config.seed + number, self.tokenizer, write)

        prefix: list[int] = []
        if self.frame.prefix is not None:
            prefix = [self.frame.prefix]
        buffer: list[int] = []
        for document in tokenised(texts, self.tokenizer):
            if document.hash in self._skipped:
                continue

            check_vocabulary(max(document.ids), self.vocab_size)
            self.documents[domain.name][document.hash] = None
            if buffer and self.frame.eos is not None:
                buffer.append(self.frame.eos)
            buffer += document.ids

            start = 0
            while len(buffer) - start >= self.frame.body:
                yield prefix + buffer[start : start + self.frame.body]
                start += self.frame.body
            del buffer[:start]


def validation_text(
    config: RecoveryConfig,
    text: StructPruneConfig,
    tokenizer: PreTrainedTokenizerBase,
    trained: Collection[str],
    num_samples: int,
) -> tuple[Tensor, tuple[str, ...]]:
    """Read text of a kind that is not trained on.

    Args:
        config: The config of the recovery.
        text: The config of the training text.
        tokenizer: The tokenizer that reads it.
        trained: The hashes of documents with another use.
        num_samples: The number of samples.

    Returns:
        Samples of token ids, shape `(samples, seq_length)`, and the hashes of their documents.
    """
    domains = text.domains or []
    source = config.validation
    if source is None and _is_mixed(domains):
        source = OTHER_KIND
    elif source is None:
        source = builtin_source_except(domains)

    frame = SampleFormat.of(tokenizer, text.seq_length)
    texts = documents(DomainConfig(name=VALIDATION, source=source), text.seed, tokenizer)
    unused = (document for document in tokenised(texts, tokenizer) if document.hash not in trained)
    samples, names = frame.pack(frame.take(unused, num_samples * frame.body), num_samples)

    if not len(samples):
        raise StructPruneError(
            f"`validation`={source!r} has less than one sample of {text.seq_length} tokens that is not trained on. "
            "Add text to it."
        )
    return samples, names
