"""A Trainer prunes while it trains on one GPU or a spread model. It is refused on several GPUs without DDP."""

import pytest
from gpu.compare import assert_same_on_gpus, on_gpu, weights
from gpu.simulator import simulated_gpus
from models import build, config, token_ids, tokenizer
from transformers import Trainer, TrainingArguments

from optimum_structprune import StructPruneError, attach_pruner


def trainer_of(model, folder):
    rows = [{"input_ids": ids, "labels": ids} for ids in token_ids(32, 24)]
    arguments = TrainingArguments(
        str(folder),
        max_steps=6,
        per_device_train_batch_size=2,
        logging_steps=2,
        learning_rate=1e-3,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        seed=0,
        use_cpu=model.device.type == "cpu",
    )
    return Trainer(model, arguments, train_dataset=rows, processing_class=tokenizer())


def train_and_prune(folder):
    """Return work that prunes a model during a training, and returns its weights."""

    def work(model):
        trainer = trainer_of(model, folder)
        callback = attach_pruner(trainer, config(widths={"mlp": 24}, rounds=2), 2, end=4)
        trainer.train()
        assert callback.plan.keep
        return weights(trainer.model)

    return work


@pytest.mark.parametrize("repetition", range(3))
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.slow
def test_a_trainer_prunes_the_same(tmp_path, count, repetition):
    # AdamW enlarges the rounding of the first steps, because it divides by the size of the gradients.
    assert_same_on_gpus(train_and_prune(tmp_path), lambda: build("llama-tied"), count, tolerance=2e-2)


def test_several_gpus_without_ddp_are_refused_with_two_solutions(tmp_path):
    with simulated_gpus(2):
        trainer = trainer_of(on_gpu(build("llama-tied")), tmp_path)
        attach_pruner(trainer, config(widths={"mlp": 24}), 2)
        with pytest.raises(StructPruneError, match=r"torchrun.*CUDA_VISIBLE_DEVICES"):
            trainer.train()


@pytest.mark.slow
def test_a_refused_trainer_does_not_change_later_trainers(tmp_path):
    with simulated_gpus(2):
        trainer = trainer_of(on_gpu(build("llama-tied")), tmp_path)
        attach_pruner(trainer, config(widths={"mlp": 24}), 2)
        with pytest.raises(StructPruneError, match="torchrun"):
            trainer.train()

    assert_same_on_gpus(train_and_prune(tmp_path), lambda: build("llama-tied"), 2, tolerance=2e-2)
