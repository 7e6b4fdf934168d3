"""Set documents of the calibration files aside, so that a choice can be made without looking at the evaluation text.

    python examples/benchmarks/set_aside.py DATA OUT [--domains wiki code math] [--share 0.2]

Reads DATA/calibration/*.jsonl and writes a folder of the same form as DATA: `calibration/` holds most of each file,
`heldout/` what was set aside of the named domains, and `unseen/` what was set aside of the others.
"""

from __future__ import annotations

import random
from argparse import ArgumentParser, Namespace
from pathlib import Path


def divided(path: Path, share: float = 0.2, seed: int = 0) -> tuple[list[str], list[str]]:
    """The lines of a file in an order that the seed chooses: those to calibrate on, and the share to set aside."""
    lines = path.read_text().splitlines(keepends=True)
    random.Random(seed).shuffle(lines)
    used = int(len(lines) * (1 - share))
    return lines[:used], lines[used:]


def run(args: Namespace) -> None:
    """Divide every file, with the same seed."""
    out = Path(args.out)
    for folder in ("calibration", "heldout", "unseen"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for path in sorted((Path(args.data) / "calibration").glob("*.jsonl")):
        used, aside = divided(path, args.share, args.seed)
        folder = "heldout" if path.stem in args.domains else "unseen"
        (out / "calibration" / path.name).write_text("".join(used))
        (out / folder / path.name).write_text("".join(aside))


def main(arguments: list[str] | None = None) -> None:
    """Read the arguments and run."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("out")
    parser.add_argument("--domains", nargs="+", default=["wiki", "code", "math"])
    parser.add_argument("--share", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    run(parser.parse_args(arguments))


if __name__ == "__main__":
    main()
