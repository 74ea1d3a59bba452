"""A projector over a frozen image tower, which sees each image once: alignment in minutes on a CPU.

Shapes: I images, N tokens, F width of the frozen tower, D embedding width.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from medvl.nn.features import FORMAT, FeatureStore, Kept, module_sha256, tensor_bytes
from medvl.types import ImageBatch, ImageEncoder, ImageFeatures

if TYPE_CHECKING:
    from typing_extensions import Self

MIB = 2**20


class ProjectedEncoder(ImageEncoder):
    """A trained projector over an image tower that is kept as it is and whose features of an image are computed once.

    An image is known by its content: features are kept under the hash of the pixels that the tower is given, of the tower's weights and
    of its :meth:`spec`, all that they depend on. So nothing else need know of it: any reader feeds this tower, a changed image or tower is
    computed anew, and a saved model takes new files like any other. Images that augmentation changes are never met again: each would be
    computed in each epoch and kept for nothing, so train without.

    Pooled vector and tokens go through the same projector: layer norm, then linear, or linear, GELU, dropout and linear. Features are
    computed in evaluation mode, in full precision, without gradients.

    A saved run holds all weights, those of the frozen tower too.

    Args:
        backbone: the tower; give it ``embed_dim: null``, so that no projection that was never trained stands between.
        embed_dim: D.
        hidden_dim: width between two linear layers; None: one linear layer.
        dropout: before the last linear layer, if there are two.
        tokens: keep and project the tower's tokens too, rounded to half precision, for local similarities and maps; they take N times
            the room. False: pooled vectors alone.
        cache_dir: a folder to keep features in for later runs; may be shared. It is no part of a model that is loaded.
        memory_mib: of features held in memory; beyond it they are on disk alone, or without ``cache_dir`` computed each time.
        batch_size: images that the tower is shown at once. With 1 what an image gets does not depend, to the last bit, on the images
            beside it, so that a run that was stopped goes on exactly; more is faster on a GPU.
    Raises:
        ValueError: a width, size or batch below 1, a tower that pools views, or a folder that cannot be made.
    """

    def __init__(
        self,
        backbone: ImageEncoder,
        embed_dim: int,
        hidden_dim: int | None = None,
        dropout: float = 0.0,
        tokens: bool = False,
        cache_dir: str | None = None,
        memory_mib: int = 2048,
        batch_size: int = 1,
    ) -> None:
        super().__init__()
        if backbone.pools_views:
            raise ValueError(f"{type(backbone).__name__} pools views; put ProjectedEncoder below it, over the tower of single images")
        if min(embed_dim, batch_size, 1 if hidden_dim is None else hidden_dim) < 1 or memory_mib < 0:
            raise ValueError(
                f"embed_dim {embed_dim}, hidden_dim {hidden_dim} and batch_size {batch_size} must be at least 1, memory_mib "
                f"{memory_mib} at least 0"
            )
        self.embed_dim, self.with_tokens, self.batch_size = embed_dim, tokens, batch_size
        self.backbone = backbone.requires_grad_(False).eval()
        self.project = projector(backbone.embed_dim, embed_dim, hidden_dim, dropout)
        self.store = FeatureStore(None if cache_dir is None else Path(cache_dir), memory_mib * MIB)
        self._identity: bytes | None = None  # hash of the tower; None: not known yet
        self.register_load_state_dict_post_hook(_forget)

    @classmethod
    def architecture(cls, arguments: dict[str, Any], folder: Path) -> Self:
        """The tower without initial weights; it keeps no features."""
        return cls(**{**arguments, "cache_dir": None, "memory_mib": 0})

    def __deepcopy__(self, memo: dict[int, Any]) -> ProjectedEncoder:
        """A copy with a projector of its own; the frozen tower and its features are shared."""
        memo.update({id(shared): shared for shared in (self.backbone, self.store)})
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def train(self, mode: bool = True) -> ProjectedEncoder:
        """Training mode for the projector alone."""
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, batch: ImageBatch) -> ImageFeatures:
        """What ``backbone`` takes.

        Raises:
            ValueError: ``tokens`` of a tower that keeps none, or of volumes.
        """
        if self.with_tokens and batch.pixels.ndim != 4:
            raise ValueError("tokens of volumes are not kept: give ProjectedEncoder tokens: false, or images (I, C, H, W)")
        found = self.frozen_features(batch)
        device = batch.pixels.device
        pooled = self.project(torch.stack([one.pooled for one in found]).to(device))
        if not self.with_tokens:
            return ImageFeatures(pooled)
        tokens = torch.stack([_given(one.tokens) for one in found]).to(device).float()
        valid = None if found[0].valid is None else torch.stack([_given(one.valid) for one in found]).to(device)
        return ImageFeatures(pooled, self.project(tokens), found[0].grid, valid)

    def frozen_features(self, batch: ImageBatch) -> list[Kept]:
        """What the frozen tower makes of each image, from the store where it is there."""
        images = [_single(batch, i) for i in range(len(batch.pixels))]
        if not self.store.keeps:
            return self._computed(images)
        keys = [self._key(image) for image in images]
        found = {key: kept for key in dict.fromkeys(keys) if (kept := self.store.get(key)) is not None}
        missing = {key: image for key, image in zip(keys, images, strict=True) if key not in found}
        for key, kept in zip(missing, self._computed(list(missing.values())), strict=True):
            self.store.put(key, kept)
            found[key] = kept
        return [found[key] for key in keys]

    def _computed(self, images: Sequence[ImageBatch]) -> list[Kept]:
        kept: list[Kept] = []
        for group in _alike(images, self.batch_size):
            device = group[0].pixels.device
            # no graph, no inference tensors and no autocast: a later training step may use what validation has computed
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
                features = self.backbone(_joined(group))
                kept.extend(self._kept(features, i) for i in range(len(group)))
        return kept

    def _kept(self, features: ImageFeatures, i: int) -> Kept:
        pooled = features.pooled[i].float().cpu().clone()
        if not self.with_tokens:
            return Kept(pooled)
        if features.tokens is None:
            raise ValueError(f"{type(self.backbone).__name__} keeps no tokens; give ProjectedEncoder tokens: false")
        valid = None if features.token_valid is None else features.token_valid[i].cpu().clone()
        return Kept(pooled, features.tokens[i].half().cpu().clone(), valid, features.grid)

    def _key(self, image: ImageBatch) -> str:
        if self._identity is None:
            facts = {"format": FORMAT, "tower": self.backbone.spec(), "weights": module_sha256(self.backbone), "tokens": self.with_tokens}
            self._identity = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).digest()
        digest = hashlib.sha256(self._identity)
        for one in fields(image):
            if (tensor := getattr(image, one.name)) is not None:
                digest.update(f"{one.name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
                digest.update(tensor_bytes(tensor))
        return digest.hexdigest()


def projector(width: int, embed_dim: int, hidden_dim: int | None, dropout: float) -> nn.Sequential:
    """(..., width) to (..., embed_dim): layer norm and one linear layer, or two with GELU between."""
    if hidden_dim is None:
        return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, embed_dim))
    middle = (nn.Linear(width, hidden_dim), nn.GELU(), nn.Dropout(dropout))
    return nn.Sequential(nn.LayerNorm(width), *middle, nn.Linear(hidden_dim, embed_dim))


def _forget(module: ProjectedEncoder, *_: Any) -> None:
    """After loading weights: they may be another tower's."""
    module._identity = None


def _given(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _single(batch: ImageBatch, i: int) -> ImageBatch:
    """Image ``i`` alone; of a volume without the slices that pad it to the longest of its batch."""
    parts = {one.name: part[i : i + 1] for one in fields(batch) if one.name != "study" and (part := getattr(batch, one.name)) is not None}
    if batch.pixels.ndim == 5 and batch.valid is not None:
        last = int(batch.valid[i].nonzero().max()) + 1
        parts["pixels"] = parts["pixels"][:, :, :last]
        parts |= {name: parts[name][:, :last] for name in ("valid", "position_mm") if name in parts}
    return ImageBatch(**parts)


def _alike(images: Sequence[ImageBatch], size: int) -> list[list[ImageBatch]]:
    """Consecutive images of one shape, at most ``size`` together."""
    groups: list[list[ImageBatch]] = []
    for image in images:
        if groups and len(groups[-1]) < size and groups[-1][0].pixels.shape == image.pixels.shape:
            groups[-1].append(image)
        else:
            groups.append([image])
    return groups


def _joined(images: Sequence[ImageBatch]) -> ImageBatch:
    names = [one.name for one in fields(images[0]) if getattr(images[0], one.name) is not None]
    joined: dict[str, Any] = {name: torch.cat([getattr(image, name) for image in images]) for name in names}
    return replace(images[0], **joined)
