"""The flags that push a result to the Hub; `prune` and `recover` share them."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import replace

from ..errors import StructPruneError
from .output import Result


def add_push_arguments(parser: ArgumentParser) -> None:
    """Declare `--push-to-hub` and `--private`."""
    parser.add_argument(
        "--push-to-hub",
        metavar="OWNER/NAME",
        help="Upload the result to this repository of the Hub once it is complete on the disk, with the token of `hf "
        "auth login` or of HF_TOKEN.",
    )
    parser.add_argument("--private", action="store_true", help="The repository is private.")


def check_push_arguments(args: Namespace) -> None:
    """Refuse a push that could not succeed, before work is done."""
    from ..saving.push import check_push

    if args.push_to_hub is not None:
        check_push(args.push_to_hub)
    elif args.private:
        raise StructPruneError("--private says what a repository is, and --push-to-hub names none; give both.")


def pushed(args: Namespace, result: Result) -> Result:
    """A result with the address that it was pushed to; unchanged where nothing is to be pushed, or it went aside."""
    from ..saving.push import push_to_hub
    from ..system.processes import is_first_rank

    if args.push_to_hub is None or result.code or not is_first_rank():
        return result
    url = push_to_hub(args.output, args.push_to_hub, private=args.private or None)
    return replace(result, text=f"{result.text}\npushed to {url}", values={**result.values, "pushed": url})
