"""How fast a chest CT becomes a tower's grid, against MONAI's LoadImage, Orientation, Spacing and ScaleIntensityRange.

    python tests/benchmarks/bench_ct_reading.py [--repeats 3] [--formats nii.gz nii series]

A synthetic volume of 512 x 512 x 300 at 0.703 x 0.703 x 1.25 mm to 1.5 x 1.5 x 3 mm and one window. CPU time (user and system) of one
thread and peak memory above the start, each run in a fresh process with imports done and files in the page cache; medians. Ours twice:
linear, as MONAI resamples, and anti-aliased, the default. The last column is the largest difference to MONAI away from the borders on
the windowed 0..1 scale.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SHAPE, SPACING = (300, 512, 512), (1.25, 0.703, 0.703)  # (z, y, x)
TARGET = (3.0, 1.5, 1.5)
WINDOW = (-1000.0, 1000.0)
THREADS = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"), "1")


def volume() -> tuple[np.ndarray, np.ndarray]:
    """Smooth anatomy and noise, int16 HU (S, H, W), and its affine to RAS: rows to the back, columns to the left, slices up."""
    rng = np.random.default_rng(0)
    z, y, x = np.ogrid[-1 : 1 : SHAPE[0] * 1j, -1 : 1 : SHAPE[1] * 1j, -1 : 1 : SHAPE[2] * 1j]
    hu = np.where((x / 0.8) ** 2 + (y / 0.6) ** 2 < 1, 40.0, -1000.0) + 0 * z
    hu[(x - 0.35) ** 2 / 0.08 + y**2 / 0.12 + z**2 / 0.5 < 1] = -850
    hu[(x + 0.35) ** 2 / 0.08 + y**2 / 0.12 + z**2 / 0.5 < 1] = -850
    hu += 60 * np.sin(9 * x) * np.cos(11 * y + 3 * z)
    hu += rng.normal(0, 20, SHAPE)
    affine = np.zeros((4, 4))
    affine[2, 0], affine[1, 1], affine[0, 2], affine[3, 3] = SPACING[0], -SPACING[1], -SPACING[2], 1
    return np.clip(hu, -1024, 3071).astype(np.int16), affine


def prepare(folder: Path) -> dict[str, Path]:
    """The three forms, each alone in its folder."""
    import nibabel

    from modalities.export import write_ct_series

    hu, affine = volume()
    image = nibabel.Nifti1Image(hu.transpose(2, 1, 0), affine[:, [2, 1, 0, 3]])
    paths = {name: folder / name.replace(".", "_") / f"volume.{name}" for name in ("nii.gz", "nii")}
    for path in paths.values():
        path.parent.mkdir()
        nibabel.save(image, path)
    paths["series"] = folder / "series"
    write_ct_series(paths["series"], hu, affine, patient_id="p", study_id="s")
    return paths


def ours(path: Path, antialias: bool) -> np.ndarray:
    from modalities.ct.reader import CtReader

    reader = CtReader(TARGET, (None, None, None), [WINDOW], crop="none", antialias=antialias, mean=0.0, std=1.0)
    return reader.read(path).pixels[0].numpy()


def monai(path: Path) -> np.ndarray:
    from monai.transforms import Compose, EnsureChannelFirst, LoadImage, Orientation, ScaleIntensityRange, Spacing

    chain = Compose(
        [
            LoadImage(image_only=True),
            EnsureChannelFirst(),
            Orientation(axcodes="LPS"),
            Spacing(pixdim=TARGET[::-1], mode="bilinear"),
            ScaleIntensityRange(*WINDOW, 0, 1, clip=True),
        ]
    )
    return np.asarray(chain(path))[0].transpose(2, 1, 0)  # (x, y, z) to (S, H, W)


def one(method: str, path: Path, out: Path) -> None:
    """Run in its own process: imports, then the chain, timed."""
    import torch

    torch.set_num_threads(1)
    work = {"monai": lambda: monai(path), "linear": lambda: ours(path, False), "anti-aliased": lambda: ours(path, True)}[method]
    for module in ("monai.transforms",) if method == "monai" else ("modalities.ct.read", "modalities.ct.reader", "nibabel", "pydicom"):
        importlib.import_module(module)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = memory_mb("VmRSS")
    start = time.process_time()
    result = work()
    seconds = time.process_time() - start
    peak = memory_mb("VmHWM") - before
    np.save(out, result[2:-2, 2:-2, 2:-2].astype(np.float32))
    sys.stdout.write(json.dumps({"seconds": seconds, "peak_mb": peak, "shape": result.shape}) + "\n")


def memory_mb(field: str) -> float:
    """A field of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--formats", nargs="+", default=["nii.gz", "nii", "series"])
    parser.add_argument("--one", nargs=3)
    chosen = parser.parse_args()
    if chosen.one:
        one(chosen.one[0], Path(chosen.one[1]), Path(chosen.one[2]))
        return
    lines = [f"{'format':<8}{'chain':<14}{'CPU s':>8}{'ratio':>8}{'peak MB':>10}{'difference':>12}"]
    with tempfile.TemporaryDirectory() as folder:
        paths = prepare(Path(folder))
        for name in chosen.formats:
            found: dict[str, list[dict]] = {"monai": [], "linear": [], "anti-aliased": []}
            for _ in range(chosen.repeats):
                for method, runs in found.items():
                    command = [sys.executable, __file__, "--one", method, str(paths[name]), str(Path(folder) / f"{method}.npy")]
                    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **THREADS}, check=False)
                    if done.returncode:
                        raise SystemExit(done.stderr[-2000:])
                    runs.append(json.loads(done.stdout.splitlines()[-1]))
            reference = np.load(Path(folder) / "monai.npy")
            base = float(np.median([run["seconds"] for run in found["monai"]]))
            for method, runs in found.items():
                seconds, peak = (float(np.median([run[key] for run in runs])) for key in ("seconds", "peak_mb"))
                result = np.load(Path(folder) / f"{method}.npy")
                size = tuple(map(min, result.shape, reference.shape))
                cut = tuple(slice(n) for n in size)
                off = float(np.abs(result[cut] - reference[cut]).max())
                lines.append(f"{name:<8}{method:<14}{seconds:>8.2f}{base / seconds:>8.1f}{peak:>10.0f}{off:>12.1e}")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
