"""``medvl shards``: preprocessed images in shards, to stream a large training from."""

from __future__ import annotations

from pathlib import Path

import click

from tasks.commands.common import REJECTED, echo_notice, load_manifest, manifest_options, progress, report_rejected, usage_errors


@click.command(short_help="Write preprocessed images to shards to stream from.")
@click.option("--config", type=click.Path(path_type=Path), required=True, metavar="RECIPE", help="Whose reader makes the images.")
@click.option("--manifest", type=click.Path(path_type=Path), required=True, metavar="TABLE", help="Whose images are written.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, metavar="DIR", help="Folder of the shards.")
@click.option("--dtype", type=click.Choice(["float32", "float16"]), default="float32", show_default=True, help="Of the pixels.")
@click.option("--shard-mib", type=click.IntRange(min=1), default=64, show_default=True, help="Size of a shard.")
@manifest_options
@click.pass_context
def shards(
    ctx: click.Context,
    config: Path,
    manifest: Path,
    out: Path,
    dtype: str,
    shard_mib: int,
    columns: Path | None,
    modality: str,
    allow_outside: bool,
) -> None:
    """Read every image of a manifest once, as a recipe's reader does, and write what came of it to shards (extra 'streaming').

    A training then takes them with `--data.init_args.cache` medvl.data.shards.ShardStore and its `folder`, which may be copied to object
    storage (s3://, gs://, azure://). The manifest stays where it is; its images are not needed any more. Images that cannot be read are
    listed in rejected.csv in DIR, and the exit code is 1. A writing that was stopped goes on when the same command is given again.

    \b
    Examples:
      medvl shards --config tasks/recipes/xray_phantom.yaml --manifest phantoms/manifest.csv --out shards
      medvl fit --config tasks/recipes/xray_phantom.yaml --data.init_args.manifest phantoms/manifest.csv --out run \\
          --data.init_args.cache medvl.data.shards.ShardStore --data.init_args.cache.init_args.folder shards
    """
    table = load_manifest(manifest, columns, allow_outside)
    import os

    import yaml

    from medvl.data.shards import write_shards
    from medvl.model import ConfigError, build
    from medvl.types import ImageReader

    with usage_errors(FileNotFoundError, yaml.YAMLError, KeyError, ConfigError):
        recipe = yaml.safe_load(config.read_text(encoding="utf-8"))
        reader = build(recipe["data"]["init_args"]["reader"], ImageReader)  # type: ignore[type-abstract]
    images = table.select(modality=modality).rows
    root = Path(os.path.abspath(manifest)).parent  # noqa: PTH100 (as the manifest does it)
    with usage_errors(ImportError, FileExistsError, ValueError), progress("reading images", len(images)) as done:
        skipped = write_shards(reader, images, root, out, dtype=dtype, shard_mib=shard_mib, progress=lambda: done(1))  # type: ignore[arg-type]
    rejected = [(str(bad.path), str(bad)) for bad in table.rejected] + [(one.path, one.reason) for one in skipped]
    report_rejected(rejected, "images and rows", out / "rejected.csv" if rejected else None)
    click.echo(f"{len(images) - len(skipped)} images in {len(list(out.glob('chunk-*.bin')))} shards in {out}")
    echo_notice()
    if rejected:
        ctx.exit(REJECTED)
