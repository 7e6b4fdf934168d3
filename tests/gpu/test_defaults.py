"""Batch and chunk sizes of a GPU: larger than those of a CPU, within its memory, and with the same results."""

from types import SimpleNamespace

import pytest
import torch
from gpu.compare import assert_same
from gpu.simulator import simulated_gpus
from models import build, fewer_tokens, real_text_model, token_ids
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_structprune import StructPruneConfig, prune_model
from optimum_structprune.arch.load import ModelInfo, describe
from optimum_structprune.arch.meta import meta_model
from optimum_structprune.forward.metrics import compare, expected_shares, perplexity, samples_per_pass, tokens_at_once
from optimum_structprune.method.calibrate import Moments
from optimum_structprune.method.devices import rows_at_once
from optimum_structprune.pruning.memory import RELATIVE_ERROR, UNCOUNTED_BYTES, estimate_memory
from optimum_structprune.pruning.request import PruningRequest, resolve_request
from optimum_structprune.vocabulary.token_alignment import TokenAlignment, divergence_from_dense


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def memory_is(monkeypatch, size):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: SimpleNamespace(total_memory=size))


def test_rows_fill_a_share_of_the_memory_and_are_at_least_those_of_a_cpu(monkeypatch):
    assert rows_at_once(CPU, 1, 128) == 128
    assert rows_at_once(CUDA, 1, 128) == 128, "a GPU that is not there has no known memory"
    with simulated_gpus():
        memory_is(monkeypatch, 64 << 30)
        assert rows_at_once(CUDA, 1 << 20, 128) == 1024
        assert rows_at_once(CUDA, 1 << 30, 128) == 128
        assert rows_at_once(CUDA, 1, 128) == 16 * 128
        monkeypatch.undo()


def passes(model):
    """Count the forward passes of a model from now on."""
    count = []
    forward = model.model.forward

    def counting(*args, **kwargs):
        count.append(1)
        return forward(*args, **kwargs)

    model.model.forward = counting
    return count


@pytest.mark.parametrize("measure", [perplexity, expected_shares, lambda model, ids: compare(model, model, ids)])
def test_fewer_passes_measure_the_same(measure):
    ids = token_ids(20, 24)
    model = build("llama-tied")
    on_cpu = passes(model)
    expected = measure(model, ids)
    with simulated_gpus():
        model = build("llama-tied").cuda()
        on_gpu = passes(model)
        assert_same(measure(model, ids), expected, tolerance=1e-5)
    assert len(on_cpu) >= 20 > 8 >= len(on_gpu)


def test_a_small_gpu_runs_one_sample_at_a_time(monkeypatch):
    with simulated_gpus():
        model = build("llama-tied").cuda()
        assert samples_per_pass(model, 24) == 16
        memory_is(monkeypatch, 1 << 20)
        assert samples_per_pass(model, 10**5) == 1
        assert tokens_at_once(model.device, 10**6) == 128
        monkeypatch.undo()


def test_moments_of_larger_parts_are_the_same():
    x = torch.randn(2000, 8)
    expected = Moments.empty(8, gram=True).update(x)
    with simulated_gpus():
        actual = Moments.empty(8, gram=True, device="cuda").update(x.cuda())
        assert_same(actual.tensors(), expected.tensors(), tolerance=1e-6)


def test_texts_of_other_tokens_run_together():
    alignment = TokenAlignment([(token,) for token in range(96)], 96)
    texts = [ids.tolist() for length in (9, 5, 12) for ids in token_ids(1, length)]
    dense, model = build("llama-tied"), build("llama-untied")
    expected = divergence_from_dense(alignment, dense, model, texts, (1, 3, 2))
    with simulated_gpus():
        dense, model = dense.cuda(), model.cuda()
        count = passes(model)
        actual = divergence_from_dense(alignment, dense, model, texts, (1, 3, 2))
        assert len(count) == 1
        assert_same(actual, expected, tolerance=1e-5)


def test_the_memory_estimate_counts_the_larger_parts():
    model = meta_model(LlamaConfig(vocab_size=30_000, hidden_size=64, intermediate_size=128, num_hidden_layers=2))
    settings = StructPruneConfig(widths={"mlp": 64}, num_samples=8, seq_length=64)

    def working(device):
        return estimate_memory(PruningRequest(settings, ModelInfo(describe(model), model, device))).working

    with simulated_gpus():
        tokens = tokens_at_once(CUDA, 30_000)
        assert tokens > 1000
        # Their logits once in the dtype, and twice in fp32.
        assert working(CUDA) - UNCOUNTED_BYTES == 30_000 * 3 * 4 * tokens


@pytest.mark.slow
def test_a_pruning_on_a_gpu_takes_what_is_estimated():
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=3072, **sizes)).eval()
    settings = StructPruneConfig(widths={"mlp": 1536}, num_samples=8, seq_length=64)
    inputs = {name: torch.randint(64, (6, 64)) for name in "ab"}
    with simulated_gpus() as gpus:
        model.cuda()
        info = ModelInfo(describe(model), model, model.device)
        expected = estimate_memory(PruningRequest(settings, info, inputs=inputs)).above - UNCOUNTED_BYTES
        gpus.reset_peak()
        before = gpus.allocated()
        prune_model(model, settings, inputs=inputs, inplace=True)
        taken = gpus.peak() - before
    gram = 4 * 3072**2
    assert 2 * gram < expected and abs(taken - expected) < RELATIVE_ERROR * expected + 0.5 * gram


@pytest.mark.slow
def test_trials_of_divisions_on_a_gpu_take_what_is_estimated(monkeypatch):
    """The dense values of all layers are in memory in a trial, and at no other time."""
    # The text of this test is short.
    monkeypatch.setattr("optimum_structprune.pruning.memory.MEASURED_TOKENS", 256)
    monkeypatch.setattr("optimum_structprune.steps.division.BATCH_TOKENS", 128)
    reader = real_text_model()[1]
    sizes = {"num_hidden_layers": 24, "hidden_size": 64, "intermediate_size": 1024}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(reader), **sizes, **heads)).eval()
    budget = {"widths": None, "targets": ("vocab", "mlp"), "budget": {"parameters": 0.6}}
    settings = fewer_tokens(**budget, num_samples=4, criterion="wanda", refit="none")
    with simulated_gpus() as gpus:
        model.cuda()
        request = resolve_request(settings, ModelInfo.of(model), reader)
        expected = estimate_memory(request).above - UNCOUNTED_BYTES
        gpus.reset_peak()
        before = gpus.allocated()
        prune_model(model, settings, reader, inplace=True)
        taken = gpus.peak() - before
    masked = 4 * 24 * 64 * 1024
    assert expected > masked
    assert abs(taken - expected) < 2 * RELATIVE_ERROR * expected
