"""Train the model in `tiny_llama`: `python tests/make_tiny_llama.py FOLDER` takes some minutes on one core.

It reads the texts of the package (`optimum_structprune/domains/texts` and the word problems), so the weights have the
licence of the project. The weights are in the repository, because other processors and versions of torch compute
other bits.
"""

import sys
from itertools import cycle

import torch
from models import byte_level
from transformers import AutoConfig, AutoModelForCausalLM

from optimum_structprune.domains.sources import TEXTS


LENGTH = 128
BATCH = 16
STEPS = 1500
RATE = 4e-3
SIZES = {
    "vocab_size": 384,
    "hidden_size": 48,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def train(folder: str) -> None:
    """Write the model and its tokenizer."""
    torch.manual_seed(0)
    documents = []
    for path in sorted(TEXTS.glob("*.txt")):
        documents += path.read_text("utf-8").split("\n%\n")
    tokenizer = byte_level(documents, SIZES["vocab_size"])
    tokenizer.model_max_length = SIZES["max_position_embeddings"]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES))

    ids = []
    for document in documents:
        ids += [1, *tokenizer(document).input_ids, 2]
    num_samples = len(ids) // LENGTH
    samples = torch.tensor(ids[: num_samples * LENGTH]).view(-1, LENGTH)
    batches = cycle(samples[torch.randperm(len(samples))].split(BATCH))
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)

    for step in range(STEPS):
        batch = next(batches)
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0:
            print(step, round(loss.item(), 3), flush=True)

    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    train(sys.argv[1])
