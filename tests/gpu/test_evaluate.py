"""An evaluation on one or several simulated GPUs has the figures of the CPU."""

import json
from unittest import mock

import pytest
import torch
from gpu.compare import assert_same_on_gpus, on_gpu, spread
from gpu.simulator import simulated_gpus
from models import build, documents, token_ids, tokenizer

from optimum_structprune import DomainConfig, StructPruneError, evaluate
from optimum_structprune.evaluation.speed import measure_speed
from optimum_structprune.forward.metrics import perplexity


QUESTIONS = [
    {"prompt": "w3 w4 w5", "right": "w7", "kind": "x", "opening": "w3 w4 w5", "continues": "w7"},
    {"prompt": "w13 w4", "right": "w7", "kind": "x", "opening": "w13 w4", "continues": "w7"},
]


def pair(case):
    return lambda: [build(case), build(case, seed=1)]


def both(place):
    return lambda models: [place(model) for model in models]


def figures(**options):
    """Return work that evaluates a model against a dense one, and returns all numbers but times."""

    def work(models):
        model, dense = models
        domain = DomainConfig(name="a", source=documents(seed=4))
        evaluation = evaluate(model, tokenizer(), [domain], dense, seq_length=24, num_samples=6, **options)
        return numbers(evaluation.to_dict())

    return work


def numbers(value, path=""):
    if isinstance(value, dict):
        found = {}
        for name, part in value.items():
            if not any(word in name for word in ("second", "time", "speed")):
                found.update(numbers(part, f"{path}.{name}"))
        return found
    return {path: value} if isinstance(value, float) else {}


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", ["llama-tied", pytest.param("llama-untied", marks=pytest.mark.slow)])
def test_perplexity_and_divergence(case, count):
    place = both(on_gpu if count == 1 else spread(count))
    assert_same_on_gpus(figures(), pair(case), count, place)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_answers(tmp_path, count):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    place = both(on_gpu if count == 1 else spread(count))
    assert_same_on_gpus(figures(answers=str(path), max_new_tokens=8), pair("llama-tied"), count, place)


@pytest.mark.slow
def test_speed_is_measured_on_one_device():
    def work(model):
        speed = measure_speed({"model": model}, prompts=(8,), new_tokens=4, repeats=2)
        return sorted(speed.prefill)

    assert_same_on_gpus(work, lambda: build("llama-tied"))
    with simulated_gpus(2), pytest.raises(StructPruneError, match="spread over several devices"):
        work(spread(2)(build("llama-tied")))


def test_a_spread_model_with_an_untied_head_has_a_perplexity():
    samples = token_ids(4, 16)
    assert_same_on_gpus(lambda model: perplexity(model, samples), lambda: build("llama-untied"), 2)


def test_bf16_products_need_no_out_dtype():
    """torch 2.7 and earlier have no product of bf16 matrices in fp32."""
    from optimum_structprune.method.calibrate import Moments

    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    product = torch.mm

    def old(left, right, **options):
        if options:
            raise TypeError("mm() got an unexpected keyword argument 'out_dtype'")
        return product(left, right)

    def gram(x):
        return Moments.empty(8, gram=True, device=x.device).update(x).gram

    with (
        mock.patch("torch.mm", old),
        mock.patch("optimum_structprune.method.calibrate.MM_TAKES_OUT_DTYPE", False),
    ):
        assert_same_on_gpus(gram, lambda: x, place=lambda tensor: tensor.cuda())
    assert_same_on_gpus(gram, lambda: x, place=lambda tensor: tensor.cuda())
