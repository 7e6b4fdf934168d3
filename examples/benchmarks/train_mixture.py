"""Train a small mixture of experts of OLMoE's form from scratch, to measure on it what the removal of experts costs.

    python examples/benchmarks/train_mixture.py DATA OUT [--normalise] [--dense] [--tokens 3000000]

Reads DATA/calibration/*.jsonl and trains on most of each file, as `train_tiny.py` does. Each layer has 16 experts, of
which a token goes through 4. The auxiliary loss balances every layer by itself; transformers' own adds the layers up
first, and leaves single layers uneven. With `--normalise` the gates of the chosen experts sum to 1. With `--dense` the
layers have one MLP of the size of 4 experts: what the mixture has to be better than. Training that was stopped goes on
from OUT.training when the command runs again. In the end it prints the cross entropy on documents set aside, and how
many tokens the experts of each layer get, relative to an equal share.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch
from set_aside import divided
from train_tiny import rows_of, texts_of, trained_tokenizer, training_arguments
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Trainer, set_seed
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func
from transformers.trainer_utils import get_last_checkpoint


EXPERTS, CHOSEN, WIDTH = 16, 4, 128
SHAPE = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
BALANCE = 0.01  # OLMoE's own coefficient


class Balanced(Trainer):
    """Adds the mean of the layers' own balancing losses, not the loss of their mean."""

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        """The cross entropy and, of a mixture, the balancing loss."""
        routed = {"output_router_logits": True} if hasattr(model.config, "num_experts") else {}
        output = model(**inputs, **routed)
        loss = output.loss
        if routed:
            losses = [load_balancing_loss_func((logits,), EXPERTS, CHOSEN) for logits in output.router_logits]
            # The model has added its own, which pools the layers.
            loss = loss - model.router_aux_loss_coef * output.aux_loss + BALANCE * sum(losses) / len(losses)
        return (loss, output) if return_outputs else loss


def new_model(args: Namespace, vocabulary: int) -> PreTrainedModel:
    """An untrained model; the token that ends a document is the first one."""
    common = {**SHAPE, "vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    if args.dense:
        config = AutoConfig.for_model("olmo2", **common, intermediate_size=CHOSEN * WIDTH)
    else:
        routing = {"num_experts": EXPERTS, "num_experts_per_tok": CHOSEN, "norm_topk_prob": args.normalise}
        config = AutoConfig.for_model("olmoe", **common, **routing, intermediate_size=WIDTH)
    return AutoModelForCausalLM.from_config(config)


@torch.no_grad()
def report(model: PreTrainedModel, rows: list) -> None:
    """Print the cross entropy, and the least and the largest load of an expert in each layer."""
    model.eval()
    routed = {"output_router_logits": True} if hasattr(model.config, "num_experts") else {}
    total, chosen = 0.0, []
    for row in rows:
        ids = row["input_ids"][None]
        output = model(ids, **routed)
        total += float(torch.nn.functional.cross_entropy(output.logits[0, :-1], ids[0, 1:]))
        chosen.append([logits.topk(CHOSEN).indices for logits in output.get("router_logits") or ()])
    print(f"cross entropy on documents set aside: {total / len(rows):.3f}")
    for layer, indices in enumerate(zip(*chosen, strict=True)):
        load = torch.bincount(torch.cat(indices).flatten(), minlength=EXPERTS).float()
        print(f"layer {layer}: load of an expert {load.min() / load.mean():.2f} to {load.max() / load.mean():.2f}")


def run(args: Namespace) -> None:
    """Train, save and measure."""
    set_seed(args.seed)
    folder = Path(args.data)
    texts = texts_of(folder / "calibration")
    tokenizer = trained_tokenizer(texts, args.vocabulary)
    arguments = training_arguments(args, save_steps=100, save_total_limit=1)
    done = get_last_checkpoint(arguments.output_dir) if Path(arguments.output_dir).is_dir() else None
    # A checkpoint holds the experts one by one. A Trainer that resumes leaves them as they were made, and only
    # `from_pretrained` stacks them.
    model = AutoModelForCausalLM.from_pretrained(done) if done else new_model(args, len(tokenizer))
    print(f"{model.num_parameters():,} parameters", flush=True)
    rows = rows_of(texts, tokenizer, args.seq_length)
    Balanced(model, arguments, train_dataset=rows).train(resume_from_checkpoint=done)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    aside = [
        json.loads(line)["text"]
        for path in sorted((folder / "calibration").glob("*.jsonl"))
        for line in divided(path)[1][: args.eval_documents]
    ]
    report(model, rows_of(aside, tokenizer, args.seq_length))


def main(argv: list[str] | None = None) -> None:
    """Read the arguments and run."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("out")
    parser.add_argument("--normalise", action="store_true", help="let the gates of the chosen experts sum to 1")
    parser.add_argument("--dense", action="store_true", help="train a model without experts instead")
    parser.add_argument("--tokens", type=int, default=3_000_000, help="training tokens")
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--eval-documents", type=int, default=16, help="documents set aside of each file")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    run(parser.parse_args(argv))


if __name__ == "__main__":
    main()
