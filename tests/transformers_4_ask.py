"""Run models with transformers 4 and onnxruntime for `test_transformers_4.py`, in the Python of `make onnx`.

It reads a list of requests, and writes outputs or an error for each. For a text, it also writes the tokens and the
outputs of onnxruntime.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch
import transformers
from optimum.onnxruntime import ORTModelForCausalLM


def outputs(model, ids):
    """Return the logits of a model, or the last hidden states if it has no head."""
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        result = model(**inputs)

    if hasattr(result, "logits"):
        return result.logits.tolist()
    return result.last_hidden_state.tolist()


def answer(folder, kind, ids=None, text=None):
    """Return the answer to a request with token ids or a text."""
    model = getattr(transformers, kind).from_pretrained(folder).eval()
    if text is None:
        return {"outputs": outputs(model, torch.tensor(ids))}

    exported = Path(f"{folder}-onnx")
    program = Path(sys.executable).with_name("optimum-cli")
    command = [program, "export", "onnx", "--model", folder, "--task", "text-generation-with-past", exported]
    subprocess.run(command, check=True, capture_output=True)

    ids = transformers.AutoTokenizer.from_pretrained(exported)(text, return_tensors="pt")["input_ids"]
    onnx = ORTModelForCausalLM.from_pretrained(exported)
    positions = torch.arange(ids.shape[1])[None]
    with torch.no_grad():
        logits = onnx(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions).logits
    return {"outputs": outputs(model, ids), "onnx": logits.tolist(), "tokens": ids.tolist()}


if __name__ == "__main__":
    answers = []
    for request in json.load(sys.stdin):
        try:
            answers.append(answer(**request))
        except Exception as error:
            answers.append({"error": f"{type(error).__name__}: {error}"})
    Path(sys.argv[1]).write_text(json.dumps(answers))
