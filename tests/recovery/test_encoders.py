"""The recovery of an encoder brings its outputs nearer to the outputs of the original model."""

import json
from copy import deepcopy
from random import Random

import pytest
import torch
from helpers import put_into, same_weights, save_with_tokenizer, with_tokens
from models import PLAIN, build, byte_level, random_model
from transformers import AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification

from optimum_structprune import DomainConfig, RecoveryConfig, StructPruneConfig, StructPruneError
from optimum_structprune.commands.cli import main
from optimum_structprune.domains.sources import builtin_documents
from optimum_structprune.measure.vectors import Pooling
from optimum_structprune.recovery.encoders import passages, sorted_by_length
from optimum_structprune.recovery.recover import NothingGainedWarning, Recovery, check_recovery


DOMAINS = [DomainConfig(name=kind, source=f"builtin:{kind}") for kind in ("prose", "countries")]
PRUNING = StructPruneConfig(sparsity=0.5, domains=DOMAINS)
TRAINING = {"learning_rate": 2e-3, "per_device_train_batch_size": 8, "disable_tqdm": True}


@pytest.fixture(scope="module")
def reader():
    return byte_level(list(builtin_documents("prose"))[:50], 600)


def models(reader, auto=AutoModel, **fields):
    """Return a teacher, and a student whose FFN differs."""
    sizes = PLAIN | {"vocab_size": len(reader), "max_position_embeddings": 512} | fields
    teacher = random_model(auto, "bert", sizes)
    student = deepcopy(teacher)
    generator = torch.Generator().manual_seed(0)
    for name, weight in student.named_parameters():
        if name.endswith("output.dense.weight"):
            weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    return teacher, student


def recovered_by(teacher, student, reader, teacher_reader=None, **fields):
    config = RecoveryConfig(tokens=6_000, seq_length=128, training=TRAINING, **fields)
    recovery = Recovery(config, PRUNING)
    model = recovery.recover_model(student, reader, teacher, teacher_tokenizer=teacher_reader or reader)
    return model, recovery.report


def test_the_report_has_the_vectors_before_and_after(reader):
    teacher, student = models(reader)
    frozen = student.get_input_embeddings().weight.clone()
    original = deepcopy(teacher)
    model, report = recovered_by(teacher, student, reader)

    assert model is student
    assert not model.training
    assert report.kept_step > 0
    assert same_weights(teacher, original)
    assert torch.equal(model.get_input_embeddings().weight, frozen)
    assert all(weight.requires_grad for weight in model.parameters())
    assert set(report.domains) == {"prose", "countries"}
    for result in report.domains.values():
        assert result.cosine.recovered > result.cosine.pruned
        assert result.neighbours.recovered is not None


@pytest.mark.parametrize(
    "auto",
    [AutoModelForSequenceClassification, pytest.param(AutoModelForTokenClassification, marks=pytest.mark.slow)],
)
def test_other_heads_that_read_text_are_recovered(auto, reader):
    teacher, student = models(reader, auto, num_labels=3)
    _, report = recovered_by(teacher, student, reader)
    assert report.kept_step > 0


def test_a_model_with_fewer_tokens_reads_the_text_of_its_teacher(reader):
    teacher, student = models(reader)
    small, small_reader = with_tokens(student, reader, list(range(450)))
    _, report = recovered_by(teacher, small, small_reader, reader)
    assert report.kept_step > 0
    for result in report.domains.values():
        assert result.cosine.recovered > result.cosine.pruned


@pytest.mark.slow
def test_a_part_of_the_pairs_measures_the_retrieval(reader, tmp_path):
    texts = list(builtin_documents("countries"))
    path = tmp_path / "countries.jsonl"
    path.write_text("\n".join(json.dumps({"q": text[:60], "a": text[60:200]}) for text in texts))
    teacher, student = models(reader)
    _, report = recovered_by(teacher, student, reader, pairs=str(path))
    retrieval = report.domains["pairs countries"].retrieval
    assert set(retrieval.values) == {"original", "pruned", "recovered"}


def test_a_training_that_gains_nothing_leaves_the_model_unchanged(reader):
    teacher, student = models(reader)
    before = deepcopy(student)
    config = RecoveryConfig(tokens=2_000, seq_length=128, training=TRAINING | {"learning_rate": 10.0})
    recovery = Recovery(config, PRUNING)
    with pytest.warns(NothingGainedWarning):
        recovery.recover_model(student, reader, teacher, teacher_tokenizer=reader)
    assert recovery.report.kept_step == 0
    assert same_weights(student, before)


def test_passages_have_the_text_of_the_samples_in_many_lengths(reader):
    documents = list(builtin_documents("countries"))[:20]
    rows = torch.tensor([[0, *reader(text)["input_ids"]][:120] for text in documents])
    parts = list(passages(rows, reader, Random(0)))
    lengths = [len(part.split()) for part in parts]
    assert min(lengths) <= 8
    assert max(lengths) > 40
    text = " ".join("".join(documents).split())
    assert sum(" ".join(part.split())[:20] in text for part in parts) > 0.9 * len(parts)

    ordered = sorted_by_length(parts, 8, Random(0))
    assert sorted(ordered) == sorted(parts)


@pytest.mark.parametrize(
    ("case", "fields", "message"),
    [
        ("t5", {}, "T5For.* needs other inputs too. Call `attach_teacher"),
        ("vit", {}, "ViTFor.* needs other inputs too. Call `attach_teacher"),
        ("bert", {"train": "lora"}, "`train`='lora' is for causal language models"),
        ("bert", {"prompts": "a.jsonl"}, "`prompts` is for causal language models"),
        ("llama-tied", {"pairs": "a.jsonl"}, "`pairs` is for encoders"),
    ],
)
def test_an_impossible_recovery_is_refused_before_text_is_read(case, fields, message):
    config = RecoveryConfig(tokens=640, seq_length=32, **fields)
    with pytest.raises(StructPruneError, match=message):
        check_recovery(config, PRUNING, build(case))


def test_a_file_without_pairs_is_refused_before_text_is_read(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(StructPruneError, match="has no pairs of texts"):
        check_recovery(RecoveryConfig(tokens=640, pairs=str(tmp_path / "empty.jsonl")), PRUNING, build("bert"))


def test_an_encoder_needs_a_teacher(reader):
    _, student = models(reader)
    with pytest.raises(StructPruneError, match="A BertModel learns from a teacher"):
        Recovery(RecoveryConfig(tokens=6_000), PRUNING).recover_model(student, reader)


@pytest.mark.slow
def test_the_commands_recover_a_folder_of_sentence_transformers(reader, tmp_path, capsys):
    library = pytest.importorskip("sentence_transformers", minversion="6", reason="it loads the folder")
    teacher, _ = models(reader)
    folder = tmp_path / "encoder"
    save_with_tokenizer(teacher, folder, reader)
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    pooling = {"word_embedding_dimension": 32, "pooling_mode_cls_token": True}
    put_into(folder, {"modules.json": json.dumps(modules), "1_Pooling/config.json": json.dumps(pooling)})

    text = ["--domain", "prose=builtin:prose", "--num-samples", "8", "--seq-length", "64"]
    assert main(["prune", str(folder), str(tmp_path / "small"), "--width", "mlp=24", *text]) == 0
    settings = ["--tokens", "4000", "--training", "learning_rate=2e-3", "--teacher", str(folder)]
    assert main(["recover", str(tmp_path / "small"), str(tmp_path / "out"), *settings]) == 0
    printed = capsys.readouterr().out
    assert "→" in printed.split("neighbours kept")[-1]

    encoder = library.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert encoder.encode(["a text"]).shape == (1, 32)
    assert Pooling.of(AutoModel.from_pretrained(tmp_path / "out")).modes == ["cls"]

    flags = ["--width", "mlp=24", "--recovery-tokens", "4000", *text]
    assert main(["prune", str(folder), str(tmp_path / "both"), *flags]) == 0, capsys.readouterr().err


def test_validation_text_without_a_sentence_is_refused(reader):
    teacher, student = models(reader)
    with pytest.raises(StructPruneError, match="no sentence of 20 bytes in samples of 4 tokens. Choose longer"):
        Recovery(RecoveryConfig(tokens=600, seq_length=4), PRUNING).recover_model(student, reader, teacher)
