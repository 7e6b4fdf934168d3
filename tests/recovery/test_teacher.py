"""What a teacher adds to the loss: hidden states, predictions from disk, and a teacher that is offloaded."""

import json
from copy import deepcopy
from unittest.mock import patch

import pytest
import torch
from accelerate import cpu_offload
from helpers import logits, recovery_config, same_weights
from models import build, config, full_disk, token_ids, tokenizer
from transformers import LlamaForCausalLM, TrainerCallback, TrainingArguments

from optimum_structprune import DomainConfig, Recovery, StructPruneError, StructPruner, prune_model, recover
from optimum_structprune.recovery import teacher as teacher_module
from optimum_structprune.recovery.teacher import TeacherLogits, TrainingSamples, write_teacher_logits
from optimum_structprune.recovery.trainer import DistillTrainer


@pytest.fixture
def pruned():
    return prune_model(build("llama-tied"), config(), tokenizer())


def loss_of(model, folder, settings, teacher=None, stored=None) -> torch.Tensor:
    """The loss of two training samples."""
    arguments = TrainingArguments(str(folder), use_cpu=True, report_to="none", remove_unused_columns=False)
    samples = TrainingSamples(token_ids(6, 24), stored)
    trainer = DistillTrainer(model.eval(), arguments, samples, settings, teacher)
    batch = trainer.data_collator([samples[4], samples[5]])
    return trainer.compute_loss(model, batch).detach()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_stored_predictions_give_the_loss_of_the_live_teacher(pruned, tmp_path, monkeypatch, temperature):
    monkeypatch.setattr(teacher_module, "TOKENS_PER_SHARD", 4 * 24)
    teacher = build("llama-tied")
    settings = recovery_config(top_k=7, temperature=temperature)
    write_teacher_logits(tmp_path / "logits", teacher, token_ids(6, 24), 7, temperature, {"a": 5.0})
    assert len(list((tmp_path / "logits").glob("*.safetensors"))) == 2
    live = loss_of(pruned, tmp_path, settings, teacher)
    stored = loss_of(pruned, tmp_path, settings, stored=TeacherLogits(tmp_path / "logits"))
    torch.testing.assert_close(stored, live, rtol=1e-6, atol=0)
    assert live != loss_of(pruned, tmp_path, settings)


def test_training_from_disk_is_training_with_the_teacher(pruned, tmp_path):
    teacher = build("llama-tied")
    live = recover(deepcopy(pruned), tokenizer(), recovery_config(top_k=7), teacher=teacher)
    recovery = Recovery(recovery_config(top_k=7, teacher_logits=str(tmp_path / "logits")))
    recovery.write_teacher_logits(teacher, tokenizer())
    stored = recovery.recover_model(deepcopy(pruned), tokenizer())  # no teacher from here on
    torch.testing.assert_close(logits(stored), logits(live))
    assert not torch.allclose(logits(stored), logits(recover(deepcopy(pruned), tokenizer(), recovery_config())))
    expected = Recovery(recovery_config(top_k=7))
    expected.recover_model(deepcopy(pruned), tokenizer(), teacher)
    for name in "ab":
        assert recovery.report.perplexity[name] == pytest.approx(expected.report.perplexity[name], rel=1e-5)


def test_pruning_in_place_takes_no_copy_of_the_teacher(tmp_path, monkeypatch):
    whole = StructPruner(config(recovery=recovery_config(top_k=7))).prune_model(build("llama-tied"), tokenizer())

    def copied(model, memo):
        pytest.fail("the dense model was copied")

    monkeypatch.setattr(LlamaForCausalLM, "__deepcopy__", copied, raising=False)
    for rounds, every_round in ((1, False), (2, True)):
        fields = {"top_k": 7, "teacher_logits": str(tmp_path / str(rounds)), "every_round": every_round}
        recovery = StructPruner(config(rounds=rounds, recovery=recovery_config(**fields)))
        small = recovery.prune_model(build("llama-tied"), tokenizer(), inplace=True)
        assert set(recovery.report.recovery.perplexity["a"]) == {"dense", "pruned", "recovered"}
        if rounds == 1:
            torch.testing.assert_close(logits(small), logits(whole))


class Interrupted(Exception):
    pass


def test_an_interrupted_teacher_leaves_nothing(tmp_path):
    teacher = build("llama-tied").train()
    modes = []

    def interrupt(*arguments, **kwargs):
        modes.append(teacher.training)
        raise Interrupted

    with pytest.raises(Interrupted), patch.object(teacher, "forward", interrupt):
        write_teacher_logits(tmp_path / "logits", teacher, token_ids(6, 24), 7, 1.0, {})
    assert not list(tmp_path.iterdir()) and modes == [False] and teacher.training


def test_a_full_disk_leaves_no_predictions(tmp_path):
    with full_disk(2_000), pytest.raises(StructPruneError, match="logits could not be written"):
        write_teacher_logits(tmp_path / "logits", build("llama-tied"), token_ids(6, 24), 7, 1.0, {})
    assert not list(tmp_path.iterdir())


def test_predictions_are_never_written_over(tmp_path):
    (tmp_path / "logits").mkdir()
    with pytest.raises(StructPruneError, match="logits exists; name a new folder"):
        write_teacher_logits(tmp_path / "logits", build("llama-tied"), token_ids(6, 24), 7, 1.0, {})


def test_a_teacher_runs_without_dropout_and_is_as_it_was_after_a_failure(pruned):
    teacher = build("llama-tied").train()
    modes = []

    class Fail(TrainerCallback):
        def on_step_begin(self, *arguments, **kwargs):
            modes.append(teacher.training)
            raise Interrupted

    with pytest.raises(Interrupted):
        Recovery(recovery_config(), callbacks=[Fail()]).recover_model(pruned, tokenizer(), teacher)
    assert modes == [False] and teacher.training


def test_each_part_reads_its_own_predictions(pruned, tmp_path):
    teacher = build("llama-tied")
    for part in (1, 2):
        live = Recovery(recovery_config(top_k=7), part=part, parts=2)
        stored = Recovery(recovery_config(top_k=7, teacher_logits=str(tmp_path / "logits")), part=part, parts=2)
        stored.write_teacher_logits(teacher, tokenizer())  # once, for all parts
        expected = live.recover_model(deepcopy(pruned), tokenizer(), teacher)
        torch.testing.assert_close(logits(stored.recover_model(deepcopy(pruned), tokenizer())), logits(expected))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 8}, "written with top_k=7, and this run has top_k=8"),
        ({"temperature": 2.0}, "written with temperature=1.0, and this run has temperature=2.0"),
        ({"tokens": 240}, "other text, 20 samples against 10"),
        ({"seq_length": 20}, "other text"),
    ],
)
def test_predictions_of_another_run_are_refused(pruned, tmp_path, fields, message):
    settings = {"top_k": 7, "teacher_logits": str(tmp_path / "logits")}
    Recovery(recovery_config(**settings)).write_teacher_logits(build("llama-tied"), tokenizer())
    before = deepcopy(pruned)
    with pytest.raises(StructPruneError, match=message):
        recover(pruned, tokenizer(), recovery_config(**{**settings, **fields}))
    assert same_weights(pruned, before)


def test_no_predictions_and_broken_ones(pruned, tmp_path):
    settings = recovery_config(top_k=7, teacher_logits=str(tmp_path / "logits"))
    with pytest.raises(StructPruneError, match="logits.*cannot be read"):
        recover(pruned, tokenizer(), settings)
    Recovery(settings).write_teacher_logits(build("llama-tied"), tokenizer())
    shard = tmp_path / "logits" / "teacher_logits-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(StructPruneError, match="teacher_logits-00000.safetensors is not readable"):
        recover(pruned, tokenizer(), settings)
    index = json.loads((tmp_path / "logits" / "teacher_logits.json").read_text())
    assert index["top_k"] == 7 and index["shards"] == [20]
    broken = [{"shards": "many"}, {"shards": [30]}, {"perplexity": [1.0]}, {"perplexity": {"a": "x"}}, {"top_k": None}]
    for values in [*broken, *({name: ...} for name in ("shards", "perplexity", "vocab_size"))]:
        kept = {name: value for name, value in {**index, **values}.items() if value is not ...}
        (tmp_path / "logits" / "teacher_logits.json").write_text(json.dumps(kept))
        with pytest.raises(StructPruneError, match="logits"):
            recover(pruned, tokenizer(), settings)
    with pytest.raises(StructPruneError, match="says where the teacher's logits go"):
        Recovery(recovery_config()).write_teacher_logits(build("llama-tied"), tokenizer())


def test_text_that_the_teacher_would_write_is_refused(tmp_path):
    own = [DomainConfig(name="mine", source="self:prose")]
    settings = recovery_config(top_k=7, teacher_logits=str(tmp_path / "logits"), domains=own)
    with pytest.raises(StructPruneError, match="'mine' is written by the model itself"):
        Recovery(settings).write_teacher_logits(build("llama-tied"), tokenizer())
    assert not list(tmp_path.iterdir())


def test_an_offloaded_teacher_teaches_the_same(pruned):
    teacher = build("llama-tied")
    expected = recover(deepcopy(pruned), tokenizer(), recovery_config(), teacher=teacher)
    cpu_offload(teacher, execution_device=torch.device("cpu"))
    assert teacher.device.type == "meta"
    torch.testing.assert_close(
        logits(recover(pruned, tokenizer(), recovery_config(), teacher=teacher)), logits(expected)
    )


def test_mixed_precision_includes_the_teacher(pruned, tmp_path):
    samples = TrainingSamples(token_ids(6, 24))
    teacher = build("llama-tied")
    dtypes = []
    teacher.register_forward_hook(lambda module, arguments, output: dtypes.append(output.logits.dtype))
    for bf16 in (False, True):
        arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", bf16=bf16)
        trainer = DistillTrainer(pruned, arguments, samples, recovery_config(), teacher)
        trainer.compute_loss(pruned, trainer.data_collator([samples[0]]))
    assert dtypes == [torch.float32, torch.bfloat16]
