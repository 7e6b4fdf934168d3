"""Tokens go from any model that embeds them, whether or not its layers are described."""

import json
from dataclasses import replace
from itertools import islice

import pytest
import torch
import transformers
from helpers import assert_remembers_its_own_config, error_line, put_into, same_weights, save_with_tokenizer, with_long
from models import (
    BART,
    CASES,
    GROUPED,
    OTHER_STRUCTURES,
    OTHERS,
    PATCHES,
    PLAIN,
    SLIDING,
    STRUCTURES,
    T5,
    TOKENS,
    VOCAB,
    build,
    config,
    fewer_tokens,
    random_model,
    real_text_model,
)
from quantized import Packed, Quantizer, quantized
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from optimum_structprune import DomainConfig, StructPruneError, StructPruner, dry_run
from optimum_structprune.arch.load import ModelInfo, describe
from optimum_structprune.arch.meta import model_class
from optimum_structprune.arch.modules import PROMPTS, TASK
from optimum_structprune.arch.token_space import named_ids
from optimum_structprune.commands.cli import main
from optimum_structprune.domains.sources import builtin_documents
from optimum_structprune.forward.metrics import outputs_of
from optimum_structprune.method.layers import run_model
from optimum_structprune.steps.resize import drop_tokens_
from optimum_structprune.vocabulary.choose import VocabularyRequest
from optimum_structprune.vocabulary.languages import CHOOSING, texts
from optimum_structprune.vocabulary.token_alignment import TokenAlignment


READER = real_text_model()[1]
EMBEDDING_GEMMA = {**GROUPED, **SLIDING, "query_pre_attn_scalar": 4, "use_bidirectional_attention": True}
# The class of a model, its type, and the fields of its config.
MODELS = [
    ("MPNetForMaskedLM", "mpnet", PLAIN),
    ("AlbertModel", "albert", {**PLAIN, "embedding_size": 16}),
    ("BertForSequenceClassification", "bert", PLAIN),
    ("XLMRobertaModel", "xlm-roberta", PLAIN),
    ("T5EncoderModel", "t5", T5),
    ("MT5ForConditionalGeneration", "mt5", T5),
    ("MBartForConditionalGeneration", "mbart", BART),
    ("M2M100ForConditionalGeneration", "m2m_100", BART),
    ("PegasusForConditionalGeneration", "pegasus", BART),
    ("BartForCausalLM", "bart", BART),
    ("Gemma3TextModel", "gemma3_text", EMBEDDING_GEMMA),
    ("Qwen3Model", "qwen3", GROUPED),
    ("LlamaForSequenceClassification", "llama", {**GROUPED, "num_labels": 3}),
]
WHISPER = {**BART, "num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 256}
WHISPER |= {"max_position_embeddings": None}  # which BART names its positions by
TOWERS = {
    "text_config": {**TOKENS, **PLAIN, "projection_size": 16, "vocab_size": 400, "max_position_embeddings": 48},
    "projection_dim": 8,
}
SEEN = {**TOWERS, "vision_config": PATCHES}
# The same for models that read more than text, with the shape of what they read beside it.
READ_MORE = [
    ("WhisperForConditionalGeneration", "whisper", WHISPER, {"input_features": (1, 8, 24)}),
    ("CLIPModel", "clip", SEEN, {"pixel_values": (1, 3, 8, 8)}),
    ("BlipForConditionalGeneration", "blip", SEEN, {"pixel_values": (1, 3, 8, 8)}),
]


def model_of(name, model_type, fields):
    sizes = {**TOKENS, **fields, "vocab_size": 400, "max_position_embeddings": 256}
    return random_model(getattr(transformers, name), model_type, sizes)


def outputs(model, ids, beside):
    """What a model makes of tokens; of those that its decoder reads where something else is read beside them."""
    both = model.config.is_encoder_decoder
    inputs = {"decoder_input_ids": ids} if both else {}
    return model(**beside, **inputs, **({} if both and beside else {"input_ids": ids}))


@pytest.mark.parametrize(("name", "model_type", "fields", "shapes"), [*((*of, {}) for of in MODELS), *READ_MORE])
@torch.no_grad()
def test_kept_tokens_give_what_they_gave_and_the_folder_loads_as_the_class(name, model_type, fields, shapes, tmp_path):
    model = model_of(name, model_type, fields)
    model.save_pretrained(tmp_path / "dense")  # transformers sets some rows of paddings to 0 when it loads
    model = type(model).from_pretrained(tmp_path / "dense").eval()
    pruner = StructPruner(fewer_tokens())
    pruner.save(pruner.prune_model(model, READER), tmp_path / "small")
    again = model_class(AutoConfig.from_pretrained(tmp_path / "small")).from_pretrained(tmp_path / "small").eval()
    assert again.config.get_text_config().vocab_size == 320 and type(again) is type(model)
    beside = {kind: torch.randn(shape) for kind, shape in shapes.items()}
    keep = torch.tensor(pruner.plan.keep[-1, "vocab"])
    ids = pruner.tokenizer("The sum of 17 and 25 is 42, of course.", return_tensors="pt")["input_ids"]
    dense, small = outputs(model, keep[ids], beside), outputs(again, ids, beside)
    name = next(name for name in ("logits", "logits_per_image", "last_hidden_state") if name in dense)
    torch.testing.assert_close(small[name], dense[name][..., keep] if dense[name].shape[-1] == 400 else dense[name])
    if shapes:
        assert ("No loss was measured, because the model reads more" in str(pruner.report)) == (name == "logits")


@pytest.mark.slow
def test_whisper_is_trimmed_by_a_command_and_writes_what_it_wrote(tmp_path, capsys):
    _, reader = real_text_model(900)
    reader.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|de|>", "<|transcribe|>", "<|notimes|>"]})
    start, german, task, no_times = range(900, 904)
    fields = {**TOKENS, **WHISPER, "vocab_size": 904, "decoder_start_token_id": start, "begin_suppress_tokens": None}
    model = random_model(transformers.WhisperForConditionalGeneration, "whisper", fields)
    vars(model.generation_config).update(
        **{"_from_model_config": False, "is_multilingual": True, "lang_to_id": {"<|de|>": german}},
        **{"task_to_id": {"transcribe": task}, "no_timestamps_token_id": no_times, "alignment_heads": [[0, 1]]},
        **{"suppress_tokens": [5, 300], "begin_suppress_tokens": [220, 2], "max_length": 20},
    )
    dense, folder = tmp_path / "dense", tmp_path / "small"
    save_with_tokenizer(model, dense, reader)
    assert main(f"prune {dense} {folder} --target vocab --budget parameters=0.8 --languages en,de".split()) == 0
    assert main(["inspect", str(dense)]) == 0 and " layers, " not in capsys.readouterr().out, "they are not described"
    card = (folder / "README.md").read_text()
    assert "structprune prune ORIGINAL again" in card
    assert "structprune evaluate" not in card and "in the layers" not in card
    assert main(f"evaluate {folder} --against {dense} --text builtin:prose --seq-length 24".split()) == 2
    assert "reads input_features, and only models of text can be evaluated" in capsys.readouterr().err
    again, smaller = type(model).from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    keep = json.loads((folder / "pruning_plan.json").read_text())["keep"]["vocab"]["-1"]
    new, settings = {old: number for number, old in enumerate(keep)}, again.generation_config
    assert len(smaller) == len(keep) < 904 and settings.alignment_heads == [[0, 1]]
    assert settings.lang_to_id == {"<|de|>": new[german]} and settings.no_timestamps_token_id == new[no_times]
    features, gone = torch.randn(1, 8, 24), [token for token in range(904) if token not in new]
    model.generation_config.suppress_tokens += gone
    asked = {"language": "de", "task": "transcribe", "max_new_tokens": 6}
    written, expected = again.generate(features, **asked), model.generate(features, **asked)
    assert torch.equal(torch.tensor(keep)[written], expected)


def packed_model():
    """A quantized model, whose packed layers hold bytes of another shape, as those of bitsandbytes do."""
    model = quantized(Quantizer(), model_of("LlamaForCausalLM", "llama", {**GROUPED, "tie_word_embeddings": False}))
    for layer in model.model.layers:
        up = layer.mlp.up_proj
        plain = up.weight.detach().clone()
        up.weight = nn.Parameter(torch.zeros(7, 1, dtype=torch.uint8), requires_grad=False)
        up.forward = lambda x, plain=plain: nn.functional.linear(x, plain)
    return model


@pytest.mark.parametrize("inplace", [False, True])
@torch.no_grad()
def test_tokens_go_from_a_quantized_model_as_it_is(inplace):
    model, ids = packed_model(), torch.randint(0, 320, (2, 12))
    pruner = StructPruner(fewer_tokens())
    small = pruner.prune_model(model, READER, inplace=inplace)
    keep = torch.tensor(pruner.plan.keep[-1, "vocab"])
    assert (small is model) == inplace and type(small.model.layers[0].mlp.up_proj) is Packed
    assert small.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8 and small.config.vocab_size == 320
    assert small.lm_head.weight.shape[0] == small.model.embed_tokens.weight.shape[0] == 320
    torch.testing.assert_close(small(ids).logits, packed_model()(keep[ids]).logits[..., keep])
    assert pruner.report.domains


@pytest.mark.nightly
@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
@torch.no_grad()
def test_what_bitsandbytes_has_packed_is_saved_and_loads_as_it_was(bits, tmp_path, monkeypatch):
    modules = pytest.importorskip("bitsandbytes.nn.modules", reason="no bitsandbytes")
    # Its packing for CPUs of this kind is not undone right when a model is saved.
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: False)
    fields = {**GROUPED, "hidden_size": 128, "intermediate_size": 128, "head_dim": 16}
    model_of("LlamaForCausalLM", "llama", fields).save_pretrained(tmp_path / "plain")
    recipe = transformers.BitsAndBytesConfig(**{bits: True})
    AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=recipe).save_pretrained(
        tmp_path / "q"
    )
    model, pruner = AutoModelForCausalLM.from_pretrained(tmp_path / "q"), StructPruner(fewer_tokens())
    pruner.save(pruner.prune_model(model, READER), tmp_path / "small")
    again, keep = AutoModelForCausalLM.from_pretrained(tmp_path / "small"), torch.tensor(pruner.plan.keep[-1, "vocab"])
    assert type(again.model.layers[0].mlp.up_proj) is type(model.model.layers[0].mlp.up_proj) is not nn.Linear
    ids = torch.randint(0, 320, (2, 12))
    torch.testing.assert_close(again(ids).logits, model(keep[ids]).logits[..., keep])


def test_a_head_that_is_packed_is_unpacked_first_or_refused():
    model = packed_model()
    model.lm_head.weight = nn.Parameter(torch.zeros(400, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(StructPruneError, match="quantized with gptq, which transformers cannot undo"):
        StructPruner(fewer_tokens()).prune_model(model, READER)


def test_code_of_a_models_own_is_refused_with_the_flag_that_runs_it(tmp_path, capsys):
    code = {"AutoConfig": "configuration.NewConfig", "AutoModel": "modeling.NewModel"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "new", "auto_map": code}))
    for command in (f"prune {tmp_path} {tmp_path / 'small'}", f"plan {tmp_path}"):
        assert main([*command.split(), "--width", "vocab=320"]) != 0
        assert "runs code of its own. Read it, and pass --trust-remote-code." in error_line(capsys)


def test_other_spaces_take_a_description():
    model = model_of("MPNetModel", "mpnet", PLAIN)
    assert describe(model).offered == ("vocab",)
    with pytest.raises(StructPruneError, match="no space 'mlp' to prune: The model type 'mpnet' is not described"):
        StructPruner(fewer_tokens(widths={"mlp": 24})).prune_model(model, READER)
    model.config.architectures = ["MPNetModel"]
    assert dry_run(model.config, fewer_tokens()).widths == {"vocab": 320}


def test_what_sentence_transformers_reads_is_loaded_and_what_it_names_or_writes_stays(tmp_path):
    dense, scores = tmp_path / "dense", "1_LogitScore/config.json"
    model_of("Qwen3ForCausalLM", "qwen3", {**GROUPED, "tie_word_embeddings": False}).save_pretrained(dense)
    assert model_class(AutoConfig.from_pretrained(dense)) is AutoModelForCausalLM
    put_into(dense, {"modules.json": '[{"path": ""}, {"path": "1_LogitScore"}]'})
    assert model_class(AutoConfig.from_pretrained(dense)) is transformers.AutoModel
    prompts = {"query": READER.decode([390, 392, 394]), "document": ""}
    put_into(dense, {TASK: '{"transformer_task": "text-generation"}', PROMPTS: json.dumps({"prompts": prompts})})
    put_into(dense, {scores: '{"true_token_id": 397, "false_token_id": 399}'})
    kind, pruner = model_class(AutoConfig.from_pretrained(dense)), StructPruner(fewer_tokens())
    assert kind is AutoModelForCausalLM, "a reranker reads the logits of its head"
    pruner.save(pruner.prune_model(kind.from_pretrained(dense), READER), tmp_path / "small")
    keep, named = pruner.plan.keep[-1, "vocab"], json.loads((tmp_path / "small" / scores).read_text())
    assert [keep[named[name]] for name in ("true_token_id", "false_token_id")] == [397, 399]
    assert {*keep}.issuperset(READER(prompts["query"]).input_ids)


def test_a_checkpoint_without_the_pooler_that_nobody_reads_loads(tmp_path):
    model = transformers.BertModel(model_of("BertModel", "bert", PLAIN).config, add_pooling_layer=False)
    save_with_tokenizer(model, tmp_path / "dense", READER)
    command = f"prune {tmp_path / 'dense'} {tmp_path / 'small'} --width vocab=320 --num-samples 8 --seq-length 48"
    assert main(command.split()) == 0
    assert transformers.BertModel.from_pretrained(tmp_path / "small").config.vocab_size == 320


# --- translators keep the tokens of their languages, and begin with the one that they are told to
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
SIZES = {**BART, **TOKENS, "max_position_embeddings": 256}
SIZES |= {"bos_token_id": 0, "pad_token_id": 1, "decoder_start_token_id": 2}


def trained(model, trainer, read=None):
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.train_from_iterator(read or islice(builtin_documents("prose"), 50), trainer)
    return backend


def merged(read=None):
    backend = trained(models.BPE(unk_token="<unk>"), trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL), read)
    merges = [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    return {"vocab": backend.get_vocab(), "merges": merges}


def scored(read=None, special=SPECIAL):
    trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=special, unk_token="<unk>")
    backend = trained(models.Unigram(), trainer, read)
    return {"vocab": [tuple(pair) for pair in json.loads(backend.to_str())["model"]["vocab"]]}


def fifty():
    return scored(special=["<unk>", "<s>", "</s>"])


M2M, MBART = transformers.M2M100ForConditionalGeneration, transformers.MBartForConditionalGeneration
# The class of a tokenizer, what it is made of, the class of a model and its type, and two languages.
KINDS = {
    "nllb": (transformers.NllbTokenizer, merged, M2M, "m2m_100", ("eng_Latn", "deu_Latn")),
    "mbart": (transformers.MBartTokenizer, scored, MBART, "mbart", ("en_XX", "de_DE")),
    "mbart50": (transformers.MBart50Tokenizer, fifty, MBART, "mbart", ("en_XX", "de_DE")),
}


@torch.no_grad()
def assert_same(model, again, ids, keep, forced):
    """What both write is the same, if the dense model writes tokens that stay."""
    gone = [token for token in range(model.config.vocab_size) if token not in keep]
    limits = {"max_new_tokens": 6, "do_sample": False, "num_beams": 1}
    dense = model.generate(torch.tensor(keep)[ids], suppress_tokens=gone, forced_bos_token_id=forced, **limits)
    small = again.generate(ids, forced_bos_token_id=keep.index(forced), **limits)
    assert torch.equal(torch.tensor(keep)[small], dense) and keep.index(forced) in small


@pytest.mark.parametrize("kind", with_long(KINDS, ["nllb"]))
def test_languages_stay_and_a_translation_begins_with_the_one_that_is_forced(kind, tmp_path):
    tokenizer, made_of, cls, model_type, (source, target) = KINDS[kind]
    reader = tokenizer(**made_of(), src_lang=source, tgt_lang=target)
    model = random_model(cls, model_type, {**SIZES, "vocab_size": len(reader)})
    forced = reader.convert_tokens_to_ids(target)
    model.generation_config.forced_bos_token_id = forced
    prose = [DomainConfig(name="prose", source="builtin:prose")]
    pruner = StructPruner(config(domains=prose, widths={"vocab": len(reader) - 80}, seq_length=48))
    pruner.save(pruner.prune_model(model, reader), tmp_path)
    again = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    smaller, keep = AutoTokenizer.from_pretrained(tmp_path), [*pruner.plan.keep[-1, "vocab"]]
    assert type(smaller) is type(reader) and len(smaller) == len(keep) == len(reader) - 80
    for code in (source, target, reader.mask_token):
        assert keep[smaller.convert_tokens_to_ids(code)] == reader.convert_tokens_to_ids(code)
    assert keep[again.generation_config.forced_bos_token_id] == forced
    assert keep[again.config.decoder_start_token_id] == 2
    ids = smaller("The sun had set, and they walked home.", return_tensors="pt")["input_ids"]
    assert smaller.convert_tokens_to_ids(source) in ids
    assert smaller.decode(ids[0]) == reader.decode(torch.tensor(keep)[ids[0]])
    assert_same(model, again, ids, keep, forced)


@pytest.mark.parametrize("kind", with_long(["nllb", "mbart"], ["mbart"]))
@pytest.mark.parametrize("shown", [False, True], ids=["named alone", "shown by text"])
def test_letters_of_scripts_that_are_neither_named_nor_in_the_text_go_first(kind, shown, tmp_path):
    tokenizer, made_of, cls, model_type, (source, target) = KINDS[kind]
    reader = tokenizer(**made_of([texts()[code] for code in ("en", "ru", "el")]), src_lang=source, tgt_lang=target)
    read = [f"{texts(CHOOSING)[code]} {n}" for n in range(40) for code in ("en", "ru")[: 1 + shown]]
    model = random_model(cls, model_type, {**SIZES, "vocab_size": len(reader)})
    asked = config(domains=[DomainConfig("a", read)], languages=["en"], widths={"vocab": len(reader)})
    fewest = VocabularyRequest.of(asked, ModelInfo.of(model), reader, asked.widths).allowed.start
    pruner = StructPruner(replace(asked, widths={"vocab": fewest + 80}))
    small = pruner.prune_model(model, reader)
    smaller, remarks = pruner.tokenizer, str(pruner.report)
    unknown = {code: reader.unk_token_id in smaller(texts()[code]).input_ids for code in ("en", "ru", "el")}
    assert unknown == {"en": False, "ru": not shown, "el": True}
    greek = reader(texts()["el"]).input_ids
    spelled = TokenAlignment.between(model, reader, small, smaller).align(greek, [True] * len(greek))
    assert smaller.unk_token_id in {part for part, *_ in spelled}
    lines = [line for line in remarks.splitlines() if line.startswith("Letters that can no longer be spelled")]
    assert "Greek" in lines[0] and ("Cyrillic" in lines[0]) == (not shown)


# --- in every family: the model computes for the tokens that stay what it did
KEEP = (0, 1, 2, *range(5, 60, 2), 70, 71, 95)
FIRST = {"llama-untied", *STRUCTURES, *OTHER_STRUCTURES, "bert", "t5", "gemma3", "gemma4_text", "roberta", "phi"}
READ = {*CASES, *OTHERS} - {"vit", "zamba2"}  # pictures have no tokens, and the tokens of zamba2 stay
READ = [pytest.param(case, marks=[] if case in FIRST else pytest.mark.nightly) for case in sorted(READ)]
# What is not a matrix of rows tied to the embedding: a head of its own, biases, a second embedding.
PER_TOKEN = {"llama-untied": 2 * 32, "phi": 2 * 32 + 1, "bert": 32 + 1, "bart": 32, "gemma4_text": 32 + 16, "t5": 32}


@torch.no_grad()
def same_outputs(model, small, keep, atol=0.0):
    """On text whose tokens all stay."""
    new = torch.randint(len(keep), (2, 12), generator=torch.Generator().manual_seed(1))
    dense = outputs_of(run_model(model, torch.tensor(keep)[new]))
    dense = dense[..., keep] if dense.shape[-1] == VOCAB else dense
    torch.testing.assert_close(outputs_of(run_model(small, new)), dense, atol=atol, rtol=0)


@pytest.mark.parametrize("case", READ)
def test_what_stays_is_computed_as_before_and_reloads(case, tmp_path):
    model, small = build(case), build(case)
    keep = sorted({*KEEP} | named_ids(model) & {*range(VOCAB)})
    drop_tokens_(small, describe(small), keep)
    same_outputs(model, small, keep)
    assert_remembers_its_own_config(small)
    space, left = describe(model).of("vocab")[0], describe(small).of("vocab")[0]
    assert (space.size, left.size) == (VOCAB, len(keep)) and left.unit_params == space.unit_params
    assert model.num_parameters() - small.num_parameters() == space.unit_params * (VOCAB - len(keep))
    assert space.unit_params == PER_TOKEN.get(case, space.unit_params)
    small.save_pretrained(tmp_path)
    same_outputs(model, type(model).from_pretrained(tmp_path), keep, 1e-6)


def test_ids_in_configs_within_a_config_are_numbered_anew():
    assert not describe(build("vit")).of("vocab"), "a model without tokens has no vocabulary"
    new, images = {old: place for place, old in enumerate(KEEP)}, build("llava")
    images.config.image_token_index = images.config.text_config.pad_token_id = 71
    images.config.vision_config.image_patch_id = 70
    images.generation_config.lang_to_id = {"<|de|>": 70}
    # As mBART has them for a task, and ColQwen2 those of the model inside it.
    images.config.task_specific_params = {"translation": {"decoder_start_token_id": 71, "max_length": 70}}
    images.config.vlm_config = AutoConfig.for_model("llava", image_token_index=70, vocab_size=VOCAB)
    drop_tokens_(images, describe(images), KEEP)
    assert images.generation_config.lang_to_id == {"<|de|>": new[70]}
    assert images.config.task_specific_params["translation"] == {"decoder_start_token_id": new[71], "max_length": 70}
    assert images.config.vlm_config.image_token_index == new[70]
    assert images.config.image_token_index == new[71] == images.config.text_config.pad_token_id
    assert images.config.vision_config.image_patch_id == new[70] and images.config.text_config.vocab_size == len(KEEP)


def test_a_token_that_a_config_names_is_never_taken_for_another():
    model = build("llama-tied")
    model.generation_config.suppress_tokens = [5, 94]
    with pytest.raises(
        StructPruneError, match="`suppress_tokens` of the GenerationConfig names the token 94, .* 34 kept"
    ):
        drop_tokens_(model, describe(model), KEEP)
    assert model.config.vocab_size == VOCAB and model.generation_config.suppress_tokens == [5, 94]
    assert same_weights(model, build("llama-tied"))
