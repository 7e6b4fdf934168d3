"""A folder appears only once it is complete, with all that lay beside the dense model, and survives a failure."""

import json
import logging
import os
import re
import shutil
from copy import deepcopy
from html import unescape
from itertools import product
from shlex import split
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
from optimum_structprune.record.plan import PLAN_NAME, Plan
from optimum_structprune.record.report import Report
from optimum_structprune.saving.save import check_reload, copy_extra_files, settle
from optimum_structprune.system.fingerprint import fingerprint
from optimum_structprune.written import written_files


@pytest.fixture(scope="module")
def run():
    pruner = StructPruner(config())
    return pruner, pruner.prune_model(build("llama-tied"), tokenizer())


def test_everything_is_saved(run, tmp_path):
    pruner, model = run
    model.generation_config.max_new_tokens = 7
    pruner.save(model, tmp_path / "deep" / "out", tokenizer=tokenizer())
    out = tmp_path / "deep" / "out"
    assert StructPruneConfig.from_pretrained(out).widths == {"mlp": 24}
    report = Report.load(out / "report.json")
    assert (report.pruned.parameters, report.model.dtype) == (model.num_parameters(), "float32")
    again = AutoModelForCausalLM.from_pretrained(out)
    assert again.generation_config.max_new_tokens == 7
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight
    assert AutoTokenizer.from_pretrained(out)("w5 w6", add_special_tokens=False)["input_ids"] == [5, 6]
    with torch.no_grad():
        torch.testing.assert_close(again(token_ids()).logits, model(token_ids()).logits)
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("change", [
    None, lambda model: model.to(torch.bfloat16), lambda model: model.lm_head.weight.data.zero_(),
])  # fmt: skip
def test_what_is_saved_is_what_was_measured_or_the_records_say_so(change, tmp_path, recwarn):
    pruner, out, said = StructPruner(config()), tmp_path / "out", "weights have changed since they were measured"
    model = pruner.prune_model(build("llama-untied"), tokenizer())
    if change is not None:
        change(model)
    pruner.save(model, out, tokenizer())
    write_report(out)
    report = Report.load(out / "report.json")
    size = report.pruned.bytes
    assert size == sum(tensor.nbytes for tensor in load_file(out / "model.safetensors").values())
    assert size == pruner.report.pruned.bytes or change is not None
    assert report.changed == (change is not None) and not pruner.report.changed
    warned = " ".join(str(warning.message) for warning in recwarn)
    for text in (warned, (out / "README.md").read_text(), (out / "report.html").read_text()):
        assert (said in text.lower()) == (change is not None)


def test_an_existing_result_is_refused_and_overwritten_on_request_and_a_link_stays_a_link(run, tmp_path):
    pruner, model = run
    out, link = tmp_path / "scratch" / "out", tmp_path / "link"
    out.mkdir(parents=True)
    link.symlink_to(out)
    pruner.save(model, link, tokenizer())
    with pytest.raises(StructPruneError, match="link exists and is not empty"):
        pruner.save(model, link)
    assert (out / "tokenizer.json").exists()
    (out / "tokenizer.json").unlink()
    pruner.save(model, link, overwrite=True)
    assert (out / "tokenizer.json").exists(), "the tokenizer of the run is the default"
    assert link.is_symlink() and (out / "config.json").is_file() and [*out.parent.iterdir()] == [out]


def test_code_that_is_not_there_is_not_named(run, tmp_path):
    pruner, model = run
    remote = {"AutoModel": "owner/name--modeling_x.X"}
    model.config.auto_map = {"AutoConfig": "configuration_x.Config", "AutoTokenizer": ["gone.Slow", None], **remote}
    try:
        pruner.save(model, tmp_path / "out")
        model.config.auto_map.pop("AutoModel")
        pruner.save(model, tmp_path / "none")
    finally:
        del model.config.auto_map
    assert json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"] == remote
    assert "auto_map" not in json.loads((tmp_path / "none" / "config.json").read_text())


def test_a_model_that_comes_back_different_is_not_saved(run, tmp_path, monkeypatch):
    pruner, model = run
    original = type(model).save_pretrained

    def damaged(self, folder):
        with torch.no_grad():
            weight = self.model.layers[0].mlp.down_proj.weight
            weight.mul_(2)
            original(self, folder)
            weight.div_(2)

    monkeypatch.setattr(type(model), "save_pretrained", damaged)
    with pytest.raises(StructPruneError, match="gives other outputs"):
        pruner.save(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_llama_marks_spaces_where_it_did(tmp_path):
    reader = LlamaTokenizer({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "▁": 4, "▁a": 5}, [("▁", "a")], legacy=True)
    pruner = StructPruner(StructPruneConfig(widths={"mlp": 24}))
    pruner.save(pruner.prune_model(build("llama-tied"), inputs={"ids": token_ids(8, 24)}), tmp_path / "out", reader)
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again("a</s>a").input_ids == reader("a</s>a").input_ids
    assert again.backend_tokenizer.to_str() == reader.backend_tokenizer.to_str()


def test_a_half_precision_model_with_its_own_attention_is_saved(tmp_path):
    model = build("llama-tied").to(torch.float16)
    model.set_attn_implementation("eager")
    pruner = StructPruner(config())
    pruned = pruner.prune_model(model, tokenizer()).train()
    with torch.device("meta"):  # as a GPU that the user has made the default one
        pruner.save(pruned, tmp_path / "out")
    assert pruned.training and pruned.config._attn_implementation == "eager"


def test_each_part_of_a_model_keeps_its_attention(tmp_path, monkeypatch):
    model = build("llava")
    model.set_attn_implementation({"": "sdpa", "text_config": "sdpa", "vision_config": "eager"})
    model.save_pretrained(tmp_path)
    loaded, load = [], type(model).from_pretrained

    def from_pretrained(*args, **settings):
        loaded.append(load(*args, **settings))
        return loaded[-1]

    monkeypatch.setattr(type(model), "from_pretrained", from_pretrained)
    check_reload(model, tmp_path)
    (again,) = loaded
    assert again.config.text_config._attn_implementation == "sdpa"
    assert again.config.vision_config._attn_implementation == "eager"


CONFIGS = ("preprocessor_config", "processor_config", "video_preprocessor_config", "chat_template")
CONFIGS += ("sentence_bert_config", "config_sentence_transformers", "1_Pooling/config")
WORDS = ("LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md", "labels.txt", "picture.png", "vocabulary.tiktoken")
SIDE = {
    **{f"{name}.json": "{}" for name in CONFIGS},
    **{name: f"the text of {name}" for name in WORDS},
    "modules.json": json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]),
    "2_Dense/model.safetensors": "weights of another module",
    "colbert_linear.pt": "a head of another library",
}
NAMED = ("onnx/model.onnx", "original/consolidated.pth", "modeling_odd.py")
STAYS = ("pytorch_model.bin", "flax_model.msgpack", "model.safetensors.index.json", "README.md", ".gitattributes")


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("copy_extra_files")
    build("llama-tied").save_pretrained(folder / "dense")
    put_into(folder / "dense", dict.fromkeys((*NAMED, *STAYS), "theirs") | SIDE)
    pruner = StructPruner(config(domains=[DomainConfig("a", documents(60))]))
    dense = AutoModelForCausalLM.from_pretrained(folder / "dense", use_safetensors=True)
    pruned = pruner.prune_model(dense, tokenizer())
    records, handler = [], logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("optimum_structprune.saving.save").addHandler(handler)
    pruner.save(pruned, folder / "out", tokenizer())
    return pruner, pruned, folder / "out", records


def test_every_kind_of_file_is_carried_or_named(result):
    _, _, out, records = result
    for name, text in SIDE.items():
        assert (out / name).read_text() == text, name
    (warned,) = records
    for name in ("modeling_odd.py", "onnx/", "original/"):
        assert name in warned and not (out / name).exists()
    assert not (out / "pytorch_model.bin").exists() and "theirs" not in (out / "README.md").read_text()


def test_what_was_carried_is_part_of_the_result(result):
    pruner, pruned, out, _ = result
    assert set(SIDE) <= set(written_files(out))
    pruner.save(pruned, out, tokenizer(), overwrite=True)
    assert (out / "LICENSE").is_file()
    again = AutoModelForCausalLM.from_pretrained(out)
    other = StructPruner(config(widths={"mlp": 16}, domains=[DomainConfig("a", documents(60))]))
    other.save(other.prune_model(again, tokenizer()), out.parent / "twice", tokenizer())
    assert (out.parent / "twice" / "1_Pooling" / "config.json").is_file(), "a result passes on what it was given"
    (out / "credentials.json").write_text("{}")
    (out / "speed.json").write_text("{}")
    copy_extra_files(again, out.parent / "carried", tokenizer())
    assert not {"credentials.json", "speed.json"} & contents(out.parent / "carried").keys()


def test_other_forms_of_the_vocabulary_stay_with_a_dense_one(tmp_path):
    forms = {"tokenizer.model", "vocab.json", "merges.txt", "vocabulary.tiktoken", "unigram.json"}
    for kind, size in (("dense", 96), ("same", 96), ("smaller", 64)):
        put_into(tmp_path / kind, {"config.json": json.dumps({"text_config": {"vocab_size": size}})})
    put_into(tmp_path / "dense", dict.fromkeys((*forms, "LICENSE", "normalizer.json"), "text"))
    for kind, reader, there in (("same", None, forms), ("smaller", WhisperTokenizer(), set())):
        copy_extra_files(SimpleNamespace(name_or_path=tmp_path / "dense"), tmp_path / kind, reader)
        names = {path.name for path in (tmp_path / kind).iterdir()}
        assert names & forms == there and names >= {"LICENSE", "normalizer.json"}


def test_what_cannot_be_copied_is_named_and_other_bytes_stay_as_they_are(tmp_path, caplog):
    source, out = tmp_path / "dense", tmp_path / "out"
    put_into(source, {"modules.json": SIDE["modules.json"], "1_Pooling/config.json": b"\xff\xfe\x00"})
    (source / "LICENSE").symlink_to("nowhere")
    os.mkfifo(source / "pipe.txt")
    copy_extra_files(SimpleNamespace(name_or_path=source, config=ViTConfig(hidden_size=32)), out, None)
    assert f"Not copied from {source}: LICENSE, pipe.txt." in caplog.text
    assert contents(out) == {"modules.json": SIDE["modules.json"].encode(), "1_Pooling/config.json": b"\xff\xfe\x00"}


def test_modules_around_a_narrower_model_are_told_or_named(tmp_path, caplog):
    source, out = tmp_path / "dense", tmp_path / "out"
    files = {
        "modules.json": SIDE["modules.json"],
        "1_Pooling/config.json": '{"word_embedding_dimension": 32, "pooling_mode_cls_token": true}',
        "2_Dense/config.json": '{"in_features": 32, "out_features": 8}',
        "2_Dense/model.safetensors": "32 x 8",
    }
    put_into(source, {**files, "sparse_linear.pt": "32"})
    for folder, hidden in ((source, 32), (out / "32", 32), (out / "24", 24)):
        ViTConfig(hidden_size=hidden).save_pretrained(folder)
    for hidden in (32, 24):
        model = SimpleNamespace(name_or_path=source, config=ViTConfig(hidden_size=hidden))
        copy_extra_files(model, out / str(hidden), None)
        assert ("fit them again: 2_Dense/model.safetensors" in caplog.text) is (hidden == 24)
        assert (out / str(hidden) / "sparse_linear.pt").exists() is (hidden == 32)
        assert (f"Not copied from {source}: sparse_linear.pt" in caplog.text) is (hidden == 24)
        for name, text in files.items():
            changed = text.replace("32", str(hidden)) if "Pooling" in name else text
            assert (out / str(hidden) / name).read_text() == changed


def test_modules_that_read_tokens_are_told_how_many_there_are_and_by_which_ids(tmp_path):
    model = build("bert")
    model.save_pretrained(tmp_path / "dense")
    files = {
        "modules.json": json.dumps([{"path": ""}, {"path": "1_SpladePooling"}, {"path": "2_MultiVectorMask"}]),
        "1_SpladePooling/config.json": '{"pooling_strategy": "max", "word_embedding_dimension": 96}',
        "2_MultiVectorMask/config.json": '{"skiplist_words": [], "keep_only_token_ids": [\n  2,\n  80, 95\n ]}',
    }
    put_into(tmp_path / "dense", files)
    model.config.vocab_size, model.name_or_path = 64, str(tmp_path / "dense")
    model.config.save_pretrained(tmp_path / "out")
    copy_extra_files(model, tmp_path / "out", None, kept_tokens=(*range(62), 80, 95))
    splade, mask = (json.loads((tmp_path / "out" / name).read_text()) for name in [*files][1:])
    assert splade == {"pooling_strategy": "max", "word_embedding_dimension": 64}
    assert mask == {"skiplist_words": [], "keep_only_token_ids": [2, 62, 63]}


# --- what transformers 4 reads of a result, and transformers 5 still; `tests/test_transformers_4.py` runs a real one
LLAMA_3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LONG = {"short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0], "original_max_position_embeddings": 4096}
SCALED = {
    "llama-tied": {**LLAMA_3, "rope_type": "llama3", "rope_theta": 5e5},
    "phi3": {**LONG, "rope_type": "longrope", "type": "longrope", "rope_theta": 2e4, "partial_rotary_factor": 1.0},
}


@pytest.mark.parametrize(("case", "rope"), [*((case, {}) for case in [*CASES, *OTHERS]), *SCALED.items()])
def test_transformers_5_reads_the_same_config(case, rope, tmp_path):
    _, model_type, fields = described(case)
    config = AutoConfig.for_model(model_type, **deepcopy(fields), **({"rope_parameters": rope} if rope else {}))
    config.save_pretrained(tmp_path)
    settle(tmp_path / "config.json", type(config))
    fields = json.loads((tmp_path / "config.json").read_text())
    again, known = AutoConfig.from_pretrained(tmp_path).to_dict(), config.to_dict()
    of_this_folder = {"_name_or_path": "", "dtype": again["dtype"]}
    assert again | known | of_this_folder == again | of_this_folder
    # Gemma 4 is not known to transformers 4, and its class in transformers 5 would keep keys of it.
    if "rope_parameters" in fields and not case.startswith("gemma4_text"):
        assert {"rope_theta", "rotary_emb_base", "global_rope_theta"} & fields.keys()


def test_transformers_4_knows_the_tokenizer_and_no_machine_is_named(tmp_path):
    reader = tokenizer()
    reader.add_special_tokens({"extra_special_tokens": ["w7", "w8"]})
    reader.init_kwargs |= {"is_local": True, "local_files_only": True}
    reader.save_pretrained(tmp_path)
    settle(tmp_path / "tokenizer_config.json", type(AutoConfig.for_model("llama")))
    fields = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert fields["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"is_local", "local_files_only"} & fields.keys()
    # transformers 4 takes none but names for `extra_special_tokens`, and ends with an error where they are a list
    assert fields["additional_special_tokens"] == ["w7", "w8"] and "extra_special_tokens" not in fields
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is type(reader) and again.extra_special_tokens == ["w7", "w8"]
    assert again.backend_tokenizer.to_str() == reader.backend_tokenizer.to_str()
    assert again.special_tokens_map == reader.special_tokens_map


# --- a record belongs to what it describes: plans, reports and manifests to their model
def test_every_model_is_saved_with_the_records_of_its_own_run(tmp_path):
    dense, runs = [build("llama-tied", seed) for seed in (0, 1)], []
    pruners = [StructPruner(config(refit="none", **of)) for of in ({}, {"domains": [DomainConfig("c", documents())]})]
    for model, pruner in product(dense, pruners):
        runs.append((model, pruner.prune(model, tokenizer())))
    for number in (1, 3, 0, 2):
        model, result = runs[number]
        folder = tmp_path / str(number)
        result.save(folder)
        saved = json.loads((folder / "report.json").read_text())
        assert saved["domains"] == json.loads(json.dumps(result.report.to_dict()["domains"]))
        assert Manifest.load(folder) == result.manifest
        plan = Plan.load(folder / PLAN_NAME)
        assert same_weights(without_refit(model, plan), result.model) and plan.sizes["mlp"] == 40
        for other, other_result in runs:
            assert (plan.dense == fingerprint(other)) == (other is model)
            assert plan.dense != fingerprint(other_result.model)
    result.save(tmp_path / "copy", model=deepcopy(result.model))
    assert Plan.load(tmp_path / "copy" / PLAN_NAME) == Plan.load(folder / PLAN_NAME)
    # The plan of a second pruning is for the once pruned model, and both together for the dense one.
    second = prune(result.model, config(widths={"mlp": 12}), tokenizer())
    assert second.plan.dense == fingerprint(result.model) and second.plan.sizes["mlp"] == 24
    assert plan.then(second.plan).dense == fingerprint(model)


def test_a_model_of_another_run_is_not_saved(tmp_path):
    pruner, dense = StructPruner(config(refit="none")), build("llama-tied")
    first = pruner.prune_model(dense, tokenizer())
    last = pruner.prune_model(dense, tokenizer())
    assert pruner.result.model is last
    for saver, other in ((pruner, dense), (pruner, first), (pruner, deepcopy(last)), (StructPruner(config()), last)):
        with pytest.raises(StructPruneError, match="is not the model that prune_model returned last"):
            saver.save(other, tmp_path / "out")
    with pytest.raises(StructPruneError, match="does not have the shapes of the pruned model"):
        pruner.result.save(tmp_path / "out", model=dense)
    assert not list(tmp_path.iterdir())


def test_nothing_is_hung_on_the_model_but_its_text():
    dense, before = build("llama-tied"), {*vars(build("llama-tied"))}
    result = prune(dense, config(), tokenizer())
    assert {*vars(result.model)} - before == {"text_record"}


@pytest.mark.slow
def test_text_that_was_trained_on_is_not_unseen_and_what_the_page_says_repeats_all_of_it(tmp_path, monkeypatch):
    save_desk(tmp_path, count=200)
    for name, seed in (("b", 7), ("c", 9)):
        write_texts(tmp_path / f"{name}.jsonl", documents(200, seed))
    training = ["--recovery", "tokens=480", "--recovery", f"domains=[{{name: b, source: {tmp_path / 'b.jsonl'}}}]"]
    line = f"prune {tmp_path / 'model'} {tmp_path / 'out'} --width mlp=24 --domain a={tmp_path / 'a.jsonl'}"
    assert main([*f"{line} --seq-length 24 --num-samples 6 --device cpu".split(), *training]) == 0
    domains = [DomainConfig(name, str(tmp_path / f"{file}.jsonl")) for name, file in (("other", "b"), ("new", "c"))]
    with pytest.warns(UserWarning, match="documents were trained on, in the training domain 'b'"):
        found = evaluate(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), tokenizer(), domains, seq_length=24)
    assert found.shared == ["other"]
    page, card = ((tmp_path / "out" / name).read_text() for name in ("report.html", "README.md"))
    lines = re.findall(r"structprune (?:prune|recover) [^\n<]*", unescape(page))
    assert len(lines) == 2
    monkeypatch.chdir(tmp_path)  # the page has names of folders, and no paths of this machine
    for line in lines:
        assert main([*split(line)[1:], "--device", "cpu"]) == 0
    first, again = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("out", "out-again"))
    assert same_weights(first, again)
    assert "output_dir" not in (tmp_path / "out" / "recovery_config.json").read_text()
    assert "No held-out document was used for anything else." in card
    assert "| b " in card.split("## Recovery")[1].split("## Limits")[0]
    # The card says it for whoever stands in its folder.
    commands = re.search(r"```bash\n(.*?)\n```", card, re.DOTALL)[1].splitlines()[:-1]
    assert len(commands) == 2 and str(tmp_path) not in "".join(commands)
    monkeypatch.chdir(tmp_path / "out")
    for file in ("a.jsonl", "b.jsonl"):
        shutil.copy(tmp_path / file, file)
    for line in commands:
        assert main([str(tmp_path / "model") if word == "model" else word for word in split(line)[1:]]) == 0
    assert same_weights(first, AutoModelForCausalLM.from_pretrained("again"))
