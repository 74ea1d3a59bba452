"""One process of test_ranks: losses and gradients of shared batches, written to a file. Not a test by itself.

python ranks_worker.py FOLDER RANK WORLD_SIZE
"""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

from medvl.data.studies import Share, StudyBatch
from medvl.losses import (
    FalseTextContrast,
    ImageImageContrast,
    LikenessInfoNCE,
    MultiLabelCodes,
    MultiPositiveInfoNCE,
    MultiPositiveSigmoid,
    SentencePrototypes,
    Term,
    TextTextContrast,
    UniformityAlignment,
    soft_target_loss,
)
from medvl.nn.cross import CrossAttentionSimilarity, MixtureSimilarity
from medvl.nn.local import ConceptSimilarity, SentenceAttentionSimilarity, TokenwiseSimilarity, WordRegionSimilarity
from medvl.nn.similarity import PooledSimilarity, TokenSimilarity
from medvl.training.module import AlignmentModule
from medvl.types import ImageBatch, ImageEncoder, ImageFeatures, Product, ReportEncoder, TextBatch, TextFeatures

D = 8
SIMILARITIES = {
    "pooled": PooledSimilarity,
    "tokens": TokenSimilarity,
    "sentence attention": SentenceAttentionSimilarity,
    "words and regions": WordRegionSimilarity,
    "token-wise": TokenwiseSimilarity,
    "concepts": ConceptSimilarity,
    "mixture": lambda: MixtureSimilarity(D, heads=2, mixtures=3),
    "cross-attention": lambda: CrossAttentionSimilarity(D, layers=1, heads=2, feedforward=8, hidden=(8,)),
}
OBJECTIVES = {
    "outside": MultiPositiveInfoNCE,
    "inside": lambda: MultiPositiveInfoNCE(inside=True),
    "negatives": lambda: MultiPositiveInfoNCE(denominator="negatives"),
    "all and each": lambda: MultiPositiveInfoNCE(denominator={"image": "all", "text": "each"}, image_share=0.75),
    "text alone, plain": lambda: MultiPositiveInfoNCE(direction="text", chunk_size=0),
    "sharp texts": lambda: MultiPositiveInfoNCE(soft="image"),
    "sigmoid": MultiPositiveSigmoid,
    "likeness of texts": LikenessInfoNCE,
    "likeness of images": lambda: LikenessInfoNCE(anchor="image"),
}
WITHOUT_MATRIX = {"likeness of texts", "likeness of images"}
KINDS = {None: ("plain", "dropped", "missing", "null"), 2: ("plain", "null")}
CASES = [(*case, size, kind) for case in product(SIMILARITIES, OBJECTIVES) for size, kinds in KINDS.items() for kind in kinds]
CASES = [case for case in CASES if case[1] not in WITHOUT_MATRIX or case[0] == "pooled"]


def terms() -> dict[str, Term]:
    return {
        "image_image": ImageImageContrast(0.7),
        "text_text": TextTextContrast(0.5),
        "false_texts": FalseTextContrast(0.9),
        "spread": UniformityAlignment(0.3),
        "codes": MultiLabelCodes(D, 3, 1.1, positive_weight=2.0),
        "prototypes": SentencePrototypes(D, 6, 0.8),
        "drawn_prototypes": SentencePrototypes(D, 5, 0.4, gumbel=True),
    }


class Images(ImageEncoder):
    def __init__(self) -> None:
        super().__init__()
        self.embed_dim, self.out = D, nn.Linear(4, D)

    def forward(self, batch: ImageBatch) -> ImageFeatures:
        tokens = self.out(batch.pixels.flatten(2).transpose(1, 2))
        return ImageFeatures(tokens.tanh().mean(1), tokens, tuple(batch.pixels.shape[2:]))


class Texts(ReportEncoder):
    """Words are letters; texts of other lengths are padded."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_dim, self.table = D, nn.Embedding(26, D)

    def forward(self, batch: TextBatch) -> TextFeatures:
        codes = [torch.tensor([ord(letter) - 97 for letter in text]) for text in batch.texts]
        tokens = nn.utils.rnn.pad_sequence([self.table(one) for one in codes], batch_first=True)
        valid = torch.arange(tokens.shape[1]) < torch.tensor([len(one) for one in codes])[:, None]
        return TextFeatures(torch.stack([self.table(one).sin().mean(0) for one in codes]), tokens, valid, torch.where(valid, 0, -1))


def batch_of(kind: str, share: Share | None) -> StudyBatch:
    """Five studies and four texts with soft, ignored and false pairs; of a share only its images."""
    rng = torch.Generator().manual_seed(len(kind))
    pixels = torch.randn(5, 4, 2, 3, generator=rng, dtype=torch.float64)
    positives = torch.tensor([[1, 0.5, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0]], dtype=torch.float64)
    ignore = torch.zeros(5, 4, dtype=torch.bool)
    ignore[0, 2] = True
    false, null = torch.tensor([False, False, False, True]), None
    missing = torch.zeros(5, dtype=torch.bool)
    if kind == "dropped":
        positives[4], ignore[4] = 0, True
    if kind == "missing":  # only the process that has its image knows
        missing[4] = share is None or share.here[1] == 5
    if kind == "null":
        null = torch.tensor([False, False, True, False])
        positives[3, 0] = 1
    here = slice(None) if share is None else slice(*share.here)
    again = torch.randn(5, 4, 2, 3, generator=rng, dtype=torch.float64)
    labels = torch.tensor([[1, 0, torch.nan], [0, 1, 1], [torch.nan] * 3, [1, torch.nan, 0], [0, 0, 0]])
    if kind == "dropped":
        labels[4] = torch.nan
    return StudyBatch(
        ImageBatch(pixels[here]),
        TextBatch(("abc", "de", "fghij", "ka")),
        positives,
        tuple(range(5)),
        (),
        ignore,
        false,
        null,
        share,
        ImageBatch(again[here]),
        labels[here],
        missing=missing,
    )


def main(folder: Path, rank: int, world_size: int) -> None:
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world_size)
    found: dict[str, torch.Tensor] = {}
    for similarity, objective, micro_batch, kind in CASES:
        torch.manual_seed(0)
        towers = (Images(), Texts(), SIMILARITIES[similarity](), OBJECTIVES[objective]())
        more = terms() if similarity == "pooled" and objective == "outside" else None
        module = AlignmentModule(*towers, null_target=kind == "null", micro_batch=micro_batch, terms=more).double()
        module.log = module.log_dict = lambda *args, **kwargs: None  # type: ignore[assignment,method-assign]
        share = Share(rank, (3, 2), (2, 2)) if world_size == 2 else Share(rank, (3, 1, 1), (4, 0, 0)) if world_size == 3 else None
        loss = module.training_step(batch_of(kind, share), 0)
        loss.backward()
        name = f"{similarity}/{objective}/{micro_batch}/{kind}"
        found[f"{name}/loss"] = loss.detach()
        for parameter, weight in module.named_parameters():
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
            if world_size > 1:  # as DDP does
                dist.all_reduce(gradient)
                gradient /= world_size
            found[f"{name}/{parameter}"] = gradient
    rng = torch.Generator().manual_seed(1)
    vectors = [torch.randn(count, D, generator=rng, dtype=torch.float64) for count in (5, 4, 5, 4)]
    bounds = {1: [0, 5], 2: [0, 3, 5], 3: [0, 3, 4, 5]}[world_size]
    for chunk in (0, 2):
        image, text = vectors[0][bounds[rank] : bounds[rank + 1]].clone().requires_grad_(), vectors[1].clone().requires_grad_()
        labels = vectors[2][bounds[rank] : bounds[rank + 1]]
        loss = soft_target_loss(
            Product(image, text, torch.tensor(2.0, dtype=torch.float64)), labels, vectors[3], chunk_size=chunk, across=world_size > 1
        )
        loss.backward()
        gradient = text.grad
        assert gradient is not None
        if world_size > 1:
            dist.all_reduce(gradient)
        found[f"soft, chunk {chunk}/loss"], found[f"soft, chunk {chunk}/text"] = loss.detach(), gradient / world_size
    save_file(found, folder / f"{world_size}-{rank}.safetensors")
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
