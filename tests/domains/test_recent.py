"""Calibration text from a training."""

import torch
from models import token_ids

from optimum_structprune.domains.recent import RecentText


def test_padding_is_no_calibration_text():
    text = RecentText(num_samples=1, seq_length=4)
    text.add_call(
        (), {"input_ids": torch.arange(6).view(2, 3), "attention_mask": torch.tensor([[1, 1, 0], [0, 1, 1]])}
    )
    assert text.domain().samples.tolist() == [[0, 1, 4, 5]]


def test_memory_of_the_text_is_bounded():
    text = RecentText(num_samples=8, seq_length=24)
    for _ in range(100):
        text.add(token_ids(4, 24))
    assert len(text) == 8 * 24 and text.domain().samples.shape == (8, 24)
