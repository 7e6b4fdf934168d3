"""Prune the FFN of a model by hand, with the functions that `StructPruner.prune_model` calls by default.

    python examples/prune_by_hand.py MODEL TEXT WIDTH

TEXT is a file with a document in each line. Copy this script to try another score, order or refit. A test checks that
its weights are equal to the weights of `prune_model`, bit for bit.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from optimum_structprune.arch.load import describe
from optimum_structprune.arch.meta import shrunk_skeleton
from optimum_structprune.arch.modules import adopt_config_
from optimum_structprune.criteria.obs_drive import obs_drive, producer_norms
from optimum_structprune.method.calibrate import mixed
from optimum_structprune.method.layers import Batch, InMemory
from optimum_structprune.method.loop import best_units
from optimum_structprune.method.refit import least_squares, ridge_strength
from optimum_structprune.method.shrink import read_consumer, shrink_layer_, units_to_columns, write_consumer_


DAMPING = 0.08
ERROR_FEEDBACK = 0.5
NUM_SAMPLES = 128
SEQ_LENGTH = 256
BATCH_SIZE = 4


@torch.no_grad()
def prune_by_hand_(model: PreTrainedModel, batches: list[Batch], shares: tuple[float, ...], width: int) -> None:
    """Prune the FFN of every layer to `width` channels, in place.

    Args:
        model: The model, in eval mode.
        batches: The calibration samples.
        shares: The weights of the domains.
        width: The number of channels that each layer keeps.
    """
    arch = describe(model)
    smaller = shrunk_skeleton(model, arch, {"mlp": width})
    source = InMemory(model, arch, batches, ERROR_FEEDBACK)
    keep = {}

    for layer in range(arch.num_layers):
        source.advance_original(layer, ["mlp"])
        (space,) = [space for space in arch.at(layer) if space.kind == "mlp"]
        (consumer,) = space.consumers
        weight, bias = read_consumer(model, consumer)

        # Calibrate: collect the moments of the consumer's input, and combine the moments of the domains.
        domain_moments = source.moments(layer, space, gram=True)
        (moments,) = mixed(domain_moments, shares, [weight])

        # Score the channels, and choose the channels to keep.
        moments.prior = producer_norms(model, arch, space)
        scores = obs_drive(weight, moments, consumer.per_unit, damping=DAMPING)
        keep[space.key] = best_units(scores, width)

        # Refit: the kept columns compensate for the removed columns, which become zero.
        columns = units_to_columns(keep[space.key], consumer, weight.device)
        ridge = ridge_strength(DAMPING, len(columns), moments.count)
        refitted, bias = least_squares(weight, bias, moments, columns, ridge)
        write_consumer_(model, consumer, columns, refitted, bias)

        # Shrink the layer, and run the samples through the smaller layer.
        with source.same_outputs(layer):
            shrink_layer_(model, arch, layer, keep, smaller)
        source.advance(layer)

    adopt_config_(model, smaller)


def read_samples(path: str, tokenizer) -> torch.Tensor:
    """Return the beginnings of the first documents that are long enough, shape `(samples, SEQ_LENGTH)`."""
    samples = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        ids = tokenizer(line).input_ids
        if len(ids) >= SEQ_LENGTH:
            samples.append(ids[:SEQ_LENGTH])
    return torch.tensor(samples[:NUM_SAMPLES])


def main(name: str, path: str, width: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(name).eval()
    tokenizer = AutoTokenizer.from_pretrained(name)

    samples = read_samples(path, tokenizer)
    batches = [Batch(0, ids) for ids in samples.split(BATCH_SIZE)]
    prune_by_hand_(model, batches, shares=(1.0,), width=width)
    print(f"{model.num_parameters():,} parameters, {model.config.intermediate_size} FFN channels in each layer")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
