"""Statistics of a dense model in a folder, from which it is pruned again and again without running its text again."""

from __future__ import annotations

import json
import mmap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..arch.spec import MODEL, ArchSpec, Space
from ..config.fields import read_mapping
from ..config.pruning import StructPruneConfig, builtin_domains
from ..criteria import CRITERIA
from ..domains.load import Domain
from ..domains.manifest import MANIFEST_NAME, Manifest
from ..errors import StructPruneError
from ..fingerprint import fingerprint, vocabulary_hash
from ..registry import did_you_mean
from .moments import Moments, load_moments


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STATISTICS = "statistics.json"
HELDOUT = "heldout.safetensors"


@dataclass(frozen=True)
class StoredDomain:
    """What is known of a domain.

    Attributes:
        name: Of the domain.
        weight: Its share when it was calibrated on; those of all domains sum to 1.
        shape: Of its calibration samples.
    """

    name: str
    weight: float
    shape: Sequence[int]


@dataclass(frozen=True)
class StoredFile:
    """What tells whether a file is whole.

    Attributes:
        size: In bytes.
        sha256: Of its content.
    """

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> StoredFile:
        """Of a file that is there and not empty; an OSError or a ValueError otherwise."""
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return cls(len(content), sha256(content).hexdigest())


@dataclass(frozen=True)
class Statistics:
    """Moments of the inputs of a dense model's consumers, by domain, with their Gram matrices.

    Attributes:
        folder: That holds them.
        model_type: Of the model.
        model: `fingerprint` of the model.
        tokenizer: `vocabulary_hash` of its tokenizer; None where there was none.
        saliency: Whether they say what the loss makes of every component, for criteria that need gradients.
        domains: In the order of the moments.
        files: Every other file, by name.
    """

    folder: Path
    model_type: str
    model: str
    tokenizer: str | None
    saliency: bool
    domains: Sequence[StoredDomain]
    files: Mapping[str, StoredFile]

    @classmethod
    def load(cls, folder: str | Path) -> Statistics:
        """Read what `calibrate` wrote; the moments themselves are read layer by layer, when they are needed.

        Raises:
            StructPruneError: If there are no statistics, their description is damaged, or a file is missing or cut.
        """
        path = Path(folder) / STATISTICS
        if not path.is_file():
            raise StructPruneError(
                f"{folder} holds no statistics ({STATISTICS}); write some with `structprune calibrate MODEL {folder}`."
            )
        data = read_mapping(path, json.loads)
        try:
            domains = [StoredDomain(**domain) for domain in data["domains"]]
            files = {name: StoredFile(**file) for name, file in data["files"].items()}
            found = cls(**{**data, "folder": Path(folder), "domains": domains, "files": files})
        except (KeyError, TypeError, AttributeError) as error:
            raise StructPruneError(f"{path} does not describe statistics ({error}); calibrate again.") from error
        for name, file in found.files.items():
            size = (found.folder / name).stat().st_size if (found.folder / name).is_file() else 0
            if size != file.size:
                raise StructPruneError(
                    f"{found.folder / name} has {size:,} bytes instead of {file.size:,}; calibrate again."
                )
        return found

    def save(self) -> None:
        """Write the description."""
        data = {name: value for name, value in asdict(self).items() if name != "folder"}
        (self.folder / STATISTICS).write_text(json.dumps(data, indent=2) + "\n")

    @property
    def tokens(self) -> dict[str, int]:
        """Number of calibration tokens, by domain."""
        return {domain.name: torch.Size(domain.shape).numel() for domain in self.domains}

    def __str__(self) -> str:
        """Tokens by domain, and what the folder holds."""
        size = sum(file.size for file in self.files.values())
        tokens = ", ".join(f"{name} {count:,} tokens" for name, count in self.tokens.items())
        return f"{self.model_type}: {tokens}; {size / 1e6:,.1f} MB, {'with' if self.saliency else 'without'} gradients"

    def check(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Refuse another model than the one that was calibrated, and another tokenizer.

        Raises:
            StructPruneError: If a weight, the config, the dtype or the vocabulary differs.
        """
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

    def check_use(self, config: StructPruneConfig, arch: ArchSpec, names: Collection[str]) -> None:
        """Refuse what the stored moments say nothing of.

        Args:
            config: How to prune.
            arch: The model.
            names: Spaces that shrink.

        Raises:
            StructPruneError: If a space is judged by something else than moments, or there are no gradients.
        """
        for name in names:
            if any(space.experts is not None or space.layer == MODEL for space in arch.of(name)):
                raise StructPruneError(
                    f"Stored statistics are moments of what consumers read, and {name!r} is judged by something else; "
                    "prune without stats."
                )
        if CRITERIA.get(config.scored_by).needs_gradient and not self.saliency:
            raise StructPruneError(
                f"criterion={config.criterion!r} needs gradients, which {self.folder} does not hold; write them with "
                f"`structprune calibrate MODEL {self.folder} --criterion {config.criterion} --overwrite`."
            )

    def chosen(self, config: StructPruneConfig) -> list[Domain]:
        """The domains that a config names, with its weights; all of them, with their own, where it names none.

        Their calibration samples are shapes without content (on the meta device): nothing is to be run on them.

        Raises:
            StructPruneError: If the config names a domain that is not there, or the held-out samples are damaged.
        """
        weights = {domain.name: domain.weight for domain in self.domains}
        if config.domains != builtin_domains():
            weights = {domain.name: float(domain.weight) for domain in config.domains}
        names = [domain.name for domain in self.domains]
        for name in weights:
            if name not in names:
                raise StructPruneError(
                    f"{self.folder} holds no statistics of a domain {name!r}; it has {', '.join(names)}."
                    f"{did_you_mean(name, names)}"
                )
        heldout = _tensors(self._checked(HELDOUT))
        total = sum(weights.values())
        return [
            Domain(
                domain.name,
                weights[domain.name] / total,
                torch.empty(domain.shape, device="meta"),
                heldout[str(index)],
            )
            for index, domain in enumerate(self.domains)
            if domain.name in weights
        ]

    def manifest(self, domains: Sequence[Domain]) -> Manifest:
        """What was calibrated on, as far as it is used now."""
        weights = {domain.name: domain.weight for domain in domains}
        whole = Manifest.load(self._checked(MANIFEST_NAME))
        used = [replace(entry, weight=weights[entry.name]) for entry in whole.domains if entry.name in weights]
        return replace(whole, domains=used)

    def layer(self, layer: int, device: torch.device | str = "cpu") -> dict[str, Moments]:
        """Moments of one layer's taps, by `key`.

        Raises:
            StructPruneError: If the file is missing or damaged.
        """
        return load_moments(self._checked(layer_name(layer)), device)

    def _checked(self, name: str) -> Path:
        path = self.folder / name
        try:
            same = StoredFile.of(path) == self.files.get(name)
        except (OSError, ValueError) as error:
            raise StructPruneError(f"{path} cannot be read ({error}); calibrate again.") from error
        if not same:
            raise StructPruneError(f"{path} is damaged, or from another run: its hash differs; calibrate again.")
        return path


class StoredPasses:
    """What stands in for forward passes over the calibration samples: the moments of the dense model.

    Nothing runs, so a layer is not fitted to what the layers before it give once they are pruned.

    Args:
        statistics: Where the moments are.
        domains: Those that are used.
        gradient: Whether the criterion reads `Moments.saliency`.
        device: Where the moments are needed.
    """

    def __init__(self, statistics: Statistics, domains: Sequence[Domain], gradient: bool, device: torch.device):
        names = [domain.name for domain in statistics.domains]
        self.statistics, self.gradient, self.device = statistics, gradient, device
        self.indices = [names.index(domain.name) for domain in domains]
        self.at: tuple[int, dict[str, Moments]] = (-1, {})

    def gather(self, layer: int, space: Space, gram: bool) -> list[list[Moments]]:
        """See `Passes.gather`."""
        if self.at[0] != layer:
            # One layer's moments at a time are in memory.
            self.at = (-1, {})
            self.at = (layer, self.statistics.layer(layer, self.device))
        # A run over text would not have gathered what is not asked for, and what is there is used.
        unused: dict[str, Any] = {
            name: None for name, used in (("gram", gram), ("saliency", self.gradient)) if not used
        }
        return [
            [replace(self.at[1][key(axis.module, index)], **unused) for index in self.indices] for axis in space.into
        ]

    def contributions(self, layer: int, space: Space) -> Tensor:
        """Refused: what an expert contributes is not stored."""
        raise StructPruneError(
            f"How much the experts of {space.name!r} contribute follows from running them, and is not stored; prune "
            "without stats."
        )

    def follow(self, layer: int, kinds: Collection[str]) -> None:
        """See `Passes.follow`; there is no stream."""

    def advance(self, layer: int) -> None:
        """See `Passes.advance`; there is nothing to run."""


def layer_name(layer: int) -> str:
    """File of one layer's moments."""
    return f"layer-{layer:03d}.safetensors"


def key(tap: str, domain: int) -> str:
    """Name of the moments of a tap in a domain, by number."""
    return f"{tap}/{domain}"


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise StructPruneError(f"{path} cannot be read ({error}); calibrate again.") from error
