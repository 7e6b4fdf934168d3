"""A student that has lost tokens is taught in the teacher's tokens by any Trainer."""

import pytest
import torch
from models import config, real_text_model
from transformers import Trainer, TrainingArguments

from optimum_structprune import StructPruner, attach_teacher
from optimum_structprune.domains.sources import builtin_documents
from optimum_structprune.recovery.aligned_batches import AlignedCollator, align_document, join_documents
from optimum_structprune.recovery.samples import pad_samples
from optimum_structprune.vocabulary.token_alignment import TokenAlignment


@pytest.fixture(scope="module")
def trimmed():
    """A model with its tokenizer, and the same with fewer tokens."""
    dense, reader = real_text_model()
    settings = config(widths={"vocab": 320}, seq_length=48, num_samples=8)
    pruner = StructPruner(settings)
    student = pruner.prune_model(dense, reader)
    return dense, reader, student, pruner.tokenizer


def features(tokenizer, count=6, length=40):
    """Samples of a student's own tokens; the first tokens of some do not count."""
    rows = []
    for number, text in enumerate(builtin_documents("prose")):
        ids = tokenizer(text)["input_ids"][:length]
        ignored = 3 * (number % 3)
        rows.append({"input_ids": ids, "labels": [-100] * ignored + ids[ignored:]})
        if len(rows) == count:
            return rows


def plain_collator(rows):
    return pad_samples([{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows])


def test_batches_keep_the_students_tokens_and_add_the_teachers(trimmed):
    dense, reader, student, tokenizer = trimmed
    alignment = TokenAlignment.between(dense, reader, student, tokenizer)
    collator = AlignedCollator(plain_collator, alignment, reader, tokenizer)
    rows = features(tokenizer)
    batch = collator(rows)
    fewer = 0
    for number, row in enumerate(rows):
        assert batch["input_ids"][number, : len(row["input_ids"])].tolist() == row["input_ids"]
        width = int((batch["teacher_position_ids"][number] > 0).sum()) + 1
        ids = batch["teacher_input_ids"][number, :width].tolist()
        assert [part for token in ids for part in alignment.spellings[token]] == row["input_ids"]
        assert reader.decode(ids) == tokenizer.decode(row["input_ids"])
        fewer += len(row["input_ids"]) - len(ids)
        # A token that does not count for the student does not count for the teacher.
        counted = batch["labels"][number] != -100
        assert not counted[: row["labels"].count(-100)].any() and counted.any()
    assert fewer > 0


def test_the_loss_is_the_divergence_of_the_teachers_words(trimmed, tmp_path):
    dense, reader, student, tokenizer = trimmed
    alignment = TokenAlignment.between(dense, reader, student, tokenizer)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], per_device_train_batch_size=4)
    rows = features(tokenizer, 4)
    trainer = Trainer(
        model=student,
        args=arguments,
        train_dataset=rows,
        data_collator=plain_collator,
        processing_class=tokenizer,
    )
    attach_teacher(trainer, dense, teacher_tokenizer=reader)
    batch = trainer.data_collator(rows)
    student.eval()
    loss = trainer.compute_loss(student, dict(batch))

    total, positions = 0.0, 0
    with torch.no_grad():
        for number, row in enumerate(rows):
            length = len(row["input_ids"])
            logits = student(torch.tensor([row["input_ids"]])).logits[0, :-1]
            width = int((batch["teacher_position_ids"][number] > 0).sum()) + 1
            dense_logits = dense(batch["teacher_input_ids"][number, None, :width]).logits[0]
            taught = batch["teacher_labels"][number, 1:width] != -100
            following = batch["align_rows"][number, 1:length]
            counted = following >= 0
            divergence = alignment.divergence(
                logits[counted],
                dense_logits[:-1][taught],
                following[counted],
                batch["align_nodes"][number, 1:length][counted],
            )
            total += divergence.sum().item()
            positions += int(counted.sum())
    assert loss.item() == pytest.approx(total / positions, rel=1e-4) and total > 0


def test_packed_documents_are_numbered_through():
    alignment = TokenAlignment([(0,), (1,), (2,), (0, 1), (1, 2, 0)], 3)
    first = align_document(alignment, [2, 3, 4], [True, True, True])
    assert first["input_ids"] == [2, 0, 1, 1, 2, 0] and first["align_rows"] == [-1, 0, 0, 1, 1, 1]
    assert first["labels"] == [-100, 0, 1, 1, 2, 0] and first["teacher_labels"] == [-100, 3, 4]
    joined = join_documents([first, align_document(alignment, [1, 0, 3], [True, False, True])])
    assert joined["align_rows"] == [-1, 0, 0, 1, 1, 1, -1, -1, 2, 2]
    assert joined["position_ids"] == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]
    assert joined["teacher_position_ids"] == [0, 1, 2, 0, 1, 2]


def test_a_trimmed_student_learns_from_its_teacher(trimmed, tmp_path):
    dense, reader, student, tokenizer = trimmed
    arguments = TrainingArguments(
        str(tmp_path),
        use_cpu=True,
        max_steps=15,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        report_to=[],
        logging_steps=1,
        disable_tqdm=True,
        save_strategy="no",
    )
    rows = features(tokenizer, 8)
    trainer = Trainer(
        model=student,
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=plain_collator,
        processing_class=tokenizer,
    )
    attach_teacher(trainer, dense, teacher_tokenizer=reader)
    before = trainer.evaluate()["eval_kl"]
    trainer.train()
    assert trainer.evaluate()["eval_kl"] < before
