"""Vocabulary trimming of tiny models of many types: the saved result computes the same for the kept tokens."""

import pytest
import torch
import transformers
from models import BART, GROUPED, PATCHES, PLAIN, T5, TOKENS, fewer_tokens, random_model, real_text_model

from optimum_structprune import StructPruner
from optimum_structprune.arch.inference import outputs_of, run_model


pytestmark = pytest.mark.nightly
SIZES = {**TOKENS, "vocab_size": 400, "max_position_embeddings": 256}
LLAMA = {**GROUPED, **SIZES}
BERT = {**PLAIN, **SIZES}
TRANSLATOR = {**BART, **SIZES, "decoder_start_token_id": 0}
T5_SIZES = {**T5, **SIZES, "decoder_start_token_id": 0}
TOWER = {"text_config": {**BERT, "projection_size": 16, "project_dim": 16}, "projection_dim": 16}
SEEN = {**TOWER, "vision_config": PATCHES}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "encoder_sparse_step": 2, "decoder_sparse_step": 2}
WINDOWS = {"embed_dim": [8] * 4, "num_heads": [2] * 4, "num_groups": [2] * 4, "depths": [1] * 4, "window_size": 2}
VIDEO = {"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 32, "intermediate_size": 16}
SOUND = {"num_mel_bins": 8, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "d_model": 16}
# The class of a model, its type, and the fields of its config.
MODELS = [
    ("AutoModelForSeq2SeqLM", "bart", TRANSLATOR),
    ("AutoModelForSeq2SeqLM", "bigbird_pegasus", {**TRANSLATOR, "attention_type": "original_full"}),
    ("AutoModelForSeq2SeqLM", "blenderbot", TRANSLATOR),
    ("AutoModelForSeq2SeqLM", "blenderbot-small", TRANSLATOR),
    ("AutoModelForSeq2SeqLM", "m2m_100", TRANSLATOR),
    ("AutoModelForSeq2SeqLM", "marian", TRANSLATOR),
    ("AutoModelForSeq2SeqLM", "mbart", TRANSLATOR),
    ("AutoModelForSeq2SeqLM", "mvp", TRANSLATOR),
    ("AutoModelForSeq2SeqLM", "nllb-moe", {**TRANSLATOR, **EXPERTS}),
    ("AutoModelForSeq2SeqLM", "pegasus", TRANSLATOR),
    ("AutoModelForSeq2SeqLM", "plbart", TRANSLATOR),
    ("AutoModelForSeq2SeqLM", "longt5", {**T5_SIZES, "local_radius": 4, "global_block_size": 4}),
    ("AutoModelForSeq2SeqLM", "mt5", T5_SIZES),
    ("AutoModelForSeq2SeqLM", "umt5", T5_SIZES),
    (
        "AutoModelForSeq2SeqLM",
        "t5gemma",
        {
            "vocab_size": 400,
            "encoder": {**LLAMA, "model_type": "t5_gemma_module"},
            "decoder": {**LLAMA, "model_type": "t5_gemma_module"},
        },
    ),
    ("AutoModelForMaskedLM", "albert", {**BERT, "embedding_size": 16}),
    ("AutoModelForMaskedLM", "bert", BERT),
    ("AutoModelForMaskedLM", "big_bird", {**BERT, "attention_type": "original_full"}),
    ("AutoModelForMaskedLM", "camembert", BERT),
    ("AutoModelForMaskedLM", "convbert", {**BERT, "embedding_size": 32}),
    ("AutoModelForMaskedLM", "data2vec-text", BERT),
    ("AutoModelForMaskedLM", "deberta", BERT),
    ("AutoModelForMaskedLM", "deberta-v2", {**BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    ("AutoModelForMaskedLM", "electra", {**BERT, "embedding_size": 16}),
    ("AutoModelForMaskedLM", "ernie", BERT),
    ("AutoModelForMaskedLM", "fnet", BERT),
    ("AutoModelForMaskedLM", "layoutlm", BERT),
    ("AutoModelForMaskedLM", "longformer", {**BERT, "attention_window": 4}),
    ("AutoModelForMaskedLM", "luke", {**BERT, "entity_vocab_size": 10, "entity_emb_size": 8}),
    ("AutoModelForMaskedLM", "megatron-bert", BERT),
    (
        "AutoModelForMaskedLM",
        "mobilebert",
        {**BERT, "embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16},
    ),
    ("AutoModelForMaskedLM", "mpnet", BERT),
    ("AutoModelForMaskedLM", "nystromformer", {**BERT, "num_landmarks": 4, "segment_means_seq_len": 4}),
    ("AutoModelForMaskedLM", "rembert", {**BERT, "input_embedding_size": 16, "output_embedding_size": 24}),
    ("AutoModelForMaskedLM", "roberta", BERT),
    ("AutoModelForMaskedLM", "roberta-prelayernorm", BERT),
    ("AutoModelForMaskedLM", "squeezebert", {**BERT, "embedding_size": 32}),
    ("AutoModelForMaskedLM", "xlm-roberta", BERT),
    ("AutoModelForMaskedLM", "xlm-roberta-xl", BERT),
    ("AutoModelForMaskedLM", "xmod", {**BERT, "default_language": "en_XX", "languages": ["en_XX"]}),
    ("AutoModel", "bert", BERT),
    ("AutoModel", "distilbert", {**SIZES, "dim": 32, "hidden_dim": 40, "n_heads": 4, "n_layers": 2}),
    ("AutoModelForCausalLM", "biogpt", BERT),
    ("AutoModelForCausalLM", "codegen", {**SIZES, "n_embd": 32, "n_head": 4, "n_layer": 2, "rotary_dim": 4}),
    ("AutoModelForCausalLM", "diffllama", LLAMA),
    ("AutoModelForCausalLM", "falcon_mamba", {**BERT, "state_size": 4}),
    (
        "AutoModelForCausalLM",
        "gpt_neo",
        {**SIZES, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    ),
    ("AutoModelForCausalLM", "jetmoe", {**LLAMA, **EXPERTS, "kv_channels": 8}),
    ("AutoModelForCausalLM", "mamba", {**BERT, "state_size": 4}),
    ("AutoModelForCausalLM", "openai-gpt", {**SIZES, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 256}),
    ("AutoModelForCausalLM", "persimmon", LLAMA),
    ("AutoModelForCausalLM", "rwkv", {**BERT, "attention_hidden_size": 32, "context_length": 256}),
    ("AutoModelForCausalLM", "trocr", {**TRANSLATOR, "cross_attention_hidden_size": 32}),
    ("AutoModelForCausalLM", "xglm", {**TRANSLATOR, "num_layers": 2, "attention_heads": 4, "ffn_dim": 40}),
    ("AutoModel", "altclip", SEEN),
    ("AutoModel", "chinese_clip", SEEN),
    ("AutoModel", "clap", TOWER),
    ("AutoModel", "clip", SEEN),
    ("AutoModel", "siglip", SEEN),
    (
        "AutoModelForImageTextToText",
        "florence2",
        {
            "text_config": {**TRANSLATOR, "model_type": "bart"},
            "vision_config": {**WINDOWS, "projection_dim": 32},
            "image_token_id": 390,
        },
    ),
    (
        "AutoModelForImageTextToText",
        "glm4v",
        {
            "text_config": {
                **LLAMA,
                "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 1e4},
            },
            "vision_config": {**VIDEO, "image_size": 8, "patch_size": 4},
            "image_token_id": 390,
        },
    ),
    (
        "AutoModelForImageTextToText",
        "idefics2",
        {"text_config": {**LLAMA, "model_type": "mistral"}, "vision_config": PATCHES},
    ),
    (
        "AutoModelForMultimodalLM",
        "qwen2_audio",
        {
            "text_config": {**LLAMA, "model_type": "qwen2"},
            "audio_config": {**SOUND, "model_type": "qwen2_audio_encoder", "max_source_positions": 20},
            "audio_token_id": 390,
        },
    ),
]
NAMES = [f"{model_type} {auto.removeprefix('AutoModel')}".strip() for auto, model_type, _ in MODELS]


@pytest.mark.parametrize(("auto", "model_type", "fields"), MODELS, ids=NAMES)
@torch.no_grad()
def test_a_trimmed_model_reloads_and_computes_the_same_for_kept_tokens(auto, model_type, fields, tmp_path):
    reader = real_text_model()[1]
    random_model(getattr(transformers, auto), model_type, fields).save_pretrained(tmp_path / "original")
    model = getattr(transformers, auto).from_pretrained(tmp_path / "original").eval()
    pruner = StructPruner(fewer_tokens())
    pruner.save(pruner.prune_model(model, reader), tmp_path / "small")
    reloaded = type(model).from_pretrained(tmp_path / "small").eval()

    keep = torch.tensor(pruner.result.plan.keep[-1, "vocab"])
    assert len(keep) == 320
    assert reloaded.config.get_text_config().vocab_size == 320
    text = "The sum of 17 and 25 is 42, of course."
    ids = pruner.result.tokenizer(text, return_tensors="pt")["input_ids"]
    assert pruner.result.tokenizer.decode(ids[0]) == reader.decode(keep[ids[0]])

    expected = outputs_of(run_model(model, keep[ids]))
    if expected.shape[-1] == 400:
        expected = expected[..., keep]
    torch.testing.assert_close(outputs_of(run_model(reloaded, ids)), expected, atol=1e-5, rtol=1e-4)

    for name in ("eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id", "image_token_id"):
        token = getattr(model.config, name, None)
        if isinstance(token, int) and 0 <= token < 400:
            assert keep[getattr(reloaded.config, name)] == token, name
