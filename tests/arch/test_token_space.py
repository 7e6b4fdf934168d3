"""Token ids in configs keep naming the same tokens, whatever the fields are called."""

import re

import pytest
import torch
import transformers
from models import GROUPED, PLAIN, TOKENS, build, random_model
from transformers import AutoConfig, GenerationConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from optimum_structprune import StructPruneError
from optimum_structprune.arch.meta import check_positions, positions_of
from optimum_structprune.arch.token_space import counted_from, holds_token_ids, named_ids, renumber_, resize_


# The endings of names of fields that may hold token ids.
SUSPECTS = re.compile(r"\w*(id|ids|idx|idxs|index|indexes|indices|token|tokens|map|lang|langs)")
# The fields with such names that hold something else, by what it is.
NO_TOKEN_IDS = {
    "the number of tokens or languages": (
        "default_num_delay_tokens default_num_lookahead_tokens n_cls_tokens n_langs num_cls_tokens "
        "num_detection_tokens num_global_tokens num_group_tokens num_image_tokens num_query_tokens "
        "num_register_tokens num_visual_indicator_tokens pred_num_mask_tokens max_new_tokens max_text_tokens "
        "t2u_max_new_tokens vocoder_num_langs prompt_lookup_num_tokens"
    ),
    "places of layers and modules": (
        "_out_indices altup_active_idx attn_layer_indices backbone_out_indices decode_index deepstack_visual_indexes "
        "encoder_projection_indices eval_idx full_attn_idxs fullatt_block_indexes global_attn_indexes head_in_index "
        "insert_layer_id intermediate_hidden_state_indices intermediate_hook_ids intermediate_layers_indices "
        "local_layer_ids merge_index moe_layer_end_index moe_layer_start_index mtp_local_layer_ids out_indices "
        "ple_layer_ids residual_block_indices summary_idxs target_layer_ids unmasked_channel_indices "
        "window_block_indices"
    ),
    "labels": "ce_ignore_index loss_ignore_index no_aggregation_label_index semantic_loss_ignore_index "
    "sparse_pred_ignore_index label2id",
    "entries of another vocabulary": (
        "audio_stream_bos_id audio_stream_eos_id codebook_eos_token_id codebook_pad_token_id codec_bos_id "
        "codec_eos_token_id codec_nothink_id codec_pad_id codec_think_bos_id codec_think_eos_id subs_pad_id "
        "t2u_bos_token_id t2u_decoder_start_token_id t2u_eos_token_id t2u_pad_token_id tag_pad_id"
    ),
    "languages and prompts by number": "default_prompt_id lang_id",
    "other names of fields": "attribute_map",
    "numbers of clusters, and of atoms per token": "num_centroids max_atoms_per_token",
    "seconds of audio, by number": "max_initial_timestamp_index",
}


def config_classes():
    """Return all config classes of the installed transformers."""
    for model_type in CONFIG_MAPPING:
        CONFIG_MAPPING[model_type]
    waiting = [PretrainedConfig]
    classes = set()
    while waiting:
        new = [kind for kind in waiting.pop().__subclasses__() if kind.__module__.startswith("transformers.models.")]
        waiting += new
        classes.update(new)
    return classes


def number_fields(kind):
    """Return the fields of a config class that hold numbers, or lists or mappings of numbers."""
    names = set()
    for base in kind.__mro__:
        if not base.__module__.startswith("transformers."):
            continue
        for name, declared in vars(base).get("__annotations__", {}).items():
            if re.search(r"\bint\b|\bdict\b", str(declared)) and "Config" not in str(declared):
                names.add(name)
    return names


def test_every_field_of_transformers_that_may_hold_token_ids_is_renumbered_or_explained():
    names = {*vars(GenerationConfig()), "max_initial_timestamp_index", "lang_to_id", "text_decoder_lang_to_code_id"}
    for kind in config_classes():
        names |= number_fields(kind)
    suspects = {name for name in names if SUSPECTS.fullmatch(name)}
    explained = {name for listed in NO_TOKEN_IDS.values() for name in listed.split()}
    counts = {name for name in suspects if name.startswith(("max_", "min_", "num_"))}
    unexplained = {name for name in suspects - explained - counts if not holds_token_ids(name)}
    assert len(suspects) > 100 and not unexplained
    assert not {name for name in explained if holds_token_ids(name)}


def numbered(fields, keep=(1, 3, 5), size=10, **options):
    """Return a config with these fields after a trim of a vocabulary of ten."""
    model_config = AutoConfig.for_model("llama", vocab_size=size)
    vars(model_config).update({"bos_token_id": None, "eos_token_id": None, "pad_token_id": None} | fields)
    renumber_(model_config, keep, size, **options)
    return model_config


def test_ids_are_renumbered_in_numbers_lists_and_mappings_of_any_name():
    changed = numbered(
        {
            "pad_index": 3,
            "unk_index": -1,
            "eos_index": 12,
            "boundary_id": 5,
            "image_token": 5,
            "end_token": "</s>",
            "speaker_token_map": {"Anna": 3},
            "device_map": {"": 1},
            "label_map": {"cat": 1},
            "lang_id": 3,
            "eos_token_id": [1, 5],
            "bad_words_ids": [[3, 1]],
            "begin_suppress_tokens": (5,),
            "text_decoder_lang_to_code_id": {"deu": 5},
            "t2u_lang_code_to_id": {"deu": 5},
            "sequence_bias": {(3, 5): 2.0},
            "forced_decoder_ids": [[3, 5]],
            "label2id": {"person_id": 3},
        }
    )
    assert (changed.pad_index, changed.unk_index, changed.eos_index, changed.boundary_id) == (1, -1, 12, 2)
    assert (changed.image_token, changed.end_token, changed.speaker_token_map) == (2, "</s>", {"Anna": 1})
    assert (changed.device_map, changed.label_map) == ({"": 1}, {"cat": 1})
    assert changed.lang_id == 3 and changed.t2u_lang_code_to_id == {"deu": 5} and changed.label2id == {"person_id": 3}
    assert (changed.eos_token_id, changed.bad_words_ids, changed.begin_suppress_tokens) == ([0, 2], [[1, 0]], (2,))
    assert changed.text_decoder_lang_to_code_id == {"deu": 2}
    assert changed.sequence_bias == {(1, 2): 2.0} and changed.forced_decoder_ids == [[3, 2]]
    listed = numbered({"sequence_bias": [[[3], -1.0]]})
    assert listed.sequence_bias == [[[1], -1.0]]


def test_a_field_that_names_a_removed_token_is_refused_by_its_name():
    with pytest.raises(StructPruneError, match="`boundary_id` of the LlamaConfig names the token 2"):
        numbered({"boundary_id": 2})
    assert numbered({"boundary_id": 2}, only_shapes=True).boundary_id == 2


def test_a_map_of_the_whole_vocabulary_loses_the_removed_words_and_keeps_its_special_tokens():
    words = {"word": 0, "<image>": 1, "IMGIMGAZ": 2, "other": 3}
    smaller = {"<image>": 0, "IMGIMGAZ": 1, "other": 2}
    assert numbered({"vocabulary_map": words}, keep=(1, 2, 3)).vocabulary_map == smaller
    model = build("llama-tied")
    before = named_ids(model)
    model.config.vocabulary_map = {"word": 80, "<image>": 81, "IMGIMGAZ": 82, "other": 83}
    assert named_ids(model) - before == {81, 82}


def test_other_sizes_of_the_same_vocabulary_follow_and_offsets_keep_their_tokens():
    text = AutoConfig.for_model("llama", vocab_size=10)
    vars(text).update(decoder_vocab_size=10, type_vocab_size=2, unpadded_vocab_size=8, image_token_offset=7)
    text.inner = {"vocab_size": 10, "other": 10}
    resize_(text, (1, 3, 5, 7, 8, 9), 10)
    assert (text.vocab_size, text.decoder_vocab_size, text.type_vocab_size) == (6, 6, 2)
    assert (text.unpadded_vocab_size, text.image_token_offset, text.inner) == (4, 3, {"vocab_size": 6, "other": 10})

    model = build("llama-tied")
    model.config.image_token_offset = model.config.vocab_size - 3
    assert {*range(model.config.vocab_size - 3, model.config.vocab_size)} <= named_ids(model)


def test_a_config_with_another_vocabulary_is_left_alone():
    whole = AutoConfig.for_model("llama", vocab_size=10)
    whole.speech = AutoConfig.for_model("llama", vocab_size=4, boundary_id=3)
    renumber_(whole, (1, 3, 5), 10, only_shapes=True)
    resize_(whole, (1, 3, 5), 10)
    assert (whole.vocab_size, whole.speech.vocab_size, whole.speech.boundary_id) == (3, 4, 3)


ENTITIES = {"entity_vocab_size": 10, "entity_emb_size": 8}


@pytest.mark.parametrize(
    ("name", "model_type", "fields", "padding", "first"),
    [
        ("RobertaModel", "roberta", PLAIN, 0, 1),
        ("XLMRobertaModel", "xlm-roberta", PLAIN, 1, 2),
        ("LukeModel", "luke", {**PLAIN, **ENTITIES}, 3, 4),
        ("BertModel", "bert", PLAIN, 3, 0),
        ("LlamaModel", "llama", GROUPED, 3, 0),
    ],
)
def test_positions_that_are_counted_from_the_padding_are_fewer(name, model_type, fields, padding, first):
    sizes = {**TOKENS, **fields, "vocab_size": 96, "max_position_embeddings": 64, "pad_token_id": padding}
    model = random_model(getattr(transformers, name), model_type, sizes)
    assert positions_of(model) == 64 - first and counted_from(model) == max(first - 1, 0)
    longest = torch.full((1, 64 - first), 5)
    assert model(longest).last_hidden_state.shape[1] == 64 - first
    with pytest.raises(StructPruneError, match=f"longer than the model's {64 - first} positions"):
        check_positions(model, 65 - first, "text")
