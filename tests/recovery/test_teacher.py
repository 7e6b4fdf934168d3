"""A teacher has the same tokens, is another model, and predicts something."""

from copy import deepcopy

import pytest
import torch
from helpers import recovery_config, same_weights, save_with_tokenizer, with_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from models import VOCAB, build, config, tokenizer
from transformers import AutoModelForCausalLM, BartConfig, BartForCausalLM

from optimum_structprune import Recovery, StructPruneError, StructPruner, prune_model, recover
from optimum_structprune.recovery.teacher import load_teacher


@pytest.mark.slow
@settings(max_examples=40)
@given(data=st.data())
def test_a_teacher_is_refused_where_an_id_means_another_token(data):
    """Both have some of 96 tokens; what is left of the teacher's in their order can be compared, and nothing else."""
    dense, special = build("llama-tied"), [0, 1, 2]
    taught = special + data.draw(st.lists(st.sampled_from(range(3, VOCAB)), min_size=2, unique=True))
    left = [token for token in taught[3:] if data.draw(st.booleans())]
    order = data.draw(st.just(left) | st.permutations(left))
    others = sorted({*range(3, VOCAB)} - {*taught}) or [95]
    more = data.draw(st.just([]) | st.lists(st.sampled_from(others), max_size=1))
    learnt = special + order + [token for token in more if token not in order]
    teacher, theirs = with_tokens(dense, tokenizer(), taught)
    model, own = with_tokens(dense, tokenizer(), learnt)
    before = deepcopy(teacher)
    if learnt == taught:
        assert load_teacher(teacher, model, own, theirs).parts is None
    else:  # a token that is no word of others cannot be spelled by them
        numbers = f"vocabulary of {len(taught)} tokens .* one of {len(learnt)}, and by"
        fewer = learnt == [token for token in taught if token in learnt]
        with pytest.raises(StructPruneError, match="of the kind WordLevel" if fewer else numbers):
            load_teacher(teacher, model, own, theirs)
    assert same_weights(teacher, before)


def test_rows_without_a_token_make_no_difference():
    """As embeddings of several sizes are padded to several multiples, with the same tokenizer."""
    wide, narrow = build("llama-tied"), build("llama-tied")
    wide.resize_token_embeddings(128)
    narrow.resize_token_embeddings(104)
    assert load_teacher(wide, narrow, tokenizer(), tokenizer()).parts.spellings[-1] == ()
    assert load_teacher(narrow, wide, tokenizer(), tokenizer()).parts.size == 128


def test_the_tokens_of_a_teacher_are_those_of_its_folder_or_its_run_unless_a_tokenizer_is_passed(tmp_path):
    order = [0, 1, 2, *range(VOCAB - 1, 2, -1)]
    other, renumbered = with_tokens(build("llama-tied"), tokenizer(), order)
    save_with_tokenizer(other, tmp_path, renumbered)
    student = prune_model(build("llama-tied"), config(), tokenizer())
    by_run = build("llama-tied", seed=1)
    StructPruner(config()).prune_model(by_run, renumbered)
    for teacher in (str(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path), by_run):
        with pytest.raises(StructPruneError, match="by the same ids they mean other tokens"):
            recover(student, tokenizer(), recovery_config(), teacher=teacher)
    with pytest.raises(StructPruneError, match="by the same ids they mean other tokens"):
        recover(student, tokenizer(), recovery_config(), teacher=other, teacher_tokenizer=renumbered)
    # Of a model in memory nothing is known; who passes it says that it has the same tokens.
    assert load_teacher(other, student, tokenizer()).model is other
    assert load_teacher(by_run, student, tokenizer(), tokenizer()).model is by_run


def test_a_model_does_not_teach_itself(tmp_path):
    save_with_tokenizer(build("llama-tied"), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    for teacher in (model, str(tmp_path), tmp_path):
        with pytest.raises(StructPruneError, match="The teacher is the model that is trained"):
            recover(model, tokenizer(), recovery_config(), teacher=teacher)
    model.model.norm.weight.data.mul_(1.1)  # the folder holds another model by then
    assert load_teacher(str(tmp_path), model, tokenizer()).model.name_or_path == str(tmp_path)


def test_what_is_no_causal_language_model_is_no_teacher():
    student = prune_model(build("llama-tied"), config(), tokenizer())
    for teacher in (3, build("bert"), torch.nn.Linear(2, 2), build("t5")):
        with pytest.raises(StructPruneError, match=f"teacher takes a causal .* got {type(teacher).__name__}"):
            recover(student, tokenizer(), recovery_config(), teacher=teacher)


def test_a_teacher_whose_base_does_not_say_what_it_takes():
    sizes = {"vocab_size": VOCAB, "d_model": 32, "decoder_layers": 1}
    sizes |= {"decoder_ffn_dim": 32, "decoder_attention_heads": 2}
    teacher, student = (BartForCausalLM(BartConfig(**sizes, is_decoder=True, is_encoder_decoder=False)) for _ in "12")
    recovery = Recovery(recovery_config(tokens=96))
    recovery.recover_model(student, tokenizer(), teacher)
    assert recovery.report.divergence["a"]["recovered"] > 0


def test_a_compiled_teacher_is_the_model_in_it():
    dense = build("llama-tied")
    teacher = load_teacher(torch.compile(dense, backend="eager"), build("llama-tied", seed=1), tokenizer())
    assert teacher.model is dense
