"""What encoding one CT costs: slices through a 2D tower and pooling, against 3D networks on the volume.

    python tests/benchmarks/bench_ct_encoders.py [--repeats 3] [--threads 1] [--rows NAME ...] [--out FILE.json]

Evaluation, float32, random weights: cost alone is measured. By slices: 60 of the volume's 160 slices at 224 px; as a volume: 160 x 224 x
224. Each row runs in a process of its own, the rows take turns. Time is CPU time (user and system) of the forward pass, median of the
repeats, after one that counts for memory alone; peak memory is peak resident memory of that first pass less what was resident before it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

SLICES, VOLUME, D = 60, (160, 224, 224), 384


def by_slices(name: str, slices: int = SLICES, chunk: int = 4, tokens: bool = True):
    """The tower by slices over a timm backbone, and its input."""
    import torch

    from medvl.types import ImageBatch
    from modalities.ct.pooling import TransformerPooling
    from modalities.ct.slices import SlicePooledEncoder
    from modalities.xray.towers import TimmEncoder

    model = SlicePooledEncoder(TimmEncoder(name, embed_dim=D), TransformerPooling(D), chunk=chunk, tokens=tokens)
    return model, ImageBatch(torch.randn(1, 1, slices, 224, 224), None, torch.arange(float(slices))[None] * 5)


def as_volume(kind: str, **options):
    """A tower of modalities.ct.volumes, and its input."""
    import torch

    from medvl.types import ImageBatch
    from modalities.ct import volumes

    return getattr(volumes, kind)(embed_dim=D, **options), ImageBatch(torch.randn(1, 1, *VOLUME))


ROWS: dict[str, tuple[str, Callable]] = {
    "vit-s": ("vit_small/16 x 60 slices + transformer pooling, chunk 4", lambda: by_slices("vit_small_patch16_224")),
    "vit-s-8": ("the same, chunk 8, no tokens kept", lambda: by_slices("vit_small_patch16_224", chunk=8, tokens=False)),
    "vit-s-60": ("the same, all 60 slices at once", lambda: by_slices("vit_small_patch16_224", chunk=60)),
    "vit-s-600": (
        "vit_small/16 x 600 slices, chunk 4, no tokens kept",
        lambda: by_slices("vit_small_patch16_224", slices=600, tokens=False),
    ),
    "vit-t": ("vit_tiny/16 x 60 slices + transformer pooling, chunk 4", lambda: by_slices("vit_tiny_patch16_224")),
    "monai-vit": ("MONAI ViT-B, patch 16^3", lambda: as_volume("MonaiVitEncoder")),
    "resnet18": ("MONAI ResNet-18 3D, first stride 2", lambda: as_volume("ResNet3dEncoder")),
    "resnet18-1": ("MONAI ResNet-18 3D, first stride 1 (its default)", lambda: as_volume("ResNet3dEncoder", conv1_t_stride=1)),
    "inflated": ("ResNet-152 inflated, first stride 1 x 2 x 2", lambda: as_volume("InflatedEncoder", name="resnet152")),
}
DEFAULT = ("vit-s", "vit-s-8", "vit-s-60", "vit-t", "monai-vit", "resnet18", "resnet18-1", "inflated")


def resident_mb(what: str) -> float:
    """VmRSS or VmHWM of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return float(line.split()[1]) / 1024


def measure(row: str, threads: int) -> dict[str, float]:
    """One row in this process: one pass for memory, one for time."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model, batch = ROWS[row][1]()
    model.eval()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_mb("VmRSS")
    with torch.inference_mode():
        model(batch)
        peak = resident_mb("VmHWM") - before
        cpu, wall = time.process_time(), time.perf_counter()
        model(batch)
    return {
        "cpu_s": time.process_time() - cpu,
        "wall_s": time.perf_counter() - wall,
        "peak_mb": peak,
        "params_m": sum(p.numel() for p in model.parameters()) / 1e6,
    }


def main() -> None:
    """Run every row ``repeats`` times, each time in a fresh process, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=DEFAULT)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", choices=ROWS, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        sys.stdout.write(json.dumps(measure(chosen.one, chosen.threads)) + "\n")
        return
    console, found = Console(width=130), {row: [] for row in chosen.rows}
    quiet = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(chosen.threads))
    for _ in range(chosen.repeats):
        for row in chosen.rows:
            command = [sys.executable, __file__, "--one", row, "--threads", str(chosen.threads)]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=quiet)
            found[row].append(json.loads(done.stdout.splitlines()[-1]))
    table = Table(
        "encoder", "params M", "CPU s (range)", "wall s", "peak MB", title=f"one CT, {chosen.threads} thread(s), n = {chosen.repeats}"
    )
    for row, runs in found.items():
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        spread = f"{min(run['cpu_s'] for run in runs):.1f}-{max(run['cpu_s'] for run in runs):.1f}"
        cells = (f"{middle['params_m']:.1f}", f"{middle['cpu_s']:.1f} ({spread})", f"{middle['wall_s']:.1f}", f"{middle['peak_mb']:.0f}")
        table.add_row(ROWS[row][0], *cells)
    console.print(table)
    if chosen.out:
        chosen.out.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
