"""Train a small mixture of experts from scratch, to measure the removal of experts on it. It has OLMoE's architecture.

    python examples/benchmarks/train_mixture.py DATA OUT [--normalise] [--original] [--tokens 3000000]

The script reads DATA/calibration/*.jsonl and trains on most of each file, as `train_tiny.py` does. Each layer has 16
experts, and the router selects 4 of them for each token. The auxiliary loss balances every layer separately. The loss
of transformers sums the layers first, so single layers stay unbalanced. With `--normalise`, the gates of the selected
experts sum to 1. With `--original`, each layer has one MLP of the size of 4 experts, as the baseline for the mixture.
If the training was interrupted, the same command continues it from OUT.training. At the end, the script prints the
cross entropy on held-out documents, and the number of tokens per expert in each layer, relative to an equal share.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch
from set_aside import split_lines
from torch.nn.functional import cross_entropy
from train_tiny import read_training_texts, rows_of, train_tokenizer, training_arguments
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Trainer, set_seed
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func
from transformers.trainer_utils import get_last_checkpoint


# The number of experts in a layer, the number of experts of a token, and the width of an expert.
EXPERTS = 16
SELECTED = 4
WIDTH = 128
SHAPE = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
# The coefficient of OLMoE.
BALANCE = 0.01


def has_experts(model: PreTrainedModel) -> bool:
    """Return whether a model is a mixture of experts."""
    return hasattr(model.config, "num_experts")


class BalancedTrainer(Trainer):
    """Adds the mean of the balancing losses of the layers, instead of the loss of their mean."""

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        """Return the cross entropy and, for a mixture, the balancing loss."""
        if has_experts(model):
            output = model(**inputs, output_router_logits=True)
            losses = [load_balancing_loss_func((logits,), EXPERTS, SELECTED) for logits in output.router_logits]
            # The loss of the model contains its own balancing loss over all layers.
            loss = output.loss - model.router_aux_loss_coef * output.aux_loss
            loss = loss + BALANCE * sum(losses) / len(losses)
        else:
            output = model(**inputs)
            loss = output.loss

        if return_outputs:
            return loss, output
        return loss


def new_model(args: Namespace, vocabulary: int) -> PreTrainedModel:
    """Return an untrained model. The first token ends a document."""
    fields = dict(SHAPE, vocab_size=vocabulary, bos_token_id=0, eos_token_id=0, pad_token_id=None)
    if args.original:
        config = AutoConfig.for_model("olmo2", intermediate_size=SELECTED * WIDTH, **fields)
    else:
        config = AutoConfig.for_model(
            "olmoe",
            intermediate_size=WIDTH,
            num_experts=EXPERTS,
            num_experts_per_tok=SELECTED,
            norm_topk_prob=args.normalise,
            **fields,
        )

    return AutoModelForCausalLM.from_config(config)


@torch.no_grad()
def report(model: PreTrainedModel, rows: list) -> None:
    """Print the cross entropy, and the least and the largest load of an expert in each layer."""
    model.eval()
    options = {}
    if has_experts(model):
        options["output_router_logits"] = True

    total = 0.0
    counts: dict[int, torch.Tensor] = {}
    for row in rows:
        ids = row["input_ids"]
        output = model(ids[None], **options)
        total += float(cross_entropy(output.logits[0, :-1], ids[1:]))
        for layer, logits in enumerate(output.get("router_logits") or ()):
            selected = logits.topk(SELECTED).indices.flatten()
            counts[layer] = counts.get(layer, 0) + torch.bincount(selected, minlength=EXPERTS)

    print(f"cross entropy on documents set aside: {total / len(rows):.3f}")
    for layer, layer_counts in counts.items():
        load = layer_counts / layer_counts.float().mean()
        print(f"layer {layer}: load of an expert {load.min():.2f} to {load.max():.2f}")


def heldout_texts(folder: Path, count: int) -> list[str]:
    """Return the first held-out documents of each file."""
    texts = []
    for path in sorted(folder.glob("*.jsonl")):
        _, lines = split_lines(path)
        texts += [json.loads(line)["text"] for line in lines[:count]]
    return texts


def run(args: Namespace) -> None:
    """Train, save and measure."""
    set_seed(args.seed)
    folder = Path(args.data, "calibration")
    texts = read_training_texts(folder)
    tokenizer = train_tokenizer(texts, args.vocabulary)
    arguments = training_arguments(args, save_steps=100, save_total_limit=1)

    checkpoint = None
    if Path(arguments.output_dir).is_dir():
        checkpoint = get_last_checkpoint(arguments.output_dir)
    if checkpoint is None:
        model = new_model(args, len(tokenizer))
    else:
        # A checkpoint contains single experts. A Trainer that resumes does not load them into the stacked weights of a
        # new model, but `from_pretrained` does.
        model = AutoModelForCausalLM.from_pretrained(checkpoint)

    print(f"{model.num_parameters():,} parameters", flush=True)

    rows = rows_of(texts, tokenizer, args.seq_length)
    trainer = BalancedTrainer(model, arguments, train_dataset=rows)
    trainer.train(resume_from_checkpoint=checkpoint)

    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    report(model, rows_of(heldout_texts(folder, args.eval_documents), tokenizer, args.seq_length))


def main(argv: list[str] | None = None) -> None:
    """Read the arguments and run."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("out")
    parser.add_argument("--normalise", action="store_true", help="let the gates of the selected experts sum to 1")
    parser.add_argument("--original", action="store_true", help="train a model without experts instead")
    parser.add_argument("--tokens", type=int, default=3_000_000, help="training tokens")
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--eval-documents", type=int, default=16, help="held-out documents of each file")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)

    run(parser.parse_args(argv))


if __name__ == "__main__":
    main()
