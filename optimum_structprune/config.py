"""What to remove and how: one strict, serialisable dataclass."""

# No `from __future__ import annotations` here: `strict` checks types only where it sees them, not their names.
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub.dataclasses import strict, validated_field

from .recovery_config import RecoveryConfig
from .registry import did_you_mean
from .schema import (
    DomainConfig,
    Number,
    SelfTextConfig,
    Serialisable,
    above_one,
    check_names,
    filled,
    not_negative,
    positive,
    proportion,
    read_mapping,
    read_yaml,
    share,
    up_to_one,
    with_domains,
)


CONFIG_NAME = "structprune_config.json"
# The fields of which exactly one says how much is removed.
AMOUNTS = ("sparsity", "widths", "budget")
BUDGETS = ("parameters", "bytes", "cache_bytes_per_token")


def builtin_domains() -> list[DomainConfig]:
    """The domains that need no download, in equal shares."""
    return [DomainConfig(name=name, source=f"builtin:{name}") for name in ("prose", "code", "math")]


@strict
@dataclass(kw_only=True)
class StructPruneConfig(Serialisable):
    """How a model is pruned. Exactly one of `sparsity`, `widths` and `budget` says how much.

    Args:
        method: Registered pruner.
        sparsity: Share of the blocks' parameters to remove.
        widths: Number of units to keep, by space, such as `{"mlp": 1152, "attention": 2}`; with another
            `allocation` than `uniform` their mean over the blocks.
        budget: What the whole model may have at most: `{"parameters": 110_000_000}`, `{"bytes": 300_000_000}` of
            parameters in its dtype, or `{"cache_bytes_per_token": 9000}` of keys and values. The widths are the
            largest that keep to it.
        targets: Spaces that may shrink when `sparsity` or `budget` chooses the widths.
        criterion: Registered criterion that scores the units; None is `obs` with a least-squares refit, else `wanda`.
        refit: What makes up for the removed units: `none`, `bias` or `least_squares`.
        rounds: Number of times that calibration, scoring and removal are repeated, each removing a part.
        schedule: How the rounds divide the removal: `linear`, `geometric` or `cubic`.
        allocation: How the removal is spread over the blocks: `uniform` keeps the same width everywhere, `global`
            ranks all units of the model by score, `sensitivity` by what the model is measured to lose with them.
        min_width: Share of its units that every block keeps at least, where the allocation is not `uniform`.
        max_width: Share of its units that a block keeps at most, likewise.
        round_to: Channel widths that `sparsity` or `budget` chooses are multiples of this; explicit ones need not be.
        domains: Calibration text; more than one kind makes the result general.
        stats: Folder that `structprune calibrate` wrote: its moments of the dense model stand in for text, and
            `domains` only chooses among its domains and weighs them.
        normalisation: What puts the evidence of the domains on one scale: `energy` divides by what a domain puts
            out, `zscore` and `rank` compare scores only, `none` leaves loud domains loud.
        aggregation: How the evidence of several domains becomes one score: `mean` pools it, `max` keeps what any
            domain needs, `worst` protects the domain that would lose most, `harmonic` drops what any domain can do
            without, `quantile` lies between. `max` and `quantile` take no account of the domains' weights.
        quantile: For the aggregation `quantile`: 0.5 is the median of the domains, near 1 it is `max`.
        adaptive_rate: After each round, domains that have lost more than the mean on held-out text count more, the
            faster the higher this is; 0 leaves the weights as they are.
        objective: `mean` lets weights move by a factor of 2; `worst` re-weights (at the rate 1 unless said otherwise)
            by up to 8, so that no domain is left behind.
        max_perplexity_ratio: Prune no further than every domain's held-out perplexity stays below this multiple of the
            dense model's; the rounds go toward the target and stop there.
        checkpoint_dir: Folder that remembers each round; a run that was killed goes on from there.
        keep_rounds: Also leave the smaller and smaller models there, as `round-1`, `round-2`, …, all but the last.
        select: Which blocks of a pool are used: `random`, `length` (of the longest documents), `diverse` (nearest to
            the centres of k-means on mean activations) or `perplexity` (the middle of the distribution).
        pool_factor: Size of that pool, as a multiple of the blocks used.
        presets_file: YAML file with presets of your own, in the form of the built-in `presets.yaml`.
        self_text: How the model writes the domains `self:NAME`.
        num_samples: Token blocks for calibration in all, divided over the domains by weight.
        seq_length: Tokens per block.
        batch_size: Blocks per forward pass.
        damping: Ridge of the refit toward the original weights, relative to the diagonal of the Gram matrix.
        correction: How much of what the residual stream has lost so far a refit makes up for, for one forward pass
            more; 0 fits every block to the dense block's function alone, 1 to the dense model's stream.
        holdout: Share of each domain's blocks that is set aside, from other documents, for perplexity.
        skip_layers: Blocks that stay whole; the others give up as much more.
        recovery: Training after the last round, or after each; None leaves it out.
        seed: Of everything random.
        arch_file: YAML file that describes architectures of your own, in the form of the built-in `families.yaml`.
    """

    method: str = "iterative"
    sparsity: Number | None = validated_field(share, default=None)
    widths: dict[str, int] | None = None
    budget: dict[str, Number] | None = None
    targets: tuple[str, ...] | list[str] = validated_field(filled, default=("mlp", "attention"))
    criterion: str | None = None
    refit: Literal["none", "bias", "least_squares"] = "least_squares"
    rounds: int = validated_field(positive, default=1)
    schedule: Literal["linear", "geometric", "cubic"] = "geometric"
    allocation: Literal["uniform", "global", "sensitivity"] = "uniform"
    min_width: Number = validated_field(share, default=0.1)
    max_width: Number = validated_field(up_to_one, default=1.0)
    round_to: int = validated_field(positive, default=64)
    domains: list[DomainConfig] = field(default_factory=builtin_domains)
    stats: str | None = None
    normalisation: Literal["none", "energy", "zscore", "rank"] = "energy"
    aggregation: Literal["mean", "max", "harmonic", "quantile"] = "mean"
    quantile: Number = validated_field(share, default=0.75)
    adaptive_rate: Number = validated_field(not_negative, default=0.0)
    objective: Literal["mean", "worst"] = "mean"
    max_perplexity_ratio: Number | None = validated_field(above_one, default=None)
    checkpoint_dir: str | None = None
    keep_rounds: bool = False
    select: Literal["random", "length", "diverse", "perplexity"] = "random"
    pool_factor: int = validated_field(positive, default=4)
    presets_file: str | None = None
    self_text: SelfTextConfig = field(default_factory=SelfTextConfig)
    num_samples: int = validated_field(positive, default=128)
    seq_length: int = validated_field(positive, default=512)
    batch_size: int = validated_field(positive, default=4)
    damping: Number = validated_field(not_negative, default=0.1)
    correction: Number = validated_field(proportion, default=0.5)
    holdout: Number = validated_field(share, default=0.125)
    skip_layers: tuple[int, ...] | list[int] = ()
    recovery: RecoveryConfig | None = None
    seed: int = 0
    arch_file: str | None = None

    def __post_init__(self) -> None:
        self.targets = tuple(self.targets)
        self.skip_layers = tuple(self.skip_layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able values."""
        nested = {
            "domains": [domain.to_dict() for domain in self.domains],
            "self_text": self.self_text.to_dict(),
            "recovery": None if self.recovery is None else self.recovery.to_dict(),
        }
        return {**super().to_dict(), **nested}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "StructPruneConfig":
        """Inverse of `to_dict`; domains, self_text and recovery may be mappings.

        Raises:
            StructPruneError: If a key is unknown or a value is not legal; the message names the field and the value.
        """
        data = with_domains(data, cls.__name__)
        if isinstance(self_text := data.get("self_text"), Mapping):
            data = {**data, "self_text": SelfTextConfig.from_dict(self_text)}
        if isinstance(recovery := data.get("recovery"), Mapping):
            data = {**data, "recovery": RecoveryConfig.from_dict(recovery)}
        return super().from_dict(data)

    def validate_amount(self) -> None:
        """Exactly one of `sparsity`, `widths` and `budget`, and numbers that are positive."""
        given = {name: getattr(self, name) for name in AMOUNTS}
        if sum(value is not None for value in given.values()) != 1:
            found = ", ".join(f"{name}={value}" for name, value in given.items())
            raise ValueError(f"exactly one of sparsity, widths and budget says how much to remove, got {found}")
        for name, most in (self.budget or {}).items():
            if name not in BUDGETS:
                raise ValueError(f"budget has no {name!r}.{did_you_mean(name, BUDGETS)}")
            if most <= 0:
                raise ValueError(f"budget[{name!r}] has to be greater than 0, got {most}")
        if self.budget is not None and len(self.budget) != 1:
            raise ValueError(f"budget names exactly one of {', '.join(BUDGETS)}, got {self.budget}")
        for name, width in (self.widths or {}).items():
            if width < 1:
                raise ValueError(f"widths[{name!r}] has to be 1 or more, got {width}")
        if self.widths == {}:
            raise ValueError("widths has to name at least one space, such as {'mlp': 1152}, got {}")

    def validate_recovery(self) -> None:
        """A result that one folder can hold."""
        if self.recovery is not None and not self.recovery.merge:
            raise ValueError(
                "recovery with merge=False leaves an adapter beside the model; prune and save without recovery, "
                "then call recover"
            )

    @property
    def scored_by(self) -> str:
        """The criterion, named or not."""
        return self.criterion or ("obs" if self.fits else "wanda")

    @property
    def fits(self) -> bool:
        """Whether the weights that stay are fitted to what the dense ones gave, which takes Gram matrices."""
        return self.refit == "least_squares"

    @property
    def reweights(self) -> bool:
        """Whether the weights of the domains change from round to round."""
        return self.adaptive_rate > 0 or self.objective == "worst"

    @property
    def spans_rounds(self) -> bool:
        """Whether something besides the model goes from one round to the next."""
        return self.measures or self.checkpoint_dir is not None

    @property
    def measures(self) -> bool:
        """Whether a round that is not the last is measured on held-out text."""
        return self.reweights or self.keep_rounds or self.max_perplexity_ratio is not None

    def validate_evidence(self) -> None:
        """Settings that only work together."""
        if self.reweights and self.rounds < 2:
            raise ValueError(
                f"adaptive_rate={self.adaptive_rate} and objective={self.objective!r} re-weight domains between "
                f"rounds, and rounds={self.rounds} leaves none; set rounds=3"
            )
        if self.aggregation == "harmonic" and self.normalisation == "zscore":
            raise ValueError(
                "aggregation='harmonic' takes positive scores, and normalisation='zscore' gives negative ones"
            )
        if self.keep_rounds and self.checkpoint_dir is None:
            raise ValueError("keep_rounds=True leaves models in checkpoint_dir, which is None; name a folder")
        if self.keep_rounds and self.rounds < 2 and self.max_perplexity_ratio is None:
            raise ValueError("keep_rounds=True leaves the models before the last, and rounds=1 has none; set rounds=3")
        if self.spans_rounds and self.recovery is not None and self.recovery.every_round:
            raise ValueError(
                "recovery with every_round=True makes each round a pruning of its own, and adaptive_rate, objective, "
                "max_perplexity_ratio, keep_rounds and checkpoint_dir span rounds; leave out either"
            )

    def validate_stats(self) -> None:
        """Nothing that stored statistics cannot give."""
        for clash, text in (
            (self.allocation == "sensitivity", "allocation='sensitivity' runs the model on held-out text"),
            (self.select != "random", f"select={self.select!r} chooses text to calibrate on"),
            (
                self.recovery is not None and self.recovery.every_round,
                "recovery with every_round=True calibrates on a trained model after each round",
            ),
        ):
            if clash and self.stats is not None:
                raise ValueError(
                    f"{text}, but stats={self.stats!r} holds moments of the dense model; leave out one of the two"
                )
        unnamed = self.recovery is not None and self.recovery.domains is None and self.domains == builtin_domains()
        if self.stats and unnamed:
            raise ValueError(
                f"recovery trains on text, stats={self.stats!r} holds none, and no domain is named; name them in "
                "domains, or in the domains of recovery"
            )

    def validate_domains(self) -> None:
        """At least one domain, and no two of the same name."""
        check_names(self.domains)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `structprune_config.json` into a folder, which is made if need be."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_NAME).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, save_directory: str | Path) -> "StructPruneConfig":
        """Read `structprune_config.json` from a folder."""
        return cls.from_dict(read_mapping(Path(save_directory) / CONFIG_NAME, json.loads))

    def to_yaml(self, path: str | Path) -> None:
        """Write a YAML file."""
        Path(path).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False))

    @classmethod
    def from_yaml(cls, path: str | Path) -> "StructPruneConfig":
        """Read a YAML file."""
        return cls.from_dict(read_yaml(path))
