"""Which token of a transcript is chosen: penalties of what the window has, filters, and the draw."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shuteye.tasks.transcribe.requests import TranscribeParams


def penalized(scores: torch.Tensor, params: TranscribeParams, said: Sequence[int]) -> torch.Tensor:
    """Logits [vocab_size] after the penalties, defined as in vLLM; does not write to `scores`.

    Args:
        said: text tokens of the window. Timestamps are ruled by their order, and are never penalized.
    """
    if not said or not params.has_penalties:
        return scores
    seen, counts = torch.unique(torch.tensor(list(said)), return_counts=True)
    found = scores[seen]
    repeated = params.repetition_penalty
    found = torch.where(found > 0, found / repeated, found * repeated)
    found = found - params.frequency_penalty * counts - params.presence_penalty
    return scores.index_copy(0, seen, found)


def drawn(scores: torch.Tensor, params: TranscribeParams, *, num_sampled: int) -> int:
    """The likeliest token at temperature 0, else one that is drawn: by seed and `num_sampled` alone.

    Args:
        num_sampled: tokens sampled for the request before this one.
    """
    if params.temperature == 0.0:
        return int(scores.argmax())
    chances = _filtered(torch.softmax(scores / params.temperature, dim=-1), params)
    generator = torch.Generator().manual_seed((params.seed * 1_000_003 + num_sampled) % 2**63)
    return int(torch.multinomial(chances, 1, generator=generator))


def _filtered(chances: torch.Tensor, params: TranscribeParams) -> torch.Tensor:
    """Probabilities [vocab_size], not normalised again; the likeliest always stays."""
    if params.top_k is not None and 0 < params.top_k < len(chances):
        least = chances.topk(params.top_k).values[-1]
        chances = chances.where(chances >= least, 0.0)
    if params.min_p:
        chances = chances.where(chances >= params.min_p * chances.max(), 0.0)
    if params.top_p is not None and params.top_p < 1.0:
        ranked, tokens = chances.sort(descending=True)
        before = ranked.cumsum(0) - ranked
        ranked = ranked.where(before < params.top_p * ranked.sum(), 0.0)
        chances = torch.zeros_like(chances).index_copy(0, tokens, ranked)
    return chances
