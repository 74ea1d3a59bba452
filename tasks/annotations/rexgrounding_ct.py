"""ReXGroundingCT: sentences of chest CT reports with masks, on volumes of CT-RATE."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from tasks.annotations.files import FileMask, inside
from tasks.annotations.records import Annotation, AnnotationError, AnnotationSet, BadRowError, Gathering, split_of
from tasks.annotations.sources import entries, read_json, text_of, whole


def read_rexgrounding_ct(path: str | Path, masks: str | Path | None = None) -> AnnotationSet:
    """``dataset.json``, or ``MICCAI_challenge_dataset.json``: for each split a list of volumes.

    A volume has ``name`` (CT-RATE's file name), ``findings`` (number -> sentence), ``entity_counts``, ``shape`` [H, W, D], ``pixels``
    (number -> voxels of its mask), ``categories`` (number -> a code such as "2b", which is no label of ours) and ``protocol``. Masks are
    NIfTI of that name, (F, H, W, D), the finding's number along the first axis and entities told apart by value. H, W, D are the array's
    axes as nibabel has them, so that a mask is (D, W, H) in our order. Row: the number of the volume in its split.

    A finding whose mask is empty, or not there as those of the test splits are not, stays without regions and is no negative: the
    sentences are positive findings all. Masks are read when they are needed, and turned to the volume by their affines.

    Source: the data set's card on huggingface.co. That masks carry the affine of (H, W, D), and that it agrees with CT-RATE's, was not
    seen; a loader reports that masks and volumes differ by a half turn in the plane where affines are left aside, and where they do not
    agree :meth:`FileMask.on` refuses.

    Args:
        masks: folder of the masks; None takes ``segmentations`` beside the file.
    """
    path = Path(path)
    folder = path.parent / "segmentations" if masks is None else Path(masks)
    content, sha256 = read_json(path)
    if isinstance(content, list):
        content = {"": content}
    if not isinstance(content, dict):
        raise AnnotationError(f"{path}: expected a list of volumes for each split, got {type(content).__name__}")
    found = Gathering()
    for split, volumes in content.items():
        for number, entry in entries(path, volumes, "volumes"):
            with found.row(number):
                name = text_of(entry, "name")
                file = inside(folder, name)
                try:
                    height, width, depth = whole(entry.get("shape"), "shape", 3)
                except ValueError as error:
                    raise BadRowError(str(error)) from None
                sentences = entry.get("findings")
                if not isinstance(sentences, dict):
                    raise BadRowError("findings is missing or no object")
                drawn = folder.is_dir() and file.is_file()
                size = depth, width, height
                study = re.fullmatch(r"((?:train|valid)_\d+)_([a-z]+)_\d+\.nii(?:\.gz)?", name)
                for key, sentence in sentences.items():
                    with found.row(number):
                        if not isinstance(sentence, str) or not key.isdecimal():
                            raise BadRowError("a finding is no text, or its key no number")
                        categories, pixels = entry.get("categories"), entry.get("pixels")
                        category = categories.get(key) if isinstance(categories, dict) else None
                        empty = isinstance(pixels, dict) and pixels.get(key) == 0
                        head = Annotation(
                            image=name,
                            phrase=sentence.strip(),
                            study=f"{study[1]}_{study[2]}" if study else None,
                            patient=study[1] if study else None,
                            category=category if isinstance(category, str) else None,
                            size=size,
                            split=split_of(split),
                        )
                        draw = partial(_mask, file, int(key), size) if drawn and not empty else None
                        found.add(number, head, draw)
    return found.close("rexgrounding_ct", sha256)


def _mask(file: Path, index: int, size: tuple[int, int, int]) -> tuple[FileMask]:
    return (FileMask(file, index, size),)
