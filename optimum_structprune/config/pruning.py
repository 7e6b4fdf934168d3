"""The configs of a pruning: `StructPruneConfig` says what is done, `RunOptions` how the machine does it."""

# No `from __future__ import annotations` here: `strict` checks types only where it sees them, not their names.
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict, validated_field

from ..registry import Registry, did_you_mean
from ..written import replace_json, versioned
from .domains import GENERAL, DomainConfig, WithDomains, is_general
from .fields import (
    LARGEST,
    FieldError,
    Number,
    Serialisable,
    below_one,
    by_layer,
    config_class,
    filled,
    positive,
    proportion,
    read_json,
    seed_of_all,
    share,
)
from .recovery import RecoveryConfig


CONFIG_NAME = "structprune_config.json"
# The fields of which exactly one says how much is removed.
AMOUNTS = ("sparsity", "widths", "budget")
# The allocations that give all layers one width.
ONE_WIDTH = ("uniform", "search_uniform")
# What makes up for removed units, see `method.refit.least_squares`.
REFITS: Registry[Any] = Registry("refit", "optimum_structprune.refits", ("none", "least_squares"))
# The languages of which there are texts, by their codes (ISO 639-1).
LANGUAGES = {
    "ar": "Arabic", "bg": "Bulgarian", "bn": "Bengali", "cs": "Czech", "de": "German", "el": "Greek", "en": "English",
    "es": "Spanish", "fa": "Persian", "fi": "Finnish", "fr": "French", "he": "Hebrew", "hi": "Hindi",
    "hu": "Hungarian", "id": "Indonesian", "it": "Italian", "ja": "Japanese", "ko": "Korean", "nl": "Dutch",
    "pl": "Polish", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "sv": "Swedish", "ta": "Tamil",
    "th": "Thai", "tr": "Turkish", "uk": "Ukrainian", "vi": "Vietnamese", "zh": "Chinese",
}  # fmt: skip
CACHE = "cache_bytes_per_token"
LOSS = "loss"
BUDGETS = ("parameters", "bytes", CACHE, LOSS)
AUTO = "auto"


def _codes(languages: Sequence[str]) -> tuple[str, ...]:
    """Languages by their codes, of which one or several with commas stand in each string; a region is left out."""
    named = (re.split("[-_]", code.strip().lower())[0] for text in languages for code in text.split(","))
    codes = tuple(dict.fromkeys(named))  # as each counts as much as the text
    for code in codes:
        if code not in LANGUAGES:
            known = [f"{known_code} ({name})" for known_code, name in LANGUAGES.items()]
            reason = f"has no language {code!r}.{did_you_mean(code, known)}"
            raise FieldError(StructPruneConfig.__name__, "languages", reason)
    return codes


def _check_amount(config: "StructPruneConfig") -> None:
    """Refuse all but one amount, and numbers that are not positive."""
    given = {name: getattr(config, name) for name in AMOUNTS}
    if sum(value is not None for value in given.values()) != 1:
        fields = ", ".join(f"{name}={value}" for name, value in given.items() if value is not None)
        tokens, flag = ("targets=['vocab'], ", "--target vocab ") if config.languages else ("", "")
        raise ValueError(
            f"exactly one of sparsity, widths and budget says how much to remove, got {fields or 'none'}; "
            f"{tokens}budget={{'parameters': 0.8}} ({flag}--budget parameters=0.8) keeps four fifths of a model"
        )
    for name, limit in (config.budget or {}).items():
        if name not in BUDGETS:
            raise ValueError(f"budget has no {name!r}.{did_you_mean(name, BUDGETS)}")
        if not 0 < limit <= LARGEST:
            raise ValueError(f"budget[{name!r}] has to be greater than 0, got {limit}")
        if name == LOSS and limit >= 1:
            raise ValueError(f"budget[{name!r}] has to be below 1, got {limit}; 0.02 allows a loss of 2 %")
    if config.budget is not None and len(config.budget) != 1:
        raise ValueError(f"budget names exactly one of {', '.join(BUDGETS)}, got {config.budget}")
    for name, width in (config.widths or {}).items():
        by_layer = [width] if isinstance(width, int) else width.values() if isinstance(width, dict) else width
        if min(by_layer, default=0) < 1:
            raise ValueError(f"widths[{name!r}] has to be 1 or more, got {width}")
    if config.widths == {}:
        raise ValueError("widths has to name at least one space, such as {'mlp': 1152}, got {}")


def _check_together(config: "StructPruneConfig") -> None:
    """Refuse fields that contradict each other whatever the model; see `pruning.request` for the others."""
    by_layer = any(not isinstance(width, int) for width in (config.widths or {}).values())
    if by_layer and (config.allocation != "uniform" or config.skip_layers):
        raise ValueError(
            f"widths={config.widths} says what every layer keeps, so allocation={config.allocation!r} and "
            f"skip_layers={list(config.skip_layers)} choose nothing; leave them out, or give one number per space"
        )
    if config.general_text is not None and config.general_share == 0:
        raise ValueError(
            f"general_text={config.general_text!r} has no share of the tokens, since general_share="
            f"{config.general_share}; set general_share=0.2, or leave general_text out"
        )
    if bool(config.general_share or config.general_text) and any(map(is_general, config.domains or ())):
        raise ValueError(
            f"general_share={config.general_share} adds a domain {GENERAL!r}, and domains has one; leave out either"
        )
    if config.allocation == "search_uniform" and (config.widths is not None or config.skip_layers):
        raise ValueError(
            f"allocation='search_uniform' looks for one shape of all layers, which widths={config.widths} and "
            f"skip_layers={list(config.skip_layers)} contradict; leave them out, or choose allocation='search'"
        )


@config_class
@strict
@dataclass(kw_only=True)
class RunOptions(Serialisable):
    """Holds the settings of the machine. No field changes what comes out, but for the rounding of sums.

    Args:
        batch_size: The number of samples in a forward pass.
        checkpoint_dir: A folder that remembers measured losses and finished layers. A run that was killed goes on from
            there, and runs with other targets read the losses. It takes one round.

    Raises:
        StructPruneError: If a field is unknown, or a value has another type or lies outside of its range.
    """

    batch_size: int = validated_field(positive, default=4)
    checkpoint_dir: str | None = None


@config_class
@strict
@dataclass(kw_only=True)
class StructPruneConfig(WithDomains):
    """Holds the settings of a pruning. Exactly one of `sparsity`, `widths` and `budget` says how much.

    Args:
        sparsity: The share of the layers' parameters to remove, between 0 and 1. Embeddings do not count, so it is
            less of the whole model, and the FFN loses a larger share of its channels: 0.2 of SmolLM2-135M are 27 % of
            these and 16 % of all parameters.
        widths: How many units each named space keeps. `{"mlp": 1152, "attention": 2}` has one number for all layers, a
            list one for each layer, and a mapping one for each layer that it names: `{"mlp": {0: 1536, 1: 1024}}`.
            With another `allocation` than `uniform`, each number is the mean over the layers.
        budget: What the whole model may have at most, in `parameters`, `bytes` or `cache_bytes_per_token`, or the
            `loss` that it may have. `{"bytes": 300_000_000}` are those of the parameters in the model's dtype, and the
            cache is that of keys and values. A number below 1 is a share of what the dense model has. The widths are
            the largest that keep to it. `{"loss": 0.02}` finds the smallest model, by a few prunings on trial, whose
            perplexity on the domains and on other text is at most 1.02 times the dense model's, margins of error
            included, or for an encoder, whose vectors have a mean cosine of 0.998 to the dense model's.
        targets: The spaces that may shrink where `sparsity` or `budget` chooses the widths; None stands for `mlp`, and
            for all channels inside the layers of a model without `mlp`. That loses least where nothing is measured. A
            budget of parameters or bytes takes `vocab` too where tokens are a large part of the model. With an
            allocation that measures losses None stands for `mlp` and `attention` as far as the model has them and
            their layers may differ, with a budget of the cache for `attention`.
        keep_tokens: What stays of a vocabulary that gets smaller (`vocab`): a file with a token or a text in each
            line, or a regular expression that fits the text of tokens.
        languages: The languages whose words, counted with the package `wordfreq`, say beside text which tokens stay
            where a vocabulary gets smaller (`vocab`), such as `de,en`. None stands for text alone, and for other text
            in its scripts. Units inside the layers are calibrated on a little built-in text in each, with a tenth of
            the weight.
        criterion: The registered criterion that scores the units. None stands for `obs_drive` with a least-squares
            refit, and for `wanda` otherwise. Whole experts have criteria of their own, of which `reap` is the
            default, and whole layers too.
        refit: What makes up for the removed units: `none`, `least_squares`, or a registered refit.
        rounds: How many times calibration, scoring and removal are repeated; each round removes the same share.
        allocation: How the removal is spread over the layers. `uniform` keeps the same width everywhere. The others go
            by the measured loss of the model: `sensitivity` gives each layer widths of its own, `search` also tries
            one shape for all layers, and `search_uniform` looks for the best widths that are the same everywhere.
        round_to: Channel widths that `sparsity` or `budget` chooses are multiples of this number. Explicit widths
            need not be. `auto` is the largest power of two up to 64 with which all layers together come within 1 % of
            the layers' parameters to any goal: 64 in models of usual size, and less in small ones.
        tensor_parallel: How many devices will share each matrix of the result, as with vLLM's option of that name.
            Numbers of KV groups and experts that `sparsity` or `budget` chooses are multiples of it, and so are widths
            with `round_to="auto"`; in models that are large enough, these are multiples of 128 times as much.
        domains: The calibration text. More than one kind of text makes the result general. None stands for built-in
            prose, code and math in equal shares.
        general_share: The share of the calibration tokens that is general text, of every kind, beside the domains: it
            keeps the loss small on text that nobody named. None stands for a half where no domains are named, and for
            a fifth beside domains where there is `general_text`.
        general_text: The source of the general text, such as `self:any`, `builtin:general` or `preset:general`. None
            stands for `builtin:general` where no domains are named. Beside domains it stands for `self:any` where the
            model is in memory and can write and no tokens go, and otherwise for `builtin:general` if `general_share`
            asks for it.
        num_samples: The number of calibration samples in all, divided over the domains by weight.
        seq_length: The number of tokens in a sample.
        error_feedback: The share of the error of the residual stream so far that a refit makes up for, at the cost of
            one more forward pass. 0 fits every layer to its own dense function, 1 to the dense model's stream.
        skip_layers: The layers that are not pruned; the others give up as much more.
        recovery: Training after the pruning; None leaves it out.
        seed: The seed of everything random.
        arch_file: A YAML file that describes architectures of your own, in the form of the files in `arch/families`.

    Raises:
        StructPruneError: If a field is unknown, or a value has another type, lies outside of its range, or contradicts
            another one. The message names the field and the value.
    """

    gone = {"method": "iterative", "objective": "mean", "expert_parallel": 1, "losses_dir": None}
    gone |= {"damping": 0.08, "holdout": 0.125}
    # The ridge of a refit toward the original weights, relative to the diagonal of the Gram matrix. It is twice as
    # strong where there are 20 tokens per column, and so on; see `method.refit.ridge_strength`.
    damping: ClassVar[float] = 0.08
    # The share of each domain's samples that is set aside, from other documents, to measure perplexity. Where that is
    # under 4,000 tokens, it grows as far as there is text, to half of what calibrates at most. The share is set aside
    # once more where widths follow from measurements, which are made on that instead.
    holdout: ClassVar[float] = 0.125
    moved = ("batch_size", "checkpoint_dir")
    parts = {**WithDomains.parts, "recovery": lambda values, _: RecoveryConfig.from_dict(values)}

    sparsity: Number | None = validated_field(share, default=None)
    widths: dict[str, int | list[int] | dict[Any, int]] | None = None
    budget: dict[str, Number] | None = None
    targets: tuple[str, ...] | list[str] | None = validated_field(filled, default=None)
    keep_tokens: str | None = None
    languages: tuple[str, ...] | list[str] | None = validated_field(filled, default=None)
    criterion: str | None = None
    refit: str = validated_field(REFITS.check, default="least_squares")
    rounds: int = validated_field(positive, default=1)
    allocation: Literal["uniform", "sensitivity", "search", "search_uniform"] = "uniform"
    round_to: int | Literal["auto"] = validated_field(positive, default=AUTO)
    tensor_parallel: int = validated_field(positive, default=1)
    domains: list[DomainConfig] | None = None
    general_share: Number | None = validated_field(below_one, default=None)
    general_text: str | None = None
    num_samples: int = validated_field(positive, default=128)
    seq_length: int = validated_field(positive, default=512)
    error_feedback: Number = validated_field(proportion, default=0.5)
    skip_layers: tuple[int, ...] | list[int] = ()
    recovery: RecoveryConfig | None = None
    seed: int = validated_field(seed_of_all, default=0)
    arch_file: str | None = None

    # `strict` calls what has such a name once all fields have their values.
    validate_amount = _check_amount
    validate_together = _check_together

    def __post_init__(self) -> None:
        self.targets = self.targets and tuple(self.targets)
        self.skip_layers = tuple(self.skip_layers)
        if self.languages is not None:
            self.languages = _codes(self.languages)
        if self.widths is not None:
            self.widths = {
                name: by_layer(width, f"widths[{name!r}]") if isinstance(width, Mapping) else width
                for name, width in self.widths.items()
            }

    @property
    def targets_or_default(self) -> tuple[str, ...]:
        """The spaces that may shrink if `sparsity` or `budget` chooses their widths, named or not."""
        by_default = ("mlp", "attention") if self.allocation != "uniform" else ("mlp",)
        return tuple(self.targets or (("attention",) if CACHE in (self.budget or {}) else by_default))

    @property
    def removes_tokens(self) -> bool:
        """Whether the config names the vocabulary among the spaces to prune."""
        return "vocab" in (self.widths or self.targets_or_default)

    @property
    def may_remove_tokens(self) -> bool:
        """Whether a budget without targets also takes tokens, if the vocabulary of the model is large."""
        return self.targets is None and any(name in (self.budget or {}) for name in ("parameters", "bytes", LOSS))

    @property
    def scored_by(self) -> str:
        """The criterion, named or not."""
        return self.criterion or ("obs_drive" if self.refit == "least_squares" else "wanda")

    @property
    def feedback_share(self) -> float:
        """The share of the error of the residual stream that the refit makes up for."""
        return float(self.error_feedback) if self.refit == "least_squares" else 0.0

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `structprune_config.json` into a folder, which is made if need be."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        replace_json(folder / CONFIG_NAME, versioned(self.to_dict()))

    @classmethod
    def from_pretrained(cls, save_directory: str | Path) -> "StructPruneConfig":
        """Read `structprune_config.json` from a folder."""
        return cls.from_dict(read_json(Path(save_directory) / CONFIG_NAME))
