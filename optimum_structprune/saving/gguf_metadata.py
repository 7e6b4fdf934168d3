"""Write the metadata of a GGUF file: the model's sizes and its tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import gguf
from gguf.gguf_writer import WriterState
from tokenizers import AddedToken
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .. import __version__
from ..arch import llama_cpp
from ..arch.spaces import heads_of
from ..system.errors import StructPruneError
from ..vocabulary.tokens import SPACE


# Special tokens that some tokenizers do not mark as special.
CONTROL = re.compile(r"<pad>|<mask>|<[|｜](.*[|｜])?>", re.DOTALL)
BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# The pre-tokenizers of the tokenizers library that `PRE_TOKENIZERS` has: their names there, and the compared field.
SPLITTERS = {
    "Digits": ("digits", "individual_digits"),
    "ByteLevel": ("bytes", "use_regex"),
    "Split": ("split", "pattern"),
}
# The score of a token that no merge produces.
LOWEST_SCORE = -1e6
# The bytes of the general fields, such as the name and the license. Shorter fields are padded. Of longer fields only
# the name is written, and its beginning alone.
GENERAL_BYTES = 4096
MAX_NAME = 200


def add_metadata(writer: gguf.GGUFWriter, model: PreTrainedModel, name: str, num_values: int) -> None:
    """Add the name, the origin and the size label of a model, in a constant number of bytes.

    So the size of a file is known before the model has a card.

    Args:
        writer: The file.
        model: The model. If it was loaded from a folder, the model card in the folder names its origin.
        name: The name of a model whose card has none.
        num_values: The number of values in all tensors.
    """
    folder = None
    if model.name_or_path and Path(model.name_or_path).is_dir():
        folder = Path(model.name_or_path)

    metadata = gguf.Metadata.load(model_path=folder, total_params=num_values)
    metadata.name = metadata.name or name
    metadata.size_label = metadata.size_label or gguf.size_label(num_values, 0, 0, 0)
    general = _general_fields(writer.arch, metadata)
    if header_bytes(general) > GENERAL_BYTES:
        general = _general_fields(writer.arch, gguf.Metadata(name=name[:MAX_NAME], size_label=metadata.size_label))

    general.add_string("structprune.padding", " " * (GENERAL_BYTES - header_bytes(general)))
    writer.kv_data[0].update(general.kv_data[0])


def _general_fields(architecture: str, metadata: gguf.Metadata) -> gguf.GGUFWriter:
    """Return a file that has only general fields."""
    writer = gguf.GGUFWriter(None, architecture)
    writer.add_string("structprune.version", __version__)
    writer.add_type(gguf.GGUFType.MODEL)
    metadata.set_gguf_meta_model(writer)
    return writer


def header_bytes(writer: gguf.GGUFWriter) -> int:
    """Return the size of the header of a file: of its fields and of the descriptions of its tensors."""
    header = BytesIO()
    copy = gguf.GGUFWriter(None, writer.arch)
    copy.kv_data = writer.kv_data
    copy.tensors = writer.tensors
    copy.fout = [header]  # type: ignore[list-item]
    copy.state = WriterState.EMPTY
    copy.write_header_to_file()
    copy.write_kv_data_to_file()
    copy.write_ti_data_to_file()
    return header.tell()


def add_sizes(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    """Add the sizes of the model and of its layers, and the parameters of its rotary embedding."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _add_positions(writer, config)
    _add_experts(writer, config)
    _add_layer_sizes(writer, config)


def _add_positions(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    """Add the context length, the sliding window and the rotary embedding."""
    window = getattr(config, "sliding_window", None)
    local_rope = (config.rope_parameters or {}).get("sliding_attention")
    context_length = config.max_position_embeddings

    if window and local_rope:
        writer.add_sliding_window(window)
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
        writer.add_rope_freq_base_swa(local_rope["rope_theta"])
    elif window:
        # llama.cpp attends to all positions here. The result is the same while the text fits into the window.
        context_length = min(context_length, window)

    rope = llama_cpp.rope_of(config)
    writer.add_context_length(context_length)
    writer.add_rope_freq_base(rope["rope_theta"])

    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _add_experts(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    """Add the number of experts and their width, if the model is a mixture of experts."""
    if config.model_type not in llama_cpp.MIXTURES:
        return

    first_layer = llama_cpp.layer_configs(config)[0]
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(getattr(config, "moe_intermediate_size", first_layer.intermediate_size))


def _add_layer_sizes(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    """Add the FFN widths and the numbers of heads, by layer if the architecture reads them by layer."""
    layers = llama_cpp.layer_configs(config)
    widths = [layer.intermediate_size for layer in layers]
    head_counts = [heads_of(layer) for layer in layers]
    query_heads = [counts.heads for counts in head_counts]
    kv_heads = [counts.groups for counts in head_counts]
    head_dim = head_counts[0].head_dim

    if writer.arch in llama_cpp.BY_LAYER.values():
        writer.add_feed_forward_length(widths)
        writer.add_head_count(query_heads)
        writer.add_head_count_kv(kv_heads)
    else:
        writer.add_feed_forward_length(widths[0])
        writer.add_head_count(query_heads[0])
        writer.add_head_count_kv(kv_heads[0])

    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)


def add_vocabulary(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, num_rows: int) -> None:
    """Add the tokenizer.

    Args:
        writer: The file.
        tokenizer: The tokenizer of the model.
        num_rows: The number of rows of the embedding. A row without a token is marked as unused.

    Raises:
        StructPruneError: If the tokenizer has more tokens than the embedding has rows, or llama.cpp does not split
            text as the tokenizer does.
    """
    model, pre_tokenizer_name = tokenizer_parts(tokenizer)
    is_sentencepiece = pre_tokenizer_name is None

    if len(tokenizer) > num_rows:
        raise StructPruneError(
            f"`tokenizer` has {len(tokenizer):,} tokens, and the model has {num_rows:,} rows. Pass the model's own "
            "tokenizer."
        )

    vocabulary_class = gguf.LlamaHfVocab if is_sentencepiece else gguf.BpeVocab
    writer.add_tokenizer_model(vocabulary_class.tokenizer_model)
    writer.add_tokenizer_pre(pre_tokenizer_name or "default")
    texts, types = _tokens(tokenizer, num_rows)
    writer.add_token_list(texts)
    writer.add_token_types(types)

    if is_sentencepiece:
        writer.add_token_scores(_scores(model, texts))
        writer.add_add_space_prefix(tokenizer.tokenize("a")[0].startswith(SPACE))
    else:
        writer.add_token_merges([" ".join(pair) for pair in model["merges"]])

    _add_special_tokens(writer, tokenizer)


def vocabulary_bytes(tokenizer: PreTrainedTokenizerBase, num_rows: int) -> int:
    """Return the bytes of a tokenizer in the header of a file; see `add_vocabulary`."""
    writer = gguf.GGUFWriter(None, "")
    empty = header_bytes(writer)
    add_vocabulary(writer, tokenizer, num_rows)
    return header_bytes(writer) - empty


def tokenizer_parts(tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, Any], str | None]:
    """Return the BPE model of a tokenizer, and llama.cpp's name of its pre-tokenizer.

    The name is None for SentencePiece.

    Raises:
        StructPruneError: If the tokenizer is not a fast BPE tokenizer, or llama.cpp does not have its pre-tokenizer.
    """
    parts = {}

    if tokenizer.is_fast:
        parts = json.loads(tokenizer.backend_tokenizer.to_str())

    model = parts.get("model", {})
    if model.get("type") != "BPE":
        kind = model.get("type", f"a slow {type(tokenizer).__name__}")
        raise StructPruneError(f"A GGUF file requires a fast BPE tokenizer, and `tokenizer` is {kind}.")

    if model.get("byte_fallback", False):
        return model, None
    return model, pre_tokenizer(parts)


def pre_tokenizer(parts: Mapping[str, Any]) -> str:
    """Return llama.cpp's name of the pre-tokenizer of a byte-level tokenizer.

    Args:
        parts: The content of `tokenizer.json`.

    Raises:
        StructPruneError: If llama.cpp has no such pre-tokenizer.
    """
    outer_step: Mapping[str, Any] = parts.get("pre_tokenizer") or {}
    steps = outer_step.get("pretokenizers", [outer_step])
    normalizer = (parts.get("normalizer") or {}).get("type")
    key: Any = (*map(_step_key, steps), bool(parts["model"].get("ignore_merges")))

    # llama.cpp does not normalize text. Nearly all text is in NFC already, which Qwen's tokenizers require.
    if key in llama_cpp.PRE_TOKENIZERS and normalizer in (None, "NFC"):
        return llama_cpp.PRE_TOKENIZERS[key]

    names = [normalizer] if normalizer else []
    names += [step["type"] for step in steps if step.get("type")]
    raise StructPruneError(
        f"llama.cpp would split text differently from this tokenizer, which applies {names} before its merges. "
        f"Supported pre-tokenizers: {', '.join(llama_cpp.PRE_TOKENIZERS.values())}."
    )


def _step_key(step: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return a pre-tokenizer as a key of `PRE_TOKENIZERS`; a pair of None stands for an unknown one."""
    kind, field = SPLITTERS.get(step.get("type", ""), (None, ""))

    if kind is None or step.get("add_prefix_space") or step.get("invert"):
        return (None, None)

    value = step.get(field)
    if isinstance(value, dict):
        value = value.get("Regex")
    return (kind, value)


def _tokens(tokenizer: PreTrainedTokenizerBase, num_rows: int) -> tuple[list[str], list[int]]:
    """Return the text and the type of the token of each row."""
    texts: list[str] = []
    types: list[int] = []
    text_of_id = {token_id: text for text, token_id in tokenizer.get_vocab().items()}

    # The tokenizer makes both collections anew whenever they are read, and Gemma has thousands of added tokens.
    added_tokens = tokenizer.added_tokens_decoder
    special_ids = set(tokenizer.all_special_ids)

    for token_id in range(num_rows):
        text = text_of_id.get(token_id)

        if text is None:
            texts.append(f"[PAD{token_id}]")
            types.append(gguf.TokenType.UNUSED)
            continue

        token_type = _token_type(text, added_tokens.get(token_id), token_id in special_ids)
        if token_type == gguf.TokenType.USER_DEFINED:
            text = text.replace(SPACE, " ")
        texts.append(text)
        types.append(token_type)

    return texts, types


def _token_type(text: str, added: AddedToken | None, is_special: bool) -> int:
    """Return the type of a token as llama.cpp's converter chooses it.

    Args:
        text: The text of the token.
        added: The token as an added token, or None if it is not one.
        is_special: Whether it is one of the tokenizer's special tokens.
    """
    if is_special:
        return gguf.TokenType.CONTROL
    if added is not None and (added.special or CONTROL.fullmatch(text)):
        return gguf.TokenType.CONTROL
    if added is not None:
        return gguf.TokenType.USER_DEFINED
    if BYTE.fullmatch(text):
        return gguf.TokenType.BYTE
    return gguf.TokenType.NORMAL


def _scores(model: Mapping[str, Any], texts: list[str]) -> list[float]:
    """Return the score of each token of SentencePiece: minus the rank of the first merge that produces it.

    llama.cpp merges the pieces with the highest score first.
    """
    scores: dict[str, float] = {}

    for rank, pair in enumerate(model["merges"]):
        scores.setdefault("".join(pair), -float(rank))

    return [scores.get(text, LOWEST_SCORE) for text in texts]


def _add_special_tokens(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase) -> None:
    """Add the ids of special tokens, whether text begins and ends with them, and the chat template."""
    for name in ("bos", "eos", "unk", "sep", "pad"):
        token_id = getattr(tokenizer, f"{name}_token_id", None)
        if token_id is not None:
            getattr(writer, f"add_{name}_token_id")(token_id)

    ids = tokenizer("a").input_ids
    writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(ids[-1] == tokenizer.eos_token_id)

    template: Any = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)
