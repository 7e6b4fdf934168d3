"""Write a teacher file with the log-probabilities of vLLM, which is faster than transformers on many GPUs.

    python examples/teacher_from_vllm.py MODEL TEXT.jsonl OUT

vLLM returns the most probable tokens only, so the divergence counts all other tokens as one token, and is biased. Use
`structprune teacher` where it is fast enough.
"""

from argparse import ArgumentParser
from collections.abc import Iterable, Iterator
from typing import Any

from datasets import load_dataset
from transformers import AutoConfig, AutoTokenizer

from optimum_structprune import write_teacher_rows


TOP = 32


def rows_of(outputs: Iterable[Any]) -> Iterator[tuple[list[int], list[dict[int, float]]]]:
    """Yield the token ids of each `RequestOutput`, and the log-probabilities after each token but the last."""
    for output in outputs:
        # The first token of a prompt has no prediction.
        predictions = []
        for by_token in output.prompt_logprobs[1:]:
            predictions.append({token: value.logprob for token, value in by_token.items()})
        yield list(output.prompt_token_ids), predictions


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("output")
    parser.add_argument("--max-length", type=int, default=1024)
    arguments = parser.parse_args()

    from vllm import LLM, SamplingParams, TokensPrompt

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    prompts = []
    for text in load_dataset("json", data_files=arguments.text, split="train")["text"]:
        # TRL's `SFTTrainer` ends a text with this token.
        ids = tokenizer(text + tokenizer.eos_token, truncation=True, max_length=arguments.max_length)["input_ids"]
        prompts.append(TokensPrompt(prompt_token_ids=ids))

    # vLLM generates at least one token, so a prompt needs room for it.
    model = LLM(arguments.model, max_logprobs=TOP, max_model_len=arguments.max_length + 1)
    outputs = model.generate(prompts, SamplingParams(prompt_logprobs=TOP, max_tokens=1, temperature=1.0))
    config = AutoConfig.from_pretrained(arguments.model)
    manifest = write_teacher_rows(rows_of(outputs), arguments.output, config, tokenizer, top=TOP)
    print(f"{manifest.tokens:,} tokens in {manifest.rows:,} documents, {manifest.bytes_per_token:.0f} bytes per token")


if __name__ == "__main__":
    main()
