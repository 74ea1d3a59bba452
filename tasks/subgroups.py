"""What parts measured studies into subgroups: sex, age, scanner, site and whatever else the table's column map names, and the view."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from medvl.data.manifest import StudyImage

UNKNOWN, OTHER = "not stated", "other"
LARGEST = 12
"""Subgroups of one attribute that are told apart, the largest; the rest is one, ``OTHER``."""
AGES = ((18, "under 18"), (40, "18 to 39"), (60, "40 to 59"), (80, "60 to 79"))
"""Years below which an age belongs to a band; above all of them is "80 and over"."""
_SEXES = {"f": "female", "female": "female", "w": "female", "woman": "female", "m": "male", "male": "male", "man": "male"}
_AGE = re.compile(r"(\d{1,3}(?:\.\d+)?)\s*([ymwd]?)(?:ears?|onths?|eeks?|ays?)?", re.IGNORECASE)
_PER_YEAR = {"": 1.0, "y": 1.0, "m": 12.0, "w": 52.18, "d": 365.25}


def subgroups(rows: Sequence[StudyImage], units: Sequence[Sequence[int]]) -> dict[str, list[str]]:
    """Attribute -> the subgroup of each unit.

    A unit whose images differ in an attribute, such as a study of two views, is of a subgroup of its own, "PA + lateral".

    Args:
        units: indices of the images of each.
    """
    of_rows = [_attributes(row) for row in rows]
    found = {}
    for name in dict.fromkeys(name for own in of_rows for name in own):
        groups = [" + ".join(sorted({of_rows[i].get(name, UNKNOWN) for i in indices})) for indices in units]
        kept = {group for group, _ in Counter(groups).most_common(LARGEST)}
        found[name] = groups if len(set(groups)) <= LARGEST else [group if group in kept else OTHER for group in groups]
    return found


def age_band(age: str) -> str:
    """The band of an age: years ("58", "058Y" as DICOM has it), or months, weeks or days with their letter; else "not readable"."""
    found = _AGE.fullmatch(age.strip())
    if found is None:
        return "not readable"
    years = float(found[1]) / _PER_YEAR[found[2].lower()]
    return next((band for end, band in AGES if years < end), f"{AGES[-1][0]} and over")


def _attributes(row: StudyImage) -> dict[str, str]:
    found = dict(row.groups)
    if "sex" in found:
        found["sex"] = _SEXES.get(found["sex"].lower(), found["sex"])
    if "age" in found:
        found["age"] = age_band(found["age"])
    return found if row.view is None else {**found, "view": row.view}
