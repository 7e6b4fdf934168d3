"""Text of every kind beside the domains of a user: how much of it there is by default, and where it comes from."""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.plain import is_quantized
from ..config.domains import ANY, BROAD, BUILTIN, SELF, DomainConfig, is_broad
from ..config.pruning import StructPruneConfig
from ..system.offloading import is_offloaded


# The share of the broad text where no domains are named, and beside domains of the user.
ALONE, BESIDE = 0.5, 0.2
WRITTEN = SELF + ANY


def builtin_domains() -> list[DomainConfig]:
    """The domains where none are named, in equal shares; they need no download."""
    return [DomainConfig(name=name, source=f"{BUILTIN}{name}") for name in ("prose", "code", "math")]


def texts_of(config: StructPruneConfig) -> list[DomainConfig]:
    """The domains of a config, or the built-in ones where it names none, and behind them the broad text."""
    domains = builtin_domains() if config.domains is None else config.domains
    share = config.breadth
    if share is None:
        share = ALONE if config.domains is None else BESIDE if config.broad_text is not None else 0.0
    if share == 0:
        return domains
    weight = share / (1 - share) * sum(domain.weight for domain in domains)
    return [*domains, DomainConfig(name=BROAD, source=config.broad_text or _builtin_beside(domains), weight=weight)]


def with_written_text(config: StructPruneConfig) -> StructPruneConfig:
    """A config whose broad text is what the model writes, where nothing else is said and it has a place: beside named
    domains that leave samples for it and hold no such text themselves, and not with stored moments.
    """
    domains = config.domains or []
    placed = config.stats is None and 0 < len(domains) < config.num_samples and not any(map(is_broad, domains))
    if not placed or config.broad_text is not None or config.breadth == 0:
        return config
    return replace(config, broad_text=WRITTEN)


def can_write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """Whether a model generates, and its weights are where they can be used for each token anew."""
    in_memory = tokenizer is not None and not is_offloaded(model) and not is_quantized(model)
    return in_memory and model.can_generate() and not model.config.is_encoder_decoder


def _builtin_beside(domains: list[DomainConfig]) -> str:
    """The built-in text of all kinds but those that domains name: one document must not be in two domains."""
    sources = [domain.source for domain in domains if isinstance(domain.source, str)]
    named = [source.removeprefix(BUILTIN) for source in sources if source.startswith(BUILTIN)]
    return BUILTIN + "-".join([BROAD, *(kind for name in named for kind in name.split("+"))])
