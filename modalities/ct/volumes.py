"""CT as a volume: 3D towers in the interface of the tower by slices, so that a recipe compares them by changing the tower's class.

Shapes: B studies, C channels (HU windows), S slices, H x W pixels, (s, gh, gw) the grid of a network's last features, F their width,
D embedding width. Tokens are row-major in (s, gh, gw); pooled is their mean over the study, so both lie in one space.

Padded slices are not shown to a network: studies of equal length go through it together and each as if it were alone, so that neither
the amount of padding nor what lies on it can matter. A token's cell is ``stride`` voxels; where S is no multiple of it, the last cell
reaches beyond the volume, and ``extent`` says how far all of them reach, so that a map lies where the volume does.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medvl.types import ImageBatch, ImageEncoder, ImageFeatures
from modalities.pooling import checked_valid
from modalities.xray.towers import TimmEncoder

if TYPE_CHECKING:
    from typing_extensions import Self


class VolumeEncoder(ImageEncoder):
    """Base of 3D towers: a network's features, and one linear projection that pooled vector and tokens share."""

    in_chans: int
    stride: tuple[int, int, int]  # voxels of a token's cell: slices, rows, columns

    def __init__(self, embed_dim: int, width: int) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.project = nn.Linear(width, embed_dim, bias=False)

    @abc.abstractmethod
    def features(self, pixels: Tensor) -> Tensor:
        """(b, C, S, H, W), all slices valid, to (b, F, s, gh, gw)."""

    def forward(self, batch: ImageBatch) -> ImageFeatures:
        """``batch.pixels`` (B, C, S, H, W), ``valid`` (B, S); positions are not used, the network takes slices as evenly spaced.

        Raises:
            ValueError: pixels or ``valid`` of another shape, a study without a valid slice or with padding before a valid one.
        """
        pixels = batch.pixels
        if pixels.ndim != 5 or pixels.shape[1] != self.in_chans:
            raise ValueError(
                f"pixels have shape {tuple(pixels.shape)}, {type(self).__name__} takes volumes (B, {self.in_chans}, S, H, W); "
                "give the reader as many windows as the tower has channels"
            )
        lengths = _lengths(checked_valid(batch.valid, pixels.transpose(1, 2)))
        alike = {length: [i for i, other in enumerate(lengths) if other == length] for length in sorted(set(lengths), reverse=True)}
        by_study: dict[int, Tensor] = {}  # (s, gh, gw, D)
        for length, studies in alike.items():
            whole = len(studies) == len(lengths)
            maps = self.project(self.features((pixels if whole else pixels[studies])[:, :, :length]).permute(0, 2, 3, 4, 1))
            by_study.update(zip(studies, maps, strict=True))
        tokens = [by_study[i] for i in range(len(lengths))]
        depths = [one.shape[0] for one in tokens]
        grid = (max(depths), tokens[0].shape[1], tokens[0].shape[2])
        padded = torch.stack([F.pad(one, (0, 0, 0, 0, 0, 0, 0, grid[0] - one.shape[0])) for one in tokens])
        token_valid = None
        if batch.valid is not None:
            seen = torch.arange(grid[0], device=pixels.device) < torch.tensor(depths, device=pixels.device)[:, None]  # (B, s)
            token_valid = seen[..., None].expand(-1, -1, grid[1] * grid[2]).flatten(1)
        pooled = torch.stack([one.mean((0, 1, 2)) for one in tokens])
        extent = tuple(cells * voxels for cells, voxels in zip(grid, self.stride, strict=True))
        return ImageFeatures(pooled, tokens=padded.flatten(1, 3), grid=grid, token_valid=token_valid, extent=extent)


class MonaiVitEncoder(VolumeEncoder):
    """MONAI's 3D vision transformer (arXiv:2010.11929 on volumes); the mean of its tokens, after the last norm, is the pooled feature.

    Height and width are fixed; a volume of fewer slices than ``image_size`` takes the first of the position embeddings, and is filled
    with zeros to a whole number of patches.

    Args:
        embed_dim: D.
        image_size: slices (at most), rows and columns; each a multiple of the patch.
        patch_size: slices, rows and columns of a patch.
        width: hidden width F, a multiple of ``heads``; of ``6 * heads`` for "sincos".
        depth: transformer blocks.
        heads: attention heads.
        mlp_dim: hidden width of the blocks' mlp.
        in_chans: C.
        position: "learnable", or "sincos", which is fixed.
        drop_rate: dropout throughout.
    Raises:
        ImportError: MONAI is not installed.
        ValueError: an image size that is no multiple of the patch.
    """

    def __init__(
        self,
        embed_dim: int,
        image_size: Sequence[int] = (160, 224, 224),
        patch_size: Sequence[int] = (16, 16, 16),
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp_dim: int = 3072,
        in_chans: int = 1,
        position: str = "learnable",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(embed_dim, width)
        if len(image_size) != 3 or len(patch_size) != 3 or any(size % patch for size, patch in zip(image_size, patch_size, strict=True)):
            raise ValueError(f"image_size {tuple(image_size)} is no multiple of patch_size {tuple(patch_size)}; both are (S, H, W)")
        self.in_chans, self.image_size = in_chans, tuple(image_size)
        self.stride = (patch_size[0], patch_size[1], patch_size[2])
        self.grid = tuple(size // patch for size, patch in zip(image_size, patch_size, strict=True))
        self.network: Any = _monai_nets("MonaiVitEncoder").ViT(
            in_channels=in_chans,
            img_size=self.image_size,
            patch_size=self.stride,
            hidden_size=width,
            mlp_dim=mlp_dim,
            num_layers=depth,
            num_heads=heads,
            pos_embed_type=position,
            dropout_rate=drop_rate,
        )
        for name, parameter in self.network.named_parameters():
            if "cross_attn" in name:  # MONAI makes them for every block and does not use them here
                parameter.requires_grad_(False)

    def features(self, pixels: Tensor) -> Tensor:
        """(b, C, S, H, W) to (b, F, s, gh, gw).

        Raises:
            ValueError: more slices than ``image_size``, or another height or width.
        """
        slices, *sides = pixels.shape[2:]
        if slices > self.image_size[0] or tuple(sides) != self.image_size[1:]:
            raise ValueError(
                f"volume of {tuple(pixels.shape[2:])} voxels, this tower takes at most {self.image_size[0]} slices of "
                f"{self.image_size[1:]}; give the reader the tower's size"
            )
        pixels = F.pad(pixels, (0, 0, 0, 0, 0, -slices % self.stride[0]))
        embedding = self.network.patch_embedding
        patches = embedding.patch_embeddings(pixels)  # (b, F, s, gh, gw)
        grid = patches.shape[2:]
        x = patches.flatten(2).transpose(1, 2)
        x = embedding.dropout(x + embedding.position_embeddings[:, : x.shape[1]])  # row-major: the first slices are the first entries
        for block in self.network.blocks:
            x = block(x)
        out: Tensor = self.network.norm(x)
        return out.transpose(1, 2).unflatten(2, grid)


class ResNet3dEncoder(VolumeEncoder):
    """MONAI's 3D ResNet (arXiv:1711.09577), its features before the pooling. Volumes of any size.

    3 x 3 x 3 convolutions of stride 2 look up, left and to lower slices of their cell (see TimmEncoder); where maps matter, prefer
    slices or the transformer.

    Args:
        embed_dim: D.
        depth: 10, 18, 34, 50, 101, 152 or 200 layers.
        in_chans: C.
        conv1_t_stride: stride of the first convolution in all three directions; MONAI's own default of 1 keeps 64 channels at full
            size, gigabytes for a chest.
    Raises:
        ImportError: MONAI is not installed.
        ValueError: a depth that MONAI has no ResNet of.
    """

    def __init__(self, embed_dim: int, depth: int = 18, in_chans: int = 1, conv1_t_stride: int = 2) -> None:
        make = getattr(_monai_nets("ResNet3dEncoder"), f"resnet{depth}", None)
        if make is None:
            raise ValueError(f"MONAI has no ResNet of {depth} layers; it has 10, 18, 34, 50, 101, 152 and 200")
        network = make(n_input_channels=in_chans, conv1_t_stride=conv1_t_stride, feed_forward=False)
        super().__init__(embed_dim, network.in_planes)
        self.in_chans = in_chans
        self.stride = (16 * conv1_t_stride,) * 3
        self.network: Any = network

    def features(self, pixels: Tensor) -> Tensor:
        """(b, C, S, H, W) to (b, F, s, gh, gw)."""
        net = self.network
        x = net.maxpool(net.act(net.bn1(net.conv1(pixels))))
        for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
            x = layer(x)
        out: Tensor = x
        return out


class InflatedEncoder(VolumeEncoder):
    """A 2D timm ResNet inflated to volumes: pretrained 2D weights, read in depth too.

    A k x k kernel with k > 1 becomes ``kernel_depth`` x k x k, the 2D kernel repeated and divided by ``kernel_depth``; strides and pools
    go through depth as they do in the plane. A volume of identical slices gives the 2D network's features in each of its planes. For
    that, convolutions repeat the first and last slice where they look beyond the volume (in the plane they pad as in 2D).

    Source: "Quo Vadis, Action Recognition? A New Model and the Kinetics Dataset", arXiv:1705.07750, section 2.4. Departures: kernels of
    depth 3 throughout, and a stem that strides in the plane only, as the inflated ResNet-152 of Merlin (arXiv:2406.06512) has them.

    Args:
        name: a timm ResNet without attention or anti-aliasing, such as ``resnet18`` or ``resnet152``.
        embed_dim: D.
        pretrained: load timm's published 2D weights (from its cache or the network).
        checkpoint: a safetensors file with the 2D backbone's state dict, instead of ``pretrained``.
        in_chans: C.
        kernel_depth: depth of inflated kernels, odd.
        stem_depth_stride: stride of the first convolution in depth; in the plane it is the 2D network's, 2.
    Raises:
        ValueError: a name timm does not know, a backbone with layers that have no 3D form here, an even ``kernel_depth``.
    """

    def __init__(
        self,
        name: str,
        embed_dim: int,
        pretrained: bool = False,
        checkpoint: Path | None = None,
        in_chans: int = 1,
        kernel_depth: int = 3,
        stem_depth_stride: int = 1,
    ) -> None:
        if kernel_depth < 1 or kernel_depth % 2 == 0:
            raise ValueError(f"kernel_depth must be odd, got {kernel_depth}")
        flat = TimmEncoder(name, embed_dim, pretrained=pretrained, checkpoint=checkpoint, in_chans=in_chans).backbone
        if not all(hasattr(flat, part) for part in ("conv1", "maxpool", "layer4")):
            raise ValueError(f"{name} is no ResNet of timm: only those can be inflated here")
        super().__init__(embed_dim, flat.num_features)
        self.in_chans = in_chans
        stem = next(module for module in flat.modules() if isinstance(module, nn.Conv2d))
        self.backbone: Any = _inflate(flat, kernel_depth, name)
        first = next(module for module in self.backbone.modules() if isinstance(module, nn.Conv3d))
        first.stride = (stem_depth_stride, *stem.stride)
        total = flat.feature_info[-1]["reduction"]
        self.stride = (total // stem.stride[0] * stem_depth_stride, total, total)

    @classmethod
    def architecture(cls, arguments: dict[str, Any], folder: Path) -> Self:
        """The tower without initial weights."""
        return cls(**{**arguments, "pretrained": False, "checkpoint": None})

    def features(self, pixels: Tensor) -> Tensor:
        """(b, C, S, H, W) to (b, F, s, gh, gw)."""
        out: Tensor = self.backbone.forward_features(pixels)
        return out


class _DepthConv3d(nn.Conv3d):
    """A convolution that pads with zeros in the plane and with the outermost slices in depth."""

    def forward(self, x: Tensor) -> Tensor:
        reach = self.kernel_size[0] // 2
        return super().forward(F.pad(x, (0, 0, 0, 0, reach, reach), mode="replicate") if reach else x)


def inflate_kernel(weight: Tensor, depth: int) -> Tensor:
    """(O, I, k, k) to (O, I, depth, k, k): repeated and divided, so that the sum over depth is the 2D kernel."""
    return weight[:, :, None].expand(-1, -1, depth, -1, -1) / depth


def _inflate(module: nn.Module, depth: int, name: str) -> nn.Module:
    """Replace, in place, what is two-dimensional by its 3D form; the classifier's head is dropped."""
    from timm.models.resnet import BasicBlock, Bottleneck

    for child_name, child in module.named_children():
        if child_name in ("global_pool", "fc"):
            setattr(module, child_name, nn.Identity())
        elif isinstance(child, (nn.Sequential, BasicBlock, Bottleneck)):
            _inflate(child, depth, name)
        else:
            setattr(module, child_name, _inflated(child, depth, name))
    return module


def _inflated(layer: nn.Module, depth: int, name: str) -> nn.Module:
    """The 3D form of one layer."""
    if type(layer) is nn.Conv2d:
        reach = depth if max(layer.kernel_size) > 1 else 1
        assert not isinstance(layer.padding, str)
        conv = _DepthConv3d(
            layer.in_channels,
            layer.out_channels,
            _deep(layer.kernel_size, reach),
            stride=_deep(layer.stride),
            padding=_deep(layer.padding, 0),
            dilation=_deep(layer.dilation, 1),
            groups=layer.groups,
            bias=layer.bias is not None,
        )
        with torch.no_grad():
            conv.weight.copy_(inflate_kernel(layer.weight, reach))
            if layer.bias is not None and conv.bias is not None:
                conv.bias.copy_(layer.bias)
        return conv
    if type(layer) is nn.BatchNorm2d:
        norm = nn.BatchNorm3d(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
        norm.load_state_dict(layer.state_dict())
        return norm
    if type(layer) is nn.MaxPool2d:
        size, stride, padding, dilation = map(_deep, (layer.kernel_size, layer.stride, layer.padding, layer.dilation))
        return nn.MaxPool3d(size, stride, padding, dilation, ceil_mode=layer.ceil_mode)
    if type(layer) is nn.AvgPool2d:
        size, stride, padding = map(_deep, (layer.kernel_size, layer.stride, layer.padding))
        return nn.AvgPool3d(size, stride, padding, layer.ceil_mode, layer.count_include_pad)
    if isinstance(layer, (nn.Identity, nn.ReLU, nn.SiLU, nn.GELU, nn.Dropout)):
        return layer
    raise ValueError(f"{name} has a {type(layer).__name__}, which has no 3D form here; take a plain ResNet such as resnet50")


def _deep(plane: int | tuple[int, ...], depth: int | None = None) -> tuple[int, int, int]:
    """A size in the plane to one in space; ``depth`` None: as along the rows."""
    rows, columns = (plane, plane) if isinstance(plane, int) else plane
    return (rows if depth is None else depth, rows, columns)


def _lengths(valid: Tensor) -> list[int]:
    """The number of valid slices of each study.

    Raises:
        ValueError: padding before a valid slice.
    """
    holes = (valid[:, 1:] & ~valid[:, :-1]).any(1).nonzero().flatten().tolist()
    if holes:
        raise ValueError(f"studies {holes} of the batch have padding before a valid slice; volume towers take padding at the end only")
    return [int(length) for length in valid.sum(1).tolist()]


def _monai_nets(tower: str) -> Any:
    """MONAI's networks, loaded when first asked for: it takes seconds."""
    try:
        from monai.networks import nets
    except ImportError as error:
        raise ImportError(f"{tower} needs MONAI, which is not installed: pip install 'medvl[monai]'") from error
    return nets
