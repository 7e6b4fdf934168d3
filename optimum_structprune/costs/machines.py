"""Machines by their data sheets, and how long a pruning takes on them. Numbers in, numbers out."""

from __future__ import annotations

from dataclasses import dataclass

from .flops import divided, flops, repeated, traffic
from .need import USABLE, need
from .workload import Workload


# What programs reach of the numbers in data sheets. These are assumptions, and the estimates are as good as they are.
PRODUCTS = 0.4  # of the peak rate, for matrix products
FACTORS = 0.2  # of the peak rate in fp32, for Cholesky factors and triangular solves
MOVES = 0.7  # of a bandwidth
HALF = 2  # bytes of a weight up to which the 16-bit rate counts
OFFLOADS = (None, "cpu", "disk")  # from the fastest on


@dataclass(frozen=True)
class Machine:
    """One or several alike nodes with GPUs, by their data sheets.

    Attributes:
        name: The name.
        nodes: The number of nodes.
        devices: The number of GPUs in a node; each has a process of its own.
        memory: The bytes of one GPU.
        host: The bytes of a node's CPU memory.
        half: The peak rate of a GPU with 16-bit inputs and fp32 sums, in FLOP/s, without sparsity.
        single: The peak rate of a GPU in fp32 without TF32, in FLOP/s.
        link: The bandwidth between a GPU and the CPU's memory, in bytes per second and direction.
        disk: The bandwidth of a node's disk, in bytes per second.
        network: The bandwidth of a GPU to the others, in bytes per second and direction.
    """

    name: str
    nodes: int
    devices: int
    memory: float
    host: float
    half: float
    single: float
    link: float
    disk: float
    network: float

    @property
    def processes(self) -> int:
        """The number of GPUs."""
        return self.nodes * self.devices


# RTX 4090: 165 TFLOP/s in bf16, 82.6 in fp32, PCIe 4.0 x16. H100 SXM: 989 and 67, PCIe 5.0 x16, NVLink 450 GB/s one
# way; a network card of 400 Gbit/s for each GPU between nodes. NVMe disks.
MACHINES = (
    Machine("1 x 24 GB (RTX 4090)", 1, 1, 24e9, 128e9, 165e12, 82.6e12, 32e9, 5e9, 32e9),
    Machine("1 x 80 GB (H100)", 1, 1, 80e9, 256e9, 989e12, 67e12, 64e9, 5e9, 450e9),
    Machine("8 x 80 GB (H100)", 1, 8, 80e9, 2e12, 989e12, 67e12, 64e9, 10e9, 450e9),
    Machine("2 nodes of 8 x 80 GB", 2, 8, 80e9, 2e12, 989e12, 67e12, 64e9, 10e9, 50e9),
)


@dataclass(frozen=True)
class Estimate:
    """One pruning on one machine.

    Attributes:
        machine: The name of the machine.
        fits: Whether its memory suffices in some way.
        offload: Where layers are while they do not run: the fastest way that fits; None for the GPU itself.
        device: The bytes at the peak on each GPU.
        host: The bytes at the peak in a node's CPU memory.
        compute: The seconds of computing.
        moving: The seconds of reading, writing, copying and adding up.
    """

    machine: str
    fits: bool
    offload: str | None
    device: int
    host: int
    compute: float
    moving: float

    @property
    def seconds(self) -> float:
        """The time in all; nothing is assumed to happen at the same time."""
        return self.compute + self.moving


def estimate(work: Workload, machine: Machine, offload: str | None = None, checkpoint: bool = False) -> Estimate:
    """What a pruning takes on a machine."""
    fits, chosen = False, offload
    for way in (offload,) if offload is not None else OFFLOADS:
        found, chosen = need(work, way, machine.processes), way
        fits = found.fits(machine.memory) and found.host * machine.devices <= machine.host * USABLE
        if fits:
            break
    compute, moving = _compute(work, machine), _moving(work, machine, chosen, checkpoint)
    return Estimate(machine.name, fits, chosen, found.device, found.host * machine.devices, compute, moving)


def _compute(work: Workload, machine: Machine) -> float:
    """Processes share passes and moments, and divide trials; each of them makes the scores and refits of rounds."""
    found, parts, along = flops(work), divided(work), repeated(work)
    rate = machine.half if work.itemsize <= HALF else machine.single
    own = found.scoring + found.refit - parts + parts / machine.processes
    passes = along + (found.shared - along) / machine.processes
    return passes / (rate * PRODUCTS) + own / (machine.single * FACTORS)


def _moving(work: Workload, machine: Machine, offload: str | None, checkpoint: bool) -> float:
    """The processes of a node read the same files, which come from the disk once."""
    found = traffic(work, offload, checkpoint, machine.processes)
    disk = (found.read + found.written) / machine.disk
    # A sum over processes goes round once to be made, and once to be handed out.
    return (disk + found.copied / machine.link + 2 * found.summed / machine.network) / MOVES
