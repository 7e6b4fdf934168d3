"""What a pruning needs at its peak is what it then takes, and grows with what it is made of."""

from pathlib import Path

import pytest
import torch
from helpers import same_weights
from models import build, config, documents, tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_structprune import DomainConfig, StructPruneConfig, StructPruneError, StructPruner, calibrate, prune_model
from optimum_structprune.arch.load import describe
from optimum_structprune.arch.meta import meta_model
from optimum_structprune.domains.load import load_domains
from optimum_structprune.pruning import room
from optimum_structprune.pruning.room import ERROR, memory_need, with_batch_size
from optimum_structprune.sources.data import CalibrationData


STATUS = Path("/proc/self/status")


def llama(wide=3072):
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaConfig(vocab_size=64, intermediate_size=wide, **sizes)


def need_of(config, model_config, inputs=None, **places):
    model = meta_model(model_config)
    return memory_need(config, describe(model), model, config.widths, inputs, **places)


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
    expected = need_of(half(wide), model.config, inputs)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    prune_model(model, half(wide), inputs=inputs, inplace=True)
    peak = resident("VmHWM") - before
    gram = 4 * wide**2
    assert 2 * gram < expected.above and abs(peak - expected.above) < ERROR * expected.above + 0.5 * gram


def test_layers_that_are_offloaded_do_not_count():
    dense = llama()
    dense.num_hidden_layers = 8
    inside, disk, cpu = (need_of(half(), dense, offload=place) for place in (None, "disk", "cpu"))
    assert disk.weights < inside.weights / 3 and disk.hidden == 0 < inside.hidden
    assert inside.host == 0 < disk.host < cpu.host


def test_rounds_feedback_and_fewer_processes_take_more():
    base = need_of(half(), llama())
    # Error feedback has two residual streams, and without it there is one; what the attention gives comes to both.
    assert need_of(half(error_feedback=0), llama()).hidden * 3 == base.hidden * 2
    assert need_of(half(rounds=2), llama()).weights > base.weights
    assert need_of(half(), llama(), processes=2).hidden * 2 == base.hidden


@pytest.mark.parametrize("inplace", [True, False])
def test_too_little_memory_is_refused_before_text_is_read(inplace, monkeypatch):
    monkeypatch.setattr(room, "free_bytes", lambda device: 10**6)
    model, before = build("llama-tied"), build("llama-tied")
    nowhere = [DomainConfig(name="a", source="/nowhere.txt")]
    message = r"takes at least .* MB on cpu .*, and 1\.0 MB are free; .*batch_size"
    with pytest.raises(StructPruneError, match=message) as found:
        prune_model(model, config(domains=nowhere), tokenizer(), inplace=inplace)
    assert ("inplace=True" in str(found.value)) != inplace and "--offload disk" in str(found.value)
    assert same_weights(model, before)
    for free in (None, 10**9):  # what fits, or cannot be told, is pruned
        monkeypatch.setattr(room, "free_bytes", lambda device: free)  # noqa: B023
        assert prune_model(model, config(), tokenizer(), inplace=False).config.intermediate_size == 24
    monkeypatch.undo()
    found = room.free_bytes(torch.device("cpu"))
    assert found is None or 0 < found < 2**60
    assert room.free_bytes(torch.device("meta")) is None


@pytest.fixture
def text():
    """More samples than a batch can have."""
    return [DomainConfig(name="a", source=documents(200))]


def data_on(device, text, monkeypatch):
    """Calibration data that says `auto`, of a model whose compute device is said to be another one."""
    model, settings = build("llama-tied"), config(domains=text, num_samples=40, batch_size="auto")
    monkeypatch.setattr(room, "compute_device", lambda model: torch.device(device))
    return CalibrationData.of(settings, load_domains(settings, tokenizer())), describe(model), model


def test_a_run_keeps_to_it_and_gives_the_same_model(text, tmp_path):
    found = []
    for batch_size in (4, "auto"):
        pruner = StructPruner(config(domains=text, batch_size=batch_size))
        found.append(pruner.prune_model(build("llama-tied"), tokenizer()))
    assert same_weights(*found)
    assert pruner.config.batch_size == "auto"
    calibrate(build("llama-tied"), tokenizer(), pruner.config, tmp_path / "stats")


def test_a_device_without_room_gets_smaller_batches(text, monkeypatch):
    data, arch, model = data_on("cuda", text, monkeypatch)
    sizes = []

    def run(base, samples):
        sizes.append(len(samples))
        if len(samples) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(room, "MAX_BATCH", 8)
    monkeypatch.setattr(room, "free_bytes", lambda device: None)
    monkeypatch.setattr(room, "run_model", run)
    found = with_batch_size(data, arch, model, {"mlp": 24}).batch_size
    assert sizes[0] == room.MAX_BATCH and found == sizes[-1] <= 5
    monkeypatch.setattr(
        room, "run_model", lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory."))
    )
    with pytest.raises(StructPruneError, match="one sample of 24 tokens is too much"):
        with_batch_size(data, arch, model, {"mlp": 24})


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_estimate_fits_and_twice_as_much_would_not(share, text, monkeypatch):
    def above(size):
        settings = config(domains=text, num_samples=40, batch_size=size)
        return memory_need(settings, arch, model, {"mlp": 24}).above * (1 + ERROR)

    monkeypatch.setattr(room, "MAX_BATCH_ON_CPU", 16)
    data, arch, model = data_on("cpu", text, monkeypatch)
    free = int(above(1) + share * (above(16) - above(1)))
    for found, least, most in ((free, 1, 16), (None, 16, 16), (0, 1, 1)):
        monkeypatch.setattr(room, "free_bytes", lambda device: found)  # noqa: B023
        size = with_batch_size(data, arch, model, {"mlp": 24}).batch_size
        assert least <= size <= most
        if found:
            assert above(size) <= free and (size == 16 or above(2 * size) > free)
