"""Radiograph towers over vision backbones of the Hugging Face hub: ViT, DeiT, BEiT, DINOv2 and 3, Swin, ConvNeXt, ResNet, CLIP, SigLIP.

Shapes: B studies, C channels, H x W pixels, N tokens on a (gh, gw) grid, L tokens with class and register tokens, F the backbone's
width, D embedding width. Only safetensors weights are read and no code from a model's repository is run.

A saved run holds all of the tower, frozen or not: the weights in the state dict, the backbone's configuration as a file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from medvl.nn import pretrained
from medvl.nn.lora import Lora
from modalities.xray.backbone import BackboneEncoder, check_channels, in_rgb

if TYPE_CHECKING:
    from typing_extensions import Self

Pooling = Literal["head", "cls", "mean"]


@dataclass(frozen=True)
class _Family:
    """How a kind of backbone lays out its tokens, and which of its modules come after ``last_hidden_state``."""

    prefix: int = 0  # class and distillation tokens before the patches; registers are counted by the configuration
    norm: str | None = None  # norm that the backbone applies to what it pools, and not to last_hidden_state
    head: str | None = None  # module that makes the pooled vector of all tokens, if it is more than taking the first or the mean
    resizes: bool = False  # forward takes interpolate_pos_encoding; the others do without being asked, or have no positions


_FAMILIES = {
    "beit": _Family(prefix=1, head="pooler", resizes=True),
    "clip_vision_model": _Family(prefix=1, norm="post_layernorm", resizes=True),
    "convnext": _Family(norm="layernorm"),
    "convnextv2": _Family(norm="layernorm"),
    "deit": _Family(prefix=2, head="pooler", resizes=True),
    "dinov2": _Family(prefix=1),
    "dinov2_with_registers": _Family(prefix=1),
    "dinov3_vit": _Family(prefix=1),
    "resnet": _Family(),
    "siglip_vision_model": _Family(head="head", resizes=True),
    "swin": _Family(resizes=True),
    "swinv2": _Family(resizes=True),
    "vit": _Family(prefix=1, head="pooler", resizes=True),
}


class HuggingFaceEncoder(BackboneEncoder):
    """A vision backbone of the Hugging Face hub and one linear projection that pooled vector and tokens share.

    RAD-DINO (``microsoft/rad-dino``) is a DINOv2 at 518 pixels. Of a whole CLIP or SigLIP, the vision part is taken. Class, register and
    distillation tokens are left out of ``tokens``; each of these has gone through what makes the pooled vector as if it were the whole
    image, so that both lie in one space.

    Position embeddings are kept at the size that they were published for and, for images of another ``image_size``, interpolated in each
    pass as transformers does it for that kind of backbone (bicubic; antialiased for DINOv2 with registers alone); at their own size they
    are unchanged.

    Grids cover the square evenly for patch backbones; of ResNets see :class:`modalities.xray.TimmEncoder`.

    Args:
        name: a folder with config.json and model.safetensors, or a name on the hub.
        embed_dim: D; None leaves the projection out: pooled vector and tokens are as the backbone gives them, D is its width.
        image_size: side in pixels of the square images, a multiple of the patch (of the total stride); None is the backbone's own.
        in_chans: C; 1 repeats grey images to the backbone's channels, else C is their number. Where mean and standard deviation of the
            weights differ from channel to channel, give the reader ``channels: 3``, these numbers and ``normalise: fixed``.
        freeze: keep the backbone as it is (no gradients, evaluation mode); the projection is trained.
        pooling: "head" is the backbone's own pooled vector (``pooler_output``), "cls" the class token after the last norm, "mean" that of
            the patch tokens after it. Many ViTs are published without a trained head: give "cls" for those.
        revision: branch, tag or commit on the hub; None is its default branch.
        local_files_only: never ask the hub, use what was downloaded before.
        initial_weights: False takes only the architecture of ``name``, for a backbone that trains from scratch.
        lora: adapters to train in the backbone, which is kept as it is otherwise (needs the extra ``lora``; a saved run does not).
    Raises:
        FileNotFoundError: the folder or the hub lacks the model; the message says what is missing and what to do.
        ValueError: a kind of model that is not known here, weights with missing keys, a size or pooling that the backbone has not.
    """

    def __init__(
        self,
        name: str,
        embed_dim: int | None = None,
        image_size: int | None = None,
        in_chans: int = 1,
        freeze: bool = False,
        pooling: Pooling = "head",
        revision: str | None = None,
        local_files_only: bool = False,
        initial_weights: bool = True,
        lora: Lora | None = None,
    ) -> None:
        folder = _folder(name, revision, local_files_only, initial_weights)
        config = _vision_config(folder)
        family = _FAMILIES.get(config.model_type)
        if family is None:
            raise ValueError(
                f"backbone {name}: model_type {config.model_type!r} is none of {', '.join(sorted(_FAMILIES))}; many others are in timm "
                "(modalities.xray.TimmEncoder)"
            )
        _check_pooling(pooling, family, config, name)
        native, stride = _native_size(config), _stride(config)
        size = native if image_size is None else image_size
        if size is None:
            raise ValueError(f"backbone {name}: its configuration states no image size; give image_size")
        if size < stride or size % stride:
            raise ValueError(f"backbone {name}: image_size {size} is no multiple of {stride}, the side of a token in pixels")
        check_channels(in_chans, config.num_channels, name)
        backbone = _load(folder, config, initial_weights, name, needs_head=pooling == "head")
        super().__init__(backbone, _width(config), embed_dim, size, in_chans, freeze)
        self.family, self.pooling = family, pooling
        self.prefix = family.prefix + getattr(config, "num_register_tokens", 0)
        self.side = size // stride
        self.options = {"interpolate_pos_encoding": True} if family.resizes and size != native else {}
        self.add_adapters(lora)

    def files(self) -> dict[str, bytes]:
        """Configuration of the backbone."""
        settings = pretrained.without_pointers(json.loads(self.backbone.config.to_json_string()))
        settings.pop("_name_or_path", None)  # a place on the machine that it was made on
        return {"config.json": (json.dumps(settings, indent=2) + "\n").encode()}

    @classmethod
    def architecture(cls, arguments: dict[str, Any], folder: Path) -> Self:
        """The tower without initial weights, from the configuration in ``folder``.

        Raises:
            FileNotFoundError: no configuration there.
            ValueError: a configuration that points to code, weights or files elsewhere.
        """
        checked = pretrained.checked_files(folder, arguments.get("name"), "config.json of the image backbone")
        return cls(**{**arguments, "name": str(checked), "initial_weights": False, "lora": None})

    def features(self, pixels: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """The pooled vector that ``pooling`` names, and the tokens in its space."""
        output = self.backbone(pixel_values=in_rgb(pixels, self.backbone.config.num_channels), **self.options)
        hidden: Tensor = output.last_hidden_state
        every = hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden  # (B, L, F)
        if self.family.norm is not None:
            every = getattr(self.backbone, self.family.norm)(every)
        tokens = every[:, self.prefix :]
        grid = (self.side, self.side)
        assert tokens.shape[1] == self.side**2
        if self.pooling == "cls":
            return every[:, 0], tokens, grid
        if self.pooling == "mean":
            return tokens.mean(1), tokens, grid
        if self.family.head is not None:
            alone = tokens.flatten(0, 1)[:, None].expand(-1, self.prefix + 1, -1)  # class and register places hold the token too
            tokens = getattr(self.backbone, self.family.head)(alone).unflatten(0, tokens.shape[:2])
        return output.pooler_output.flatten(1), tokens, grid


def _folder(name: str, revision: str | None, local_files_only: bool, weights: bool) -> Path:
    needed = {"configuration": ["config.json"]}
    if weights:
        needed["weights"] = ["model*.safetensors"]
    return pretrained.model_folder(
        name,
        needed,
        ["config.json", *(["model*.safetensors", "model*.safetensors.index.json"] if weights else [])],
        tower="image backbone",
        advice="Save the model with save_pretrained(folder)",
        revision=revision,
        local_files_only=local_files_only,
    )


def _vision_config(folder: Path) -> Any:
    """The configuration of a backbone, or of the vision part of a whole CLIP or SigLIP."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return getattr(config, "vision_config", config)


def _load(folder: Path, config: Any, weights: bool, name: str, needs_head: bool) -> Any:
    """The backbone, without parameters that nothing would ever train: mask tokens, heads that are not asked for."""
    from transformers import AutoModel

    if weights:
        with pretrained.no_progress_bar():
            model, report = AutoModel.from_pretrained(
                folder,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=False,
            )
    else:
        model, report = AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False), {"missing_keys": ()}
    whole = hasattr(model, "vision_model")
    backbone: Any = model.vision_model if whole else model
    unused = ("embeddings.mask_token", *(() if needs_head else ("pooler.", "head.")))
    missing = {key.removeprefix("vision_model.") for key in report["missing_keys"] if not whole or key.startswith("vision_model.")}
    if missing := {key for key in missing if not key.startswith(unused)}:
        only_head = all(key.startswith(("pooler.", "head.")) for key in missing)
        raise ValueError(
            f"backbone {name}: its safetensors lack {len(missing)} of the weights, such as {min(missing)}"
            + ("; it was published without a trained head: take pooling 'cls' or 'mean'" if only_head else "")
        )
    if not needs_head:
        for head in ("pooler", "head"):
            if any(True for _ in getattr(getattr(backbone, head, None), "parameters", list)()):
                setattr(backbone, head, None)  # a mean without parameters stays: some call it without asking
        backbone.use_head = False  # SigLIP asks this, the others ask whether there is a pooler
    mask = getattr(getattr(backbone, "embeddings", None), "mask_token", None)
    if mask is not None:
        mask.requires_grad_(False)
    return backbone


def _check_pooling(pooling: str, family: _Family, config: Any, name: str) -> None:
    if pooling not in ("head", "cls", "mean"):
        raise ValueError(f"pooling is 'head', 'cls' or 'mean', got {pooling!r}")
    if pooling == "cls" and not family.prefix:
        raise ValueError(f"backbone {name}: a {config.model_type} has no class token; take pooling 'head' or 'mean'")
    if pooling != "head" and config.model_type == "beit" and getattr(config, "use_mean_pooling", False):
        raise ValueError(f"backbone {name}: the only norm of this beit is in its head; take pooling 'head'")
    if pooling == "head" and family.head == "head" and not getattr(config, "vision_use_head", True):
        raise ValueError(f"backbone {name}: this {config.model_type} has no head; take pooling 'mean'")


def _native_size(config: Any) -> int | None:
    """Side of the images that the backbone was made for; None if it does not say.

    Raises:
        ValueError: images that are no squares.
    """
    size = getattr(config, "image_size", None)
    sides = {int(side) for side in (size if isinstance(size, (list, tuple)) else [size])} if size is not None else set()
    if len(sides) > 1:
        raise ValueError(f"backbone for images of {size} pixels; only square ones are supported")
    return sides.pop() if sides else None


def _stride(config: Any) -> int:
    """Side of a token's cell in pixels."""
    if config.model_type == "resnet":  # the stem's convolution and pooling halve, then each stage but the first
        return int(4 * 2 ** (len(config.depths) - 1 + bool(config.downsample_in_first_stage)))
    patch = config.patch_size
    halvings = len(config.depths) - 1 if hasattr(config, "depths") else 0
    return int((patch[0] if isinstance(patch, (list, tuple)) else patch) * 2**halvings)


def _width(config: Any) -> int:
    """F."""
    if hasattr(config, "hidden_sizes"):
        return int(config.hidden_sizes[-1])
    return int(config.hidden_size)  # of a Swin: that of its last stage
