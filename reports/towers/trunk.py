"""What report towers share, whichever library their text model is from: trunk, head, token outputs, and the embeddings of a frozen trunk.

Shapes: M texts, L tokens, H width of the trunk's tokens, W width of what it gives for a text (H, or what its own projection makes of it),
D embedding width. "Trunk" is the pretrained text model, "head" what follows it. Only safetensors weights are read and no code from a
model's repository is run.

A frozen trunk is saved by reference: the state dict carries the sha256 of its weights, which loading compares. A trunk that trains is saved
whole: weights in the state dict, configuration and tokenizer as files. Of one with LoRA the state dict carries the sha256 and the adapters.
"""

from __future__ import annotations

import abc
import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from medvl.types import ReportEncoder, TextBatch, TextFeatures
from reports.embeddings import EmbeddingStore
from reports.towers.lora import MARK, Lora
from reports.towers.pooling import AttentionPooling
from reports.towers.words import Group, Span, merge, pieces_of_words, word_spans

TokenForm = Literal["pieces", "words"]
CONTENT = 2
"""Part of every key of a stored embedding; raised when the same model and text come to give another vector."""


@dataclass(frozen=True)
class Pieces:
    """One text as a tokenizer cuts it."""

    inputs: Mapping[str, list[int]]  # what the encoder takes, not padded
    spans: tuple[Span, ...] | None = None  # of each token in the text, empty for special tokens; None where the tokenizer keeps none


class TextTrunk(nn.Module, abc.ABC):
    """Base of trunks: texts to pieces, pieces to vectors of tokens, these to one vector a text."""

    hidden_width: int  # H
    width: int  # W

    @abc.abstractmethod
    def tokenize(self, texts: Sequence[str], spans: bool = False) -> list[Pieces]:
        """The pieces of each text, cut at the trunk's length.

        Raises:
            ValueError: spans are asked for and the tokenizer keeps none.
        """

    @abc.abstractmethod
    def encode(self, pieces: Sequence[Pieces]) -> tuple[Tensor, Tensor]:
        """(M, L, H) float32 and (M, L) bool, False on padding, of at least one text."""

    @abc.abstractmethod
    def pool(self, hidden: Tensor, valid: Tensor) -> Tensor:
        """(M, H) from what :meth:`encode` gave."""

    def project(self, vectors: Tensor) -> Tensor:
        """(..., H) to (..., W): the trunk's own projection, where it has one."""
        return vectors

    @abc.abstractmethod
    def files(self) -> dict[str, bytes]:
        """Configuration and tokenizer, as files that a trunk without weights is made from."""

    @property
    def device(self) -> torch.device:
        """Where the trunk is."""
        return next(self.parameters()).device


@dataclass(frozen=True)
class TrunkSource:
    """Where a trunk comes from. It is made when it is needed: that costs seconds, most of them the library's imports."""

    make: Callable[[], TextTrunk]
    width: int  # W
    hidden_width: int  # H
    weights: str  # sha256 of the weight files, hex; empty for a trunk that trains
    content: str  # all that an embedding depends on besides the text, as JSON


class FrozenTrunk:
    """A trunk that is kept as it is, with its embeddings by text. Not an ``nn.Module``, so it stays out of parameters and state dict.

    Copies of a tower (an EMA of its head) share it, for it never changes what it answers. The table is float32 on the CPU.
    """

    def __init__(self, source: TrunkSource, batch_size: int, keep_tokens: bool) -> None:
        self.source, self.batch_size, self.keep_tokens = source, batch_size, keep_tokens
        self.identity = hashlib.sha256(source.content.encode()).digest()
        self.store: EmbeddingStore | None = None
        self.rows: dict[bytes, int] = {}
        self.table = torch.empty(0, source.width)
        self.kept: dict[bytes, Tensor] = {}  # key -> (L, H) on the CPU
        self._trunk: TextTrunk | None = None

    @property
    def trunk(self) -> TextTrunk:
        """The trunk, made when first asked for."""
        if self._trunk is None:
            with torch.inference_mode(False):
                self._trunk = self.source.make().eval().requires_grad_(False)
        return self._trunk

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenTrunk:
        return self

    def key(self, text: str) -> bytes:
        """Hash of all that the embedding of a text depends on."""
        return hashlib.sha256(self.identity + text.encode("utf-8", "surrogatepass")).digest()

    def vectors(self, texts: Sequence[str], device: torch.device) -> Tensor:
        """(M, W) on ``device``, computed where they are neither in memory nor on disk."""
        self.fill(texts, device)
        index = torch.tensor([self.rows[self.key(t)] for t in texts], dtype=torch.long)
        return self.table[index].to(device)

    def fill(
        self, texts: Sequence[str], device: torch.device, progress: Callable[[int, int], None] | None = None, write: bool = False
    ) -> None:
        """See to it that the texts' vectors are in the table.

        Args:
            texts: any number, repeats allowed.
            device: where to compute.
            progress: called with (texts done, texts to do) after each batch that is computed.
            write: put what is computed, or was before, into the store, if there is one that can be written to; batch by batch.
        """
        asked = {self.key(t): t for t in texts}
        self._read([key for key in asked if key not in self.rows])
        store = self.store if write and self.store is not None and self.store.writable else None
        if store is not None and (known := [key for key in asked if key in self.rows]):
            stored = store.get(known)
            absent = [key for key in known if key not in stored]
            store.add(absent, self.table[[self.rows[key] for key in absent]].numpy())
        missing = {key: text for key, text in asked.items() if key not in self.rows}
        found: list[tuple[list[bytes], Tensor]] = []
        for keys, pieces in self._batches(missing, device):
            with _exact(device):
                vectors = self.trunk.project(self.trunk.pool(*self.trunk.encode(pieces))).float().cpu()
            if store is not None:
                store.add(keys, vectors.numpy())
            found.append((keys, vectors))
            if progress is not None:
                progress(sum(len(batch) for batch, _ in found), len(missing))
        if found:
            self._append([key for keys, _ in found for key in keys], torch.cat([vectors for _, vectors in found]))

    def encode(self, texts: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """(M, L, H) of every token of every text and (M, L) bool, on ``device``; computed anew unless ``keep_tokens``."""
        asked = {self.key(t): t for t in texts}
        found = {key: self.kept[key] for key in asked if key in self.kept}
        for keys, pieces in self._batches({key: text for key, text in asked.items() if key not in found}, device):
            with _exact(device):
                hidden, valid = self.trunk.encode(pieces)
                rows = {key: row[inside] for key, row, inside in zip(keys, hidden, valid, strict=True)}
            found.update(rows)
            if self.keep_tokens:
                self.kept.update({key: row.cpu() for key, row in rows.items()})
        if not asked:
            return torch.zeros(0, 1, self.source.hidden_width, device=device), torch.zeros(0, 1, dtype=torch.bool, device=device)
        in_order = [found[self.key(t)].to(device) for t in texts]
        counts = torch.tensor([len(row) for row in in_order], device=device)
        return pad_sequence(in_order, batch_first=True), torch.arange(int(counts.max()), device=device) < counts[:, None]

    def _read(self, keys: list[bytes]) -> None:
        if self.store is not None and keys and (stored := self.store.get(keys)):
            self._append(list(stored), torch.from_numpy(np.stack(list(stored.values()))))

    def _append(self, keys: Sequence[bytes], vectors: Tensor) -> None:
        # The table outlives this call: no tensor in it may be an inference tensor, or a later training step could not save it.
        with torch.inference_mode(False):
            self.rows.update({key: len(self.table) + i for i, key in enumerate(keys)})
            self.table = torch.cat([self.table, vectors])

    def _batches(self, missing: dict[bytes, str], device: torch.device) -> Iterator[tuple[list[bytes], list[Pieces]]]:
        """Texts of like length together."""
        if not missing:
            return
        with torch.inference_mode(False):
            self.trunk.to(device)
        keys, pieces = list(missing), self.trunk.tokenize(list(missing.values()))
        order = sorted(range(len(keys)), key=lambda i: len(pieces[i].inputs["input_ids"]))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            yield [keys[i] for i in batch], [pieces[i] for i in batch]


@contextmanager
def _exact(device: torch.device) -> Iterator[None]:
    """No graph, no inference tensors and no autocast: a frozen trunk answers the same whoever asks."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


@dataclass(frozen=True)
class HeadOptions:
    """What follows a trunk."""

    embed_dim: int | None
    hidden_dim: int | None
    dropout: float
    standardise: bool


class TrunkReportEncoder(ReportEncoder):
    """Base of report towers over a text trunk: the trunk's vector, L2-normalised and scaled by sqrt(W), then a head to D.

    Tokens, where they are asked for, go through the same layers as if each were the whole text, so they lie in the space of ``pooled``.
    Special tokens (the classification token, the end of the text) are none of them: :meth:`spans` gives each one its place in the text.
    Without a head, ``pooled`` and ``tokens`` are what the trunk gives, not normalised, and D is W.
    """

    trunk: TextTrunk | None
    head: nn.Module | None
    trunk_sha256: Tensor  # (32,) uint8, present when frozen

    def __init__(
        self,
        source: TrunkSource,
        name: str,
        head: HeadOptions,
        frozen: bool,
        tokens: TokenForm | None,
        attention: bool,
        batch_size: int,
        keep_tokens: bool,
        cache_dir: Path | None,
        lora: Lora | None = None,
        initial_weights: bool = True,
    ) -> None:
        super().__init__()
        if tokens not in (None, "pieces", "words"):
            raise ValueError(f"tokens is 'pieces', 'words' or None, got {tokens!r}")
        if min(1 if head.embed_dim is None else head.embed_dim, batch_size) < 1:
            raise ValueError(f"embed_dim and batch_size must be positive, got {head.embed_dim}, {batch_size}")
        if lora is not None and not frozen:
            raise ValueError("lora: adapters go into a trunk that is kept as it is otherwise; leave out frozen=False, or lora")
        self.model_name, self.frozen, self.width, self.tokens_as = name, frozen, source.width, tokens
        self._source, self.lora = source, lora
        self.cached = FrozenTrunk(source, batch_size, keep_tokens) if frozen and lora is None else None
        self.trunk = None
        if self.cached is None and (initial_weights or not frozen):
            self._make_trunk()
        if frozen:
            self.register_buffer("trunk_sha256", torch.frombuffer(bytearray(bytes.fromhex(source.weights)), dtype=torch.uint8))
            self.register_load_state_dict_pre_hook(_check_trunk)
        if lora is not None:
            self.register_load_state_dict_pre_hook(_with_base)
            self.register_state_dict_post_hook(_without_base)
        elif not frozen:
            self.register_load_state_dict_pre_hook(_with_aliases)
            self.register_state_dict_post_hook(_without_aliases)
        self.attend = AttentionPooling(source.hidden_width) if attention else None
        self.embed_dim = source.width if head.embed_dim is None else head.embed_dim
        self.head = None if head.embed_dim is None else _head(source.width, head)
        if cache_dir is not None:
            self.use_cache(Path(cache_dir))

    def _make_trunk(self) -> None:
        self.trunk = self._source.make()

    def __deepcopy__(self, memo: dict[int, Any]) -> TrunkReportEncoder:
        """A copy with weights of its own, but for those that never change."""
        if self.lora is not None and self.trunk is not None:
            memo.update({id(p): p for name, p in self.trunk.named_parameters() if MARK not in name})
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def files(self) -> dict[str, bytes]:
        """Configuration and tokenizer of a trunk that is trained."""
        return {} if self.frozen or self.trunk is None else self.trunk.files()

    @property
    def device(self) -> torch.device:
        """Where the weights are, and so where features come out."""
        first = next(self.parameters(), None)
        return self.trunk_sha256.device if first is None else first.device

    def trunk_embeddings(self, texts: Sequence[str]) -> Tensor:
        """(M, W) float32, L2-normalised embeddings of the trunk.

        Frozen: from the cache, computed where missing, never part of an autograd graph. Otherwise computed, with gradients.

        Raises:
            ValueError: the pooling is learned, so that the trunk alone gives no vector of a text.
        """
        if self.attend is not None:
            raise ValueError("pooling is 'attention': the trunk has vectors of tokens only, the tower pools them")
        return F.normalize(self._vectors(texts), dim=-1)

    def use_cache(self, folder: Path) -> None:
        """Take a frozen trunk's embeddings from ``folder`` and, on :meth:`precompute`, write them there; as ``cache_dir`` does.

        A text found there costs no transformer: neither its weights nor the library is loaded. Vectors of tokens are not kept there.
        """
        if self.cached is not None:
            self.cached.store = EmbeddingStore(Path(folder) / f"width-{self.width}", self.width)

    def precompute(self, texts: Sequence[str], progress: Callable[[int, int], None] | None = None) -> None:
        """Fill a frozen trunk's cache, and write it to ``cache_dir`` if there is one, batch by batch.

        Args:
            texts: any number, repeats allowed.
            progress: called with (texts done, texts to do) after each batch.
        """
        if self.cached is not None and self.attend is None:
            self.cached.fill(texts, self.device, progress, write=True)

    def spans(self, texts: Sequence[str]) -> tuple[tuple[Span, ...], ...]:
        """For each text the characters (start, end) of its tokens: token i of text m in ``TextFeatures.tokens`` is spans[m][i].

        :func:`reports.towers.overlapping` finds the tokens of a phrase.

        Raises:
            ValueError: a tower without tokens, or a tokenizer that keeps no offsets.
        """
        return tuple(spans for spans, _ in self._groups(texts))

    def forward(self, batch: TextBatch) -> TextFeatures:
        """Encode M texts to (M, D) and, if ``tokens`` was given, their words or word pieces to (M, L, D)."""
        texts = batch.texts
        if self.attend is None and self.tokens_as is None:
            return TextFeatures(pooled=self._out(self._vectors(texts)))
        hidden, valid = self._encode(texts)
        if self.attend is not None:
            pooled = self._any_trunk.project(self.attend(hidden, valid))
        elif self.cached is not None:
            pooled = self._vectors(texts)
        else:
            pooled = self._pooled(hidden, valid)
        if self.tokens_as is None:
            return TextFeatures(pooled=self._out(pooled))
        merged, token_valid = merge(hidden, [groups for _, groups in self._groups(texts)])
        return TextFeatures(pooled=self._out(pooled), tokens=self._out(self._any_trunk.project(merged)), token_valid=token_valid)

    @property
    def _any_trunk(self) -> TextTrunk:
        if self.cached is not None:
            return self.cached.trunk
        if self.trunk is None:
            raise RuntimeError("this tower was made without its trunk's weights: load a state dict first")
        return self.trunk

    def _vectors(self, texts: Sequence[str]) -> Tensor:
        """(M, W), not normalised."""
        if self.cached is not None:
            return self.cached.vectors(texts, self.device)
        return self._pooled(*self._encode(texts))

    def _pooled(self, hidden: Tensor, valid: Tensor) -> Tensor:
        return self._any_trunk.project(self._any_trunk.pool(hidden, valid)).float()

    def _encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(M, L, H) and (M, L) bool, padding and special tokens included."""
        if self.cached is not None:
            return self.cached.encode(texts, self.device)
        trunk = self._any_trunk
        if not texts:
            return torch.zeros(0, 1, trunk.hidden_width, device=trunk.device), torch.zeros(0, 1, dtype=torch.bool, device=trunk.device)
        return trunk.encode(trunk.tokenize(texts))

    def _groups(self, texts: Sequence[str]) -> list[tuple[tuple[Span, ...], tuple[Group, ...]]]:
        """For each text the spans of its tokens, and the indices among the trunk's tokens that each is made of."""
        if self.tokens_as is None:
            raise ValueError("this tower gives no tokens: make it with tokens='words' or tokens='pieces'")
        found: list[tuple[tuple[Span, ...], tuple[Group, ...]]] = []
        for text, pieces in zip(texts, self._any_trunk.tokenize(texts, spans=True) if texts else [], strict=True):
            assert pieces.spans is not None
            if self.tokens_as == "words":
                found.append(pieces_of_words(pieces.spans, word_spans(text)))
            else:
                inside = [i for i, (start, end) in enumerate(pieces.spans) if start < end]
                found.append((tuple(pieces.spans[i] for i in inside), tuple((i,) for i in inside)))
        return found

    def _out(self, vectors: Tensor) -> Tensor:
        """(..., W) to (..., D)."""
        return vectors if self.head is None else self.head(F.normalize(vectors.float(), dim=-1) * self.width**0.5)


def weights_sha256(*files: Path) -> str:
    """Hash of files, or of the safetensors files of a folder, in the order of their names."""
    digest = hashlib.sha256()
    for file in sorted(inside for given in files for inside in (given.glob("*.safetensors") if given.is_dir() else [given])):
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def content_of(**facts: Any) -> str:
    """What an embedding depends on besides the text, as JSON that is equal for equal facts."""
    return json.dumps({"content": CONTENT, **facts}, sort_keys=True)


def _head(width: int, options: HeadOptions) -> nn.Module:
    first = [_Standardise(width)] if options.standardise else []
    hidden, embed_dim = options.hidden_dim, options.embed_dim
    assert embed_dim is not None
    if hidden is None:
        return nn.Sequential(*first, nn.Linear(width, embed_dim)) if first else nn.Linear(width, embed_dim)
    last = (nn.GELU(), nn.LayerNorm(hidden), nn.Dropout(options.dropout), nn.Linear(hidden, embed_dim))
    return nn.Sequential(*first, nn.Linear(width, hidden), *last)


class _Standardise(nn.BatchNorm1d):
    """Batch normalisation without gain and offset.

    A batch of one text, which has no variance, and tokens, (M, L, W), are normalised by the running statistics of texts.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 3:
            return self._by_running(x.flatten(0, 1)).view_as(x)
        return self._by_running(x) if self.training and len(x) == 1 else super().forward(x)

    def _by_running(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, eps=self.eps)


def _check_trunk(module: TrunkReportEncoder, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before loading a frozen tower: the head was trained on these trunk weights and no others."""
    stored = state.get(f"{prefix}trunk_sha256")
    if stored is not None and not torch.equal(stored.cpu(), module.trunk_sha256.cpu()):
        then, now = (bytes(t.cpu().tolist()).hex()[:12] for t in (stored, module.trunk_sha256))
        raise ValueError(
            f"report tower: the head was trained on a trunk with sha256 {then}..., but {module.model_name!r} holds {now}...; "
            "give the model and revision that the run was trained with"
        )


def _with_base(module: TrunkReportEncoder, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before loading a tower with LoRA: its trunk is made now if it was not before, and what the file leaves out is taken from it."""
    if module.trunk is None:
        device = module.device
        module._make_trunk()
        assert module.trunk is not None
        module.trunk.to(device)
    own = module.trunk.state_dict(prefix=f"{prefix}trunk.", keep_vars=True)
    state.update({name: value for name, value in own.items() if MARK not in name})


def _without_base(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Of a trunk with LoRA only the adapters are saved."""
    for name in [name for name in state if name.startswith(f"{prefix}trunk.") and MARK not in name]:
        del state[name]


def _aliases(trunk: nn.Module | None) -> dict[str, str]:
    """Name -> other name of the same weight, of those that a trunk has under two (the word embeddings of T5)."""
    first: dict[int, str] = {}
    pairs = [] if trunk is None else list(trunk.named_parameters(remove_duplicate=False))
    return {name: kept for name, p in pairs if (kept := first.setdefault(id(p), name)) != name}


def _with_aliases(module: TrunkReportEncoder, state: dict[str, Any], prefix: str, *_: Any) -> None:
    names = _aliases(module.trunk).items()
    state.update({f"{prefix}trunk.{name}": state[key] for name, kept in names if (key := f"{prefix}trunk.{kept}") in state})


def _without_aliases(module: TrunkReportEncoder, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A weight is saved once: safetensors takes no second name of the same memory."""
    for name in _aliases(module.trunk):
        state.pop(f"{prefix}trunk.{name}", None)
