"""Figures of results.json for a person: numbers, intervals, and the tables of retrieval."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks.commands.common import new_table

if TYPE_CHECKING:
    from rich.console import Console

RANKINGS = {
    **{f"recall_at_{k}": f"recall@{k}" for k in (1, 5, 10)},
    "median_rank": "median rank",
    "mean_rank": "mean rank",
    "mrr": "MRR",
    "map": "MAP",
    "ndcg_at_10": "nDCG@10",
}
RULE = "a hit is the own report, or any with the same sentences; chance: a random order of the pool"
GALLERIES = {"pairwise_accuracy": "own above", "recall_at_1": "own first", "others_pairwise_accuracy": "others above"}
HITS, ENDS = ("own report", "or the same"), ("95 % CI", "chance")


def show_retrieval(out: Console, found: dict[str, Any]) -> None:
    """Tables of retrieval: both ways with rule and pool, small pools, clinical agreement of the first report, harder galleries."""
    if not found:
        return
    from tasks.retrieval_figures import DIRECTIONS

    ways = [(direction, found[direction]) for direction in DIRECTIONS]
    heads = tuple(head for hit in HITS for head in (hit, *ENDS))
    for direction, one in ways:
        n = one["recall_at_1_interval"]["n"]
        title = f"{direction.replace('_', ' ')}, full pool {one['pool']}, {n} queries"
        note = RULE + f"; nDCG graded by {one['ndcg_grades']}"
        table = new_table(title, "", *heads, numbers=heads, caption=note)
        for key, name in RANKINGS.items():
            table.add_row(name, *(cell for of in (one, one["duplicates_as_hits"]) for cell in _cells(of, key)))
        out.print(table)
    if pools := found.get("pools"):
        for direction, one in ((direction, pools[direction]) for direction in DIRECTIONS):
            title = f"{direction.replace('_', ' ')}, {one['pools']} pools of {one['pool']} dealt {pools['repeats']} times"
            table = new_table(title, "", *heads, numbers=heads, caption=RULE)
            for key, name in RANKINGS.items():
                if key in one:
                    table.add_row(name, *(cell for of in (one, one["duplicates_as_hits"]) for cell in _cells(of, key)))
            out.print(table)
    agreement = found["clinical_agreement"]
    if agreement["per_finding"]:
        title = f"what the first of {agreement['pool']} reports says against the study's own, F1; chance: any report of the pool"
        heads = ("present", *ENDS, "n", "absent", *ENDS, "n")
        table = new_table(title, "finding", *heads, numbers=heads, whole=("finding",))
        states = ("present_f1", "absent_f1")
        for name, one in agreement["per_finding"].items():
            if any(one[state] is not None for state in states):
                table.add_row(name, *(cell for s in states for cell in (*_cells(one, s), str(one[f"{s}_interval"]["n"]))))
        table.add_section()
        for name in ("micro", "macro"):
            table.add_row(name, *(cell for s in states for cell in (*_cells(agreement[name], s), "")), style="bold")
        out.print(table)
    heads = ("to report", *ENDS, "to image", *ENDS)
    note = "above: share of pairs in which it ranks above a wrong one, ties half; others: further reports that say the same of the finding"
    for kind, name in (("other_side", "on the other side"), ("other_severity", "with another severity")):
        both = [found["hard_galleries"][direction][kind] for direction in DIRECTIONS]
        counts = ", ".join(f"{of['galleries']} {way}" for of, way in zip(both, ("to report", "to image"), strict=True))
        title = f"own report among those with the same finding {name}; galleries: {counts}"
        if not any(of["galleries"] for of in both):
            out.print(title)
            continue
        table = new_table(title, "", *heads, numbers=heads, caption=note)
        for key, said in GALLERIES.items():
            table.add_row(said, *(cell for of in both for cell in _cells(of, key)))
        out.print(table)


def _cells(of: dict[str, Any], key: str) -> tuple[str, str, str]:
    """A figure, its interval and the chance level; of ranks to one digit."""
    ends = of[f"{key}_interval"]
    if key.endswith("_rank"):
        return _rank(of[key]), "–".join(_rank(ends[end]) for end in ("ci_low", "ci_high")), _rank(ends["chance"])
    return figure(of[key]), interval(ends), figure(ends["chance"])


def _rank(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def figure(value: float | None) -> str:
    """A share to three digits; a dash for one that is not defined."""
    return "–" if value is None else f"{value:.3f}"


def interval(of: dict[str, Any]) -> str:
    """An interval's ends, of shares; of differences, which have signs, :func:`signed_interval`."""
    return "–".join("?" if of[end] is None else f"{of[end]:.2f}" for end in ("ci_low", "ci_high"))
