"""What commands that score share: which prompts, by which rule, under which protocol; what makes probabilities, and what is unfamiliar."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tasks.commands.common import load_prompt_set, usage_errors, weights_sha256

if TYPE_CHECKING:
    from medvl.model import DualEncoder
    from reports.prompts import PromptSet
    from tasks.decisions import Decisions
    from tasks.familiarity import Familiar
    from tasks.protocols import ScoreProtocol
    from tasks.scoring import Scorer
    from tasks.zero_shot import PromptBank

F = TypeVar("F", bound=Callable[..., Any])
OURS = "medvl"  # the rule where no preset is named


def labels_option(command: F) -> F:
    """``--labels``."""
    help_text = (
        "Score the labels of this set, under the names that it publishes: phantom, chexpert_14, chestxray_14, vindr_cxr, rsna, siim, "
        "openi_18, padchest, ct_rate_18 or merlin_30."
    )
    return click.option("--labels", metavar="SET", help=help_text)(command)


def preset_option(command: F) -> F:
    """``--preset``."""
    return click.option("--preset", metavar="NAME", help="Score by the rule of a published system: chexzero, xplainer, radzero, ...")(
        command
    )


def decisions_option(command: F) -> F:
    """``--decisions``."""
    return click.option(
        "--decisions",
        "decisions_path",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Of `medvl calibrate`, if not beside the model.",
    )(command)


def prompts_of(prompts: Path | None, labels: str | None) -> PromptSet:
    """The prompts of a file or set; of a label set alone those that it comes with.

    Raises:
        click.UsageError: a label set that they do not have.
    """
    found = load_prompt_set(Path(labels) if labels is not None and prompts is None else prompts)
    if labels is not None and labels not in found.label_sets:
        raise click.UsageError(f"--labels {labels}: no such label set; the prompts have {', '.join(found.label_sets) or 'none'}")
    return found


def scoring_of(
    encoder: DualEncoder, preset: str | None, prompts: PromptSet, findings: list[str] | None, labels: str | None
) -> PromptBank | Scorer:
    """Ours, with the scores of slices, or the rule of a preset."""
    from tasks.scoring import Scorer
    from tasks.scoring import preset as rule_of
    from tasks.zero_shot import encode_prompts

    if preset is None:
        return encode_prompts(encoder, prompts, findings)
    with usage_errors(KeyError, ValueError):
        return Scorer.of(encoder, rule_of(preset), prompts, findings, labels)


def score_protocol(
    model: Path, encoder: DualEncoder, preset: str | None, prompts: PromptSet, scoring: PromptBank | Scorer, labels: str | None
) -> ScoreProtocol:
    """What the scores hang on."""
    from tasks.protocols import ScoreProtocol
    from tasks.scoring import preset as rule_of

    return ScoreProtocol.of(weights_sha256(model), encoder.reader, prompts, rule_of(preset or OURS), scoring.findings, labels)


def decisions_of(path: Path | None, model: Path, protocol: ScoreProtocol, findings: tuple[str, ...]) -> Decisions | None:
    """Those of the file, or beside the model those of these scores, if there are any and of all findings."""
    from tasks.decisions import DecisionsError, load_decisions, place_of

    given = path or place_of(model, protocol.sha256)
    if path is None and not given.is_file():
        return None
    with usage_errors(DecisionsError):
        found = load_decisions(given, protocol.sha256)
    if found.covers(findings):
        return found
    missing = [name for name in findings if name not in found.findings]
    click.echo(f"{given} has no calibration of {', '.join(missing)}: scores are not calibrated; choose others with --finding", err=True)
    return None


def familiar_of(decisions: Path | None, model: Path, encoder: DualEncoder, protocol: ScoreProtocol) -> Familiar:
    """What `medvl calibrate` keeps of the images of validation, beside the decisions of the file or beside the model, where it is there."""
    from tasks.familiarity import Familiar, FamiliarityError, load_familiarity, place_of

    known = {}
    for modality in ("xray", "ct"):
        places = [*([] if decisions is None else [place_of(model, modality, decisions)]), place_of(model, modality)]
        if place := next((one for one in places if one.is_file()), None):
            with usage_errors(FamiliarityError):
                known[modality] = load_familiarity(place, protocol.weights_sha256, protocol.preprocessing_sha256)
    return Familiar(encoder.reader, encoder.image.pools("xray"), known)
