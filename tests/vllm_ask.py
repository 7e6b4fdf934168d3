"""Run models with vLLM for `test_vllm.py`, in the Python of `make vllm`, and write an answer to each request."""

import json
import sys

from vllm import LLM, SamplingParams


def answer(folder, ids, new, options):
    """Return the class of a model in vLLM, its greedy tokens, and their log-probabilities."""
    llm = LLM(folder, dtype="float32", max_model_len=128, enforce_eager=True, **options)
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, logprobs=0)
    (output,) = llm.generate([{"prompt_token_ids": ids}], params)[0].outputs
    tokens = list(output.token_ids)

    logprobs = []
    for token, candidates in zip(tokens, output.logprobs, strict=True):
        logprobs.append(candidates[token].logprob)
    class_name = llm.apply_model(lambda model: type(model).__name__)
    return {"class": class_name, "tokens": tokens, "logprobs": logprobs}


if __name__ == "__main__":
    answers = []
    for request in json.load(sys.stdin):
        try:
            answers.append(answer(**request))
        except Exception as error:
            answers.append({"error": f"{type(error).__name__}: {error}"})
    with open(sys.argv[1], "w") as file:
        json.dump(answers, file)
