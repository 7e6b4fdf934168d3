"""The default pruning by hand: what `StructPruner.prune_model` does to the FFN of a model, as calls of `method`.

Copy it to try another score, order or refit. `python examples/prune_by_hand.py MODEL TEXT WIDTH` prunes
a model by a text with a document in each line. A test holds it against `prune_model`, bit for bit.
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


DAMPING, ERROR_FEEDBACK = 0.08, 0.5


@torch.no_grad()
def prune_by_hand_(model: PreTrainedModel, batches: list[Batch], shares: tuple[float, ...], width: int) -> None:
    """Leave each layer of a model in eval mode `width` FFN channels; `shares` are the weights of the domains."""
    arch = describe(model)
    smaller = shrunk_skeleton(model, arch, {"mlp": width})
    source = InMemory(model, arch, batches, ERROR_FEEDBACK)
    keep = {}
    for layer in range(arch.num_layers):
        source.advance_dense(layer, ["mlp"])
        (space,) = (space for space in arch.at(layer) if space.kind == "mlp")
        (consumer,) = space.consumers
        weight, bias = read_consumer(model, consumer)
        # Calibrate: one set of moments of what the consumer reads, over all domains.
        (moments,) = mixed(source.moments(layer, space, gram=True), shares, [weight])
        # Score, and choose.
        moments.prior = producer_norms(model, arch, space)
        scores = obs_drive(weight, moments, consumer.per_unit, damping=DAMPING)
        keep[space.key] = best_units(scores, width)
        # Refit: the kept columns make up for the others, which become zero.
        columns = units_to_columns(keep[space.key], consumer, weight.device)
        ridge = ridge_strength(DAMPING, len(columns), moments.count)
        refitted, bias = least_squares(weight, bias, moments, columns, ridge)
        write_consumer_(model, consumer, columns, refitted, bias)
        # Shrink, and go on behind the smaller layer.
        with source.same_outputs(layer):
            shrink_layer_(model, arch, layer, keep, smaller)
        source.advance(layer)
    adopt_config_(model, smaller)


def main(name: str, text: str, width: int) -> None:
    """Prune a model by the first 128 documents of a file that are long enough."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)
    rows = [tokenizer(line).input_ids[:256] for line in Path(text).read_text(encoding="utf-8").splitlines()]
    samples = torch.tensor([row for row in rows if len(row) == 256][:128])
    prune_by_hand_(model, [Batch(0, ids) for ids in samples.split(4)], (1.0,), width)
    print(f"{model.num_parameters():,} parameters, {model.config.intermediate_size} FFN channels in each layer")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
