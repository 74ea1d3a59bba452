"""The card of a saved run: what the model is, what is done to an image before it, how it was trained and did, and what is not known.

Markdown with the front matter of the Hugging Face hub. Every number comes from a file that a task wrote: config.json and the header of
model.safetensors, config.yaml (the resolved recipe), results.json of ``medvl evaluate`` or ``medvl demo``, and probes.json of ``medvl
probe``. What none of them says is told as not stated. A person's text (:class:`About`) may claim no figure that these files do not have.
All text from files is shown as text, whatever it holds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medvl.files import write_atomically
from medvl.model import CONFIG, PARTS, WEIGHTS, ConfigError, build
from medvl.types import RESEARCH_USE, ImageReader
from tasks.card.markdown import Table, as_code, as_fact, as_table, as_text, as_value
from tasks.card.results import fact_of, kinds, probe_parts, result_parts, untested
from tasks.card.sources import unsourced_lines, unsourced_shares

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

CARD, RESULTS, PROBES, RECIPE = "MODEL_CARD.md", "results.json", "probes.json", "config.yaml"
TASK = "zero-shot-image-classification"
TITLES = {"image": "Image tower", "report": "Report tower", "similarity": "Similarity", "reader": "Reader"}
PROVENANCE = {
    "manifest_sha256": "training table, SHA-256",
    "recipe_sha256": "recipe without its folders, SHA-256",
    "commit": "commit of the code",
    "chosen_by": "weights chosen by",
    "value": "its value",
    "step": "step",
    "epoch": "epoch",
}
UNMEASURED = "Not measured: there were no results of these weights when this card was written."
UNPROBED = "Not probed: negation, wording, side, corruption of images."
INTENDED = (
    "Research on how images and reports align: zero-shot scores from pairs of prompts, maps of how much each pixel resembles a phrase, "
    "retrieval of reports.",
)
NOT_FOR = (
    "Diagnosis, triage or any other decision about a patient.",
    "Images of other body parts, views or modalities than those named under data.",
)
LIMITS = (
    "Not tested: sites, scanners, views, ages and patient groups other than those of the table that was measured; reports in other "
    "languages and styles.",
    "A map shows which pixels resemble a phrase. It is not a segmentation, and its peak may lie beside the finding.",
    "A number measured on studies that a prompt, a threshold or a checkpoint was chosen on says nothing about new ones.",
)
KINDS = {"xray": "radiograph", "ct": "CT"}
XRAY_TAGS, CT_TAGS = ["chest-x-ray"], ["computed-tomography"]


class ResultsError(ValueError):
    """Results that are no results.json, or another model's."""


@dataclass(frozen=True)
class About:
    """What only a person can say of a model."""

    name: str | None = None
    intended_use: tuple[str, ...] = ()
    not_for: tuple[str, ...] = ()
    data: tuple[str, ...] = ()  # source, years, sites, scanners and licence of the training data
    failures: tuple[str, ...] = ()  # known ones

    @classmethod
    def load(cls, path: Path) -> About:
        """From YAML, each field a text or a list of them.

        Raises:
            ResultsError: a file that cannot be read, or that holds something else.
        """
        import yaml

        known = [one.name for one in fields(cls)]
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ResultsError(f"{path}: cannot be read: {error.strerror}") from None
        except (yaml.YAMLError, ValueError) as error:
            raise ResultsError(f"{path}: no YAML ({type(error).__name__})") from None
        if not isinstance(content, dict) or set(content) - set(known):
            raise ResultsError(f"{path}: expected {', '.join(known)}, each a text or a list of texts")
        texts = {name: [value] if isinstance(value, str) else value for name, value in content.items()}
        if any(not isinstance(value, list) or not all(isinstance(one, str) for one in value) for value in texts.values()):
            raise ResultsError(f"{path}: each of {', '.join(known)} is a text or a list of texts")
        name = texts.pop("name", None)
        return cls(name=" ".join(name) if name else None, **{field: tuple(value) for field, value in texts.items()})

    def texts(self) -> Iterator[str]:
        """All of it."""
        yield from (*self.intended_use, *self.not_for, *self.data, *self.failures)


def write_card(
    folder: Path,
    results: Path | None = None,
    out: Path | None = None,
    licence: str | None = None,
    probes: Path | None = None,
    about: About | None = None,
) -> Path:
    """Write the card of a run, whole or not at all, to ``out`` or MODEL_CARD.md in the run's folder; where it is.

    Raises:
        FileNotFoundError, ConfigError, ResultsError: as :func:`model_card`.
    """
    target = folder / CARD if out is None else out
    text = model_card(folder, results, licence, probes, about)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, text.encode())
    return target


def model_card(
    folder: Path, results: Path | None = None, licence: str | None = None, probes: Path | None = None, about: About | None = None
) -> str:
    """The card of a run.

    Args:
        folder: of the run, with config.json and model.safetensors, and config.yaml where it was trained by ``medvl fit``.
        results: figures of this very model; None leaves them out.
        licence: of the weights, as the hub names licences ("apache-2.0"); None: not stated.
        probes: of this very model; None leaves them out.
        about: what a person says of it.
    Raises:
        FileNotFoundError: one of these files is missing.
        ConfigError: a config.json that is none, or whose reader cannot be made.
        ResultsError: results or probes that cannot be read, have no protocol, or are of other weights, or a figure in ``about`` that is in
            neither.
    """
    config = _read_json(folder / CONFIG, ConfigError)
    about = about or About()
    try:
        specs = {name: config["model"][name] for name in PARTS}
        facts = {"weights": config["weights_sha256"], "medvl": config["medvl"], "provenance": dict(config["provenance"])}
        towers = {name: str(spec["class_path"]).rpartition(".")[2] for name, spec in specs.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{folder / CONFIG}: not a medvl config.json ({type(error).__name__}: {error})") from error
    reader = build(specs["reader"], PARTS["reader"], folder=folder / "reader")
    assert isinstance(reader, ImageReader)
    measured = None if results is None else _measured(results, facts["weights"])
    probed = None if probes is None else _probed(probes, facts["weights"])
    sources = [one for one in (measured, probed) if one is not None]
    if claimed := [figure for text in about.texts() for figure in unsourced_shares(text, sources)]:
        raise ResultsError(f"what is said of the model has figures that no results or probes have: {', '.join(claimed)}; leave them out")
    name = about.name or f"medvl {towers['image']} with {towers['report']}"
    stated = ("licence", "not stated" if licence is None else as_text(licence))
    body = [
        f"# {as_text(name)}",
        f"**{RESEARCH_USE[0].upper()}{RESEARCH_USE[1:]}.**",
        "An image tower and a report tower that embed on one space: zero-shot scores from pairs of prompts, maps of how much each pixel "
        "resembles a phrase, retrieval of reports. Not for decisions about patients.",
        "## Intended use",
        *_said(about.intended_use or INTENDED),
        "Not for:",
        *_said(about.not_for or NOT_FOR),
        "## What it is",
        as_table(("part", "class", "numbers in the weights"), _parts(specs, _sizes(folder / WEIGHTS))),
        "Numbers are parameters and buffers in model.safetensors; a frozen text trunk is not among them.",
        as_table(("", ""), [("weights, SHA-256", as_code(facts["weights"])), ("medvl", as_text(facts["medvl"])), stated]),
        *(part for title in ("image", "report", "similarity") for part in _arguments(TITLES[title], specs[title])),
        "## What is done to an image",
        as_table(("step", "what"), [(as_text(step), as_text(words)) for step, words in reader.describe().items()]),
        *_arguments(TITLES["reader"], specs["reader"]),
        "## Training",
        *_provenance(facts["provenance"]),
        *_recipe(folder / RECIPE),
        "### Data",
        *(_said(about.data) or _data(measured)),
        "## Results",
        *([UNMEASURED] if measured is None else _result_parts(results, measured)),
        "## Probes",
        *([UNPROBED] if probed is None else probe_parts(probed)),
        "## Limits",
        *_said([*([] if measured is None else untested(measured)), *_limits(measured), *about.failures]),
        f"{RESEARCH_USE[0].upper()}{RESEARCH_USE[1:]}.",
    ]
    return f"---\n{_front_matter(name, type(reader).__name__, measured, licence)}\n---\n\n" + "\n\n".join(body) + "\n"


def check_card(card: Path, results: Path, probes: Path | None = None) -> None:
    """See that every figure of a card's results and probes is one of these files, to the letter.

    Raises:
        FileNotFoundError, ResultsError: files that cannot be read, or a line that none of them makes; all such lines are named.
    """
    measured = _read_json(results, ResultsError)
    made = [*_result_parts(results, measured), *([] if probes is None else probe_parts(_read_json(probes, ResultsError)))]
    try:
        text = card.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"{card}: no such file") from None
    if found := list(unsourced_lines(text, made)):
        told = "; ".join(f"line {one.line}: {one.text[:100]}" for one in found)
        raise ResultsError(f"{card}: figures without a source in {results.name}{'' if probes is None else f' or {probes.name}'}: {told}")


def _result_parts(results: Path | None, measured: Mapping[str, Any]) -> list[str]:
    try:
        return [line for kind, part in kinds(measured) for line in result_parts(kind, part)]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        told = "has no" if isinstance(error, KeyError) else "is of another form"
        raise ResultsError(
            f"{results}: not a results.json of this version of medvl ({told} {error}); make it anew with `medvl evaluate` or `medvl demo`"
        ) from error


def _said(texts: Sequence[str]) -> list[str]:
    return ["\n".join(f"- {as_text(text)}" for text in texts)] if texts else []


def _limits(measured: Mapping[str, Any] | None) -> Iterator[str]:
    calibrated = measured is not None and all(part.get("calibrated") for _, part in kinds(measured))
    for limit in LIMITS:
        if not (calibrated and limit.startswith("Scores are not calibrated")):
            yield limit


def _front_matter(name: str, reader: str, measured: Mapping[str, Any] | None, licence: str | None) -> str:
    from huggingface_hub import ModelCardData

    kind = {"XrayReader": XRAY_TAGS, "CtReader": CT_TAGS, "JointReader": XRAY_TAGS + CT_TAGS}.get(reader, [])
    figures = [] if measured is None else [figure for name, part in kinds(measured) for figure in _hub_results(name, part)]
    data = ModelCardData(
        library_name="medvl",
        pipeline_tag=TASK,
        license=licence,
        tags=["medical-imaging", "radiology", *kind, "image-text-alignment", "phrase-grounding", "report-retrieval"],
        model_name=name if figures else None,
        eval_results=figures or None,
    )
    return str(data.to_yaml())


def _hub_results(kind: str, measured: Mapping[str, Any]) -> Iterator[EvalResult]:
    """The main figures, as the hub lists them."""
    from huggingface_hub import EvalResult

    table = fact_of(measured, "manifest_sha256")
    split = measured.get("data", {}).get("split", "test")
    figures = {
        ("roc_auc", "macro AUROC"): measured.get("zero_shot", {}).get("macro_auroc"),
        ("pointing_game", "pointing game, mean of focal findings"): measured.get("grounding", {}).get("pointing_game_macro"),
        ("recall_at_10", "image to report, Recall@10"): measured.get("retrieval", {}).get("image_to_report", {}).get("recall_at_10"),
    }
    for (metric, title), value in figures.items():
        if value is not None:
            yield EvalResult(
                task_type=TASK,
                dataset_type="study-manifest",
                dataset_name=f"study manifest {str(table)[:12]}",
                dataset_split=str(split),
                metric_type=metric,
                metric_name=f"{kind}: {title}" if kind else title,
                metric_value=value,
            )


def _sizes(weights: Path) -> dict[str, int]:
    """Numbers in the weights by their first name, from the file's header alone."""
    from safetensors import SafetensorError, safe_open

    if not weights.is_file():
        raise FileNotFoundError(
            f"{weights.parent}: no {weights.name}; expected the folder that `medvl fit` or `medvl demo` wrote the model to"
        )
    found = dict.fromkeys(PARTS, 0)
    try:
        with safe_open(weights, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                part = name.partition(".")[0]
                found[part] = found.get(part, 0) + math.prod(file.get_slice(name).get_shape())
    except SafetensorError as error:
        raise ConfigError(f"{weights} is no whole safetensors file ({error}); copy or train it again") from error
    return found


def _parts(specs: Mapping[str, Any], sizes: Mapping[str, int]) -> Table:
    rows = [(TITLES[part], as_code(specs[part]["class_path"]), f"{sizes[part]:,}" if sizes[part] else "none") for part in PARTS]
    return [*rows, ("all", "", f"{sum(sizes.values()):,}")]


def _arguments(title: str, spec: Mapping[str, Any]) -> list[str]:
    """A heading and the arguments of a part as config.json has them, those of parts within it under dotted names."""
    rows = [(as_code(name), as_value(value)) for name, value in _flat(spec.get("init_args", {}))]
    return [f"### {title}: arguments as saved", as_table(("argument", "value"), rows) if rows else "None."]


def _flat(value: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, item in value.items():
        if isinstance(item, dict) and "class_path" in item:
            yield f"{before}{name}", item["class_path"]
            yield from _flat(item.get("init_args", {}), f"{before}{name}.")
        else:
            yield f"{before}{name}", item


def _provenance(facts: Mapping[str, Any]) -> list[str]:
    """Where the weights come from; of a model that was joined from several runs, each of them."""
    runs = facts.get("joined") if isinstance(facts.get("joined"), dict) else {"": facts}
    found = []
    for kind, run in (runs or {}).items():
        table = as_table(("", ""), [(title, as_fact(run.get(key))) for key, title in PROVENANCE.items()])
        found += [f"### Of the {KINDS.get(kind, as_text(kind))} tower", table] if kind else [table]
    return found


def _recipe(path: Path) -> list[str]:
    """How the run was trained, from its resolved recipe; a run without one was not trained by ``medvl fit``."""
    if not path.is_file():
        return ["The resolved recipe (config.yaml) is not in the run's folder."]
    import yaml

    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: no recipe ({type(error).__name__}); put the resolved recipe back or take the file away") from None
    if not isinstance(recipe, dict):
        raise ConfigError(f"{path}: no recipe, but a {type(recipe).__name__}; put the resolved recipe back or take the file away")
    model, data, trainer = recipe.get("model") or {}, (recipe.get("data") or {}).get("init_args") or {}, recipe.get("trainer") or {}
    loss = model.get("loss") or {}
    chosen = {
        "loss": loss.get("class_path"),
        **{f"loss: {name}": value for name, value in (loss.get("init_args") or {}).items()},
        **{name: model.get(name) for name in ("learning_rate", "weight_decay") if name in model},
        "parts that started from another run": sorted(model.get("start") or {}) or "none",
        "locked": model.get("locked") or "none",
        "modality": data.get("modality"),
        "views": data.get("views", "image"),
        "batch_size": data.get("batch_size"),
        "sentences_per_image": data.get("sentences_per_image"),
        "augment": (data.get("augment") or {}).get("class_path", "none"),
        **{f"augment: {name}": value for name, value in ((data.get("augment") or {}).get("init_args") or {}).items()},
        "max_epochs": trainer.get("max_epochs"),
        "precision": trainer.get("precision"),
        "seed": recipe.get("seed_everything"),
    }
    return ["### From the recipe", as_table(("setting", "value"), [(as_code(name), as_value(value)) for name, value in chosen.items()])]


def _data(measured: Mapping[str, Any] | None) -> list[str]:
    synthetic = measured is not None and all(part.get("facts", {}).get("data") == "synthetic" for _, part in kinds(measured))
    if synthetic:
        return [
            "Data of training and results: **synthetic** phantoms. They show that the parts work together, and say nothing about patients."
        ]
    return ["Source, years, sites, scanners and licence of the training data: not stated by the run."]


def _measured(path: Path, weights: str) -> dict[str, Any]:
    measured = _read_json(path, ResultsError)
    for _, part in kinds(measured):
        _check_weights(path, fact_of(part, "weights_sha256"), weights, "make it anew with `medvl evaluate` or `medvl demo`")
    return measured


def _probed(path: Path, weights: str) -> dict[str, Any]:
    probed = _read_json(path, ResultsError)
    _check_weights(path, probed.get("model"), weights, "make it anew with `medvl probe`")
    try:
        probe_parts(probed)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ResultsError(f"{path}: not a probes.json of medvl ({type(error).__name__}: {error})") from error
    return probed


def _check_weights(path: Path, of: Any, weights: str, what: str) -> None:
    if of is None:
        raise ResultsError(f"{path}: does not say which weights it measured; {what}")
    if of != weights:
        raise ResultsError(f"{path}: measured other weights (sha256 {str(of)[:12]}) than this run's ({weights[:12]}); {what}")


def _read_json(path: Path, kind: type[ValueError]) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise kind(f"{path}: no JSON ({type(error).__name__})") from None
    if not isinstance(found, dict):
        raise kind(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found
