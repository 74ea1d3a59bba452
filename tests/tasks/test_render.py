"""Pictures of maps, looked at pixel by pixel."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tasks.render import TOP_SHARES, isolines, overlay, plot_map, thumbnail

H, W = 64, 48


def bump(row: float = 40.31, column: float = 30.43) -> NDArray[np.float32]:
    """A map with one hill; rows 0 to 7 were never seen."""
    rows, columns = np.mgrid[:H, :W]
    scores = 0.6 * np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / 120) - 0.1
    scores[:8] = np.nan
    return scores.astype(np.float32)


@pytest.fixture
def native() -> NDArray[np.float32]:
    return np.full((H, W), 0.5, dtype=np.float32)


def pixels(png: bytes) -> NDArray[np.int64]:
    with Image.open(io.BytesIO(png)) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB")).astype(np.int64)


def at(picture: NDArray[np.int64], row: int, column: int) -> NDArray[np.int64]:
    """The picture's colour at a native pixel of a frameless thumbnail."""
    scale = picture.shape[0] / H
    return picture[int((row + 0.5) * scale), int((column + 0.5) * scale)]


def is_grey(colour: NDArray[np.int64]) -> bool:
    return int(colour.max() - colour.min()) <= 2


def test_the_hill_is_red_the_valley_blue_and_the_unseen_grey(native: NDArray[np.float32]) -> None:
    picture = pixels(thumbnail(native, scores=bump(), side=512))
    assert picture.shape == (512, 384, 3)
    red, blue = at(picture, 40, 28), at(picture, 12, 4)
    assert red[0] > red[1] + 60 and red[0] > red[2] + 60
    assert blue[2] > blue[0] + 5
    assert all(is_grey(at(picture, row, column)) for row in range(7) for column in range(0, W, 5))
    plain = pixels(thumbnail(native, side=512))
    assert (plain == plain[0, 0]).all() and plain[0, 0, 0] == pytest.approx(127, abs=1)


def test_isolines_enclose_the_shares_they_say() -> None:
    scores = bump()
    levels = isolines(scores)
    seen = scores[np.isfinite(scores)]
    assert len(levels) == 3 and levels == sorted(levels)
    for level, share in zip(levels, TOP_SHARES, strict=True):
        assert (seen > level).mean() == pytest.approx(share, abs=0.001)
    assert isolines(np.full((4, 4), 0.3, dtype=np.float32)) == []
    assert isolines(np.full((4, 4), np.nan, dtype=np.float32)) == []


def test_isolines_are_drawn_where_the_map_crosses_them(native: NDArray[np.float32]) -> None:
    """Along the row through the hill, near-white pixels lie at the columns where the map crosses the levels and nowhere else."""
    scores, side = bump(), 1024
    picture = pixels(thumbnail(native * 0, scores=scores, side=side))
    scale = side / H
    line = picture[int(40.5 * scale)]
    white = np.flatnonzero(line.min(1) > 110) / scale - 0.5
    assert white.size
    crossings = [
        column + (level - a) / (b - a)
        for level in isolines(scores)
        for column, (a, b) in enumerate(zip(scores[40], scores[40, 1:], strict=False))
        if (a - level) * (b - level) < 0
    ]
    assert len(crossings) >= 4
    for crossing in crossings:
        assert np.abs(white - crossing).min() < 0.2
    assert all(min(abs(found - crossing) for crossing in crossings) < 0.3 for found in white)


def test_a_mask_is_outlined_and_not_filled_even_at_the_border(native: NDArray[np.float32]) -> None:
    mask = np.zeros((H, W), dtype=bool)
    mask[20:40, 10:30] = True
    mask[50:, 30:] = True
    picture = pixels(thumbnail(native, mask=mask, side=1024))
    yellow = (picture[..., 0] > 200) & (picture[..., 2] < 90)
    rows, columns = (np.flatnonzero(yellow[:700].any(axis)) / 16 - 0.5 for axis in (1, 0))
    assert (rows.min(), rows.max()) == (pytest.approx(19.5, abs=0.3), pytest.approx(39.5, abs=0.3))
    assert (columns.min(), columns.max()) == (pytest.approx(9.5, abs=0.3), pytest.approx(29.5, abs=0.3))
    assert is_grey(at(picture, 30, 20)) and is_grey(at(picture, 55, 40))
    assert yellow[-10:, 500:].any() and yellow[820:, -10:].any(), "closed where it touches the border"


def test_the_cross_is_at_the_peak(native: NDArray[np.float32]) -> None:
    picture = pixels(thumbnail(native, scores=bump(), peak=(40, 30), side=1024))
    cyan = np.argwhere((picture[..., 0] < 60) & (picture[..., 1] > 200) & (picture[..., 2] > 220))
    assert cyan.size
    assert (cyan.mean(0) / 16 - 0.5) == pytest.approx([40, 30], abs=0.3)


@pytest.mark.parametrize(
    ("orientation", "left", "right"),
    [(("L", "F"), "R", "L"), (("R", "F"), "L", "R"), (("A", "F"), "P", "A"), (None, None, None), (("F", "L"), None, None)],
)
def test_sides_are_marked_only_as_the_file_says(
    native: NDArray[np.float32], orientation: tuple[str, str] | None, left: str | None, right: str | None
) -> None:
    figure = plot_map(native, bump(), "a phrase", orientation=orientation)
    texts = {text.get_text(): text.get_position()[0] for text in figure.axes[0].texts}
    assert texts == ({} if left is None else {right: 0.985, left: 0.015})


def test_an_overlay_has_title_colour_bar_and_footer_and_says_nothing_else(native: NDArray[np.float32], tmp_path: Path) -> None:
    figure = plot_map(native, bump(), "two $dollars$ and <b>marks</b>\n", label="cosine")
    said = [text.get_text() for text in figure.texts]
    assert said[0] == "two $dollars$ and <b>marks</b>" and "research use, not for diagnosis" in said[1]
    assert figure.axes[1].get_ylabel() == "cosine"
    low, high = figure.axes[1].get_ylim()
    assert high == pytest.approx(0.5, abs=0.01) and low == -high, "symmetric about 0"
    path = overlay(native, bump(), "two $dollars$", tmp_path / "o.png")
    with Image.open(path) as picture:
        assert picture.size[1] > 8 * H, "small images are enlarged"
    assert list(tmp_path.iterdir()) == [path]


def test_native_pixels_stay_squares_in_an_overlay(tmp_path: Path) -> None:
    """A chessboard of 64 pixels with a map that is 0 everywhere but in a corner: each native pixel is one flat square of 8 x 8."""
    board = np.indices((64, 64)).sum(0) % 2
    scores = np.zeros((64, 64), dtype=np.float32)
    scores[-1, -1] = 1
    picture = pixels(overlay(board.astype(np.float32), scores, "x", tmp_path / "o.png").read_bytes())
    inside = picture[44 + 8 : 44 + 8 * 30, 16 + 8 : 16 + 8 * 30, 0]
    assert set(np.unique(inside)) == {0, 255}
    runs = np.diff(np.flatnonzero(np.diff(inside[4])))
    assert set(runs.tolist()) == {8}


def test_a_large_image_is_shown_smaller(tmp_path: Path) -> None:
    native = np.zeros((2600, 2000), dtype=np.float32)
    scores = np.tile(np.linspace(-1, 1, 2000, dtype=np.float32), (2600, 1))
    with Image.open(overlay(native, scores, "x", tmp_path / "o.png")) as picture:
        assert max(picture.size) < 1500


def test_a_flat_map_is_drawn_without_isolines(native: NDArray[np.float32]) -> None:
    assert pixels(thumbnail(native, scores=np.full((H, W), 0.2, dtype=np.float32))).size
    assert pixels(thumbnail(native, scores=np.zeros((H, W), dtype=np.float32))).size


def test_the_same_picture_twice_is_the_same_bytes(native: NDArray[np.float32]) -> None:
    assert thumbnail(native, scores=bump()) == thumbnail(native, scores=bump())


def test_what_does_not_fit_is_refused(native: NDArray[np.float32]) -> None:
    with pytest.raises(ValueError, match="similarity map has shape"):
        plot_map(native, bump()[:-1], "x")
    with pytest.raises(ValueError, match="mask has shape"):
        thumbnail(native, mask=np.zeros((W, H), dtype=bool))
    with pytest.raises(ValueError, match="no finite value"):
        plot_map(native, np.full((H, W), np.nan, dtype=np.float32), "x")
    with pytest.raises(ValueError, match="lower first"):
        plot_map(native, bump(), "x", limits=(1.0, -1.0))


def test_a_coloured_map_has_the_scale_s_colours_and_is_clear_where_nothing_is_known() -> None:
    from tasks.render import COLOURS, STRONGEST, coloured

    scores = np.linspace(-0.8, 0.4, 60, dtype=np.float32).reshape(6, 10)
    scores[2, 3] = np.nan
    found = coloured(scores)
    assert found.shape == (6, 10, 4) and found.dtype == np.uint8 and found[2, 3, 3] == 0
    for (i, j), value in np.ndenumerate(scores):
        if np.isnan(value):
            continue
        rgb = np.array(COLOURS((value + 0.8) / 1.6))[:3] * 255
        assert np.abs(found[i, j, :3] - rgb).max() <= 3
        assert abs(int(found[i, j, 3]) - 255 * STRONGEST * abs(value) / 0.8) <= 2
    wide = coloured(scores, limits=(-0.2, 0.2))
    assert (wide[0, 0, 3], wide[5, 9, 3]) == (round(255 * STRONGEST),) * 2, "beyond the limits the ends hold"
    with pytest.raises(ValueError, match="lower first"):
        coloured(scores, limits=(0.2, -0.2))


def test_a_grid_of_images_and_phrases_is_one_picture_on_one_scale(tmp_path: Path) -> None:
    from tasks.render import Panel, _png, plot_grid

    rng = np.random.default_rng(0)
    films = [rng.random(shape, dtype=np.float32) for shape in ((40, 60), (50, 50))]
    maps = [[rng.normal(size=film.shape).astype(np.float32) * 0.2, None] for film in films]
    mask = np.zeros((40, 60), dtype=bool)
    mask[5:10, 5:20] = True
    panels = [Panel(films[0], maps[0], "first", ("L", "F"), [mask, None]), Panel(films[1], maps[1], "second", pixel_aspect=1.5)]
    figure = plot_grid(panels, ["left effusion", "a phrase that is far too long for the head of a column of a figure"])
    picture = Image.open(io.BytesIO(_png(figure)))
    assert picture.format == "PNG" and picture.width > 400 and len(figure.axes) == 5
    texts = [one.get_text() for one in figure.texts]
    assert (
        "left effusion" in texts
        and "first" in texts
        and any(text.endswith("…") for text in texts)
        and any("not for diagnosis" in text for text in texts)
    )
    with pytest.raises(ValueError, match="for each phrase"):
        plot_grid(panels, ["one"])
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_grid([Panel(films[0], [None])], ["one"])
    with pytest.raises(ValueError, match="native pixels"):
        plot_grid([Panel(films[0], [films[1]])], ["one"])
