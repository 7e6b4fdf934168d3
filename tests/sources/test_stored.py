"""Pruning from stored statistics is pruning on the dense model's, without running its text again."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import data_of, pruned_on, save_desk, whole_model_at_once
from models import build, config, documents, token_ids, tokenizer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from optimum_structprune import DomainConfig, StructPruneConfig, StructPruner, calibrate, perplexity, prune_model
from optimum_structprune.arch.load import describe
from optimum_structprune.commands.cli import main
from optimum_structprune.domains.load import load_domains
from optimum_structprune.domains.manifest import Manifest
from optimum_structprune.domains.resolve import builtin_domains
from optimum_structprune.errors import StructPruneError
from optimum_structprune.pruning.run import Run
from optimum_structprune.search.search import choose_shape
from optimum_structprune.sources.stored import Stored
from optimum_structprune.widths.budget import widths_of


def uneven(**fields):
    """Two domains of different text and weight, one of them of few words."""
    few = [" ".join(f"w{3 + (i * j) % 5}" for j in range(30)) for i in range(60)]
    domains = [DomainConfig(name="a", source=documents()), DomainConfig(name="few", source=few, weight=2)]
    return config(**{"domains": domains, **fields})


@pytest.fixture(scope="module")
def stats(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored") / "stats"
    calibrate(build("llama-tied"), tokenizer(), uneven(), folder)
    return folder


@pytest.fixture
def ran(monkeypatch):
    """Tokens that each call of a layer got."""
    tokens, forward = [], LlamaDecoderLayer.forward

    def counted(self, hidden_states, *args, **kwargs):
        tokens.append(hidden_states.shape[:2].numel())
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", counted)
    return tokens


def pruned(stats, **fields):
    pruner = StructPruner(uneven(stats=str(stats), **fields))
    return pruner, pruner.prune_model(build("llama-tied"), tokenizer())


def assert_same_model(left, right):
    theirs = right.state_dict()
    for name, tensor in left.state_dict().items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("widths", [{"mlp": 24, "attention": 2}, {"mlp": 9}])
@pytest.mark.parametrize("how", [{}, {"criterion": "obs", "refit": "none"}])
def test_it_is_pruning_on_the_dense_models_statistics(stats, ran, widths, how):
    found, small = pruned(stats, widths=widths, **how)
    calls = list(ran)
    ran.clear()
    for domain in load_domains(uneven(), tokenizer()):
        perplexity(small, domain.heldout)
    compared = [16] * 2 * 2 * 2  # tokens, before and after the cut of either layer, in both layers
    # Perplexity before and after runs rows together, so tokens are compared and not calls.
    assert sum(calls) == sum([*ran, *compared, *ran]), "nothing else runs but what measures perplexity"
    data = data_of(uneven(widths=widths, **how))
    with whole_model_at_once():
        expected = pruned_on(data, build("llama-tied"), widths)
    assert found.plan == expected.plan
    assert_same_model(small, expected.model)
    assert found.report.calibration_tokens == expected.report.calibration_tokens
    assert found.manifest.domains == data.manifest(tokenizer()).domains
    assert found.report.perplexity["few"] == pytest.approx(expected.report.perplexity["few"], rel=1e-4)


def test_rounds_refit_from_the_dense_weights(stats):
    rounds, small = pruned(stats, rounds=3, widths={"mlp": 9})
    once, plain = pruned(stats, rounds=1, widths={"mlp": 9})
    assert small.config.intermediate_size == plain.config.intermediate_size == 9
    # The same moments, but scores of later rounds judge refitted weights.
    assert rounds.plan != once.plan and torch.isfinite(small(token_ids()).logits).all()
    weighed = pruned(stats, rounds=2, widths={"mlp": 9}, objective="worst")
    assert weighed[1].config.intermediate_size == 9


def test_a_run_from_statistics_goes_on_where_it_was_killed(stats, tmp_path, monkeypatch):
    fields = {"widths": {"mlp": 9, "attention": 2}, "checkpoint_dir": str(tmp_path / "layers")}
    expected, model = pruned(stats, **{**fields, "checkpoint_dir": None})
    moments, calls = Stored.moments, []

    def killed(self, layer, space, gram):
        calls.append(layer)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return moments(self, layer, space, gram)

    monkeypatch.setattr(Stored, "moments", killed)
    with pytest.raises(KeyboardInterrupt):
        pruned(stats, **fields)
    found, again = pruned(stats, **fields)
    assert found.plan == expected.plan and len(calls) == 4 + 2, "both spaces of the second layer were left"
    assert_same_model(again, model)


def test_one_ranking_of_all_units(stats):
    fields = {"allocation": "global", "sparsity": 0.3, "round_to": 1}
    found, _ = pruned(stats, **fields)
    model, data = build("llama-tied"), data_of(uneven(**fields))
    arch = describe(model)
    with whole_model_at_once():
        widths = choose_shape(Run(model, arch, data), widths_of(data.config, arch, model))
        expected = pruned_on(data, model, widths)
    assert len({*widths["mlp"].values()}) == 2 and found.plan == expected.plan


def test_domains_are_chosen_and_weighed_anew(stats):
    def plan(*domains):
        chosen = StructPruner(replace(config(stats=str(stats), widths={"mlp": 9}), domains=list(domains)))
        chosen.prune_model(build("llama-tied"), tokenizer())
        return chosen

    a, few = (DomainConfig(name=name, source="not read") for name in ("a", "few"))
    plans = [plan(a), plan(few), plan(a, few)]
    assert len({str(chosen.plan.keep) for chosen in plans}) == 3
    assert [(entry.name, entry.weight) for entry in plans[1].manifest.domains] == [("few", 1.0)]
    # A config that names no domain takes them as they were.
    silent = StructPruner(StructPruneConfig(stats=str(stats), widths={"mlp": 9}))
    silent.prune_model(build("llama-tied"), None)
    assert silent.plan == plan(a, replace(few, weight=2.0)).plan
    with pytest.raises(StructPruneError, match=r"of a domain 'fex'; it has a, few. Did you mean 'few'\?"):
        plan(a, replace(few, name="fex"))


def test_built_in_domains_that_are_named_are_not_all_domains(tmp_path):
    """To name the three that stand where none is named is to choose these three, with the weights given there."""
    names = ("prose", "code", "math", "own")
    domains = [DomainConfig(name=name, source=documents(seed=seed)) for seed, name in enumerate(names)]
    domains[-1] = replace(domains[-1], weight=5.0)
    calibrate(build("llama-tied"), tokenizer(), config(domains=domains), tmp_path / "stats")

    def shares(**fields):
        pruner = StructPruner(StructPruneConfig(stats=str(tmp_path / "stats"), widths={"mlp": 9}, **fields))
        pruner.prune_model(build("llama-tied"), tokenizer())
        return {entry.name: entry.weight for entry in pruner.manifest.domains}

    third = pytest.approx(1 / 3)
    assert shares(domains=builtin_domains()) == {"prose": third, "code": third, "math": third}
    assert shares() == {"prose": 0.125, "code": 0.125, "math": 0.125, "own": 0.625}


def test_another_model_or_tokenizer_is_refused(stats):
    for change, message in (
        (lambda model, _: model.model.layers[1].mlp.up_proj.weight.data[0, 0].add_(1e-3), "of another model"),
        (lambda model, _: model.to(torch.bfloat16), "of another model.*bfloat16"),
        (lambda model, _: setattr(model.config, "rms_norm_eps", 1e-3), "of another model"),
        (lambda _, reader: reader.add_tokens(["new"]), "another tokenizer"),
    ):
        model, reader = build("llama-tied"), tokenizer()
        change(model, reader)
        with pytest.raises(StructPruneError, match=message):
            prune_model(model, uneven(stats=str(stats)), reader, inplace=True)
        assert model.config.intermediate_size == 40
    with pytest.raises(StructPruneError, match="recovery trains on text, stats=.* holds none, and no domain is named"):
        StructPruneConfig.from_dict({"sparsity": 0.2, "stats": str(stats), "recovery": {"tokens": 9}})


def cut(path):
    path.write_bytes(path.read_bytes()[:-8])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def drop_field(path):
    path.write_text(json.dumps({**json.loads(path.read_text()), "domains": [{"title": "a"}]}))


def test_damage_is_named(stats, tmp_path):
    for number, (name, damage, message) in enumerate((
        ("layer-001.domain-0.safetensors", cut, "layer-001.domain-0.safetensors has .* bytes instead of"),
        ("layer-001.domain-0.safetensors", flip, "layer-001.domain-0.safetensors is damaged"),
        ("heldout.safetensors", flip, "heldout.safetensors is damaged"),
        ("heldout.safetensors", Path.unlink, "heldout.safetensors has 0 bytes"),
        ("calibration_manifest.json", flip, "calibration_manifest.json is damaged"),
        ("statistics.json", cut, "statistics.json cannot be read"),
        ("statistics.json", drop_field, "statistics.json does not describe statistics"),
        ("statistics.json", Path.unlink, "holds no statistics.*structprune calibrate MODEL"),
    )):  # fmt: skip
        folder = shutil.copytree(stats, tmp_path / str(number))
        damage(folder / name)
        with pytest.raises(StructPruneError, match=message):
            pruned(folder)


def test_a_disk_that_is_too_small_is_noticed_first_and_inputs_without_text_are_stored_too(tmp_path, monkeypatch, ran):
    inputs = {"a": token_ids(8, 24), "b": token_ids(8, 24, seed=2)}
    calibrate(build("llama-tied"), None, config(), tmp_path / "stats", inputs=inputs)
    silent = StructPruneConfig(stats=str(tmp_path / "stats"), widths={"mlp": 9})
    for reader in (None, tokenizer()):
        assert prune_model(build("llama-tied"), silent, reader).config.intermediate_size == 9
    ran.clear()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 0, 1000))
    with pytest.raises(StructPruneError, match=r"stats takes about .* kB, and .* has 1.0 kB left"):
        calibrate(build("llama-tied"), tokenizer(), uneven(), tmp_path / "deep" / "stats")
    assert not ran and [path.name for path in tmp_path.iterdir()] == ["stats"]


def test_through_the_command_line(tmp_path, capsys):
    save_desk(tmp_path)
    model, stats = str(tmp_path / "model"), str(tmp_path / "stats")
    text = ["--domain", f"a={tmp_path / 'a.jsonl'}", "--num-samples", "6", "--seq-length", "24"]
    assert main(["calibrate", model, stats, *text, "--device", "cpu"]) == 0
    assert "a 120 tokens" in (shown := capsys.readouterr().out) and f"OUT --stats {stats}" in shown
    assert main(["calibrate", model, stats, *text, "--device", "cpu"]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert main(["prune", model, str(tmp_path / "out"), "--width", "mlp=9", "--stats", stats]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["intermediate_size"] == 9
    assert Manifest.load(tmp_path / "out").domains == Manifest.load(stats).domains
