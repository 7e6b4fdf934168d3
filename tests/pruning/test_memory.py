"""What a pruning needs at its peak is what it then takes, and grows with what it is made of."""

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


def llama(wide=3072):
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaConfig(vocab_size=64, intermediate_size=wide, **sizes)


def estimated(config, model_config, offload=None, inputs=None, dtype=torch.float32):
    model = meta_model(model_config, dtype=dtype)
    return estimate_memory(
        PruningRequest(config, ModelInfo(describe(model), model, model.device), inputs=inputs), offload
    )


def half(wide=3072, **fields):
    return StructPruneConfig(widths={"mlp": wide // 2}, num_samples=8, seq_length=64, **fields)


def resident(field):
    return 1024 * int(next(line for line in STATUS.read_text().splitlines() if line.startswith(field)).split()[1])


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.exists(), reason="the high-water mark is read from /proc")
def test_the_peak_is_what_a_run_takes():
    # A Gram matrix has to be larger than the blocks that the allocator keeps, so that it comes and goes as a whole.
    wide = 5120
    model = LlamaForCausalLM(llama(wide)).eval()
    inputs = {name: torch.randint(64, (6, 64)) for name in "ab"}
    prune_model(LlamaForCausalLM(llama(64)), half(64), inputs=inputs)  # brings in what every run imports
    expected = estimated(half(wide), model.config, inputs=inputs)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    prune_model(model, half(wide), inputs=inputs, inplace=True)
    peak = resident("VmHWM") - before
    gram = 4 * wide**2
    assert 2 * gram < expected.above and abs(peak - expected.above) < RELATIVE_ERROR * expected.above + 0.5 * gram


def test_layers_that_are_offloaded_do_not_count():
    dense = llama()
    dense.num_hidden_layers = 8
    inside, disk, cpu = (estimated(half(), dense, place) for place in (None, "disk", "cpu"))
    assert disk.weights < inside.weights / 3 and disk.hidden == 0 < inside.hidden
    assert inside.host == 0 < disk.host < cpu.host


def test_only_a_cpu_holds_a_smaller_layer_beside_the_whole_one():
    sizes = {"hidden_size": 1024, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = StructPruneConfig(widths={"expert": 48}, num_samples=2, seq_length=8)
    model = meta_model(OlmoeConfig(**sizes, num_experts=64))
    described = ModelInfo(describe(model), model, model.device)
    on_cpu = replace(described, device=torch.device("cpu"))
    smaller = 4 * 48 * 3 * 1024 * 512
    card, cpu = (estimate_memory(PruningRequest(config, info)).working for info in (described, on_cpu))
    assert card < smaller < cpu < 2 * smaller


def test_without_gram_matrices_the_estimate_is_linear_in_the_width():
    def working(wide, **fields):
        return estimated(half(wide, **fields), llama(wide)).working

    small, large, larger = (working(wide, criterion="wanda", refit="none") for wide in (4096, 8192, 16384))
    assert larger - large == pytest.approx(2 * (large - small), rel=0.01)
    assert working(16384) - working(8192) > 3 * (working(8192) - working(4096))


def test_more_domains_batches_rounds_and_feedback_take_more(monkeypatch):
    def found(dtype=torch.float32, **fields):
        return estimated(half(**fields), llama(), dtype=dtype)

    base = found()
    # Error feedback has two residual streams, and without it there is one; what the attention gives comes to both.
    assert 2 * base.hidden == 3 * found(error_feedback=0).hidden
    assert found(rounds=2).weights > base.weights and found(torch.bfloat16).weights * 2 == base.weights
    monkeypatch.setattr("optimum_structprune.pruning.memory.process_count", lambda: 2)
    assert found().hidden * 2 == base.hidden


@pytest.mark.parametrize("inplace", [True, False])
def test_too_little_memory_is_refused_before_text_is_read(inplace, monkeypatch):
    monkeypatch.setattr("optimum_structprune.pruning.memory.free_bytes", lambda device: 10**6)
    model, before = build("llama-tied"), build("llama-tied")
    nowhere = [DomainConfig(name="a", source="/nowhere.txt")]
    message = r"takes at least .* MB on cpu .*, and 1\.0 MB are free\. .*batch_size"
    with pytest.raises(StructPruneError, match=message) as found:
        prune_model(model, config(domains=nowhere), tokenizer(), inplace=inplace)
    assert ("inplace=True" in str(found.value)) != inplace and "--offload disk" in str(found.value)
    assert same_weights(model, before)
    for free in (None, 10**9):  # what fits, or cannot be told, is pruned
        monkeypatch.setattr("optimum_structprune.pruning.memory.free_bytes", lambda device: free)  # noqa: B023
        assert prune_model(model, config(), tokenizer(), inplace=False).config.intermediate_size == 24
    monkeypatch.undo()
    found = free_bytes(torch.device("cpu"))
    assert found is None or 0 < found < 2**60
    assert free_bytes(torch.device("meta")) is None


def test_each_device_of_a_spread_model_takes_its_part_of_a_copy(monkeypatch):
    model = build("llama-untied")
    request = PruningRequest(config(), ModelInfo(describe(model), model, model.device))
    above = int(estimate_memory(request).above * (1 - RELATIVE_ERROR))
    devices = [torch.device("cuda", index) for index in range(2)]
    monkeypatch.setattr(
        "optimum_structprune.pruning.memory.bytes_by_device", lambda model: dict(zip(devices, (30, 70), strict=True))
    )

    def check(free, inplace=False):
        monkeypatch.setattr("optimum_structprune.pruning.memory.free_bytes", lambda device: free[device.index])
        check_memory(request, inplace)

    check([above + 30, above + 70])
    check([above, above], inplace=True)
    with pytest.raises(StructPruneError, match="on cuda:0"):
        check([above + 29, above + 70])
    with pytest.raises(StructPruneError, match="on cuda:1"):
        check([above + 30, above + 69])


def test_a_recovery_takes_a_copy_of_the_dense_model(monkeypatch):
    model = build("llama-tied")
    info = ModelInfo(describe(model), model, model.device)
    plain, recovering = (PruningRequest(config(recovery=recovery), info) for recovery in (None, recovery_config()))
    above = int(estimate_memory(plain).above * (1 - RELATIVE_ERROR))
    monkeypatch.setattr("optimum_structprune.pruning.memory.free_bytes", lambda device: above)
    check_memory(plain, inplace=True)
    with pytest.raises(StructPruneError, match=r"a copy of the model \d"):
        check_memory(recovering, inplace=True)
