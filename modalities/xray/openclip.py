"""Radiograph towers over the vision side of open_clip models: VisionTransformer, any timm trunk, ModifiedResNet; so of BiomedCLIP.

Shapes: B studies, C channels, H x W pixels, N tokens on a (gh, gw) grid, F what the backbone gives, D embedding width. Only the vision
side is made, so a model whose text side is elsewhere (BiomedCLIP's is a BERT of the hub) asks for nothing but its own folder. Only
safetensors weights are read.

A saved run holds all of the tower, frozen or not: the weights in the state dict, the vision part of open_clip's configuration as a file.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from medvl.nn import pretrained
from medvl.nn.lora import Lora
from modalities.xray.backbone import BackboneEncoder, check_channels, in_rgb, read_checkpoint, set_weights, square_grid, timm_features

if TYPE_CHECKING:
    from typing_extensions import Self

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors")
"""Names of weights in a folder of open_clip's, the first that is there, as open_clip itself looks for them."""

_HUB = "hf-hub:"
_CHANNELS = 3  # of every vision tower that open_clip makes


class OpenClipEncoder(BackboneEncoder):
    """The vision side of an open_clip model and one linear projection that pooled vector and tokens share.

    With ``embed_dim`` None the projection is open_clip's own and pooled is what its ``encode_image`` gives; each token goes through the
    same layers as if it were the whole image. With a number, a new projection of the features before it takes its place. Of a
    ModifiedResNet the projection is part of the attention pooling: it stays, a new one follows it, and a token is what that pooling
    gives where it attends to this token alone (as "Extract Free Dense Labels from CLIP", arXiv:2112.01071, but with its position).

    Position embeddings are interpolated to ``image_size`` when weights are loaded, by open_clip's and timm's own functions (bicubic,
    antialiased); at the size of the weights they are unchanged.

    Args:
        name: a name of open_clip's list, such as ``ViT-B-16``; a folder with open_clip_config.json and weights; or a model of the hub in
            that form, as ``hf-hub:ORGANISATION/MODEL``. Where only pickled weights were published, convert them to safetensors first.
        embed_dim: D of a new projection; None keeps open_clip's own.
        checkpoint: a safetensors file of a whole open_clip model or of its vision side. It is needed for a name of the list to have
            trained weights, and takes the place of those in a folder.
        image_size: side in pixels of the square images, a multiple of the patch; None is the model's own.
        in_chans: C; 1 repeats grey images, 3 takes colour. The weights of most models expect a mean and standard deviation that differ
            from channel to channel: give the reader ``channels: 3``, those numbers and ``normalise: fixed``.
        freeze: keep the backbone as it is (no gradients, evaluation mode); a new projection is trained.
        local_files_only: never ask the hub, use what was downloaded before.
        initial_weights: False takes only the architecture of ``name``; a name of the list has no other.
        lora: adapters to train in the backbone, which is kept as it is otherwise (needs the extra ``lora``; a saved run does not).
    Raises:
        ImportError: open_clip is not installed.
        FileNotFoundError: the folder or the hub lacks the model; the message says what is missing and what to do.
        ValueError: a name open_clip does not know, pooling by learned queries over the image (CoCa), weights that do not fit.
    """

    def __init__(
        self,
        name: str,
        embed_dim: int | None = None,
        checkpoint: Path | None = None,
        image_size: int | None = None,
        in_chans: int = 1,
        freeze: bool = False,
        local_files_only: bool = False,
        initial_weights: bool = True,
        lora: Lora | None = None,
    ) -> None:
        library = _open_clip()
        config, weights = _find(library, name, local_files_only, initial_weights and checkpoint is None)
        check_channels(in_chans, _CHANNELS, name)
        size = int(config["vision_cfg"].get("image_size", 224)) if image_size is None else image_size
        visual = _create(library, config, size, name)
        if checkpoint is not None or weights is not None:
            _load(library, visual, Path(checkpoint or weights or ""), name)
        made_for = getattr(getattr(getattr(visual, "trunk", None), "patch_embed", None), "img_size", None)
        if made_for not in (None, (size, size)):
            visual.set_input_size(size)  # of timm models after loading, as open_clip does it
        width = config["embed_dim"] if embed_dim is None else _drop_projection(visual, config["embed_dim"])
        super().__init__(visual, width, embed_dim, size, in_chans, freeze)
        self.config = config
        self.add_adapters(lora)

    def files(self) -> dict[str, bytes]:
        """The vision part of open_clip's configuration."""
        return {CONFIG: (json.dumps({"model_cfg": self.config}, indent=2) + "\n").encode()}

    @classmethod
    def architecture(cls, arguments: dict[str, Any], folder: Path) -> Self:
        """The tower without initial weights, from the configuration in ``folder``.

        Raises:
            FileNotFoundError: no configuration there.
        """
        if not (folder / CONFIG).is_file():
            raise FileNotFoundError(
                f"{folder} lacks {CONFIG} of the image backbone, which a run carries there; put that of {arguments.get('name')!r} there, "
                "or save the run again"
            )
        return cls(**{**arguments, "name": str(folder), "checkpoint": None, "initial_weights": False, "lora": None})

    def features(self, pixels: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """open_clip's image features, before the projection if that was replaced, of the image and of each token."""
        visual, pixels = self.backbone, in_rgb(pixels, _CHANNELS)
        if hasattr(visual, "trunk"):
            pooled, tokens, grid = timm_features(visual.trunk, pixels, pre_logits=False)
            return visual.head(pooled), visual.head(tokens), grid
        output = visual.forward_intermediates(pixels, indices=1, normalize_intermediates=True)
        maps = output["image_intermediates"][-1]
        tokens, grid = maps.flatten(2).transpose(1, 2), (maps.shape[2], maps.shape[3])
        if hasattr(visual, "attnpool"):
            pool = visual.attnpool
            tokens = pool.c_proj(pool.v_proj(tokens + pool.positional_embedding[1:].to(tokens.dtype)))
        elif visual.proj is not None:
            tokens = tokens @ visual.proj
        return output["image_features"], tokens, grid


def _open_clip() -> Any:
    """open_clip, imported when first asked for."""
    try:
        import open_clip
    except ImportError as error:
        raise ImportError("OpenClipEncoder needs open_clip, which is not installed: pip install 'medvl[open_clip]'") from error
    return open_clip


def _find(library: Any, name: str, local_files_only: bool, weights: bool) -> tuple[dict[str, Any], Path | None]:
    """The vision part of a model's configuration, and its weights if it brings any."""
    if not name.startswith(_HUB) and not Path(name).is_dir():
        found = library.get_model_config(name)
        if found is None:
            near = [known for known in library.list_models() if known.lower().startswith(name.lower()[:5])][:5]
            raise ValueError(
                f"open_clip {library.__version__} has no model named {name!r} and there is no such folder"
                + (f"; near it: {', '.join(near)}" if near else "")
            )
        return _vision_part(found, name), None
    needed = {"configuration": [CONFIG], **({"weights": list(WEIGHTS)} if weights else {})}
    folder = pretrained.model_folder(
        name.removeprefix(_HUB),
        needed,
        [file for files in needed.values() for file in files],
        tower="image backbone",
        advice="It is the form that open_clip.push_to_hf_hub writes",
        local_files_only=local_files_only,
    )
    file = next((folder / weight for weight in WEIGHTS if (folder / weight).is_file()), None)
    settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    return _vision_part(settings.get("model_cfg", settings), name), file if weights else None


def _vision_part(config: dict[str, Any], name: str) -> dict[str, Any]:
    """What of open_clip's configuration the vision side is made from; nothing in it may ask for other models.

    Raises:
        ValueError: no configuration of this form, or one of a vision side that is not supported.
    """
    import timm

    vision = config.get("vision_cfg")
    if not isinstance(vision, dict) or not isinstance(config.get("embed_dim"), int):
        raise ValueError(f"backbone {name}: {CONFIG} has no vision_cfg or embed_dim; expected the configuration of an open_clip model")
    if not isinstance(vision.get("image_size", 224), int):
        raise ValueError(f"backbone {name}: for images of {vision['image_size']} pixels; only square ones are supported")
    trunk = vision.get("timm_model_name")
    if trunk is not None and not timm.is_model(trunk):
        raise ValueError(f"backbone {name}: timm {timm.__version__} has no model named {trunk!r}, which its configuration asks for")
    if vision.get("attentional_pool") or vision.get("pool_type") == "none" or vision.get("timm_pool") in ("abs_attn", "rot_attn"):
        raise ValueError(f"backbone {name}: it pools by queries or attention over the whole image, where a token has no place of its own")
    left_out = ("timm_model_pretrained", "patch_dropout")  # a token that is dropped has no place in a grid
    kept = {key: value for key, value in vision.items() if key not in left_out}
    return {"embed_dim": config["embed_dim"], "quick_gelu": bool(config.get("quick_gelu", False)), "vision_cfg": kept}


def _create(library: Any, config: dict[str, Any], size: int, name: str) -> Any:
    """open_clip's vision tower with random weights; the size of one with a timm trunk is set later."""
    settings = dict(config["vision_cfg"])
    if "timm_model_name" not in settings:
        settings["image_size"] = size
    try:
        visual: Any = library.model._build_vision_tower(config["embed_dim"], settings, config["quick_gelu"])
    except TypeError as error:
        raise ValueError(f"backbone {name}: open_clip {library.__version__} cannot make its vision_cfg: {error}") from error
    if hasattr(visual, "trunk"):
        stride = visual.trunk.feature_info[-1]["reduction"]
    else:
        stride = 32 if hasattr(visual, "attnpool") else visual.patch_size[0]
    if size < stride or size % stride:
        raise ValueError(f"backbone {name}: image_size {size} is no multiple of {stride}, the side of a token in pixels")
    return visual


def _load(library: Any, visual: nn.Module, path: Path, name: str) -> None:
    """Load the vision side strictly, positions interpolated to the size of this one where they differ."""
    state = read_checkpoint(path)
    vision = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")} or state
    own = visual.state_dict()
    for key in ("positional_embedding", "attnpool.positional_embedding"):
        if key in vision and key in own and vision[key].shape != own[key].shape:
            positions = {"visual.positional_embedding": vision[key]}
            target = SimpleNamespace(visual=SimpleNamespace(grid_size=square_grid(len(own[key]) - 1)))
            library.model.resize_pos_embed(positions, target)
            vision[key] = positions["visual.positional_embedding"]
    set_weights(visual, vision, path, name)


def _drop_projection(visual: Any, embed_dim: int) -> int:
    """Take open_clip's own projection out, where it is a layer of its own; the width of what then comes."""
    if hasattr(visual, "attnpool"):
        return embed_dim
    if hasattr(visual, "trunk"):
        visual.trunk.reset_classifier(0)
        visual.head = nn.Identity()
        return int(getattr(visual.trunk, "head_hidden_size", None) or visual.trunk.num_features)
    width = int(visual.ln_post.normalized_shape[0])
    visual.proj = None
    return width
