"""`medvl diagnose` over many files: every good one scored, every broken one listed, its memory, and its speed beside the bare tower.

python tests/benchmarks/bench_diagnose.py --out bench_diagnose [--files 2000] [--encode 300]

Makes phantom films of which one in fifty is cut short; scores them (1) with a small tower, twice, once killed and resumed, comparing what
is written and noting memory along the way, and (2) --encode of them with a ViT-S/16 at 224 pixels, against that tower's forward pass on
batches in memory. Weights are random: nothing here is a figure of quality.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console

import medvl
from medvl.model import DualEncoder
from medvl.nn.similarity import PooledSimilarity
from modalities.xray import ConvEncoder, TimmEncoder, XrayReader
from reports.prompts import load_prompts
from reports.towers import MiniLmReportEncoder
from tasks.phantoms import write_cohort
from tasks.zero_shot import diagnose, encode_prompts

EVERY = 50  # of so many files one is broken
SAY = Console(width=140, highlight=False).print


def films(folder: Path, count: int) -> Path:
    """A folder of films, some cut short; made once."""
    made = folder / "films"
    if made.is_dir() and len(list(made.iterdir())) == count:
        return made
    write_cohort(folder / "cohort", min(count, 500), 5, size=256)
    sources = sorted((folder / "cohort" / "xray").glob("*.dcm"))
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    import pydicom
    from pydicom.uid import generate_uid

    for i in range(count):
        header = pydicom.dcmread(sources[i % len(sources)])
        header.StudyInstanceUID, header.SOPInstanceUID = (generate_uid(entropy_srcs=[kind, str(i)]) for kind in ("study", "image"))
        header.save_as(made / f"{i:05d}.dcm")
        if i % EVERY == 7:
            (made / f"{i:05d}.dcm").write_bytes((made / f"{i:05d}.dcm").read_bytes()[:1500])
    return made


def saved(folder: Path, tower: object, size: int) -> Path:
    torch.manual_seed(0)
    DualEncoder(tower, MiniLmReportEncoder(64, hidden_dim=None), PooledSimilarity(), XrayReader(size=size)).save(folder)  # type: ignore[arg-type]
    return folder


def command(model: Path, found: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "medvl", "diagnose", str(found), "--model", str(model), "--out", str(out)]


def resident_mb(process: int) -> float:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next((float(line.split()[1]) / 2**10 for line in lines if line.startswith("VmRSS:")), 0.0)


def watched(model: Path, found: Path, out: Path) -> tuple[list[float], float]:
    """Memory at each tenth of the lines, and seconds."""
    start, memory, total = time.perf_counter(), [], len(list(found.iterdir()))
    with subprocess.Popen(command(model, found, out), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            done = out.read_bytes().count(b"\n") if out.exists() else 0
            if done > (len(memory) + 1) * total / 10:
                memory.append(resident_mb(process.pid))
            time.sleep(0.05)
    return memory, time.perf_counter() - start


def killed(model: Path, found: Path, out: Path, kills: int) -> None:
    """Kill it at random times, then let it end."""
    for _ in range(kills):
        process = subprocess.Popen(command(model, found, out), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        begin = time.monotonic()
        lines = out.read_bytes().count(b"\n") if out.exists() else 0
        while time.monotonic() - begin < 60 and (out.read_bytes().count(b"\n") if out.exists() else 0) <= lines + 20:
            time.sleep(0.02)
        time.sleep(random.random())
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command(model, found, out), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=False)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--encode", type=int, default=300)
    parser.add_argument("--kills", type=int, default=3)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    found = films(given.out, given.files)
    small = saved(given.out / "small", ConvEncoder(64, widths=(8, 8, 16), blocks=(1, 1, 1)), 64)
    whole, cut = given.out / "whole.csv", given.out / "killed.csv"
    for path in (whole, cut):
        path.unlink(missing_ok=True)
    memory, seconds = watched(small, found, whole)
    with whole.open(newline="") as file:
        lines = list(csv.DictReader(file))
    bad = {f"{i:05d}.dcm" for i in range(given.files) if i % EVERY == 7}
    refused = {Path(line["id"]).name for line in lines if line["ok"] == "0"}
    SAY(f"files {given.files}, lines {len(lines)}, good {len(lines) - len(refused)}, refused {len(refused)}, as broken: {refused == bad}")
    with whole.with_name("whole.rejected.csv").open() as file:
        SAY(f"listed in rejected.csv: {sum(1 for _ in csv.DictReader(file))}")
    SAY(f"memory at each tenth (MB): {', '.join(f'{one:.0f}' for one in memory)}; {len(lines) / seconds:.0f} files/s, start-up included")
    killed(small, found, cut, given.kills)
    with cut.open(newline="") as file:
        others = list(csv.DictReader(file))
    columns = [name for name in lines[0] if name not in ("id", "ok", "error", "calibrated", "unfamiliar", "protocol", "paths", "notice")]
    same = [line["id"] for line in lines] == [line["id"] for line in others]
    apart = max(abs(float(a[c]) - float(b[c])) for a, b in zip(lines, others, strict=True) if a["ok"] == "1" for c in columns)
    SAY(f"killed {given.kills} times and resumed: same lines {same}, scores apart by at most {apart:.1e}")

    model = medvl.load(saved(given.out / "vit", TimmEncoder("vit_small_patch16_224", embed_dim=64, image_size=224), 224), device="cpu")
    files = [path for path in sorted(found.iterdir()) if path.name not in bad][: given.encode]
    bank = encode_prompts(model, load_prompts())
    batch = model.reader.collate([model.read(path) for path in files[:16]])
    with torch.inference_mode():
        model.image(batch)
        rounds = []
        for _ in range(3):
            start = time.perf_counter()
            for _ in range(max(1, len(files) // 16)):
                model.image(batch)
            bare = (len(files) // 16) * 16 / (time.perf_counter() - start)
            start = time.perf_counter()
            count = sum(one.ok for one in diagnose(model, files, bank, batch_size=16))
            rounds.append((bare, count / (time.perf_counter() - start)))
    bare, ours = (sorted(values)[1] for values in zip(*rounds, strict=True))
    SAY(f"ViT-S/16 at 224, batch 16, median of 3: forward {bare:.1f} films/s, diagnose {ours:.1f}, ratio {ours / bare:.2f}")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
