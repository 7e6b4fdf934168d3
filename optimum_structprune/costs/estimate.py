"""What a pruning costs, as values and as a text."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from ..config.domains import written_by_model
from ..config.pruning import StructPruneConfig
from ..domains.broad import texts_of, with_written_text
from ..record.text import table
from .flops import Flops, Traffic, flops, traffic
from .machines import FACTORS, MACHINES, MOVES, PRODUCTS, Estimate, estimate
from .need import ERROR, USABLE, Need, need
from .room import gigabytes
from .workload import FINALS, Workload


HEAD = ("machine", "layers in", "per GPU", "CPU memory", "compute", "moving", "in all")


@dataclass(frozen=True)
class Setting:
    """Where a pruning is to run.

    Attributes:
        offload: Where layers are while they do not run: `cpu`, `disk`, or None for the device itself; a machine of the
            table offloads where it has to, if None.
        processes: The number of processes that share the samples.
        device_memory: The bytes of the device; None leaves out whether it fits.
    """

    offload: str | None = None
    processes: int = 1
    device_memory: float | None = None


@dataclass(frozen=True)
class Cost:
    """What a pruning costs.

    Attributes:
        setting: Where it is to run.
        tokens: The number of calibration tokens.
        need: The memory of one process.
        flops: The operations of all processes.
        traffic: The bytes that one process moves.
        machines: What it takes on machines of the table.
        notes: What the numbers do not say.
    """

    setting: Setting
    tokens: int
    need: Need
    flops: Flops
    traffic: Traffic
    machines: tuple[Estimate, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, with the table of machines and all assumptions."""
        return {
            **asdict(self),
            "need": {**asdict(self.need), "device": self.need.device},
            "flops": {**asdict(self.flops), "total": self.flops.total},
            "machines": [{**asdict(one), "seconds": one.seconds} for one in self.machines],
            "assumed": {
                "machines": [asdict(machine) for machine in MACHINES],
                "share_of_rate": {"products": PRODUCTS, "factors": FACTORS},
                "share_of_bandwidth": MOVES,
            },
        }

    def __str__(self) -> str:
        """Memory, operations, bytes, machines and assumptions, as tables."""
        where = f" with --offload {self.setting.offload}" if self.setting.offload else ""
        return "\n".join(
            [
                f"cost of {self.tokens:,} tokens{where}, for each of {self.setting.processes} processes",
                table(self._memory()),
                *([self._verdict()] if self.setting.device_memory is not None else []),
                table(self._work()),
                table(self._machines()),
                *assumptions(),
                *self.notes,
            ]
        )

    def _memory(self) -> list[tuple[str, str]]:
        found = self.need
        rows = {"peak on the device": found.device, "  weights": found.weights, "  hidden states": found.hidden}
        rows |= {f"  {found.stage}": found.working, "peak in CPU memory": found.host}
        return [(label, gigabytes(count)) for label, count in rows.items()]

    def _verdict(self) -> str:
        memory = self.setting.device_memory or 0
        if self.need.fits(memory):
            return f"fits into {gigabytes(memory)}"
        weights = self.need.weights > memory / 2 and self.setting.offload is None
        advice = "--offload cpu or disk" if weights else "fewer samples, a smaller batch_size or criterion='wanda'"
        return f"does not fit into {gigabytes(memory)}; what helps is {advice}"

    def _work(self) -> list[tuple[str, str]]:
        rows = [(f"TFLOP, {name}", _teras(count)) for name, count in asdict(self.flops).items()]
        return rows + [(f"bytes {name}", gigabytes(count)) for name, count in asdict(self.traffic).items()]

    def _machines(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = [
            ("machine", "layers in", "per GPU", "CPU memory", "compute", "moving", "in all")
        ]
        for one in self.machines:
            times = [duration(value) for value in (one.compute, one.moving, one.seconds)]
            where = one.offload or "GPU"
            compute, moving, whole = times if one.fits else ["-", "-", "does not fit"]
            rows.append((one.machine, where, gigabytes(one.device), gigabytes(one.host), compute, moving, whole))
        return rows


def assumptions() -> list[str]:
    """What the times follow from, in lines of text."""
    lines = [
        f"{machine.name}: {machine.half / 1e12:g} TFLOP/s in 16 bits, {machine.single / 1e12:g} in fp32; GB/s: "
        f"{machine.link / 1e9:g} to the CPU, {machine.disk / 1e9:g} from the disk, {machine.network / 1e9:g} between "
        f"GPUs; {machine.host / 1e9:g} GB of CPU memory"
        for machine in MACHINES
    ]
    return [
        f"assumed: {PRODUCTS:.0%} of these rates in products, {FACTORS:.0%} in factors, {MOVES:.0%} of the "
        f"bandwidths; memory on top of the weights to {ERROR:.0%}, and {USABLE:.0%} of a memory usable",
        *lines,
    ]


def _teras(count: float) -> str:
    """A number in units of 10¹², with three digits or more."""
    teras = count / 1e12
    return f"{teras:,.0f}" if teras >= 100 else f"{teras:.3g}"


def duration(seconds: float) -> str:
    """A time in seconds, minutes or hours."""
    for most, unit, size in ((120, "s", 1), (7200, "min", 60)):
        if seconds < most:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 3600:.1f} h"


def cost(config: StructPruneConfig, work: Workload, setting: Setting) -> Cost:
    """What a pruning costs."""
    checkpoint = config.checkpoint_dir is not None
    found = need(work, setting.offload, setting.processes)
    return Cost(
        setting=replace(setting),
        tokens=work.samples.tokens,
        need=found,
        flops=flops(work),
        traffic=traffic(work, setting.offload, checkpoint, setting.processes),
        machines=tuple(estimate(work, machine, setting.offload, checkpoint) for machine in MACHINES),
        notes=_notes(config),
    )


def _notes(config: StructPruneConfig) -> tuple[str, ...]:
    texts = texts_of(with_written_text(config))
    left_out = {
        "the model writes a part of the text before, once": any(map(written_by_model, texts)),
        f"max_perplexity_ratio={config.max_perplexity_ratio} takes as many rounds as it needs": (
            config.max_perplexity_ratio is not None
        ),
        "recovery trains afterwards": config.recovery is not None,
    }
    notes = [f"not counted: {text}" for text, there in left_out.items() if there]
    if config.searches:
        notes.append(f"counted: {FINALS[config.allocation]} shapes pruned on trial, the most; those alike are one")
    return tuple(notes)
