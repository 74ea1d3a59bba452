"""Grounding: maps against a loop over tokens, peaks against the map, and what stays unknown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

import medvl
from tasks.grounding import ground, slug


@pytest.fixture(scope="module")
def model(tiny: Any) -> Any:
    return medvl.load(tiny.model, device="cpu")


def test_a_map_is_token_cosines_laid_between_token_centres(model: Any, tiny: Any) -> None:
    """Cosines one by one in numpy, laid on pixels by SciPy with the letterbox worked out by hand: 48 x 40 becomes 64 x 53 at column 5."""
    phrase = "left pleural effusion"
    (found,) = ground(model, tiny.png, [phrase])
    features, text = model.encode_image(tiny.png), model.encode_text(phrase).pooled[0].double().numpy()
    tokens = features.tokens[0].double().numpy()
    assert features.grid == (16, 16) and found.scores.shape == (48, 40) and found.scores.dtype == np.float32
    cosines = (tokens @ text / np.linalg.norm(tokens, axis=1) / np.linalg.norm(text)).reshape(16, 16)
    rows = np.clip((np.arange(48) + 0.5) * 64 / 48 / 4 - 0.5, 0, 15)
    columns = ((np.arange(40) + 0.5) * 53 / 40 + 5) / 4 - 0.5
    seen = np.flatnonzero((columns >= 1) & (columns <= 14))  # tokens 0 and 15 lie on padding
    assert len(seen) > 30
    at = np.stack(np.meshgrid(rows, columns[seen], indexing="ij"))
    np.testing.assert_allclose(found.scores[:, seen], ndimage.map_coordinates(cosines, at, order=1), atol=1e-5)


def test_the_peak_is_the_highest_pixel_and_phrases_keep_their_order(model: Any, tiny: Any) -> None:
    phrases = ["a nodule", "an enlarged heart", "a nodule"]
    maps = ground(model, tiny.dicom, phrases)
    assert [m.phrase for m in maps] == phrases
    np.testing.assert_array_equal(maps[0].scores, maps[2].scores)
    assert not np.array_equal(maps[0].scores, maps[1].scores)
    for one in maps:
        assert one.scores[one.peak] == np.nanmax(one.scores)
        assert np.nanmin(one.scores) >= -1 and np.nanmax(one.scores) <= 1


def test_a_map_has_the_files_own_pixels_whatever_their_number(model: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for shape in ((200, 31), (9, 130), (64, 64)):
        file = tmp_path / f"{shape[0]}.png"
        Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(file)
        (one,) = ground(model, file, ["a line"])
        assert one.scores.shape == shape
        assert np.isfinite(one.scores).all()


def test_nothing_to_look_for_is_refused(model: Any, tiny: Any) -> None:
    for phrases in ([], ["a nodule", "  "]):
        with pytest.raises(ValueError, match="at least one phrase"):
            ground(model, tiny.png, phrases)


@given(st.text(max_size=200))
def test_a_slug_is_a_plain_file_name(phrase: str) -> None:
    name = slug(phrase)
    assert 1 <= len(name) <= 80
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_")
    assert Path(name).name == name


def test_slugs_read_as_the_phrase() -> None:
    assert slug("Left pleural effusion, small.") == "left_pleural_effusion_small"
    assert slug("../../etc/passwd") == "etc_passwd"
    assert slug("Épanchement pleural") == "epanchement_pleural"
    assert slug("気胸") == slug(" 気胸!")  # a hash, so that two phrases of another script do not meet
    assert len({slug("気胸"), slug("胸水"), slug("!")}) == 3
