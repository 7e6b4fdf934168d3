"""A Trainer with a teacher brings the outputs of any head nearer to the teacher's outputs."""

from copy import deepcopy

import pytest
import torch
from datasets import Dataset
from helpers import save_with_tokenizer, with_tokens
from models import GPT, GROUPED, PLAIN, documents, random_model, token_ids, tokenizer
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import cosine_similarity, kl_div, logsigmoid
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from optimum_structprune import StructPruneError, attach_teacher, write_teacher


T5 = {"d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 8}
NO_DROPOUT = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
SIZES = PLAIN | {"vocab_size": 60}


def kl(output, expected):
    log_softmax = (output.log_softmax(-1), expected.log_softmax(-1))
    return kl_div(*log_softmax, log_target=True, reduction="none").sum(-1).mean()


def kl_of_tokens(student, teacher, batch):
    counts = batch["labels"] != -100
    return kl(student.logits[counts], teacher.logits[counts])


def kl_of_independent_labels(student, teacher, batch):
    probability = teacher.logits.sigmoid()
    applies = probability * (logsigmoid(teacher.logits) - logsigmoid(student.logits))
    does_not = (1 - probability) * (logsigmoid(-teacher.logits) - logsigmoid(-student.logits))
    return (applies + does_not).sum(-1).mean()


def distance_of_vectors(student, teacher, batch):
    mask = batch["attention_mask"].bool()
    vectors = []
    for output in (student, teacher):
        vectors.append(torch.stack([row[is_text].mean(0) for row, is_text in zip(output[0], mask, strict=True)]))
    error = (student[0][mask] - teacher[0][mask]).square().mean() / teacher[0][mask].var()
    return (1 - cosine_similarity(*vectors)).mean() + error


# The class, the type, the fields, and the expected divergence.
HEADS = {
    "vectors": (AutoModel, "bert", SIZES, distance_of_vectors),
    "classes": (
        AutoModelForSequenceClassification,
        "bert",
        SIZES | {"num_labels": 3},
        lambda student, teacher, batch: kl(student.logits, teacher.logits),
    ),
    "labels": (
        AutoModelForSequenceClassification,
        "bert",
        SIZES | {"num_labels": 3, "problem_type": "multi_label_classification"},
        kl_of_independent_labels,
    ),
    "score": (
        AutoModelForSequenceClassification,
        "bert",
        SIZES | {"num_labels": 1},
        lambda student, teacher, batch: (student.logits - teacher.logits).square().mean(),
    ),
    "tags": (AutoModelForTokenClassification, "bert", SIZES | {"num_labels": 5}, kl_of_tokens),
    "masked tokens": (AutoModelForMaskedLM, "bert", SIZES, kl_of_tokens),
    "spans": (
        AutoModelForQuestionAnswering,
        "bert",
        SIZES,
        lambda student, teacher, batch: (
            kl(student.start_logits, teacher.start_logits) + kl(student.end_logits, teacher.end_logits)
        ),
    ),
    "translations": (AutoModelForSeq2SeqLM, "t5", T5 | {"vocab_size": 60}, kl_of_tokens),
    "images": (
        AutoModelForImageClassification,
        "vit",
        VIT | {"num_labels": 4, "patch_size": 4},
        lambda student, teacher, batch: kl(student.logits, teacher.logits),
    ),
}


def batch_for(name, count=4):
    """Return a batch for a head. Rows have padding, and labels that do not count."""
    generator = torch.Generator().manual_seed(0)
    if name == "images":
        return {"pixel_values": torch.randn(count, 3, 8, 8, generator=generator), "labels": torch.arange(count) % 4}

    ids = torch.randint(5, 60, (count, 8), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if name in ("tags", "masked tokens", "translations"):
        batch["labels"] = ids % 5
        batch["labels"][1, :3] = -100
    elif name == "labels":
        batch["labels"] = torch.ones(count, 3)
    elif name in ("classes", "score"):
        batch["labels"] = torch.arange(count) % HEADS[name][2]["num_labels"]
    elif name == "spans":
        batch |= {"start_positions": torch.zeros(count).long(), "end_positions": torch.ones(count).long()}
    return batch


def rows_of(batch):
    count = len(next(iter(batch.values())))
    return [{key: value[number] for key, value in batch.items()} for number in range(count)]


def trainer_for(model, folder, rows, trainer_class=Trainer, **settings):
    options = {"use_cpu": True, "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    options |= {"logging_steps": 1, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    arguments = TrainingArguments(str(folder), **(options | settings))
    return trainer_class(
        model=model, args=arguments, train_dataset=rows, eval_dataset=rows, data_collator=default_data_collator
    )


def gradients(model):
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("name", HEADS)
def test_loss_and_gradients_equal_the_formula(name, tmp_path):
    auto, model_type, fields, expected_loss = HEADS[name]
    student = random_model(auto, model_type, fields)
    teacher = random_model(auto, model_type, fields, seed=1)
    batch = batch_for(name)
    trainer = trainer_for(student, tmp_path, rows_of(batch))
    attach_teacher(trainer, teacher)

    student.eval()  # without dropout
    loss = trainer.compute_loss(student, dict(batch))
    loss.backward()
    computed = gradients(student)

    student.zero_grad()
    with torch.no_grad():
        teacher_outputs = teacher(**batch)
    expected = expected_loss(student(**batch), teacher_outputs, batch)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    assert expected > 0
    expected_gradients = gradients(student)
    assert computed
    for weight, gradient in computed.items():
        torch.testing.assert_close(gradient, expected_gradients[weight], msg=weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", HEADS)
def test_training_and_evaluation_log_the_divergence(name, tmp_path):
    auto, model_type, fields, _ = HEADS[name]
    student = random_model(auto, model_type, fields)
    trainer = trainer_for(student, tmp_path, rows_of(batch_for(name)), label_smoothing_factor=0.0)
    attach_teacher(trainer, random_model(auto, model_type, fields, seed=1))
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()

    assert after["eval_loss"] < before
    assert trainer.state.log_history[-1]["eval_divergence"] == pytest.approx(after["eval_loss"], abs=1e-4)
    assert any("divergence" in entry for entry in trainer.state.log_history)


@pytest.mark.parametrize("name", ["classes", "tags"])
def test_accumulated_batches_have_the_gradient_of_one_batch(name, tmp_path):
    auto, model_type, fields, _ = HEADS[name]
    rows = rows_of(batch_for(name))
    updates = []
    for size in (4, 2):
        student = random_model(
            auto, model_type, fields | {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
        )
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size, "max_steps": 1}
        trainer = trainer_for(student, tmp_path, rows, optim="sgd", max_grad_norm=0, **settings)
        attach_teacher(trainer, random_model(auto, model_type, fields, seed=1))
        trainer.train()
        updates.append(student.state_dict())
    for weight, value in updates[0].items():
        torch.testing.assert_close(value, updates[1][weight], rtol=1e-4, atol=1e-6)


def test_temperature_and_task_weight_enter_the_loss(tmp_path):
    auto, model_type, fields, _ = HEADS["classes"]
    student = random_model(auto, model_type, fields)
    teacher = random_model(auto, model_type, fields, seed=1)
    batch = batch_for("classes")
    trainer = trainer_for(student, tmp_path, rows_of(batch))
    attach_teacher(trainer, teacher, temperature=2.0, task_weight=0.25)

    loss = trainer.compute_loss(student, dict(batch))
    own = student(**batch)
    expected = 0.75 * 4 * kl(own.logits / 2, teacher(**batch).logits / 2) + 0.25 * own.loss
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("classes", {"num_labels": 4}, "The teacher has 4 labels, and the model has 3"),
        (
            "vectors",
            {"hidden_size": 48},
            "The teacher has 48 channels of .* vectors, and the model has 32",
        ),
        ("tags", {"vocab_size": 50}, "vocabulary of 50 tokens and the model one of 60"),
    ],
)
def test_a_teacher_of_other_sizes_is_refused_before_the_training(name, fields, message, tmp_path):
    auto, model_type, sizes, _ = HEADS[name]
    trainer = trainer_for(random_model(auto, model_type, sizes), tmp_path, rows_of(batch_for(name)))
    compute_loss = trainer.compute_loss
    with pytest.raises(StructPruneError, match=message):
        attach_teacher(trainer, random_model(auto, model_type, sizes | fields, seed=1))
    assert trainer.compute_loss == compute_loss


def test_a_teacher_with_the_same_weights_needs_a_later_pruning(tmp_path):
    student = random_model(*HEADS["classes"][:3])
    teacher = random_model(*HEADS["classes"][:3])
    trainer = trainer_for(student, tmp_path, rows_of(batch_for("classes")))
    with pytest.raises(StructPruneError, match="are the same model"):
        attach_teacher(trainer, teacher)

    callback = TrainerCallback()
    callback.prunes_model = True
    trainer.add_callback(callback)
    attach_teacher(trainer, teacher)


def test_a_teacher_with_another_head_is_refused(tmp_path):
    trainer = trainer_for(random_model(*HEADS["classes"][:3]), tmp_path / "run", rows_of(batch_for("classes")))
    with pytest.raises(StructPruneError, match="cannot compare a BertForSequenceClassification with a BertModel"):
        attach_teacher(trainer, random_model(*HEADS["vectors"][:3], seed=1))

    random_model(*HEADS["vectors"][:3], seed=1).save_pretrained(tmp_path / "vectors")
    with pytest.raises(StructPruneError, match="lacks weights of a BertForSequenceClassification"):
        attach_teacher(trainer, tmp_path / "vectors")

    random_model(*HEADS["classes"][:3], seed=1).save_pretrained(tmp_path / "classes")
    attach_teacher(trainer, tmp_path / "classes")


@pytest.mark.parametrize("name", HEADS)
def test_an_offloaded_teacher_gives_the_same_loss(name, tmp_path):
    auto, model_type, fields, _ = HEADS[name]
    student = random_model(auto, model_type, fields).eval()
    batch = batch_for(name)
    losses = []
    for device in (None, "offload"):
        trainer = trainer_for(student, tmp_path, rows_of(batch))
        attach_teacher(trainer, random_model(auto, model_type, fields, seed=1), teacher_device=device)
        losses.append(trainer.compute_loss(student, dict(batch)))
    torch.testing.assert_close(losses[0], losses[1])


def test_a_decoder_is_compared_only_with_a_decoder_that_reads_the_same_batches(tmp_path):
    """An encoder predicts the tokens that it reads, and the decoder of an encoder-decoder the tokens it writes."""
    for name, other in (("translations", "masked tokens"), ("masked tokens", "translations")):
        student = random_model(*HEADS[name][:3])
        trainer = trainer_for(student, tmp_path, rows_of(batch_for(name)))
        with pytest.raises(StructPruneError, match="cannot compare a .* Pass a teacher with the same head"):
            attach_teacher(trainer, random_model(*HEADS[other][:3], seed=1))

    student = random_model(*HEADS["translations"][:3])
    batch = batch_for("translations")
    del batch["labels"]
    trainer = trainer_for(student, tmp_path, rows_of(batch))
    attach_teacher(trainer, random_model(*HEADS["translations"][:3], seed=1))
    with pytest.raises(StructPruneError, match="no input in the columns .*, attention_mask. Add `labels` or `decoder"):
        trainer.train()

    batch["decoder_input_ids"] = batch["input_ids"]
    assert trainer.compute_loss(student, batch) > 0


@pytest.mark.parametrize("name", ["classes", "translations"])
def test_a_file_of_next_tokens_teaches_no_other_head(name, tmp_path):
    write_teacher(random_model(AutoModelForCausalLM, "llama", GROUPED | {"vocab_size": 60}), [[5, 6, 7]], tmp_path)
    trainer = trainer_for(random_model(*HEADS[name][:3]), tmp_path / "run", rows_of(batch_for(name)))
    with pytest.raises(StructPruneError, match="is a teacher file, .* trains a .* Pass a model"):
        attach_teacher(trainer, tmp_path)


def test_a_pickled_teacher_is_refused(tmp_path):
    student = random_model(*HEADS["classes"][:3])
    student.config.save_pretrained(tmp_path / "pickled")
    torch.save({"classifier.weight": tmp_path}, tmp_path / "pickled" / "pytorch_model.bin")
    trainer = trainer_for(student, tmp_path / "run", rows_of(batch_for("classes")))
    with pytest.raises(StructPruneError, match="holds Python objects .* Pass a safetensors file"):
        attach_teacher(trainer, tmp_path / "pickled")


# Models with all kinds of noise: dropout in modules and functions, skipped layers, and statistics of batches.
BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40}
BART |= {
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_layerdrop": 0.3,
    "decoder_layerdrop": 0.3,
}
OPT = PLAIN | {"ffn_dim": 40, "word_embed_proj_dim": 32, "dropout": 0.3, "layerdrop": 0.3}
NOISY = {name: (*case[:3], name) for name, case in HEADS.items()}
NOISY |= {
    "bart": (AutoModelForSeq2SeqLM, "bart", BART, "translations"),
    "opt": (AutoModelForCausalLM, "opt", OPT, "next tokens"),
    "gpt2": (AutoModelForCausalLM, "gpt2", GPT | {"resid_pdrop": 0.3, "embd_pdrop": 0.3}, "next tokens"),
    "batch statistics": (
        AutoModelForImageClassification,
        "resnet",
        {"embedding_size": 8, "hidden_sizes": [16, 16], "depths": [1, 1], "num_labels": 4},
        "images",
    ),
}


class PrunesLater(TrainerCallback):
    """Mark a Trainer as one that prunes its model, whose teacher may have the same weights."""

    prunes_model = True


def noisy_student(name, seed=0):
    """Return a model with dropout, and rows for its head."""
    auto, model_type, fields, head = NOISY[name]
    student = random_model(auto, model_type, fields, seed)
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    if head == "next tokens":
        return student, rows_of({"input_ids": token_ids(4, 16), "labels": token_ids(4, 16)})
    return student, rows_of(batch_for(head))


def train_one_step(trainer, teacher):
    """Train one step that would move every weight by its gradient, and return the loss."""
    trainer.add_callback(PrunesLater())
    attach_teacher(trainer, teacher)
    trainer.train()
    return trainer.state.log_history[0]["loss"]


ONE_STEP = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0}


@pytest.mark.parametrize("name", NOISY)
def test_a_student_that_equals_its_teacher_stays(name, tmp_path):
    student, rows = noisy_student(name)
    teacher = deepcopy(student)
    trainer = trainer_for(student, tmp_path, rows, **ONE_STEP)
    assert train_one_step(trainer, teacher) == pytest.approx(0, abs=1e-5)
    assert student.training, "Trainers read the mode of the model"
    for weight, value in student.state_dict().items():
        torch.testing.assert_close(value, teacher.state_dict()[weight], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["vectors", "opt"])
def test_only_the_dropout_of_an_adapter_acts(name, tmp_path):
    teacher, rows = noisy_student(name)
    losses = {}
    for dropout in (0.0, 0.5):
        torch.manual_seed(0)
        student = get_peft_model(deepcopy(teacher), LoraConfig(r=2, target_modules="all-linear", lora_dropout=dropout))
        trainer = trainer_for(student, tmp_path, rows, **ONE_STEP)
        assert train_one_step(trainer, teacher) == pytest.approx(0, abs=1e-5)

        with torch.no_grad():
            for weight_name, weight in student.named_parameters():
                if "lora_B" in weight_name:
                    weight.normal_()
        batch = default_data_collator(rows)
        losses[dropout] = {trainer.compute_loss(student.train(), dict(batch)).item() for _ in range(3)}
    assert len(losses[0.0]) == 1
    assert len(losses[0.5]) == 3


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["vectors", "bart", "opt"])
def test_activation_checkpointing_goes_on_without_dropout(name, tmp_path):
    updates = []
    calls = []
    for checkpoints in (False, True):
        student, rows = noisy_student(name)
        counted = [module for module in student.modules() if isinstance(module, nn.Linear)][1]
        seen = []
        counted.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        trainer = trainer_for(student, tmp_path, rows, gradient_checkpointing=checkpoints, **ONE_STEP)
        assert train_one_step(trainer, noisy_student(name, seed=1)[0]) > 1e-3
        updates.append(student.state_dict())
        calls.append(len(seen))

    assert calls[1] > calls[0], "the layers are computed again in the backward pass"
    for weight, value in updates[0].items():
        torch.testing.assert_close(value, updates[1][weight], rtol=1e-4, atol=1e-6)


KEPT = list(range(60))
SENTENCE_SETTINGS = {
    "use_cpu": True,
    "num_train_epochs": 4,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
}


def encoder_folders(folder, kept=None):
    """Save a teacher and a student with a pooling, a Dense module and a prompt, and return their folders."""
    library = pytest.importorskip("sentence_transformers", minversion="6", reason="its Trainer trains the model")
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    for name, seed in (("teacher", 1), ("student", 0)):
        model = random_model(AutoModel, "bert", PLAIN, seed)
        reader = tokenizer()
        if kept and name == "student":
            model, reader = with_tokens(model, reader, kept)
        save_with_tokenizer(model, folder / f"{name}-plain", reader)
        torch.manual_seed(0)
        parts = [modules.Transformer(str(folder / f"{name}-plain")), modules.Pooling(32, pooling_mode="mean")]
        parts += [modules.Dense(32, 24), modules.Normalize()]
        encoder = library.SentenceTransformer(modules=parts, device="cpu", prompts={"query": "w3 w4 "})
        encoder.save(str(folder / name))
    return library, folder / "student", folder / "teacher"


@pytest.mark.parametrize("kept", [None, KEPT], ids=["all tokens", "fewer tokens"])
def test_one_line_teaches_a_sentence_transformer(kept, tmp_path):
    library, student_folder, teacher_folder = encoder_folders(tmp_path, kept)
    student = library.SentenceTransformer(str(student_folder), device="cpu")
    teacher = library.SentenceTransformer(str(teacher_folder), device="cpu")
    texts = [text[:40] for text in documents(16)]
    data = Dataset.from_dict({"anchor": texts[:8], "positive": texts[8:]})
    arguments = library.SentenceTransformerTrainingArguments(
        str(tmp_path / "run"), prompts={"anchor": "w3 w4 "}, **SENTENCE_SETTINGS
    )
    trainer = library.SentenceTransformerTrainer(model=student, args=arguments, train_dataset=data, eval_dataset=data)
    attach_teacher(trainer, str(teacher_folder))

    student.eval()
    batch = trainer.data_collator(list(data.select(range(4))))
    loss = trainer.compute_loss(student, trainer._prepare_inputs(dict(batch)))
    columns = [["w3 w4 " + text for text in texts[:4]], texts[8:12]]
    expected = torch.zeros(())
    for column in columns:
        features = student(student.preprocess(column))
        teacher_features = teacher(teacher.preprocess(column))
        vectors = (features["sentence_embedding"], teacher_features["sentence_embedding"])
        expected = expected + (1 - cosine_similarity(*vectors)).mean() / 2
        if kept is None:
            mask = features["attention_mask"].bool()
            states = features["token_embeddings"][mask]
            teacher_states = teacher_features["token_embeddings"][mask]
            expected = expected + (states - teacher_states).square().mean() / teacher_states.var() / 2
    torch.testing.assert_close(loss, expected)

    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    student.save(str(tmp_path / "recovered"))
    reloaded = library.SentenceTransformer(str(tmp_path / "recovered"), device="cpu")
    torch.testing.assert_close(torch.tensor(reloaded.encode(texts)), torch.tensor(student.encode(texts)))
    assert reloaded.prompts["query"] == "w3 w4 "


@pytest.mark.parametrize("kept", [None, KEPT], ids=["all tokens", "fewer tokens"])
def test_one_line_teaches_a_reranker(kept, tmp_path):
    library = pytest.importorskip("sentence_transformers", minversion="6", reason="its Trainer trains the model")
    for name, seed in (("teacher", 1), ("student", 0)):
        model = random_model(AutoModelForSequenceClassification, "bert", PLAIN | {"num_labels": 1}, seed)
        reader = tokenizer()
        if kept and name == "student":
            model, reader = with_tokens(model, reader, kept)
        save_with_tokenizer(model, tmp_path / name, reader)
    student = library.CrossEncoder(str(tmp_path / "student"), device="cpu")
    teacher = library.CrossEncoder(str(tmp_path / "teacher"), device="cpu")

    texts = [text[:30] for text in documents(16)]
    data = Dataset.from_dict({"query": texts[:8], "passage": texts[8:], "label": [0.0, 1.0] * 4})
    arguments = library.CrossEncoderTrainingArguments(str(tmp_path / "run"), **SENTENCE_SETTINGS)
    trainer = library.CrossEncoderTrainer(model=student, args=arguments, train_dataset=data, eval_dataset=data)
    attach_teacher(trainer, teacher)

    student.eval()
    batch = trainer.data_collator(list(data.select(range(4))))
    loss = trainer.compute_loss(student, trainer._prepare_inputs(dict(batch)))
    pairs = list(zip(texts[:4], texts[8:12], strict=True))
    scores = student(student.preprocess(pairs))["scores"]
    teacher_scores = teacher(teacher.preprocess(pairs))["scores"]
    torch.testing.assert_close(loss, (scores - teacher_scores).square().mean())

    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before


def test_a_classifier_with_fewer_tokens_reads_the_same_text_as_its_teacher(tmp_path):
    fields = PLAIN | {"num_labels": 3}
    teacher = random_model(AutoModelForSequenceClassification, "bert", fields, 1)
    reader = tokenizer()
    whole = random_model(AutoModelForSequenceClassification, "bert", fields)
    student, small_reader = with_tokens(whole, reader, [0, 1, 2, *range(20, 60)])
    texts = [" ".join(f"w{number}" for number in range(20 + start, 26 + start)) for start in range(4)]
    rows = [{"input_ids": ids, "labels": 0} for ids in small_reader(texts)["input_ids"]]
    trainer = trainer_for(student, tmp_path, rows)
    attach_teacher(trainer, teacher, tokenizer=small_reader, teacher_tokenizer=reader)

    student.eval()
    loss = trainer.compute_loss(student, trainer.data_collator(rows))
    ids = torch.tensor(small_reader(texts)["input_ids"])
    teacher_ids = torch.tensor(reader(texts)["input_ids"])
    assert not torch.equal(ids, teacher_ids)
    torch.testing.assert_close(loss, kl(student(ids).logits, teacher(teacher_ids).logits))


@pytest.mark.parametrize("name", ["SentenceTransformer", "CrossEncoder"])
def test_a_model_of_sentence_transformers_that_equals_its_teacher_stays(name, tmp_path):
    library, folder, _ = encoder_folders(tmp_path)
    columns = {"anchor": documents(8), "positive": documents(8, seed=1)}
    if name == "CrossEncoder":
        folder = tmp_path / "reranker"
        reranker = random_model(AutoModelForSequenceClassification, "bert", PLAIN | {"num_labels": 1})
        save_with_tokenizer(reranker, folder, tokenizer())
        columns["label"] = [0.0, 1.0] * 4
    student = getattr(library, name)(str(folder), device="cpu")
    teacher = deepcopy(student)

    arguments = getattr(library, f"{name}TrainingArguments")(
        str(tmp_path / "run"), **(SENTENCE_SETTINGS | ONE_STEP | {"logging_steps": 1})
    )
    data = Dataset.from_dict(columns)
    trainer = getattr(library, f"{name}Trainer")(model=student, args=arguments, train_dataset=data)
    assert train_one_step(trainer, teacher) == pytest.approx(0, abs=1e-5)
    for weight, value in student.state_dict().items():
        torch.testing.assert_close(value, teacher.state_dict()[weight], atol=1e-5, rtol=0)
