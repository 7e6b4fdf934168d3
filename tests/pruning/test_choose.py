"""Widths of single layers by how little a layer changes the residual stream."""

import pytest
import torch
from helpers import evidence_of
from models import build, config

from optimum_structprune import StructPruneConfig, StructPruneError
from optimum_structprune.arch.load import describe
from optimum_structprune.criteria.layers import BLOCK_INFLUENCE, LAYER_CRITERIA
from optimum_structprune.pruning.choose import SHARPNESS, choose_shape
from optimum_structprune.record.report import Report


def test_layers_give_up_in_proportion_to_the_softmax_of_their_cosine():
    model = build("llama-tied")
    with torch.no_grad():  # the first layer changes the residual stream little
        for module in (model.model.layers[0].mlp.down_proj, model.model.layers[0].self_attn.o_proj):
            module.weight.mul_(0.1)
    settings = config(allocation="cosine", widths={"mlp": 30}, round_to=1, min_width=0.05)
    evidence, arch = evidence_of(settings), describe(model)
    widths = choose_shape(settings, arch, model, evidence, Report("llama", "obs")).widths
    removed = torch.tensor([40 - width for _, width in sorted(widths["mlp"].items())], dtype=torch.float64)
    judge = LAYER_CRITERIA.get(BLOCK_INFLUENCE)()
    by_domain = [[batch for batch in evidence.own_batches if batch.domain == domain] for domain in (0, 1)]
    lost = torch.stack([judge.score(model, arch, batches) for batches in by_domain]).mean(0)
    expected = torch.softmax(SHARPNESS * (1 - lost), 0)
    assert removed.sum() == 20 and removed[0] > removed[1]
    torch.testing.assert_close(removed / 20, expected, atol=0.05, rtol=0)


def test_stored_statistics_hold_no_text_to_run():
    with pytest.raises(StructPruneError, match="allocation='cosine' runs the model on text, but stats="):
        StructPruneConfig(widths={"mlp": 9}, allocation="cosine", stats="folder")
