"""What a teacher adds to the loss, and how it is run."""

from copy import deepcopy

import pytest
import torch
from accelerate import cpu_offload
from helpers import logits, recovery_config
from models import build, config, token_ids, tokenizer
from transformers import TrainerCallback, TrainingArguments

from optimum_structprune import Recovery, prune_model, recover
from optimum_structprune.recovery.teacher import TrainingSamples
from optimum_structprune.recovery.trainer import DistillTrainer


@pytest.fixture
def pruned():
    return prune_model(build("llama-tied"), config(), tokenizer())


def test_a_teacher_runs_without_dropout_and_is_as_it_was_after_a_failure(pruned):
    teacher = build("llama-tied").train()
    modes = []

    class Fail(TrainerCallback):
        def on_step_begin(self, *arguments, **kwargs):
            modes.append(teacher.training)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Recovery(recovery_config(), callbacks=[Fail()]).recover_model(pruned, tokenizer(), teacher)
    assert modes == [False] and teacher.training


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
