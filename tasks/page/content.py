"""What the demo's page shows, as plain values and pictures, and the template that lays it out with everything escaped."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path

from medvl.files import write_atomically
from medvl.types import RESEARCH_USE


@dataclass(frozen=True)
class Words:
    """What a kind of image is called."""

    key: str  # in manifests and results
    heading: str
    image: str  # in a sentence
    element: str  # of its grid
    made_from: str  # what an image of the page is
    thumbnail: str  # that the baseline sees
    volume: bool = False


WORDS = {
    "xray": Words("xray", "Radiographs", "radiograph", "pixel", "was computed from a made-up chest", "16 × 16"),
    "ct": Words("ct", "CT", "CT volume", "voxel", "is a made-up chest", "4 × 8 × 8", volume=True),
}


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval; None where it is not defined."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Card:
    """One main figure."""

    title: str
    estimate: Estimate
    beside: str  # what to compare it with
    meaning: str


@dataclass(frozen=True)
class FindingRow:
    """One line of the table."""

    title: str
    auroc: Estimate
    n: int
    n_positive: int
    baseline: float | None
    pointing: Estimate | None  # None without masks
    n_masks: int
    chance: float | None  # share of the image that the mask covers on average: the pointing game of a random pixel
    focal: bool


@dataclass(frozen=True)
class Distribution:
    """Scores of the studies with and without a finding: shares per bin, 1 the highest of both, on a logit axis."""

    title: str
    present: tuple[float, ...]
    absent: tuple[float, ...]
    n_present: int
    n_absent: int
    ticks: tuple[tuple[float, str], ...]  # position in 0..1, label


@dataclass(frozen=True)
class Picture:
    """PNG bytes with a caption."""

    caption: str
    png: bytes

    @property
    def uri(self) -> str:
        """The picture as a data: address."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


@dataclass(frozen=True)
class Profile:
    """A finding's score in every slice of a CT, from the lowest to the highest, each as if that slice were the whole study."""

    scores: tuple[float, ...]  # 0..1
    masked: tuple[bool, ...]  # whether the true mask reaches into the slice
    peak: int | None  # the slice that the map peaks in


@dataclass(frozen=True)
class Example:
    """One study of the gallery."""

    study_id: str
    verdict: str
    good: bool
    score: float
    above: float | None  # share of the studies without the finding that score lower
    pictures: tuple[Picture, ...]
    sentences: tuple[str, ...]
    profile: Profile | None = None


@dataclass(frozen=True)
class Gallery:
    """Examples of one finding."""

    title: str
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class Report:
    """A retrieved report beside the query's own."""

    rank: float
    study_id: str
    own: bool
    sentences: tuple[tuple[str, bool], ...]  # and whether the query's own report has the very same one
    shared: tuple[str, ...]  # findings of both studies
    missed: tuple[str, ...]  # findings of the query only
    extra: tuple[str, ...]  # findings of the retrieved study only


@dataclass(frozen=True)
class Query:
    """An image and the reports that fit it best."""

    caption: str
    study_id: str
    picture: Picture
    findings: tuple[str, ...]
    own_rank: float
    pool: int
    own: Report
    hits: tuple[Report, ...]


@dataclass(frozen=True)
class Part:
    """All that is shown of one kind of image."""

    words: Words
    cards: tuple[Card, ...]
    rows: tuple[FindingRow, ...]
    macro: FindingRow | None
    distributions: tuple[Distribution, ...]
    galleries: tuple[Gallery, ...]
    queries: tuple[Query, ...]
    methods: tuple[tuple[str, str], ...]
    rejected: int = 0


@dataclass(frozen=True)
class DemoPage:
    """All that is on the page."""

    title: str
    parts: tuple[Part, ...]
    notice: str = RESEARCH_USE


def write_page(path: Path, content: DemoPage) -> Path:
    """Write the page whole or not at all; every text is escaped, every picture is inside."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(figure=_figure, percent=_percent)
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, template.render(page=content).encode("utf-8"))
    return path


def _figure(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"
