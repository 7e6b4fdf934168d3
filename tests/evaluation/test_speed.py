"""Speed: cached generation, memory, speed-ups, and refused measurements."""

from statistics import median

import pytest
import torch
from helpers import first_units, modes
from models import build, token_ids

from optimum_structprune import Speed, StructPruneError, measure_speed
from optimum_structprune.arch.generation import cache_bytes, read_prompt, write_tokens
from optimum_structprune.evaluation.speed import cache_per_token, spread
from optimum_structprune.record.comparison import speed_rows
from optimum_structprune.record.report import Spread


SHORT = {"prompts": (8,), "new_tokens": 3, "repeats": 2}


@pytest.fixture(scope="module")
def speed():
    """Return the measured speed of a model and of the same model with half of its channels."""
    original = build("llama-tied")
    models = {"original": original, "half": first_units(original, (20, 20))}
    return measure_speed(models, batch_sizes=(1, 2), **SHORT)


@pytest.mark.parametrize("case", ["llama-tied", "gpt2-tied", "gemma3_text", "qwen3_5_text", "bloom"])
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_generation_with_the_cache_is_greedy(case):
    model = build(case)
    ids = token_ids(length=7)

    token, cache = read_prompt(model, ids)
    last_token = write_tokens(model, token, cache, 4)

    for _ in range(5):
        logits = model(ids, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(last_token, ids[:, -1:])


@torch.no_grad()
def test_bytes_of_the_cache_are_counted():
    model = build("llama-tied")
    num_layers = 2
    num_key_values = 4 * 4
    assert cache_per_token(model) == num_layers * 2 * num_key_values * 4

    _, cache = read_prompt(model, token_ids(3, 10))
    assert cache_bytes(cache) == 3 * 10 * cache_per_token(model)

    # One of the two layers caches only the tokens in its window.
    windowed = build("gemma3_text")
    _, cache = read_prompt(windowed, token_ids(1, 10))
    assert cache_bytes(cache) < 10 * cache_per_token(windowed)


def test_every_model_is_measured_in_every_shape(speed):
    batch_sizes = {f"batch {batch_size}, prompt 8": batch_size for batch_size in (1, 2)}

    for timings_by_shape, num_tokens in ((speed.prefill, 8), (speed.decode, 3)):
        assert list(timings_by_shape) == list(batch_sizes)
        assert list(speed.run_memory) == list(batch_sizes)

        for shape, batch_size in batch_sizes.items():
            for name in ("original", "half"):
                timing = timings_by_shape[shape][name]
                assert len(timing.seconds) == 2
                assert min(timing.seconds) > 0
                assert timing.tokens_per_second == pytest.approx(batch_size * num_tokens / median(timing.seconds))


def test_speed_ups_are_ratios_of_paired_runs(speed):
    for timings_by_shape in (speed.prefill, speed.decode):
        for timings in timings_by_shape.values():
            original = timings["original"]
            half = timings["half"]
            ratios = [first / second for first, second in zip(original.seconds, half.seconds, strict=True)]
            assert half.speedup == spread(ratios)
            assert original.speedup == Spread(1, 1, 1)


def test_the_spread_of_a_speed_up_is_its_median_and_quartiles():
    assert spread([2.0]) == Spread(2, 2, 2)
    assert spread([5.0, 1.0, 4.0, 2.0, 3.0]) == Spread(3, 2, 4)


def test_a_measurement_does_not_change_the_model_or_torch(tmp_path):
    model = build("llama-tied").train()
    model.model.layers[1].eval()
    original_modes = modes(model)
    num_threads = torch.get_num_threads()

    torch.set_num_threads(num_threads + 1)
    try:
        measured = measure_speed({"a": model}, **SHORT)
        assert modes(model) == original_modes
        assert torch.get_num_threads() == num_threads + 1
        assert measured.threads == num_threads + 1
    finally:
        torch.set_num_threads(num_threads)

    weight_bytes = sum(tensor.nbytes for tensor in model.parameters())
    weight_bytes += sum(tensor.nbytes for tensor in model.buffers())
    assert measured.run_memory == {"batch 1, prompt 8": {"a": weight_bytes + 11 * cache_per_token(model)}}

    measured.save(tmp_path / "speed.json")
    assert Speed.load(tmp_path / "speed.json") == measured


def test_a_smaller_model_uses_less_memory(speed):
    assert all(memory["half"] < memory["original"] for memory in speed.run_memory.values())


def test_impossible_measurements_are_refused():
    offloaded = build("llama-tied")
    offloaded.hf_device_map = {"model.layers.0": "cpu", "model.layers.1": "disk"}
    without_weights = build("llama-tied").to("meta")

    for model, options, message in (
        (build("llama-tied"), {"prompts": ()}, "prompts"),
        (build("llama-tied"), {"batch_sizes": (4, 0)}, "batch_sizes"),
        (build("llama-tied"), {"prompts": (8, 60), "new_tokens": 5}, "prompt=60 .* 64 .* at most 59 tokens"),
        (build("llama-tied"), {"clock": "sun"}, "clock"),
        (build("t5"), {}, "it is a T5For.*, which does not predict the next token and is no encoder of text"),
        (offloaded, {}, "several devices"),
        (without_weights, {}, "parameters of this LlamaFor.* have no weights"),
    ):
        with pytest.raises(StructPruneError, match=message):
            measure_speed({"it": model}, **(SHORT | options))

    with pytest.raises(StructPruneError, match="nothing to measure. Pass a model"):
        measure_speed({}, **SHORT)

    with pytest.raises(StructPruneError, match="The speeds of encoders and of causal models are not compared"):
        measure_speed({"a": build("llama-tied"), "b": build("bert")}, **SHORT)


def test_encoders_are_measured_in_texts_per_second():
    models = {"a": build("bert"), "b": build("bert", seed=1)}
    measured = measure_speed(models, batch_sizes=(4,), prompts=(8,), repeats=3)
    timings = measured.encode["batch 4, prompt 8"]
    assert list(timings) == ["a", "b"]
    assert not measured.prefill and not measured.decode
    for timing in timings.values():
        assert timing.tokens_per_second == pytest.approx(4 / median(timing.seconds))
    ratios = [first / second for first, second in zip(timings["a"].seconds, timings["b"].seconds, strict=True)]
    assert timings["b"].speedup == spread(ratios)
    assert "encoding, texts/s, batch 4, prompt 8" in str([row[0] for row in speed_rows(measured)])
