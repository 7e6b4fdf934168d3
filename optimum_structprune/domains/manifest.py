"""The tokenizer of a model and its record of read text, to repeat a run and to warn of a second use."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import Module
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import has_file

from .. import __version__
from ..config.domains import DomainConfig
from ..config.fields import read_json
from ..config.pruning import StructPruneConfig
from ..system.codec import from_plain
from ..system.errors import StructPruneError, some_of
from ..system.fingerprint import tensor_hash
from ..system.written import Record, without_folders
from .packing import HELDOUT, PROBE, USED, Domain


MANIFEST_NAME = "calibration_manifest.json"
# The uses of the documents of an entry.
CALIBRATED, TRAINED, EARLIER = "calibrated on", "trained on", "used by an earlier run"
COUNTED, JUDGED = "counted to choose tokens", "judged by"


@dataclass
class Entry:
    """One domain of a manifest.

    Attributes:
        name: The name of the domain.
        origin: The config of the domain; empty for inputs that a program passed.
        weight: The share of the domain in the calibration text.
        calibration_tokens: The number of calibration or training tokens.
        heldout_tokens: The number of held-out tokens.
        samples_sha256: The hash of the samples.
        heldout_sha256: The hash of the held-out samples.
        documents: The hashes of the documents in the samples.
        heldout_documents: The hashes of the held-out documents.
        probe_sha256: The hash of the samples that decided on widths; empty without such samples.
        probe_documents: The hashes of the documents in these samples.
        place_sha256: The hash of the path of a local source; empty for other sources.
        use: The use of the text, such as "calibrated on" or "trained on".
    """

    name: str
    origin: dict[str, Any]
    weight: float
    calibration_tokens: int
    heldout_tokens: int
    samples_sha256: str
    heldout_sha256: str
    documents: list[str]
    heldout_documents: list[str]
    probe_sha256: str = ""
    probe_documents: list[str] = field(default_factory=list)
    place_sha256: str = ""
    use: str = CALIBRATED

    @classmethod
    def of(cls, domain: Domain, use: str = CALIBRATED) -> Entry:
        """Return the entry of a loaded domain."""
        origin: dict[str, Any] = {}
        place_hash = ""
        if domain.origin is not None:
            origin = without_folders(domain.origin.to_dict())
            place_hash = _place(domain.origin.source)

        probe_hash = ""
        if domain.probe is not None:
            probe_hash = tensor_hash(domain.probe)

        return cls(
            name=domain.name,
            origin=origin,
            place_sha256=place_hash,
            weight=domain.weight,
            calibration_tokens=_count(domain.samples),
            heldout_tokens=_count(domain.heldout),
            samples_sha256=tensor_hash(domain.samples),
            heldout_sha256=tensor_hash(domain.heldout),
            documents=list(domain.documents),
            heldout_documents=list(domain.heldout_documents),
            probe_sha256=probe_hash,
            probe_documents=list(domain.probe_documents),
            use=use,
        )

    def uses(self, source: str | DomainConfig) -> bool:
        """Return whether the domain has this name or source, or the same source as this domain config."""
        if isinstance(source, str):
            return source == self.name or self._is_from(source)

        # An object in memory has no name to compare.
        if not isinstance(source.source, str):
            return False

        # A different split of the same data holds other documents.
        is_same_split = all(
            getattr(source, key) == self.origin.get(key) for key in ("dataset_config", "split", "revision")
        )
        return bool(self.origin) and self._is_from(source.source) and is_same_split

    def overlap(self, source: str | DomainConfig, hashes: set[str]) -> str | None:
        """Return a sentence if a text shares documents, or else the name or the source, with this domain.

        Args:
            source: The name, the source or the config of the text.
            hashes: The hashes of the documents of the text.
        """
        kind = "calibration"
        if self.use == TRAINED:
            kind = "training"
        place = f"the {kind} domain {self.name!r} ({self.origin.get('source', 'given inputs')})"

        documents_by_use = {
            f"were {self.use}": self.documents,
            "decided widths or weights": self.probe_documents,
            "were held out to measure perplexity": self.heldout_documents,
        }
        for use, documents in documents_by_use.items():
            num_shared = len(hashes.intersection(documents))
            if num_shared:
                return f"{num_shared} of {len(hashes)} documents {use}, in {place}"

        if self.uses(source):
            return f"the text has the name or the source of {place}"
        return None

    def _is_from(self, source: str) -> bool:
        """Return whether the domain was read from a source. Local sources are compared by their real path."""
        place = _place(source)
        if place or self.place_sha256:
            return place == self.place_sha256
        return source == self.origin.get("source")


@dataclass
class Manifest(Record):
    """The text that a model has read.

    Attributes:
        seed: The seed of the order of the documents, and of text that the model wrote.
        seq_length: The number of tokens in a sample, the longest if they differ; 0 for inputs other than text.
        tokenizer: The name of the tokenizer.
        versions: The versions of the libraries that the text depends on.
        domains: One entry for each domain.
    """

    seed: int
    seq_length: int
    tokenizer: str
    versions: dict[str, str]
    domains: list[Entry]

    @classmethod
    def of(
        cls, config: StructPruneConfig, domains: Sequence[Domain], tokenizer: PreTrainedTokenizerBase | None
    ) -> Manifest:
        """Return the manifest of loaded domains."""
        versions = {"optimum-structprune": __version__}
        for library in ("torch", "transformers", "datasets", "tokenizers"):
            versions[library] = version(library)

        lengths = []
        for domain in domains:
            length = 0
            if domain.samples.dim() == 2:
                length = domain.samples.shape[1]
            lengths.append(length)

        return cls(
            seed=config.seed,
            seq_length=max(lengths, default=config.seq_length),
            tokenizer=without_folders(getattr(tokenizer, "name_or_path", "")),
            versions=versions,
            domains=[Entry.of(domain) for domain in domains],
        )

    @classmethod
    def seen_by(cls, model: Module) -> Manifest | None:
        """Return the manifest of a model in memory, or else the manifest in the folder of the model."""
        manifest = TextRecord.of(model).manifest
        if manifest is not None:
            return manifest

        folder = getattr(model, "name_or_path", None)
        if not folder:
            return None
        path = Path(folder, MANIFEST_NAME)
        if not path.is_file():
            return None
        return cls.load(path)

    def with_entries(self, entries: Sequence[Entry]) -> Manifest:
        """Return the manifest with more entries, such as the entries of a training."""
        return replace(self, domains=self.domains + list(entries))

    def after(self, earlier: Manifest | None) -> Manifest:
        """Return the manifest with the text of an earlier run, whose result was the original model of this run."""
        if earlier is None:
            return self.with_entries([])
        return self.with_entries([replace(entry, use=EARLIER) for entry in earlier.domains])

    def with_use(self, use: str) -> list[Entry]:
        """Return the entries with a use."""
        return [entry for entry in self.domains if entry.use == use]

    def uses(self) -> dict[str, str]:
        """Return the use of each document by its hash. Held-out text of any domain counts as held out."""
        uses: dict[str, str] = {}
        for use, attribute in ((PROBE, "probe_documents"), (USED, "documents"), (HELDOUT, "heldout_documents")):
            for entry in self.domains:
                uses.update(dict.fromkeys(getattr(entry, attribute), use))
        return uses

    @classmethod
    def load(cls, folder_or_file: str | Path) -> Manifest:
        """Read a manifest from its file, or from the folder of a pruned model.

        Raises:
            StructPruneError: The file is not a calibration manifest.
        """
        path = Path(folder_or_file)
        if path.is_dir():
            path = path / MANIFEST_NAME

        return from_plain(cls, read_json(path), str(path))

    def overlaps(self, domain_name_or_source: str | DomainConfig, document_hashes: Collection[str] = ()) -> list[str]:
        """Return a sentence for each domain that shares its documents, name or source with a text.

        Args:
            domain_name_or_source: The name or the source of a domain, or a config that names a split too.
            document_hashes: The `document_hash` of each document in the text.
        """
        hashes = set(document_hashes)
        sentences = []
        for entry in self.domains:
            sentence = entry.overlap(domain_name_or_source, hashes)
            if sentence is not None:
                sentences.append(sentence)

        # A domain may have several entries.
        return list(dict.fromkeys(sentences))


@dataclass(frozen=True)
class TextRecord:
    """The tokenizer and the manifest of a model in memory, its attribute `text_record`."""

    tokenizer: PreTrainedTokenizerBase | None = None
    manifest: Manifest | None = None

    @classmethod
    def of(cls, model: Module) -> TextRecord:
        """Return the record of a model, empty by default."""
        return getattr(model, "text_record", None) or cls()

    def __deepcopy__(self, memo: Any) -> TextRecord:
        # A copied model reads the same text, and a tokenizer takes seconds to copy.
        return self


def remember_text(model: Any, tokenizer: Any = None, manifest: Manifest | None = None) -> None:
    """Set the tokenizer and the manifest in the record of a model. None does not change the value."""
    record = TextRecord.of(model)
    model.text_record = TextRecord(tokenizer or record.tokenizer, manifest or record.manifest)


def _count(samples: Tensor) -> int:
    """Count the tokens of text samples. Other inputs, such as images, count as samples."""
    if samples.dim() == 2:
        return samples.numel()
    return len(samples)


def _place(source: Any) -> str:
    """Return the hash of a local path, empty for other sources.

    It is the same from every working folder, and does not disclose the path.
    """
    if not isinstance(source, str):
        return ""
    path = os.path.expanduser(source)
    if not path or not os.path.exists(path):
        return ""
    return sha256(os.path.realpath(path).encode()).hexdigest()


def tokenizer_of(model: Any, trust_remote_code: bool = False) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of a model in memory, or else the tokenizer in its folder if that has as many tokens."""
    folder = getattr(model, "name_or_path", None)
    tokenizer = TextRecord.of(model).tokenizer
    if tokenizer is not None or not folder:
        return tokenizer

    # The folder may contain anything in place of a tokenizer.
    with suppress(Exception):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        saved = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        saved_size = config.get_text_config().vocab_size
        if saved_size == model.config.get_text_config().vocab_size and has_files(saved):
            return saved
    return None


def has_files(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer was read from files. For some types, transformers makes one without files."""
    files = {"tokenizer.json", "tokenizer_config.json"}
    files.update(tokenizer.vocab_files_names.values())
    return any(has_file(tokenizer.name_or_path, file, local_files_only=True) for file in files)


def ids_in(target: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase, size: int) -> list[int]:
    """Map the ids of `tokenizer` below `size` to ids of a `target` tokenizer.

    A token that the target lacks maps to -1 if the target uses its id for another token. All other ids without a
    counterpart map to themselves.
    """
    tokens = {number: token for token, number in tokenizer.get_vocab().items()}
    target_ids = target.get_vocab()
    target_numbers = set(target_ids.values())

    ids = []
    for number in range(size):
        token = tokens.get(number)
        if token is not None and token in target_ids:
            ids.append(target_ids[token])
        elif token is not None and number in target_numbers:
            ids.append(-1)
        else:
            ids.append(number)
    return ids


def check_kinds(model: Any, tokenizer: Any) -> None:
    """Raise if a model or a tokenizer is of another kind, such as its name."""
    if not isinstance(model, Module) or getattr(model, "config", None) is None:
        raise StructPruneError(
            f"`model` must be a transformers model, got {type(model).__name__}. Load it with `from_pretrained` first."
        )
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise StructPruneError(
            f"`tokenizer` must be a transformers tokenizer, got {type(tokenizer).__name__}. Load it with "
            "`AutoTokenizer.from_pretrained`."
        )


def check_tokens(model: Any, tokenizer: Any) -> None:
    """Raise if an id of a tokenizer is another token in the tokenizer of the model, or has no row in the model."""
    recorded_tokenizer = TextRecord.of(model).tokenizer
    if recorded_tokenizer is tokenizer or not isinstance(tokenizer, PreTrainedTokenizerBase):
        return

    num_rows = getattr(model.config.get_text_config(), "vocab_size", None)
    if num_rows is None:
        return  # the model reads no tokens
    ids = set(tokenizer.get_vocab().values())
    is_from_folder = tokenizer.name_or_path == model.name_or_path
    if recorded_tokenizer is None and is_from_folder and max(ids) < num_rows:
        return

    model_tokenizer = tokenizer_of(model)
    if model_tokenizer is None:
        return

    model_ids = ids_in(model_tokenizer, tokenizer, num_rows)
    different_ids = [number for number, model_id in enumerate(model_ids) if model_id != number]
    known_ids = set(model_tokenizer.get_vocab().values())
    rowless_ids = sorted(number for number in ids if number >= num_rows and number not in known_ids)
    if not different_ids and not rowless_ids:
        return

    advice = "The model has no rows for these tokens. `model.resize_token_embeddings(len(tokenizer))` adds them."
    if different_ids:
        advice = (
            "Pass the model's own tokenizer (after a pruning, `result.tokenizer`). If the model was trained with this "
            "tokenizer, save both to one folder and load them."
        )
    tokens = some_of(tokenizer.convert_ids_to_tokens(different_ids + rowless_ids))
    raise StructPruneError(
        f"The tokenizer, of {len(tokenizer):,} tokens, does not belong to this {type(model).__name__}, which has "
        f"{len(model_tokenizer):,} tokens and {num_rows:,} rows. Different tokens: {tokens}. {advice}"
    )
