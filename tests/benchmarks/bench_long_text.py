"""Stretched positions against cut texts: which half of a long CT report belongs to which, by the MiniLM tower as it comes.

    python tests/benchmarks/bench_long_text.py --reports ../shared/data/reports/ct_reports_labelled.csv

Long reports are those of more than 512 word pieces, the positions of MiniLM, each text once. A report is cut in two at the end of the
sentence nearest to the middle of its pieces; the first half asks for the second among the second halves of all long reports, and the other
way round. Embeddings are the trunk's, compared by cosine; nothing is trained.

Few halves are longer than 512, so the comparison is made three ways:

    limit P   the tower as if it had its first P positions only (P = 128: those it was fine-tuned with; 256: half of its own). Cut: the
              first P pieces are read. Stretched: the P positions are drawn apart to 512 and 512 pieces are read. Its own 512 positions
              are shown beside: they read as much as the stretched ones.
    512       the tower as it is, cut at 512, against its 512 positions drawn apart to 1024. "same text" is the control: the positions
              are drawn apart, but no more than 512 pieces are read, so that what differs from "cut" is the positions alone. Gains are
              also given apart for reports whose halves both fit in 512, where nothing is cut, and for the others.
    tail      as 512, but the sentences that begin beyond piece 512 ask for the whole report that they are of. What is asked for is not
              in a cut text at all, so this measures how much of a tail its report's vector holds, not how alike two halves are.

Read "512, stretched - cut" with its control: where that was measured, most of the gain was there with the same text read, so it is what
other positions do to a model that was fine-tuned with 128, not what the longer text adds. "limit 256" is
open to the same doubt: there the stretched positions come out above its own 512, which read the same text.

Intervals: 95 %, of the paired difference, over reports drawn with replacement 2,000 times (both directions of a report together; what is
searched stays the same). Reports of one patient cannot be told apart from others.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

OWN = 512
METRICS: dict[str, Callable[[NDArray[np.int64]], NDArray[np.float64]]] = {
    "R@1": lambda rank: (rank <= 1).astype(float),
    "R@10": lambda rank: (rank <= 10).astype(float),
    "MRR": lambda rank: 1 / rank,
}


def minilm(positions: int, count: int, keep: int, read: int | None = None) -> Any:
    """The MiniLM tower without a head, with its first ``positions`` drawn apart to ``count``; it reads ``read`` pieces, or as many."""
    from reports import MiniLmReportEncoder
    from reports.towers.positions import stretched

    tower = MiniLmReportEncoder(None, max_tokens=count)
    trunk = tower.cached.trunk  # type: ignore[union-attr]
    trunk.encoder = stretched(_first(trunk.encoder, positions), count, keep).eval()
    trunk.max_tokens = read or count
    return tower


def _first(encoder: Any, positions: int) -> Any:
    """The encoder as if it had been made with fewer positions."""
    import copy

    config = copy.deepcopy(encoder.config)
    config.max_position_embeddings = positions
    shorter = type(encoder)(config)
    state = encoder.state_dict()
    state["embeddings.position_embeddings.weight"] = state["embeddings.position_embeddings.weight"][:positions]
    shorter.load_state_dict(state)
    return shorter


def ranks(queries: NDArray[np.float32], targets: NDArray[np.float32]) -> NDArray[np.int64]:
    """Rank of target i for query i, 1 the best; of equal scores the worst place counts."""
    scores = queries @ targets.T
    return (scores >= np.diag(scores)[:, None]).sum(1)


def interval(difference: NDArray[np.float64], seed: int = 0, repeats: int = 2000) -> tuple[float, float]:
    """95 % interval of the mean of a paired difference."""
    rng = np.random.default_rng(seed)
    means = difference[rng.integers(0, len(difference), (repeats, len(difference)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def cut(text: str, place: int) -> int:
    """The sentence end nearest to character ``place``, neither the start nor the end of the text."""
    from reports.sentences import sentence_spans

    ends = [end for _, end in sentence_spans(text)][:-1]
    return min(ends, key=lambda end: abs(end - place))


def read_long(path: Path) -> list[tuple[str, str, str, int]]:
    """(first half, second half, sentences beyond piece 512, pieces) of each report of more than 512 pieces; every text once."""
    from reports import MiniLmReportEncoder

    with path.open(encoding="utf-8", newline="") as file:
        texts = list(dict.fromkeys(row["report_text"] for row in csv.DictReader(file)))
    tokenizer = MiniLmReportEncoder(None).cached.trunk.tokenizer  # type: ignore[union-attr]
    found = []
    for text, offsets in zip(texts, tokenizer(texts, return_offsets_mapping=True)["offset_mapping"], strict=True):
        if len(offsets) > OWN:
            middle, last = cut(text, offsets[len(offsets) // 2][0]), offsets[OWN - 2][1]
            tail = text[next((end for end in _ends(text) if end >= last), last) :].strip()
            found.append((text[:middle].strip(), text[middle:].strip(), tail, len(offsets)))
    return found


def _ends(text: str) -> list[int]:
    from reports.sentences import sentence_spans

    return [end for _, end in sentence_spans(text)]


def measure(tower: Any, first: Sequence[str], second: Sequence[str], both: bool) -> dict[str, NDArray[np.float64]]:
    """Metric -> (N,), the value of each report; over both directions if ``both``."""
    with torch.no_grad():
        a, b = (tower.trunk_embeddings(list(texts)).numpy() for texts in (first, second))
    found = [ranks(a, b), *([ranks(b, a)] if both else [])]
    return {name: np.mean([metric(rank) for rank in found], axis=0) for name, metric in METRICS.items()}


def main() -> None:
    """Print a table and write the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--reports", type=Path, required=True)
    parser.add_argument("--keep", type=int, default=20)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    reports = read_long(options.reports)
    first, second, tails, pieces = (list(column) for column in zip(*reports, strict=True))
    whole = [f"{a} {b}" for a, b in zip(first, second, strict=True)]
    with_tail = [i for i, tail in enumerate(tails) if tail]
    keep = options.keep
    own = minilm(OWN, OWN, keep)
    longer = minilm(OWN, 1024, keep)
    halves: dict[str, dict[str, dict[str, NDArray[np.float64]]]] = {"512": {}, "tail": {}}
    halves["512"] = {"cut": measure(own, first, second, True), "stretched": measure(longer, first, second, True)}
    halves["512"]["same text"] = measure(minilm(OWN, 1024, keep, read=OWN), first, second, True)
    sizes = [[len(ids) for ids in longer.cached.trunk.tokenizer(texts)["input_ids"]] for texts in (first, second)]
    fits = np.max(sizes, axis=0) <= OWN
    asked, held = [tails[i] for i in with_tail], [whole[i] for i in with_tail]
    halves["tail"] = {"cut": measure(own, asked, held, False), "stretched": measure(longer, asked, held, False)}
    for limit in (128, 256):
        halves[f"limit {limit}"] = {
            "cut": measure(minilm(limit, limit, keep), first, second, True),
            "stretched": measure(minilm(limit, OWN, keep), first, second, True),
            "own 512": halves["512"]["cut"],
        }
    table = Table("comparison", "reports", *METRICS, title=f"{len(reports)} long reports, {min(pieces)} to {max(pieces)} pieces")
    results: dict[str, Any] = {"reports": len(reports), "keep_positions": keep, "pieces": [min(pieces), max(pieces)]}
    for name, rows in halves.items():
        for kind, values in rows.items():
            table.add_row(f"{name}, {kind}", str(len(values["MRR"])), *(f"{values[m].mean():.3f}" for m in METRICS))
        results[name] = {kind: {m: float(values[m].mean()) for m in METRICS} for kind, values in rows.items()}
        parts = {"": np.ones(len(rows["cut"]["MRR"]), dtype=bool)}
        if name == "512":
            parts |= {", halves that fit": fits, ", others": ~fits}
        for kind, (part, chosen) in itertools.product([k for k in rows if k in ("stretched", "same text")], parts.items()):
            gains = {m: (rows[kind][m] - rows["cut"][m])[chosen] for m in METRICS}
            shown = {m: (float(gain.mean()), *interval(gain)) for m, gain in gains.items()}
            cells = ("{:+.3f} ({:+.3f} to {:+.3f})".format(*shown[m]) for m in METRICS)
            table.add_row(f"{name}, {kind} - cut{part}", str(int(chosen.sum())), *cells)
            results[name][f"{kind} - cut{part}"] = {"reports": int(chosen.sum()), **shown}
    Console(width=150).print(table)
    if options.out is not None:
        options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
