"""What a pruning needs at its peak is what it then takes, and grows with what it is made of."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_structprune import StructPruneConfig, prune_model
from optimum_structprune.arch.load import describe
from optimum_structprune.arch.meta import meta_model
from optimum_structprune.pruning.room import ERROR, Text, Workload


STATUS = Path("/proc/self/status")


def llama(wide=3072):
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaConfig(vocab_size=64, intermediate_size=wide, **sizes)


def work_of(config, model_config, inputs=None, itemsize=4):
    model = meta_model(model_config)
    return Workload(config, describe(model), model, config.widths, itemsize, Text.of(config, inputs))


def half(wide=3072, **fields):
    return StructPruneConfig(widths={"mlp": wide // 2}, num_samples=8, seq_length=64, **fields)


def resident(field):
    return 1024 * int(next(line for line in STATUS.read_text().splitlines() if line.startswith(field)).split()[1])


@pytest.mark.skipif(not STATUS.exists(), reason="the high-water mark is read from /proc")
def test_the_peak_is_what_a_run_takes():
    # A Gram matrix has to be larger than the blocks that the allocator keeps, so that it comes and goes as a whole.
    wide = 5120
    model = LlamaForCausalLM(llama(wide)).eval()
    inputs = {name: torch.randint(64, (6, 64)) for name in "ab"}
    prune_model(LlamaForCausalLM(llama(64)), half(64), inputs=inputs)  # brings in what every run imports
    expected = work_of(half(wide), model.config, inputs).need()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    prune_model(model, half(wide), inputs=inputs, inplace=True)
    peak = resident("VmHWM") - before
    gram = 4 * wide**2
    assert 2 * gram < expected.above and abs(peak - expected.above) < ERROR * expected.above + 0.5 * gram


def test_layers_that_are_offloaded_do_not_count():
    dense = llama()
    dense.num_hidden_layers = 8
    work = work_of(half(), dense)
    inside, host = work.need(), [work.need(place).host for place in ("disk", "cpu")]
    away = work.need("disk")
    assert away.weights < inside.weights / 3 and away.hidden == 0 < inside.hidden
    assert 0 < host[0] < host[1] and inside.host == 0


def test_without_gram_matrices_the_need_is_linear_in_the_width():
    def working(wide, **fields):
        return work_of(half(wide, **fields), llama(wide)).need().working

    small, large, larger = (working(wide, criterion="wanda", refit="none") for wide in (4096, 8192, 16384))
    assert larger - large == pytest.approx(2 * (large - small), rel=0.01)
    assert working(16384) - working(8192) > 3 * (working(8192) - working(4096))


def test_more_domains_batches_rounds_and_feedback_take_more():
    def found(itemsize=4, **fields):
        return work_of(half(**fields), llama(), itemsize=itemsize).need()

    base = found()
    # Error feedback has two residual streams, and without it there is one; what the attention gives comes to both.
    assert found(error_feedback=0).hidden * 3 == base.hidden * 2
    assert found(rounds=2).weights > base.weights and found(itemsize=2).weights * 2 == base.weights
    assert work_of(half(), llama()).need(processes=2).hidden * 2 == base.hidden
