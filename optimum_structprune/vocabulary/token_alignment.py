"""Align the tokens and the predictions of an original model with the tokens of a smaller vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.token_space import named_ids
from ..domains.manifest import ids_in
from ..system.errors import StructPruneError
from .tokens import Vocabulary


class AlignedToken(NamedTuple):
    """One token of a text in the smaller vocabulary.

    Attributes:
        token: The token id in the smaller vocabulary.
        row: The index of its original token among the counted original tokens, or -1 if the original token is not
            counted.
        node: The node of the prefix before it, or -1 if no original prediction applies to that prefix. Inside an
            original token, the prefix is the beginning of that token. For the first part of an original token, the
            prefix is the previous original token, because the original model may have expected a longer token there.
    """

    token: int
    row: int
    node: int


class AlignedChunk(NamedTuple):
    """Consecutive positions of a text, with index tensors on the device of the logits."""

    original: slice  # the counted original tokens of the positions, with the token before them
    rows: Tensor  # the original token of each position, relative to the start of `original`, shape `(positions,)`
    first: Tensor  # 1 at the first part of an original token, else 0, shape `(positions,)`
    inner: Tensor  # the positions that have a node, shape `(inner,)`
    ends: Tensor  # the cumulative number of branches of their nodes, shape `(inner,)`
    offsets: Tensor  # the first branch of each node minus the branches of earlier inner positions, shape `(inner,)`
    num_branches: int  # the number of branches of all inner positions


class TokenAlignment:
    """The spelling of each token of an original model by one or more tokens of a smaller vocabulary.

    The spellings form a tree. Its nodes are the proper prefixes of spellings. The branches of a node are the original
    tokens whose spelling begins with the prefix. Each branch has the part after the prefix, or `size` at the end of
    the spelling.

    Args:
        spellings: The token ids in the smaller vocabulary by original token id. They are empty if nothing spells a
            token.
        size: The number of tokens in the smaller vocabulary.
    """

    def __init__(self, spellings: Sequence[tuple[int, ...]], size: int):
        self.spellings = spellings
        self.size = size

        # `size` stands for the end of a spelling.
        first_parts = torch.tensor([(parts + (size,))[0] for parts in spellings])

        self.nodes: dict[tuple[int, ...], int] = {}
        for parts in spellings:
            for end in range(1, len(parts)):
                self.nodes.setdefault(parts[:end], len(self.nodes))

        branches: list[tuple[int, int, int]] = []
        for token, parts in enumerate(spellings):
            with_end = parts + (size,)
            for end in range(1, len(parts) + 1):
                if parts[:end] in self.nodes:
                    branches.append((self.nodes[parts[:end]], token, with_end[end]))
        table = torch.tensor(sorted(branches), dtype=torch.long).view(-1, 3)
        node_of_branch, token_of_branch, part_of_branch = table.unbind(1)

        self._counts = node_of_branch.bincount(minlength=len(self.nodes))
        self._starts = self._counts.cumsum(0) - self._counts
        # The tables are as large as a vocabulary, so each device gets only one copy.
        self._tables = {torch.device("cpu"): (first_parts, token_of_branch, part_of_branch)}

    @classmethod
    def between(
        cls,
        original: PreTrainedModel,
        original_tokenizer: PreTrainedTokenizerBase,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
    ) -> TokenAlignment:
        """Align the tokens of an original model with the tokens of a pruned model.

        Raises:
            StructPruneError: If the model has tokens that the original model lacks, or the same tokens in another
                order.
        """
        original_size = original.config.get_text_config().vocab_size
        size = model.config.get_text_config().vocab_size
        original_tokens = 1 + max(original_tokenizer.get_vocab().values())
        own_tokens = 1 + max(tokenizer.get_vocab().values())

        keep = ids_in(original_tokenizer, tokenizer, min(own_tokens, size))
        # Among the rows without a token, pruning first keeps the rows that the model's configs name.
        config_ids = named_ids(original)
        spare_rows = sorted(range(original_tokens, original_size), key=lambda row: row not in config_ids)
        keep += sorted(spare_rows[: max(size - own_tokens, 0)])

        # `ids_in` returns -1 for tokens that the original tokenizer lacks.
        in_order = keep == sorted(set(keep) - {-1})
        if not in_order or keep[-1] >= original_size:
            raise StructPruneError(
                f"The original model has a vocabulary of {original_size} tokens and the model one of {size}, and by "
                "the same ids they mean other tokens, which cannot be compared. Pass the model that was pruned."
            )

        new_ids = {old: new for new, old in enumerate(keep)}
        spellings: list[tuple[int, ...]] = [() for _ in range(original_size)]
        for old, new in new_ids.items():
            spellings[old] = (new,)

        removed_tokens = set(range(min(original_tokens, original_size))).difference(new_ids)
        if removed_tokens:
            vocabulary = Vocabulary.of(original_tokenizer)
            unknown = new_ids.get(original_tokenizer.unk_token_id)
            for token in removed_tokens:
                spellings[token] = _spelling(vocabulary, token, new_ids, unknown)
        return cls(spellings, size)

    def is_identity(self) -> bool:
        """Return whether both vocabularies have the same tokens with the same ids."""
        if self.size != len(self.spellings):
            return False
        return all(parts == (token,) for token, parts in enumerate(self.spellings))

    def align(self, ids: Sequence[int], is_counted: Sequence[bool], first_row: int = 0) -> list[AlignedToken]:
        """Spell a text of original token ids in the smaller vocabulary.

        Args:
            ids: The original token ids.
            is_counted: Whether the prediction of each original token counts.
            first_row: The number of counted original tokens in earlier texts of the same sample.

        Raises:
            StructPruneError: If a token has no spelling.
        """
        aligned: list[AlignedToken] = []
        next_row = first_row
        node = -1
        for token, counts in zip(ids, is_counted, strict=True):
            parts = self.spellings[token]
            if not parts:
                raise StructPruneError(f"The token {token} of the original model cannot be spelled without itself.")

            row = -1
            if counts:
                row = next_row
                next_row += 1

            # The node of the first part belongs to the previous original token.
            aligned.append(AlignedToken(parts[0], row, node))
            for position in range(1, len(parts)):
                aligned.append(AlignedToken(parts[position], row, self.nodes[parts[:position]]))

            node = -1
            if counts:
                node = self.nodes.get(parts, -1)
        return aligned

    def chunks(
        self, rows: Tensor, nodes: Tensor, positions: int, device: torch.device
    ) -> tuple[Tensor, list[AlignedChunk]]:
        """Split positions into chunks.

        All sizes are computed on the CPU and all indices are copied at once, so that no chunk waits for the device.

        Returns:
            The rows of all positions on the device, and the chunks.
        """
        rows, nodes = torch.stack([rows, nodes]).cpu()
        first = (rows.diff(prepend=rows.new_tensor([-1])) != 0).long()
        indices = [rows]
        slices: list[slice] = []
        branches: list[int] = []
        parts = zip(rows.split(positions), nodes.split(positions), first.split(positions), strict=True)
        for rows_of_chunk, nodes_of_chunk, first_of_chunk in parts:
            start = max(int(rows_of_chunk[0]) - 1, 0)
            slices.append(slice(start, int(rows_of_chunk[-1]) + 1))

            inner = (nodes_of_chunk >= 0).nonzero()[:, 0]
            counts = self._counts[nodes_of_chunk[inner]]
            ends = counts.cumsum(0)
            offsets = self._starts[nodes_of_chunk[inner]] + counts - ends
            branches.append(int(counts.sum()))
            indices += [rows_of_chunk - start, first_of_chunk, inner, ends, offsets]

        all_rows, *moved = torch.cat(indices).to(device).split([len(index) for index in indices])
        chunks = []
        for number, (original, num_branches) in enumerate(zip(slices, branches, strict=True)):
            of_rows, of_first, inner, ends, offsets = moved[5 * number : 5 * number + 5]
            chunks.append(AlignedChunk(original, of_rows, of_first, inner, ends, offsets, num_branches))
        return all_rows, chunks

    @torch.no_grad()
    def next_part(
        self, probabilities: Tensor, entropy_error: Tensor, chunk: AlignedChunk
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the distribution of the next part, and the probability that the original model has one.

        Args:
            probabilities: The original next-token probabilities of the chunk's tokens, shape `(tokens,
                original_size)`.
            entropy_error: The error of their negative entropies in nats, shape `(tokens,)`. It is 0 for exact
                probabilities. The negative entropy of samples is too large.
            chunk: The positions.

        Returns:
            The distribution over the smaller vocabulary, shape `(positions, size)`; the error of its negative entropy,
            `(positions,)`; and its weight, `(positions,)`. The weight is less than 1 inside an original token if a
            shorter original token may have ended there, because the original model has no next-token distribution
            after the shorter token. The alignment adds up few probabilities, so the error at the start of an original
            token is the same before and after it. The error inside an original token is unknown and counts as 0.
        """
        device = probabilities.device
        first_parts, token_of_branch, part_of_branch = self._tables_on(device)

        # The distribution at the start of an original token: the first parts of all original tokens.
        begins = probabilities.new_zeros(len(probabilities), self.size + 1)
        begins = begins.scatter_add_(1, first_parts.expand_as(probabilities), probabilities)[:, : self.size]
        begins = begins / begins.sum(1, keepdim=True)

        # The probability of each part after the prefix of each inner position. The column `size` is the end.
        number = torch.arange(chunk.num_branches, device=device)
        owner = torch.searchsorted(chunk.ends, number, right=True)
        branch = number + chunk.offsets[owner]
        position = chunk.inner[owner]
        # The prefix of a first part is the previous original token.
        prediction = (chunk.rows - chunk.first)[position]
        following = probabilities.new_zeros(len(chunk.rows), self.size + 1)
        index = (position, part_of_branch[branch])
        following.index_put_(index, probabilities[prediction, token_of_branch[branch]], accumulate=True)

        continues = following[:, : self.size].sum(1)
        ends = following[:, self.size]
        # A prefix without any probability results in 0 / 0.
        continuing = (continues / (continues + ends)).nan_to_num()
        inside = following[:, : self.size] / continues.clamp_min(1e-38)[:, None]

        is_first = chunk.first.bool()
        ended = torch.where(is_first, 1 - continuing, 0.0)[:, None]
        target = ended * begins[chunk.rows] + (1 - ended) * inside
        error = ended[:, 0] * entropy_error[chunk.rows]
        return target, error, torch.where(is_first, 1.0, continuing)

    def _tables_on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return the first part of each original token, and the token and the following part of each branch."""
        if device not in self._tables:
            first_parts, token_of_branch, part_of_branch = self._tables[torch.device("cpu")]
            self._tables[device] = (first_parts.to(device), token_of_branch.to(device), part_of_branch.to(device))
        return self._tables[device]


def _spelling(vocabulary: Vocabulary, token: int, new_ids: dict[int, int], unknown: int | None) -> tuple[int, ...]:
    """Spell a removed token by kept tokens, or by the unknown token if its script has been removed."""
    parts = vocabulary.parts(token, new_ids)
    if parts and all(part in new_ids for part in parts):
        return tuple(new_ids[part] for part in parts)

    occurs_in_text = token in vocabulary.letters or vocabulary.parts(token)
    if occurs_in_text and unknown is not None:
        return (unknown,)
    return ()
