"""Other readings of a trained transformer, whichever library it is from: what its last self-attention hands on, changed for one pass.

A class token gathers what an image is of; the tokens beside it were trained to serve it, and attend far. Read with another last attention,
they say what lies under themselves:

    values            a token keeps its own value: "Extract Free Dense Labels from CLIP" (MaskCLIP), arXiv:2112.01071, sec. 3.2
    value_similarity  a token gathers values that are like its own, softmax(V V^T / sqrt(d)) V: CLIP Surgery, arXiv:2304.05653, eq. 5, and
                      AnoVL, arXiv:2308.15939; there in a second path beside the first, here in its place
    early_attention   the averaged attention of the layers before takes the place of the last: CLIPer's early-layer fusion,
                      arXiv:2411.13836

Attention is met where all libraries call it, in ``torch.nn.functional.scaled_dot_product_attention``; one whose module multiplies by itself
(MONAI's without flash attention) is not seen, and that is an error rather than an unchanged map. Attention with other queries than keys (a
learned query that pools tokens) is left as it is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

Reading = Literal["values", "value_similarity", "early_attention"]
Result = TypeVar("Result")


class ReadingError(ValueError):
    """A tower that cannot be read so."""


_REPLACED = threading.RLock()
"""Held while the function is replaced, so that two threads do not put back each other's."""


def with_reading(run: Callable[[], Result], reading: Reading, layers: int = 1) -> Result:
    """What ``run`` returns where the last self-attentions that it comes by are read otherwise. It runs twice, first to count them.

    Args:
        run: a pass of a tower, the same each time.
        reading: see the module.
        layers: how many of the last are changed.
    Raises:
        ValueError: an unknown reading.
        ReadingError: a tower without ``layers`` self-attentions (for ``early_attention`` one more) that are seen.
    """
    if reading not in get_args(Reading):
        raise ValueError(f"reading is {reading!r}, expected one of {', '.join(get_args(Reading))}")
    with _REPLACED, _slow_path():
        with _Attentions() as counted:
            run()
        needed = layers + (reading == "early_attention")
        if layers < 1 or counted.count < needed:
            raise ReadingError(
                f"the image tower came by {counted.count} self-attentions that can be read, {reading} of {layers} needs {needed}; take a "
                "transformer tower (timm, open_clip, transformers), or another source of maps"
            )
        with _Attentions(counted.count - layers, reading):
            return run()


class _Attentions:
    """While entered, counts the self-attentions of this thread, and changes those from number ``start`` on.

    The function is replaced where libraries look it up: torch's own layers call it from within another function, where a
    ``TorchFunctionMode`` no longer sees it. Other threads get what they always got.
    """

    def __init__(self, start: int | None = None, reading: Reading = "values") -> None:
        self.start, self.reading, self.count = start, reading, 0
        self._early: Tensor | None = None
        self._summed = 0
        self._thread = threading.get_ident()

    def __enter__(self) -> _Attentions:
        self._own = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = self._attend
        return self

    def __exit__(self, *_: object) -> None:
        F.scaled_dot_product_attention = self._own

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the function that it stands for."""
        if threading.get_ident() != self._thread or query.shape != key.shape or query.shape[-2] < 2:
            return self._own(query, key, value, *args, **kwargs)
        self.count += 1
        if self.start is None or self.count <= self.start:
            if self.start is not None and self.reading == "early_attention":
                self._remember(query, key, *args, **kwargs)
            return self._own(query, key, value, *args, **kwargs)
        if self.reading == "values":
            return value
        if self.reading == "value_similarity":
            return self._own(value, value, value)
        if self._early is None or self._early.shape[-1] != value.shape[-2]:
            raise ReadingError(
                "early_attention: the layers before the last have another number of tokens, so their attention does not fit it"
            )
        return (self._early / self._summed).to(value.dtype) @ value

    def _remember(
        self,
        query: Tensor,
        key: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> None:
        """Add up attention, averaged over heads; layers of another number of tokens (windows, pyramids) start anew."""
        del dropout_p, is_causal  # image towers in use have neither
        scores = (query @ key.transpose(-2, -1)) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        attention = scores.softmax(-1).mean(-3, keepdim=True)
        if self._early is None or self._early.shape != attention.shape:
            self._early, self._summed = attention, 1
        else:
            self._early, self._summed = self._early + attention, self._summed + 1


@contextmanager
def _slow_path() -> Iterator[None]:
    """PyTorch's own transformer layers skip the function that is watched where they can."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
