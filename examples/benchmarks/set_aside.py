"""Hold documents of the calibration files out, so that a choice needs no look at the evaluation text.

    python examples/benchmarks/set_aside.py DATA OUT [--domains wiki code math] [--share 0.2]

The script reads DATA/calibration/*.jsonl and writes a folder with the structure of DATA. `calibration/` contains most
of each file, `heldout/` the held-out documents of the named domains, and `unseen/` those of all other domains.
"""

from __future__ import annotations

import random
from argparse import ArgumentParser, Namespace
from pathlib import Path


def split_lines(path: Path, share: float = 0.2, seed: int = 0) -> tuple[list[str], list[str]]:
    """Return the lines of a file to calibrate on and the held-out lines, in random order.

    Args:
        path: The file.
        share: The share of the lines to hold out.
        seed: The seed of the order.
    """
    lines = path.read_text().splitlines(keepends=True)
    random.Random(seed).shuffle(lines)
    count = int(len(lines) * (1 - share))
    return lines[:count], lines[count:]


def run(args: Namespace) -> None:
    """Split every file with the same seed."""
    out = Path(args.out)
    for folder in ("calibration", "heldout", "unseen"):
        (out / folder).mkdir(parents=True, exist_ok=True)

    for path in sorted(Path(args.data, "calibration").glob("*.jsonl")):
        calibration, heldout = split_lines(path, args.share, args.seed)
        folder = "heldout"
        if path.stem not in args.domains:
            folder = "unseen"

        (out / "calibration" / path.name).write_text("".join(calibration))
        (out / folder / path.name).write_text("".join(heldout))


def main(argv: list[str] | None = None) -> None:
    """Read the arguments and run."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("out")
    parser.add_argument("--domains", nargs="+", default=["wiki", "code", "math"])
    parser.add_argument("--share", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)

    run(parser.parse_args(argv))


if __name__ == "__main__":
    main()
