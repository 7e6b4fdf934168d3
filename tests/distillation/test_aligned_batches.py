"""A student with a trimmed vocabulary learns from a teacher with all tokens in any Trainer."""

from itertools import chain, islice

import pytest
import torch
from distillation.test_attach import printed_divergences
from helpers import aligned_divergence, on_one_rank, on_two_ranks, save_with_tokenizer
from models import config, real_text_model
from transformers import Trainer, TrainingArguments

from optimum_structprune import StructPruner, attach_teacher
from optimum_structprune.distillation.aligned_batches import AlignedCollator
from optimum_structprune.domains.sources import builtin_documents
from optimum_structprune.measure.batches import aligned_sample, pad_samples
from optimum_structprune.vocabulary.token_alignment import TokenAlignment


@pytest.fixture(scope="module")
def trimmed():
    """Return a model, its tokenizer, the model with fewer tokens, and the trimmed tokenizer."""
    original, reader = real_text_model()
    settings = config(widths={"vocab": 320}, seq_length=48, num_samples=8)
    pruner = StructPruner(settings)
    student = pruner.prune_model(original, reader)
    return original, reader, student, pruner.result.tokenizer


def make_features(tokenizer, count=6, length=40):
    """Return samples in the student's tokens. The first labels of two thirds of the samples are ignored."""
    rows = []
    for number, text in enumerate(islice(builtin_documents("prose"), count)):
        ids = tokenizer(text)["input_ids"][:length]
        ignored = 3 * (number % 3)
        rows.append({"input_ids": ids, "labels": [-100] * ignored + ids[ignored:]})
    return rows


def plain_collator(rows):
    samples = [row | {"attention_mask": [1] * len(row["input_ids"])} for row in rows]
    return pad_samples(samples)


def teacher_length(batch, number):
    """Return the number of teacher tokens of a sample. The positions of its padding are 0."""
    return int((batch["teacher_position_ids"][number] > 0).sum()) + 1


def trainer_for(student, tokenizer, rows, folder, **settings):
    arguments = TrainingArguments(
        str(folder), use_cpu=True, report_to=[], per_device_train_batch_size=4, disable_tqdm=True, **settings
    )
    return Trainer(
        model=student,
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=plain_collator,
        processing_class=tokenizer,
    )


def test_batches_keep_the_students_tokens_and_add_the_teachers(trimmed):
    original, reader, student, tokenizer = trimmed
    alignment = TokenAlignment.between(original, reader, student, tokenizer)
    collator = AlignedCollator(plain_collator, alignment, reader, tokenizer)
    rows = make_features(tokenizer)
    batch = collator(rows)

    student_count = 0
    teacher_count = 0
    for number, row in enumerate(rows):
        ids = row["input_ids"]
        teacher_ids = batch["teacher_input_ids"][number, : teacher_length(batch, number)].tolist()
        assert batch["input_ids"][number, : len(ids)].tolist() == ids
        spellings = [alignment.spellings[token] for token in teacher_ids]
        assert list(chain.from_iterable(spellings)) == ids
        assert reader.decode(teacher_ids) == tokenizer.decode(ids)
        student_count += len(ids)
        teacher_count += len(teacher_ids)

        # The teacher ignores the tokens that the student ignores.
        is_counted = batch["labels"][number] != -100
        assert not is_counted[: row["labels"].count(-100)].any()
        assert is_counted.any()
    assert teacher_count < student_count


def test_a_row_may_begin_inside_a_document_or_have_no_tokens(trimmed):
    original, reader, student, tokenizer = trimmed
    alignment = TokenAlignment.between(original, reader, student, tokenizer)
    ids = torch.tensor([row["input_ids"] for row in make_features(tokenizer, 2)])
    positions = torch.arange(40).expand_as(ids).clone()
    positions[:, :10] += 7
    positions[:, 10:] -= 10

    def collator_inside(rows):
        return {"input_ids": ids, "labels": ids.clone(), "position_ids": positions}

    batch = AlignedCollator(collator_inside, alignment, reader, tokenizer)(ids)
    assert (batch["align_rows"][:, [0, 10]] < 0).all()
    assert (batch["align_rows"][:, 1:10] >= 0).any()

    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0] = False

    def collator_without_tokens(rows):
        return {"input_ids": ids, "labels": ids.masked_fill(~mask, -100), "attention_mask": mask.clone()}

    batch = AlignedCollator(collator_without_tokens, alignment, reader, tokenizer)(ids)
    assert (batch["labels"][0] == -100).all()
    assert (batch["labels"][1] != -100).any()
    assert torch.equal(batch["attention_mask"], mask)


def test_the_loss_is_the_divergence_from_the_teachers_tokens(trimmed, tmp_path):
    original, reader, student, tokenizer = trimmed
    alignment = TokenAlignment.between(original, reader, student, tokenizer)
    rows = make_features(tokenizer, 4)
    trainer = trainer_for(student, tokenizer, rows, tmp_path)
    attach_teacher(trainer, original, teacher_tokenizer=reader)
    batch = trainer.data_collator(rows)
    student.eval()
    loss = trainer.compute_loss(student, dict(batch))

    total = 0.0
    positions = 0
    with torch.no_grad():
        for number, row in enumerate(rows):
            length = len(row["input_ids"])
            width = teacher_length(batch, number)
            logits = student(torch.tensor([row["input_ids"]])).logits[0, :-1]
            original_logits = original(batch["teacher_input_ids"][number, None, :width]).logits[0, :-1]
            is_taught = batch["teacher_labels"][number, 1:width] != -100
            aligned_rows = batch["align_rows"][number, 1:length]
            is_counted = aligned_rows >= 0
            divergence = aligned_divergence(
                alignment,
                logits[is_counted],
                original_logits[is_taught],
                aligned_rows[is_counted],
                batch["align_nodes"][number, 1:length][is_counted],
            )
            total += divergence.sum().item()
            positions += int(is_counted.sum())
    assert loss.item() == pytest.approx(total / positions, rel=1e-4)
    assert total > 0

    # Logs have the divergence per token of the teacher.
    num_taught = int((batch["teacher_labels"][:, 1:] != -100).sum())
    logs = trainer.evaluate()
    assert num_taught < positions
    assert logs["eval_kl"] == pytest.approx(total / num_taught, rel=1e-4)


def test_rows_of_packed_documents_are_numbered_consecutively():
    alignment = TokenAlignment([(0,), (1,), (2,), (0, 1), (1, 2, 0)], 3)
    first = aligned_sample({"input_ids": [2, 3, 4], "labels": [2, 3, 4]}, alignment)
    assert first["input_ids"] == [2, 0, 1, 1, 2, 0]
    assert first["align_rows"] == [-1, 0, 0, 1, 1, 1]
    assert first["labels"] == [-100, 0, 1, 1, 2, 0]
    assert first["teacher_labels"] == [-100, 3, 4]

    sample = {"input_ids": [2, 3, 4, 1, 0, 3], "labels": [2, 3, 4, 1, -100, 3], "position_ids": [0, 1, 2, 0, 1, 2]}
    joined = aligned_sample(sample, alignment)
    assert joined["align_rows"] == [-1, 0, 0, 1, 1, 1, -1, -1, 2, 2]
    assert joined["position_ids"] == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]
    assert joined["teacher_position_ids"] == [0, 1, 2, 0, 1, 2]


def test_a_trimmed_student_learns_from_its_teacher(trimmed, tmp_path):
    original, reader, student, tokenizer = trimmed
    rows = make_features(tokenizer, 8)
    trainer = trainer_for(
        student, tokenizer, rows, tmp_path, max_steps=15, learning_rate=3e-3, logging_steps=1, save_strategy="no"
    )
    attach_teacher(trainer, original, teacher_tokenizer=reader)

    original_divergence = trainer.evaluate()["eval_kl"]
    trainer.train()
    assert trainer.evaluate()["eval_kl"] < original_divergence


EVALUATION = """
import sys
import torch

torch.set_num_threads(1)
original, student, folder = sys.argv[1:]

from distillation.test_aligned_batches import make_features, trainer_for
from transformers import AutoModelForCausalLM, AutoTokenizer
from optimum_structprune import attach_teacher

tokenizer = AutoTokenizer.from_pretrained(student)
model = AutoModelForCausalLM.from_pretrained(student)
trainer = trainer_for(model, tokenizer, make_features(tokenizer, 11), folder, per_device_eval_batch_size=2)
attach_teacher(trainer, original)
metrics = trainer.evaluate()
print(f"kl={metrics['eval_kl']}")
"""


@pytest.mark.slow
def test_samples_that_fill_the_last_batch_are_not_counted(trimmed, tmp_path):
    """Two processes with batches of two evaluate eleven samples, and repeat one."""
    original, reader, student, tokenizer = trimmed
    save_with_tokenizer(original, tmp_path / "original", reader)
    save_with_tokenizer(student, tmp_path / "student", tokenizer)

    arguments = [tmp_path / "original", tmp_path / "student", tmp_path]
    (expected,) = printed_divergences(on_one_rank(EVALUATION, tmp_path, *arguments))
    results = printed_divergences(on_two_ranks(EVALUATION, tmp_path, *arguments).stdout)
    assert results == pytest.approx([expected, expected], rel=2e-6)
