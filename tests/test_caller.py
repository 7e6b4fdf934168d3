"""What the caller has set, of torch, changes nothing, and is set afterwards as it was."""

from contextlib import ExitStack

import pytest
import torch
from helpers import recovery_config, same_weights
from models import build, config, tokenizer

from optimum_structprune import StructPruneError, StructPruner, calibrate, evaluate


MODES = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


@pytest.fixture(autouse=True)
def default_dtype():
    yield
    torch.set_default_dtype(torch.float32)


def settings(**fields):
    return config(sparsity=0.3, round_to=1, **fields)


@pytest.fixture(scope="module")
def usual():
    pruner = StructPruner(settings())
    return pruner.prune_model(build("llama-tied"), tokenizer()), pruner


@pytest.mark.parametrize(
    ("dtype", "mode"),
    [(torch.bfloat16, "autocast"), (torch.float16, "no_grad"), (torch.float64, "inference")],
    ids=str,
)
def test_a_pruning_is_the_same(dtype, mode, usual):
    model, pruner = build("llama-tied"), StructPruner(settings())
    torch.set_default_dtype(dtype)
    with MODES[mode]():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
        small = pruner.prune_model(model, tokenizer())
        after = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
    assert torch.get_default_dtype() == dtype and before == after
    assert pruner.plan == usual[1].plan and same_weights(small, usual[0])
    # What comes out can be trained.
    torch.set_default_dtype(torch.float32)
    small(torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()


def test_recovery_evaluation_and_calibration_are_too(tmp_path):
    results = []
    for name in ("plain", *MODES):
        with ExitStack() as stack:
            model = build("llama-tied")
            if name in MODES:
                torch.set_default_dtype(torch.bfloat16)
                stack.enter_context(MODES[name]())
            small = StructPruner(settings(recovery=recovery_config())).prune_model(model, tokenizer())
            figures = evaluate(small, tokenizer(), settings().domains, num_samples=4, seq_length=24)
            stored = calibrate(small, tokenizer(), settings(), tmp_path / name)
            results.append((small, figures.to_dict()["perplexity"], stored.files["layer-000.domain-0.safetensors"]))
            torch.set_default_dtype(torch.float32)
    for small, *figures in results[1:]:
        assert same_weights(small, results[0][0]) and figures == [*results[0][1:]]


def test_the_settings_are_back_after_an_error():
    torch.set_default_dtype(torch.float64)
    with pytest.raises(StructPruneError), torch.inference_mode():
        StructPruner(config(widths={"mlp": 4000})).prune_model(build("llama-tied"), tokenizer())
    assert torch.get_default_dtype() == torch.float64 and torch.is_grad_enabled()
