"""A recovery trains the same weights on simulated GPUs as on the CPU."""

from contextlib import nullcontext
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from gpu.compare import assert_same_on_gpus, on_gpu, spread, weights
from gpu.simulator import simulated_gpus
from helpers import failing, recovery_config
from models import build, config, real_text_model, token_ids, tokenizer
from transformers import Trainer, TrainingArguments, default_data_collator

from optimum_structprune import Recovery, StructPruneError, StructPruner, attach_teacher, prune_model
from optimum_structprune.distillation.teacher import load_teacher
from optimum_structprune.system.placement import devices_of


# Adam would enlarge the rounding of the first steps, because it divides by the size of the gradients.
SETTINGS = {"optim": "sgd", "learning_rate": 0.1}
# Sampling on a GPU draws other numbers than on the CPU, so answers would differ.
RECOVERY = {"tokens": 96, "answer_share": 0.0, "training": SETTINGS}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))


def recover(models):
    """Recover a student with its teacher, and return its weights."""
    student, teacher = models
    recovery = Recovery(recovery_config(**RECOVERY))
    return weights(recovery.recover_model(student, tokenizer(), teacher))


def student_and_teacher(case):
    student = prune_model(build(case), config(), tokenizer())
    return student, build(case, seed=1)


def on_one_gpu(models):
    student, teacher = models
    return on_gpu(student), on_gpu(teacher)


def on_two_gpus(models):
    student, teacher = models
    return spread(2)(student), spread(2)(teacher)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "count"), [("llama-tied", 1), ("llama-tied", 2), ("gemma2", 2)])
def test_a_recovery_trains_the_same_on_one_gpu_of_several(case, count):
    assert_same_on_gpus(recover, lambda: student_and_teacher(case), count, on_one_gpu, tolerance=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["llama-tied", "llama-untied"])
def test_a_recovery_of_a_spread_model_trains_the_same(case):
    assert_same_on_gpus(recover, lambda: student_and_teacher(case), 2, on_two_gpus, tolerance=1e-3)


PLACES = {
    "teacher on the first": lambda student, teacher: (student.to("cuda:1"), teacher.to("cuda:0")),
    "teacher on the second": lambda student, teacher: (student.to("cuda:0"), teacher.to("cuda:1")),
    "teacher on the CPU": lambda student, teacher: (student.to("cuda:0"), teacher),
    "spread student": lambda student, teacher: (spread(2)(student), teacher.to("cuda:1")),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLACES)
def test_a_recovery_with_the_teacher_on_a_device_of_its_own_trains_the_same(name):
    def place(models):
        student, teacher = models
        return PLACES[name](student, teacher)

    assert_same_on_gpus(recover, lambda: student_and_teacher("llama-untied"), 2, place, tolerance=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("fails", [False, True])
def test_a_model_returns_to_its_device(fails, monkeypatch):
    """The Trainer trains on the first GPU."""
    if fails:
        monkeypatch.setattr(Trainer, "train", failing(Trainer.train, 1, KeyboardInterrupt()))
    student, teacher = student_and_teacher("llama-tied")
    with simulated_gpus(2):
        student = student.to("cuda:1")
        recovery = Recovery(recovery_config(**RECOVERY))
        expected = pytest.raises(KeyboardInterrupt) if fails else nullcontext()
        with expected:
            recovery.recover_model(student, tokenizer(), teacher.to("cuda:1"))
        assert devices_of(student) == [torch.device("cuda:1")]


@pytest.mark.parametrize("count", [1, 2])
def test_a_loaded_teacher_is_on_as_many_devices_as_the_student(tmp_path, count):
    """If a student needs two GPUs, the first GPU does not have enough memory for both models."""
    build("llama-untied", seed=1).save_pretrained(tmp_path / "teacher")

    with simulated_gpus(2):
        student = build("llama-untied")
        if count == 1:
            student = student.to("cuda:1")
        else:
            student = spread(2)(student)
        teacher = load_teacher(tmp_path / "teacher", student)
        teacher.place(SimpleNamespace(device=student.device, distributed_type=DistributedType.NO))

        assert len(devices_of(teacher.model)) == count
        assert torch.device("cpu") not in devices_of(teacher.model)


@pytest.mark.slow
@pytest.mark.parametrize("place", [on_one_gpu, on_two_gpus], ids=["one device", "two devices"])
def test_a_recovery_with_a_trimmed_vocabulary_trains_the_same(place):
    original, reader = real_text_model()
    pruner = StructPruner(config(widths={"vocab": 320}, seq_length=48, num_samples=8))
    pruned = pruner.prune_model(deepcopy(original), reader)

    def work(models):
        student, teacher = models
        recovery = Recovery(recovery_config(**RECOVERY))
        recovered = recovery.recover_model(student, pruner.result.tokenizer, teacher, teacher_tokenizer=reader)
        return weights(recovered)

    assert_same_on_gpus(work, lambda: (deepcopy(pruned), deepcopy(original)), 2, place, tolerance=1e-3)


def training_rows():
    return [{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in token_ids(8, 16)]


def trainer_of(model, arguments):
    return Trainer(model, arguments, train_dataset=training_rows(), data_collator=default_data_collator)


def test_a_trainer_with_several_gpus_in_one_process_is_refused(tmp_path):
    with simulated_gpus(2):
        arguments = TrainingArguments(str(tmp_path), report_to="none")
        trainer = trainer_of(on_gpu(build("llama-tied")), arguments)
        with pytest.raises(StructPruneError, match=r"DataParallel.*torchrun.*CUDA_VISIBLE_DEVICES"):
            attach_teacher(trainer, on_gpu(build("llama-tied", seed=1)))


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cuda:1", "cpu", "offload"])
def test_a_teacher_on_another_device_teaches_the_same(tmp_path, device):
    def compute_loss(use_cpu, **options):
        arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=use_cpu)
        arguments._n_gpu = min(arguments.n_gpu, 1)
        trainer = trainer_of(build("llama-tied").eval(), arguments)
        attach_teacher(trainer, build("llama-tied", seed=1), **options)
        batch = default_data_collator(training_rows())
        return trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch)).item()

    expected = compute_loss(use_cpu=True)
    with simulated_gpus(2):
        loss = compute_loss(use_cpu=False, teacher_device=device)

    assert isinstance(loss, float)
    assert loss == pytest.approx(expected, rel=1e-4)
    assert not torch.cuda.is_available()
