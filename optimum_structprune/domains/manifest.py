"""The tokenizer of a model and the text that it has seen, to repeat a run and to warn of a second use."""

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
from ..config.fields import check_types, read_json
from ..config.pruning import StructPruneConfig
from ..errors import StructPruneError, one_line, some_of
from ..system.fingerprint import tensor_hash
from ..written import Record
from .packing import HELDOUT, PROBE, USED, Domain


MANIFEST_NAME = "calibration_manifest.json"
# What an entry's documents were for, in words.
CALIBRATED, TRAINED, EARLIER = "calibrated on", "trained on", "used by an earlier run"
COUNTED, JUDGED = "counted to choose tokens", "judged by"


@dataclass
class Entry:
    """One domain of a manifest.

    Attributes:
        name: The name of the domain.
        origin: The config of the domain; empty where a program gave inputs.
        weight: The share of the domain in the calibration text.
        calibration_tokens: The number of tokens that were calibrated on, or trained on.
        heldout_tokens: The number of tokens that were held out.
        samples_sha256: The hash of the samples.
        heldout_sha256: The hash of the held-out samples.
        documents: The hashes of the documents in the samples.
        heldout_documents: The hashes of the held-out documents.
        probe_sha256: The hash of the samples that decided on widths; empty where there were none.
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

    def __post_init__(self) -> None:
        check_types(self)

    @classmethod
    def of(cls, domain: Domain, use: str = CALIBRATED) -> Entry:
        """Makes the entry of a domain that was loaded."""
        return cls(
            name=domain.name,
            origin={} if domain.origin is None else domain.origin.to_dict(),
            place_sha256="" if domain.origin is None else _place(domain.origin.source),
            weight=domain.weight,
            calibration_tokens=_count(domain.samples),
            heldout_tokens=_count(domain.heldout),
            samples_sha256=tensor_hash(domain.samples),
            heldout_sha256=tensor_hash(domain.heldout),
            documents=list(domain.documents),
            heldout_documents=list(domain.heldout_documents),
            probe_sha256="" if domain.probe is None else tensor_hash(domain.probe),
            probe_documents=list(domain.probe_documents),
            use=use,
        )

    def uses(self, source: str | DomainConfig) -> bool:
        """Tells if the domain has this name or source, or comes from the source of this other domain."""
        if isinstance(source, str):
            return source == self.name or self._is_from(source)
        if not isinstance(source.source, str):
            return False  # an object in memory has no name by which it could be known
        # A different split of the same data holds other documents.
        same = all(getattr(source, key) == self.origin.get(key) for key in ("dataset_config", "split", "revision"))
        return bool(self.origin) and self._is_from(source.source) and same

    def _is_from(self, source: str) -> bool:
        place = _place(source)
        return place == self.place_sha256 if place or self.place_sha256 else source == self.origin.get("source")


@dataclass
class Manifest(Record):
    """The text that a model has seen.

    Attributes:
        seed: The seed of the order of the documents, and of text that the model wrote.
        seq_length: The number of tokens in a sample, the longest where they differ; 0 of what is no text.
        tokenizer: The name of the tokenizer.
        versions: The versions of the libraries that decide what text comes out.
        domains: One entry for each domain.
    """

    seed: int
    seq_length: int
    tokenizer: str
    versions: dict[str, str]
    domains: list[Entry]

    def __post_init__(self) -> None:
        check_types(self)

    @classmethod
    def of(
        cls, config: StructPruneConfig, domains: Sequence[Domain], tokenizer: PreTrainedTokenizerBase | None
    ) -> Manifest:
        """Makes the manifest of domains that were loaded."""
        libraries = ("torch", "transformers", "datasets", "tokenizers")
        lengths = [domain.samples.shape[1] if domain.samples.dim() == 2 else 0 for domain in domains]
        return cls(
            seed=config.seed,
            seq_length=max(lengths, default=config.seq_length),
            tokenizer=getattr(tokenizer, "name_or_path", ""),
            versions={"optimum-structprune": __version__, **{name: version(name) for name in libraries}},
            domains=[Entry.of(domain) for domain in domains],
        )

    @classmethod
    def seen_by(cls, model: Module) -> Manifest | None:
        """Gives the manifest of a model in memory, or else that of its folder."""
        if (carried := TextRecord.of(model).manifest) is not None:
            return carried
        path = Path(name := getattr(model, "name_or_path", None) or "", MANIFEST_NAME)
        return cls.load(path) if name and path.is_file() else None

    def with_entries(self, entries: Sequence[Entry]) -> Manifest:
        """Adds what a training has used."""
        return replace(self, domains=[*self.domains, *entries])

    def after(self, earlier: Manifest | None) -> Manifest:
        """Adds the text of an earlier run, whose result was the dense model of this one."""
        return self.with_entries([replace(entry, use=EARLIER) for entry in (earlier.domains if earlier else ())])

    def of_use(self, use: str) -> list[Entry]:
        """Gives the domains that were used for one thing."""
        return [entry for entry in self.domains if entry.use == use]

    def uses(self) -> dict[str, str]:
        """Gives the use of each document by its hash. Held-out text of any domain stays so."""
        uses: dict[str, str] = {}
        for use, name in ((PROBE, "probe_documents"), (USED, "documents"), (HELDOUT, "heldout_documents")):
            uses |= {document: use for entry in self.domains for document in getattr(entry, name)}
        return uses

    @classmethod
    def load(cls, folder_or_file: str | Path) -> Manifest:
        """Read what `save` wrote, or the manifest in the folder of a pruned model; anything else is refused."""
        path = Path(folder_or_file)
        path = path / MANIFEST_NAME if path.is_dir() else path
        data = read_json(path)
        try:
            return cls(**{**data, "domains": [Entry(**entry) for entry in data["domains"]]})
        except (KeyError, TypeError, StructPruneError) as error:
            raise StructPruneError(f"{path} is no calibration manifest: {one_line(error)}") from error

    def overlaps(self, domain_name_or_source: str | DomainConfig, document_hashes: Collection[str] = ()) -> list[str]:
        """Gives a sentence for each domain that a text shares something with.

        Args:
            domain_name_or_source: The name of a domain, its source, or a whole domain, which also tells splits apart.
            document_hashes: The `document_hash` of each document in that text.
        """
        sentences, hashes = [], set(document_hashes)
        for entry in self.domains:
            kind = "training" if entry.use == TRAINED else "calibration"
            where = f"the {kind} domain {entry.name!r} ({entry.origin.get('source', 'given inputs')})"
            uses = {
                f"were {entry.use}": entry.documents,
                "decided widths or weights": entry.probe_documents,
                "were held out to measure perplexity": entry.heldout_documents,
            }
            counts = {use: len(hashes.intersection(documents)) for use, documents in uses.items()}
            if use := next((use for use, shared in counts.items() if shared), None):
                sentences.append(f"{counts[use]} of {len(hashes)} documents {use}, in {where}")
            elif entry.uses(domain_name_or_source):
                sentences.append(f"the text has the name or the source of {where}")
        return [*dict.fromkeys(sentences)]  # a domain may have several entries


@dataclass(frozen=True)
class TextRecord:
    """The tokenizer and the seen text of a model in memory, which carries it as `text_record`."""

    tokenizer: PreTrainedTokenizerBase | None = None
    manifest: Manifest | None = None

    @classmethod
    def of(cls, model: Module) -> TextRecord:
        """Gives the record that a model carries."""
        return getattr(model, "text_record", None) or cls()

    def __deepcopy__(self, memo: Any) -> TextRecord:
        return self  # a copied model reads the same text, and a tokenizer takes seconds to copy


def remember_text(model: Any, tokenizer: Any = None, manifest: Manifest | None = None) -> None:
    """Let a model carry its tokenizer and its manifest. None leaves the former."""
    known = TextRecord.of(model)
    model.text_record = TextRecord(tokenizer or known.tokenizer, manifest or known.manifest)


def _count(samples: Tensor) -> int:
    # Of what is no text, as images are, the samples count.
    return samples.numel() if samples.dim() == 2 else len(samples)


def _place(source: Any) -> str:
    # The hash of a local path means the same file from every working folder, and does not show it.
    path = os.path.expanduser(source) if isinstance(source, str) else ""
    return sha256(os.path.realpath(path).encode()).hexdigest() if path and os.path.exists(path) else ""


def tokenizer_of(model: Any, trust_remote_code: bool = False) -> PreTrainedTokenizerBase | None:
    """Gives the tokenizer of a model in memory, or else that of its folder for the same number of tokens."""
    name = getattr(model, "name_or_path", None)
    if (carried := TextRecord.of(model).tokenizer) is not None or not name:
        return carried
    with suppress(Exception):  # whatever there is in the place of a tokenizer
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        saved = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        sizes = {each.get_text_config().vocab_size for each in (config, model.config)}
        if len(sizes) == 1 and has_files(saved):
            return saved
    return None


def has_files(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tells if a tokenizer was read from files: transformers makes one up for some types."""
    files = {"tokenizer.json", "tokenizer_config.json", *tokenizer.vocab_files_names.values()}
    return any(has_file(tokenizer.name_or_path, file, local_files_only=True) for file in files)


def ids_in(other: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase, size: int) -> list[int]:
    """Maps the ids of `tokenizer` below `size` to ids of another tokenizer.

    It is -1 for a token that the other one lacks. An id that neither has a token for is the same in both.
    """
    names, ids = {number: name for name, number in tokenizer.get_vocab().items()}, other.get_vocab()
    taken = {*ids.values()}
    return [
        ids.get(names[number], -1 if number in taken else number) if number in names else number
        for number in range(size)
    ]


def check_kinds(model: Any, tokenizer: Any) -> None:
    """Refuse what is no model of transformers or no tokenizer, such as the name of one."""
    is_model = isinstance(model, Module) and getattr(model, "config", None) is not None
    is_tokenizer = tokenizer is None or isinstance(tokenizer, PreTrainedTokenizerBase)
    for name, value, accepted, kind, advice in (
        ("model", model, is_model, "a model of transformers", "load it with from_pretrained first"),
        ("tokenizer", tokenizer, is_tokenizer, "a tokenizer", "load it with AutoTokenizer.from_pretrained"),
    ):
        if not accepted:
            raise StructPruneError(f"{name} takes {kind}, got {type(value).__name__}; {advice}.")


def check_tokens(model: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer whose ids are other tokens than the model's own, or have no row in the model."""
    carried = TextRecord.of(model).tokenizer
    if carried is tokenizer or not isinstance(tokenizer, PreTrainedTokenizerBase):
        return
    rows, from_folder = model.config.get_text_config().vocab_size, tokenizer.name_or_path == model.name_or_path
    if carried is None and from_folder and max(tokenizer.get_vocab().values()) < rows:
        return
    if (known := tokenizer_of(model)) is None:
        return
    beyond = {number for number in tokenizer.get_vocab().values() if number >= rows} - {*known.get_vocab().values()}
    others = [number for number, same in enumerate(ids_in(known, tokenizer, rows)) if number != same]
    if wrong := [*others, *sorted(beyond)]:
        advice = (
            "Pass the model's own (after a pruning, pruner.tokenizer); if it was trained with this one, save both to "
            "one folder and load them."
        )
        if not others:
            advice = "The model has no rows for these; model.resize_token_embeddings(len(tokenizer)) adds them."
        raise StructPruneError(
            f"The tokenizer, of {len(tokenizer):,} tokens, is not that of this {type(model).__name__}, which has "
            f"{len(known):,} tokens and {rows:,} rows: {some_of(tokenizer.convert_ids_to_tokens(wrong))} are others "
            f"there. {advice}"
        )
