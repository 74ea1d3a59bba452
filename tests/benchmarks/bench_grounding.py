"""What maps cost, and where each source of them points: speed of laying out, colouring and measuring on the grid; sources x findings.

    python tests/benchmarks/bench_grounding.py speed
    python tests/benchmarks/bench_grounding.py sources --model demo/model --manifest phantoms/manifest.csv --split test

Peers in the same run: torch.nn.functional.interpolate to full size and means through the upsampled maps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch.nn import functional as F

REPEATS = 15
WAYS: dict[str, dict[str, Any]] = {
    "model's own": {},
    "words": {"source": "words"},
    "attention": {"source": "attention"},
    "slices": {"source": "slices"},
    "gradient": {"source": "gradient"},
    "against 'a chest X-ray'": {"against": "a chest X-ray"},
    "negation": {"negation": True},
    "early 0.3": {"early": 0.3},
    "smoothed 4 mm": {"smoothing_mm": 4.0, "finer": 4},
    "shifts 2": {"shifts": 2},
    "crops 2": {"crops": 2},
    "shifts 2, smoothed 4 mm": {"shifts": 2, "smoothing_mm": 4.0, "finer": 2},
}


def milliseconds(work: Callable[[], Any]) -> float:
    """Median over repeats, after one to warm up."""
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        work()
        times.append((time.perf_counter() - start) * 1e3)
    return float(np.median(times[1:]))


@click.group()
def main() -> None:
    """See the module."""


@main.command()
def speed() -> None:
    """One thread, milliseconds."""
    from medvl.geometry import GridMoments, letterbox
    from tasks.render import coloured

    torch.set_num_threads(1)
    transform = letterbox((1024, 1024), 512)
    rng = np.random.default_rng(0)
    low = rng.integers(0, 900, (100, 1, 2))
    boxes = np.concatenate([low, low + rng.integers(10, 120, (100, 1, 2))], axis=1) - 0.5
    cuts = [tuple(slice(int(a + 0.5), int(b + 0.5)) for a, b in zip(*box, strict=True)) for box in boxes]
    click.echo(
        "| grid | map to 1024 px | interpolate | coloured | 100 x 100 box means | with variances | upsampled | share of means | differ by |"
    )
    click.echo("|---" * 9 + "|")
    for side in (14, 32, 37):
        grids = torch.from_numpy(rng.uniform(-1, 1, (100, side, side)).astype(np.float32))
        one = transform.map_to_native(grids[:1])[0].numpy()
        own = milliseconds(lambda grids=grids: transform.map_to_native(grids[:1]))
        peer = milliseconds(lambda grids=grids: F.interpolate(grids[None, :1], (1024, 1024), mode="bilinear"))
        colour = milliseconds(lambda one=one: coloured(one))

        def on_grid(grids: torch.Tensor = grids, side: int = side) -> Any:
            found = GridMoments(transform, (side, side)).of_boxes(grids, boxes)
            return found.mean, found.variance

        def upsampled(grids: torch.Tensor = grids) -> Any:
            maps = F.interpolate(grids[None], (1024, 1024), mode="bilinear")[0]
            return torch.stack([maps[(slice(None), *cut)].mean((1, 2)) for cut in cuts], 1)

        ours = milliseconds(on_grid)
        means = milliseconds(lambda grids=grids, side=side: GridMoments(transform, (side, side)).box_means(grids, boxes))
        start = time.perf_counter()
        theirs = upsampled()
        cost = (time.perf_counter() - start) * 1e3
        away = float((on_grid()[0] - theirs.double()).abs().max())
        numbers = f"{own:.1f} | {peer:.1f} | +{colour:.1f} | {means:.2f} | {ours:.2f} | {cost:.0f} | 1/{cost / means:.0f} | {away:.0e}"
        click.echo(f"| {side} x {side} | {numbers} |")


@main.command()
@click.option("--model", "folder", type=click.Path(path_type=Path), required=True)
@click.option("--manifest", type=click.Path(path_type=Path), required=True)
@click.option("--calibrate", type=click.Path(path_type=Path), help="Manifest whose validation rows thresholds are chosen on.")
@click.option("--split", default="test")
@click.option("--limit", type=int, help="Only so many images.")
@click.option("--calibrate-limit", type=int, help="Of the validation rows only so many.")
@click.option("--way", "chosen", multiple=True, help="Only these.")
@click.option("--repeats", default=500)
def sources(
    folder: Path,
    manifest: Path,
    calibrate: Path | None,
    split: str,
    limit: int | None,
    calibrate_limit: int | None,
    chosen: tuple[str, ...],
    repeats: int,
) -> None:
    """Pointing game by finding; means over focal findings of the others."""
    import medvl
    from medvl.data.manifest import read_manifest
    from medvl.types import FINDINGS
    from reports.prompts import load_prompts
    from tasks.grounding import Grounder, MapSettings, finding_query
    from tasks.grounding.calibration import calibrate_maps
    from tasks.grounding.evaluation import measure, of_manifest, results

    model, prompts = medvl.load(folder), load_prompts()
    kind = "ct" if ".nii" in model.reader.suffixes else "xray"
    rows = read_manifest(manifest).select(split=split, modality=kind).rows[:limit]
    fitted_on = None if calibrate is None else read_manifest(calibrate).select(split="val", modality=kind).rows[:calibrate_limit]
    shown = [name[:7] for name in FINDINGS]
    click.echo(f"| maps | {' | '.join(shown)} | pointing | CNR | mIoU | found | false | false area | s |")
    click.echo("|---" * (len(shown) + 8) + "|")
    for way, settings in WAYS.items():
        if chosen and way not in chosen:
            continue
        if kind == "ct" and "against" in settings:
            way, settings = "against 'a chest CT'", {"against": "a chest CT"}
        grounder = Grounder(model, [finding_query(name, prompts) for name in FINDINGS], MapSettings(**settings))
        start = time.monotonic()
        try:
            thresholds = None if fitted_on is None else calibrate_maps(grounder, of_manifest(fitted_on, FINDINGS), "", "")[0]
            measured = measure(grounder, of_manifest(rows, FINDINGS), thresholds)
        except (ValueError, NotImplementedError) as error:
            click.echo(f"| {way} | {str(error)[:100]} |", err=True)
            continue
        found = results(measured, grounder, thresholds, repeats=repeats)
        points = [found["per_group"].get(name, {}).get("pointing_game", {}).get("value") for name in FINDINGS]
        cells = ["" if one is None else f"{one:.2f}" for one in points]
        macro = found["macro"]
        point = macro["pointing_game"]
        means = [f"{point['value']:.3f} ({point['ci_low']:.3f} to {point['ci_high']:.3f})"]
        for name, digits in (("contrast", 2), ("mean_iou", 3), ("found", 3), ("false_found", 3), ("false_area", 4)):
            means.append(f"{macro[name]['value']:.{digits}f}" if name in macro else "")
        click.echo(f"| {way} | {' | '.join(cells)} | {' | '.join(means)} | {time.monotonic() - start:.0f} |")


if __name__ == "__main__":
    main()
