"""One training step against open_clip_train's own loop: ViT-B-32 with its text tower, batch 32, on the CPU.

    python tests/benchmarks/bench_step.py --rounds 3 --steps 3

Both loops train the same architecture from random weights, single process, AdamW, on 224-pixel films and different texts, theirs from
tensors in memory and ours from a manifest through the cache; random data, for only cost is measured. CPU time (user and system) per step
in turns, the first step of a turn discarded; the median with its range. Data time is the share of our steps spent waiting for the loader.
"""

from __future__ import annotations

import argparse
import csv
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import open_clip
import torch
from lightning.pytorch.callbacks import Callback
from open_clip_train.train import train_one_epoch
from PIL import Image
from rich.console import Console
from rich.table import Table

from medvl.losses import MultiPositiveInfoNCE
from medvl.nn.similarity import PooledSimilarity
from medvl.training.data import StudyDataModule
from medvl.training.module import AlignmentModule
from modalities.xray.openclip import OpenClipEncoder
from modalities.xray.reader import XrayReader
from reports.text_source import ReportSentences
from reports.towers import OpenClipReportEncoder

NAME = "ViT-B-32"


class Clock(Callback):
    """CPU seconds from the end of a step to the end of the next, and how much of it went by before the batch was there."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.waited: list[float] = []
        self.last = self.ready = time.process_time()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        self.ready = time.process_time()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        now = time.process_time()
        self.steps.append(now - self.last)
        self.waited.append(self.ready - self.last)
        self.last = now


def films(folder: Path, count: int, side: int) -> Path:
    """A manifest of noise with a report of one sentence each, all different."""
    rng = np.random.default_rng(0)
    with (folder / "manifest.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["study_id", "patient_id", "modality", "path", "split", "findings"])
        for i in range(count):
            Image.fromarray(rng.integers(0, 255, (side, side), dtype=np.uint8)).save(folder / f"{i}.png")
            table.writerow([f"s{i}", f"p{i}", "xray", f"{i}.png", "train", f"Nodule of {i} mm in the left upper lobe."])
    return folder / "manifest.csv"


class Ours:
    """AlignmentModule under Lightning's trainer."""

    def __init__(self, manifest: Path, batch: int, precision: str) -> None:
        self.precision = precision
        towers = (
            OpenClipEncoder(NAME, in_chans=1, initial_weights=False),
            OpenClipReportEncoder(NAME, frozen=False, initial_weights=False),
        )
        self.module = AlignmentModule(*towers, PooledSimilarity(), MultiPositiveInfoNCE(), learning_rate=1e-4)
        self.data = StudyDataModule(str(manifest), XrayReader(size=224), ReportSentences(), batch_size=batch)
        self.data.setup()
        self.data.read_images(("train",))

    def run(self, steps: int) -> Clock:
        clock = Clock()
        trainer = L.Trainer(
            max_steps=steps,
            accelerator="cpu",
            precision="bf16-mixed" if self.precision == "bf16" else "32-true",  # type: ignore[arg-type]
            callbacks=[clock],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            limit_val_batches=0,
        )
        clock.last = time.process_time()
        trainer.fit(self.module, datamodule=self.data)
        return clock


class TimedLoader:
    """One batch so many times, in the form open_clip_train expects, with the CPU seconds between two."""

    def __init__(self, batch: tuple[torch.Tensor, torch.Tensor], steps: int) -> None:
        self.batch, self.num_batches, self.num_samples = batch, steps, steps * len(batch[0])
        self.taken: list[float] = []

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        last = time.process_time()
        for _ in range(self.num_batches):
            yield self.batch
            now = time.process_time()
            self.taken.append(now - last)
            last = now


class Theirs:
    """open_clip_train.train.train_one_epoch."""

    def __init__(self, batch: int, precision: str) -> None:
        self.model = open_clip.create_model(NAME, output_dict=True)
        self.loss = open_clip.ClipLoss()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, betas=(0.9, 0.98), eps=1e-6)
        rng = torch.Generator().manual_seed(0)
        images = torch.randn(batch, 3, 224, 224, generator=rng)
        texts = open_clip.get_tokenizer(NAME)([f"Nodule of {i} mm in the left upper lobe." for i in range(batch)])
        self.batch = (images, texts)
        self.args = SimpleNamespace(
            device="cpu",
            precision="amp_bf16" if precision == "bf16" else "fp32",
            distill=False,
            accum_freq=1,
            skip_scheduler=True,
            horovod=False,
            grad_clip_norm=None,
            log_every_n_steps=10**6,
            batch_size=batch,
            world_size=1,
            rank=0,
            local_rank=0,
            distributed=False,
            log_local=False,
            wandb=False,
        )

    def run(self, steps: int) -> list[float]:
        loader = TimedLoader(self.batch, steps)
        train = SimpleNamespace(set_epoch=lambda epoch: None, dataloader=loader)
        train_one_epoch(self.model, {"train": train}, self.loss, 0, self.optimizer, None, None, None, self.args)
        return loader.taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="of a turn, the first of which is discarded")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    table = Table("precision", "open_clip_train, CPU s", "medvl, CPU s", "ratio", "data time", title=f"{NAME}, batch {options.batch}")
    with tempfile.TemporaryDirectory() as folder:
        manifest = films(Path(folder), options.batch * options.steps, 224)
        for precision in options.precision:
            ours, theirs = Ours(manifest, options.batch, precision), Theirs(options.batch, precision)
            mine: list[float] = []
            waited: list[float] = []
            others: list[float] = []
            for _ in range(options.rounds):
                others += theirs.run(options.steps)[1:]
                clock = ours.run(options.steps)
                mine += clock.steps[1:]
                waited += clock.waited[1:]
            spread = [f"{statistics.median(x):.2f} ({min(x):.2f} to {max(x):.2f})" for x in (others, mine)]
            ratio = statistics.median(mine) / statistics.median(others)
            table.add_row(precision, *spread, f"{ratio:.2f}", f"{100 * sum(waited) / sum(mine):.1f} %")
    Console().print(table)


if __name__ == "__main__":
    main()
