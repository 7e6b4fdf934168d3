"""Vocabulary trimming of undescribed model types, and types that are refused before any text is read."""

import pytest
import torch
import transformers
from helpers import unread
from models import BART, GROUPED, PLAIN, TOKENS, fewer_tokens, random_model, real_text_model
from transformers import BertConfig, EncoderDecoderConfig, EncoderDecoderModel

from optimum_structprune import DomainConfig, StructPruneError, StructPruner
from optimum_structprune.arch.inference import last_states
from optimum_structprune.arch.load import describe
from optimum_structprune.arch.token_space import named_ids
from optimum_structprune.method.resize import drop_tokens_


SIZE = 96
SIZES = {**TOKENS, "vocab_size": SIZE, "max_position_embeddings": 64, "pad_token_id": 1}
TEXT = {**SIZES, **PLAIN}
S2S = {**SIZES, **BART, "decoder_start_token_id": 0}
T5GEMMA = {**SIZES, **GROUPED, "model_type": "t5_gemma_module"}
FLORENCE_IMAGES = {
    "embed_dim": [8, 8, 8, 8],
    "num_heads": [2, 2, 2, 2],
    "num_groups": [2, 2, 2, 2],
    "depths": [1, 1, 1, 1],
    "window_size": 2,
    "projection_dim": 32,
}
CODES = {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "embed_dim": 8, "latent_channels": 8}
MAP = {f"word {number}": number for number in range(60)} | {"<image>": 68, "<|extra_200|>": 69}
MAP |= {f"IMGIMG{letter}Z": 60 + place for place, letter in enumerate("ABCDEFGH")}
MAP |= {f"<|visual token {number:06d}|>": 70 + number for number in range(8)}
MAP_NAMES = {number: name for name, number in MAP.items()}
# The class of a model, its type, and the fields of its config.
MODELS = {
    "one table": ("MarianMTModel", "marian", {**S2S, "share_encoder_decoder_embeddings": True}),
    "two tables": ("MarianMTModel", "marian", {**S2S, "share_encoder_decoder_embeddings": False}),
    "two configs": (
        "T5GemmaForConditionalGeneration",
        "t5gemma",
        {"vocab_size": SIZE, "encoder": T5GEMMA, "decoder": T5GEMMA},
    ),
    "rows and columns": (
        "MobileBertForMaskedLM",
        "mobilebert",
        {**TEXT, "embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16},
    ),
    "entities": ("LukeForMaskedLM", "luke", {**TEXT, "entity_vocab_size": 10, "entity_emb_size": 8}),
    "images in a translator": (
        "Florence2ForConditionalGeneration",
        "florence2",
        {"text_config": {**S2S, "model_type": "bart"}, "vision_config": FLORENCE_IMAGES, "image_token_id": 50},
    ),
    "images as tokens": (
        "ChameleonForConditionalGeneration",
        "chameleon",
        {**SIZES, **GROUPED, "vocabulary_map": MAP, "vq_config": {**CODES, "num_embeddings": 4, "resolution": 16}},
    ),
    "images as tokens of a text model": (
        "Emu3ForConditionalGeneration",
        "emu3",
        {
            "text_config": {**SIZES, **GROUPED},
            "vocabulary_map": MAP,
            "vq_config": {**CODES, "codebook_size": 8, "attn_resolutions": [], "hidden_size": 32},
        },
    ),
}


def two_berts():
    """Return an encoder-decoder model of two BERTs, each of which has a table of tokens."""
    parts = EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**TEXT), BertConfig(**TEXT))
    parts.decoder_start_token_id = parts.pad_token_id = 1
    torch.manual_seed(0)
    return EncoderDecoderModel(parts).eval()


def build_case(case):
    if case == "two models":
        return two_berts()
    name, model_type, fields = MODELS[case]
    return random_model(getattr(transformers, name), model_type, fields)


@pytest.mark.parametrize("case", [*MODELS, "two models"])
@pytest.mark.filterwarnings("ignore:Version v4.12.0")
@torch.no_grad()
def test_logits_states_and_losses_of_kept_tokens_are_unchanged(case, tmp_path):
    build_case(case).save_pretrained(tmp_path)  # transformers sets the row of the padding to 0 when it loads a model
    model_class = type(build_case(case))
    model = model_class.from_pretrained(tmp_path).eval()
    small = model_class.from_pretrained(tmp_path).eval()
    keep = sorted(set(range(0, 60, 2)) | named_ids(model) & set(range(SIZE)))
    drop_tokens_(small, describe(small), keep)
    small.save_pretrained(tmp_path)
    reloaded = model_class.from_pretrained(tmp_path).eval()

    ids = torch.arange(4, 16)[None]
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    original_inputs = {name: torch.tensor(keep)[ids] for name in inputs}

    logits = reloaded(**inputs).logits
    torch.testing.assert_close(logits, model(**original_inputs).logits[..., keep], atol=1e-6, rtol=0)
    assert logits.shape[-1] == len(keep)
    if model.config.is_encoder_decoder or type(model).__name__.endswith("MaskedLM"):
        torch.testing.assert_close(last_states(reloaded, ids), last_states(model, torch.tensor(keep)[ids]))
        assert small(input_ids=ids, labels=ids).loss.isfinite()


@pytest.mark.parametrize("case", ["images as tokens", "images as tokens of a text model"])
def test_image_tokens_have_new_ids_after_trimming(case, tmp_path):
    """Chameleon and Emu3 look tokens up in a map, and later in an object that is built from the map."""
    model = build_case(case)
    keep = sorted(set(range(0, 60, 2)) | named_ids(model))
    drop_tokens_(model, describe(model), keep)
    model.save_pretrained(tmp_path)

    for small in (model, type(model).from_pretrained(tmp_path)):
        vocabulary = small.config.vocabulary_map
        mapping = small.model.vocabulary_mapping
        assert len(vocabulary) == len(keep)
        assert vocabulary["<image>"] == keep.index(68)
        assert small.config.image_token_id == keep.index(68)
        assert mapping.image_token_id == keep.index(68)

        codes = mapping.image_tokens
        assert len(codes) == 8
        assert codes == [vocabulary[MAP_NAMES[keep[code]]] for code in codes]


class FixedHead(transformers.BertForMaskedLM):
    """A model whose forward pass has the number of tokens as a constant."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits.view(-1, 12, 400)
        return outputs


class Undescribed(BertConfig):
    model_type = "undescribed"


def test_a_type_that_cannot_run_with_fewer_tokens_is_refused_before_text_is_read():
    fields = TOKENS | PLAIN | {"vocab_size": 400, "max_position_embeddings": 12}
    model = FixedHead(Undescribed(**fields)).eval()
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert describe(model).offered == ()

    pruner = StructPruner(fewer_tokens(domains=[DomainConfig("a", unread())], seq_length=12))
    reason = "the model type 'undescribed' is not described, and FixedHead does not work with fewer tokens .*4788"
    with pytest.raises(StructPruneError, match=reason):
        pruner.prune_model(model, real_text_model()[1], inplace=True)

    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, original[name])
