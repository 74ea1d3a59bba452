"""``medvl ground``: where in an image a phrase or a finding is."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tasks.commands.common import (
    REJECTED,
    check_out_folder,
    console,
    echo_notice,
    json_option,
    json_text,
    load_model,
    load_prompt_set,
    model_options,
    new_table,
    prompts_option,
    usage_errors,
    weights_sha256,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from medvl.model import DualEncoder
    from medvl.types import ImageSample
    from reports.prompts import PromptSet
    from tasks.grounding import SimilarityMap


@dataclass(frozen=True)
class NamedMap:
    """A similarity map, the name its files have and what its numbers are."""

    slug: str
    map: SimilarityMap
    kind: str  # "phrase", or "finding": the highest over the prompts for it


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--phrase", "phrases", multiple=True, metavar="TEXT", help="What to look for (repeatable).")
@click.option("--finding", "findings", multiple=True, metavar="NAME", help="A finding to look for by its prompt pair (repeatable).")
@model_options
@prompts_option
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Where the maps go.")
@json_option
@click.pass_context
def ground(
    ctx: click.Context,
    file: Path,
    phrases: tuple[str, ...],
    findings: tuple[str, ...],
    model: Path,
    device: str | None,
    prompts: Path | None,
    out: Path,
    as_json: bool,
) -> None:
    """Lay the similarity of each phrase over the image FILE: a radiograph, or with a CT model a volume or the folder of a series.

    Writes SLUG.npy (float32, the file's own pixels, NaN where the model did not look), SLUG.png (overlay) and maps.json, SLUG made from
    the phrase; of a volume also SLUG.nii.gz with its affine, and the picture is of the slice that the map points at. Values are cosines;
    a finding's are the highest over the prompts for it.

    \b
    Examples:
      medvl ground film.dcm --phrase "left pleural effusion" --model demo/model --out maps
      medvl ground film.dcm --finding pneumothorax --finding lung_nodule --model demo/model --out maps --json
    """
    if not file.exists():
        raise click.UsageError(f"{file}: no such file; expected an image that the model reads")
    if not phrases and not findings:
        raise click.UsageError("nothing to look for: give --phrase TEXT or --finding NAME")
    if not all(phrase.strip() for phrase in phrases):
        raise click.UsageError("--phrase is empty")
    prompt_set = load_prompt_set(prompts)
    if unknown := [name for name in findings if name not in prompt_set.findings]:
        raise click.UsageError(f"--finding {', '.join(unknown)}: no prompts for it; known: {', '.join(prompt_set.findings)}")
    encoder = load_model(model, device)
    check_out_folder(out)
    from medvl.types import RESEARCH_USE, UnreadableImageError

    try:
        with usage_errors(NotImplementedError):
            sample = encoder.read(file)
            maps = find_maps(encoder, sample, list(dict.fromkeys(phrases)), list(dict.fromkeys(findings)), prompt_set)
    except UnreadableImageError as error:
        if as_json:
            click.echo(json_text({"path": str(file), "ok": False, "error": str(error), "maps": [], "notice": RESEARCH_USE}))
        click.echo(f"1 file rejected:\n  {error}", err=True)
        ctx.exit(REJECTED)
    records = write_maps(encoder, file, sample, maps, out, weights_sha256(model))
    if as_json:
        click.echo(json_text({"path": str(file), "ok": True, "error": None, "maps": records, "notice": RESEARCH_USE}))
        return
    from rich.markup import escape

    headings = ("looked for", "peak (row, col)" if sample.affine is None else "peak (slice, row, col)", "highest", "lowest", "overlay")
    table = new_table(None, *headings, numbers=("highest", "lowest"), whole=("looked for", "overlay"))
    for record in records:
        peak = "none: the map is flat" if record["peak"] is None else ", ".join(map(str, record["peak"]))
        numbers = ("" if record[key] is None else f"{record[key]:.3f}" for key in ("max", "min"))
        table.add_row(escape(record["phrase"]), peak, *numbers, escape(str(out / record["png"])))
    click.echo(str(file))
    console().print(table)
    echo_notice()


def find_maps(model: DualEncoder, sample: ImageSample, phrases: list[str], findings: list[str], prompts: PromptSet) -> list[NamedMap]:
    """Maps of phrases, then of findings, with names that differ."""
    from medvl.metrics import peak
    from tasks.evaluation import finding_maps
    from tasks.grounding import SimilarityMap, native_maps, slug, token_maps
    from tasks.zero_shot import encode_prompts

    features = model.encode_samples([sample])
    found: list[tuple[str, NDArray[np.float32], str]] = []
    if phrases:
        scores = native_maps(token_maps(model, features, phrases)[0], sample.transform, features.extent)
        found += [(phrase, one, "phrase") for phrase, one in zip(phrases, scores, strict=True)]
    if findings:
        grids = finding_maps(model, features, encode_prompts(model, prompts, findings))[0]
        scores = native_maps(grids, sample.transform, features.extent)
        found += [(name, one, "finding") for name, one in zip(findings, scores, strict=True)]
    taken: set[str] = set()
    named = []
    for text, one, kind in found:
        base = slug(text)
        name = next(name for i in range(1, len(found) + 2) if (name := base if i == 1 else f"{base}_{i}") not in taken)
        taken.add(name)
        named.append(NamedMap(name, SimilarityMap(text, one, peak(one)), kind))
    return named


def write_maps(model: DualEncoder, file: Path, sample: ImageSample, maps: list[NamedMap], out: Path, sha256: str) -> list[dict[str, Any]]:
    """Write .npy, .png, of volumes .nii.gz, and maps.json; returns what maps.json holds."""
    import numpy as np

    from medvl.model import write_atomically
    from medvl.types import RESEARCH_USE
    from modalities.export import write_map
    from tasks.render import overlay
    from tasks.viewing import in_plane, shown, shown_slice

    volume = None if sample.affine is None else model.reader.native(file).numpy()
    view = shown(model.reader, file) if volume is None else None
    records = []
    for named in maps:
        scores, picture, at = named.map.scores, named.map.scores, in_plane(named.map.peak)
        seen = scores[np.isfinite(scores)]
        array = io.BytesIO()
        np.save(array, scores, allow_pickle=False)
        write_atomically(out / f"{named.slug}.npy", array.getvalue())
        of_volume: dict[str, Any] = {}
        if volume is not None and sample.affine is not None:
            view, picture, at, height = shown_slice(volume, scores, sample.affine, named.map.peak)
            write_map(out / f"{named.slug}.nii.gz", scores, sample.affine)
            world = None if named.map.peak is None else (sample.affine @ [*named.map.peak, 1])[:3].tolist()
            of_volume = {"nifti": f"{named.slug}.nii.gz", "slices": scores.shape[0], "shown_slice_from_below": height, "peak_ras_mm": world}
        assert view is not None
        overlay(
            view.pixels,
            picture,
            named.map.phrase,
            out / f"{named.slug}.png",
            peak=at,
            orientation=view.orientation,
            label="cosine",
            pixel_aspect=view.pixel_aspect,
        )
        records.append(
            {
                "phrase": named.map.phrase,
                "kind": named.kind,
                "slug": named.slug,
                "npy": f"{named.slug}.npy",
                "png": f"{named.slug}.png",
                "rows": scores.shape[-2],
                "columns": scores.shape[-1],
                **of_volume,
                "peak": None if named.map.peak is None else list(named.map.peak),
                "min": float(seen.min()) if seen.size else None,
                "max": float(seen.max()) if seen.size else None,
                "finite_fraction": seen.size / scores.size,
                "path": str(file),
                "weights_sha256": sha256,
                "notice": RESEARCH_USE,
            }
        )
    write_atomically(out / "maps.json", (json.dumps(records, indent=2, allow_nan=False) + "\n").encode())
    return records
