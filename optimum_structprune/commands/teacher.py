"""`structprune teacher`: write the predictions of a teacher to disk."""

from __future__ import annotations

from argparse import Namespace

from ..arch.meta import check_positions, positions_of
from ..config.domains import as_domain
from ..distillation.teacher_file_writer import text_rows, write_teacher
from ..domains.sources import resolve
from ..system.disk import OFFLOAD, Output
from ..system.processes import across_processes
from ..system.stages import readable_size
from .loading import Loading
from .output import Result


# The default maximum number of tokens of a document.
SEQ_LENGTH = 1024


def teacher(args: Namespace) -> Result:
    """Write a teacher file, and return its manifest."""
    loading = Loading.of(args)
    meta_model = loading.without_weights(args.model)
    seq_length = args.seq_length or int(min(SEQ_LENGTH, positions_of(meta_model)))
    check_positions(meta_model, seq_length, f"--seq-length {seq_length}")
    tokenizer = loading.tokenizer(args.model)

    # The lock is taken first: taking it removes the working folders of other runs.
    output = Output(args.output)
    with across_processes(), output.locked(), output.sibling(OFFLOAD) as scratch:
        rows = text_rows(resolve(as_domain(domain) for domain in args.domain), tokenizer, seq_length)
        model = loading.model(args.model, scratch)
        manifest = write_teacher(
            model,
            rows,
            args.output,
            tokenizer,
            top=args.top,
            samples=args.samples,
            temperature=args.temperature,
        )

    size = readable_size(round(manifest.tokens * manifest.bytes_per_token))
    lines = [
        f"{manifest.tokens:,} tokens in {manifest.rows:,} documents take {size}, "
        f"{manifest.bytes_per_token:.0f} bytes per token",
        f"Saved to {args.output}; train from it with attach_teacher(trainer, {args.output!r})",
    ]
    values = manifest.to_dict()
    values["output"] = args.output
    return Result("\n".join(lines), values)
