"""A folder appears only once it is complete, with the other files of the original model, and survives a failure."""

import json
import logging
import os
from copy import deepcopy
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from helpers import contents, put_into, same_weights, save_desk, without_refit, write_texts
from models import CASES, OTHERS, build, config, described, documents, token_ids, tokenizer
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaTokenizer, ViTConfig, WhisperTokenizer

from optimum_structprune import (
    DomainConfig,
    Manifest,
    StructPruneConfig,
    StructPruneError,
    StructPruner,
    evaluate,
    prune,
    write_report,
)
from optimum_structprune.commands.cli import main
from optimum_structprune.method.plan import PLAN_NAME, Plan
from optimum_structprune.record.report import Report
from optimum_structprune.saving.save import check_reload, copy_extra_files, make_portable
from optimum_structprune.system.fingerprint import fingerprint
from optimum_structprune.system.written import written_files


@pytest.fixture(scope="module")
def pruner():
    """Return a pruner that has pruned a model."""
    pruner = StructPruner(config())
    pruner.prune_model(build("llama-tied"), tokenizer())
    return pruner


@pytest.fixture(scope="module")
def model(pruner):
    """Return the pruned model."""
    return pruner.result.model


def test_a_saved_folder_has_the_model_the_tokenizer_the_config_and_the_report(pruner, model, tmp_path):
    model.generation_config.max_new_tokens = 7
    out = tmp_path / "deep" / "out"
    pruner.save(model, out, tokenizer=tokenizer())

    assert StructPruneConfig.from_pretrained(out).widths == {"mlp": 24}
    report = Report.load(out / "report.json")
    assert report.pruned.parameters == model.num_parameters()
    assert report.model.dtype == "float32"

    reloaded = AutoModelForCausalLM.from_pretrained(out)
    assert reloaded.generation_config.max_new_tokens == 7
    assert reloaded.get_input_embeddings().weight is reloaded.get_output_embeddings().weight
    assert AutoTokenizer.from_pretrained(out)("w5 w6", add_special_tokens=False)["input_ids"] == [5, 6]
    with torch.no_grad():
        torch.testing.assert_close(reloaded(token_ids()).logits, model(token_ids()).logits)

    # No temporary folder is left.
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("change", [
    None, lambda model: model.to(torch.bfloat16), lambda model: model.lm_head.weight.data.zero_(),
])  # fmt: skip
def test_the_records_say_whether_weights_have_changed_since_they_were_measured(change, tmp_path, recwarn):
    out = tmp_path / "out"
    pruner = StructPruner(config())
    model = pruner.prune_model(build("llama-untied"), tokenizer())
    is_changed = change is not None
    if is_changed:
        change(model)

    pruner.save(model, out, tokenizer())
    write_report(out)

    report = Report.load(out / "report.json")
    assert report.pruned.bytes == sum(tensor.nbytes for tensor in load_file(out / "model.safetensors").values())
    if not is_changed:
        assert report.pruned.bytes == pruner.result.report.pruned.bytes
    assert report.changed == is_changed
    assert not pruner.result.report.changed

    warning_text = " ".join(str(warning.message) for warning in recwarn)
    card = (out / "README.md").read_text()
    page = (out / "report.html").read_text()
    for text in (warning_text, card, page):
        assert ("weights have changed since they were measured" in text.lower()) == is_changed


def test_an_existing_result_is_overwritten_only_on_request_and_a_link_remains_a_link(pruner, model, tmp_path):
    out = tmp_path / "scratch" / "out"
    link = tmp_path / "link"
    out.mkdir(parents=True)
    link.symlink_to(out)

    pruner.save(model, link, tokenizer())
    with pytest.raises(StructPruneError, match="link exists and is not empty"):
        pruner.save(model, link)
    assert (out / "tokenizer.json").exists()

    (out / "tokenizer.json").unlink()
    pruner.save(model, link, overwrite=True)
    assert (out / "tokenizer.json").exists(), "the tokenizer of the run is the default"
    assert link.is_symlink()
    assert (out / "config.json").is_file()
    assert list(out.parent.iterdir()) == [out]


def test_a_saved_config_names_no_code_that_is_missing_from_the_folder(pruner, model, tmp_path):
    remote = {"AutoModel": "owner/name--modeling_x.X"}
    local = {"AutoConfig": "configuration_x.Config", "AutoTokenizer": ["gone.Slow", None]}
    model.config.auto_map = local | remote
    try:
        pruner.save(model, tmp_path / "with_remote")
        model.config.auto_map.pop("AutoModel")
        pruner.save(model, tmp_path / "without_remote")
    finally:
        del model.config.auto_map

    assert json.loads((tmp_path / "with_remote" / "config.json").read_text())["auto_map"] == remote
    assert "auto_map" not in json.loads((tmp_path / "without_remote" / "config.json").read_text())


def test_a_model_that_reloads_with_other_outputs_is_not_saved(pruner, model, tmp_path, monkeypatch):
    save_pretrained = type(model).save_pretrained

    def save_damaged(self, folder):
        with torch.no_grad():
            weight = self.model.layers[0].mlp.down_proj.weight
            weight.mul_(2)
            save_pretrained(self, folder)
            weight.div_(2)

    monkeypatch.setattr(type(model), "save_pretrained", save_damaged)
    with pytest.raises(StructPruneError, match="gives other outputs"):
        pruner.save(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_saved_llama_tokenizer_marks_spaces_in_the_same_places(tmp_path):
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "▁": 4, "▁a": 5}
    reader = LlamaTokenizer(vocab, [("▁", "a")], legacy=True)
    pruner = StructPruner(StructPruneConfig(widths={"mlp": 24}))
    pruned = pruner.prune_model(build("llama-tied"), inputs={"ids": token_ids(8, 24)})
    pruner.save(pruned, tmp_path / "out", reader)

    reloaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert reloaded("a</s>a").input_ids == reader("a</s>a").input_ids
    assert reloaded.backend_tokenizer.to_str() == reader.backend_tokenizer.to_str()


def test_saving_a_half_precision_model_does_not_change_its_attention_and_mode(tmp_path):
    model = build("llama-tied").to(torch.float16)
    model.set_attn_implementation("eager")
    pruner = StructPruner(config())
    pruned = pruner.prune_model(model, tokenizer()).train()

    with torch.device("meta"):  # stands for a GPU that the user has made the default device
        pruner.save(pruned, tmp_path / "out")
    assert pruned.training
    assert pruned.config._attn_implementation == "eager"


def test_the_check_reloads_each_part_of_a_model_with_its_attention(tmp_path, monkeypatch):
    model = build("llava")
    model.set_attn_implementation({"": "sdpa", "text_config": "sdpa", "vision_config": "eager"})
    model.save_pretrained(tmp_path)
    load = type(model).from_pretrained
    loaded = []

    def from_pretrained(*args, **settings):
        loaded.append(load(*args, **settings))
        return loaded[-1]

    monkeypatch.setattr(type(model), "from_pretrained", from_pretrained)
    check_reload(model, tmp_path)

    (reloaded,) = loaded
    assert reloaded.config.text_config._attn_implementation == "sdpa"
    assert reloaded.config.vision_config._attn_implementation == "eager"


# --- files of the original model that a result copies, and files that it only names or ignores
COPIED = {
    "preprocessor_config.json": "{}",
    "processor_config.json": "{}",
    "video_preprocessor_config.json": "{}",
    "chat_template.json": "{}",
    "sentence_bert_config.json": "{}",
    "config_sentence_transformers.json": "{}",
    "1_Pooling/config.json": "{}",
    "LICENSE": "the text of LICENSE",
    "LICENSE.txt": "the text of LICENSE.txt",
    "NOTICE": "the text of NOTICE",
    "USE_POLICY.md": "the text of USE_POLICY.md",
    "labels.txt": "the text of labels.txt",
    "picture.png": "the text of picture.png",
    "vocabulary.tiktoken": "the text of vocabulary.tiktoken",
    "modules.json": json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]),
    "2_Dense/model.safetensors": "weights of another module",
    "colbert_linear.pt": "a head of another library",
}
NAMED = ("onnx/model.onnx", "original/consolidated.pth", "modeling_odd.py")
IGNORED = ("pytorch_model.bin", "flax_model.msgpack", "model.safetensors.index.json", "README.md", ".gitattributes")
TEXT_OF_ORIGINAL_FILES = "the text of an original file"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Save a pruned model whose original folder has files of every kind, and return the messages of the save too."""
    folder = tmp_path_factory.mktemp("copy_extra_files")
    build("llama-tied").save_pretrained(folder / "original")
    put_into(folder / "original", dict.fromkeys(NAMED + IGNORED, TEXT_OF_ORIGINAL_FILES))
    put_into(folder / "original", COPIED)

    pruner = StructPruner(config(domains=[DomainConfig("a", documents(60))]))
    original = AutoModelForCausalLM.from_pretrained(folder / "original", use_safetensors=True)
    pruned = pruner.prune_model(original, tokenizer())

    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("optimum_structprune.saving.save")
    logger.addHandler(handler)
    pruner.save(pruned, folder / "out", tokenizer())
    logger.removeHandler(handler)
    return pruner, pruned, folder / "out", messages


def test_files_of_every_kind_are_copied_or_named(saved):
    _, _, out, messages = saved
    for name, text in COPIED.items():
        assert (out / name).read_text() == text, name

    (message,) = messages
    for name in ("modeling_odd.py", "onnx/", "original/"):
        assert name in message
        assert not (out / name).exists()

    assert not (out / "pytorch_model.bin").exists()
    assert TEXT_OF_ORIGINAL_FILES not in (out / "README.md").read_text()


def test_copied_files_are_part_of_the_result(saved):
    pruner, pruned, out, _ = saved
    assert set(COPIED).issubset(written_files(out))
    pruner.save(pruned, out, tokenizer(), overwrite=True)
    assert (out / "LICENSE").is_file()

    reloaded = AutoModelForCausalLM.from_pretrained(out)
    second_pruner = StructPruner(config(widths={"mlp": 16}, domains=[DomainConfig("a", documents(60))]))
    pruned_twice = second_pruner.prune_model(reloaded, tokenizer())
    second_pruner.save(pruned_twice, out.parent / "twice", tokenizer())
    assert (out.parent / "twice" / "1_Pooling" / "config.json").is_file(), (
        "a second result has the extra files of the first one"
    )

    (out / "credentials.json").write_text("{}")
    (out / "speed.json").write_text("{}")
    copy_extra_files(reloaded, out.parent / "copied", tokenizer())
    assert contents(out.parent / "copied").keys().isdisjoint({"credentials.json", "speed.json"})


def test_other_forms_of_the_vocabulary_are_copied_only_for_all_tokens(tmp_path):
    forms = {"tokenizer.model", "vocab.json", "merges.txt", "vocabulary.tiktoken", "unigram.json"}
    plain_files = {"LICENSE", "normalizer.json"}
    for kind, size in (("original", 96), ("same", 96), ("smaller", 64)):
        put_into(tmp_path / kind, {"config.json": json.dumps({"text_config": {"vocab_size": size}})})
    put_into(tmp_path / "original", dict.fromkeys(forms | plain_files, "text"))

    for kind, reader, copied_forms in (("same", None, forms), ("smaller", WhisperTokenizer(), set())):
        copy_extra_files(SimpleNamespace(name_or_path=tmp_path / "original"), tmp_path / kind, reader)
        names = {path.name for path in (tmp_path / kind).iterdir()}
        assert names & forms == copied_forms
        assert names >= plain_files


def test_files_that_cannot_be_copied_are_named_and_copies_have_the_same_bytes(tmp_path, caplog):
    source = tmp_path / "original"
    out = tmp_path / "out"
    put_into(source, {"modules.json": COPIED["modules.json"], "1_Pooling/config.json": b"\xff\xfe\x00"})
    (source / "LICENSE").symlink_to("nowhere")
    os.mkfifo(source / "pipe.txt")

    model = SimpleNamespace(name_or_path=source, config=ViTConfig(hidden_size=32))
    copy_extra_files(model, out, None)

    assert f"Not copied from {source}: LICENSE, pipe.txt." in caplog.text
    assert contents(out) == {
        "modules.json": COPIED["modules.json"].encode(),
        "1_Pooling/config.json": b"\xff\xfe\x00",
    }


def test_modules_after_a_narrower_model_get_its_width_or_are_named(tmp_path, caplog):
    source = tmp_path / "original"
    out = tmp_path / "out"
    files = {
        "modules.json": COPIED["modules.json"],
        "1_Pooling/config.json": '{"word_embedding_dimension": 32, "pooling_mode_cls_token": true}',
        "2_Dense/config.json": '{"in_features": 32, "out_features": 8}',
        "2_Dense/model.safetensors": "32 x 8",
    }
    put_into(source, files)
    put_into(source, {"sparse_linear.pt": "32"})
    for folder, hidden in ((source, 32), (out / "32", 32), (out / "24", 24)):
        ViTConfig(hidden_size=hidden).save_pretrained(folder)

    for hidden in (32, 24):
        folder = out / str(hidden)
        model = SimpleNamespace(name_or_path=source, config=ViTConfig(hidden_size=hidden))
        copy_extra_files(model, folder, None)

        is_narrower = hidden == 24
        assert ("fit them again: 2_Dense/model.safetensors" in caplog.text) is is_narrower
        assert (f"Not copied from {source}: sparse_linear.pt" in caplog.text) is is_narrower
        assert (folder / "sparse_linear.pt").exists() is not is_narrower
        for name, text in files.items():
            if "Pooling" in name:
                text = text.replace("32", str(hidden))
            assert (folder / name).read_text() == text


def test_modules_that_read_tokens_get_the_number_of_tokens_and_their_new_ids(tmp_path):
    model = build("bert")
    model.save_pretrained(tmp_path / "original")
    splade_name = "1_SpladePooling/config.json"
    mask_name = "2_MultiVectorMask/config.json"
    files = {
        "modules.json": json.dumps([{"path": ""}, {"path": "1_SpladePooling"}, {"path": "2_MultiVectorMask"}]),
        splade_name: '{"pooling_strategy": "max", "word_embedding_dimension": 96}',
        mask_name: '{"skiplist_words": [], "keep_only_token_ids": [\n  2,\n  80, 95\n ]}',
    }
    put_into(tmp_path / "original", files)
    model.config.vocab_size = 64
    model.name_or_path = str(tmp_path / "original")
    model.config.save_pretrained(tmp_path / "out")

    copy_extra_files(model, tmp_path / "out", None, kept_tokens=(*range(62), 80, 95))

    splade = json.loads((tmp_path / "out" / splade_name).read_text())
    mask = json.loads((tmp_path / "out" / mask_name).read_text())
    assert splade == {"pooling_strategy": "max", "word_embedding_dimension": 64}
    assert mask == {"skiplist_words": [], "keep_only_token_ids": [2, 62, 63]}


# --- configs for transformers 4 that transformers 5 still reads; `tests/test_transformers_4.py` runs transformers 4
LLAMA_3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LONG = {"short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0], "original_max_position_embeddings": 4096}
SCALED = {
    "llama-tied": {**LLAMA_3, "rope_type": "llama3", "rope_theta": 5e5},
    "phi3": {**LONG, "rope_type": "longrope", "type": "longrope", "rope_theta": 2e4, "partial_rotary_factor": 1.0},
}
CASES_WITH_ROPE = [(case, {}) for case in list(CASES) + list(OTHERS)] + list(SCALED.items())


@pytest.mark.parametrize(("case", "rope"), CASES_WITH_ROPE)
def test_transformers_5_reads_the_same_config(case, rope, tmp_path):
    _, model_type, fields = described(case)
    options = deepcopy(fields)
    if rope:
        options["rope_parameters"] = rope
    original_config = AutoConfig.for_model(model_type, **options)
    original_config.save_pretrained(tmp_path)

    make_portable(tmp_path / "config.json", type(original_config))

    reloaded = AutoConfig.from_pretrained(tmp_path).to_dict()
    fields_of_folder = {"_name_or_path": "", "dtype": reloaded["dtype"]}
    reloaded.update(fields_of_folder)
    assert reloaded | original_config.to_dict() | fields_of_folder == reloaded

    # Gemma 4 is unknown to transformers 4, and its class in transformers 5 would store keys of transformers 4.
    saved_fields = json.loads((tmp_path / "config.json").read_text())
    if "rope_parameters" in saved_fields and not case.startswith("gemma4_text"):
        assert {"rope_theta", "rotary_emb_base", "global_rope_theta"} & saved_fields.keys()


def test_transformers_4_knows_the_tokenizer_and_fields_of_this_machine_are_removed(tmp_path):
    reader = tokenizer()
    reader.add_special_tokens({"extra_special_tokens": ["w7", "w8"]})
    reader.init_kwargs.update(is_local=True, local_files_only=True)
    reader.save_pretrained(tmp_path)

    make_portable(tmp_path / "tokenizer_config.json", type(AutoConfig.for_model("llama")))

    fields = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert fields["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert fields.keys().isdisjoint({"is_local", "local_files_only"})
    # transformers 4 raises an error if `extra_special_tokens` is a list.
    assert fields["additional_special_tokens"] == ["w7", "w8"]
    assert "extra_special_tokens" not in fields

    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(reloaded) is type(reader)
    assert reloaded.extra_special_tokens == ["w7", "w8"]
    assert reloaded.backend_tokenizer.to_str() == reader.backend_tokenizer.to_str()
    assert reloaded.special_tokens_map == reader.special_tokens_map


# --- plans, reports and manifests belong to the model that they describe
def test_every_model_is_saved_with_the_records_of_its_own_run(tmp_path):
    original_models = [build("llama-tied", seed) for seed in (0, 1)]
    other_text = [DomainConfig("c", documents())]
    pruners = [StructPruner(config(refit="none")), StructPruner(config(refit="none", domains=other_text))]
    runs = []
    for original, pruner in product(original_models, pruners):
        runs.append((original, pruner.prune(original, tokenizer())))

    for number in (1, 3, 0, 2):
        original, result = runs[number]
        folder = tmp_path / str(number)
        result.save(folder)

        saved_report = json.loads((folder / "report.json").read_text())
        assert saved_report["domains"] == json.loads(json.dumps(result.report.to_dict()["domains"]))
        assert Manifest.load(folder) == result.manifest

        plan = Plan.load(folder / PLAN_NAME)
        assert same_weights(without_refit(original, plan), result.model)
        assert plan.sizes["mlp"] == 40
        for original_of_run, result_of_run in runs:
            assert (plan.original == fingerprint(original_of_run)) == (original_of_run is original)
            assert plan.original != fingerprint(result_of_run.model)

    result.save(tmp_path / "copy", model=deepcopy(result.model))
    assert Plan.load(tmp_path / "copy" / PLAN_NAME) == plan

    # The plan of a second pruning belongs to the once pruned model, and both plans together belong to the original
    # model.
    second = prune(result.model, config(widths={"mlp": 12}), tokenizer())
    assert second.plan.original == fingerprint(result.model)
    assert second.plan.sizes["mlp"] == 24
    assert plan.then(second.plan).original == fingerprint(original)


def test_a_pruner_saves_only_the_model_of_its_last_run(tmp_path):
    pruner = StructPruner(config(refit="none"))
    original = build("llama-tied")
    first = pruner.prune_model(original, tokenizer())
    last = pruner.prune_model(original, tokenizer())
    assert pruner.result.model is last

    unused_pruner = StructPruner(config())
    for saver, model in ((pruner, original), (pruner, first), (pruner, deepcopy(last)), (unused_pruner, last)):
        with pytest.raises(StructPruneError, match="is not the model that prune_model returned last"):
            saver.save(model, tmp_path / "out")

    with pytest.raises(StructPruneError, match="does not have the shapes of the pruned model"):
        pruner.result.save(tmp_path / "out", model=original)
    assert not list(tmp_path.iterdir())


def test_pruning_adds_only_the_record_of_its_text_to_a_model():
    names_before = set(vars(build("llama-tied")))
    result = prune(build("llama-tied"), config(), tokenizer())
    assert set(vars(result.model)) - names_before == {"text_record"}


@pytest.mark.slow
def test_training_text_counts_as_seen(tmp_path):
    save_desk(tmp_path, count=200)
    write_texts(tmp_path / "b.jsonl", documents(200, 7))
    write_texts(tmp_path / "c.jsonl", documents(200, 9))
    command = (
        f"prune {tmp_path / 'model'} {tmp_path / 'out'} --width mlp=24 --domain a={tmp_path / 'a.jsonl'} "
        "--seq-length 24 --num-samples 6 --device cpu --recovery tokens=480 --recovery"
    )
    training_domains = f"domains=[{{name: b, source: {tmp_path / 'b.jsonl'}}}]"
    assert main(command.split() + [training_domains]) == 0
    result = AutoModelForCausalLM.from_pretrained(tmp_path / "out")

    # An evaluation on the training text has a warning.
    domains = [DomainConfig("other", str(tmp_path / "b.jsonl")), DomainConfig("new", str(tmp_path / "c.jsonl"))]
    with pytest.warns(UserWarning, match="documents were trained on, in the training domain 'b'"):
        evaluation = evaluate(result, tokenizer(), domains, seq_length=24)
    assert evaluation.shared == ["other"]

    assert "output_dir" not in (tmp_path / "out" / "recovery_config.json").read_text()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "No held-out document was used for anything else." in card
    assert "| b " in card.split("## Recovery")[1].split("## Limits")[0]
