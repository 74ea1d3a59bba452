"""What a card has of results.json and probes.json: every figure with its n and interval, under the protocol that made it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tasks.card.markdown import Table, as_code, as_estimate, as_fact, as_figure, as_table, as_text, as_value
from tasks.retrieval_figures import DIRECTIONS

ATTRIBUTES = ("sex", "age", "view", "scanner", "site")
"""What a reader expects subgroups of; a card says which were not measured."""
METRICS = {
    "auprc": "AUPRC",
    "brier": "Brier",
    "ece_mass": "ECE",
    "f1": "F1",
    "mcc": "MCC",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
}
OF_SUBGROUPS = {"auroc": "AUROC", "sensitivity": "sensitivity", "specificity": "specificity"}
RANKED = {"mean_rank": "mean rank", "mrr": "MRR", "map": "MAP", "ndcg_at_10": "nDCG@10"}
OVERALL = ("mean", "none")
"""Names of probes that are of no single finding."""


def kinds(measured: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The kinds of image that results.json has figures of, each with its name, or with none where there is only one sort of results."""
    if "ct" not in measured:
        return [("", measured)]
    return [*([("Radiographs", measured)] if "images" in measured else []), ("CT", measured["ct"])]


def fact_of(measured: Mapping[str, Any], name: str) -> Any:
    """A fact of results.json, which ``evaluate`` and ``demo`` keep in different places."""
    places = (measured.get(place) for place in ("model", "data", "facts"))
    return next((place[name] for place in places if isinstance(place, dict) and name in place), None)


def result_parts(kind: str, measured: Mapping[str, Any]) -> list[str]:
    """Paragraphs and tables of one kind of image."""
    interval, prompts = measured["interval"], measured.get("prompts") or measured.get("facts", {}).get("prompts") or {}
    facts = [
        ("images, studies, patients", f"{measured['images']}, {measured['studies']}, {measured['patients']}"),
        ("what counts once", f"{as_text(measured['unit']['name'])}, {measured['unit']['n']} of them"),
        ("images that could not be used", str(measured["rejected"])),
        ("table, SHA-256", as_fact(fact_of(measured, "manifest_sha256"))),
        ("split", as_value(fact_of(measured, "split") or "test")),
        ("prompts, version and SHA-256", f"{as_fact(prompts.get('version'))}, {as_fact(prompts.get('sha256'))}"),
        (
            "intervals",
            f"{100 * interval['level']:g} %, {as_text(interval['method'])}, {interval['repeats']} resamples, seed {interval['seed']}",
        ),
    ]
    return [
        *([f"### {kind}"] if kind else []),
        as_table(("measured on", ""), facts),
        *_protocol(measured["protocol"]),
        *_leaks(measured.get("leak_check")),
        *_findings(measured),
        *_classification(measured),
        *_subgroups(measured.get("subgroups") or {}),
        *_slices(measured.get("slices") or {}),
        *_retrieval(measured.get("retrieval") or {}),
    ]


def untested(measured: Mapping[str, Any]) -> Iterator[str]:
    """Which subgroups the results say nothing about."""
    for kind, part in kinds(measured):
        of = f" ({kind})" if kind else ""
        found = part.get("subgroups") or {}
        told, alike = found.get("attributes") or {}, found.get("of_one_kind") or {}
        if absent := [name for name in ATTRIBUTES if name not in told and name not in alike]:
            yield f"Not measured by subgroup{of}, since the table does not say: {', '.join(absent)}."
        for name, value in alike.items():
            yield f"All studies measured{of} are of one kind of {as_text(name)}: {as_text(value)}."


def probe_parts(probes: Mapping[str, Any]) -> list[str]:
    """Paragraphs and tables of probes.json: means over findings, and every corruption."""
    found = probes["probes"]
    rows: Table = [
        (as_text(one["probe"]), as_text(one["setting"]), as_estimate(one["value"], one), str(one["n"]))
        for one in found
        if one["probe"] != "corruption" and one["name"] in OVERALL
    ]
    facts = [
        ("images, patients", f"{probes['images']}, {probes['patients']}"),
        ("studies", as_text(probes["data"])),
        ("table, SHA-256", as_fact(probes.get("manifest"))),
        ("prompts, SHA-256", as_fact(probes.get("prompts"))),
        ("intervals", as_text(probes["interval"])),
    ]
    parts = [as_table(("probed on", ""), facts)]
    if rows:
        parts.append(as_table(("probe", "setting", "mean over findings (interval)", "n"), rows))
    corrupted = [one for one in found if one["probe"] == "corruption"]
    if corrupted:
        plain = ", ".join(as_estimate(one["value"], one) for one in corrupted if one["name"] in OVERALL)
        of_kinds = [one for one in corrupted if one["name"] not in OVERALL]
        severities = list(dict.fromkeys(one["setting"] for one in of_kinds))
        at = {(one["name"], one["setting"]): as_estimate(one["value"], one) for one in of_kinds}
        lines: Table = [(as_text(name), *(at.get((name, s), "") for s in severities)) for name in dict.fromkeys(name for name, _ in at)]
        note = f"Mean AUROC of images that were corrupted, at rising severity; untouched {plain}."
        parts += [note, as_table(("corruption", *map(as_text, severities)), lines)]
    return parts


def _protocol(protocol: Mapping[str, Any]) -> list[str]:
    score = protocol["score"]
    rows: Table = [
        ("protocol", as_fact(protocol.get("name"))),
        ("protocol, SHA-256", as_code(protocol["sha256"])),
        ("all but the weights, SHA-256", as_code(protocol["method_sha256"])),
        ("rule", as_fact((score.get("rule") or {}).get("name"))),
        ("label set", as_fact(score.get("label_set"))),
        ("preprocessing, SHA-256", as_code(score["preprocessing_sha256"])),
        ("how the split was made", as_text(protocol["split_source"])),
        ("definitions of the metrics", as_fact(protocol.get("metrics"))),
        ("decisions, SHA-256", as_fact(protocol.get("decisions_sha256"))),
    ]
    return ["### Protocol", as_table(("", ""), rows)]


def _leaks(check: Mapping[str, Any] | None) -> list[str]:
    if check is None:
        return ["Whether what was measured shares patients, studies or images with training: not checked."]
    seen = sum(one["rows"] for one in check["against"])
    shared = ", ".join(f"{as_text(kind)} {count}" for kind, count in check["shared"].items())
    rows: Table = [
        ("rows of training and validation compared with", str(seen)),
        ("the table that the model was trained on is among them", "yes" if check["training_table_compared"] else "no"),
        ("images compared too", "yes" if check.get("images_compared", True) else "no"),
        ("shared", shared),
        ("allowed by name", as_text(", ".join(check["allowed"])) or "nothing"),
        ("report texts shared, of studies with text", f"{check['shared_texts']} of {check['studies_with_text']}"),
    ]
    return ["### Leak check", as_table(("", ""), rows)]


def _findings(measured: Mapping[str, Any]) -> list[str]:
    zero_shot, grounding, baseline = (measured.get(name) or {} for name in ("zero_shot", "grounding", "baseline"))
    if not zero_shot:
        return []
    rows: Table = []
    simple, ends = baseline.get("per_finding") or {}, baseline.get("per_finding_intervals") or {}
    for name, one in zero_shot["per_finding"].items():
        point = (grounding.get("per_finding") or {}).get(name)
        rows.append(
            (
                as_text(name.replace("_", " ")),
                as_estimate(one["auroc"], one),
                f"{one['n_positive']} of {one['n']}",
                as_estimate(simple.get(name), ends.get(name) or {}),
                "–" if point is None else as_estimate(point["pointing_game"], point) + ("" if point["focal"] else " (widespread)"),
                "–" if point is None else str(point["n"]),
            )
        )
    point = grounding.get("pointing_game_macro_interval") or {}
    rows.append(
        (
            "**mean**",
            as_estimate(zero_shot["macro_auroc"], zero_shot["macro_auroc_interval"]),
            "",
            as_estimate(baseline.get("macro_auroc"), baseline.get("macro_auroc_interval") or {}),
            as_estimate(grounding.get("pointing_game_macro"), point),
            "",
        )
    )
    notes = ["AUROC: zero-shot, from pairs of prompts. Pointing game: share of masks that the map's peak lies in, no tolerance; widespread "
             "findings are not in its mean."]  # fmt: skip
    if baseline:
        notes.append(f"Baseline: {as_text(baseline['what'])}.")
    heads = ("finding", "AUROC (interval)", "present of n", "baseline (interval)", "pointing game (interval)", "masks")
    return ["### Findings", as_table(heads, rows), " ".join(notes)]


def _classification(measured: Mapping[str, Any]) -> list[str]:
    found = measured.get("classification") or {}
    names = [metric for metric in METRICS if metric in (found.get("macro") or {})]
    if not names:
        return []
    rows: Table = [
        (as_text(name.replace("_", " ")), *(_metric(one.get(metric)) for metric in names), *_masked(one["labels"]))
        for name, one in found["findings"].items()
    ]
    rows.append(("**mean**", *(_metric(found["macro"][metric]) for metric in names), "", ""))
    if before := found.get("before_calibration"):
        rows.append(("**mean before calibration**", *(_metric(before.get(metric)) for metric in names), "", ""))
    heads = ("finding", *(f"{METRICS[metric]} (interval)" for metric in names), "uncertain", "not mentioned")
    note = "Labels that are uncertain or not mentioned do not count."
    if "ece_mass" in names:
        note += " ECE has bins of equal mass; that of a resample is larger on average, so its interval may lie above it."
    if "thresholds" in found:
        cuts = ", ".join(f"{as_text(name.replace('_', ' '))} {value:.3f}" for name, value in found["thresholds"].items())
        note += f" Thresholds of the probabilities, chosen on validation: {cuts}."
    return ["### Classification", as_table(heads, rows), note]


def _metric(one: Mapping[str, Any] | None) -> str:
    return "–" if one is None else as_estimate(one["value"], one)


def _masked(labels: Mapping[str, int]) -> tuple[str, str]:
    return str(labels["uncertain"]), str(labels["unmentioned"])


def _subgroups(found: Mapping[str, Any]) -> list[str]:
    attributes = found.get("attributes") or {}
    if not attributes:
        return []
    metrics = [metric for metric in OF_SUBGROUPS if any(metric in one["widest_gap"] for one in attributes.values())]
    rows: Table = []
    for attribute, one in attributes.items():
        for group, own in one["groups"].items():
            cells = (_metric(own[metric][side]) for metric in metrics for side in ("mean", "less_the_rest"))
            rows.append((as_text(attribute), as_text(group), str(own["n"]), *cells))
        gaps = []
        for metric in metrics:
            gap = one["widest_gap"].get(metric)
            gaps += (
                ["–", "–"] if gap is None else [f"{as_text(gap['highest'])} less {as_text(gap['lowest'])}", as_estimate(gap["value"], gap)]
            )
        rows.append((as_text(attribute), "**widest gap**", "", *gaps))
    heads = ("", "subgroup", "n", *(f"{OF_SUBGROUPS[m]}{side} (interval)" for m in metrics for side in ("", ", less the rest")))
    least = next(iter(attributes.values()))["least_of_each_label"]
    note = (
        f"Means over the findings with {least} studies with it and {least} without in the subgroup; differences over those that count in "
        "both. The two subgroups of a widest gap were chosen because they differ most: some gap is expected by chance."
    )
    return ["### Subgroups", as_table(heads, rows), note]


def _slices(found: Mapping[str, Any]) -> list[str]:
    if not found.get("per_finding"):
        return []
    rows: Table = [
        (as_text(name.replace("_", " ")), as_estimate(one["slice_hit"], one), as_figure(one["chance"]), str(one["n"]))
        for name, one in found["per_finding"].items()
    ]
    rows.append(
        ("**mean**", as_estimate(found["slice_hit_macro"], found["slice_hit_macro_interval"]), as_figure(found["chance_macro"]), "")
    )
    heads = ("finding", "slice of highest score cuts the mask (interval)", "a random slice", "masks")
    return ["### Slices", as_table(heads, rows)]


def _retrieval(found: Mapping[str, Any]) -> list[str]:
    ways = [(as_text(direction.replace("_", " ")), found[direction]) for direction in DIRECTIONS if direction in found]
    if not ways:
        return []
    rows: Table = []
    ranked: Table = []
    for direction, one in ways:
        for rule, measured in (("its own report", one), ("or one that says the same", one["duplicates_as_hits"])):
            recalls = (as_estimate(measured[f"recall_at_{k}"], measured[f"recall_at_{k}_interval"]) for k in (1, 5, 10))
            ends = (as_figure(measured["chance"]), f"{measured['median_rank']:g}", str(measured["pool"]))
            rows.append((direction, rule, *recalls, *ends))
            if "mrr" in measured:
                figures = (_estimated(measured, name) for name in RANKED)
                ranked.append((direction, rule, *figures, str(measured["mrr_interval"]["n"]), str(measured["pool"])))
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
    parts = ["### Retrieval", as_table(heads, rows)]
    if ranked:
        ranks = ("direction", "a hit is", *(f"{name} (interval; chance)" for name in RANKED.values()), "n", "pool")
        note = "Grades of nDCG: F1 of the present findings of two reports, by facts of their sentences."
        parts += ["### Ranking", as_table(ranks, ranked), note]
    return [*parts, *_pools(found.get("pools") or {}), *_agreement(found.get("clinical_agreement") or {}), *_galleries(found)]


def _estimated(of: Mapping[str, Any], name: str) -> str:
    """A figure with its interval and chance, of those that stand under a name and its interval beside it."""
    interval = of[f"{name}_interval"]
    return "–" if of[name] is None else f"{as_estimate(of[name], interval)}; {as_figure(interval['chance'])}"


def _pools(found: Mapping[str, Any]) -> list[str]:
    rows: Table = []
    for direction in DIRECTIONS:
        for rule, one in (
            ("its own report", found.get(direction)),
            ("or one that says the same", found.get(direction, {}).get("duplicates_as_hits")),
        ):
            if one is not None:
                recalls = (_estimated(one, f"recall_at_{k}") if f"recall_at_{k}" in one else "–" for k in (1, 5, 10))
                rows.append(
                    (as_text(direction.replace("_", " ")), rule, *recalls, str(one["pool"]), f"{one['pools']} x {found['repeats']}")
                )
    heads = ("direction", "a hit is", *(f"Recall@{k} (interval; chance)" for k in (1, 5, 10)), "pool", "pools x deals")
    return ["### Retrieval within small pools", as_table(heads, rows)] if rows else []


def _agreement(found: Mapping[str, Any]) -> list[str]:
    if not found.get("per_finding"):
        return []
    rows: Table = []
    for name, one in found["per_finding"].items():
        if one["present_f1"] is not None or one["absent_f1"] is not None:
            counts = (str(one[f"{state}_f1_interval"]["n"]) for state in ("present", "absent"))
            rows.append((as_text(name.replace("_", " ")), *(_estimated(one, f"{state}_f1") for state in ("present", "absent")), *counts))
    for title in ("micro", "macro"):
        rows.append((f"**{title}**", *(_estimated(found[title], f"{state}_f1") for state in ("present", "absent")), "", ""))
    heads = ("finding", "F1 of present (interval; a random report)", "F1 of absent (interval; a random report)", "n present", "n absent")
    note = (
        f"What the first report of {found['pool']} says against the study's own, by facts of their sentences; n: studies of which either "
        "report says so. A finding that either leaves open does not count."
    )
    return ["### Clinical agreement of the first report", as_table(heads, rows), note]


def _galleries(found: Mapping[str, Any]) -> list[str]:
    rows: Table = []
    for direction, kinds_of in (found.get("hard_galleries") or {}).items():
        for kind, one in kinds_of.items():
            figures = (_estimated(one, name) for name in ("pairwise_accuracy", "recall_at_1", "others_pairwise_accuracy"))
            rows.append(
                (
                    as_text(direction.replace("_", " ")),
                    as_text(kind.replace("_", " ")),
                    *figures,
                    str(one["galleries"]),
                    str(one["queries"]),
                )
            )
    heads = (
        *("direction", "the same finding with", "own above a wrong one (interval; chance)", "own first of all (interval; chance)"),
        *("others of the same above a wrong one (interval; chance)", "galleries", "queries"),
    )
    return ["### Harder galleries", as_table(heads, rows)] if rows else []
