"""Speed: bytes against their definition, cached writing against plain passes, and what is refused."""

from statistics import median

import pytest
import torch
from helpers import first_units, modes
from models import build, token_ids

from optimum_structprune import Speed, StructPruneError, measure_speed
from optimum_structprune.evaluation.speed import cache_per_token, spread
from optimum_structprune.forward.generation import cache_bytes, read_prompt, write_tokens
from optimum_structprune.record.speed import Spread


SHORT = {"prompts": (8,), "new_tokens": 3, "repeats": 2}


@pytest.fixture(scope="module")
def speed() -> Speed:
    dense = build("llama-tied")
    return measure_speed({"dense": dense, "half": first_units(dense, (20, 20))}, batch_sizes=(1, 2), **SHORT)


@pytest.mark.parametrize("case", ["llama-tied", "gpt2-tied", "gemma3_text", "qwen3_5_text", "bloom"])
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_writing_with_the_cache_gives_the_likeliest_tokens(case):
    model, ids = build(case), token_ids(length=7)
    token, cache = read_prompt(model, ids)
    last = write_tokens(model, token, cache, 4)
    for _ in range(5):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(last, ids[:, -1:])


@torch.no_grad()
def test_bytes_are_counted_from_the_cache():
    layers, keys, model = 2, 4 * 4, build("llama-tied")
    assert cache_per_token(model) == layers * 2 * keys * 4
    assert cache_bytes(read_prompt(model, token_ids(3, 10))[1]) == 3 * 10 * cache_per_token(model)
    windowed = build("gemma3_text")  # a window bounds what one of its two layers keeps
    assert cache_bytes(read_prompt(windowed, token_ids(1, 10))[1]) < 10 * cache_per_token(windowed)


def test_every_model_is_measured_in_every_shape_and_speed_ups_are_ratios_of_pairs(speed):
    sizes = {f"batch {batch_size}, prompt 8": batch_size for batch_size in (1, 2)}
    for of, tokens in ((speed.prefill, 8), (speed.decode, 3)):
        assert [*of] == [*sizes] == [*speed.run_memory]
        for shape, batch_size in sizes.items():
            first, other = (of[shape][name] for name in ("dense", "half"))
            for one in (first, other):
                assert len(one.seconds) == 2 and min(one.seconds) > 0
                assert one.tokens_per_second == pytest.approx(batch_size * tokens / median(one.seconds))
            ratios = [a / b for a, b in zip(first.seconds, other.seconds, strict=True)]
            assert other.speedup == spread(ratios) and first.speedup == Spread(1, 1, 1)
    assert spread([2.0]) == Spread(2, 2, 2)
    assert spread([5.0, 1.0, 4.0, 2.0, 3.0]) == Spread(3, 2, 4), "the median and the quartiles"


def test_memory_is_counted_numbers_are_saved_and_models_and_torch_are_left_as_they_were(speed, tmp_path):
    model, threads = build("llama-tied").train(), torch.get_num_threads()
    model.model.layers[1].eval()
    before = modes(model)
    torch.set_num_threads(threads + 1)
    try:
        found = measure_speed({"a": model}, **SHORT)
        assert modes(model) == before and torch.get_num_threads() == threads + 1 == found.threads
    finally:
        torch.set_num_threads(threads)
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert found.run_memory == {"batch 1, prompt 8": {"a": weights + 11 * cache_per_token(model)}}
    assert all(of["half"] < of["dense"] for of in speed.run_memory.values())
    found.save(tmp_path / "speed.json")
    assert Speed.load(tmp_path / "speed.json") == found


def test_what_cannot_be_measured_is_refused():
    spread = build("llama-tied")
    spread.hf_device_map = {"model.layers.0": "cpu", "model.layers.1": "disk"}
    for model, fields, message in (
        (None, {}, "nothing to measure. Pass a model"),
        (build("llama-tied"), {"prompts": ()}, "prompts"),
        (build("llama-tied"), {"batch_sizes": (4, 0)}, "batch_sizes"),
        (build("llama-tied"), {"prompts": (8, 60), "new_tokens": 5}, "prompt=60 .* 64 .* at most 59 tokens"),
        (build("llama-tied"), {"clock": "sun"}, "clock"),
        (build("bert"), {}, "it is a BertForMaskedLM, which does not predict the next token"),
        (spread, {}, "several devices"),
        (build("llama-tied").to("meta"), {}, "parameters of this LlamaFor.* have no weights"),
    ):
        with pytest.raises(StructPruneError, match=message):
            measure_speed({"it": model} if model else {}, **{**SHORT, **fields})
