"""Vocabulary trimming of any model that embeds tokens, whether or not its layers are described."""

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
from optimum_structprune.arch.inference import outputs_of
from optimum_structprune.arch.load import ModelInfo, describe
from optimum_structprune.arch.meta import model_class
from optimum_structprune.arch.modules import PROMPTS, TASK
from optimum_structprune.arch.token_space import named_ids
from optimum_structprune.commands.cli import main
from optimum_structprune.domains.languages import CHOOSING, texts
from optimum_structprune.domains.sources import builtin_documents
from optimum_structprune.method.layers import run_model
from optimum_structprune.method.resize import drop_tokens_
from optimum_structprune.vocabulary.choose import VocabularyRequest
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
WHISPER |= {"max_position_embeddings": None}  # a field of BART that Whisper does not have
TOWERS = {
    "text_config": {**TOKENS, **PLAIN, "projection_size": 16, "vocab_size": 400, "max_position_embeddings": 48},
    "projection_dim": 8,
}
SEEN = {**TOWERS, "vision_config": PATCHES}
# The same fields for models that also read sound or images, and the shapes of these inputs.
MULTIMODAL = [
    ("WhisperForConditionalGeneration", "whisper", WHISPER, {"input_features": (1, 8, 24)}),
    ("CLIPModel", "clip", SEEN, {"pixel_values": (1, 3, 8, 8)}),
    ("BlipForConditionalGeneration", "blip", SEEN, {"pixel_values": (1, 3, 8, 8)}),
]


def model_of(name, model_type, fields):
    sizes = TOKENS | fields | {"vocab_size": 400, "max_position_embeddings": 256}
    return random_model(getattr(transformers, name), model_type, sizes)


def outputs(model, ids, extra_inputs):
    """Return the outputs for tokens and extra inputs.

    The decoder alone reads the tokens if an encoder reads the extra inputs.
    """
    inputs = dict(extra_inputs)
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    if not (model.config.is_encoder_decoder and extra_inputs):
        inputs["input_ids"] = ids
    return model(**inputs)


# The types of the fast tests: an encoder, a decoder with a classifier, and an encoder-decoder.
SHORT_TYPES = {"bert", "llama", "t5"}
TRIMMED_MODELS = []
for name, model_type, fields in MODELS:
    marks = () if model_type in SHORT_TYPES else pytest.mark.slow
    TRIMMED_MODELS.append(pytest.param(name, model_type, fields, {}, marks=marks))
for case in MULTIMODAL:
    TRIMMED_MODELS.append(pytest.param(*case, marks=pytest.mark.slow))


@pytest.mark.parametrize(("name", "model_type", "fields", "shapes"), TRIMMED_MODELS)
@torch.no_grad()
def test_a_trimmed_model_reloads_and_predicts_kept_tokens_as_before(name, model_type, fields, shapes, tmp_path):
    model = model_of(name, model_type, fields)
    model.save_pretrained(tmp_path / "original")  # transformers sets some rows of paddings to 0 when it loads
    model = type(model).from_pretrained(tmp_path / "original").eval()

    pruner = StructPruner(fewer_tokens())
    pruner.save(pruner.prune_model(model, READER), tmp_path / "small")
    reloaded = model_class(AutoConfig.from_pretrained(tmp_path / "small")).from_pretrained(tmp_path / "small").eval()
    assert reloaded.config.get_text_config().vocab_size == 320
    assert type(reloaded) is type(model)

    extra_inputs = {kind: torch.randn(shape) for kind, shape in shapes.items()}
    keep = torch.tensor(pruner.result.plan.keep[-1, "vocab"])
    ids = pruner.result.tokenizer("The sum of 17 and 25 is 42, of course.", return_tensors="pt")["input_ids"]
    original = outputs(model, keep[ids], extra_inputs)
    small = outputs(reloaded, ids, extra_inputs)

    output = next(name for name in ("logits", "logits_per_image", "last_hidden_state") if name in original)
    expected = original[output]
    if expected.shape[-1] == 400:
        expected = expected[..., keep]
    torch.testing.assert_close(small[output], expected)

    if shapes:
        has_remark = "No loss was measured, because the model reads more" in str(pruner.result.report)
        assert has_remark == (output == "logits")


def trim_whisper(original, small):
    """Save a Whisper model in one folder, trim it into another on the command line, and return the original model."""
    _, reader = real_text_model(900)
    reader.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|de|>", "<|transcribe|>", "<|notimes|>"]})
    start, german, task, no_times = range(900, 904)
    sizes = TOKENS | WHISPER | {"vocab_size": 904, "decoder_start_token_id": start, "begin_suppress_tokens": None}
    model = random_model(transformers.WhisperForConditionalGeneration, "whisper", sizes)
    vars(model.generation_config).update(
        _from_model_config=False,
        is_multilingual=True,
        lang_to_id={"<|de|>": german},
        task_to_id={"transcribe": task},
        no_timestamps_token_id=no_times,
        alignment_heads=[[0, 1]],
        suppress_tokens=[5, 300],
        begin_suppress_tokens=[220, 2],
        max_length=20,
    )

    save_with_tokenizer(model, original, reader)
    command = f"prune {original} {small} --target vocab --budget parameters=0.8 --languages en,de"
    assert main(command.split()) == 0
    return model


@pytest.mark.slow
def test_a_trimmed_whisper_writes_the_same_text(tmp_path):
    folder = tmp_path / "small"
    model = trim_whisper(tmp_path / "original", folder)
    german, _, no_times = range(901, 904)
    reloaded = type(model).from_pretrained(folder)
    reader = AutoTokenizer.from_pretrained(folder)
    keep = json.loads((folder / "pruning_plan.json").read_text())["keep"]["vocab"]["-1"]
    new_ids = {old: new for new, old in enumerate(keep)}
    assert len(reader) == len(keep)
    assert len(keep) < 904

    settings = reloaded.generation_config
    assert settings.alignment_heads == [[0, 1]]
    assert settings.lang_to_id == {"<|de|>": new_ids[german]}
    assert settings.no_timestamps_token_id == new_ids[no_times]

    features = torch.randn(1, 8, 24)
    model.generation_config.suppress_tokens += [token for token in range(904) if token not in new_ids]
    options = {"language": "de", "task": "transcribe", "max_new_tokens": 6}
    written = reloaded.generate(features, **options)
    expected = model.generate(features, **options)
    assert torch.equal(torch.tensor(keep)[written], expected)


@pytest.mark.slow
def test_commands_and_the_card_of_whisper_omit_layers_and_evaluation(tmp_path, capsys):
    original = tmp_path / "original"
    folder = tmp_path / "small"
    trim_whisper(original, folder)

    assert main(["inspect", str(original)]) == 0
    assert " layers, " not in capsys.readouterr().out, "the layers are not described"

    card = (folder / "README.md").read_text()
    assert "The settings are in structprune\\_config.json." in card
    assert "structprune evaluate" not in card
    assert "in the layers" not in card

    assert main(f"evaluate {folder} --against {original} --text builtin:prose --seq-length 24".split()) == 2
    assert "reads input_features, and only models of text can be evaluated" in capsys.readouterr().err


def packed_model():
    """Return a quantized model whose packed layers hold bytes of another shape, as layers of bitsandbytes do."""
    model = quantized(Quantizer(), model_of("LlamaForCausalLM", "llama", GROUPED | {"tie_word_embeddings": False}))
    for layer in model.model.layers:
        up = layer.mlp.up_proj
        plain = up.weight.detach().clone()
        up.weight = nn.Parameter(torch.zeros(7, 1, dtype=torch.uint8), requires_grad=False)
        up.forward = lambda x, plain=plain: nn.functional.linear(x, plain)
    return model


@pytest.mark.parametrize("inplace", [False, True])
@torch.no_grad()
def test_a_quantized_model_is_trimmed_without_unpacking_its_layers(inplace):
    model = packed_model()
    ids = torch.randint(0, 320, (2, 12))
    pruner = StructPruner(fewer_tokens())
    small = pruner.prune_model(model, READER, inplace=inplace)

    assert (small is model) == inplace
    up = small.model.layers[0].mlp.up_proj
    assert type(up) is Packed
    assert up.weight.dtype == torch.uint8

    assert small.config.vocab_size == 320
    assert small.lm_head.weight.shape[0] == 320
    assert small.model.embed_tokens.weight.shape[0] == 320

    keep = torch.tensor(pruner.result.plan.keep[-1, "vocab"])
    torch.testing.assert_close(small(ids).logits, packed_model()(keep[ids]).logits[..., keep])
    assert pruner.result.report.domains


@pytest.mark.nightly
@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
@torch.no_grad()
def test_a_model_packed_by_bitsandbytes_is_trimmed_saved_and_reloaded(bits, tmp_path, monkeypatch):
    modules = pytest.importorskip("bitsandbytes.nn.modules", reason="no bitsandbytes")
    # bitsandbytes does not undo its packing for such CPUs correctly when a model is saved.
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: False)
    fields = GROUPED | {"hidden_size": 128, "intermediate_size": 128, "head_dim": 16}
    model_of("LlamaForCausalLM", "llama", fields).save_pretrained(tmp_path / "plain")
    recipe = transformers.BitsAndBytesConfig(**{bits: True})
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=recipe)
    packed.save_pretrained(tmp_path / "q")

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    pruner = StructPruner(fewer_tokens())
    pruner.save(pruner.prune_model(model, READER), tmp_path / "small")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")

    layer_type = type(model.model.layers[0].mlp.up_proj)
    assert type(reloaded.model.layers[0].mlp.up_proj) is layer_type
    assert layer_type is not nn.Linear

    ids = torch.randint(0, 320, (2, 12))
    keep = torch.tensor(pruner.result.plan.keep[-1, "vocab"])
    torch.testing.assert_close(reloaded(ids).logits, model(keep[ids]).logits[..., keep])


def test_a_packed_head_that_cannot_be_unpacked_is_refused():
    model = packed_model()
    model.lm_head.weight = nn.Parameter(torch.zeros(400, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(StructPruneError, match="quantized with gptq, which transformers cannot undo"):
        StructPruner(fewer_tokens()).prune_model(model, READER)


def test_a_model_with_its_own_code_is_refused_with_the_flag_that_trusts_it(tmp_path, capsys):
    code = {"AutoConfig": "configuration.NewConfig", "AutoModel": "modeling.NewModel"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "new", "auto_map": code}))
    for command in (f"prune {tmp_path} {tmp_path / 'small'}", f"plan {tmp_path}"):
        assert main(f"{command} --width vocab=320".split()) != 0
        assert "runs code of its own. Read it, and pass --trust-remote-code." in error_line(capsys)


def test_only_the_vocabulary_of_an_undescribed_model_can_be_pruned():
    model = model_of("MPNetModel", "mpnet", PLAIN)
    assert describe(model).offered == ("vocab",)

    with pytest.raises(StructPruneError, match="no space 'mlp' to prune: The model type 'mpnet' is not described"):
        StructPruner(fewer_tokens(widths={"mlp": 24})).prune_model(model, READER)

    model.config.architectures = ["MPNetModel"]
    assert dry_run(model.config, fewer_tokens()).widths == {"vocab": 320}


def test_tokens_that_sentence_transformers_uses_are_kept(tmp_path):
    original = tmp_path / "original"
    scores = "1_LogitScore/config.json"
    model_of("Qwen3ForCausalLM", "qwen3", GROUPED | {"tie_word_embeddings": False}).save_pretrained(original)
    assert model_class(AutoConfig.from_pretrained(original)) is AutoModelForCausalLM
    put_into(original, {"modules.json": '[{"path": ""}, {"path": "1_LogitScore"}]'})
    assert model_class(AutoConfig.from_pretrained(original)) is transformers.AutoModel

    prompts = {"query": READER.decode([390, 392, 394]), "document": ""}
    put_into(original, {TASK: '{"transformer_task": "text-generation"}', PROMPTS: json.dumps({"prompts": prompts})})
    put_into(original, {scores: '{"true_token_id": 397, "false_token_id": 399}'})
    reranker_class = model_class(AutoConfig.from_pretrained(original))
    assert reranker_class is AutoModelForCausalLM, "a reranker reads the logits of its head"

    pruner = StructPruner(fewer_tokens())
    pruner.save(pruner.prune_model(reranker_class.from_pretrained(original), READER), tmp_path / "small")
    keep = pruner.result.plan.keep[-1, "vocab"]
    settings = json.loads((tmp_path / "small" / scores).read_text())
    assert keep[settings["true_token_id"]] == 397
    assert keep[settings["false_token_id"]] == 399
    assert set(READER(prompts["query"]).input_ids) <= set(keep)


def test_a_checkpoint_without_an_unused_pooler_loads(tmp_path):
    model = transformers.BertModel(model_of("BertModel", "bert", PLAIN).config, add_pooling_layer=False)
    save_with_tokenizer(model, tmp_path / "original", READER)
    command = f"prune {tmp_path / 'original'} {tmp_path / 'small'} --width vocab=320 --num-samples 8 --seq-length 48"

    assert main(command.split()) == 0
    assert transformers.BertModel.from_pretrained(tmp_path / "small").config.vocab_size == 320


# --- translators keep the tokens of their languages, and begin with the requested language
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
SIZES = {**BART, **TOKENS, "max_position_embeddings": 256}
SIZES |= {"bos_token_id": 0, "pad_token_id": 1, "decoder_start_token_id": 2}


def train_backend(model, trainer, lines=None):
    """Return the settings of a tokenizer model that is trained on lines, by default on built-in prose."""
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.train_from_iterator(lines or islice(builtin_documents("prose"), 50), trainer)
    return json.loads(backend.to_str())["model"]


def train_bpe(lines=None):
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL)
    settings = train_backend(models.BPE(unk_token="<unk>"), trainer, lines)
    merges = [tuple(pair) for pair in settings["merges"]]
    return {"vocab": settings["vocab"], "merges": merges}


def train_unigram(lines=None, special=SPECIAL):
    trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=special, unk_token="<unk>")
    settings = train_backend(models.Unigram(), trainer, lines)
    return {"vocab": [tuple(pair) for pair in settings["vocab"]]}


def train_mbart50():
    return train_unigram(special=["<unk>", "<s>", "</s>"])


M2M, MBART = transformers.M2M100ForConditionalGeneration, transformers.MBartForConditionalGeneration
# The class of a tokenizer, the function that trains it, the class of a model and its type, and two languages.
KINDS = {
    "nllb": (transformers.NllbTokenizer, train_bpe, M2M, "m2m_100", ("eng_Latn", "deu_Latn")),
    "mbart": (transformers.MBartTokenizer, train_unigram, MBART, "mbart", ("en_XX", "de_DE")),
    "mbart50": (transformers.MBart50Tokenizer, train_mbart50, MBART, "mbart", ("en_XX", "de_DE")),
}


@torch.no_grad()
def assert_same_translation(model, small, ids, keep, forced):
    """Check that both models write the same text, where the original model may write only kept tokens."""
    removed = [token for token in range(model.config.vocab_size) if token not in keep]
    limits = {"max_new_tokens": 6, "do_sample": False, "num_beams": 1}
    expected = model.generate(torch.tensor(keep)[ids], suppress_tokens=removed, forced_bos_token_id=forced, **limits)
    written = small.generate(ids, forced_bos_token_id=keep.index(forced), **limits)

    assert torch.equal(torch.tensor(keep)[written], expected)
    assert keep.index(forced) in written


@pytest.mark.parametrize("kind", with_long(KINDS, ["nllb"]))
def test_languages_are_kept_and_a_translation_begins_with_the_forced_one(kind, tmp_path):
    tokenizer_class, train, cls, model_type, (source, target) = KINDS[kind]
    reader = tokenizer_class(**train(), src_lang=source, tgt_lang=target)
    model = random_model(cls, model_type, SIZES | {"vocab_size": len(reader)})
    forced = reader.convert_tokens_to_ids(target)
    model.generation_config.forced_bos_token_id = forced
    prose = [DomainConfig(name="prose", source="builtin:prose")]
    pruner = StructPruner(config(domains=prose, widths={"vocab": len(reader) - 80}, seq_length=48))
    pruner.save(pruner.prune_model(model, reader), tmp_path)

    small = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    small_reader = AutoTokenizer.from_pretrained(tmp_path)
    keep = list(pruner.result.plan.keep[-1, "vocab"])
    assert type(small_reader) is type(reader)
    assert len(small_reader) == len(reader) - 80
    assert len(keep) == len(reader) - 80

    for code in (source, target, reader.mask_token):
        assert keep[small_reader.convert_tokens_to_ids(code)] == reader.convert_tokens_to_ids(code)
    assert keep[small.generation_config.forced_bos_token_id] == forced
    assert keep[small.config.decoder_start_token_id] == 2

    ids = small_reader("The sun had set, and they walked home.", return_tensors="pt")["input_ids"]
    assert small_reader.convert_tokens_to_ids(source) in ids
    assert small_reader.decode(ids[0]) == reader.decode(torch.tensor(keep)[ids[0]])
    assert_same_translation(model, small, ids, keep, forced)


@pytest.mark.parametrize("kind", with_long(["nllb", "mbart"], ["mbart"]))
@pytest.mark.parametrize("has_russian", [False, True], ids=["English text", "English and Russian text"])
def test_letters_of_scripts_outside_the_languages_and_the_text_are_removed_first(kind, has_russian, tmp_path):
    tokenizer_class, train, cls, model_type, (source, target) = KINDS[kind]
    codes = ("en", "ru", "el")
    samples = {code: texts()[code] for code in codes}
    reader = tokenizer_class(**train(list(samples.values())), src_lang=source, tgt_lang=target)
    model = random_model(cls, model_type, SIZES | {"vocab_size": len(reader)})

    lines = []
    for number in range(40):
        lines.append(f"{texts(CHOOSING)['en']} {number}")
        if has_russian:
            lines.append(f"{texts(CHOOSING)['ru']} {number}")
    settings = config(domains=[DomainConfig("a", lines)], languages=["en"], widths={"vocab": len(reader)})
    request = VocabularyRequest.of(settings, ModelInfo.of(model), reader, settings.widths)
    pruner = StructPruner(replace(settings, widths={"vocab": request.allowed.start + 80}))
    small = pruner.prune_model(model, reader)

    small_reader = pruner.result.tokenizer
    unknown = {code: reader.unk_token_id in small_reader(samples[code]).input_ids for code in codes}
    assert unknown == {"en": False, "ru": not has_russian, "el": True}

    greek = reader(samples["el"]).input_ids
    aligned = TokenAlignment.between(model, reader, small, small_reader).align(greek, [True] * len(greek))
    assert small_reader.unk_token_id in {part.token for part in aligned}

    lines = str(pruner.result.report).splitlines()
    remark = next(line for line in lines if line.startswith("Letters that can no longer be spelled"))
    assert "Greek" in remark
    assert ("Cyrillic" in remark) == (not has_russian)


# --- in every family: the trimmed model computes the same for the kept tokens
KEEP = (0, 1, 2, *range(5, 60, 2), 70, 71, 95)
SHORT = {"llama-untied", *STRUCTURES, *OTHER_STRUCTURES, "bert", "t5", "gemma3", "gemma4_text", "roberta", "phi"}
# Images have no tokens, and the tokens of zamba2 cannot be removed.
WITH_TOKENS = sorted({*CASES, *OTHERS} - {"vit", "zamba2"})
FAMILIES = [pytest.param(case, marks=[] if case in SHORT else pytest.mark.nightly) for case in WITH_TOKENS]
# The parameters of a token that are not in one tied matrix: an untied head, biases, a second embedding.
PER_TOKEN = {"llama-untied": 2 * 32, "phi": 2 * 32 + 1, "bert": 32 + 1, "bart": 32, "gemma4_text": 32 + 16, "t5": 32}


@torch.no_grad()
def assert_same_outputs(model, small, keep, atol=0.0):
    """Compare the outputs of both models for random kept tokens."""
    ids = torch.randint(len(keep), (2, 12), generator=torch.Generator().manual_seed(1))
    original = outputs_of(run_model(model, torch.tensor(keep)[ids]))
    if original.shape[-1] == VOCAB:
        original = original[..., keep]
    torch.testing.assert_close(outputs_of(run_model(small, ids)), original, atol=atol, rtol=0)


@pytest.mark.parametrize("case", FAMILIES)
def test_every_family_computes_the_same_for_kept_tokens_and_reloads(case, tmp_path):
    model = build(case)
    small = build(case)
    keep = sorted(set(KEEP) | named_ids(model) & set(range(VOCAB)))
    drop_tokens_(small, describe(small), keep)
    assert_same_outputs(model, small, keep)
    assert_remembers_its_own_config(small)

    space = describe(model).of("vocab")[0]
    small_space = describe(small).of("vocab")[0]
    assert space.size == VOCAB
    assert small_space.size == len(keep)
    assert small_space.unit_params == space.unit_params
    assert model.num_parameters() - small.num_parameters() == space.unit_params * (VOCAB - len(keep))
    assert space.unit_params == PER_TOKEN.get(case, space.unit_params)

    small.save_pretrained(tmp_path)
    assert_same_outputs(model, type(model).from_pretrained(tmp_path), keep, 1e-6)


def test_a_model_without_tokens_has_no_vocabulary():
    assert not describe(build("vit")).of("vocab")


def test_token_ids_in_nested_configs_are_renumbered():
    model = build("llava")
    model.config.image_token_index = 71
    model.config.text_config.pad_token_id = 71
    model.config.vision_config.image_patch_id = 70
    model.generation_config.lang_to_id = {"<|de|>": 70}
    # mBART has such ids for a task, and ColQwen2 has the ids of an inner model.
    model.config.task_specific_params = {"translation": {"decoder_start_token_id": 71, "max_length": 70}}
    model.config.vlm_config = AutoConfig.for_model("llava", image_token_index=70, vocab_size=VOCAB)

    drop_tokens_(model, describe(model), KEEP)

    new_ids = {old: new for new, old in enumerate(KEEP)}
    assert model.generation_config.lang_to_id == {"<|de|>": new_ids[70]}
    task = model.config.task_specific_params["translation"]
    assert task == {"decoder_start_token_id": new_ids[71], "max_length": 70}
    assert model.config.vlm_config.image_token_index == new_ids[70]
    assert model.config.image_token_index == new_ids[71]
    assert model.config.text_config.pad_token_id == new_ids[71]
    assert model.config.vision_config.image_patch_id == new_ids[70]
    assert model.config.text_config.vocab_size == len(KEEP)


def test_a_config_that_names_a_removed_token_is_refused():
    model = build("llama-tied")
    model.generation_config.suppress_tokens = [5, 94]
    message = "`suppress_tokens` of the GenerationConfig names the token 94, .* 34 kept"

    with pytest.raises(StructPruneError, match=message):
        drop_tokens_(model, describe(model), KEEP)

    assert model.config.vocab_size == VOCAB
    assert model.generation_config.suppress_tokens == [5, 94]
    assert same_weights(model, build("llama-tied"))
