"""Every wish that cannot be met, refused before any text is read or a weight is touched.

A config that contradicts itself, whatever the model, is refused when it is made: see `config.pruning.contradictions`.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from transformers import PreTrainedModel

from ..arch.plain import is_quantized
from ..arch.spec import HIDDEN, LAYER, MODEL, ArchSpec, Widths
from ..calibration.passes import check_sequential
from ..calibration.stored import Statistics
from ..config.pruning import StructPruneConfig
from ..criteria import CRITERIA
from ..criteria.layers import BLOCK_INFLUENCE
from ..errors import StructPruneError
from ..system.disk import check_folder
from ..system.offloading import is_offloaded
from ..widths.allocation import alike, is_bounded
from ..widths.budget import biased_spaces, widths_of
from .evidence import judges_layers
from .steps import WHOLE_MODEL


# What the model is to be used for: pruned, only looked at, pruned by a Trainer, or run to store its moments.
PRUNE, DRY_RUN, TRAINER, CALIBRATE = "prune", "dry run", "trainer", "calibrate"
Rules = Iterator[tuple[bool, str]]


@dataclass(frozen=True)
class Case:
    """A config beside the model that it is meant for.

    Attributes:
        config: How to prune.
        arch: The description of the model.
        model: The dense model; for a dry run on the meta device.
        use: What is to be done: `PRUNE`, `DRY_RUN`, `TRAINER` or `CALIBRATE`.
        has_tokenizer: Whether there is a tokenizer to read text with.
        has_inputs: Whether calibration inputs are given in place of text.
        itemsize: The number of bytes per parameter; None stands for those of the model's dtype.
    """

    config: StructPruneConfig
    arch: ArchSpec
    model: PreTrainedModel
    use: str
    has_tokenizer: bool
    has_inputs: bool
    itemsize: int | None

    @cached_property
    def widths(self) -> Widths:
        """The final widths, or others of the same total where they follow from calibration."""
        return widths_of(self.config, self.arch, self.model, itemsize=self.itemsize)


def check(
    config: StructPruneConfig,
    arch: ArchSpec,
    model: PreTrainedModel,
    use: str = PRUNE,
    *,
    has_tokenizer: bool = True,
    has_inputs: bool = False,
    itemsize: int | None = None,
) -> None:
    """Refuse whatever cannot be met, and warn of options that have no effect."""
    check_config(config, use)
    case = Case(config, arch, model, use, has_tokenizer, has_inputs, itemsize)
    for rules in RULES[use]:
        for broken, text in rules(case):
            if broken:
                raise StructPruneError(text)
    if unused := list(without_effect(config, arch, list(case.widths))) if use in (PRUNE, DRY_RUN) else []:
        warnings.warn(f"These options have no effect here: {'; '.join(unused)}.", stacklevel=3)


def check_config(config: StructPruneConfig, use: str) -> None:
    """Refuse whatever a use cannot meet with any model; see `check`."""
    for rules in CONFIG_RULES.get(use, ()):
        for broken, text in rules(config):
            if broken:
                raise StructPruneError(text)


def model_rules(case: Case) -> Rules:
    """The model as it is."""
    config, arch, model = case.config, case.arch, case.model
    yield (
        case.use == TRAINER and is_quantized(model),
        f"{type(model).__name__} is quantized; prune `model.dequantize()`, or load it without quantization.",
    )
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    yield (
        config.stats is None and longest is not None and config.seq_length > longest,
        f"seq_length={config.seq_length} is longer than the model's {longest} positions.",
    )
    yield (
        arch.causal and model.get_output_embeddings() is None,
        f"{type(model).__name__} has no language-model head; load it with AutoModelForCausalLM.",
    )


def offloading_rules(case: Case) -> Rules:
    """What takes all weights of a model at once, where accelerate has offloaded some."""
    config, name = case.config, type(case.model).__name__
    if not is_offloaded(case.model):
        return
    advice = "load the model in memory, or over several devices"
    yield (case.use == TRAINER, f"{name} is offloaded, and a Trainer trains weights in memory; {advice}.")
    yield (is_quantized(case.model), f"{name} is offloaded and quantized, and is unpacked in memory; {advice}.")
    yield (
        CRITERIA.get(config.scored_by).watches is not None,
        f"criterion={config.scored_by!r} takes passes through all layers of {name} at once, which is offloaded; "
        f"choose criterion='obs' or 'wanda', or {advice}.",
    )
    if case.use != CALIBRATE:
        yield from _offloaded_whole(case, advice)
    check_sequential(case.model, case.arch)


def _offloaded_whole(case: Case, advice: str) -> Rules:
    """What a pruning changes in all layers at once."""
    config, name = case.config, type(case.model).__name__
    yield (
        HIDDEN in case.widths,
        f"'hidden' changes all layers of {name} at once, which is offloaded; prune inside the layers, or {advice}.",
    )
    yield (
        config.recovery is not None,
        f"Recovery trains weights in memory, and {name} is offloaded; leave recovery out, save, and recover the "
        "smaller model.",
    )


def text_rules(case: Case) -> Rules:
    """What the text is read with."""
    config = case.config
    yield (
        case.has_inputs and config.stats is not None,
        f"inputs are calibration data, and stats={config.stats!r} stands in for them.",
    )
    yield (
        not (case.has_tokenizer or case.has_inputs or config.stats is not None),
        "The domains are text, and reading them takes a tokenizer; pass the model's own.",
    )


def criterion_rules(case: Case) -> Rules:
    """The criterion, for the spaces that shrink."""
    config, names = case.config, list(case.widths)
    others = [name for name in names if name != LAYER]
    yield (
        judges_layers(config) and bool(others),
        f"criterion={config.criterion!r} judges whole layers, and nothing inside them; prune {LAYER!r} in a run of "
        f"its own, or choose a criterion for {(others or names)[0]!r}: {LAYER!r} is judged by {BLOCK_INFLUENCE!r} "
        "then.",
    )
    if judges_layers(config):
        return
    CRITERIA.get(config.scored_by).check(config, case.arch, case.use)  # an unknown name is refused here


def round_rules(case: Case) -> Rules:
    """The number of rounds."""
    rounds, most = case.config.rounds, max(space.size for space in case.arch.spaces)
    yield (
        rounds > most,
        f"rounds={rounds} is more than the {most} units of the widest space, and each round has to remove some; "
        f"choose {most} at most.",
    )


def space_rules(case: Case) -> Rules:
    """Spaces that do not go with an option."""
    config, arch, names = case.config, case.arch, list(case.widths)
    before = [name for name in names if name in WHOLE_MODEL]
    yield (
        config.max_perplexity_ratio is not None and bool(before),
        f"max_perplexity_ratio is held by rounds, and {before[0] if before else ''!r} goes before them; leave either "
        "out.",
    )
    yield (
        HIDDEN in names and config.refit == "bias",
        f"refit='bias' needs a bias in all that reads {HIDDEN!r}; use refit='least_squares' or 'none'.",
    )
    yield (
        HIDDEN in names and config.refit not in ("none", "bias", "least_squares"),
        f"refit={config.refit!r} is for consumers inside the layers, and {HIDDEN!r} is read all over the model; use "
        "refit='least_squares' or 'none'.",
    )
    biased_spaces(config, arch, [name for name in names if arch.of(name)[0].inside])
    yield (
        config.searches and not arch.causal,
        f"allocation={config.allocation!r} measures how far the predictions of the next token move, and a model of "
        f"type {arch.model_type!r} makes none; use allocation='uniform' or 'global'.",
    )
    outside = [name for name in names if not arch.of(name)[0].inside or arch.of(name)[0].layer == MODEL]
    yield (
        config.searches and bool(outside),
        f"allocation={config.allocation!r} chooses widths inside the layers, and {(outside or [''])[0]!r} is none of "
        "them; leave it out of targets and widths.",
    )
    yield (
        config.allocation == "search_uniform" and not alike(arch, names),
        f"The layers of this {arch.model_type} model differ in width, and allocation='search_uniform' looks for one "
        "shape of all layers; choose allocation='search'.",
    )
    yield (
        not arch.causal and (config.reweights or config.max_perplexity_ratio is not None),
        "objective='worst' and max_perplexity_ratio go by perplexity, which a model of type "
        f"{arch.model_type!r} does not have; leave them out.",
    )


def statistics_rules(case: Case) -> Rules:
    """What stored moments know nothing of."""
    config, arch = case.config, case.arch
    if config.stats is None:
        return
    Statistics.load(config.stats)  # what is no folder of statistics is refused here
    for name in case.widths:
        yield (
            any(space.experts is not None or space.layer == MODEL for space in arch.of(name)),
            f"Stored statistics are moments of what consumers read, and {name!r} is judged by something else; prune "
            "without stats.",
        )
    yield from _never_stored(config)


def _never_stored(config: StructPruneConfig) -> Rules:
    yield (
        CRITERIA.get(config.scored_by).watches is not None,
        f"criterion={config.criterion!r} goes by passes through the whole model, of which nothing is stored; prune "
        "without stats, or choose criterion='obs', 'wanda' or 'flap'.",
    )


def checkpoint_rules(case: Case) -> Rules:
    """The folders that remember the rounds and the measured losses."""
    for folder in filter(None, (case.config.checkpoint_dir, case.config.losses_dir)):
        check_folder(folder)
    yield from ()


def recovery_rules(case: Case) -> Rules:
    """The training that follows."""
    if case.config.recovery is None:
        return
    # Training libraries take seconds to import, and most runs do without.
    from ..recovery.checks import check_recovery

    yield (
        not case.arch.causal,
        f"recovery trains models that predict the next token, and a model of type {case.arch.model_type!r} does not; "
        "prune it without recovery, then train it as it was trained before.",
    )
    check_recovery(case.config.recovery, case.config, case.model)


def trainer_rules(config: StructPruneConfig) -> Rules:
    """What a Trainer cannot do between its steps."""
    yield (
        config.refit == "bias",
        "refit='bias' adds parameters that the optimizer does not hold; use refit='least_squares' or 'none'.",
    )
    yield (
        config.spans_rounds or config.objective == "worst",
        "objective, max_perplexity_ratio and checkpoint_dir span the rounds of one pruning, and a Trainer prunes in "
        "steps of its own; leave these out.",
    )
    yield (
        config.allocation != "uniform",
        f"allocation={config.allocation!r} ranks the units of the dense model before anything is removed, which a "
        "Trainer's steps do not; use allocation='uniform', or prune first (`structprune prune`).",
    )
    yield (
        config.stats is not None,
        f"stats={config.stats!r} holds moments of the dense model, which training has changed by then; leave it out, "
        "or prune first (`structprune prune --stats`).",
    )
    yield (
        config.recovery is not None,
        "recovery is training after a pruning, and a Trainer trains already; leave it out.",
    )


def trainer_space_rules(case: Case) -> Rules:
    """The spaces that a Trainer cannot prune."""
    of_model = [space.name for space in case.arch.model_spaces if space.name in case.widths]
    yield (
        bool(of_model),
        f"{of_model[0] if of_model else ''!r} belongs to the whole model, and a Trainer prunes inside the layers "
        "only; prune it first (`structprune prune`), then train.",
    )


def calibrate_rules(case: Case) -> Rules:
    """Models whose moments are not stored."""
    inside = next((space for space in case.arch.spaces if space.experts is not None), None)
    yield (
        inside is not None,
        f"This {case.arch.model_type} model has experts ({inside.experts if inside else ''}), which are judged by the "
        "tokens that are routed to them in a run; only the moments of dense models are stored. Prune it without "
        "stats.",
    )
    yield from _never_stored(case.config)


# Rules that need no model, so that a mistake shows as early as can be.
CONFIG_RULES: Mapping[str, Iterable[Any]] = {TRAINER: (trainer_rules,)}
RULES: Mapping[str, Iterable[Any]] = {
    DRY_RUN: (criterion_rules, round_rules, space_rules),
    PRUNE: (
        model_rules,
        offloading_rules,
        criterion_rules,
        round_rules,
        space_rules,
        text_rules,
        statistics_rules,
        checkpoint_rules,
        recovery_rules,
    ),
    TRAINER: (
        model_rules,
        offloading_rules,
        criterion_rules,
        trainer_space_rules,
        round_rules,
        space_rules,
    ),
    CALIBRATE: (model_rules, offloading_rules, calibrate_rules, text_rules),
}


def without_effect(config: StructPruneConfig, arch: ArchSpec, names: Collection[str]) -> Iterator[str]:
    """The options that are set and have no effect beside the others, each with the reason."""
    default = {field.name: field.default for field in fields(config)}
    recovery = config.recovery
    explicit, gram, uniform = config.widths is not None, config.fits, config.allocation == "uniform"
    damped = config.scored_by in CRITERIA.names() and CRITERIA.get(config.scored_by).damped
    stored = config.stats is not None and recovery is None  # the text of a recovery follows these numbers too
    same = "widths are taken as they are" if explicit else "allocation='uniform' gives all layers one width"
    reasons = {
        "targets": (explicit, "widths names the spaces"),
        "round_to": (
            explicit and uniform and config.max_perplexity_ratio is None,
            "widths are taken as they are",
        ),
        "min_width": (not is_bounded(config, arch, names) and config.allocation != "search_uniform", same),
        "damping": (not gram and not damped, f"refit={config.refit!r} solves nothing"),
        "error_feedback": (not gram, f"refit={config.refit!r} makes up for no error"),
        "breadth": (stored, "stats were gathered already; name the domain 'broad' if they hold it"),
        "num_samples": (stored, "stats were gathered already"),
        "seq_length": (stored, "stats were gathered already"),
    }
    for name, (idle, reason) in reasons.items():
        value = getattr(config, name)
        if idle and value != default[name]:
            yield f"{name}={value!r}, because {reason}"
