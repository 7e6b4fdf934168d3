"""What vLLM makes of folders, for `test_vllm.py`, in the Python of `make vllm`, with an answer for each request."""

import json
import sys

from vllm import LLM, SamplingParams


def answer(folder, ids, new, options):
    llm = LLM(folder, dtype="float32", max_model_len=128, enforce_eager=True, **options)
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, logprobs=0)
    (written,) = llm.generate([{"prompt_token_ids": ids}], params)[0].outputs
    chosen = [steps[token].logprob for token, steps in zip(written.token_ids, written.logprobs, strict=True)]
    return {
        "class": llm.apply_model(lambda model: type(model).__name__),
        "tokens": [*written.token_ids],
        "logprobs": chosen,
    }


if __name__ == "__main__":
    answers = []
    for request in json.load(sys.stdin):
        try:
            answers.append(answer(**request))
        except Exception as error:
            answers.append({"error": f"{type(error).__name__}: {error}"})
    with open(sys.argv[1], "w") as file:
        json.dump(answers, file)
