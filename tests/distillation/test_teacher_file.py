"""Predictions from a file estimate the divergence without a bias, and train as the teacher in memory does."""

import json
import shutil
import signal
import subprocess
import sys
from functools import partial
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from helpers import flip_byte, flipped_bytes, same_weights
from models import build, tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from optimum_structprune import StructPruneError, attach_teacher, write_teacher, write_teacher_rows
from optimum_structprune.distillation.teacher_file import StoredTeacher, TeacherFile, documents_of, stored_teacher
from optimum_structprune.distillation.teacher_file_format import (
    TEACHER_FILE_NAME,
    compressed,
    high_bits,
    pack_ids,
    shard_name,
    unpack_ids,
)
from optimum_structprune.distillation.teacher_file_writer import rows_of
from optimum_structprune.measure.kl import divergence
from optimum_structprune.vocabulary.token_alignment import TokenAlignment


EXAMPLE = Path(__file__).parents[2] / "examples" / "teacher_from_vllm.py"


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


def test_the_divergence_to_fewer_tokens_is_near_the_teachers(teacher, tmp_path):
    """The entropy of samples is too small, so a divergence from their entropy would be twice as large."""
    vocab_size = teacher.config.vocab_size
    size = vocab_size - 2
    removed = [(token, token + 1) for token in range(2)]
    alignment = TokenAlignment([(token,) for token in range(size)] + removed, size)
    rows = rows_of_lengths(*[20] * 40, vocab_size=vocab_size)
    write_teacher(teacher, rows, tmp_path, top=8, samples=8)
    file = TeacherFile(tmp_path)

    expected = 0.0
    actual = 0.0
    for row in rows:
        with torch.no_grad():
            logits = teacher(torch.tensor([row])).logits[0, :-1]
        aligned = alignment.align(row, [False] + [True] * 19)[1:]
        _, token_rows, nodes = torch.tensor(aligned).unbind(1)
        _, (chunk,) = alignment.chunks(token_rows, nodes, len(aligned), logits.device)
        align = partial(alignment.next_part, chunk=chunk)

        student_logits = torch.randn(len(aligned), size, generator=torch.Generator().manual_seed(row[0])) / 4
        expected += divergence(student_logits, logits, align=align).sum().item()
        actual += file.predictions(row).divergence(student_logits, 0, len(logits), align=align).sum().item()
    assert actual == pytest.approx(expected, rel=0.05)


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
    monkeypatch.setattr("optimum_structprune.distillation.teacher_file_writer.SHARD_TOKENS", 20)
    rows = rows_of_lengths(*[15] * 6)
    write_teacher(teacher, rows, tmp_path / "whole")

    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    (tmp_path / "killed" / TEACHER_FILE_NAME).unlink()
    (tmp_path / "killed" / shard_name(1)).write_bytes(b"half")
    flip_byte(tmp_path / "killed" / shard_name(2), 400)
    with pytest.raises(StructPruneError, match="not complete"):
        TeacherFile(tmp_path / "killed")
    write_teacher(teacher, rows, tmp_path / "killed")

    for row in rows:
        first = TeacherFile(tmp_path / "whole").predictions(row)
        second = TeacherFile(tmp_path / "killed").predictions(row)
        assert torch.equal(first.ids, second.ids)
        assert torch.equal(first.probabilities, second.probabilities)


@pytest.mark.slow
def test_a_writer_that_is_killed_leaves_a_file_that_resumes(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr("optimum_structprune.distillation.teacher_file_writer.SHARD_TOKENS", 20)
    rows = rows_of_lengths(*[15] * 8)
    teacher.save_pretrained(tmp_path / "teacher")
    script = f"""
import os, signal
from pathlib import Path
from transformers import AutoModelForCausalLM
from optimum_structprune import write_teacher
from optimum_structprune.distillation import teacher_file_writer

replace = Path.replace
def killed(path, target):
    result = replace(path, target)
    if Path(target).name == teacher_file_writer.shard_name(2):
        os.kill(os.getpid(), signal.SIGKILL)
    return result

Path.replace = killed
teacher_file_writer.SHARD_TOKENS = 20
teacher = AutoModelForCausalLM.from_pretrained({str(tmp_path / "teacher")!r})
write_teacher(teacher, {rows}, {str(tmp_path / "killed")!r})
"""
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert (tmp_path / "killed" / shard_name(2)).is_file()
    with pytest.raises(StructPruneError, match="not complete"):
        TeacherFile(tmp_path / "killed")

    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    write_teacher(reloaded, rows, tmp_path / "killed")
    write_teacher(reloaded, rows, tmp_path / "whole")
    for row in rows:
        first = TeacherFile(tmp_path / "whole").predictions(row)
        second = TeacherFile(tmp_path / "killed").predictions(row)
        assert torch.equal(first.ids, second.ids)
        assert torch.equal(first.probabilities, second.probabilities)


def test_a_training_from_a_file_resumes_to_the_same_weights(teacher, tmp_path):
    rows = rows_of_lengths(16, 16, 16, 16)
    write_teacher(teacher, rows, tmp_path / "file")

    def trained(folder, resume=None):
        settings = TrainingArguments(
            str(folder), max_steps=4, save_steps=2, per_device_train_batch_size=2, use_cpu=True, report_to="none"
        )
        data = [{"input_ids": row, "labels": row} for row in rows]
        trainer = Trainer(build("llama-untied", 2), settings, train_dataset=data)
        attach_teacher(trainer, tmp_path / "file")
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model

    whole = trained(tmp_path / "whole")
    resumed = trained(tmp_path / "resumed", resume=str(tmp_path / "whole" / "checkpoint-2"))
    assert same_weights(whole, resumed)


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


def predictions_of_rows(teacher, rows, count):
    """Return the `count` most probable tokens and the next token after each token of rows, as vLLM does."""
    predictions = []
    for row in rows:
        with torch.no_grad():
            log_probabilities = teacher(torch.tensor([row])).logits[0].log_softmax(-1)
        by_position = []
        for position, token in enumerate(row[1:]):
            best = log_probabilities[position].topk(count).indices.tolist()
            by_position.append({index: log_probabilities[position, index].item() for index in [*best, token]})
        predictions.append(by_position)
    return predictions


def test_rows_of_another_engine_store_the_most_probable_tokens_and_the_mass_of_the_rest(teacher, tmp_path):
    rows = rows_of_lengths(12, 9)
    vllm = SourceFileLoader("teacher_from_vllm", str(EXAMPLE)).load_module()
    outputs = []
    for row, predictions in zip(rows, predictions_of_rows(teacher, rows, 8), strict=True):
        logprobs = [{token: SimpleNamespace(logprob=value) for token, value in part.items()} for part in predictions]
        outputs.append(SimpleNamespace(prompt_token_ids=row, prompt_logprobs=[None, *logprobs]))

    write_teacher_rows(vllm.rows_of(outputs), tmp_path / "rows", teacher.config, top=8)

    # Without samples, the teacher itself stores the same tokens.
    write_teacher(teacher, rows, tmp_path / "own", top=8, samples=0)
    student_logits = torch.randn(11, teacher.config.vocab_size)
    by_engine = TeacherFile(tmp_path / "rows").predictions(rows[0])
    own = TeacherFile(tmp_path / "own").predictions(rows[0])
    assert torch.equal(by_engine.ids, own.ids)
    assert torch.allclose(by_engine.probabilities, own.probabilities, rtol=1e-3)
    assert torch.allclose(by_engine.losses, own.losses, rtol=1e-3)

    # The divergence of the distributions in which the other tokens are one token.
    with torch.no_grad():
        whole = teacher(torch.tensor([rows[0]])).logits[0, :-1].softmax(-1)
    student = student_logits.softmax(-1)
    joined = []
    for probabilities in (whole, student):
        best = probabilities.gather(1, own.ids)
        joined.append(torch.cat([best, 1 - best.sum(1, keepdim=True)], 1))
    expected = (joined[0] * (joined[0] / joined[1]).log()).sum(1)
    assert torch.allclose(by_engine.divergence(student_logits, 0, 11), expected, atol=5e-3)

    samples = [{"input_ids": row, "labels": row} for row in rows]
    trainer = Trainer(
        build("llama-untied", 2), arguments(tmp_path, per_device_train_batch_size=1), train_dataset=samples
    )
    attach_teacher(trainer, tmp_path / "rows")
    assert losses_of(trainer)[0] > 0


def test_rows_that_do_not_match_their_predictions_are_refused(teacher, tmp_path):
    rows = rows_of_lengths(6)
    (predictions,) = predictions_of_rows(teacher, rows, 8)
    with pytest.raises(StructPruneError, match="needs 5 predictions, got 4"):
        write_teacher_rows([(rows[0], predictions[1:])], tmp_path / "rows", teacher.config, top=8)
    with pytest.raises(StructPruneError, match="log-probabilities, and `top` is 16"):
        write_teacher_rows([(rows[0], predictions)], tmp_path / "rows", teacher.config)
    assert not (tmp_path / "rows").exists()


def test_a_second_writer_and_an_early_reader_are_refused(teacher, tmp_path):
    rows = rows_of_lengths(6)
    with FileLock(tmp_path / ".file.lock"), pytest.raises(StructPruneError, match="Another run writes"):
        write_teacher(teacher, rows, tmp_path / "file")

    write_teacher(teacher, rows, tmp_path / "file")
    (tmp_path / "file" / TEACHER_FILE_NAME).unlink()
    trainer = Trainer(build("llama-untied", 2), arguments(tmp_path), train_dataset=[])
    with pytest.raises(StructPruneError, match="not complete"):
        attach_teacher(trainer, tmp_path / "file")


def test_a_student_with_other_tokens_is_refused(teacher, tmp_path):
    write_teacher(teacher, rows_of_lengths(6), tmp_path / "file")
    larger = build("llama-untied", 2)
    larger.resize_token_embeddings(teacher.config.vocab_size + 8)
    trainer = Trainer(larger, arguments(tmp_path), train_dataset=[])
    with pytest.raises(StructPruneError, match="vocabulary of"):
        attach_teacher(trainer, tmp_path / "file")


def test_a_flipped_byte_is_noticed_when_a_file_is_opened(teacher, tmp_path):
    write_teacher(teacher, rows_of_lengths(9, 5, 12), tmp_path, tokenizer())
    student = build("llama-untied")
    assert stored_teacher(tmp_path, student, tokenizer()).alignment is None

    again = "Write the teacher file again|Write it again"
    damaged = rf"{shard_name(0)} (is damaged\.|cannot be read: .*) Write the teacher file again"
    manifest = f"{again}|{TEACHER_FILE_NAME}"
    for name, message in (
        (shard_name(0), damaged),
        (TEACHER_FILE_NAME, manifest),
        ("teacher/tokenizer.json", "tokenizer in .* is damaged. Write the teacher file again"),
    ):
        for _ in flipped_bytes(tmp_path / name):
            with pytest.raises(StructPruneError, match=message):
                stored_teacher(tmp_path, student, tokenizer())

    assert stored_teacher(tmp_path, student, tokenizer()).alignment is None


def test_predictions_that_were_changed_are_refused(teacher, tmp_path):
    write_teacher(teacher, rows_of_lengths(9, 5, 12), tmp_path)
    path = tmp_path / shard_name(0)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    for value in (0, float("nan")):
        tensors = load_file(path)
        tensors["log_probabilities"].fill_(value)
        save_file(tensors, path, metadata=metadata)
        with pytest.raises(StructPruneError, match=f"{path.name} is damaged. Write the teacher file again"):
            TeacherFile(tmp_path)


def test_a_teacher_that_computes_nan_writes_no_file(teacher, tmp_path):
    next(teacher.parameters()).data.fill_(float("nan"))
    with pytest.raises(StructPruneError, match="predictions of the teacher on the rows 0 to 1 are infinite or NaN"):
        write_teacher(teacher, rows_of_lengths(9, 5), tmp_path / "new")
    with pytest.raises(StructPruneError, match="not complete|holds no teacher file"):
        TeacherFile(tmp_path / "new")
