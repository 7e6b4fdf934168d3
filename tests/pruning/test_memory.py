"""The estimated peak memory of a pruning is the memory that it takes, and too little memory is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import recovery_config, same_weights
from models import build, config, tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, OlmoeConfig

from optimum_structprune import DomainConfig, StructPruneConfig, StructPruneError, prune_model
from optimum_structprune.arch.load import ModelInfo, describe
from optimum_structprune.arch.meta import meta_model
from optimum_structprune.pruning.memory import RELATIVE_ERROR, check_memory, estimate_memory, free_bytes
from optimum_structprune.pruning.request import PruningRequest


STATUS = Path("/proc/self/status")


def llama(width=3072):
    """Return the config of a Llama of one layer with this FFN width."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaConfig(vocab_size=64, intermediate_size=width, **sizes)


def half(width=3072, **fields):
    """Return a config that halves the FFN width."""
    return StructPruneConfig(widths={"mlp": width // 2}, num_samples=8, seq_length=64, **fields)


def estimate(settings, model_config, offload=None, inputs=None, dtype=torch.float32):
    """Return the estimated memory of a pruning of a model with this config."""
    model = meta_model(model_config, dtype=dtype)
    request = PruningRequest(settings, ModelInfo(describe(model), model, model.device), inputs=inputs)
    return estimate_memory(request, offload)


def set_free_bytes(monkeypatch, size):
    """Let each device have this number of free bytes."""
    monkeypatch.setattr("optimum_structprune.pruning.memory.free_bytes", lambda device: size)


def read_status(field):
    """Return a size in the status of this process, in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.exists(), reason="the high-water mark is read from /proc")
def test_the_estimate_is_the_peak_of_a_run():
    # The allocator returns only large blocks to the system, so a Gram matrix has to be larger than its blocks.
    width = 5120
    model = LlamaForCausalLM(llama(width)).eval()
    inputs = {name: torch.randint(64, (6, 64)) for name in "ab"}
    prune_model(LlamaForCausalLM(llama(64)), half(64), inputs=inputs)  # imports the modules that each run imports
    expected = estimate(half(width), model.config, inputs=inputs).above

    Path("/proc/self/clear_refs").write_text("5")
    original = read_status("VmRSS")
    prune_model(model, half(width), inputs=inputs, inplace=True)
    peak = read_status("VmHWM") - original

    gram = 4 * width**2
    assert 2 * gram < expected
    assert abs(peak - expected) < RELATIVE_ERROR * expected + 0.5 * gram


def test_offloaded_layers_do_not_count():
    model_config = llama()
    model_config.num_hidden_layers = 8
    in_memory = estimate(half(), model_config)
    on_disk = estimate(half(), model_config, "disk")
    on_cpu = estimate(half(), model_config, "cpu")

    assert on_disk.weights < in_memory.weights / 3
    assert on_disk.hidden == 0
    assert in_memory.hidden > 0
    assert in_memory.host == 0
    assert 0 < on_disk.host < on_cpu.host


def test_only_a_cpu_holds_the_original_and_the_smaller_layer():
    sizes = {"hidden_size": 1024, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings = StructPruneConfig(widths={"expert": 48}, num_samples=2, seq_length=8)
    model = meta_model(OlmoeConfig(**sizes, num_experts=64))
    on_gpu = ModelInfo(describe(model), model, model.device)
    on_cpu = replace(on_gpu, device=torch.device("cpu"))

    gpu_memory = estimate_memory(PruningRequest(settings, on_gpu)).working
    cpu_memory = estimate_memory(PruningRequest(settings, on_cpu)).working

    smaller_layer = 4 * 48 * 3 * 1024 * 512
    assert gpu_memory < smaller_layer
    assert smaller_layer < cpu_memory < 2 * smaller_layer


def test_without_gram_matrices_the_estimate_is_linear_in_the_width():
    def working(width, **fields):
        return estimate(half(width, **fields), llama(width)).working

    small, large, larger = (working(width, criterion="wanda", refit="none") for width in (4096, 8192, 16384))
    assert larger - large == pytest.approx(2 * (large - small), rel=0.01)
    assert working(16384) - working(8192) > 3 * (working(8192) - working(4096))


def test_feedback_rounds_precision_and_processes_count(monkeypatch):
    default = estimate(half(), llama())

    # Error feedback has two residual streams instead of one. The stored attention outputs are as large as one stream.
    assert 2 * default.hidden == 3 * estimate(half(error_feedback=0), llama()).hidden
    assert estimate(half(rounds=2), llama()).weights > default.weights
    assert estimate(half(), llama(), dtype=torch.bfloat16).weights * 2 == default.weights

    monkeypatch.setattr("optimum_structprune.pruning.memory.process_count", lambda: 2)
    assert estimate(half(), llama()).hidden * 2 == default.hidden


@pytest.mark.parametrize("inplace", [True, False])
def test_too_little_memory_is_refused_before_text_is_read(inplace, monkeypatch):
    set_free_bytes(monkeypatch, 10**6)
    model = build("llama-tied")
    missing_text = [DomainConfig(name="a", source="/nowhere.txt")]

    message = r"takes at least .* MB on cpu .*, and 1\.0 MB are free\. .*batch_size"
    with pytest.raises(StructPruneError, match=message) as error:
        prune_model(model, config(domains=missing_text), tokenizer(), inplace=inplace)

    assert ("inplace=True" in str(error.value)) != inplace
    assert "--offload disk" in str(error.value)
    assert same_weights(model, build("llama-tied"))


def test_a_run_starts_if_memory_is_enough_or_unknown(monkeypatch):
    for size in (None, 10**9):
        set_free_bytes(monkeypatch, size)
        small = prune_model(build("llama-tied"), config(), tokenizer(), inplace=False)
        assert small.config.intermediate_size == 24


def test_free_memory_is_known_of_real_devices_only():
    size = free_bytes(torch.device("cpu"))
    assert size is None or 0 < size < 2**60
    assert free_bytes(torch.device("meta")) is None


def test_each_device_of_a_spread_model_needs_its_part_of_a_copy(monkeypatch):
    model = build("llama-untied")
    request = PruningRequest(config(), ModelInfo(describe(model), model, model.device))
    required = int(estimate_memory(request).above * (1 - RELATIVE_ERROR))
    sizes = {torch.device("cuda", 0): 30, torch.device("cuda", 1): 70}
    monkeypatch.setattr("optimum_structprune.pruning.memory.bytes_by_device", lambda model: sizes)

    def check(free_sizes, inplace=False):
        monkeypatch.setattr("optimum_structprune.pruning.memory.free_bytes", lambda device: free_sizes[device.index])
        check_memory(request, inplace)

    check([required + 30, required + 70])
    check([required, required], inplace=True)
    with pytest.raises(StructPruneError, match="on cuda:0"):
        check([required + 29, required + 70])
    with pytest.raises(StructPruneError, match="on cuda:1"):
        check([required + 30, required + 69])


def test_a_recovery_needs_a_copy_of_the_dense_model(monkeypatch):
    model = build("llama-tied")
    info = ModelInfo(describe(model), model, model.device)
    plain = PruningRequest(config(recovery=None), info)
    recovering = PruningRequest(config(recovery=recovery_config()), info)
    set_free_bytes(monkeypatch, int(estimate_memory(plain).above * (1 - RELATIVE_ERROR)))

    check_memory(plain, inplace=True)
    with pytest.raises(StructPruneError, match=r"a copy of the model \d"):
        check_memory(recovering, inplace=True)
