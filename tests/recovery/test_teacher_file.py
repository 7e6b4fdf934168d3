"""Predictions from a file estimate the divergence without a bias, and train as the teacher in memory does."""

import json
import shutil

import pytest
import torch
from models import build
from transformers import Trainer, TrainingArguments

from optimum_structprune import StructPruneError, attach_teacher, write_teacher
from optimum_structprune.measure.kl import divergence
from optimum_structprune.recovery.teacher_file import (
    MANIFEST_NAME,
    StoredTeacher,
    TeacherFile,
    compressed,
    documents_of,
    high_bits,
    pack_ids,
    rows_of,
    shard_name,
    unpack_ids,
)


def rows_of_lengths(*lengths, vocab_size=64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture
def teacher():
    return build("llama-untied", 1)


@pytest.mark.parametrize("vocab_size", [300, 2**16, 2**16 + 1, 2**17 + 1, 2**18, 2**18 + 1])
def test_packed_ids_are_unpacked(vocab_size):
    ids = torch.randint(vocab_size, (7, 13))
    ids[0, 0] = vocab_size - 1

    bits = high_bits(vocab_size)
    packed = pack_ids(ids, bits)

    assert torch.equal(unpack_ids(packed, bits), ids)
    assert sum(tensor.numel() * tensor.element_size() for tensor in packed.values()) <= 7 * (26 + 13 * bits / 8 + 1)


def test_the_estimate_of_a_distribution_has_no_bias():
    torch.manual_seed(0)
    logits = 2 * torch.randn(3, 200)
    expected = logits.softmax(-1)

    total = torch.zeros_like(expected)
    count = 4000
    for seed in range(count):
        ids, log_top, negative_entropy = compressed(logits, 8, 4, torch.Generator().manual_seed(seed))
        top = log_top.float().exp()
        rest = (1 - top.sum(1, keepdim=True)) / 4
        total.scatter_add_(1, ids, torch.cat([top, rest.expand(-1, 4)], 1))

    assert torch.allclose(total / count, expected, atol=3e-3)
    assert torch.allclose(negative_entropy.float(), (expected * expected.log()).sum(-1), rtol=1e-3)


def test_predictions_of_all_tokens_are_the_teachers(teacher, tmp_path):
    """Nothing is sampled if all tokens are among the most probable ones."""
    rows = rows_of_lengths(9, 5, 12)
    vocab_size = teacher.config.vocab_size
    write_teacher(teacher, rows, tmp_path, top=vocab_size, samples=0)
    file = TeacherFile(tmp_path)

    student_logits = torch.randn(8, vocab_size)
    with torch.no_grad():
        logits = teacher(torch.tensor([rows[0]])).logits[0, :-1]
    stored = file.predictions(rows[0])

    expected = divergence(student_logits, logits)
    assert torch.allclose(stored.divergence(student_logits, 0, 8), expected, rtol=2e-3, atol=2e-3)


def test_the_mean_divergence_of_a_file_is_the_teachers(teacher, tmp_path):
    """The mean over several files is the divergence, within four standard errors."""
    rows = rows_of_lengths(*range(10, 30))
    student = build("llama-untied", 2)
    with torch.no_grad():
        logits = [student(torch.tensor([row])).logits[0, :-1] for row in rows]
        expected = torch.cat(
            [
                divergence(own, teacher(torch.tensor([row])).logits[0, :-1])
                for own, row in zip(logits, rows, strict=True)
            ]
        )

    means = []
    for seed in range(8):
        write_teacher(teacher, rows, tmp_path / str(seed), top=8, samples=8, seed=seed)
        file = TeacherFile(tmp_path / str(seed))
        estimates = [file.predictions(row).divergence(own, 0, len(row)) for own, row in zip(logits, rows, strict=True)]
        means.append(torch.cat(estimates).mean())

    values = torch.stack(means)
    assert abs(values.mean() - expected.mean()) < 4 * values.std() / 8**0.5
    assert values.std() < 0.05 * expected.mean()


def test_documents_are_found_by_their_beginning(teacher, tmp_path):
    rows = rows_of_lengths(20, 30)
    write_teacher(teacher, rows, tmp_path)
    file = TeacherFile(tmp_path)
    whole = file.predictions(rows[1])

    cut = file.predictions(rows[1][:10])

    assert torch.equal(cut.ids, whole.ids[:9])
    with pytest.raises(StructPruneError, match="its token 3 is"):
        file.predictions(rows[1][:3] + [(rows[1][3] + 1) % 64])


def test_packed_and_padded_batches_have_the_same_documents(teacher, tmp_path):
    rows = rows_of_lengths(6, 4)
    write_teacher(teacher, rows, tmp_path)
    stored = StoredTeacher(TeacherFile(tmp_path))

    packed = {
        "input_ids": torch.tensor([rows[0] + rows[1]]),
        "position_ids": torch.tensor([[*range(6), *range(4)]]),
    }
    padded = {
        "input_ids": torch.tensor([rows[0], [0, 0] + rows[1]]),
        "attention_mask": torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]]),
    }

    assert [ids for _, ids in documents_of(packed)] == rows
    assert [ids for _, ids in documents_of(padded)] == rows
    from_packed = stored.predict(packed, torch.tensor([0, 4, 6, 8]))
    from_padded = stored.predict(padded, torch.tensor([0, 4, 8, 10]))
    assert torch.equal(from_packed.ids, from_padded.ids)
    assert torch.equal(from_packed.probabilities, from_padded.probabilities)


def test_rows_of_a_data_set_are_documents():
    packed = {"input_ids": [1, 2, 3, 4, 5], "seq_lengths": [3, 2]}
    positioned = {"input_ids": [1, 2, 3, 9, 8], "position_ids": [0, 1, 2, 0, 1]}

    assert rows_of([packed, positioned, [7, 7], [6]]) == [[1, 2, 3], [4, 5], [9, 8], [7, 7]]
    with pytest.raises(StructPruneError, match="`input_ids`"):
        rows_of([{"text": "a"}])
    with pytest.raises(StructPruneError, match="no row with two tokens"):
        rows_of([[1]])


def arguments(folder, **options):
    settings = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "report_to": "none"}
    settings.update(options)
    return TrainingArguments(str(folder), use_cpu=True, logging_steps=1, save_strategy="no", **settings)


def losses_of(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_training_from_a_file_equals_a_training_with_the_teacher(teacher, tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in rows_of_lengths(16, 16, 16, 16)]
    write_teacher(teacher, rows, tmp_path / "file", top=teacher.config.vocab_size, samples=0)

    losses = []
    for source in (teacher, str(tmp_path / "file")):
        trainer = Trainer(build("llama-untied", 2), arguments(tmp_path), train_dataset=rows)
        attach_teacher(trainer, source)
        losses.append(losses_of(trainer))

    # Rounding to 16 bits changes a probability by up to 0.2%, and their sum by a few parts in 10,000. With a
    # cross-entropy of 4.5 nats, this is less than 1e-3.
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)


def test_another_text_is_refused_before_a_step(teacher, tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in rows_of_lengths(16, 16)]
    write_teacher(teacher, rows_of_lengths(16, 8)[1:], tmp_path / "file")
    trainer = Trainer(build("llama-untied", 2), arguments(tmp_path), train_dataset=rows)
    attach_teacher(trainer, tmp_path / "file")

    with pytest.raises(StructPruneError, match="not in the teacher file"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_killed_run_resumes_with_the_same_predictions(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr("optimum_structprune.recovery.teacher_file.SHARD_TOKENS", 20)
    rows = rows_of_lengths(15, 15, 15, 15)
    write_teacher(teacher, rows, tmp_path / "whole")

    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    (tmp_path / "killed" / MANIFEST_NAME).unlink()
    (tmp_path / "killed" / shard_name(1)).write_bytes(b"half")
    with pytest.raises(StructPruneError, match="not complete"):
        TeacherFile(tmp_path / "killed")
    write_teacher(teacher, rows, tmp_path / "killed")

    for row in rows:
        first = TeacherFile(tmp_path / "whole").predictions(row)
        second = TeacherFile(tmp_path / "killed").predictions(row)
        assert torch.equal(first.ids, second.ids)
        assert torch.equal(first.probabilities, second.probabilities)


def test_bad_folders_and_arguments_are_refused(teacher, tmp_path):
    rows = rows_of_lengths(8, 9)
    file = tmp_path / "file"
    write_teacher(teacher, rows, file, temperature=2.0)
    trainer = Trainer(build("llama-untied", 2), arguments(tmp_path), train_dataset=[])

    with pytest.raises(StructPruneError, match="temperature=2"):
        attach_teacher(trainer, file)
    with pytest.raises(StructPruneError, match="`teacher_device`"):
        attach_teacher(trainer, file, temperature=2.0, teacher_device="cpu")
    with pytest.raises(StructPruneError, match="another teacher or on other text"):
        write_teacher(teacher, rows, file)
    with pytest.raises(StructPruneError, match="token id 9999"):
        write_teacher(teacher, [[1, 9999]], tmp_path / "other")
    with pytest.raises(StructPruneError, match="`samples`"):
        write_teacher(teacher, rows, tmp_path / "other", samples=-1)
    assert not (tmp_path / "other").exists()

    (file / "config.json").write_text(json.dumps({}))
    with pytest.raises(StructPruneError, match="both a model and a teacher file"):
        attach_teacher(trainer, file, temperature=2.0)

    (file / "config.json").unlink()
    shard = file / shard_name(0)
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(StructPruneError, match="cannot be read"):
        attach_teacher(trainer, file, temperature=2.0)
