"""``medvl ground``: where in images phrases or findings are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
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
    load_manifest,
    load_model,
    load_prompt_set,
    model_options,
    new_table,
    progress,
    prompts_option,
    report_rejected,
    weights_sha256,
    write_csv,
)
from tasks.commands.diagnose import TABLES, find_images
from tasks.commands.maps import settings_of, settings_options, thresholds_of

if TYPE_CHECKING:
    from medvl.model import DualEncoder
    from medvl.types import ImageReader, ImageSample
    from reports.prompts import PromptSet
    from tasks.grounding import GridMaps, Query
    from tasks.grounding.settings import MapSettings
    from tasks.grounding.thresholds import MapThresholds

MapsOf = Callable[["ImageSample", Path], "GridMaps"]
INDEX, REJECTED_FILE = "maps.csv", "rejected.csv"


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE...")
@click.option("--phrase", "phrases", multiple=True, metavar="TEXT", help="What to look for (repeatable).")
@click.option("--finding", "findings", multiple=True, metavar="NAME", help="A finding to look for by its prompt pair (repeatable).")
@model_options
@prompts_option
@settings_options
@click.option("--maps", "maps_folder", type=click.Path(path_type=Path), metavar="DIR", help="Take maps made elsewhere: DIR/SLUG.npy ...")
@click.option(
    "--thresholds", type=click.Path(path_type=Path), metavar="FILE", help="Of `medvl calibrate-maps`; beside the model unless told."
)
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Where the maps go.")
@click.option("--dicom", is_flag=True, help="Also DICOM: parametric maps, a segmentation, an SR (extra 'sr').")
@click.option("--anew", is_flag=True, help="Make again what is there already.")
@json_option
@click.pass_context
def ground(
    ctx: click.Context,
    files: tuple[Path, ...],
    phrases: tuple[str, ...],
    findings: tuple[str, ...],
    model: Path,
    device: str | None,
    prompts: Path | None,
    maps_folder: Path | None,
    thresholds: Path | None,
    out: Path,
    dicom: bool,
    anew: bool,
    as_json: bool,
    **how: Any,
) -> None:
    """Lay the similarity of each phrase over each image, and say whether and where it was found.

    FILE is a radiograph, or with a CT model a volume, a zip or the folder of a series; a folder of them, or a manifest (.csv, .parquet).
    Of one image DIR gets, of several a subfolder each gets: SLUG.npy (float32, the file's own pixels, NaN where the model did not look),
    SLUG.png (overlay), of a volume SLUG.nii.gz with its affine and a picture of the slice that the map points at, grids.npz (token grids),
    and maps.json: peak, score, threshold, found or not, boxes. Thresholds are of `medvl calibrate-maps`; without them a phrase counts as
    found where it fits better than its denial, which is no calibrated decision and is said to be none. Of several images DIR also gets
    maps.csv and, if any could not be read, rejected.csv; what a stopped run has finished is kept.

    \b
    Examples:
      medvl ground film.dcm --phrase "left pleural effusion" --model demo/model --out maps
      medvl ground film.dcm --finding pneumothorax --finding lung_nodule --model demo/model --out maps --json
      medvl ground films/ --phrase "a chest tube" --shifts 2 --model demo/model --out maps
      medvl ground series/ --phrase "a nodule" --model demo_ct/model --out maps --dicom
      medvl ground film.dcm --phrase "pneumonia" --maps made_elsewhere --model demo/model --out maps
    """
    if missing := next((file for file in files if not file.exists()), None):
        raise click.UsageError(f"{missing}: no such file; expected an image that the model reads")
    if not phrases and not findings:
        raise click.UsageError("nothing to look for: give --phrase TEXT or --finding NAME")
    if not all(phrase.strip() for phrase in phrases):
        raise click.UsageError("--phrase is empty")
    if maps_folder is not None and not maps_folder.is_dir():
        raise click.UsageError(f"--maps {maps_folder}: no such folder")
    prompt_set = load_prompt_set(prompts)
    if unknown := [name for name in findings if name not in prompt_set.findings]:
        raise click.UsageError(f"--finding {', '.join(unknown)}: no prompts for it; known: {', '.join(prompt_set.findings)}")
    encoder = load_model(model, device)
    check_out_folder(out)
    from medvl.types import RESEARCH_USE
    from tasks.grounding.outputs import VALIDATION

    settings = settings_of(**how)
    levels: dict[str, MapThresholds] = {}
    for kind in () if maps_folder is not None else ("xray", "ct"):
        if (own := _thresholds(thresholds, model, settings, kind, prompt_set.sha256 if findings else None)) is not None:
            levels[kind] = own
    images, rejected = _images(encoder.reader, files)
    several = len(images) > 1 or any(file.suffix.lower() in TABLES for file in files)
    work = _Work(
        encoder,
        _queries(phrases, findings, prompt_set),
        settings,
        levels,
        maps_folder,
        weights_sha256(model),
        model.resolve().name if dicom else None,
        several,
    )
    written: list[tuple[Path, Path, list[dict[str, Any]]]] = []
    with progress("images", len(images)) as step:
        for name, path in images:
            folder = out / name if several else out
            records = None if anew or not several else work.kept(folder, path)
            error = None
            if records is None:
                records, error = work.make(folder, path)
            step(1)
            if error is not None:
                rejected.append((str(path), error))
            else:
                written.append((path, folder, records))
            if as_json:
                click.echo(json_text({"path": str(path), "ok": error is None, "error": error, "maps": records, "notice": RESEARCH_USE}))
    if several:
        (out / REJECTED_FILE).unlink(missing_ok=True)
        _write_index(out, written)
    if not as_json:
        _show(written)
    report_rejected(rejected, "files", out / REJECTED_FILE if several and rejected else None)
    if not as_json:
        if maps_folder is None and any(one["threshold_from"] != VALIDATION for _, _, records in written for one in records):
            click.echo("not calibrated: found means that a phrase fits better than its denial; `medvl calibrate-maps` makes thresholds")
        echo_notice()
    if rejected:
        ctx.exit(REJECTED)


class _Work:
    """Making and writing the maps of one image after the other."""

    def __init__(
        self,
        model: DualEncoder,
        queries: Sequence[Query],
        settings: MapSettings,
        thresholds: dict[str, MapThresholds],
        external: Path | None,
        sha256: str,
        dicom: str | None,
        several: bool,
    ) -> None:
        from tasks.grounding import Grounder
        from tasks.grounding.external import external_maps, from_folder
        from tasks.grounding.outputs import denial_of

        self.model, self.queries, self.thresholds, self.dicom = model, queries, thresholds, dicom
        asked = [*queries, *(() if len(thresholds) == 2 else map(denial_of, queries))]
        if external is None:
            grounder = Grounder(model, asked, settings)
            self.maps_of: MapsOf = lambda sample, path: grounder.of_samples([sample], [path])[0]
        else:
            provider = from_folder(external, several)
            self.maps_of = lambda sample, path: external_maps(provider, path, sample, queries)
        self.resumes = external is None  # of maps made elsewhere nobody knows whether they have changed
        made = {"maps": settings.to_dict()} if external is None else {"maps": {"source": "external"}}
        offset = {"token_offset": model.offset_record()}
        told = [
            sha256,
            made,
            offset,
            [asdict(query) for query in queries],
            {kind: one.to_dict() for kind, one in thresholds.items()},
            dicom,
        ]
        self.asked = json_text(told)
        self.facts = {**made, "weights_sha256": sha256}

    def fingerprint(self, path: Path) -> str:
        """Of all that the files of an image hang on; the image itself by its place, size and time."""
        try:
            files = self.model.reader.sources(path) or (path,)
            seen = [(str(file.resolve()), *_size_and_time(file)) for file in files]
        except OSError:
            seen = [(str(path.resolve()), 0, 0)]
        return hashlib.sha256((self.asked + json_text(seen)).encode("utf-8", "surrogateescape")).hexdigest()

    def kept(self, folder: Path, path: Path) -> list[dict[str, Any]] | None:
        """The records of an image that an earlier run has finished; None if it has to be made."""
        from tasks.grounding.outputs import RECORD

        if not self.resumes:
            return None
        try:
            records: list[dict[str, Any]] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            same = bool(records) and all(
                one["fingerprint"] == self.fingerprint(path) and (one["png"] is None or (folder / one["png"]).is_file()) for one in records
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return records if same else None

    def make(self, folder: Path, path: Path) -> tuple[list[dict[str, Any]], str | None]:
        """Records of an image, or none and why."""
        from medvl.types import UnreadableImageError
        from tasks.grounding.outputs import write_image
        from tasks.grounding.sources import SourceError

        try:
            sample = self.model.read(path)
            maps = self.maps_of(sample, path)
            facts = {**self.facts, "fingerprint": self.fingerprint(path)}
            levels = self.thresholds.get("xray" if sample.affine is None else "ct")
            return write_image(folder, path, self.model, sample, maps, self.queries, levels, facts, self.dicom), None
        except (SourceError, ImportError) as error:
            raise click.UsageError(str(error)) from error
        except (UnreadableImageError, ValueError, NotImplementedError) as error:
            return [], str(error)


def _size_and_time(file: Path) -> tuple[int, int]:
    told = file.stat()
    return told.st_size, told.st_mtime_ns


def _thresholds(path: Path | None, model: Path, settings: MapSettings, kind: str, prompts: str | None) -> MapThresholds | None:
    """Those of one kind of image; a file that was named has those of one kind alone."""
    from tasks.grounding.thresholds import MapThresholds as Thresholds

    if path is not None and path.is_file():
        try:
            if Thresholds.from_dict(json.loads(path.read_text(encoding="utf-8"))).modality != kind:
                return None
        except (ValueError, KeyError, TypeError, AttributeError):
            pass  # it is refused in a moment, with the reason
    return thresholds_of(path, model, settings, kind, prompts)


def _queries(phrases: Sequence[str], findings: Sequence[str], prompts: PromptSet) -> list[Query]:
    from tasks.grounding import finding_query, phrase_query

    return [*map(phrase_query, dict.fromkeys(phrases)), *(finding_query(name, prompts) for name in dict.fromkeys(findings))]


def _images(reader: ImageReader, files: Sequence[Path]) -> tuple[list[tuple[str, Path]], list[tuple[str, str]]]:
    """Name of its subfolder and path of each image, and what of a manifest cannot be used."""
    from tasks.grounding import slug

    rejected: list[tuple[str, str]] = []
    paths: list[Path] = []
    for file in files:
        if file.is_file() and file.suffix.lower() in TABLES:
            manifest = load_manifest(file, None, allow_outside=True)
            rejected += [(str(bad.path), str(bad)) for bad in manifest.rejected]
            paths += [row.path for row in manifest.rows]
        else:
            paths += find_images(reader, [file])
    named = []
    for path in dict.fromkeys(paths):
        of = hashlib.sha256(str(path).encode("utf-8", "surrogateescape")).hexdigest()[:8]
        named.append((f"{slug(path.name)[:60]}-{of}", path))
    return named, rejected


def _write_index(out: Path, written: Sequence[tuple[Path, Path, list[dict[str, Any]]]]) -> None:
    header = ("path", "folder", "phrase", "kind", "found", "score", "probability", "threshold", "peak", "boxes")
    lines = []
    for path, folder, records in written:
        for one in records:
            numbers = ("" if one[key] is None else repr(one[key]) for key in ("score", "probability", "threshold"))
            peak = "" if one["peak"] is None else " ".join(map(str, one["peak"]))
            lines.append(
                (str(path), folder.name, one["phrase"], one["kind"], str(one["found"]).lower(), *numbers, peak, str(len(one["boxes"])))
            )
    write_csv(out / INDEX, header, lines)


def _show(written: Sequence[tuple[Path, Path, list[dict[str, Any]]]]) -> None:
    from rich.markup import escape

    for path, folder, records in written:
        volume = any("nifti" in one for one in records)
        headings = ("looked for", "found", "peak (slice, row, col)" if volume else "peak (row, col)", "score", "threshold", "overlay")
        table = new_table(None, *headings, numbers=("score", "threshold"), whole=("looked for", "overlay"))
        for one in records:
            peak = "none: the map is flat" if one["peak"] is None else ", ".join(map(str, one["peak"]))
            numbers = ("" if one[key] is None else f"{one[key]:.3f}" for key in ("score", "threshold"))
            found = "no" if not one["found"] else f"yes, {len(one['boxes'])} {'place' if len(one['boxes']) == 1 else 'places'}"
            table.add_row(escape(one["phrase"]), found, peak, *numbers, "" if one["png"] is None else escape(str(folder / one["png"])))
        click.echo(str(path))
        console().print(table)
