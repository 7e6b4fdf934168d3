"""Recovery brings quality back, leaves an ordinary model, and says what is wrong with bad input."""

import json
from copy import deepcopy

import pytest
import torch
from helpers import logits, same_weights
from models import build, config, documents, full_disk, tokenizer
from peft import PeftModel
from trained import needs_shared, stories_config, stories_model
from transformers import AutoModelForCausalLM, TrainerCallback

from optimum_structprune import (
    DomainConfig,
    Plan,
    Recovery,
    RecoveryConfig,
    StructPruneConfig,
    StructPruneError,
    StructPruner,
    load_adapter,
    prune_model,
    recover,
)
from optimum_structprune.domains.load import load_domains
from optimum_structprune.recovery.trainer import DistillTrainer


TEXT = {"domains": [DomainConfig(name=n, source=documents(200, seed=s)) for s, n in enumerate("ab")]}


def recovery(**fields) -> RecoveryConfig:
    training = {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "disable_tqdm": True}
    defaults = {"tokens": 480, "seq_length": 24, "lora": {"r": 2}, **TEXT}
    return RecoveryConfig(**{**defaults, **fields, "training": {**training, **fields.get("training", {})}})


@pytest.fixture
def pruned():
    return prune_model(build("llama-tied"), config(), tokenizer())


@needs_shared
@pytest.mark.parametrize("kl_weight", [0.0, 0.5])
def test_recovery_closes_most_of_the_gap_on_a_trained_model(kl_weight, tmp_path):
    dense, words = stories_model()
    pruning = stories_config(holdout=0.5)
    pruned = prune_model(dense, pruning, words)
    healer = Recovery(RecoveryConfig(tokens=32_000, kl_weight=kl_weight, training={"learning_rate": 3e-3}), pruning)
    recovered = healer.recover_model(pruned, words, dense)
    ppl = healer.report.perplexity["stories"]
    assert ppl["recovered"] < 0.6 * ppl["pruned"]
    assert ("dense" in ppl) == (kl_weight > 0)
    assert type(recovered) is type(dense) and recovered is pruned
    assert healer.report.tokens == pytest.approx(32_000, rel=0.02) and healer.report.seconds > 0
    healer.save(recovered, tmp_path / "out", words)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.config.intermediate_size == 96 and same_weights(again, recovered)


def test_the_result_is_an_ordinary_model(pruned):
    before = deepcopy(pruned)
    recovered = recover(pruned, tokenizer(), recovery(), teacher=build("llama-tied"))
    assert recovered is pruned and not any("lora" in name for name, _ in recovered.named_modules())
    assert not same_weights(recovered, before) and recovered.training == before.training
    assert all(parameter.requires_grad for parameter in recovered.parameters())


def test_callbacks_reach_the_trainer(pruned):
    class Watch(TrainerCallback):
        steps = 0

        def on_step_end(self, args, state, control, **kwargs):
            self.steps += 1
            control.should_training_stop = self.steps == 3

    healer = Recovery(recovery(), callbacks=[watch := Watch()])
    healer.recover_model(pruned, tokenizer())
    assert watch.steps == healer.report.steps == 3


def test_held_out_documents_of_the_pruning_are_not_trained_on():
    pruning = config(**TEXT, num_samples=32, holdout=0.25)
    healer = Recovery(recovery(domains=None, tokens=96), pruning)
    heldout = load_domains(pruning, tokenizer())
    text = load_domains(healer._text(), tokenizer(), None, healer._num_heldout(24))
    for before, after in zip(heldout, text, strict=True):
        assert torch.equal(before.heldout, after.heldout) and len(after.blocks) == 2
        seen = {tuple(ids[1:5].tolist()) for ids in before.heldout}
        assert not seen & {tuple(ids[1:5].tolist()) for ids in after.blocks}


def test_every_domain_gives_the_same_number_of_tokens():
    uneven = [DomainConfig(name="a", source=documents(200), weight=9.0), DomainConfig(name="b", source=documents(200))]
    assert [len(d.samples) for d in load_domains(Recovery(recovery(domains=uneven))._text(), tokenizer())] == [10, 10]


def test_prune_and_recover_in_one_call(tmp_path):
    pruner = StructPruner(config(recovery=recovery()))
    small = pruner.prune_model(build("llama-tied"), tokenizer())
    assert set(pruner.report.recovery.perplexity["a"]) == {"dense", "pruned", "recovered"}
    assert "recovered" in str(pruner.report) and "recovery" in pruner.report.seconds
    pruner.save(small, tmp_path / "out", tokenizer())
    assert json.loads((tmp_path / "out" / "report.json").read_text())["recovery"]["tokens"] == 480
    saved = StructPruneConfig.from_pretrained(tmp_path / "out")
    assert saved.recovery.tokens == 480 and saved.recovery.lora == {"r": 2}


@pytest.mark.parametrize("inplace", [False, True])
def test_recovery_between_rounds(inplace):
    pruner = StructPruner(config(rounds=2, widths={"mlp": 24, "attention": 2}, recovery=recovery(every_round=True)))
    model = build("llama-tied")
    small = pruner.prune_model(model, tokenizer(), inplace=inplace)
    assert (small is model) == inplace
    assert (small.config.intermediate_size, small.config.num_key_value_heads) == (24, 2)
    assert pruner.report.recovery.tokens == 2 * 240
    assert all(len(keep) == {"mlp": 24, "attention": 2}[name] for (_, name), keep in pruner.plan.keep.items())


def test_a_plan_after_a_plan():
    first = Plan("llama", {(0, "mlp"): (1, 3, 5), (1, "mlp"): (0, 1)})
    second = Plan("llama", {(0, "mlp"): (0, 2), (0, "attention"): (1,)})
    assert first.then(second).keep == {(0, "mlp"): (1, 5), (1, "mlp"): (0, 1), (0, "attention"): (1,)}


def test_an_adapter_on_the_pruned_model(pruned, tmp_path):
    base = deepcopy(pruned)
    healer = Recovery(recovery(merge=False))
    adapted = healer.recover_model(pruned, tokenizer())
    assert isinstance(adapted, PeftModel)
    healer.save(adapted, tmp_path / "adapter")
    again = load_adapter(deepcopy(base), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), logits(adapted))
    wide = build("llama-tied")
    before = deepcopy(wide)
    with pytest.raises(StructPruneError, match=r"mlp.*has shape \(2, 24\) there, and this model takes \(2, 40\)"):
        load_adapter(wide, tmp_path / "adapter")
    assert same_weights(wide, before)
    with pytest.raises(StructPruneError, match="holds no adapter"):
        load_adapter(wide, tmp_path)


def test_a_loss_that_is_no_number_keeps_the_last_good_weights(pruned, monkeypatch):
    seen = []
    original = DistillTrainer._mixed

    def spoiled(self, *arguments):
        seen.append({name: tensor.clone() for name, tensor in self._trainable().items()})
        return original(self, *arguments) * (float("nan") if self.state.global_step == 3 else 1)

    monkeypatch.setattr(DistillTrainer, "_mixed", spoiled)
    healer = Recovery(recovery(merge=False))
    adapted = healer.recover_model(pruned, tokenizer(), build("llama-tied"))
    assert "loss of step 4 is nan" in healer.report.stopped and healer.report.stopped in str(healer.report)
    kept = {name: parameter for name, parameter in adapted.named_parameters() if name in seen[0]}
    assert all(torch.equal(kept[name], tensor) for name, tensor in seen[2].items())


def test_a_loss_that_never_was_a_number(pruned):
    pruned.model.norm.weight.data.fill_(float("nan"))
    before = deepcopy(pruned)
    with pytest.raises(StructPruneError, match="loss of step 1 is nan; lower training"):
        recover(pruned, tokenizer(), recovery())
    assert [*pruned.state_dict()] == [*before.state_dict()]


def test_a_last_step_that_is_no_number_is_taken_back(pruned, monkeypatch):
    original = DistillTrainer.training_step

    def spoiled(self, model, inputs, *arguments, **more):
        loss = original(self, model, inputs, *arguments, **more)
        if self.state.global_step == 9:  # its loss is finite, and no loss follows
            next(p for p in model.parameters() if p.requires_grad).grad.fill_(float("nan"))
        return loss

    monkeypatch.setattr(DistillTrainer, "training_step", spoiled)
    healer = Recovery(recovery())
    recovered = healer.recover_model(pruned, tokenizer())
    assert "weights after step 10 are not finite" in healer.report.stopped
    assert all(torch.isfinite(parameter).all() for parameter in recovered.parameters())
    assert all(ppl["recovered"] < 200 for ppl in healer.report.perplexity.values())


def test_a_checkpoint_that_a_kill_cut_short_is_passed_over(pruned, tmp_path):
    training = {"output_dir": str(tmp_path), "save_steps": 4, "save_total_limit": 2}
    expected = recover(deepcopy(pruned), tokenizer(), recovery(training=training))
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-8", "checkpoint-10"}
    (tmp_path / "checkpoint-10" / "trainer_state.json").unlink()
    (tmp_path / "checkpoint-10" / "adapter_model.safetensors").write_bytes(b"half")
    healer = Recovery(recovery(training=training))
    resumed = healer.recover_model(pruned, tokenizer(), resume=True)
    torch.testing.assert_close(logits(resumed), logits(expected))
    assert healer.report.steps == 10


def test_a_full_disk_while_training(pruned, tmp_path):
    before = deepcopy(pruned)
    training = {"output_dir": str(tmp_path / "run"), "save_steps": 3}
    with (
        full_disk(2_000),
        pytest.raises(StructPruneError, match="stopped at step 3 because a checkpoint could not be"),
    ):
        recover(pruned, tokenizer(), recovery(training=training))
    assert same_weights(pruned, before)


@pytest.mark.parametrize("merge", [True, False])
def test_a_full_disk_while_saving_leaves_what_was_there(pruned, tmp_path, merge):
    healer = Recovery(recovery(merge=merge, lora={"r": 16}))
    recovered = healer.recover_model(pruned, tokenizer())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    with full_disk(10_000), pytest.raises(StructPruneError, match="out could not be written"):
        healer.save(recovered, tmp_path / "out", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious.txt"]
    healer.save(recovered, tmp_path / "out", overwrite=True)


def test_an_interrupted_run_goes_on(pruned, tmp_path, monkeypatch):
    training = {"output_dir": str(tmp_path / "run"), "save_steps": 2}
    expected = recover(deepcopy(pruned), tokenizer(), recovery(training=training))
    original = DistillTrainer.compute_loss
    training["output_dir"] = str(tmp_path / "again")
    before = deepcopy(pruned)

    def interrupted(self, *arguments, **more):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return original(self, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(DistillTrainer, "compute_loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            recover(pruned, tokenizer(), recovery(training=training))
    assert same_weights(pruned, before)
    other = prune_model(build("llama-tied"), config(widths={"mlp": 16}), tokenizer())
    with pytest.raises(StructPruneError, match=r"\(2, 24\) there, and this model takes \(2, 16\)"):
        recover(other, tokenizer(), recovery(training=training), resume=True)
    resumed = recover(pruned, tokenizer(), recovery(training=training), resume=True)
    torch.testing.assert_close(logits(resumed), logits(expected))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens": 40}, "tokens=40 does not give each of the 2 domains a block of 24 tokens; 48 is the least"),
        ({"domains": [DomainConfig(name="none", source=[])]}, "'none' is empty"),
        ({"lora": {"rank": 4}}, "LoraConfig has no field 'rank'"),
        ({"lora": {"r": 0}}, "LoraConfig|adapter"),
        ({"training": {"learning_rat": 1}}, "Did you mean 'learning_rate'"),
        ({"lora": {"target_modules": ["nothing"]}}, "peft cannot put the adapter on LlamaForCausalLM"),
    ],
)
def test_bad_input(pruned, fields, message):
    before = deepcopy(pruned)
    with pytest.raises(StructPruneError, match=message):
        recover(pruned, tokenizer(), recovery(**fields))
    assert same_weights(pruned, before)


def test_bad_teachers_and_nothing_to_resume(pruned, tmp_path):
    with pytest.raises(StructPruneError, match="reading them takes a tokenizer"):
        recover(pruned, None, recovery())
    teacher = build("llama-tied")
    teacher.resize_token_embeddings(50)
    with pytest.raises(StructPruneError, match="vocabulary of 50 tokens and the model one of 96"):
        recover(pruned, tokenizer(), recovery(), teacher=teacher)
    with pytest.raises(StructPruneError, match="teacher 'no/where' cannot be loaded"):
        recover(pruned, tokenizer(), recovery(), teacher="no/where")
    with pytest.raises(StructPruneError, match="no checkpoint in .*nowhere to resume from"):
        recover(pruned, tokenizer(), recovery(training={"output_dir": str(tmp_path / "nowhere")}), resume=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kl_weight": 1.5}, "between 0 and 1, got 1.5"),
        ({"tokens": 0}, "greater than 0"),
        ({"domains": []}, "at least one domain"),
        ({"every_round": True, "merge": False}, "needs merge=True"),
        ({"direction": "sideways"}, "direction"),
        ({"hidden_weight": -1.0}, "0 or more"),
        ({"teacher_logits": "there"}, "needs top_k, such as 64"),
        ({"teacher_logits": "there", "top_k": 4, "hidden_weight": 0.1}, "no hidden states, so hidden_weight has to"),
        ({"teacher_logits": "there", "top_k": 4, "kl_weight": 0}, "of no use with kl_weight=0"),
        ({"token": 5}, "Did you mean 'tokens'"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(StructPruneError, match=message):
        RecoveryConfig.from_dict(fields)


def test_an_adapter_has_no_place_in_a_pruning_config():
    with pytest.raises(StructPruneError, match="merge=False leaves an adapter"):
        StructPruneConfig.from_dict({"sparsity": 0.2, "recovery": {"merge": False}})
