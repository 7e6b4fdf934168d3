"""The table of architectures in the docs.

`python -m optimum_structprune.arch.table > docs/architectures.md` writes it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from .families import BUILTIN, TEXT_ONLY, UNDESCRIBED, Family, Template, read_families
from .spec import HIDDEN, LAYER, kind_of


ONE_FOR_ALL = "a model has one"
HEAD = """# Architectures

This page is generated from `optimum_structprune/arch/families.yaml` by `python -m optimum_structprune.arch.table`, and
a test compares the two.

**Plain** means that the pruned model's own config describes it completely, with the same width in every layer, so that
plain `from_pretrained` loads it. Every line below is tested on a tiny random model: the pruned model equals the masked
one within 1e-5 in fp32, it reloads, and every tensor has the shape that the smaller config gives it.

- `layer` removes whole layers, before everything else, and the entries that the config has for each of them.
- `hidden` removes channels of the residual stream from the whole model. Where the norms divide by the root of a mean
  square, the result equals the model whose removed channels are zero. Elsewhere it is not offered, and the table says
  why.
- `mlp` inside experts: one config key is the width of all experts, but every expert keeps its own channels, scored and
  refitted on the tokens that are routed to it. Widths are multiples of 8, because the grouped matrix product takes
  only rows of whole 16 bytes. The moments of one expert are held in memory at a time.
- `expert` removes whole experts with their router rows, in one go before the steps: a router is a softmax, so an
  expert cannot be masked in any other way. The score is the mean of gate x output norm over the tokens that chose it
  (REAP). At least as many experts stay as each token chooses.
- `dense_mlp` is the MLP of the dense layers of a mixture-of-experts model, `shared_mlp` that of a shared expert with a
  width of its own.
- Encoders and encoder-decoders are measured by the squared error of their last hidden states (T5: logits) on held-out
  text, relative to the variance of the dense model's; an encoder-decoder reads the same text on both sides. Vision
  models take `inputs={"name": pixels}` in place of text.
- **Non-uniform** means that its width may differ from layer to layer ([non-uniform models](non_uniform.md)). It is
  tested in the same way, with more units in every layer than in the one before, through each way to load it.
- Where a projection already has a bias, or `bias` names the config key that gives it one, `refit="bias"` works.

"""


def table() -> str:
    """The text of the page."""
    lines = ["| model types | space | plain | non-uniform | config keys | bias |", "|---|---|---|---|---|---|"]
    for family in read_families(BUILTIN):
        lines += _rows(family)
    return HEAD + "\n".join(lines) + "\n"


def _rows(family: Family) -> Iterator[str]:
    types = ", ".join(f"`{name}`" for name in family.model_types)
    if family.text is not None:
        yield f"| {types} | those of the text model | yes | no: {TEXT_ONLY} | in `text_config` | as there |"
        return
    kinds: dict[str, Template] = {} if family.layer is None else {LAYER: family.layer}
    for name, template in family.spaces.items():
        kinds.setdefault(kind_of(name), template)
    for name, template in kinds.items():
        keys = ", ".join(f"`{key}`" for key in (template.size, *template.also))
        when = "".join(
            f", where `{key}` is {' or '.join(_plain(value) for value in values)}"
            for key, values in template.requires.items()
        )
        bias = f"`{template.bias}`" if template.bias else ""
        yield f"| {types} | `{name}` | yes{when} | {_may_differ(family, template)} | {keys} | {bias} |"
    if family.hidden is not None:
        yield f"| {types} | `{HIDDEN}` | yes | no: {ONE_FOR_ALL} | `{family.hidden.size}` | |"
    for name, reason in family.missing.items():
        yield f"| {types} | `{name}` | no: {reason} | | | |"


def _may_differ(family: Family, template: Template) -> str:
    if template is family.layer:
        return f"no: {ONE_FOR_ALL}"
    reason = template.uniform or family.uniform or ("" if family.layer_class else UNDESCRIBED)
    return f"no: {reason}" if reason else "yes"


def _plain(value: object) -> str:
    return "null" if value is None else str(value).lower()


if __name__ == "__main__":
    sys.stdout.write(table())
