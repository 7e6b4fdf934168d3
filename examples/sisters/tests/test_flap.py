"""The refit of FLAP, in a model that had no biases."""

import torch
from helpers import data_of, logits
from models import build, config, tokenizer
from structprune_sisters.flap import with_biases

from optimum_structprune import prune_model
from optimum_structprune.arch.load import describe
from optimum_structprune.method.loop import calibrate
from optimum_structprune.method.shrink import Masks, read_consumer
from optimum_structprune.steps.data import source_of


def test_the_bias_is_the_mean_output_of_the_removed_channels():
    model = build("llama-tied")
    biased = with_biases(model)
    torch.testing.assert_close(logits(biased), logits(model))

    fields = config(criterion="flap", refit="bias", widths={"mlp": 24})
    pruned = prune_model(biased, fields, tokenizer())

    arch = describe(biased)
    data = data_of(fields)
    (space,) = [space for space in arch.at(0) if space.name == "mlp"]
    source = source_of(biased, arch, data.own_batches)
    _, (moments,) = calibrate(Masks(biased, arch), source, data.method(biased, arch), space)

    weight, _ = read_consumer(biased, space.consumers[0])
    pruned_weight, pruned_bias = read_consumer(pruned, space.consumers[0])
    kept_columns = []
    removed_columns = []
    for column in range(space.size):
        is_kept = (weight[:, [column]] == pruned_weight).all(0).any()
        if is_kept:
            kept_columns.append(column)
        else:
            removed_columns.append(column)

    assert len(kept_columns) == 24
    expected_bias = weight[:, removed_columns] @ moments.mean[removed_columns].float()
    torch.testing.assert_close(pruned_bias, expected_bias, rtol=1e-4, atol=1e-6)
