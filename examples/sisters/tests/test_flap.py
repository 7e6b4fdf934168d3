"""The refit of FLAP, in a model that has no biases of its own."""

import torch
from helpers import data_of, logits
from models import build, config, tokenizer
from structprune_sisters.flap import with_biases

from optimum_structprune import prune_model
from optimum_structprune.arch.load import describe
from optimum_structprune.method.loop import calibrate
from optimum_structprune.method.shrink import Masks, read_consumer
from optimum_structprune.sources.data import source_of


def test_the_bias_is_the_mean_output_of_what_went():
    model = build("llama-tied")
    biased = with_biases(model)
    torch.testing.assert_close(logits(biased), logits(model))
    fields = config(criterion="flap", refit="bias", widths={"mlp": 24})
    small = prune_model(biased, fields, tokenizer())
    arch, data = describe(biased), data_of(fields)
    (space,) = (space for space in arch.at(0) if space.name == "mlp")
    source = source_of(biased, arch, data.own_batches)
    _, (moments,) = calibrate(Masks(biased, arch), source, data.method(biased, arch), space)
    dense, pruned = (read_consumer(one, space.consumers[0]) for one in (biased, small))
    keep = [column for column in range(space.size) if (dense[0][:, [column]] == pruned[0]).all(0).any()]
    gone = [column for column in range(space.size) if column not in keep]
    expected = dense[0][:, gone] @ moments.mean[gone].float()
    assert len(keep) == 24
    torch.testing.assert_close(pruned[1], expected, rtol=1e-4, atol=1e-6)
