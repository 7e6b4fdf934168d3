"""Which fast kernels the widths of a plan would lose."""

from __future__ import annotations

from collections.abc import Iterator

from ..arch.spec import CHANNEL, EXPERT, GROUP, ArchSpec, Widths
from ..config.pruning import StructPruneConfig


# Widths of channels have to be multiples of the number; where a matrix is spread over devices, of as many more.
KERNELS = (
    (8, True, "tensor cores in half precision"),
    (32, False, "llama.cpp's Q8_0 and Q4_0, which leave other rows in 16 bits"),
    (64, True, "Marlin, the 4-bit kernel of vLLM and SGLang"),
    (128, True, "GPTQ and AWQ in groups of 128"),
    (256, False, "llama.cpp's K-quants, which leave other rows in more bits"),
)


def lost_kernels(config: StructPruneConfig, arch: ArchSpec, widths: Widths) -> Iterator[str]:
    """What runs with the present widths of each kind of space and not with `widths`, in one sentence for each kind."""
    parts = config.tensor_parallel
    for name in widths:
        spaces = arch.of(name)
        pairs = {(space.width, space.width_in(widths)) for space in spaces}
        needs = [
            (number * (parts if spread else 1), loss) for number, spread, loss in KERNELS if spaces[0].unit == CHANNEL
        ]
        if spaces[0].unit == GROUP:
            needs = [(parts, "tensor parallelism")]
        if spaces[0].unit == EXPERT:  # such as vLLM's, whose issue 51521 has counts that one of them refuses
            needs = [(config.expert_parallel, "expert parallelism"), (8, "fused router kernels of some engines")]
        lost = {
            f"{loss} (multiples of {number})": min(after for full, after in pairs if after % number)
            for number, loss in needs
            if any(after % number and not full % number for full, after in pairs)
        }
        options = "expert_parallel" if spaces[0].unit == EXPERT else "round_to and tensor_parallel"
        if lost:
            yield f"warning: {name} {min(lost.values())} has no {', no '.join(lost)}; see {options}"
