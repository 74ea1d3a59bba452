"""Every pooling over the slices of a CT on the same frozen slice vectors: what a study's zero-shot AUROC is, three seeds.

    python tests/benchmarks/bench_ct_pooling.py --out bench_pooling

Phantom CT with reports, in two steps, as slice poolings over pretrained 2D towers are used (RadCLIP, arXiv:2403.09948):
1. A small 2D tower is trained on slices alone, to tell which of them an effusion's or a nodule's mask reaches into, and then frozen.
2. A linear layer, the pooling and the head of the report tower are trained on whole studies with their reports, never on labels, under
   the multi-positive loss. Slice vectors are the same for all; data, order and steps of a seed are the same for every pooling.
Test patients are in neither step. Prompts are the built-in ones. Prints a row per pooling and the lowest of all seeds; writes table.json,
and goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from medvl.data.augment import Augment
from medvl.data.manifest import StudyImage, read_manifest
from medvl.losses import MultiPositiveInfoNCE
from medvl.metrics import auroc
from medvl.nn.similarity import PooledSimilarity, SliceSimilarity
from medvl.types import ImageBatch, ImageFeatures, Similarity, TextBatch
from modalities.ct import AttentionAdapter, CtReader, GatedAttention, MaxPooling, MeanPooling, TransformerPooling
from modalities.ct.mask import read_mask
from modalities.pooling import Pooling
from modalities.xray import ConvEncoder
from reports import MiniLmReportEncoder
from reports.prompts import load_prompts
from reports.text_source import ReportSentences
from tasks.masks import masked_slices

D = 128
SHOWN = ("pleural_effusion", "lung_nodule")
DRAWN = (0.1, 0.9)  # an effusion is learned from few slices
BARS = {"pleural_effusion": 0.90, "lung_nodule": 0.75}
POOLINGS: dict[str, type[Pooling]] = {
    "mean": MeanPooling,
    "max": MaxPooling,
    "gated attention": GatedAttention,
    "attention adapter": AttentionAdapter,
    "transformer": TransformerPooling,
    "text-conditioned": MeanPooling,  # the text chooses the slices; the pooling serves the part beside
}


@dataclass(frozen=True)
class Volume:
    """A study as the towers see it."""

    row: StudyImage
    pixels: Tensor  # (C, S, H, W) half
    masked: NDArray[np.bool_]  # (S, 2) whether a finding's mask reaches into the slice
    spacing_mm: float
    texts: tuple[str, ...]


def read(cohort: Path, reader: CtReader) -> list[Volume]:
    """All studies of the cohort."""
    source, found = ReportSentences(), []
    for row in track(read_manifest(cohort).select(modality="ct").rows, "reading", transient=True):
        sample = reader.read(row.path)
        assert sample.affine is not None and sample.spacing_mm is not None
        masked = np.zeros((sample.pixels.shape[1], len(SHOWN)), dtype=bool)
        for j, name in enumerate(SHOWN):
            if name in row.masks:
                masked[:, j] = masked_slices(read_mask(row.masks[name], sample.affine, sample.transform.native_shape), sample)
        texts = source.texts(row.report, row.findings, row.impression)
        found.append(Volume(row, sample.pixels.half(), masked, sample.spacing_mm[0], texts))
    return found


def pretrained(path: Path, volumes: list[Volume], steps: int) -> ConvEncoder:
    """The 2D tower of an earlier call, or a new one."""
    if not path.is_file():
        save_file(pretrain(volumes, 0, steps).state_dict(), path)
    tower = new_tower()
    tower.load_state_dict(load_file(path))
    return tower.eval()


def new_tower() -> ConvEncoder:
    """The 2D tower before training."""
    return ConvEncoder(D, widths=(24, 48, 96), blocks=(1, 1, 1), in_chans=3, bands=())


def pretrain(volumes: list[Volume], seed: int, steps: int, batch: int = 64) -> ConvEncoder:
    """A 2D tower that tells which masks a slice cuts; half of every batch is drawn by finding, so that the rare one is seen."""
    torch.manual_seed(seed)
    tower = new_tower().train()
    head = nn.Linear(D, len(SHOWN))
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    places = [np.argwhere(np.concatenate([v.masked[:, j] for v in volumes]))[:, 0] for j in range(len(SHOWN))]
    index = [(i, s) for i, v in enumerate(volumes) for s in range(len(v.masked))]
    augment = Augment(rotation_deg=10, scale=0.1, shift=0.06, contrast=0.1, brightness=0.1, noise=0.03)  # few nodules, seen often
    rng = np.random.default_rng(seed)
    for _ in track(range(steps), f"2D tower, seed {seed}", transient=True):
        drawn = [int(rng.choice(places[j])) for j in rng.choice(len(SHOWN), batch // 2, p=DRAWN)]
        at = [index[k] for k in (*drawn, *rng.integers(len(index), size=batch - len(drawn)))]
        images = augment(ImageBatch(torch.stack([volumes[i].pixels[:, s] for i, s in at]).float()), rng)
        target = torch.from_numpy(np.stack([volumes[i].masked[s] for i, s in at])).float()
        loss = F.binary_cross_entropy_with_logits(head(F.relu(tower(ImageBatch(images.pixels)).pooled)), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return tower.eval()


@torch.inference_mode()
def encode(tower: ConvEncoder, volumes: list[Volume]) -> tuple[Tensor, Tensor, Tensor]:
    """(N, S, D) standardised slice vectors, (N, S) valid, (N, S) position in mm, padded to the longest study."""
    longest = max(v.pixels.shape[1] for v in volumes)
    slices, valid = torch.zeros(len(volumes), longest, D), torch.zeros(len(volumes), longest, dtype=torch.bool)
    for i, volume in enumerate(track(volumes, "encoding", transient=True)):
        count = volume.pixels.shape[1]
        slices[i, :count] = tower(ImageBatch(volume.pixels.float().transpose(0, 1))).pooled
        valid[i, :count] = True
    train = torch.tensor([v.row.split == "train" for v in volumes])
    seen = slices[train][valid[train]]
    slices[valid] = (slices[valid] - seen.mean(0)) / seen.std(0)
    position = torch.arange(longest) * torch.tensor([v.spacing_mm for v in volumes])[:, None]
    return slices, valid, position


class Study(nn.Module):
    """A linear layer on frozen slice vectors, and a pooling."""

    def __init__(self, pooling: Pooling) -> None:
        super().__init__()
        self.project, self.pooling = nn.Linear(D, D), pooling

    def forward(self, slices: Tensor, valid: Tensor, position: Tensor) -> ImageFeatures:
        """(B, S, D) to features."""
        projected = self.project(slices)
        return ImageFeatures(self.pooling(projected, valid, position).pooled, slices=projected, slice_valid=valid)


def align(
    name: str, encoded: tuple[Tensor, Tensor, Tensor], volumes: list[Volume], seed: int, steps: int, batch: int = 32
) -> dict[str, float]:
    """Train on the training studies' reports; AUROC of the test studies by finding, and the seconds it took."""
    torch.manual_seed(seed)
    kind = POOLINGS[name]
    study = Study(kind(D) if kind in (GatedAttention, AttentionAdapter, TransformerPooling) else kind())
    similarity: Similarity = SliceSimilarity(sharpness=10.0) if name == "text-conditioned" else PooledSimilarity()
    report, loss = MiniLmReportEncoder(D, hidden_dim=512, dropout=0.1, standardise=True), MultiPositiveInfoNCE()
    report.precompute(list(dict.fromkeys(text for v in volumes for text in v.texts)))
    parts = nn.ModuleList([study, similarity, report]).train()
    optimizer = torch.optim.AdamW(parts.parameters(), 1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    train, test = ([i for i, v in enumerate(volumes) if v.row.split == split] for split in ("train", "test"))
    rng, start, order = np.random.default_rng(seed), time.perf_counter(), []
    for _ in range(steps):
        if len(order) < batch:
            order = rng.permutation(train).tolist()
        at, order = order[:batch], order[batch:]
        texts = tuple(dict.fromkeys(text for i in at for text in volumes[i].texts))
        positives = torch.tensor([[text in volumes[i].texts for text in texts] for i in at])
        features = study(*(part[at] for part in encoded))
        total = loss(similarity.parts(features, report(TextBatch(texts))), positives)["loss"]
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    parts.eval()
    with torch.inference_mode():
        features, found = study(*(part[test] for part in encoded)), {"seconds": time.perf_counter() - start}
        for finding, pair in load_prompts().findings.items():
            scores = [similarity(features, report(TextBatch(tuple(side)))).mean(1) for side in (pair.positive, pair.negative)]
            labels = np.array([volumes[i].row.labels.get(finding, np.nan) for i in test])
            known = np.isin(labels, (0, 1))
            found[finding] = float(auroc(labels[known], (scores[0] - scores[1]).numpy()[known]))
    return found


def main() -> None:
    """Make the cohort, train a tower and six poolings a seed, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--studies", type=int, default=1800)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--slice-steps", type=int, default=2400)
    parser.add_argument("--steps", type=int, default=800)
    chosen = parser.parse_args()
    from tasks.phantoms import write_cohort

    test = chosen.studies // 4
    counts = {"train": chosen.studies - test, "val": 0, "test": test}
    cohort = write_cohort(chosen.out / "data", chosen.studies, 300, ct=True, xray=False, counts=counts)
    volumes = read(cohort, CtReader(spacing_mm=(6, 4, 4), shape=(None, 80, 96), crop="thorax"))
    kept = chosen.out / "table.json"  # what an earlier call, stopped perhaps, has measured
    found: dict[str, list[dict[str, float]]] = json.loads(kept.read_text()) if kept.is_file() else {name: [] for name in POOLINGS}
    tower = pretrained(chosen.out / "tower.safetensors", [v for v in volumes if v.row.split == "train"], chosen.slice_steps)
    encoded = encode(tower, volumes)
    for seed in range(chosen.seeds):
        for name in POOLINGS:
            if len(found[name]) > seed:
                continue
            found[name].append(align(name, encoded, volumes, seed, chosen.steps))
            kept.write_text(json.dumps(found, indent=2))
            Console(stderr=True).print(f"seed {seed}, {name}: " + ", ".join(f"{key} {found[name][-1][key]:.3f}" for key in SHOWN))
    table = Table(
        title=f"{counts['train']} training and {test} test phantoms, {chosen.steps} steps; AUROC of seeds {list(range(chosen.seeds))}"
    )
    for column in ("pooling", *SHOWN, "s"):
        table.add_column(column)
    for name, runs in found.items():
        cells = [" / ".join(f"{run[key]:.3f}" for run in runs) for key in SHOWN]
        table.add_row(name, *cells, f"{np.mean([run['seconds'] for run in runs]):.0f}")
    console = Console(width=140)
    console.print(table)
    lowest = {key: min(run[key] for runs in found.values() for run in runs) for key in SHOWN}
    console.print("lowest of all: " + ", ".join(f"{key} {value:.3f} (bar {BARS[key]})" for key, value in lowest.items()))


if __name__ == "__main__":
    main()
