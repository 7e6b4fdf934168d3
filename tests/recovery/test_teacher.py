"""What a teacher adds to the loss: hidden states, predictions from disk, and a teacher that is offloaded."""

import json
from copy import deepcopy

import pytest
import torch
from accelerate import cpu_offload
from helpers import logits, same_weights
from models import build, config, token_ids, tokenizer
from test_recovery import TEXT, recovery
from transformers import TrainingArguments

from optimum_structprune import DomainConfig, Recovery, StructPruneError, StructPruner, prune_model, pruner, recover
from optimum_structprune.forward.divergence import hidden_distance
from optimum_structprune.recovery.teacher import TeacherLogits, TrainingSamples, write_teacher_logits
from optimum_structprune.recovery.trainer import DistillTrainer


@pytest.fixture
def pruned():
    return prune_model(build("llama-tied"), config(), tokenizer())


def loss_of(model, folder, settings, teacher=None, stored=None) -> torch.Tensor:
    """The loss of the first two training blocks."""
    arguments = TrainingArguments(str(folder), use_cpu=True, report_to="none", remove_unused_columns=False)
    blocks = TrainingSamples(token_ids(6, 24), stored)
    trainer = DistillTrainer(model.eval(), arguments, blocks, settings, teacher)
    batch = trainer.data_collator([blocks[4], blocks[5]])
    return trainer.compute_loss(model, batch).detach()


@pytest.mark.parametrize(("direction", "temperature"), [("forward", 1.0), ("reverse", 2.0)])
def test_stored_predictions_give_the_loss_of_the_live_teacher(pruned, tmp_path, monkeypatch, direction, temperature):
    monkeypatch.setattr("optimum_structprune.recovery.teacher.TOKENS_PER_SHARD", 4 * 24)
    teacher = build("llama-tied")
    settings = recovery(top_k=7, direction=direction, temperature=temperature)
    write_teacher_logits(tmp_path / "logits", teacher, token_ids(6, 24), 7, temperature, {"a": 5.0})
    assert len(list((tmp_path / "logits").glob("*.safetensors"))) == 2
    live = loss_of(pruned, tmp_path, settings, teacher)
    stored = loss_of(pruned, tmp_path, settings, stored=TeacherLogits(tmp_path / "logits"))
    torch.testing.assert_close(stored, live, rtol=1e-6, atol=0)
    assert live != loss_of(pruned, tmp_path, settings)


def test_training_from_disk_is_training_with_the_teacher(pruned, tmp_path):
    teacher = build("llama-tied")
    live = recover(deepcopy(pruned), tokenizer(), recovery(top_k=7), teacher=teacher)
    healer = Recovery(recovery(top_k=7, teacher_logits=str(tmp_path / "logits")))
    healer.write_teacher_logits(teacher, tokenizer())
    stored = healer.recover_model(deepcopy(pruned), tokenizer())  # no teacher from here on
    torch.testing.assert_close(logits(stored), logits(live))
    assert not torch.allclose(logits(stored), logits(recover(deepcopy(pruned), tokenizer(), recovery())))
    expected = Recovery(recovery(top_k=7))
    expected.recover_model(deepcopy(pruned), tokenizer(), teacher)
    for name in "ab":
        assert healer.report.perplexity[name] == pytest.approx(expected.report.perplexity[name], rel=1e-5)


def test_pruning_in_place_takes_no_copy_of_the_teacher(tmp_path, monkeypatch):
    whole = StructPruner(config(recovery=recovery(top_k=7))).prune_model(build("llama-tied"), tokenizer())
    monkeypatch.setattr(pruner, "deepcopy", lambda model: pytest.fail("the dense model was copied"))
    for rounds, every_round in ((1, False), (2, True)):
        fields = {"top_k": 7, "teacher_logits": str(tmp_path / str(rounds)), "every_round": every_round}
        healer = StructPruner(config(rounds=rounds, recovery=recovery(**fields)))
        small = healer.prune_model(build("llama-tied"), tokenizer(), inplace=True)
        assert set(healer.report.recovery.perplexity["a"]) == {"dense", "pruned", "recovered"}
        if rounds == 1:
            torch.testing.assert_close(logits(small), logits(whole))


def test_an_interrupted_teacher_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("optimum_structprune.recovery.teacher.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_teacher_logits(tmp_path / "logits", build("llama-tied"), token_ids(6, 24), 7, 1.0, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 8}, "written with top_k=7, and this run has top_k=8"),
        ({"temperature": 2.0}, "written with temperature=1.0, and this run has temperature=2.0"),
        ({"tokens": 240}, "other text, 20 blocks against 10"),
        ({"seed": 3}, "other text"),
    ],
)
def test_predictions_of_another_run_are_refused(pruned, tmp_path, fields, message):
    settings = {"top_k": 7, "teacher_logits": str(tmp_path / "logits")}
    Recovery(recovery(**settings)).write_teacher_logits(build("llama-tied"), tokenizer())
    before = deepcopy(pruned)
    with pytest.raises(StructPruneError, match=message):
        recover(pruned, tokenizer(), recovery(**{**settings, **fields}))
    assert same_weights(pruned, before)


def test_no_predictions_and_broken_ones(pruned, tmp_path):
    settings = recovery(top_k=7, teacher_logits=str(tmp_path / "logits"))
    with pytest.raises(StructPruneError, match="logits.*cannot be read"):
        recover(pruned, tokenizer(), settings)
    Recovery(settings).write_teacher_logits(build("llama-tied"), tokenizer())
    shard = tmp_path / "logits" / "teacher_logits-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(StructPruneError, match="teacher_logits-00000.safetensors is not readable"):
        recover(pruned, tokenizer(), settings)
    index = json.loads((tmp_path / "logits" / "teacher_logits.json").read_text())
    assert index["top_k"] == 7 and index["shards"] == [20]
    with pytest.raises(StructPruneError, match="says where the teacher's logits go"):
        Recovery(recovery()).write_teacher_logits(build("llama-tied"), tokenizer())


def test_text_that_the_teacher_would_write_is_refused(tmp_path):
    own = [DomainConfig(name="mine", source="self:prose")]
    settings = recovery(top_k=7, teacher_logits=str(tmp_path / "logits"), domains=own)
    with pytest.raises(StructPruneError, match="'mine' is written by the model itself"):
        Recovery(settings).write_teacher_logits(build("llama-tied"), tokenizer())
    assert not list(tmp_path.iterdir())


def test_hidden_states_come_closer_to_the_teachers(pruned):
    teacher = build("llama-tied")
    healer = Recovery(recovery())
    ids = healer._domains(healer._text(), tokenizer(), teacher)[0].heldout

    @torch.no_grad()
    def distance(model) -> float:
        mine, theirs = (one(ids, output_hidden_states=True).hidden_states[1:] for one in (model.eval(), teacher))
        return float(hidden_distance(mine, theirs))

    fields = {"kl_weight": 0.0, "tokens": 1920, "lora": {"r": 8}, "training": {"learning_rate": 1e-3}}
    taught = recover(deepcopy(pruned), tokenizer(), recovery(**fields, hidden_weight=100.0), teacher=teacher)
    alone = recover(deepcopy(pruned), tokenizer(), recovery(**fields), teacher=teacher)
    assert distance(taught) < distance(pruned) < distance(alone)


def test_the_hidden_term_is_added_with_its_weight(pruned, tmp_path):
    teacher = build("llama-tied")
    values = [float(loss_of(pruned, tmp_path, recovery(hidden_weight=w), teacher)) for w in (0.0, 1.0, 3.0)]
    assert values[2] - values[0] == pytest.approx(3 * (values[1] - values[0]), rel=1e-4) and values[1] > values[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 16}, "teacher's have 16 channels and the model's 32: its hidden space was pruned"),
        ({"num_hidden_layers": 3}, "the teacher has 3 blocks and the model 2"),
    ],
)
def test_hidden_states_that_do_not_match_are_refused(pruned, fields, message):
    settings = deepcopy(pruned.config)
    settings.update(fields)
    other = type(pruned)(settings)
    with pytest.raises(StructPruneError, match=message):
        recover(pruned, tokenizer(), recovery(hidden_weight=1.0), teacher=other)
    recover(pruned, tokenizer(), recovery(tokens=96), teacher=other)


def test_an_offloaded_teacher_teaches_the_same(pruned):
    teacher = build("llama-tied")
    expected = recover(deepcopy(pruned), tokenizer(), recovery(**TEXT), teacher=teacher)
    cpu_offload(teacher, execution_device=torch.device("cpu"))
    assert teacher.device.type == "meta"
    torch.testing.assert_close(logits(recover(pruned, tokenizer(), recovery(), teacher=teacher)), logits(expected))


def test_mixed_precision_includes_the_teacher(pruned, tmp_path):
    blocks = TrainingSamples(token_ids(6, 24))
    for bf16, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", bf16=bf16)
        trainer = DistillTrainer(pruned, arguments, blocks, recovery(), build("llama-tied"))
        assert trainer._asked(token_ids()).logits.dtype == dtype
