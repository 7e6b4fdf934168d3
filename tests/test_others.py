"""Encoders, encoder-decoders and multimodal models: the same promises as for causal language models."""

import pytest
import torch
from helpers import KEEP, batches, masked, random_plan, shrunk
from models import OTHER_STRUCTURES, OTHERS, build, config, token_ids, tokenizer

from optimum_structprune import StructPruneError, StructPruner, prune_model
from optimum_structprune.arch.load import describe
from optimum_structprune.arch.spec import GROUP
from optimum_structprune.calibration.passes import LayerPasses
from optimum_structprune.forward.layers import NotSequentialError
from optimum_structprune.forward.metrics import model_outputs, output_error, outputs_of, run_model
from optimum_structprune.widths.allocation import choices, legal_widths, target_widths


KEEP |= {"encoder_mlp": 24, "decoder_mlp": 20}
SPACES = [(case, name) for case in OTHER_STRUCTURES for name in describe(build(case)).names]
MULTIMODAL = [case for case in OTHERS if describe(build(case)).layer_path.startswith("model.language_model.")]


def probe(case, batch=2):
    if case == "vit":
        return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return token_ids(batch)


@torch.no_grad()
def outputs(model, case):
    return outputs_of(run_model(model, probe(case)))


def keep_for(case):
    return {"mlp": 12, "attention": 2} if case == "vit" else {}


@pytest.mark.parametrize(("case", "name"), [*SPACES, *((case, "all") for case in OTHERS)])
def test_pruned_equals_masked_and_reloads(case, name, tmp_path, monkeypatch):
    for kind, width in keep_for(case).items():
        monkeypatch.setitem(KEEP, kind, width)
    model = build(case)
    arch = describe(model)
    plan = random_plan(arch, arch.names if name == "all" else (name,))
    small = shrunk(model, arch, plan)
    torch.testing.assert_close(outputs(small, case), outputs(masked(model, arch, plan), case), atol=1e-5, rtol=0)
    assert not torch.allclose(outputs(small, case), outputs(model, case), atol=1e-3)
    assert small.num_parameters() < model.num_parameters()
    if name == "all":
        small.save_pretrained(tmp_path)
        again = OTHERS[case][0].from_pretrained(tmp_path)
        assert type(again) is type(model)
        torch.testing.assert_close(outputs(again, case), outputs(small, case), atol=1e-6, rtol=0)


def test_pixels_are_given_as_inputs(tmp_path):
    model = build("vit")
    pruner = StructPruner(config(widths={"mlp": 12, "attention": 2}))
    small = pruner.prune_model(model, inputs={"pixels": torch.randn(8, 3, 8, 8)})
    assert small.config.intermediate_size == 12 and small.config.num_attention_heads == 2
    assert 0 < pruner.report.output_error["pixels"] < 1
    pruner.save(small, tmp_path / "out")
    with pytest.raises(StructPruneError, match=r"inputs\['few'\] has 2 samples, of which 2 are held out; 3 is the"):
        prune_model(model, config(), inputs={"few": torch.randn(2, 3, 8, 8)})
    with pytest.raises(StructPruneError, match="at least one domain"):
        prune_model(model, config(), inputs={})


def test_heads_of_a_vision_model_are_not_rounded():
    model = build("vit")
    arch = describe(model)
    assert {space.unit for space in arch.of("attention")} == {GROUP}
    legal = legal_widths(config(widths={"attention": 3}), arch, model.config)
    assert choices(config(round_to=8), arch, "attention", legal["attention"]) == [1, 2, 3, 4]
    widths = target_widths(config(sparsity=0.3, round_to=8, targets=("attention",)), arch, model.config)
    assert widths == {"attention": 2}
    assert choices(config(round_to=8), arch, "mlp", range(1, 25)) == [8, 16, 24]


def test_two_stacks_take_passes_over_the_whole_model():
    for case, counts in (("t5", [2, 2]), ("bart", [2, 1])):
        model = build(case)
        arch = describe(model)
        assert [count for _, count in arch.stacks] == counts
        assert arch.layer_prefix(2).endswith(("decoder.block.0.", "decoder.layers.0."))
        with pytest.raises(NotSequentialError):
            LayerPasses(model, arch, batches())


@pytest.mark.parametrize("case", MULTIMODAL)
def test_only_the_text_half_shrinks(case):
    model = build(case)
    arch = describe(model)
    small = shrunk(model, arch, random_plan(arch, ("mlp",)))
    assert small.config.text_config.intermediate_size == 24
    assert small.model.language_model.config is small.config.text_config
    prefix = arch.layer_path + "."
    ours, dense = small.state_dict(), model.state_dict()
    assert all(torch.equal(ours[name], dense[name]) for name in dense if not name.startswith(prefix))


def test_output_error_falls_with_a_refit():
    dense = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(0))
    assert output_error(dense, dense) == 0
    assert output_error(dense.flatten(0, 1).mean(0).expand_as(dense), dense) == pytest.approx(1)
    model, errors = build("bert").train(), []
    assert model_outputs(model, token_ids(3), 2).shape == (3, 12, 32) and model.training
    for refit in ("none", "least_squares"):
        pruner = StructPruner(config(refit=refit))
        pruner.prune_model(build("bert"), tokenizer())
        errors.append(sum(pruner.report.output_error.values()))
    assert errors[1] < errors[0]
