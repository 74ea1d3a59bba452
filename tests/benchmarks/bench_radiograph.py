"""How fast a radiograph becomes a 512 px tensor, against pydicom's LUT functions and scikit-image's resize.

    python tests/benchmarks/bench_radiograph.py [--repeats 5] [--films 20] [--out FILE.json]

Synthetic 2500 x 2048 films, 12 bits in 16, smooth with noise, with a window and a rescale. CPU time (user and system) of one thread,
files in the page cache; the two chains take turns in one run. Prints a table of medians and their ratio.

A second table has delivery from the cache of preprocessed images (medvl.data.cache): a film that was read before, from its path to a batch
of one, in turn over all films so that no single entry stays in the processor's cache; the process is warm, every delivery is a hit, and
its content is not hashed again. The usual chain is timed in turn on the same films. With it stands what the first reading costs, which
hashes the film and writes the entry.
"""

from __future__ import annotations

import os

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1"))

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROWS, COLUMNS, SIZE = 2500, 2048, 512
EXPLICIT, JPEG_LOSSLESS, JPEG_2000 = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.4.70", "1.2.840.10008.1.2.4.90"
OTHERS = {"RLE": "1.2.840.10008.1.2.5", "JPEG-LS": "1.2.840.10008.1.2.4.80", "HTJ2K": "1.2.840.10008.1.2.4.201"}


def film(seed: int) -> np.ndarray:
    """(ROWS, COLUMNS) uint16 of 12 bits: shadows of some hundred pixels, and noise of a standard deviation of 12."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:ROWS, :COLUMNS]
    shadows = sum(500 * np.cos(2 * np.pi * (y / rng.uniform(200, 2000) + x / rng.uniform(200, 2000)) + rng.uniform(0, 6)) for _ in range(4))
    return (2048 + shadows + rng.normal(0, 12, (ROWS, COLUMNS))).clip(0, 4095).astype(np.uint16)


def write(path: Path, stored: np.ndarray, syntax: str) -> Path:
    """A film as DICOM in one of the codings."""
    import imagecodecs
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.encaps import encapsulate
    from pydicom.uid import RLELossless, generate_uid

    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = EXPLICIT if syntax == OTHERS["RLE"] else syntax
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = *stored.shape, 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.RescaleSlope, ds.RescaleIntercept, ds.WindowCenter, ds.WindowWidth = "1", "0", 2048, 3000
    if syntax == JPEG_LOSSLESS:
        coded = imagecodecs.ljpeg_encode(stored, bitspersample=12)
    elif syntax == JPEG_2000:
        coded = imagecodecs.jpeg2k_encode(stored, level=0, codecformat="j2k", reversible=True, bitspersample=12)
    elif syntax == OTHERS["JPEG-LS"]:
        coded = imagecodecs.jpegls_encode(stored)
    elif syntax == OTHERS["HTJ2K"]:
        coded = imagecodecs.htj2k_encode(stored, reversible=True)
    else:
        coded = None
    ds.PixelData = stored.tobytes() if coded is None else encapsulate([coded])
    ds["PixelData"].VR = "OW" if coded is None else "OB"
    if syntax == OTHERS["RLE"]:
        ds.compress(RLELossless, generate_instance_uid=False)
    ds.save_as(path, enforce_file_format=True)
    return path


def usual(path: Path) -> np.ndarray:
    """The chain that most people write."""
    import pydicom
    import torch
    from pydicom.pixels import apply_modality_lut, apply_voi_lut
    from skimage.transform import resize

    ds = pydicom.dcmread(path)
    shown = apply_voi_lut(apply_modality_lut(ds.pixel_array, ds), ds)
    small = resize(shown / 4095, (SIZE, round(COLUMNS * SIZE / ROWS)), order=1, anti_aliasing=True)
    tensor: np.ndarray = torch.from_numpy(small).float()[None].numpy()
    return tensor


def ours(path: Path, reduce: bool) -> np.ndarray:
    """The chain of this package."""
    import torch

    from modalities.dicom import fit_radiograph

    tensor: np.ndarray = torch.from_numpy(fit_radiograph(path, SIZE, reduce=reduce).pixels)[None].numpy()
    return tensor


def clock(call: Callable[[], object]) -> float:
    """CPU seconds of one call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def measure(paths: list[Path], reduce: bool, repeats: int) -> dict[str, object]:
    """Median milliseconds of either chain and their ratio; largest and mean difference of the pictures in grey levels."""
    usual(paths[0]), ours(paths[0], reduce)
    times: dict[str, list[float]] = {"usual": [], "ours": []}
    for i in range(repeats):
        path = paths[i % len(paths)]
        times["usual"].append(clock(lambda path=path: usual(path)))  # type: ignore[misc]
        times["ours"].append(clock(lambda path=path: ours(path, reduce)))  # type: ignore[misc]
    from modalities.dicom import fit_radiograph

    difference = np.abs(ours(paths[0], reduce)[0] - fit_radiograph(paths[0], SIZE, exact=True).pixels) * 255
    medians = {name: 1000 * float(np.median(values)) for name, values in times.items()}
    return {
        **{f"{name}_ms": round(value, 1) for name, value in medians.items()},
        **{f"{name}_range_ms": [round(1000 * min(v), 1), round(1000 * max(v), 1)] for name, v in times.items()},
        "ratio": round(medians["usual"] / medians["ours"], 2),
        "mean_levels": round(float(difference.mean()), 3),
        "max_levels": round(float(difference.max()), 3),
    }


def measure_cached(paths: list[Path], folder: Path, rounds: int) -> dict[str, object]:
    """Median milliseconds of the usual chain, a first reading and a delivery that hits, on the same films; whether all bits agree."""
    import torch

    from medvl.data.cache import SampleCache
    from modalities.xray.reader import XrayReader

    reader, cache = XrayReader(SIZE), SampleCache(folder)
    time.sleep(2.5)  # films as young as this are hashed every time
    usual(paths[0]), reader.read(paths[0])
    times: dict[str, list[float]] = {"usual": [], "first": [], "hit": []}

    def deliver(path: Path) -> torch.Tensor:
        return reader.collate([cache.read(reader, path)]).pixels

    for path in paths:
        times["usual"].append(clock(lambda path=path: usual(path)))  # type: ignore[misc]
        times["first"].append(clock(lambda path=path: deliver(path)))  # type: ignore[misc]
    read_again = reader.read
    try:
        reader.read = None  # type: ignore[method-assign, assignment]
        for _ in range(rounds):
            for path in paths:
                times["hit"].append(clock(lambda path=path: deliver(path)))  # type: ignore[misc]
    finally:
        reader.read = read_again  # type: ignore[method-assign]
    same = all(torch.equal(deliver(path)[0], reader.read(path).pixels) for path in paths)
    medians = {name: 1000 * float(np.median(values)) for name, values in times.items()}
    return {
        **{f"{name}_ms": round(value, 3) for name, value in medians.items()},
        **{f"{name}_range_ms": [round(1000 * min(v), 3), round(1000 * max(v), 3)] for name, v in times.items()},
        "films": len(paths),
        "hits": len(times["hit"]),
        "ratio": round(medians["usual"] / medians["hit"], 1),
        "bit_for_bit": same,
    }


def main() -> None:
    """Write the films, measure, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--films", type=int, default=20)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    cases = [
        ("uncompressed", EXPLICIT, False, 6.0),
        ("JPEG lossless", JPEG_LOSSLESS, False, 4.0),
        ("JPEG 2000, reduced", JPEG_2000, True, 5.0),
    ]
    cases += [(name, syntax, False, 0.0) for name, syntax in OTHERS.items()]
    found = {}
    lines = [
        "| coding | usual ms (range) | ours ms (range) | ratio | bar | mean, max difference (grey levels) |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        films = [film(seed) for seed in range(2)]
        for name, syntax, reduce, bar in cases:
            paths = [write(Path(folder, f"{syntax}_{i}.dcm"), stored, syntax) for i, stored in enumerate(films)]
            m = found[name] = measure(paths, reduce, arguments.repeats)
            figures = [f"{m[f'{who}_ms']} ({'-'.join(map(str, m[f'{who}_range_ms']))})" for who in ("usual", "ours")]  # type: ignore[call-overload]
            target = f">= {bar:g}" if bar else ""
            lines.append(f"| {name} | {figures[0]} | {figures[1]} | {m['ratio']} | {target} | {m['mean_levels']}, {m['max_levels']} |")
        paths = [write(Path(folder, f"cached_{seed}.dcm"), film(seed), EXPLICIT) for seed in range(arguments.films)]
        m = found["cached"] = measure_cached(paths, Path(folder, "cache"), arguments.repeats)
    lines += [
        "",
        "| films | usual ms (range) | first reading ms (range) | hit ms (range) | usual / hit | bar | bit for bit |",
        "|---|---|---|---|---|---|---|",
    ]
    figures = [f"{m[f'{who}_ms']} ({'-'.join(map(str, m[f'{who}_range_ms']))})" for who in ("usual", "first", "hit")]  # type: ignore[call-overload]
    lines.append(f"| {m['films']} | {' | '.join(figures)} | {m['ratio']} | >= 50 | {'yes' if m['bit_for_bit'] else 'NO'} |")
    sys.stdout.write("\n".join(lines) + "\n")
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
