"""The estimated memory and time grow with the work of a run, and a run that cannot fit is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import recovery_config, same_weights, unread
from models import build, config, tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, OlmoeConfig

from optimum_structprune import (
    DomainConfig,
    RecoveryConfig,
    StructPruneConfig,
    StructPruneError,
    dry_run,
    prune_model,
    recover,
)
from optimum_structprune.arch.load import ModelInfo, describe
from optimum_structprune.arch.meta import meta_model
from optimum_structprune.pruning.cost import UNCOUNTED_BYTES, check_memory, pruning_cost
from optimum_structprune.pruning.request import PruningRequest
from optimum_structprune.record.cost import REFUSED_SHARE, recovery_cost


CPU = torch.device("cpu")
STATUS = Path("/proc/self/status")
TEXT = [DomainConfig(name="a", source="builtin:math")]
SETTINGS = StructPruneConfig(widths={"mlp": 24}, num_samples=64, seq_length=64, domains=TEXT, general_share=0.0)


def llama(width=3072):
    """Return the config of a Llama of one layer with this FFN width."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaConfig(vocab_size=64, intermediate_size=width, **sizes)


def half(width=3072, **fields):
    """Return a config that halves the FFN width."""
    return StructPruneConfig(widths={"mlp": width // 2}, num_samples=8, seq_length=64, **fields)


def memory(settings, model_config, offload=None, inputs=None, dtype=torch.float32):
    """Return the estimated memory of a pruning of a model with this config."""
    model = meta_model(model_config, dtype=dtype)
    return pruning_cost(PruningRequest(settings, ModelInfo(describe(model), model, CPU), inputs=inputs), offload)


def above(memory):
    """Return the bytes on top of the weights, by purpose, in all."""
    return sum(memory.values()) - memory["weights"]


def set_free_bytes(monkeypatch, size):
    """Let each device have this number of free bytes."""
    monkeypatch.setattr("optimum_structprune.record.cost.free_bytes", lambda device: size)


def read_status(field):
    """Return a size in the status of this process, in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.exists(), reason="the high-water mark is read from /proc")
def test_the_estimate_is_near_the_peak_of_a_run():
    # The allocator returns only large blocks to the system, so a Gram matrix has to be larger than its blocks.
    width = 5120
    model = LlamaForCausalLM(llama(width)).eval()
    inputs = {name: torch.randint(64, (6, 64)) for name in "ab"}
    prune_model(LlamaForCausalLM(llama(64)), half(64), inputs=inputs)  # imports the modules that each run imports
    expected = above(memory(half(width), model.config, inputs=inputs).memory)

    Path("/proc/self/clear_refs").write_text("5")
    original = read_status("VmRSS")
    prune_model(model, half(width), inputs=inputs, inplace=True)
    peak = read_status("VmHWM") - original

    gram = 4 * width**2
    assert 2 * gram < expected
    assert REFUSED_SHARE * expected < peak + 0.5 * gram
    assert peak < expected / REFUSED_SHARE + 0.5 * gram


def test_offloaded_layers_do_not_count():
    model_config = llama()
    model_config.num_hidden_layers = 8
    in_memory = memory(half(), model_config)
    on_disk = memory(half(), model_config, "disk")
    on_cpu = memory(half(), model_config, "cpu")

    assert on_disk.memory["weights"] < in_memory.memory["weights"] / 3
    assert on_disk.memory["hidden states"] == 0
    assert in_memory.memory["hidden states"] > 0
    assert in_memory.host == 0
    assert 0 < on_disk.host < on_cpu.host


def test_only_a_cpu_holds_the_original_and_the_smaller_layer():
    sizes = {"hidden_size": 1024, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings = StructPruneConfig(widths={"expert": 48}, num_samples=2, seq_length=8)
    model = meta_model(OlmoeConfig(**sizes, num_experts=64))
    on_gpu = ModelInfo(describe(model), model, torch.device("cuda"))
    on_cpu = replace(on_gpu, device=CPU)

    smaller_layer = 4 * 48 * 3 * 1024 * 512
    assert pruning_cost(PruningRequest(settings, on_gpu)).memory["working memory"] < smaller_layer
    cpu_memory = pruning_cost(PruningRequest(settings, on_cpu)).memory["working memory"]
    assert smaller_layer < cpu_memory < 2 * smaller_layer


def test_gram_matrices_grow_with_the_square_of_the_width():
    def working(width, **fields):
        return memory(half(width, **fields), llama(width)).memory["working memory"] - UNCOUNTED_BYTES

    assert working(16384) > 3 * working(8192)
    without = {"criterion": "wanda", "refit": "none"}
    assert working(16384, **without) == pytest.approx(2 * working(8192, **without), rel=0.01)


def test_error_feedback_precision_and_processes_change_the_memory(monkeypatch):
    default = memory(half(), llama()).memory
    without_feedback = memory(half(error_feedback=0), llama()).memory
    half_precision = memory(half(), llama(), dtype=torch.bfloat16).memory

    # Error feedback has two residual streams instead of one. The stored attention outputs are as large as one stream.
    assert 2 * default["hidden states"] == 3 * without_feedback["hidden states"]
    assert half_precision["weights"] * 2 == default["weights"]

    monkeypatch.setattr("optimum_structprune.pruning.cost.process_count", lambda: 2)
    assert memory(half(), llama()).memory["hidden states"] * 2 == default["hidden states"]


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


def test_each_device_of_a_spread_model_needs_its_part_of_a_copy(monkeypatch):
    model = build("llama-untied")
    request = PruningRequest(config(), ModelInfo(describe(model), model, model.device))
    pruning = above(pruning_cost(request).memory)
    sizes = {torch.device("cuda", 0): 3 * 10**6, torch.device("cuda", 1): 7 * 10**6}
    monkeypatch.setattr("optimum_structprune.pruning.cost.bytes_by_device", lambda model: sizes)

    def check(free_sizes, inplace=False):
        free = [int(REFUSED_SHARE * size) for size in free_sizes]
        monkeypatch.setattr("optimum_structprune.record.cost.free_bytes", lambda device: free[device.index])
        check_memory(request, inplace)

    check([pruning + 3 * 10**6, pruning + 7 * 10**6])
    check([pruning, pruning], inplace=True)
    with pytest.raises(StructPruneError, match="on cuda:0"):
        check([pruning + 2 * 10**6, pruning + 7 * 10**6])
    with pytest.raises(StructPruneError, match="on cuda:1"):
        check([pruning + 3 * 10**6, pruning + 6 * 10**6])


def test_a_recovery_needs_a_copy_of_the_original_model(monkeypatch):
    model = build("llama-tied")
    info = ModelInfo(describe(model), model, model.device)
    plain = PruningRequest(config(recovery=None), info)
    recovering = PruningRequest(config(recovery=recovery_config()), info)
    set_free_bytes(monkeypatch, int(REFUSED_SHARE * above(pruning_cost(plain).memory)))

    check_memory(plain, inplace=True)
    with pytest.raises(StructPruneError, match=r"a copy of the model \d"):
        check_memory(recovering, inplace=True)


def recovering(**fields):
    return recovery_cost(RecoveryConfig(**fields), build("llama-tied"), build("llama-tied"), 32)


def test_full_training_needs_gradients_and_moments_of_all_weights():
    lora = recovering(tokens=10_000).memory
    full = recovering(tokens=10_000, train="full").memory

    assert full["optimizer"] == 4 * 4 * build("llama-tied").num_parameters()
    assert 0 < recovering(tokens=10_000, lora={"r": 1}).memory["optimizer"] < full["optimizer"]
    assert lora["activations"] == full["activations"]


def test_checkpointed_activations_need_less_memory():
    plain = recovering(tokens=100_000).memory
    checkpointed = recovering(tokens=100_000, training={"gradient_checkpointing": True}).memory
    assert checkpointed["activations"] < plain["activations"]


def test_a_dry_run_estimates_a_recovery_in_the_dtype_of_the_model():
    pruning = config(recovery=recovery_config(tokens=2_400))
    model_config = build("llama-tied").config
    single = dry_run(model_config, pruning, dtype=torch.float32)
    half_precision = dry_run(model_config, pruning, dtype=torch.bfloat16)

    assert single.recovery.memory["weights"] == 2 * half_precision.recovery.memory["weights"]
    assert "the recovery, estimated" in str(single)
    with pytest.raises(StructPruneError, match="longer than the model's 64 positions"):
        dry_run(model_config, config(recovery=recovery_config(tokens=20_000, seq_length=65)))


def test_a_recovery_that_cannot_fit_is_refused_before_text_is_read(monkeypatch):
    set_free_bytes(monkeypatch, 1_000)
    settings = recovery_config(train="full", lora={}, domains=[DomainConfig("a", unread())])

    with pytest.raises(StructPruneError, match="The recovery takes at least .* are free. Set .*`train`='lora'"):
        recover(build("llama-tied"), tokenizer(), settings)
    with pytest.raises(StructPruneError, match="The recovery takes at least"):
        dry_run(build("llama-tied").config, config(recovery=settings), dtype=torch.float32)
