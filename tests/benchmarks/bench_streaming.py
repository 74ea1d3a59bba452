"""Sharded storage of preprocessed images: LitData and WebDataset beside files, and what a run that is resumed gets from each.

    pip install litdata webdataset
    python tests/benchmarks/bench_streaming.py --samples 2000

Samples of 128 x 128 float32 in the bytes of medvl.data.cache, in shards of 8 MiB on a local disk; one process. Read in three orders: as
they lie, in shuffled shards with the samples of 8 shards shuffled together (ours, `ShardBatches`), and any sample at any time. WebDataset
reads as it lies: it has no access by index (`wids` is no longer part of it), its shuffling is a buffer, and to begin in the middle of an
epoch it reads and drops what comes before. Sizes are equal, for all hold the same bytes.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import litdata
import numpy as np
import torch
import webdataset
from litdata.streaming.writer import BinaryWriter
from rich.console import Console
from rich.table import Table

from medvl.data.cache import packed_sample, unpacked_sample
from medvl.data.sampling import ShardBatches
from modalities.xray.reader import XrayReader

MIB, SHARD = 2**20, 8


def samples(count: int) -> Iterable[bytes]:
    rng, reader = np.random.default_rng(0), XrayReader(size=128)
    for _ in range(count):
        yield packed_sample(reader.read_array(rng.random((128, 128), dtype=np.float32)))


def timed(read: Callable[[int], bytes], order: Iterable[int]) -> float:
    """Samples a second, unpacked and checked."""
    start, count = time.perf_counter(), 0
    for i in order:
        unpacked_sample(read(int(i)))
        count += 1
    return count / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4000)
    count = parser.parse_args().samples
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in ("files", "lit", "tar"):
            (root / name).mkdir()
        writer = BinaryWriter(str(root / "lit"), chunk_bytes=SHARD * MIB)
        urls, tar, size = [], None, 0
        for i, content in enumerate(samples(count)):
            (root / "files" / f"{i}.safetensors").write_bytes(content)
            writer[i] = content
            if tar is None or size >= SHARD * MIB:
                if tar is not None:
                    tar.close()
                size = 0
                urls.append(root / "tar" / f"{len(urls):06d}.tar")
                tar = tarfile.open(urls[-1], "w")  # noqa: SIM115 (several)
            member = tarfile.TarInfo(f"{i:08d}.sample")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
            size += len(content)
        assert tar is not None
        tar.close()
        writer.done()
        writer.merge()
        index = json.loads((root / "lit" / "index.json").read_text())
        shards = np.repeat(np.arange(len(index["chunks"])), [chunk["chunk_size"] for chunk in index["chunks"]])
        windowed = ShardBatches(shards, 8, 16).order()
        scattered = np.random.default_rng(1).permutation(count)
        lit: Any = litdata.StreamingDataset(str(root / "lit"), shuffle=False)
        readers: dict[str, Callable[[int], bytes]] = {
            "files": lambda i: (root / "files" / f"{i}.safetensors").read_bytes(),
            "LitData": lambda i: bytes(lit[i]),
        }
        table = Table(
            "storage", "as it lies", "8 shards shuffled", "any sample", "to the middle of an epoch", title=f"{count} samples, samples/s"
        )
        for name, read in readers.items():
            rates = [timed(read, order) for order in (range(count), windowed, scattered)]
            start = time.perf_counter()
            read(int(windowed[count // 2]))
            table.add_row(name, *(f"{rate:,.0f}" for rate in rates), f"{1000 * (time.perf_counter() - start):.1f} ms")
        pipe: Any = webdataset.WebDataset([str(url) for url in urls], shardshuffle=False)
        start = time.perf_counter()
        for one in pipe:
            unpacked_sample(one["sample"])
        rate = count / (time.perf_counter() - start)
        start = time.perf_counter()
        for i, _ in enumerate(webdataset.WebDataset([str(url) for url in urls], shardshuffle=False)):
            if i == count // 2:
                break
        table.add_row("WebDataset, stream", f"{rate:,.0f}", "a buffer", "-", f"{1000 * (time.perf_counter() - start):.1f} ms")
        Console(width=140).print(table)


if __name__ == "__main__":
    main()
