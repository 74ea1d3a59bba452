"""Radiograph towers over any timm backbone.

Shapes: B studies, C channels, H x W pixels, N tokens on a (gh, gw) grid, F the backbone's width, D embedding width.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from medvl.nn.lora import Lora
from modalities.xray.backbone import BackboneEncoder, read_checkpoint, set_weights, timm_features

if TYPE_CHECKING:
    from typing_extensions import Self


class TimmEncoder(BackboneEncoder):
    """A timm backbone (ViT, Swin, ConvNeXt, ResNet ...) and one linear projection that pooled vector and tokens share.

    The pooled vector is what the backbone's own head gives before its classifier (class token, mean, attention pooling ...). Each
    token goes through the same head as if it were the whole image, so that pooled and tokens lie in one space: an image whose tokens
    are all equal has a pooled vector equal to each of them. Class and register tokens are left out of ``tokens``.

    The grid is taken to cover the square evenly. That is so for patch backbones (ViT, Swin, ConvNeXt: off by under 1 pixel by the
    centre of a token's gradient at 224 pixels); 3 x 3 convolutions of stride 2 look to the upper left of it (ResNet-18 by 16 of a
    token's 32 pixels, EfficientNet-B0 by 9), so prefer the former where maps matter.

    Args:
        name: a timm model name, such as ``vit_small_patch16_224`` or ``convnext_atto``.
        embed_dim: D; None leaves the projection out: pooled vector and tokens are as the backbone gives them.
        pretrained: load timm's published weights (from its cache or the network).
        checkpoint: a safetensors file with this backbone's state dict, instead of ``pretrained``; its classifier, if any, is left out.
        image_size: side in pixels of the square images. Position embeddings and relative positions of another size, in ``checkpoint``
            as in ``pretrained``, are interpolated as timm does it (bicubic); at the size of the weights they are unchanged.
        in_chans: C.
        freeze: keep the backbone as it is (no gradients, evaluation mode); the projection is trained.
        drop_rate: dropout in the backbone's head.
        lora: adapters to train in the backbone, which is kept as it is otherwise (needs the extra ``lora``; a saved run does not).
    Raises:
        ValueError: a name timm does not know, a checkpoint of another backbone or with missing keys.
    """

    def __init__(
        self,
        name: str,
        embed_dim: int | None,
        pretrained: bool = False,
        checkpoint: Path | None = None,
        image_size: int = 224,
        in_chans: int = 1,
        freeze: bool = False,
        drop_rate: float = 0.0,
        lora: Lora | None = None,
    ) -> None:
        if pretrained and checkpoint is not None:
            raise ValueError(f"backbone {name}: give pretrained=True or checkpoint={checkpoint}, not both")
        backbone: Any = _create(name, pretrained, image_size, in_chans, drop_rate)
        if checkpoint is not None:
            _load_backbone(backbone, Path(checkpoint), name)
        width = getattr(backbone, "head_hidden_size", None) or backbone.num_features
        super().__init__(backbone, width, embed_dim, image_size, in_chans, freeze)
        self.add_adapters(lora)

    @classmethod
    def architecture(cls, arguments: dict[str, Any], folder: Path) -> Self:
        """The tower without initial weights."""
        return cls(**{**arguments, "pretrained": False, "checkpoint": None, "lora": None})

    def features(self, pixels: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """What the backbone's head gives before its classifier, of the image and of each token."""
        return timm_features(self.backbone, pixels)


def _create(name: str, pretrained: bool, image_size: int, in_chans: int, drop_rate: float) -> Any:
    """A timm model without classifier for images of this size."""
    import timm

    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_')[0]}*")[:5]
        raise ValueError(f"timm {timm.__version__} has no model named {name!r}" + (f"; near it: {', '.join(near)}" if near else ""))
    options: dict[str, Any] = {"pretrained": pretrained, "num_classes": 0, "in_chans": in_chans, "drop_rate": drop_rate}
    try:
        return timm.create_model(name, img_size=image_size, **options)
    except TypeError as error:  # convolutional backbones take any size and have no such argument
        if "img_size" not in str(error):
            raise
    return timm.create_model(name, **options)


def _load_backbone(backbone: nn.Module, path: Path, name: str) -> None:
    """Load a backbone's state dict strictly, but for the classifier that we do not have."""
    classifier = getattr(backbone, "pretrained_cfg", {}).get("classifier") or ()
    heads = tuple(f"{n}." for n in ([classifier] if isinstance(classifier, str) else classifier))
    state = {key: value for key, value in read_checkpoint(path).items() if not (heads and key.startswith(heads))}
    own = backbone.state_dict()
    other = [key for key, value in state.items() if key in own and own[key].shape != value.shape]
    if other and all("pos_embed" in key or "rel_pos" in key or "relative_position" in key for key in other):
        adapt = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)  # where timm keeps a family's own
        state = state if adapt is None else adapt(state, backbone)
    set_weights(backbone, state, path, name)
