"""More positions for a text model that learned one vector a position, without training anew.

Shapes: P positions that were learned, N wanted, W width.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

_TABLES = ("position_embeddings", "position_embedding", "embed_positions", "wpe")
"""What the table is called in BERT and its kin, in CLIP, in OPT and in GPT-2."""


LARGEST_STRETCH = 32
"""Times as many positions; a configuration that asks for more than this is a mistake, and memory."""


def stretch(table: Tensor, count: int, keep: int) -> Tensor:
    """(N, W): the first ``keep`` rows of ``table`` as they are, bit for bit, and the others drawn apart to fill the rest.

    With f = (N - keep) / (P - keep), row p >= keep lies at x = keep + (p - keep) / f of the old table: linear between its rows, and beyond
    the last one it goes on in the direction of the last two.

    Args:
        table: (P, W).
        count: N, at least P.
        keep: positions that are used most and so learned best; 20 in the paper.
    Raises:
        ValueError: fewer positions than there are, far more, or fewer than two to draw apart.
    Source: "Long-CLIP: Unlocking the Long-Text Capability of CLIP", arXiv:2403.15378, section 3.1, where f is 4 (N = 4 P - 3 keep); here
    it is what N asks for.
    """
    known = len(table)
    if count < known:
        raise ValueError(f"stretch_to {count} is less than the {known} positions that the model has; give at least as many, or None")
    if not 0 <= keep <= known - 2:
        raise ValueError(f"keep_positions {keep} leaves none of {known} positions to draw apart; give 0 to {known - 2}")
    if count > LARGEST_STRETCH * known:
        raise ValueError(f"stretch_to {count} is more than {LARGEST_STRETCH} times the {known} positions that the model has")
    if count == known:
        return table.clone()
    place = torch.arange(count - keep, dtype=torch.float64) * ((known - keep) / (count - keep)) + keep
    left = place.floor().long().clamp_max(known - 2)
    share = (place - left).to(table.device)[:, None]  # beyond 1 after the last row
    moved = table[left].double() * (1 - share) + table[left + 1].double() * share
    return torch.cat([table[:keep], moved.to(table.dtype)])


def find_table(encoder: nn.Module) -> tuple[str, nn.Embedding, int] | None:
    """Name of a model's table of positions, the table, and its rows before position 0; None for rotary and relative positions.

    RoBERTa, MPNet and Longformer count from the padding index + 1, OPT from 2; the rows before are no positions.
    """
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _TABLES:
            padding = module.padding_idx
            return name, module, int(getattr(module, "offset", 0 if padding is None else padding + 1))
    return None


def position_count(encoder: Any) -> int | None:
    """How many tokens a Hugging Face model takes; None if its positions know no end."""
    found = find_table(encoder)
    if found is not None:
        return found[1].num_embeddings - found[2]
    return getattr(encoder.config, "max_position_embeddings", None)


def stretched(encoder: Any, count: int, keep: int) -> Any:
    """The Hugging Face model with ``count`` positions, as :func:`stretch` makes them; itself, if it has so many already.

    Raises:
        ValueError: positions that are not learned one by one, so that there is nothing to stretch; or see :func:`stretch`.
    """
    found = find_table(encoder)
    if found is None:
        raise ValueError(
            f"stretch_to: the positions of a {encoder.config.model_type} are rotary or relative, not a table; it needs no stretching. "
            "Leave stretch_to out and give max_tokens"
        )
    name, table, before = found
    positions = table.weight.detach()[before:]
    if count == len(positions):
        return encoder
    rows = torch.cat([table.weight.detach()[:before], stretch(positions, count, keep)])
    config = copy.deepcopy(encoder.config)
    config.max_position_embeddings += count - len(positions)
    longer = type(encoder)(config).to(dtype=table.weight.dtype)
    if getattr(encoder, "pooler", None) is None and hasattr(longer, "pooler"):
        longer.pooler = None
    longer.load_state_dict({**encoder.state_dict(), f"{name}.weight": rows})
    return longer.train(encoder.training)
