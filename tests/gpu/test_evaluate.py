"""An evaluation on one or several simulated GPUs has the same figures as an evaluation on the CPU."""

import json
from unittest import mock

import pytest
import torch
from gpu.compare import assert_same_on_gpus, on_gpu, spread
from gpu.simulator import simulated_gpus
from models import build, documents, token_ids, tokenizer

from optimum_structprune import DomainConfig, StructPruneError, evaluate
from optimum_structprune.evaluation.speed import measure_speed
from optimum_structprune.measure.losses import perplexity
from optimum_structprune.method.calibrate import Moments


QUESTIONS = [
    {"prompt": "w3 w4 w5", "right": "w7", "kind": "x", "opening": "w3 w4 w5", "continues": "w7"},
    {"prompt": "w13 w4", "right": "w7", "kind": "x", "opening": "w13 w4", "continues": "w7"},
]


def assert_same_figures(case, count, **options):
    """Assert that the evaluation of a model against another model has the same figures on simulated GPUs."""
    place_model = on_gpu if count == 1 else spread(count)

    def make():
        return [build(case), build(case, seed=1)]

    def place(models):
        return [place_model(model) for model in models]

    def work(models):
        model, original = models
        domain = DomainConfig(name="a", source=documents(seed=4))
        evaluation = evaluate(model, tokenizer(), [domain], original, seq_length=24, num_samples=6, **options)
        return figures_in(evaluation.to_dict())

    assert_same_on_gpus(work, make, count, place)


def figures_in(value, path=""):
    """Return all numbers with a fraction in nested dictionaries, except times."""
    if isinstance(value, float):
        return {path: value}
    if not isinstance(value, dict):
        return {}

    figures = {}
    for name, part in value.items():
        is_time = any(word in name for word in ("second", "time", "speed"))
        if not is_time:
            figures.update(figures_in(part, f"{path}.{name}"))
    return figures


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", ["llama-tied", pytest.param("llama-untied", marks=pytest.mark.slow)])
def test_perplexity_and_divergence_are_the_same(case, count):
    assert_same_figures(case, count)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_the_figures_of_answers_are_the_same(tmp_path, count):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    assert_same_figures("llama-tied", count, answers=str(path), max_new_tokens=8)


@pytest.mark.slow
def test_speed_is_measured_on_one_device():
    def work(model):
        speed = measure_speed({"model": model}, prompts=(8,), new_tokens=4, repeats=2)
        return sorted(speed.prefill)

    assert_same_on_gpus(work, lambda: build("llama-tied"))
    with simulated_gpus(2), pytest.raises(StructPruneError, match="spread over several devices"):
        work(spread(2)(build("llama-tied")))


def test_a_spread_model_with_an_untied_head_has_the_same_perplexity():
    samples = token_ids(4, 16)
    assert_same_on_gpus(lambda model: perplexity(model, samples), lambda: build("llama-untied"), 2)


def test_bf16_products_need_no_out_dtype():
    """torch 2.7 and earlier do not have a product of bf16 matrices in fp32."""
    inputs = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    product = torch.mm

    def product_of_torch_2_7(a, b, **options):
        if options:
            raise TypeError("mm() got an unexpected keyword argument 'out_dtype'")
        return product(a, b)

    def compute_gram(tensor):
        return Moments.empty(8, gram=True, device=tensor.device).update(tensor).gram

    with (
        mock.patch("torch.mm", product_of_torch_2_7),
        mock.patch("optimum_structprune.method.calibrate.MM_TAKES_OUT_DTYPE", False),
    ):
        assert_same_on_gpus(compute_gram, lambda: inputs, place=lambda tensor: tensor.cuda())
    assert_same_on_gpus(compute_gram, lambda: inputs, place=lambda tensor: tensor.cuda())
