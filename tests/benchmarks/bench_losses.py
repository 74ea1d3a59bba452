"""Losses against open_clip's and a masked full matrix: CPU time and peak memory of forward and backward, float32, one thread.

    python tests/benchmarks/bench_losses.py            (extra `open_clip`; some ten minutes, 8 GB)

Unit vectors of width 512 with gradients, scale 14.3 (bias -10 for the sigmoid). Time: process CPU seconds of forward and backward, variants
in turn in one process after one round that is not counted; median (lowest to highest). Memory: the most resident memory of a fresh process
during one step above that before it, inputs and a small warm-up step included in what was before. Gradients of the inputs count.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from medvl.losses import info_nce, multi_positive_info_nce, pairs_of, sigmoid_loss
from medvl.types import Product

WIDTH, SCALE, BIAS = 512, 14.3, -10.0
Step = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def ours(image: Tensor, text: Tensor, scale: Tensor, pairs: Tensor) -> Tensor:
    """Chunked, exact."""
    return multi_positive_info_nce(image, text, pairs, 1 / scale)


def ours_rounded(image: Tensor, text: Tensor, scale: Tensor, pairs: Tensor) -> Tensor:
    """Tiles in bfloat16."""
    return info_nce(Product(image, text, scale), pairs_of(pairs, (len(image), len(text))), matmul="bfloat16")


def ours_sigmoid(image: Tensor, text: Tensor, scale: Tensor, pairs: Tensor) -> Tensor:
    """Chunked, exact."""
    return sigmoid_loss(Product(image, text, scale), torch.tensor(BIAS), pairs_of(pairs, (len(image), len(text))))


def clip(image: Tensor, text: Tensor, scale: Tensor, pairs: Tensor) -> Tensor:
    """open_clip's loss of one process."""
    import open_clip

    return open_clip.ClipLoss()(image, text, scale)


def siglip(image: Tensor, text: Tensor, scale: Tensor, pairs: Tensor) -> Tensor:
    """open_clip's loss of one process."""
    from open_clip.loss import SigLipLoss

    return SigLipLoss(rank=0, world_size=1)(image, text, scale, torch.tensor(BIAS))


def masked(image: Tensor, text: Tensor, scale: Tensor, pairs: Tensor) -> Tensor:
    """Many positives by a float mask over the full matrix, the mean over positives, both directions."""
    mask = torch.zeros(len(image), len(text))
    mask[pairs[:, 0], pairs[:, 1]] = 1
    logits = scale * image @ text.T
    of_image = -(mask * F.log_softmax(logits, 1)).sum(1) / mask.sum(1)
    of_text = -(mask * F.log_softmax(logits, 0)).sum(0) / mask.sum(0)
    return (of_image.mean() + of_text.mean()) / 2


STEPS: dict[str, Step] = {
    "ours": ours,
    "ours, bfloat16 tiles": ours_rounded,
    "ours, sigmoid": ours_sigmoid,
    "open_clip ClipLoss": clip,
    "open_clip SigLipLoss": siglip,
    "masked full matrix": masked,
}
TIMES = [
    (8192, 1, ("open_clip ClipLoss", "ours", "ours, bfloat16 tiles", "open_clip SigLipLoss", "ours, sigmoid")),
    (2048, 4, ("masked full matrix", "ours")),
]
MEMORY = [(16384, 1, ("open_clip ClipLoss", "ours", "open_clip SigLipLoss", "ours, sigmoid")), (2048, 4, ("masked full matrix", "ours"))]
BARS = {  # (what, count, per image, variant) -> (against, highest ratio)
    ("time", 8192, 1, "ours"): ("open_clip ClipLoss", 0.70),
    ("memory", 16384, 1, "ours"): ("open_clip ClipLoss", 1 / 12),
    ("memory", 16384, 1, "ours, sigmoid"): ("open_clip SigLipLoss", 1 / 40),
    ("time", 2048, 4, "ours"): ("masked full matrix", 0.90),
    ("memory", 2048, 4, "ours"): ("masked full matrix", 0.35),
}


def inputs(count: int, per_image: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images, texts, scale, and the pairs of each image with its texts."""
    rng = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(n, WIDTH, generator=rng), dim=1).requires_grad_() for n in (count, count * per_image))
    index = torch.arange(count * per_image)
    return image, text, torch.tensor(SCALE, requires_grad=True), torch.stack([index // per_image, index], 1)


def seconds(count: int, per_image: int, names: tuple[str, ...], repeats: int) -> dict[str, list[float]]:
    """CPU seconds of each, in turn."""
    given = inputs(count, per_image)
    found: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(repeats + 1):
        for name in names:
            start = time.process_time()
            STEPS[name](*given).backward()
            if round_:
                found[name].append(time.process_time() - start)
    return found


def peak_mb(name: str, count: int, per_image: int, found: multiprocessing.Queue[float]) -> None:
    """Most resident memory of one step above that before it."""
    torch.set_num_threads(1)
    STEPS[name](*inputs(64, per_image)).backward()
    given = inputs(count, per_image)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    STEPS[name](*given).backward()
    found.put((_status("VmHWM") - before) / 1024)


def _status(key: str) -> float:
    """In kB, of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(key)).split()[1])


def main() -> None:
    """Both tables, and the bars."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="folder for losses.json")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    console, kept = Console(width=110), dict[tuple[str, int, int, str], float]()
    spawn = multiprocessing.get_context("spawn")
    table = Table("images", "texts", "loss", "CPU s", "ratio", title="time")
    for count, per_image, names in TIMES:
        found = seconds(count, per_image, names, chosen.repeats)
        for name, values in found.items():
            kept["time", count, per_image, name] = middle = statistics.median(values)
            ratio = middle / kept["time", count, per_image, names[0]]
            table.add_row(
                str(count), str(count * per_image), name, f"{middle:.2f} ({min(values):.2f} to {max(values):.2f})", f"{ratio:.2f}"
            )
    console.print(table)
    table = Table("images", "texts", "loss", "MB", title="peak memory")
    for count, per_image, names in MEMORY:
        for name in names:
            answer = spawn.Queue()
            process = spawn.Process(target=peak_mb, args=(name, count, per_image, answer))
            process.start()
            kept["memory", count, per_image, name] = megabytes = answer.get()
            process.join()
            table.add_row(str(count), str(count * per_image), name, f"{megabytes:.0f}")
    console.print(table)
    table = Table("bar", "at most", "measured", title="bars")
    for (what, count, per_image, name), (against, bar) in BARS.items():
        ratio = kept[what, count, per_image, name] / kept[what, count, per_image, against]
        table.add_row(f"{what}, {count} x {count * per_image}: {name} / {against}", f"{bar:.3f}", f"{ratio:.3f}")
    console.print(table)
    if chosen.out is not None:
        chosen.out.mkdir(parents=True, exist_ok=True)
        rows = [dict(zip(("what", "images", "per image", "loss"), key, strict=True)) | {"value": value} for key, value in kept.items()]
        (chosen.out / "losses.json").write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
