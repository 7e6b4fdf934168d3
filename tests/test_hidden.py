"""The residual stream: pruned ≡ the model whose removed channels are zero, and which channels go."""

from copy import deepcopy

import pytest
import torch
from models import CASES, build, config, token_ids, tokenizer
from test_passes import batches, count_hooks
from test_surgery import logits
from transformers import AutoModelForCausalLM

from optimum_structprune import StructPruneError, StructPruner, prune_model
from optimum_structprune.arch.families import builtin_families
from optimum_structprune.arch.load import describe
from optimum_structprune.arch.shrink import legal_sizes
from optimum_structprune.arch.spec import HIDDEN, LAYER, MODEL
from optimum_structprune.hidden import channel_energies, narrow_


WIDTH = 24
STREAMS = [case for case in CASES if describe(build(case)).stream is not None]
TIED = ["llama-tied", "qwen2", "gemma2", "gemma3_text"]


def random_keep(seed=3):
    return tuple(torch.randperm(32, generator=torch.Generator().manual_seed(seed))[:WIDTH].sort().values.tolist())


@torch.no_grad()
def silenced(model, gone):
    """The model whose stream is zero in some channels: nothing is embedded there, and nothing is written."""
    model = deepcopy(model)
    stream = describe(model).stream
    for axis in stream.space.out:
        if axis.param in (stream.embed, *stream.writers):
            tensor = model.get_parameter(axis.param)
            tensor.index_fill_(axis.dim, torch.tensor(gone), 0)
    return model


def others(keep, size=32):
    return [channel for channel in range(size) if channel not in keep]


@pytest.mark.parametrize("case", STREAMS)
def test_pruned_equals_silenced_and_reloads(case, tmp_path):
    model = build(case)
    dense, keep = logits(model), random_keep()
    small = deepcopy(model)
    narrow_(small, describe(small), keep, {})
    torch.testing.assert_close(logits(small), logits(silenced(model, others(keep))), atol=1e-5, rtol=0)
    assert not torch.allclose(logits(small), dense, atol=1e-3), "pruning changed nothing, so the test shows nothing"
    tied = [one.get_input_embeddings().weight is one.get_output_embeddings().weight for one in (model, small)]
    assert tied[0] == tied[1]
    small.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model) and again.config.hidden_size == WIDTH
    torch.testing.assert_close(logits(again), logits(small), atol=1e-6, rtol=0)
    assert again.generate(token_ids(1, 4), min_new_tokens=3, max_new_tokens=3, do_sample=False).shape == (1, 7)
