"""Tokens go from any model that embeds them, whether or not its layers are described."""

import json

import pytest
import torch
import transformers
from models import GROUPED, PLAIN, SLIDING, T5, TOKENS, config, random_model, real_text_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

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


def test_other_spaces_take_a_description():
    model = model_of("MPNetModel", "mpnet", PLAIN)
    assert describe(model).offered == ("vocab",)
    with pytest.raises(StructPruneError, match="no space 'mlp' to prune: The model type 'mpnet' is not described"):
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


def test_the_ids_of_languages_and_tasks_are_numbered_anew():
    """As Whisper's configs of generation name them."""
    model = model_of("MBartForConditionalGeneration", "mbart", BART)
    model.generation_config.lang_to_id = {"<|de|>": 390}
    model.generation_config.task_to_id = {"translate": 395}
    pruner = StructPruner(asking())
    small = pruner.prune_model(model, READER)
    keep = pruner.plan.keep[-1, "vocab"]
    assert keep[small.generation_config.lang_to_id["<|de|>"]] == 390
    assert keep[small.generation_config.task_to_id["translate"]] == 395
