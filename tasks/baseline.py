"""The trivial baseline that stands beside every result: logistic regression on a thumbnail, trained on the labels themselves.

Shapes: N training images, Q test images, T pixels of the thumbnail, F findings.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

THUMBNAIL = 16


def thumbnails(pixels: Tensor) -> NDArray[np.float64]:
    """(N, C, H, W) to (N, 256): area means of a 16 x 16 grid over the first channel."""
    small: NDArray[np.float64] = F.adaptive_avg_pool2d(pixels[:, :1].float(), THUMBNAIL).flatten(1).double().numpy()
    return small


def logistic_scores(
    train: NDArray[np.float64], labels: NDArray[np.float64], test: NDArray[np.float64], penalty: float = 1.0, steps: int = 200
) -> NDArray[np.float64]:
    """(Q, F) scores of one logistic regression per finding, L2-penalised as scikit-learn's with C = 1 / ``penalty``.

    Args:
        train: (N, T), standardised here by its own mean and deviation.
        labels: (N, F) of 1 and 0; anything else (uncertain, not mentioned) does not count for its finding.
        test: (Q, T).
    """
    mean, deviation = train.mean(0), train.std(0) + 1e-8
    x, q = (torch.from_numpy((part - mean) / deviation) for part in (train, test))
    known = torch.from_numpy(np.isin(labels, (0, 1)))
    y = torch.from_numpy(np.where(known.numpy(), labels, 0.0))
    weight = torch.zeros(x.shape[1], labels.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(labels.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, history_size=20, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        per_image = F.binary_cross_entropy_with_logits(x @ weight + bias, y, reduction="none")
        loss = (per_image * known).sum() + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        scores: NDArray[np.float64] = (q @ weight + bias).sigmoid().numpy()
    return scores
