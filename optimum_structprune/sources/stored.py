"""Statistics of a dense model in a folder, from which it can be pruned many times without running the text again."""

# No `from __future__ import annotations` here: `strict` checks types only where it sees them, not their names.
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.dataclasses import strict, validated_field
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.spec import MODEL, ArchSpec, Space, Widths
from ..config.domains import IN_MEMORY
from ..config.fields import Number, not_negative, read_json
from ..config.pruning import StructPruneConfig
from ..criteria import CRITERIA
from ..domains.manifest import MANIFEST_NAME, Manifest
from ..domains.packing import Domain
from ..domains.resolve import resolve
from ..errors import StructPruneError, one_line
from ..method.calibrate import Moments
from ..plain_json import replace_json
from ..registry import did_you_mean
from ..system.fingerprint import fingerprint, vocabulary_hash
from ..written import hash_of
from .whole_model import Still


STATISTICS = "statistics.json"
HELDOUT = "heldout.safetensors"


def _sizes(value: int | list[int]) -> None:
    """A validator of sizes that a file and a tensor can have."""
    for size in value if isinstance(value, list) else [value]:
        if not 0 <= size < 2**63:
            raise ValueError(f"has to be a size, got {size}")


@strict
@dataclass
class StoredDomain:
    """A domain whose moments are stored: its weight then, of a sum of 1, and the shape of its calibration samples."""

    name: str
    weight: Number = validated_field(not_negative)
    shape: list[int] = validated_field(_sizes)


@strict
@dataclass
class StoredFile:
    """The hash and the size in bytes by which a damaged file is recognised."""

    sha256: str
    size: int = validated_field(_sizes)

    @classmethod
    def of(cls, path: Path) -> "StoredFile":
        """The size and the hash of a file."""
        return cls(hash_of(path), path.stat().st_size)


@strict
@dataclass
class Statistics:
    """The moments in a folder of the inputs of a dense model's consumers, by domain, with their Gram matrices: the
    `fingerprint` of the model, the `vocabulary_hash` of its tokenizer if there was one, and every other file by name.
    """

    folder: Path
    model_type: str
    model: str
    tokenizer: str | None
    domains: list[StoredDomain]
    files: dict[str, StoredFile]

    @classmethod
    def load(cls, folder: str | Path) -> "Statistics":
        """Read what `calibrate` wrote; the moments themselves are read layer by layer, when they are needed."""
        path = Path(folder) / STATISTICS
        if not path.is_file():
            raise StructPruneError(
                f"{folder} holds no statistics ({STATISTICS}); write some with `structprune calibrate MODEL {folder}`."
            )
        data = read_json(path)
        try:
            domains = [StoredDomain(**domain) for domain in data["domains"]]
            files = {name: StoredFile(**file) for name, file in data["files"].items()}
            statistics = cls(**{**data, "folder": Path(folder), "domains": domains, "files": files})
        except (KeyError, TypeError, AttributeError, StrictDataclassError) as error:
            reason = one_line(error)
            raise StructPruneError(f"{path} does not describe statistics ({reason}); calibrate again.") from error
        for name, file in files.items():
            stored = Path(folder) / name
            size = stored.stat().st_size if stored.is_file() else 0
            if size != file.size:
                raise StructPruneError(f"{stored} has {size:,} bytes instead of {file.size:,}; calibrate again.")
        return statistics

    def save(self) -> None:
        """Write the description."""
        data = {name: value for name, value in asdict(self).items() if name != "folder"}
        replace_json(self.folder / STATISTICS, data)

    @property
    def tokens(self) -> dict[str, int]:
        """Number of calibration tokens, or of images, by domain."""
        return {domain.name: prod(domain.shape[: 1 if domain.shape[2:] else 2]) for domain in self.domains}

    def __str__(self) -> str:
        """Tokens or images by domain, and what the folder holds."""
        size = sum(file.size for file in self.files.values())
        kinds = {domain.name: "images" if domain.shape[2:] else "tokens" for domain in self.domains}
        counts = ", ".join(f"{name} {count:,} {kinds[name]}" for name, count in self.tokens.items())
        return f"{self.model_type}: {counts}; {size / 1e6:,.1f} MB"

    def check(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Refuse another model than the one that was calibrated, and another tokenizer."""
        if self.model_type != model.config.model_type or self.model != fingerprint(model):
            raise StructPruneError(
                f"The statistics in {self.folder} are of another model: this {model.config.model_type} in "
                f"{model.dtype} differs from that {self.model_type} in its config, its dtype or a weight. Load the "
                f"same one, or write new ones with `structprune calibrate MODEL {self.folder} --overwrite`."
            )
        if tokenizer is not None and self.tokenizer not in (None, vocabulary_hash(tokenizer)):
            raise StructPruneError(
                f"The statistics in {self.folder} are of text that another tokenizer read: its vocabulary differs. "
                f"Load that one, or write new ones with `structprune calibrate MODEL {self.folder} --overwrite`."
            )

    def chosen(self, config: StructPruneConfig) -> list[Domain]:
        """The domains that a config names, with its weights; all of them, with their own, where it names none. Their
        samples are shapes without content.
        """
        weights = {domain.name: domain.weight for domain in self.domains}
        if config.domains is not None:
            weights = {domain.name: domain.weight for domain in config.domains}
        names = [domain.name for domain in self.domains]
        for name in weights:
            if name not in names:
                raise StructPruneError(
                    f"{self.folder} holds no statistics of a domain {name!r}; it has {', '.join(names)}."
                    f"{did_you_mean(name, names)}"
                )
        self._check_sources(config)
        heldout = load_file(self._checked(HELDOUT))
        total = sum(weights.values())
        domains = []
        for index, domain in enumerate(self.domains):
            if domain.name in weights:
                reported = heldout[str(index)]
                # No more text can be read for choices, so the held-out samples are divided.
                reported, probe = reported.tensor_split(2) if config.chooses else (reported, None)
                samples, weight = torch.empty(domain.shape, device="meta"), weights[domain.name] / total
                domains.append(Domain(domain.name, weight, samples, reported, probe=probe))
        return domains

    def _check_sources(self, config: StructPruneConfig) -> None:
        """Refuse a domain that names another source than the one whose moments would stand for it."""
        stored = {entry.name: entry for entry in Manifest.load(self._checked(MANIFEST_NAME)).domains}
        for domain in resolve(config.domains or []):
            there = str(stored[domain.name].origin.get("source", IN_MEMORY))
            in_memory = any(str(source).startswith(IN_MEMORY) for source in (there, domain.to_dict()["source"]))
            if not in_memory and not stored[domain.name].uses(domain):
                raise StructPruneError(
                    f"The statistics of {domain.name!r} in {self.folder} are of {there}, and the config names "
                    f"{domain.source} for it; name what was calibrated on, or calibrate again."
                )

    def manifest(self, domains: Sequence[Domain]) -> Manifest:
        """What was calibrated on, as far as it is used now."""
        weights = {domain.name: domain.weight for domain in domains}
        whole = Manifest.load(self._checked(MANIFEST_NAME))
        used = [replace(entry, weight=weights[entry.name]) for entry in whole.domains if entry.name in weights]
        return replace(whole, domains=used)

    def moments_file(self, layer: int, domain: int) -> Path:
        """The file that holds the moments of a layer in a domain; the whole of it is read for its hash."""
        return self._checked(moments_name(layer, domain))

    def _checked(self, name: str) -> Path:
        path = self.folder / name
        try:
            same = StoredFile.of(path) == self.files.get(name)
        except (OSError, ValueError) as error:
            raise StructPruneError(f"{path} cannot be read ({error}); calibrate again.") from error
        if not same:
            raise StructPruneError(f"{path} is damaged, or from another run: its hash differs; calibrate again.")
        return path


class Stored(Still):
    """Moments of the dense model that are read from a folder instead of being gathered in forward passes.

    Nothing runs, so a layer is fitted to the dense model's activations, not to those of the pruned layers before it.
    """

    def __init__(self, statistics: Statistics, domains: Sequence[Domain], model: PreTrainedModel):
        names = [domain.name for domain in statistics.domains]
        self.statistics, self.model, self.device = statistics, model, next(model.parameters()).device
        self.indices = [names.index(domain.name) for domain in domains]
        # Files whose hash is right, by layer and domain: each is asked for once for every space.
        self.files: dict[tuple[int, int], Path] = {}

    def moments(self, layer: int, space: Space, gram: bool) -> Iterator[list[Moments]]:
        """See `InMemory.moments`."""
        for index in self.indices:
            if (layer, index) not in self.files:
                self.files[layer, index] = self.statistics.moments_file(layer, index)
            stored = load_moments(self.files[layer, index], [axis.module for axis in space.consumers], self.device)
            of_consumers = [stored[axis.module] for axis in space.consumers]
            # A run over text would not have gathered what is not asked for.
            yield of_consumers if gram else [replace(part, gram=None) for part in of_consumers]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """See `InMemory.state`; nothing is reached that is not in the folder."""
        return {}, {}


def save_moments(moments_by_name: Mapping[str, Moments], path: str | Path) -> None:
    """Write moments, by name, to one safetensors file."""
    tensors = {f"{name}/count": torch.tensor(moments.count) for name, moments in moments_by_name.items()}
    for name, moments in moments_by_name.items():
        tensors |= {f"{name}/{part}": tensor.contiguous() for part, tensor in moments.tensors().items()}
    save_file(tensors, path)


def load_moments(path: str | Path, names: Collection[str], device: torch.device | str = "cpu") -> dict[str, Moments]:
    """The moments of these names that `save_moments` wrote."""
    with safe_open(path, "pt", str(device)) as file:
        fields: dict[str, dict[str, Any]] = {name: {} for name in names}
        for key in file.keys():  # noqa: SIM118  # it is no mapping
            name, _, part = key.rpartition("/")
            if name in fields:
                fields[name][part] = file.get_tensor(key)
    return {name: Moments(int(of_name.pop("count")), **of_name) for name, of_name in fields.items()}


def moments_name(layer: int, domain: int) -> str:
    """The name of the file that holds the moments of a layer in a domain."""
    return f"layer-{layer:03d}.domain-{domain}.safetensors"


def check_stats(config: StructPruneConfig, arch: ArchSpec, widths: Widths) -> None:
    """Refuse `stats` that are no folder of stored moments, or that say nothing of what shrinks."""
    assert config.stats is not None
    for name in widths:
        if any(space.experts is not None or space.layer == MODEL for space in arch.of(name)):
            raise StructPruneError(
                f"Stored statistics are moments of what consumers read, and {name!r} is judged by something else; "
                "prune without stats."
            )
    Statistics.load(config.stats)
    _check_criterion(config)


def check_storable(config: StructPruneConfig, arch: ArchSpec) -> None:
    """Refuse models whose moments are not stored."""
    inside = next((space for space in arch.spaces if space.experts is not None), None)
    if inside is not None:
        raise StructPruneError(
            f"This {arch.model_type} model has experts ({inside.experts}), which are judged by the tokens that are "
            "routed to them in a run; only the moments of dense models are stored. Prune it without stats."
        )
    _check_criterion(config)


def _check_criterion(config: StructPruneConfig) -> None:
    if CRITERIA.get(config.scored_by).whole_model_statistics is not None:
        raise StructPruneError(
            f"criterion={config.criterion!r} goes by passes through the whole model, of which nothing is stored; "
            "prune without stats, or choose criterion='obs', 'wanda' or 'flap'."
        )
