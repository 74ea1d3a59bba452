"""The card of a saved run: what the model is, what is done to an image before it, how it was trained and did, and what is not known.

Markdown with the front matter of the Hugging Face hub. Every number comes from a file that a task wrote: config.json and the header of
model.safetensors, config.yaml (the resolved recipe) and results.json of ``medvl evaluate`` or ``medvl demo``. What none of them says is
told as not stated; a figure without such a file is left out. All text from these files is shown as text, whatever it holds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medvl.model import CONFIG, PARTS, WEIGHTS, ConfigError, build, write_atomically
from medvl.types import RESEARCH_USE, ImageReader

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

CARD, RESULTS, RECIPE = "MODEL_CARD.md", "results.json", "config.yaml"
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
LIMITS = (
    "Not tested: sites, scanners, views, ages and patient groups other than those of the table that was measured; reports in other "
    "languages and styles; burnt-in markers and text.",
    "Scores are not calibrated: they are not probabilities, and scores of different findings cannot be compared.",
    "A map shows which pixels resemble a phrase. It is not a segmentation, and its peak may lie beside the finding.",
    "A number measured on studies that a prompt, a threshold or a checkpoint was chosen on says nothing about new ones.",
)
KINDS = {"xray": "radiograph", "ct": "CT"}
XRAY_TAGS, CT_TAGS = ["chest-x-ray"], ["computed-tomography"]
Table = list[tuple[str, ...]]


class ResultsError(ValueError):
    """Results that are no results.json, or another model's."""


def write_card(folder: Path, results: Path | None = None, out: Path | None = None, licence: str | None = None) -> Path:
    """Write the card of a run, whole or not at all, to ``out`` or MODEL_CARD.md in the run's folder; where it is.

    Raises:
        FileNotFoundError, ConfigError, ResultsError: as :func:`model_card`.
    """
    target = folder / CARD if out is None else out
    write_atomically(target, model_card(folder, results, licence).encode())
    return target


def model_card(folder: Path, results: Path | None = None, licence: str | None = None) -> str:
    """The card of a run.

    Args:
        folder: of the run, with config.json and model.safetensors, and config.yaml where it was trained by ``medvl fit``.
        results: figures of this very model; None leaves them out.
        licence: of the weights, as the hub names licences ("apache-2.0"); None: not stated.
    Raises:
        FileNotFoundError: one of these files is missing.
        ConfigError: a config.json that is none, or whose reader cannot be made.
        ResultsError: results that cannot be read, or of other weights.
    """
    config = _read_json(folder / CONFIG, ConfigError)
    try:
        specs = {name: config["model"][name] for name in PARTS}
        facts = {"weights": config["weights_sha256"], "medvl": config["medvl"], "provenance": dict(config["provenance"])}
        kinds = {name: str(spec["class_path"]).rpartition(".")[2] for name, spec in specs.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{folder / CONFIG}: not a medvl config.json ({type(error).__name__}: {error})") from error
    reader = build(specs["reader"], PARTS["reader"], folder=folder / "reader")
    assert isinstance(reader, ImageReader)
    try:
        measured = None if results is None else _measured(results, facts["weights"])
        figures = [UNMEASURED] if measured is None else [line for kind, part in _kinds(measured) for line in _results(kind, part)]
    except ResultsError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ResultsError(f"{results}: not a results.json of medvl ({type(error).__name__}: {error})") from error
    name = f"medvl {kinds['image']} with {kinds['report']}"
    body = [
        f"# {_text(name)}",
        f"**{RESEARCH_USE[0].upper()}{RESEARCH_USE[1:]}.**",
        "An image tower and a report tower that embed on one space: zero-shot scores from pairs of prompts, maps of how much each pixel "
        "resembles a phrase, retrieval of reports. Not for decisions about patients.",
        "## What it is",
        _table(("part", "class", "numbers in the weights"), _parts(specs, _sizes(folder / WEIGHTS))),
        "Numbers are parameters and buffers in model.safetensors; a frozen text trunk is not among them.",
        _table(("", ""), [("weights, SHA-256", _code(facts["weights"])), ("medvl", _text(facts["medvl"])), ("licence", _licence(licence))]),
        *(part for title in ("image", "report", "similarity") for part in _arguments(TITLES[title], specs[title])),
        "## What is done to an image",
        _table(("step", "what"), [(_text(step), _text(words)) for step, words in reader.describe().items()]),
        *_arguments(TITLES["reader"], specs["reader"]),
        "## Training",
        *_provenance(facts["provenance"]),
        *_recipe(folder / RECIPE),
        *_data(measured),
        "## Results",
        *figures,
        "## Limits",
        "\n".join(f"- {limit}" for limit in LIMITS),
        f"{RESEARCH_USE[0].upper()}{RESEARCH_USE[1:]}.",
    ]
    return f"---\n{_front_matter(name, type(reader).__name__, measured, licence)}\n---\n\n" + "\n\n".join(body) + "\n"


def _front_matter(name: str, reader: str, measured: Mapping[str, Any] | None, licence: str | None) -> str:
    from huggingface_hub import ModelCardData

    kind = {"XrayReader": XRAY_TAGS, "CtReader": CT_TAGS, "JointReader": XRAY_TAGS + CT_TAGS}.get(reader, [])
    figures = [] if measured is None else [figure for name, part in _kinds(measured) for figure in _hub_results(name, part)]
    data = ModelCardData(
        library_name="medvl",
        pipeline_tag=TASK,
        license=licence,
        tags=["medical-imaging", "radiology", *kind, "image-text-alignment", "phrase-grounding", "report-retrieval"],
        model_name=name if figures else None,
        eval_results=figures or None,
    )
    return str(data.to_yaml())


def _kinds(measured: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The kinds of image that results.json has figures of, each with its name, or with none where there is only one sort of results."""
    if "ct" not in measured:
        return [("", measured)]
    return [*([("Radiographs", measured)] if "images" in measured else []), ("CT", measured["ct"])]


def _hub_results(kind: str, measured: Mapping[str, Any]) -> Iterator[EvalResult]:
    """The main figures, as the hub lists them."""
    from huggingface_hub import EvalResult

    table = _of(measured, "manifest_sha256")
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
    rows = [(TITLES[part], _code(specs[part]["class_path"]), f"{sizes[part]:,}" if sizes[part] else "none") for part in PARTS]
    return [*rows, ("all", "", f"{sum(sizes.values()):,}")]


def _arguments(title: str, spec: Mapping[str, Any]) -> list[str]:
    """A heading and the arguments of a part as config.json has them, those of parts within it under dotted names."""
    rows = [(_code(name), _value(value)) for name, value in _flat(spec.get("init_args", {}))]
    return [f"### {title}: arguments as saved", _table(("argument", "value"), rows) if rows else "None."]


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
        table = _table(("", ""), [(title, _fact(run.get(key))) for key, title in PROVENANCE.items()])
        found += [f"### Of the {KINDS.get(kind, _text(kind))} tower", table] if kind else [table]
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
    return ["### From the recipe", _table(("setting", "value"), [(_code(name), _value(value)) for name, value in chosen.items()])]


def _data(measured: Mapping[str, Any] | None) -> list[str]:
    synthetic = measured is not None and all(part.get("facts", {}).get("data") == "synthetic" for _, part in _kinds(measured))
    if synthetic:
        return [
            "Data of training and results: **synthetic** phantoms. They show that the parts work together, and say nothing about patients."
        ]
    return ["Source, years, sites, scanners and licence of the training data: not stated by the run."]


def _measured(path: Path, weights: str) -> dict[str, Any]:
    measured = _read_json(path, ResultsError)
    for _, part in _kinds(measured):
        of = _of(part, "weights_sha256")
        if of is None:
            raise ResultsError(f"{path}: does not say which weights it measured; make it anew with `medvl evaluate` or `medvl demo`")
        if of != weights:
            raise ResultsError(
                f"{path}: measured other weights (sha256 {str(of)[:12]}) than this run's ({weights[:12]}); evaluate this run"
            )
    return measured


def _of(measured: Mapping[str, Any], name: str) -> Any:
    """A fact of results.json, which ``evaluate`` and ``demo`` keep in different places."""
    places = (measured.get(place) for place in ("model", "data", "facts"))
    return next((place[name] for place in places if isinstance(place, dict) and name in place), None)


def _results(kind: str, measured: Mapping[str, Any]) -> list[str]:
    interval, prompts = measured["interval"], measured.get("prompts") or measured.get("facts", {}).get("prompts") or {}
    facts = [
        ("images, studies, patients", f"{measured['images']}, {measured['studies']}, {measured['patients']}"),
        ("images that could not be used", str(measured["rejected"])),
        ("table, SHA-256", _fact(_of(measured, "manifest_sha256"))),
        ("split", _value(_of(measured, "split") or "test")),
        ("prompts, version and SHA-256", f"{_fact(prompts.get('version'))}, {_fact(prompts.get('sha256'))}"),
        (
            "intervals",
            f"{100 * interval['level']:g} %, {_text(interval['method'])}, {interval['repeats']} resamples, seed {interval['seed']}",
        ),
    ]
    heading = [f"### {kind}"] if kind else []
    tables = (*_findings(measured), *_slices(measured.get("slices") or {}), *_retrieval(measured.get("retrieval") or {}))
    return [*heading, _table(("measured on", ""), facts), *tables]


def _findings(measured: Mapping[str, Any]) -> list[str]:
    zero_shot, grounding, baseline = (measured.get(name) or {} for name in ("zero_shot", "grounding", "baseline"))
    if not zero_shot:
        return []
    rows: Table = []
    for name, one in zero_shot["per_finding"].items():
        point = (grounding.get("per_finding") or {}).get(name)
        rows.append(
            (
                _text(name.replace("_", " ")),
                _estimate(one["auroc"], one),
                f"{one['n_positive']} of {one['n']}",
                _figure((baseline.get("per_finding") or {}).get(name)),
                "–" if point is None else _estimate(point["pointing_game"], point) + ("" if point["focal"] else " (widespread)"),
                "–" if point is None else str(point["n"]),
            )
        )
    point = grounding.get("pointing_game_macro_interval") or {}
    rows.append(
        (
            "**mean**",
            _estimate(zero_shot["macro_auroc"], zero_shot["macro_auroc_interval"]),
            "",
            _figure(baseline.get("macro_auroc")),
            _estimate(grounding.get("pointing_game_macro"), point),
            "",
        )
    )
    notes = ["AUROC: zero-shot, from pairs of prompts. Pointing game: share of masks that the map's peak lies in, no tolerance; widespread "
             "findings are not in its mean."]  # fmt: skip
    if baseline:
        notes.append(f"Baseline: {_text(baseline['what'])}.")
    heads = ("finding", "AUROC (interval)", "present of n", "baseline", "pointing game (interval)", "masks")
    return ["### Findings", _table(heads, rows), " ".join(notes)]


def _slices(found: Mapping[str, Any]) -> list[str]:
    if not found.get("per_finding"):
        return []
    rows: Table = [
        (_text(name.replace("_", " ")), _estimate(one["slice_hit"], one), _figure(one["chance"]), str(one["n"]))
        for name, one in found["per_finding"].items()
    ]
    rows.append(("**mean**", _estimate(found["slice_hit_macro"], found["slice_hit_macro_interval"]), _figure(found["chance_macro"]), ""))
    heads = ("finding", "slice of highest score cuts the mask (interval)", "a random slice", "masks")
    return ["### Slices", _table(heads, rows)]


def _retrieval(found: Mapping[str, Any]) -> list[str]:
    if not found:
        return []
    rows: Table = []
    for direction, one in found.items():
        for rule, measured in (("its own report", one), ("or one that says the same", one["duplicates_as_hits"])):
            recalls = (_estimate(measured[f"recall_at_{k}"], measured[f"recall_at_{k}_interval"]) for k in (1, 5, 10))
            ends = (_figure(measured["chance"]), f"{measured['median_rank']:g}", str(measured["pool"]))
            rows.append((_text(direction.replace("_", " ")), rule, *recalls, *ends))
    heads = (
        "direction",
        "a hit is",
        "Recall@1 (interval)",
        "Recall@5 (interval)",
        "Recall@10 (interval)",
        "chance@10",
        "median rank",
        "pool",
    )
    return ["### Retrieval", _table(heads, rows)]


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _estimate(value: float | None, interval: Mapping[str, Any]) -> str:
    if value is None:
        return "–"
    ends = [interval.get(end) for end in ("ci_low", "ci_high")]
    return f"{value:.3f} ({' to '.join('?' if end is None else f'{end:.3f}' for end in ends)})"


def _licence(licence: str | None) -> str:
    return "not stated" if licence is None else _text(licence)


def _value(value: Any) -> str:
    """A value as JSON has it."""
    return _code(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _fact(value: Any) -> str:
    """A value that a run or a result may have left out."""
    return "not stated" if value is None else _value(value)


def _code(text: Any) -> str:
    """As code, in which nothing is markup; what would end the cell or the code is replaced."""
    plain = " ".join(str(text).replace("`", "'").split())
    return f"`{plain}`".replace("|", "\\|") if plain else "``` ```"


def _text(text: Any) -> str:
    """As text, with all that Markdown or HTML would take for markup escaped."""
    plain = " ".join(str(text).split())
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>|#" else letter for letter in plain)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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
