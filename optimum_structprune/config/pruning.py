"""The configs of a pruning: `StructPruneConfig` describes the result, `RunOptions` the run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..system.codec import by_layer, field_types
from ..system.errors import StructPruneError, warn
from ..system.registry import Registry, did_you_mean
from ..system.written import replace_json, versioned
from .domains import GENERAL, DomainConfig, check_domains, is_general
from .fields import Config, bytes_of, read_json
from .recovery import RecoveryConfig


CONFIG_NAME = "structprune_config.json"
# The fields that determine how much is removed. A config has exactly one of them.
AMOUNTS = ("sparsity", "widths", "budget")
# The built-in refits are in `method/refit.py`.
REFITS: Registry[Any] = Registry("refit", "optimum_structprune.refits", ("none", "least_squares"))
# The languages with built-in text, by their codes (ISO 639-1).
LANGUAGES = {
    "ar": "Arabic", "bg": "Bulgarian", "bn": "Bengali", "cs": "Czech", "de": "German", "el": "Greek", "en": "English",
    "es": "Spanish", "fa": "Persian", "fi": "Finnish", "fr": "French", "he": "Hebrew", "hi": "Hindi",
    "hu": "Hungarian", "id": "Indonesian", "it": "Italian", "ja": "Japanese", "ko": "Korean", "nl": "Dutch",
    "pl": "Polish", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "sv": "Swedish", "ta": "Tamil",
    "th": "Thai", "tr": "Turkish", "uk": "Ukrainian", "vi": "Vietnamese", "zh": "Chinese",
}  # fmt: skip
CACHE = "cache_bytes_per_token"
ACTIVE = "active_parameters"
FILE = "file"
SPEED = "speed"
# The uses whose speed is measured: of encoders, and of causal language models. The first one is the default.
ENCODER_USES = ("encode", "query")
CAUSAL_USES = ("decode", "prompt")
# The figures that a budget limits, by name. `widths.budget` has the functions that compute them.
BUDGETS = ("parameters", ACTIVE, "bytes", CACHE, FILE, SPEED)
# The figures in bytes, whose limits may have a unit.
IN_BYTES = ("bytes", CACHE, FILE)
AUTO: Literal["auto"] = "auto"


@dataclass(kw_only=True)
class RunOptions(Config):
    """Runtime options. They do not change the result beyond floating-point rounding.

    Args:
        batch_size: The number of samples in a forward pass.
        checkpoint_dir: A folder for checkpoints of the run, with its measured losses and finished layers. A run that
            was killed resumes from it, and runs with other targets reuse the losses. It needs `rounds=1`.
        measure: Whether to measure the original and the pruned model on held-out and unseen text. Without it, the
            weights are the same, and the report has sizes only.

    Raises:
        StructPruneError: If a field is unknown, or a value has another type or is out of range.
    """

    batch_size: int = 4
    checkpoint_dir: str | None = None
    measure: bool = True

    def validate(self) -> None:
        """Raise `StructPruneError` if a value has another type or is out of range."""
        super().validate()
        self.check_count("batch_size")


@dataclass(kw_only=True)
class StructPruneConfig(Config):
    """Settings of a pruning. Exactly one of `sparsity`, `widths` and `budget` says how much to remove.

    Args:
        sparsity: The fraction of the layers' parameters to remove, between 0 and 1. Embeddings do not count, so the
            fraction of the whole model is smaller. Only some spaces shrink, so their own fraction is larger:
            `sparsity=0.2` removes 27 % of the FFN channels of SmolLM2-135M and 16 % of all its parameters.
        widths: The number of units that each named space keeps, such as `mlp=1152`. `{"mlp": 1152, "attention": 2}`
            has one number for all layers. A list has one number for each layer, and a mapping one for each layer that
            it names: `{"mlp": {0: 1536, 1: 1024}}`. Unless `allocation` is `uniform`, each number is the mean over the
            layers.
        budget: The upper limits of the whole model in `parameters`, `active_parameters`, `bytes`,
            `cache_bytes_per_token` or `file`, one or several at once. A token runs through the active parameters: all
            but the experts that it does not choose. `bytes` is the size of the parameters in the model's dtype. The
            cache is the cache of keys and values. `{"file": "160MB"}` limits the file that is served: the GGUF file of
            the type `gguf`, or without it the `*.safetensors` files with `tokenizer.json`. Bytes may have a unit such
            as MB (10^6 bytes) or MiB (2^20 bytes). A number below 1 is a fraction of the original model.
            `{"speed": 1.5}` asks for a model that is 1.5 times as fast as the original on this machine, measured on
            models of its shape with random weights; see `speed_use`.
        gguf: The data type of the matrices of the GGUF file for llama.cpp: `q8_0`, `q5_0`, `q4_0`, `f16`, or with
            llama.cpp also `q4_k_m`. `structprune prune` writes the file to OUT-TYPE.gguf. With a budget of the `file`,
            `auto` searches for the type too: shapes in several types compete by their losses after quantization, and
            the whole original model in fewer bits is one of them.
        speed_use: The use whose speed the budget `speed` limits. The default is `encode` for encoders (32 texts of 128
            tokens at once) and `decode` for causal language models (the next token after a prompt of 128 tokens, for
            one sequence). `query` is one text of 32 tokens, and `prompt` the first token after the prompt.
        targets: The spaces that may shrink where `sparsity` or `budget` determines the widths: `mlp`, `attention`,
            `expert`, `hidden`, `layer`, `vocab`. `structprune inspect` shows the spaces of a model. The default is
            `mlp`, and all channels inside the layers for a model without `mlp`. Under a budget of parameters or bytes,
            `vocab` is a target too if tokens are a large part of the model, and trials decide whether these tokens,
            `mlp` or `attention` shrink. If the allocation measures losses, the default is `mlp` and `attention`, as
            far as the model has them and their layers may differ. Under a budget of the cache it is `attention`, and
            with a second limit `mlp` and `attention`.
        keep_tokens: Tokens that a pruned vocabulary (`vocab`) keeps: a file with a token or a text in each line, or a
            regular expression that matches the text of tokens.
        languages: Codes of languages to keep where a vocabulary is pruned (`vocab`), such as `de,en`. Their words are
            counted in addition to the text, with the frequencies of the package `wordfreq`. Without languages, only
            the text counts, and scripts that it does not use are pruned. Calibration also reads built-in text in each
            language, with a tenth of the weight.
        criterion: The criterion that scores the units: `obs_drive`, `obs`, `wanda`, `flap`, `magnitude`, `random`, or
            a registered one; `reap` and `reap_sum` score experts, and `block_influence` scores layers. The default is
            `obs_drive` with a least-squares refit, and `wanda` otherwise. Whole experts and whole layers have criteria
            of their own. The default for experts is `reap`.
        refit: The method that updates the kept weights: `none`, `least_squares`, or a registered refit.
        rounds: The number of rounds of calibration, scoring and removal. Each round removes the same fraction.
        allocation: The distribution of the removal over the layers. `uniform` uses the same width for all layers.
            `sensitivity` measures the loss of each layer and chooses a width for each layer.
        round_to: Channel widths that `sparsity` or `budget` determines are multiples of this number. Explicit
            widths need not be. `auto` is the largest power of two up to 256 that reaches any target within 1 % of the
            layers' parameters: 256 from about 10,000 channels on, and less in smaller models.
        tensor_parallel: The number of devices that will share each matrix of the pruned model, as with vLLM's option
            of this name. Numbers of KV groups and experts that `sparsity` or `budget` determines are multiples of it.
            With `round_to="auto"`, so are widths, which are multiples of 128 times this number in large models.
        domains: The calibration text. Several kinds of text make the pruned model more general. The default is
            built-in prose, code and math in equal parts.
        general_share: The fraction of the calibration tokens that is general text. It limits the loss on text that
            no domain covers. The default is 0.5 without `domains`, and 0.2 with `domains` and `general_text`.
        general_text: The source of the general text, such as `self:any`, `builtin:general` or `preset:general`. The
            default is `builtin:general` without `domains`. With `domains` it is `self:any` if the model is in memory,
            can generate text and keeps its tokens, and otherwise `builtin:general` if `general_share` is set.
        num_samples: The total number of calibration samples, which the domains share by weight.
        seq_length: The number of tokens in a sample.
        error_feedback: The fraction of the accumulated error of the residual stream that a refit corrects, at the
            cost of one more forward pass. With 0, each layer is fitted to its own original outputs; with 1, to the
            residual stream of the original model.
        skip_layers: Indices of layers that are not pruned. The remaining layers are pruned more, so the overall
            target is still met.
        recovery: Settings of a training after the pruning. Without them, the model is not trained.
        seed: The random seed.
        arch_file: A YAML file with descriptions of your own architectures, in the format of the files in
            `arch/families`.

    Raises:
        StructPruneError: If a field is unknown, or a value has another type, is out of range, or contradicts another
            value. The message names the field and the value.
    """

    # The ridge of a refit toward the original weights, relative to the diagonal of the Gram matrix. It is twice as
    # strong where there are 20 tokens per column, and so on; see `method.refit.ridge_strength`.
    damping: ClassVar[float] = 0.08
    # The fraction of each domain's samples that is held out, from other documents, to measure perplexity. If these
    # have less than 4,000 tokens, more are held out as far as there is text, at most half of the calibration samples.
    # An allocation that measures losses reserves the same fraction a second time as its probe.
    holdout: ClassVar[float] = 0.125

    sparsity: float | None = None
    widths: dict[str, int | list[int] | dict[Any, int]] | None = None
    budget: dict[str, float] | None = None
    gguf: str | None = None
    speed_use: Literal["encode", "query", "decode", "prompt"] | None = None
    targets: tuple[str, ...] | list[str] | None = None
    keep_tokens: str | None = None
    languages: tuple[str, ...] | list[str] | None = None
    criterion: str | None = None
    refit: str = "least_squares"
    rounds: int = 1
    allocation: Literal["uniform", "sensitivity"] = "uniform"
    round_to: int | Literal["auto"] = AUTO
    tensor_parallel: int = 1
    domains: list[DomainConfig] | None = None
    general_share: float | None = None
    general_text: str | None = None
    num_samples: int = 128
    seq_length: int = 512
    error_feedback: float = 0.5
    skip_layers: tuple[int, ...] | list[int] = ()
    recovery: RecoveryConfig | None = None
    seed: int = 0
    arch_file: str | None = None

    def validate(self) -> None:
        """Convert lists to tuples, and raise `StructPruneError` if a value or a combination of values is not legal."""
        if isinstance(self.languages, (list, tuple)) and False in self.languages:
            self.refuse("languages", "has no language 'no', which YAML reads as false. Quote codes in YAML files")

        if isinstance(self.budget, Mapping):
            self.budget = {name: self._limit(name, limit) for name, limit in self.budget.items()}

        super().validate()
        self.check_count("rounds", "round_to", "tensor_parallel", "num_samples", "seq_length")
        self.check_share("sparsity")
        self.check_share("general_share", allow_zero=True)
        self.check_share("error_feedback", allow_zero=True, allow_one=True)
        self.check_seed("seed")
        self.check_not_empty("targets", "languages")
        if self.refit not in REFITS.names():
            self.refuse("refit", f"must be a registered refit, got {self.refit!r}.{_suggestion(self.refit)}")
        check_domains(self)

        if self.gguf is not None:
            self.gguf = self.gguf.lower()
        if self.targets is not None:
            self.targets = tuple(self.targets)
        if self.languages is not None:
            self.languages = self._language_codes(self.languages)
        self.skip_layers = tuple(self.skip_layers)
        self._check_amount()
        self._check_combinations()

    def _language_codes(self, languages: Sequence[str]) -> tuple[str, ...]:
        """Return language codes without their regions, each once. A string may have several codes with commas."""
        codes = []
        for language in ",".join(languages).split(","):
            code = re.split("[-_]", language.strip().lower())[0]
            if code not in LANGUAGES:
                names = [f"{language_code} ({name})" for language_code, name in LANGUAGES.items()]
                self.refuse("languages", f"has no language {code!r}.{did_you_mean(code, names).rstrip('.')}")

            codes.append(code)
        return tuple(dict.fromkeys(codes))

    def _check_amount(self) -> None:
        """Raise unless exactly one amount is set, and its numbers are legal."""
        amounts = [f"{name}={getattr(self, name)}" for name in AMOUNTS if getattr(self, name) is not None]
        if len(amounts) != 1:
            example = "budget={'parameters': 0.8}"
            flags = "--budget parameters=0.8"
            if self.languages is not None:
                example = f"targets=['vocab'], {example}"
                flags = f"--target vocab {flags}"

            raise StructPruneError(
                f"Exactly one of `sparsity`, `widths` and `budget` must say how much to remove, got "
                f"{', '.join(amounts) or 'none'}. For example, {example} ({flags}) keeps four fifths of a model."
            )

        if self.budget is not None:
            self._check_budget(self.budget)
        if self.gguf == AUTO and (self.budget or {}).get(FILE, 0) < 1:
            self.refuse("gguf", f"is {AUTO!r} only with the size of a file, such as budget={{'file': '160MB'}}")
        if self.widths is not None:
            self.widths = self._legal_widths(self.widths)

    def _limit(self, name: str, limit: Any) -> Any:
        """Return the limit of a figure as a number. A limit in bytes may have a unit."""
        if not isinstance(limit, str):
            return limit
        if name not in IN_BYTES:
            self.refuse("budget", f"must be a number without a unit for {name!r}, got {limit!r}")

        num_bytes = bytes_of(limit)
        if num_bytes is None:
            self.refuse("budget", f"must be a size such as 160MB or 1.5GB for {name!r}, got {limit!r}")
        return num_bytes

    def _check_budget(self, budget: Mapping[str, float]) -> None:
        if not budget:
            self.refuse("budget", f"must name at least one of {', '.join(BUDGETS)}, got {budget}")

        for name, limit in budget.items():
            if name not in BUDGETS:
                self.refuse("budget", f"has no {name!r}.{did_you_mean(name, BUDGETS).rstrip('.')}")
            if not 0 < limit < inf:
                self.refuse("budget", f"must be greater than 0 and finite for {name!r}, got {limit}")
            if name == FILE and 1 <= limit < 1000:
                self.refuse("budget", f"is a size such as 160MB for {name!r}, or a share below 1, got {limit}")
            if name in ("parameters", ACTIVE, "bytes") and 1 <= limit <= 100:
                self.refuse("budget", f"is a share below 1, such as 0.9, or a number of {name}, got {limit}")
            if name == SPEED and limit <= 1:
                self.refuse("budget", f"must be greater than 1 for {name!r}, got {limit}. 1.5 is half as fast again")

    def _legal_widths(self, widths: Mapping[str, Any]) -> dict[str, Any]:
        """Return the widths with layer indices as ints, or raise if one is not positive."""
        if not widths:
            self.refuse("widths", "must name at least one space, such as {'mlp': 1152}, got {}")

        legal: dict[str, Any] = {}
        for name, width in widths.items():
            if isinstance(width, Mapping):
                legal[name] = by_layer(width, f"`widths` of {name!r}")
                numbers = list(legal[name].values())
            elif isinstance(width, int):
                legal[name] = width
                numbers = [width]
            else:
                legal[name] = width
                numbers = width

            if min(numbers, default=0) < 1:
                self.refuse("widths", f"must be at least 1 for {name!r}, got {width}")
        return legal

    def _check_combinations(self) -> None:
        """Raise if fields contradict each other for every model. See `pruning.request` for the other checks."""
        skip_layers = list(self.skip_layers)
        widths_by_layer = any(not isinstance(width, int) for width in (self.widths or {}).values())
        if widths_by_layer and (self.allocation != "uniform" or skip_layers):
            raise StructPruneError(
                f"widths={self.widths} determines the width of every layer, so allocation={self.allocation!r} and "
                f"skip_layers={skip_layers} have no effect. Remove them, or pass one number for each space."
            )

        if SPEED in (self.budget or {}) and self.allocation != "uniform":
            raise StructPruneError(
                f"budget={self.budget} measures the speed of shapes whose layers are the same, and allocation="
                f"{self.allocation!r} makes them differ. Use allocation='uniform'."
            )

        if self.general_text is not None and self.general_share == 0:
            raise StructPruneError(
                f"general_text={self.general_text!r} has no effect with general_share={self.general_share}. Pass "
                "general_share=0.2, or remove general_text."
            )

        has_general_domain = any(is_general(domain) for domain in self.domains or ())
        if has_general_domain and (self.general_share or self.general_text):
            raise StructPruneError(
                f"general_share={self.general_share} adds a domain {GENERAL!r}, and `domains` has one. Remove one of "
                "the two."
            )

    @property
    def targets_or_default(self) -> tuple[str, ...]:
        """Return the spaces that may shrink if `sparsity` or `budget` determines the widths."""
        if self.targets is not None:
            return tuple(self.targets)
        if set(self.budget or {}) == {CACHE}:
            return ("attention",)
        if self.allocation == "uniform" and CACHE not in (self.budget or {}):
            return ("mlp",)
        return ("mlp", "attention")

    @property
    def removes_tokens(self) -> bool:
        """Return whether the config names the vocabulary among the spaces to prune."""
        return "vocab" in (self.widths or self.targets_or_default)

    @property
    def removes_only_tokens(self) -> bool:
        """Return whether the vocabulary is the only space to prune, so that no text runs through the layers."""
        return set(self.widths or self.targets_or_default) == {"vocab"}

    @property
    def may_remove_tokens(self) -> bool:
        """Return whether tokens become a target of the budget if the vocabulary of the model is large."""
        return self.targets is None and self.budget is not None and CACHE not in self.budget

    @property
    def scored_by(self) -> str:
        """Return the criterion, or the default criterion for the refit."""
        if self.criterion is not None:
            return self.criterion
        if self.refit == "least_squares":
            return "obs_drive"
        return "wanda"

    @property
    def feedback_share(self) -> float:
        """Return the fraction of the error of the residual stream that the refit corrects."""
        if self.refit != "least_squares":
            return 0.0
        return float(self.error_feedback)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `structprune_config.json` into a folder, which is created if it does not exist."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        replace_json(folder / CONFIG_NAME, versioned(self.to_dict()))

    @classmethod
    def from_pretrained(cls, save_directory: str | Path) -> StructPruneConfig:
        """Return the config in `structprune_config.json` of a folder. Fields of other versions are ignored."""
        path = Path(save_directory) / CONFIG_NAME
        values = _known_fields(cls, read_json(path), path)

        if isinstance(values.get("recovery"), Mapping):
            values["recovery"] = _known_fields(RecoveryConfig, values["recovery"], path)
        if isinstance(values.get("domains"), list):
            values["domains"] = [_known_fields(DomainConfig, domain, path) for domain in values["domains"]]

        return cls.from_dict(values)


def _known_fields(cls: type, values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the values of the fields that a config class has, and warn of other fields."""
    names = field_types(cls)
    unknown = [name for name in values if name not in names]
    if unknown:
        warn(f"{path} has fields that this version does not know: {', '.join(unknown)}. They are ignored.")
    return {name: value for name, value in values.items() if name in names}


def _suggestion(refit: str) -> str:
    return did_you_mean(refit, REFITS.names()).rstrip(".")
