"""A GPU works on larger batches and chunks than a CPU, within its memory, and has the same results."""

from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from gpu.compare import assert_same
from gpu.simulator import simulated_gpus
from models import build, token_ids
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_structprune import StructPruneConfig, prune_model
from optimum_structprune.arch.devices import rows_at_once
from optimum_structprune.arch.load import ModelInfo, describe
from optimum_structprune.arch.meta import meta_model
from optimum_structprune.measure.losses import expected_shares, measure, perplexity, totals
from optimum_structprune.measure.predictions import tokens_at_once, tokens_per_pass
from optimum_structprune.measure.text import Text
from optimum_structprune.method.calibrate import Moments
from optimum_structprune.pruning.cost import UNCOUNTED_BYTES, pruning_cost
from optimum_structprune.pruning.request import PruningRequest
from optimum_structprune.record.cost import REFUSED_SHARE
from optimum_structprune.vocabulary.token_alignment import TokenAlignment


CPU = torch.device("cpu")
CUDA = torch.device("cuda")


def set_gpu_memory(monkeypatch, size):
    properties = SimpleNamespace(total_memory=size)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)


def test_the_rows_at_once_fill_a_share_of_the_memory_of_a_gpu(monkeypatch):
    assert rows_at_once(CPU, 1, 128) == 128
    assert rows_at_once(CUDA, 1, 128) == 128, "the memory of a missing GPU is not known"

    with simulated_gpus():
        set_gpu_memory(monkeypatch, 64 << 30)
        assert rows_at_once(CUDA, 1 << 20, 128) == 1024
        assert rows_at_once(CUDA, 1 << 30, 128) == 128
        assert rows_at_once(CUDA, 1, 128) == 16 * 128
        monkeypatch.undo()


def count_passes(model):
    """Return a mock that counts the forward passes of a model from now on."""
    forward = Mock(side_effect=model.model.forward)
    model.model.forward = forward
    return forward


def divergences(model, ids):
    """Return the values of a model that is compared with itself, in one tensor."""
    measured = measure(model, Text(list(ids)), model)
    return torch.stack([torch.cat(values) for values in vars(measured).values()])


@pytest.mark.parametrize("work", [perplexity, expected_shares, divergences])
def test_a_gpu_measures_the_same_in_fewer_passes(work):
    ids = token_ids(20, 400)
    model = build("llama-tied")
    passes_on_cpu = count_passes(model)
    expected = work(model, ids)

    with simulated_gpus():
        model = build("llama-tied").cuda()
        passes_on_gpu = count_passes(model)
        assert_same(work(model, ids), expected, tolerance=1e-5)

    assert passes_on_cpu.call_count >= 20
    assert passes_on_gpu.call_count <= 8


def test_a_small_gpu_runs_one_sample_at_a_time(monkeypatch):
    with simulated_gpus():
        model = build("llama-tied").cuda()
        assert tokens_per_pass(model) == 16 * 512

        set_gpu_memory(monkeypatch, 1 << 20)
        assert tokens_per_pass(model) == 512
        assert tokens_at_once(model.device, 10**6) == 128
        monkeypatch.undo()


def test_moments_of_larger_parts_are_the_same():
    inputs = torch.randn(2000, 8)
    expected = Moments.empty(8, gram=True).update(inputs)

    with simulated_gpus():
        actual = Moments.empty(8, gram=True, device="cuda").update(inputs.cuda())
        assert_same(actual.tensors(), expected.tensors(), tolerance=1e-6)


def test_the_divergence_of_several_texts_is_computed_in_one_pass():
    alignment = TokenAlignment([(token,) for token in range(96)], 96)
    texts = [token_ids(1, length)[0].tolist() for length in (9, 5, 12)]
    original = build("llama-tied")
    model = build("llama-untied")
    text = Text([torch.tensor(ids) for ids in texts])
    expected = totals(measure(model, text, original, alignment).kl)

    with simulated_gpus():
        original = original.cuda()
        model = model.cuda()
        passes = count_passes(model)
        actual = totals(measure(model, text, original, alignment).kl)
        assert passes.call_count == 1
        assert_same(actual, expected, tolerance=1e-5)


def test_the_memory_estimate_counts_the_larger_parts():
    model = meta_model(LlamaConfig(vocab_size=30_000, hidden_size=64, intermediate_size=128, num_hidden_layers=2))
    settings = StructPruneConfig(widths={"mlp": 64}, num_samples=8, seq_length=64)

    with simulated_gpus():
        tokens = tokens_at_once(CUDA, 30_000)
        memory = pruning_cost(PruningRequest(settings, ModelInfo(describe(model), model, CUDA))).memory

    assert tokens > 1000
    # The logits of the tokens are in memory once in the dtype of the model, and twice in fp32.
    assert memory["working memory"] - UNCOUNTED_BYTES == 30_000 * 3 * 4 * tokens


def peak_of(gpus, work):
    """Return the most bytes that some work allocates on the GPU at one time."""
    gpus.reset_peak()
    allocated = gpus.allocated()
    work()
    return gpus.peak() - allocated


@pytest.mark.slow
def test_a_pruning_on_a_gpu_takes_the_estimated_memory():
    model_config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=3072,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(model_config).eval()
    settings = StructPruneConfig(widths={"mlp": 1536}, num_samples=8, seq_length=64)
    inputs = {name: torch.randint(64, (6, 64)) for name in "ab"}

    with simulated_gpus() as gpus:
        model.cuda()
        info = ModelInfo(describe(model), model, model.device)
        memory = pruning_cost(PruningRequest(settings, info, inputs=inputs)).memory
        peak = peak_of(gpus, lambda: prune_model(model, settings, inputs=inputs, inplace=True))

    expected = memory["hidden states"] + memory["working memory"] - UNCOUNTED_BYTES
    gram = 4 * 3072**2
    assert expected > 2 * gram
    assert REFUSED_SHARE * expected < peak + 0.5 * gram
    assert peak < expected / REFUSED_SHARE + 0.5 * gram
