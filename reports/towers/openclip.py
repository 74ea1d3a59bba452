"""Report towers over the text side of open_clip models: CLIP's transformer, SigLIP's, and the Hugging Face model inside (BiomedCLIP).

Shapes: M texts, L tokens of open_clip's fixed length, H width of the transformer, W of the space that image and text share, D embedding
width. Only the text side is made. The image side of the same folder is :class:`modalities.xray.OpenClipEncoder`.
"""

from __future__ import annotations

import abc
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from medvl.nn import pretrained
from reports.towers.huggingface import carried_files, settings_sha256
from reports.towers.pooling import POOLINGS, Pooling, pool
from reports.towers.positions import position_count, stretch, stretched
from reports.towers.trunk import HeadOptions, Pieces, TextTrunk, TokenForm, TrunkReportEncoder, TrunkSource, content_of, weights_sha256
from reports.towers.words import Span, origins

if TYPE_CHECKING:
    from typing_extensions import Self

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors")
"""Names of weights in a folder of open_clip's, the first that is there, as open_clip itself looks for them."""

_HUB = "hf-hub:"
_NATIVE = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection")
_TOKENIZER_OPTIONS = ("clean", "strip_sep_token")  # and no others: the rest would reach transformers, trust_remote_code among it
_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")


class OpenClipReportEncoder(TrunkReportEncoder):
    """The text side of an open_clip model.

    With ``embed_dim`` None there is no head: pooled is what open_clip's ``encode_text`` gives. With a number, a head as in
    :class:`reports.HuggingFaceReportEncoder` takes the place of open_clip's own projection, on the features before it.

    Frozen, the trunk is saved by reference, with the sha256 of its weights, and its embeddings are cached; trained, it is saved whole. A
    saved tower is loaded without the network.

    Args:
        name: a name of open_clip's list, such as ``ViT-B-16``; a folder with open_clip_config.json and weights; or a model of the hub in
            that form, as ``hf-hub:ORGANISATION/MODEL``. Where only pickled weights were published, convert them to safetensors first.
            Where the text side has a Hugging Face tokenizer, its files lie in the same folder.
        embed_dim: D of a head; None keeps open_clip's own projection.
        checkpoint: a safetensors file of a whole open_clip model. It is needed for a name of the list to have trained weights, and takes
            the place of those in a folder.
        frozen: keep the trunk as it is.
        pooling: another pooling than the model's own; None is the one it was trained with.
        text_model: of a Hugging Face model inside, the folder or hub name that holds its config.json; None looks in the folder of ``name``,
            then for the model that open_clip's configuration names. Its weights are part of open_clip's.
        hidden_dim, dropout, standardise: of the head.
        local_files_only: never ask the hub, use what was downloaded before.
        cache_dir: where embeddings of a frozen trunk are kept between runs.
        batch_size: texts per pass of a frozen trunk.
        initial_weights: False takes only the architecture, for a trunk that trains from scratch.
        tokens: "words" or "pieces" gives ``TextFeatures.tokens``, see :meth:`spans`.
        keep_tokens: keep a frozen trunk's vectors of tokens in memory too.
        stretch_to: positions to draw the learned ones apart to (Long-CLIP), which become the length of texts; None leaves them.
        keep_positions: the first ones, which stay as they are.
    Raises:
        ImportError: open_clip is not installed.
        FileNotFoundError: the folder or the hub lacks the model; the message says what is missing and what to do.
        ValueError: a name open_clip does not know, a text side that is not supported (CoCa), weights that do not fit.
    """

    def __init__(
        self,
        name: str,
        embed_dim: int | None = None,
        checkpoint: Path | None = None,
        frozen: bool = True,
        pooling: Pooling | None = None,
        text_model: str | None = None,
        hidden_dim: int | None = 512,
        dropout: float = 0.0,
        standardise: bool = False,
        local_files_only: bool = False,
        cache_dir: Path | None = None,
        batch_size: int = 64,
        initial_weights: bool = True,
        tokens: TokenForm | None = None,
        keep_tokens: bool = False,
        stretch_to: int | None = None,
        keep_positions: int = 20,
    ) -> None:
        if pooling is not None and pooling not in POOLINGS:
            raise ValueError(f"pooling is one of {', '.join(POOLINGS)}, or None for the model's own, got {pooling!r}")
        if frozen and not initial_weights:
            raise ValueError("a frozen trunk needs its weights: give initial_weights=True or frozen=False")
        library = _open_clip()
        wanted = initial_weights and checkpoint is None
        found = _find(library, name, text_model, local_files_only, wanted)
        weights = Path(checkpoint) if checkpoint is not None and initial_weights else found.weights
        if frozen and weights is None:
            raise ValueError(f"report tower {name}: open_clip's list has no weights; give checkpoint, or a folder that has them")
        options = _Options(pooling, stretch_to, keep_positions, keep_projection=embed_dim is None)
        super().__init__(
            _source(found, options, weights, weights_sha256(weights) if frozen and weights is not None else ""),
            name,
            HeadOptions(embed_dim, hidden_dim, dropout, standardise),
            frozen=frozen,
            tokens=tokens,
            attention=pooling == "attention",
            batch_size=batch_size,
            keep_tokens=keep_tokens,
            cache_dir=cache_dir,
        )

    @classmethod
    def architecture(cls, arguments: dict[str, Any], folder: Path) -> Self:
        """Frozen: the trunk from where it was, if that is here. Trained: configuration and tokenizer from ``folder``.

        Raises:
            FileNotFoundError: a frozen trunk that is not here, or no configuration in ``folder``.
            ValueError: files in ``folder`` that point to code, weights or files elsewhere.
        """
        options = {**arguments, "cache_dir": None, "local_files_only": True}
        if options.get("frozen", True):
            return cls(**options)
        if not (folder / CONFIG).is_file():
            raise FileNotFoundError(
                f"{folder} lacks {CONFIG} of the text model, which a run that trained it carries there; put that of "
                f"{arguments.get('name')!r} there, or save the run again"
            )
        if (folder / "config.json").is_file():
            pretrained.checked_files(folder, arguments.get("name"), "config.json", ("config.json", "tokenizer_config.json"))
        options.update(name=str(folder), checkpoint=None, text_model=None, initial_weights=False)
        return cls(**options)


@dataclass(frozen=True)
class _Found:
    """The text side of a model: what it is made from."""

    name: str
    config: dict[str, Any]  # embed_dim, quick_gelu and text_cfg of open_clip's configuration
    folder: Path | None  # with tokenizer files; None for a name of the list
    weights: Path | None
    text_model: Path | None  # folder with config.json of a Hugging Face model inside


@dataclass(frozen=True)
class _Options:
    pooling: Pooling | None
    stretch_to: int | None
    keep_positions: int
    keep_projection: bool


def _open_clip() -> Any:
    """open_clip, imported when first asked for."""
    try:
        import open_clip
    except ImportError as error:
        raise ImportError("OpenClipReportEncoder needs open_clip, which is not installed: pip install 'medvl[open_clip]'") from error
    return open_clip


def _find(library: Any, name: str, text_model: str | None, local_files_only: bool, weights: bool) -> _Found:
    if not name.startswith(_HUB) and not Path(name).is_dir():
        settings = library.get_model_config(name)
        if settings is None:
            near = [known for known in library.list_models() if known.lower().startswith(name.lower()[:5])][:5]
            raise ValueError(
                f"open_clip {library.__version__} has no model named {name!r} and there is no such folder"
                + (f"; near it: {', '.join(near)}" if near else "")
            )
        config = _text_part(settings, name)
        if config["text_cfg"].get("hf_model_name") or config["text_cfg"].get("hf_tokenizer_name"):
            raise ValueError(f"report tower {name}: its text side has a tokenizer of the hub; give a folder, or hf-hub:ORGANISATION/MODEL")
        return _Found(name, config, None, None, None)
    needed = {"configuration": [CONFIG], **({"weights": list(WEIGHTS)} if weights else {})}
    folder = pretrained.model_folder(
        name.removeprefix(_HUB),
        needed,
        [*(file for files in needed.values() for file in files), "*.json", "*.txt", "*.model"],
        tower="report tower",
        advice="It is the form that open_clip.push_to_hf_hub writes",
        local_files_only=local_files_only,
    )
    settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config = _text_part(settings.get("model_cfg", settings), name)
    text = config["text_cfg"]
    if text.get("hf_tokenizer_name") and not any(any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES):
        raise FileNotFoundError(
            f"report tower {name}: {folder} lacks the tokenizer ({' or '.join(_TOKENIZER_FILES)}) of {text['hf_tokenizer_name']!r}; "
            "save it there with save_pretrained"
        )
    file = next((folder / weight for weight in WEIGHTS if (folder / weight).is_file()), None)
    inside = _inside(folder, text, text_model, local_files_only) if text.get("hf_model_name") else None
    return _Found(name, config, folder, file if weights else None, inside)


def _inside(folder: Path, text: dict[str, Any], text_model: str | None, local_files_only: bool) -> Path:
    """The folder with the configuration of the Hugging Face model inside."""
    if text_model is None and (folder / "config.json").is_file():
        return folder
    return pretrained.model_folder(
        text_model or text["hf_model_name"],
        {"configuration": ["config.json"]},
        ["config.json"],
        tower="text model inside an open_clip model",
        advice="Put the model's config.json beside open_clip_config.json, or name its folder as text_model",
        local_files_only=local_files_only,
    )


def _text_part(config: dict[str, Any], name: str) -> dict[str, Any]:
    """What of open_clip's configuration the text side is made from.

    Raises:
        ValueError: no configuration of this form, or one of a text side that is not supported.
    """
    text = config.get("text_cfg")
    if not isinstance(text, dict) or not isinstance(config.get("embed_dim"), int):
        raise ValueError(f"report tower {name}: {CONFIG} has no text_cfg or embed_dim; expected the configuration of an open_clip model")
    if text.get("embed_cls") or config.get("multimodal_cfg") or text.get("pool_type") == "none":
        raise ValueError(f"report tower {name}: a text side for captions too (CoCa), which is not supported")
    if text.get("tokenizer_mode") or text.get("hf_pooler_type") == "max_pooler":
        raise ValueError(f"report tower {name}: tokenizer_mode and max_pooler of open_clip's text_cfg are not supported")
    kept = {key: value for key, value in text.items() if key != "output_tokens"}
    kept["tokenizer_kwargs"] = {k: v for k, v in (text.get("tokenizer_kwargs") or {}).items() if k in _TOKENIZER_OPTIONS}
    return {"embed_dim": config["embed_dim"], "quick_gelu": bool(config.get("quick_gelu", False)), "text_cfg": kept}


def _source(found: _Found, options: _Options, weights: Path | None, digest: str) -> TrunkSource:
    text, width = found.config["text_cfg"], found.config["embed_dim"]
    hidden = int(text.get("width", 512))
    settings = ""
    if found.text_model is not None:
        settings += (found.text_model / "config.json").read_text(encoding="utf-8")
        hidden = int(json.loads(settings).get("hidden_size") or _hf_configuration(found.text_model).hidden_size)
    if found.folder is not None:
        settings += settings_sha256(found.folder)
    native_without = found.text_model is None and text.get("proj_type") == "none"
    facts = {"pooling": options.pooling, "stretch_to": options.stretch_to, "keep": options.keep_positions, "own": options.keep_projection}
    return TrunkSource(
        make=functools.partial(_trunk, found, options, weights),
        width=hidden if native_without or not options.keep_projection else int(width),
        hidden_width=hidden,
        weights=digest,
        content=content_of(weights=digest, settings=settings, config=found.config, **facts) if digest else "",
    )


def _trunk(found: _Found, options: _Options, weights: Path | None) -> TextTrunk:
    trunk: _OpenClipTrunk = _Native(found, options) if found.text_model is None else _Inside(found, options)
    if weights is not None:
        trunk.load(weights)
    trunk.lengthen()
    return trunk


def _hf_configuration(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


class _OpenClipTrunk(TextTrunk):
    """What both kinds of text side share: open_clip's tokenizer, fixed length, files and weights."""

    text: Any

    def __init__(self, found: _Found, options: _Options) -> None:
        super().__init__()
        self.found, self.options = found, options
        config = found.config["text_cfg"]
        library = _open_clip()
        self.length = int(options.stretch_to or config.get("context_length", 77))
        self.hf_tokenizer = bool(config.get("hf_tokenizer_name"))
        if self.hf_tokenizer:
            self.tokenizer: Any = library.tokenizer.HFTokenizer(
                str(found.folder),
                context_length=self.length,
                local_files_only=True,
                trust_remote_code=False,
                **config["tokenizer_kwargs"],
            )
        else:
            self.tokenizer = library.tokenizer.SimpleTokenizer(context_length=self.length, **config["tokenizer_kwargs"])

    def tokenize(self, texts: Sequence[str], spans: bool = False) -> list[Pieces]:
        """Token ids, padded to open_clip's length as in its own training."""
        ids = self.tokenizer(list(texts)).tolist()
        if not spans:
            return [Pieces({"input_ids": row}) for row in ids]
        found = []
        for text, row in zip(texts, ids, strict=True):
            cleaned = self.tokenizer.clean_fn(text)
            inside = self._hf_spans(cleaned) if self.hf_tokenizer else [(0, 0), *_bpe_spans(self.tokenizer, cleaned)][: self.length - 1]
            place = origins(text, cleaned)
            found.append(Pieces({"input_ids": row}, tuple((place[s], place[e - 1] + 1) if s < e else (0, 0) for s, e in inside)))
        return found

    def _hf_spans(self, cleaned: str) -> list[Span]:
        tokenizer = self.tokenizer.tokenizer
        if not tokenizer.is_fast:
            raise ValueError(
                f"tokens need the characters of each word piece, which a {type(tokenizer).__name__} does not keep; save the tokenizer in "
                "its fast form (tokenizer.json), or leave out tokens"
            )
        cut = tokenizer(cleaned, truncation=True, max_length=self.length, return_offsets_mapping=True, return_special_tokens_mask=True)
        pairs = zip(cut["offset_mapping"], cut["special_tokens_mask"], strict=True)
        return [(0, 0) if special else (int(start), int(end)) for (start, end), special in pairs]

    def files(self) -> dict[str, bytes]:
        """The text part of open_clip's configuration, and configuration and tokenizer of a Hugging Face model inside."""
        config = json.loads(json.dumps(self.found.config))
        config["text_cfg"]["context_length"] = self.length
        files = {CONFIG: (json.dumps({"model_cfg": config}, indent=2) + "\n").encode()}
        if self.hf_tokenizer:
            files.update(carried_files(self.tokenizer.tokenizer, None if self.found.text_model is None else self.text.config))
        return files

    def load(self, path: Path) -> None:
        """Set the weights to those of an open_clip model's text side, strictly.

        Raises:
            ValueError: weights that are no safetensors file or do not fit.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            state = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"report tower: {path} is no whole safetensors file ({error}); download or convert it again") from error
        own = {key.removeprefix("text."): value for key, value in state.items() if key.startswith("text.")}
        own = own or {key: value for key, value in state.items() if key.startswith(_NATIVE)}
        try:
            self._set(own)
        except RuntimeError as error:
            raise ValueError(
                f"report tower: the {len(own)} text weights in {path} do not fit {self.found.name}: some are missing, too many or of "
                "another shape; expected those that belong to its open_clip_config.json"
            ) from error

    @abc.abstractmethod
    def _set(self, state: dict[str, Tensor]) -> None:
        """Set the weights, strictly."""

    def lengthen(self) -> None:
        """Stretch positions that were not stretched with the weights."""


def _bpe_spans(tokenizer: Any, cleaned: str) -> list[Span]:
    """Characters of each piece that open_clip's own byte-pair tokenizer makes of a cleaned text, without start and end."""
    found = []
    for match in tokenizer.pat.finditer(cleaned):
        word = match.group()
        of_byte = [match.start() + i for i, c in enumerate(word) for _ in c.encode()]
        first = 0
        for piece in tokenizer.bpe("".join(tokenizer.byte_encoder[b] for b in word.encode())).split(" "):
            last = first + len(piece.removesuffix("</w>"))
            found.append((of_byte[first], of_byte[last - 1] + 1))
            first = last
    return found


class _Native(_OpenClipTrunk):
    """open_clip's own text transformer."""

    def __init__(self, found: _Found, options: _Options) -> None:
        super().__init__(found, options)
        known = found.config["text_cfg"].get("context_length", 77)
        if self.length < known:
            raise ValueError(f"stretch_to {self.length} is less than the {known} positions that the model has; give more, or None")
        text = {**found.config["text_cfg"], "context_length": self.length}
        try:
            self.text = _open_clip().model._build_text_tower(found.config["embed_dim"], text, found.config["quick_gelu"])
        except TypeError as error:
            raise ValueError(f"report tower {found.name}: open_clip cannot make its text_cfg: {error}") from error
        self.hidden_width = int(self.text.width)
        if not options.keep_projection:
            self.text.text_projection = None
        self.width = self.hidden_width if self.text.text_projection is None else int(found.config["embed_dim"])
        self.end = self.tokenizer.tokenizer.eos_token_id if self.hf_tokenizer else self.tokenizer.eot_token_id

    def _set(self, state: dict[str, Tensor]) -> None:
        state = {name: value for name, value in state.items() if name != "attn_mask"}
        if not self.options.keep_projection:
            state = {name: value for name, value in state.items() if not name.startswith("text_projection")}
        if self.options.stretch_to is not None and "positional_embedding" in state:
            state["positional_embedding"] = stretch(state["positional_embedding"], self.length, self.options.keep_positions)
        self.text.load_state_dict(state, strict=True)

    def encode(self, pieces: Sequence[Pieces]) -> tuple[Tensor, Tensor]:
        """(M, L, H) and (M, L) bool: the tokens up to the end token; all of a text whose tokenizer has none."""
        ids = torch.tensor([p.inputs["input_ids"] for p in pieces], device=self.device)
        x, mask = self.text._embeds(ids)
        hidden = self.text.ln_final(self.text.transformer(x, attn_mask=mask))
        ends = ids == (-1 if self.end is None else self.end)
        last = torch.where(ends.any(1), ends.int().argmax(1), ids.shape[1] - 1)
        return hidden.float(), torch.arange(ids.shape[1], device=ids.device) <= last[:, None]

    def pool(self, hidden: Tensor, valid: Tensor) -> Tensor:
        """(M, H); open_clip pools at the end token, the first or the last place, as its configuration says."""
        if self.options.pooling is not None:
            return pool(hidden, valid, self.options.pooling)
        if self.text.pool_type in ("argmax", "eos"):
            return pool(hidden, valid, "eos")
        return hidden[:, 0 if self.text.pool_type == "first" else -1]

    def project(self, vectors: Tensor) -> Tensor:
        """(..., H) to (..., W)."""
        projection = self.text.text_projection
        if projection is None:
            return vectors
        return projection(vectors) if isinstance(projection, nn.Linear) else vectors @ projection


class _Inside(_OpenClipTrunk):
    """A Hugging Face model inside open_clip's adapter."""

    def __init__(self, found: _Found, options: _Options) -> None:
        super().__init__(found, options)
        assert found.text_model is not None
        config = found.config["text_cfg"]
        self.text = _open_clip().hf_model.HFTextEncoder(
            config["hf_model_name"],
            output_dim=found.config["embed_dim"],
            config=_hf_configuration(found.text_model),
            proj_type=config.get("hf_proj_type", "mlp"),
            pooler_type=config.get("hf_pooler_type", "mean_pooler"),
        )
        self.kind = config.get("hf_pooler_type", "mean_pooler")
        if self.kind != "cls_pooler" and hasattr(self.text.transformer, "pooler"):
            self.text.transformer.pooler = None
        if not options.keep_projection:
            self.text.proj = nn.Identity()
        self.hidden_width = int(self.text.config.hidden_size)
        self.width = int(found.config["embed_dim"]) if options.keep_projection else self.hidden_width

    def lengthen(self) -> None:
        """Stretch the positions of the model inside."""
        if self.options.stretch_to is not None:
            self.text.transformer = stretched(self.text.transformer, self.length, self.options.keep_positions)
            self.text.config = self.text.transformer.config
        positions = position_count(self.text.transformer)
        if positions is not None and self.length > positions:
            raise ValueError(f"report tower {self.found.name}: texts of {self.length} tokens, but its model takes {positions}")

    def _set(self, state: dict[str, Tensor]) -> None:
        state = {name: value for name, value in state.items() if not name.endswith("embeddings.position_ids")}
        if not self.options.keep_projection:
            state = {name: value for name, value in state.items() if not name.startswith("proj.")}
        if getattr(self.text.transformer, "pooler", None) is None:
            state = {name: value for name, value in state.items() if not name.startswith("transformer.pooler.")}
        self.text.load_state_dict(state, strict=True)

    def encode(self, pieces: Sequence[Pieces]) -> tuple[Tensor, Tensor]:
        """(M, L, H) and (M, L) bool."""
        ids = torch.tensor([p.inputs["input_ids"] for p in pieces], device=self.device)
        valid = ids != self.text.config.pad_token_id
        return self.text.transformer(input_ids=ids, attention_mask=valid.long()).last_hidden_state.float(), valid

    def pool(self, hidden: Tensor, valid: Tensor) -> Tensor:
        """(M, H); open_clip's cls_pooler takes the model's own pooler where it has one."""
        if self.options.pooling is not None:
            return pool(hidden, valid, self.options.pooling)
        if self.kind == "mean_pooler":
            return pool(hidden, valid, "mean")
        own = getattr(self.text.transformer, "pooler", None) if self.kind == "cls_pooler" else None
        return hidden[:, 0] if own is None else own(hidden)

    def project(self, vectors: Tensor) -> Tensor:
        """(..., H) to (..., W)."""
        return self.text.proj(vectors)
