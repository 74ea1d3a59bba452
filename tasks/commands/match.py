"""``medvl match``: how well two frozen towers already match."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tasks.commands.common import (
    REJECTED,
    console,
    echo_notice,
    json_option,
    json_text,
    load_manifest,
    load_model,
    manifest_options,
    new_table,
    progress,
    report_rejected,
    text_policy_option,
    text_source,
    usage_errors,
)


@click.command()
@click.option("--config", type=click.Path(path_type=Path), metavar="RECIPE", help="Compare the towers of a recipe, before any training.")
@click.option("--model", type=click.Path(path_type=Path), metavar="DIR", help="Compare the embeddings of a run instead.")
@click.option("--device", metavar="DEVICE", help="cpu, cuda or cuda:1; CUDA for --model and cpu for --config unless told.")
@click.option(
    "--manifest",
    type=click.Path(path_type=Path),
    required=True,
    metavar="TABLE",
    help="Studies with reports; one of each patient is taken.",
)
@manifest_options
@click.option("--split", type=click.Choice(["train", "val", "test"]), default="train", show_default=True, help="Which split to take.")
@click.option("--max", "most", type=click.IntRange(min=8), default=2000, show_default=True, help="Patients at most, drawn at random.")
@click.option("--k", type=click.IntRange(min=1), default=10, show_default=True, help="Neighbours for the mutual nearest neighbours.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of what is drawn at random.")
@text_policy_option
@json_option
@click.pass_context
def match(
    ctx: click.Context,
    config: Path | None,
    model: Path | None,
    device: str | None,
    manifest: Path,
    columns: Path | None,
    modality: str,
    allow_outside: bool,
    split: str,
    most: int,
    k: int,
    seed: int,
    text_policy: str,
    as_json: bool,
) -> None:
    """Measure how alike the image features and the report features of the same studies are.

    Linear CKA (debiased) and mutual nearest neighbours, with intervals and with what they are when studies are paired at random. Of a
    recipe the towers are compared as they are before the layers that training adds, so that two frozen towers can be chosen before any
    projector is trained. A report of several sentences is the mean of their unit vectors.

    \b
    Examples:
      medvl match --config tasks/recipes/xray_radzero.yaml --manifest data/manifest.csv
      medvl match --model run --manifest data/manifest.csv --split val --json
    """
    if (config is None) == (model is None):
        raise click.UsageError("give --config RECIPE or --model DIR, one of the two")
    table = load_manifest(manifest, columns, allow_outside)
    from medvl.model import ConfigError
    from medvl.types import RESEARCH_USE
    from tasks.matching import chosen, paired_features, trained_towers, untrained_towers
    from tasks.matching import match as measure

    if model is not None:
        towers = trained_towers(load_model(model, device))
    else:
        assert config is not None
        with usage_errors(FileNotFoundError, ConfigError, ValueError):
            towers = untrained_towers(config, device or "cpu")
    studies = chosen(table.select(split=split, modality=modality).rows, text_source(text_policy), most, seed)
    with progress("reading images", len(studies)) as done:
        pairs = paired_features(towers, studies, progress=done)
    rejected = [(str(bad.path), str(bad)) for bad in table.rejected] + list(pairs.rejected)
    with usage_errors(ValueError):
        result = {**measure(pairs, k, seed=seed), "split": split, "texts": text_policy, "seed": seed, "rejected": len(rejected)}
    if as_json:
        click.echo(json_text({**result, "notice": RESEARCH_USE}))
    else:
        _print(result)
        echo_notice()
    report_rejected(rejected, "images and rows")
    if rejected:
        ctx.exit(REJECTED)


def _print(result: dict[str, Any]) -> None:
    headings = ("measure", "value", "95 % interval", "by chance", "p")
    shown = new_table(f"{result['n']} studies, one of each patient", *headings, numbers=headings[1:])
    for name, words in (("cka", "linear CKA, debiased"), ("mutual_knn", f"mutual kNN, k = {result['mutual_knn']['k']}")):
        one = result[name]
        numbers = (one["value"], one["ci_low"], one["ci_high"], one["chance"]["mean"], one["chance"]["p_value"])
        value, low, high, mean, p = ("-" if number is None else f"{number:.3f}" for number in numbers)
        shown.add_row(words, value, f"{low} to {high}", mean, p)
    console().print(shown)
