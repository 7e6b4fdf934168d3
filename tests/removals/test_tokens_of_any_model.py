"""Tokens go from any model that embeds them, whether or not its layers are described."""

import json

import pytest
import torch
import transformers
from helpers import error_line
from models import GROUPED, PATCHES, PLAIN, SLIDING, T5, TOKENS, config, random_model, real_text_model
from quantized import Packed, Quantizer, quantized
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from optimum_structprune import DomainConfig, StructPruneError, StructPruner, dry_run
from optimum_structprune.arch.load import describe
from optimum_structprune.arch.meta import model_class
from optimum_structprune.commands.cli import main


BART = {
    **{"d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "encoder_ffn_dim": 40, "decoder_ffn_dim": 36},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4},
}
EMBEDDING_GEMMA = {**GROUPED, **SLIDING, "query_pre_attn_scalar": 4, "use_bidirectional_attention": True}
# The class of a model, its type, and the fields of its config.
MODELS = [
    ("MPNetForMaskedLM", "mpnet", PLAIN),
    ("AlbertModel", "albert", {**PLAIN, "embedding_size": 16}),
    ("BertForSequenceClassification", "bert", PLAIN),
    ("XLMRobertaModel", "xlm-roberta", PLAIN),
    ("T5EncoderModel", "t5", T5),
    ("MT5ForConditionalGeneration", "mt5", T5),
    ("UMT5ForConditionalGeneration", "umt5", T5),
    ("MBartForConditionalGeneration", "mbart", BART),
    ("M2M100ForConditionalGeneration", "m2m_100", BART),
    ("PegasusForConditionalGeneration", "pegasus", BART),
    ("BartForCausalLM", "bart", BART),
    ("Gemma3TextModel", "gemma3_text", EMBEDDING_GEMMA),
    ("Qwen3Model", "qwen3", GROUPED),
    ("LlamaForSequenceClassification", "llama", {**GROUPED, "num_labels": 3}),
    ("LlamaForTokenClassification", "llama", {**GROUPED, "num_labels": 3}),
]
WHISPER = {**BART, "num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 256}
SPEECH = {**WHISPER, "input_feat_per_channel": 8, "conv_channels": 16}
TOWERS = {
    "text_config": {**TOKENS, **PLAIN, "projection_size": 16, "vocab_size": 400, "max_position_embeddings": 48},
    "projection_dim": 8,
}
SEEN = {**TOWERS, "vision_config": PATCHES}
# The same for models that read more than text, with the shape of what they read beside it.
READ_MORE = [
    ("WhisperForConditionalGeneration", "whisper", WHISPER, {"input_features": (1, 8, 24)}),
    ("Speech2TextForConditionalGeneration", "speech_to_text", SPEECH, {"input_features": (1, 12, 8)}),
    ("CLIPModel", "clip", SEEN, {"pixel_values": (1, 3, 8, 8)}),
    ("SiglipModel", "siglip", SEEN, {"pixel_values": (1, 3, 8, 8)}),
    ("BlipForConditionalGeneration", "blip", SEEN, {"pixel_values": (1, 3, 8, 8)}),
]
NAMES = [name for name, *_ in MODELS]


def model_of(name, model_type, fields):
    sizes = {**TOKENS, **fields, "vocab_size": 400, "max_position_embeddings": 256}
    return random_model(getattr(transformers, name), model_type, sizes)


READER = real_text_model()[1]


def asking(**fields):
    texts = [DomainConfig(name=kind, source=f"builtin:{kind}") for kind in ("math", "prose")]
    return config(**{"domains": texts, "widths": {"vocab": 320}, "seq_length": 48, **fields})


@torch.no_grad()
def outputs(model, ids):
    inputs = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    output = model(input_ids=ids, **inputs)
    return output.logits if "logits" in output else output[0]


@pytest.mark.parametrize(("name", "model_type", "fields"), MODELS, ids=NAMES)
def test_kept_tokens_give_what_they_gave_and_the_folder_loads_with_the_models_own_class(
    name, model_type, fields, tmp_path
):
    model = model_of(name, model_type, fields)
    pruner = StructPruner(asking())
    small = pruner.prune_model(model, READER)
    keep = list(pruner.plan.keep[-1, "vocab"])
    ids = pruner.tokenizer("The sum of 17 and 25 is 42, of course.", return_tensors="pt")["input_ids"]
    kept = keep if model.get_output_embeddings() is not None else slice(None)
    pruner.save(small, tmp_path / "small")
    again = model_class(AutoConfig.from_pretrained(tmp_path / "small")).from_pretrained(tmp_path / "small")
    assert again.config.vocab_size == 320 and type(again) is type(model)
    torch.testing.assert_close(outputs(again, ids), outputs(model, torch.tensor(keep)[ids])[..., kept])


@pytest.mark.parametrize(("name", "model_type", "fields", "shapes"), READ_MORE, ids=[name for name, *_ in READ_MORE])
@torch.no_grad()
def test_a_model_that_reads_more_than_text_gives_what_it_gave(name, model_type, fields, shapes, tmp_path):
    model = model_of(name, model_type, fields)
    model.save_pretrained(tmp_path / "dense")  # transformers sets some rows of paddings to 0 when it loads
    model = type(model).from_pretrained(tmp_path / "dense").eval()
    pruner = StructPruner(asking())
    pruner.save(pruner.prune_model(model, READER), tmp_path / "small")
    again, keep = type(model).from_pretrained(tmp_path / "small").eval(), torch.tensor(pruner.plan.keep[-1, "vocab"])
    beside = {kind: torch.randn(shape) for kind, shape in shapes.items()}
    ids = pruner.tokenizer("The sum of 17 and 25 is 42, of course.", return_tensors="pt")["input_ids"]
    by = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    dense, small = model(**beside, **{by: keep[ids]}), again(**beside, **{by: ids})
    if "logits" in dense:
        torch.testing.assert_close(small.logits, dense.logits[..., keep])
        assert "no loss was measured, as the model reads more than text" in str(pruner.report)
    else:
        torch.testing.assert_close(small.text_embeds, dense.text_embeds)
        torch.testing.assert_close(small.logits_per_image, dense.logits_per_image)
        assert pruner.report.embeddings["math"]["after"]["cosine"] > 0


@pytest.mark.slow
def test_whisper_is_trimmed_by_a_command_and_writes_what_it_wrote(tmp_path):
    _, reader = real_text_model(900)
    reader.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|de|>", "<|transcribe|>", "<|notimes|>"]})
    start, german, task, no_times = range(900, 904)
    model = random_model(
        transformers.WhisperForConditionalGeneration,
        "whisper",
        {**TOKENS, **WHISPER, "vocab_size": 904, "decoder_start_token_id": start, "begin_suppress_tokens": None},
    )
    vars(model.generation_config).update(
        **{"_from_model_config": False, "is_multilingual": True, "lang_to_id": {"<|de|>": german}},
        **{"task_to_id": {"transcribe": task}, "no_timestamps_token_id": no_times, "alignment_heads": [[0, 1]]},
        **{"suppress_tokens": [5, 300], "begin_suppress_tokens": [220, 2], "max_length": 20},
    )
    dense, folder = tmp_path / "dense", tmp_path / "small"
    model.save_pretrained(dense)
    reader.save_pretrained(dense)
    assert main(f"prune {dense} {folder} --target vocab --budget parameters=0.8 --languages en,de".split()) == 0
    again, smaller = type(model).from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    keep = json.loads((folder / "pruning_plan.json").read_text())["keep"]["vocab"]["-1"]
    new, settings = {old: number for number, old in enumerate(keep)}, again.generation_config
    assert len(smaller) == len(keep) < 904 and settings.alignment_heads == [[0, 1]]
    assert settings.lang_to_id == {"<|de|>": new[german]} and settings.no_timestamps_token_id == new[no_times]
    assert settings.suppress_tokens == [new[5], new[300]] and settings.begin_suppress_tokens == [new[220], new[2]]
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
    pruner = StructPruner(asking())
    small = pruner.prune_model(model, READER, inplace=inplace)
    keep = torch.tensor(pruner.plan.keep[-1, "vocab"])
    assert (small is model) == inplace and type(small.model.layers[0].mlp.up_proj) is Packed
    assert small.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8 and small.config.vocab_size == 320
    assert small.lm_head.weight.shape[0] == small.model.embed_tokens.weight.shape[0] == 320
    torch.testing.assert_close(small(ids).logits, packed_model()(keep[ids]).logits[..., keep])
    assert pruner.report.perplexity


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
    model, pruner = AutoModelForCausalLM.from_pretrained(tmp_path / "q"), StructPruner(asking())
    pruner.save(pruner.prune_model(model, READER), tmp_path / "small")
    again, keep = AutoModelForCausalLM.from_pretrained(tmp_path / "small"), torch.tensor(pruner.plan.keep[-1, "vocab"])
    assert type(again.model.layers[0].mlp.up_proj) is type(model.model.layers[0].mlp.up_proj) is not nn.Linear
    ids = torch.randint(0, 320, (2, 12))
    torch.testing.assert_close(again(ids).logits, model(keep[ids]).logits[..., keep])


def test_a_head_that_is_packed_is_unpacked_first_or_refused():
    model = packed_model()
    model.lm_head.weight = nn.Parameter(torch.zeros(400, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(StructPruneError, match="quantized with gptq, which transformers cannot undo"):
        StructPruner(asking()).prune_model(model, READER)


def test_code_of_a_models_own_is_refused_with_the_flag_that_runs_it(tmp_path, capsys):
    code = {"AutoConfig": "configuration.NewConfig", "AutoModel": "modeling.NewModel"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "new", "auto_map": code}))
    for command in (f"prune {tmp_path} {tmp_path / 'small'}", f"plan {tmp_path}"):
        assert main([*command.split(), "--width", "vocab=320"]) != 0
        assert "runs code of its own; read it, and give --trust-remote-code." in error_line(capsys)


def test_other_spaces_take_a_description():
    model = model_of("MPNetModel", "mpnet", PLAIN)
    assert describe(model).offered == ("vocab",)
    with pytest.raises(
        StructPruneError,
        match=r"no space 'mlp' to prune: The model type 'mpnet' is not described .*[^.]\. Known: vocab",
    ):
        StructPruner(asking(widths={"mlp": 24})).prune_model(model, READER)
    model.config.architectures = ["MPNetModel"]
    assert dry_run(model.config, asking()).widths == {"vocab": 320}


@pytest.mark.parametrize("name", ["LlamaForSequenceClassification", "Qwen3Model", "T5EncoderModel"])
def test_models_without_a_language_model_head_lose_channels_too(name, tmp_path):
    model = model_of(*MODELS[NAMES.index(name)])
    pruner = StructPruner(asking(widths={"mlp": 24}))
    pruner.save(pruner.prune_model(model, READER), tmp_path / "small", READER)
    assert not pruner.report.perplexity
    again = type(model).from_pretrained(tmp_path / "small")
    assert 24 in (getattr(again.config, "intermediate_size", None), getattr(again.config, "d_ff", None))


def test_what_sentence_transformers_reads_is_loaded_without_its_head(tmp_path):
    model = model_of("Qwen3ForCausalLM", "qwen3", {**GROUPED, "tie_word_embeddings": True})
    model.save_pretrained(tmp_path / "dense")
    assert model_class(AutoConfig.from_pretrained(tmp_path / "dense")) is AutoModelForCausalLM
    model.save_pretrained(tmp_path / "embedder")
    (tmp_path / "embedder" / "modules.json").write_text(json.dumps([]))
    assert model_class(AutoConfig.from_pretrained(tmp_path / "embedder")) is AutoModel


def test_a_checkpoint_without_the_pooler_that_nobody_reads_loads(tmp_path):
    model = transformers.BertModel(model_of("BertModel", "bert", PLAIN).config, add_pooling_layer=False)
    model.save_pretrained(tmp_path / "dense")
    READER.save_pretrained(tmp_path / "dense")
    command = f"prune {tmp_path / 'dense'} {tmp_path / 'small'} --width vocab=320 --num-samples 8 --seq-length 48"
    assert main(command.split()) == 0
    assert transformers.BertModel.from_pretrained(tmp_path / "small").config.vocab_size == 320
