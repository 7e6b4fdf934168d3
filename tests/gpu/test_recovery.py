"""A recovery trains on one GPU of several, on a spread model and on a trimmed vocabulary what it trains on the CPU."""

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from gpu.compare import assert_same_on_gpus, on_gpu, spread, weights
from gpu.simulator import simulated_gpus
from helpers import recovery_config
from models import build, config, real_text_model, token_ids, tokenizer
from transformers import Trainer, TrainingArguments, default_data_collator

from optimum_structprune import Recovery, StructPruneError, StructPruner, attach_teacher, prune_model
from optimum_structprune.recovery.teacher import load_teacher
from optimum_structprune.system.placement import devices_of


# Adam enlarges the rounding of the first steps, because it divides by the size of the gradients.
SETTINGS = {"optim": "sgd", "learning_rate": 0.1}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))


def recovered(**fields):
    """Return work that recovers a model, with a teacher on the same devices."""

    def work(pair):
        student, teacher = pair
        # Sampling on a GPU draws other numbers, so the answers would differ.
        recovery = Recovery(recovery_config(tokens=96, answer_share=0.0, training=SETTINGS, **fields))
        return weights(recovery.recover_model(student, tokenizer(), teacher))

    return work


def pair_of(case):
    return prune_model(build(case), config(), tokenizer()), build(case, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "count"), [("llama-tied", 1), ("llama-tied", 2), ("gemma2", 2)])
def test_a_recovery_trains_the_same_on_one_gpu_of_several(case, count):
    place = lambda pair: tuple(map(on_gpu, pair))  # noqa: E731
    assert_same_on_gpus(recovered(), lambda: pair_of(case), count, place, tolerance=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["llama-tied", "llama-untied"])
def test_a_recovery_of_a_spread_model_trains_the_same(case):
    place = lambda pair: tuple(map(spread(2), pair))  # noqa: E731
    assert_same_on_gpus(recovered(), lambda: pair_of(case), 2, place, tolerance=1e-3)


PLACES = {
    "teacher on the first": lambda student, teacher: (student.to("cuda:1"), teacher.to("cuda:0")),
    "teacher on the second": lambda student, teacher: (student.to("cuda:0"), teacher.to("cuda:1")),
    "teacher on the CPU": lambda student, teacher: (student.to("cuda:0"), teacher),
    "spread student": lambda student, teacher: (spread(2)(student), teacher.to("cuda:1")),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLACES)
def test_a_recovery_with_the_teacher_on_a_device_of_its_own_trains_the_same(name):
    place = lambda pair: PLACES[name](*pair)  # noqa: E731
    assert_same_on_gpus(recovered(), lambda: pair_of("llama-untied"), 2, place, tolerance=1e-3)


@pytest.mark.parametrize("count", [1, 2])
def test_a_teacher_that_is_loaded_is_on_as_many_devices_as_the_student(tmp_path, count):
    """A model that takes two GPUs does not fit on the first GPU beside another one."""
    build("llama-untied", seed=1).save_pretrained(tmp_path / "teacher")
    with simulated_gpus(2):
        student = build("llama-untied")
        student = spread(2)(student) if count == 2 else student.to("cuda:1")
        teacher = load_teacher(tmp_path / "teacher", student)
        teacher.place(SimpleNamespace(device=student.device, distributed_type=DistributedType.NO))
        assert len(devices_of(teacher.model)) == count
        assert torch.device("cpu") not in devices_of(teacher.model)


@pytest.mark.slow
@pytest.mark.parametrize("put", [on_gpu, spread(2)], ids=["one device", "two devices"])
def test_a_trimmed_vocabulary_is_taught_the_same(put):
    dense, reader = real_text_model()
    pruner = StructPruner(config(widths={"vocab": 320}, seq_length=48, num_samples=8))
    student = pruner.prune_model(deepcopy(dense), reader)

    def work(pair):
        settings = recovery_config(tokens=96, answer_share=0.0, training=SETTINGS)
        recovery = Recovery(settings)
        return weights(recovery.recover_model(pair[0], pruner.tokenizer, pair[1], teacher_tokenizer=reader))

    place = lambda pair: tuple(map(put, pair))  # noqa: E731
    assert_same_on_gpus(work, lambda: (deepcopy(student), deepcopy(dense)), 2, place, tolerance=1e-3)


def test_a_trainer_with_several_gpus_in_one_process_is_refused(tmp_path):
    rows = [{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in token_ids(8, 16)]
    with simulated_gpus(2):
        arguments = TrainingArguments(str(tmp_path), report_to="none")
        model = on_gpu(build("llama-tied"))
        trainer = Trainer(model, arguments, train_dataset=rows, data_collator=default_data_collator)
        with pytest.raises(StructPruneError, match=r"DataParallel.*torchrun.*CUDA_VISIBLE_DEVICES"):
            attach_teacher(trainer, on_gpu(build("llama-tied", seed=1)))


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cuda:1", "cpu", "offload"])
def test_a_teacher_on_another_device_teaches_the_same(tmp_path, device):
    rows = [{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in token_ids(8, 16)]

    def loss_on(place, **options):
        arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=place is None)
        arguments._n_gpu = min(arguments.n_gpu, 1)
        model = build("llama-tied").eval()
        trainer = Trainer(model, arguments, train_dataset=rows, data_collator=default_data_collator)
        attach_teacher(trainer, build("llama-tied", seed=1), **options)
        batch = default_data_collator(rows)
        return trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch)).item()

    expected = loss_on(None)
    with simulated_gpus(2):
        found = loss_on("cuda", teacher_device=device)
    assert found == pytest.approx(expected, rel=1e-4) and isinstance(found, float)
    assert not torch.cuda.is_available()
