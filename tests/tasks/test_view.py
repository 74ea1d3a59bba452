"""``medvl view``: what is shown lies where it lies in the file, nobody else can ask for it, and the page does in a browser what it says."""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from nibabel.affines import apply_affine
from PIL import Image
from torch.nn import functional as F

from medvl.model import DualEncoder
from medvl.nn.similarity import PooledSimilarity
from medvl.types import ImageBatch, ImageEncoder, ImageFeatures, ReportEncoder, TextBatch, TextFeatures, UnreadableImageError
from modalities.ct import CtReader, CtVolume, MeanPooling, SeriesPooledEncoder, hu_verdict
from modalities.export import write_ct_series, write_nifti, write_radiograph_dicom
from modalities.joint import JointReader
from modalities.xray import XrayReader
from reports.prompts import load_prompts
from tasks.cli import cli
from tasks.familiarity import Familiar
from tasks.grounding import native_maps, token_maps
from tasks.view import content
from tasks.view.content import Viewer, ViewModel
from tasks.view.server import allowed_host, make_app
from tasks.view.studies import Studies, find_studies, safe_name
from tasks.zero_shot import encode_prompts

pytest.importorskip("starlette", reason="the page needs the extra 'view'")
from starlette.testclient import TestClient

TOKEN = "a-token-of-the-tests"
FINDINGS = ["lung_nodule", "cardiomegaly"]
EVIL = '<img src=x onerror="window.hacked=1"><script>window.hacked=2</script>'


class Bright(ImageEncoder):
    """A tower that fires on brightness: a token is (v, 1 - v) of the mean v of its cell in the first channel."""

    def __init__(self, cell: int = 4, slices: bool = False) -> None:
        super().__init__()
        self.embed_dim, self.cell, self.slices = 2, cell, slices

    def forward(self, batch: ImageBatch) -> ImageFeatures:
        value = batch.pixels[:, 0]
        flat = value.ndim == 3
        cells = F.avg_pool2d(value.flatten(0, -3)[:, None], self.cell)[:, 0].unflatten(0, value.shape[:-2])
        tokens = torch.stack([cells, 1 - cells], -1).flatten(1, -2)
        slices = None if flat or not self.slices else tokens.unflatten(1, (value.shape[1], -1)).amax(2)
        weights = None if slices is None else torch.full(slices.shape[:2], 1 / slices.shape[1])
        return ImageFeatures(tokens.mean(1), tokens=tokens, grid=tuple(cells.shape[1:]), slices=slices, slice_weights=weights)


class Words(ReportEncoder):
    """``dark`` in a text looks for what is not bright, all else for what is."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_dim = 2

    def forward(self, batch: TextBatch) -> TextFeatures:
        return TextFeatures(torch.tensor([[0.0, 1.0] if "dark" in text else [1.0, 0.0] for text in batch.texts]))


def bright_model(slices: bool = False, name: str = "bright") -> ViewModel:
    readers = JointReader(
        XrayReader(size=64, normalise="fixed", mean=0.0, std=1.0),
        CtReader(spacing_mm=(8.0, 6.0, 6.0), shape=(None, 64, 64), windows_hu=[(-1000, 1000)], crop="none", mean=0.0, std=1.0),
    )
    encoder = DualEncoder(Bright(slices=slices), Words(), PooledSimilarity(), readers).eval()
    return ViewModel(name, encoder, encode_prompts(encoder, load_prompts(), FINDINGS), Familiar(encoder.reader))


def affine_of(spacing: tuple[float, float, float], origin: tuple[float, float, float], up: bool = True) -> Any:
    """(s, h, w) to RAS of an ordinary axial series: rows to posterior, columns to the left, slices up or down."""
    s, h, w = spacing
    return np.array([[0, 0, -w, origin[0]], [0, -h, 0, origin[1]], [s if up else -s, 0, 0, origin[2]], [0, 0, 0, 1.0]])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of studies: films with a bright square in the upper left, volumes with a bright cube, and what is broken."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("files")
    film = np.full((300, 200), 400, np.uint16)
    film[40:80, 30:70] = 3900
    write_radiograph_dicom(folder / "film.dcm", film, view="PA", spacing_mm=(0.5, 0.5), patient_id="SECRET-ID", study_id="study-of-a-film")
    Image.fromarray((film // 16).astype(np.uint8)).save(folder / "picture.png")
    (folder / "broken.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"nothing of use")
    volume = np.full((30, 64, 64), -900, np.int16)
    volume[22:26, 40:52, 8:20] = 900  # high, at the back, at the patient's right
    write_nifti(folder / "volume.nii.gz", volume, affine_of((5, 4, 4), (126, 126, -300)))
    write_ct_series(
        folder / "series", volume[::-1].copy(), affine_of((5, 4, 4), (126, 126, -155), up=False), patient_id="SECRET-ID", study_id="s"
    )
    return folder


CUBE_MM = (126 - 4 * 13.5, 126 - 4 * 45.5, -300 + 5 * 23.5)  # the middle of the cube, RAS


# --- what is shown and where ----------------------------------------------------------------------------------------------------


def opened(packed: bytes) -> Any:
    return nibabel.Nifti1Image.from_bytes(gzip.decompress(packed))


@pytest.mark.parametrize("name", ["volume.nii.gz", "series"])
def test_a_volume_is_sent_in_the_files_own_voxels(files: Path, name: str) -> None:
    shown = content.show(bright_model().encoder.reader, files / name)
    image = opened(shown.nifti)
    assert image.get_data_dtype() == np.int16 and image.shape == (64, 64, 30)
    value = np.asarray(image.dataobj)
    at = np.argwhere(value > 0).mean(0)
    assert apply_affine(image.affine, at) == pytest.approx(CUBE_MM, abs=1e-3)
    names = [window[0] for window in shown.windows]
    assert names[:4] == ["Lung", "Mediastinum", "Bone", "Soft tissue"]
    if name == "series":
        assert ("From the file (-600/1500)", -1350.0, 150.0) in shown.windows and "LUNG" not in str(names)


def test_a_radiograph_is_sent_as_it_lies_in_the_file(files: Path) -> None:
    shown = content.show(bright_model().encoder.reader, files / "film.dcm")
    image = opened(shown.nifti)
    grid = np.asarray(image.dataobj)[..., 0]  # (columns, rows)
    right, up = (np.argwhere(grid > 2000).mean(0) * [1, 1]).tolist()
    x, y, _ = apply_affine(image.affine, [right, up, 0])
    assert (x, y) == pytest.approx((49.5 * 0.5, (299 - 59.5) * 0.5))  # x to the right of the picture, y up
    assert shown.orientation == ("L", "F") and shown.unit.startswith("mm") and image.header.get_zooms()[:2] == (0.5, 0.5)


def test_what_a_browser_cannot_hold_is_shown_smaller_at_the_same_place(monkeypatch: pytest.MonkeyPatch, files: Path) -> None:
    monkeypatch.setattr(content, "LONGEST_SIDE", 150)
    monkeypatch.setattr(content, "MOST_VOXELS", 40_000)
    reader = bright_model().encoder.reader
    film, volume = content.show(reader, files / "film.dcm"), content.show(reader, files / "volume.nii.gz")
    assert any("shown at 150 x 100 of its 300 x 200 pixels" in note for note in film.notes)
    assert any("of its 30 x 64 x 64 voxels" in note for note in volume.notes)
    for shown, limit, place in ((film, 2000, (24.75, 119.75)), (volume, 0, CUBE_MM)):
        image = opened(shown.nifti)
        found = apply_affine(image.affine, np.argwhere(np.asarray(image.dataobj) > limit).mean(0))
        assert found[: len(place)] == pytest.approx(place, abs=4.0)


def laid_map(found: dict[str, Any]) -> Any:
    return opened(base64.b64decode(found["nifti"]))


@pytest.mark.parametrize("name", ["volume.nii.gz", "series", "film.dcm"])
def test_the_map_on_its_own_grid_is_the_map_on_the_files_pixels(files: Path, name: str) -> None:
    model = bright_model()
    path = files / name
    viewer = Viewer([model])
    image = laid_map(viewer.map(path, 0, "phrase", "bright"))
    sample = model.encoder.read(path)
    features = model.encoder.encode_samples([sample])
    native = native_maps(token_maps(model.encoder, features, ["bright"])[0], sample.transform, features.extent)[0]
    values = np.asarray(image.dataobj)
    known = np.argwhere(np.isfinite(values))
    chosen = known[np.random.default_rng(0).permutation(len(known))[:2000]]
    world = apply_affine(image.affine, chosen)
    back = np.linalg.inv(viewer.show(path).affine)
    at = np.rint(world @ back[:3, :3].T + back[:3, 3]).astype(int)
    at = at if native.ndim == 3 else at[:, 1:]
    inside = ((at >= 0) & (at < native.shape)).all(1)
    assert inside.mean() > 0.98
    theirs = native[tuple(at[inside].T)]
    ours = values[tuple(chosen[inside].T)]
    near = np.isfinite(theirs)
    assert near.mean() > 0.97 and np.abs(theirs[near] - ours[near]).mean() < 0.03  # half a pixel of the map apart, at most
    assert np.isnan(values).any()  # padding of the tower's square: what it did not look at


def test_a_map_of_close_values_keeps_their_differences() -> None:
    scores = np.random.default_rng(0).uniform(0.300, 0.301, (4, 5, 6)).astype(np.float32)
    scores[0, 0, 0] = np.nan
    sent = content.in_steps(scores)
    assert np.nanmax(np.abs(sent - scores)) < 0.001 / 4096 and np.isnan(sent[0, 0, 0])
    assert (content.in_steps(np.full((1, 2, 2), 0.3, np.float32)) == np.float32(0.3)).all()


@pytest.mark.parametrize("slices", [False, True])
@pytest.mark.parametrize("name", ["volume.nii.gz", "series"])
def test_the_strongest_slice_and_the_peak_are_those_of_the_cube(files: Path, name: str, slices: bool) -> None:
    found = Viewer([bright_model(slices)]).map(files / name, 0, "phrase", "bright")
    bar = found["slices"]
    assert found["peak"]["mm"] == pytest.approx(CUBE_MM, abs=14)
    best = bar["points"][int(np.argmax(bar["values"]))]
    assert best == pytest.approx(CUBE_MM, abs=14)
    heights = [point[2] for point in bar["points"]]
    assert heights == sorted(heights) and len(heights) > 10
    assert ("whole study" in bar["of"]) is slices
    numbers = re.search(
        r"slice (\d+) of 30 from below; .* (\d+) mm to the patient's right, (\d+) mm to the back, (\d+) mm up", found["peak"]["words"]
    )
    assert numbers and 22 <= int(numbers[1]) <= 27


def test_a_tower_that_pools_series_has_maps_and_slices_too(files: Path) -> None:
    model = bright_model(slices=True)
    model.encoder.image = SeriesPooledEncoder(model.encoder.image, MeanPooling()).eval()
    found = Viewer([model]).map(files / "volume.nii.gz", 0, "phrase", "bright")
    assert found["peak"]["mm"] == pytest.approx(CUBE_MM, abs=14) and len(found["slices"]["values"]) > 10


def test_values_between_whole_numbers_are_rounded_and_gaps_are_air() -> None:
    values = np.full((4, 4, 4), 10.4, np.float32)
    values[0, 0, 0], values[1, 1, 1] = np.nan, 1e9
    shown = content.show_volume(CtVolume(values, affine_of((1, 1, 1), (0, 0, 0)), hu_verdict(np.zeros((4, 4, 4), np.int16))))
    assert np.unique(np.asarray(opened(shown.nifti).dataobj)).tolist() == [-1024, 10, 32767]


def test_of_models_for_films_and_for_ct_the_one_that_reads_it_is_taken(files: Path) -> None:
    both = bright_model().encoder.reader
    viewer = Viewer([replace(bright_model(), encoder=with_reader(one)) for one in (both.xray, both.ct)])
    assert [viewer.show(files / name).reader for name in ("film.dcm", "volume.nii.gz", "series")] == [0, 1, 1]
    with pytest.raises(UnreadableImageError, match="broken"):
        viewer.show(files / "broken.dcm")
    names = {one.name for one in find_studies([both.xray, both.ct], files)}
    assert names == {"film.dcm", "picture.png", "broken.dcm", "volume.nii.gz", "series"}


def with_reader(reader: Any) -> DualEncoder:
    return DualEncoder(Bright(), Words(), PooledSimilarity(), reader).eval()


def test_a_radiographs_peak_is_told_by_side_and_place(files: Path) -> None:
    words = Viewer([bright_model()]).map(files / "film.dcm", 0, "phrase", "bright")["peak"]["words"]
    assert words.startswith("upper third, left half of the picture, the patient's right; row ") and "mm" in words
    without = Viewer([bright_model()]).map(files / "picture.png", 0, "phrase", "bright")["peak"]["words"]
    assert without.startswith("upper third, left half of the picture; row") and "patient" not in without and "mm" not in without


def test_findings_have_scores_and_maps(files: Path) -> None:
    viewer = Viewer([bright_model(slices=True)])
    told = viewer.scores(files / "volume.nii.gz", 0)
    assert [row["finding"] for row in told["findings"]] == FINDINGS and told["calibrated"] is False
    found = viewer.map(files / "volume.nii.gz", 0, "finding", "lung_nodule")
    assert found["kind"] == "finding" and found["slices"]["values"]
    json.dumps([told, found], allow_nan=False)


def test_image_and_phrase_are_encoded_once(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = bright_model()
    viewer = Viewer([model])
    looked: list[str] = []
    for part, name in ((model.encoder.image, "image"), (model.encoder.report, "text")):
        part.register_forward_hook(lambda *_, name=name: looked.append(name))
    for phrase in ("bright", "dark", "bright"):
        viewer.map(files / "volume.nii.gz", 0, "phrase", phrase)
    viewer.scores(files / "volume.nii.gz", 0)
    assert looked.count("image") == 1 and looked.count("text") == 2


# --- which studies there are ----------------------------------------------------------------------------------------------------


def test_a_folder_lists_its_studies_and_no_link_leads_out(files: Path, tmp_path: Path) -> None:
    folder = tmp_path / "named"
    shutil.copytree(files, folder)
    (folder / "away.png").symlink_to(files / "picture.png")
    found = {one.name: one for one in find_studies([bright_model().encoder.reader], folder)}
    assert set(found) == {"film.dcm", "picture.png", "broken.dcm", "volume.nii.gz", "series", "away.png"}
    assert "out of the folder" in str(found["away.png"].error) and found["film.dcm"].error is None


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\x\\film.dcm", "film.dcm"),
        (".hidden", "hidden"),
        ("", "file"),
        ("a b\n<c>.nii.gz", "a_b_c_.nii.gz"),
    ],
)
def test_names_of_dropped_files_are_plain(given: str, kept: str) -> None:
    assert safe_name(given) == kept
    assert len(safe_name("x" * 400 + ".dcm")) <= 100 and safe_name("x" * 400 + ".dcm").endswith(".dcm")


# --- the server -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def client(files: Path) -> Iterator[TestClient]:
    viewer = Viewer([bright_model(), bright_model(slices=True, name="second")])
    with Studies([model.encoder.reader for model in viewer.models], files, max_upload=100_000) as studies:
        made = TestClient(make_app(viewer, studies, token=TOKEN, port=1), base_url="http://127.0.0.1:1", raise_server_exceptions=False)
        made.headers["authorization"] = f"Bearer {TOKEN}"
        made.studies = studies  # type: ignore[attr-defined]
        yield made


def number_of(client: TestClient, name: str) -> int:
    return next(one["id"] for one in client.get("/api/state").json()["studies"] if one["name"] == name)


@pytest.mark.parametrize("path", ["/", "/app.js", "/api/state", "/api/studies/0", "/api/studies/0/image", "/no-such"])
def test_nothing_is_told_without_the_token(client: TestClient, path: str) -> None:
    assert client.get(path, headers={"authorization": "Bearer wrong"}).status_code == 403
    assert client.get(path, headers={"authorization": ""}).status_code == 403
    assert client.get(path, headers={"authorization": "", "cookie": "medvl-view-1=wrong"}).status_code == 403
    if path != "/":
        assert client.get(f"{path}?token={TOKEN}", headers={"authorization": ""}).status_code == 403


def test_the_page_sets_the_cookie_that_its_requests_need(client: TestClient) -> None:
    del client.headers["authorization"]
    assert client.get("/?token=wrong").status_code == 403 and not client.cookies
    answer = client.get(f"/?token={TOKEN}")
    assert answer.status_code == 200 and "medvl view" in answer.text
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= {part.strip() for part in answer.headers["set-cookie"].split(";")}
    client.cookies.clear()
    assert client.get("/api/state", headers={"cookie": f"medvl-view-1={TOKEN}"}).status_code == 200


def test_another_host_or_page_is_refused(client: TestClient) -> None:
    for host in ("evil.example", "evil.example:1", "127.0.0.1.evil.example", "192.168.0.9:1", ""):
        assert client.get("/api/state", headers={"host": host}).status_code == 403, host
    for host in ("127.0.0.1:1", "localhost:8000", "[::1]:1"):
        assert client.get("/api/state", headers={"host": host}).status_code == 200, host
    assert client.post("/api/drops", headers={"origin": "http://evil.example"}).status_code == 403
    assert client.post("/api/drops", headers={"origin": "http://127.0.0.1:8888"}).status_code == 403
    assert client.post("/api/drops", headers={"origin": "http://127.0.0.1:1"}).status_code == 201
    assert (
        allowed_host("10.0.0.5:80", "0.0.0.0")
        and not allowed_host("name.example", "0.0.0.0")
        and allowed_host("name.example", "name.example")
    )


def test_every_answer_shuts_the_page_in(client: TestClient) -> None:
    for path in ("/", "/app.js", "/api/state", "/none"):
        headers = client.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src 'self';" in policy and "unsafe" not in policy and "http" not in policy
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
        assert "access-control-allow-origin" not in headers and headers["cache-control"] == "no-store"


def test_what_goes_wrong_is_told_as_json_with_the_right_code(client: TestClient) -> None:
    film, broken = number_of(client, "film.dcm"), number_of(client, "broken.dcm")
    for path, code in {
        "/none.js": 404,
        "/../studies.py": 404,
        "/api/studies/99": 404,
        f"/api/studies/{film}/map": 400,
        f"/api/studies/{film}/map?phrase={'x' * 501}": 400,
        f"/api/studies/{film}/map?finding=nothing": 400,
        f"/api/studies/{film}/map?phrase=x&model=2": 400,
        f"/api/studies/{film}/map?phrase=x&model=-1": 400,
        f"/api/studies/{broken}": 422,
        f"/api/studies/{broken}/image": 422,
    }.items():
        answer = client.get(path)
        assert answer.status_code == code and answer.json()["error"], path
    assert "broken.dcm" in client.get(f"/api/studies/{broken}").json()["error"]
    assert client.get(f"/api/studies/{film}").status_code == 200  # a broken file ends nothing
    assert client.delete("/api/state").status_code == 405


def test_a_failure_nobody_thought_of_is_told_without_what_it_says(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("SECRET-ID of a header")

    monkeypatch.setattr(content, "show_by_any", fail)
    answer = client.get(f"/api/studies/{number_of(client, 'film.dcm')}")
    assert answer.status_code == 500 and "RuntimeError" in answer.json()["error"] and "SECRET" not in answer.text


def test_broken_studies_are_listed_with_their_reason(client: TestClient) -> None:
    for _ in range(100):
        listed = {one["name"]: one for one in client.get("/api/state").json()["studies"]}
        if all(one["checked"] for one in listed.values()):
            break
        time.sleep(0.1)
    assert listed["broken.dcm"]["error"] and all(one["error"] is None for name, one in listed.items() if name != "broken.dcm")


def test_image_and_map_come_as_nifti_and_no_header_text_does(client: TestClient) -> None:
    film = number_of(client, "film.dcm")
    answer = client.get(f"/api/studies/{film}/image")
    assert answer.headers["content-encoding"] == "gzip" and opened(gzip.compress(answer.content)).shape == (200, 300, 1)
    told = [
        client.get(path).text
        for path in ("/api/state", f"/api/studies/{film}", f"/api/studies/{film}/scores", f"/api/studies/{film}/map?phrase=bright")
    ]
    assert not any(secret in text for text in told for secret in ("SECRET", "Synthetic^", "study-of-a-film"))
    assert client.get(f"/api/studies/{film}/map?phrase=bright&model=1").json()["max"] == pytest.approx(1, abs=0.05)


def test_dropped_files_become_studies_and_are_gone_at_the_end(client: TestClient, files: Path) -> None:
    drop = client.post("/api/drops").json()["drop"]
    put = client.put(f"/api/drops/{drop}", params={"name": "../../escape.png"}, content=(files / "picture.png").read_bytes())
    assert put.status_code == 200
    added = client.post(f"/api/drops/{drop}").json()
    assert [added["studies"][i]["name"] for i in added["added"]] == ["dropped: escape.png"]
    path = client.studies[added["added"][0]].path  # type: ignore[attr-defined]
    assert path.is_file() and "medvl-view-" in str(path) and client.get(f"/api/studies/{added['added'][0]}").status_code == 200
    client.studies.__exit__(None, None, None)  # type: ignore[attr-defined]
    assert not path.exists()


def test_a_dropped_series_is_one_study_and_a_dropped_text_is_refused(client: TestClient, files: Path) -> None:
    drop = client.post("/api/drops").json()["drop"]
    client.studies.drop(drop).most = 10**9  # type: ignore[attr-defined]
    for file in sorted((files / "series").iterdir()):
        client.put(f"/api/drops/{drop}", params={"name": file.name}, content=file.read_bytes())
    added = client.post(f"/api/drops/{drop}").json()["added"]
    assert len(added) == 1 and client.get(f"/api/studies/{added[0]}").json()["shape"] == [30, 64, 64]
    drop = client.post("/api/drops").json()["drop"]
    client.put(f"/api/drops/{drop}", params={"name": "notes.txt"}, content=b"not an image")
    (number,) = client.post(f"/api/drops/{drop}").json()["added"]
    answer = client.get(f"/api/studies/{number}")
    assert answer.status_code == 422 and "dropped: notes.txt" in answer.json()["error"] and "medvl-view-" not in answer.text


def test_more_than_is_taken_is_refused_said_or_not(client: TestClient) -> None:
    drop = client.post("/api/drops").json()["drop"]
    assert client.put(f"/api/drops/{drop}", params={"name": "a"}, content=b"x" * 100_001).status_code == 413
    unsaid = client.put(f"/api/drops/{drop}", params={"name": "b"}, content=(b"x" * 20_000 for _ in range(6)))
    assert unsaid.status_code == 413 and "max-upload" in unsaid.json()["error"]
    assert not list(client.studies.drop(drop).folder.iterdir())  # type: ignore[attr-defined]
    assert client.put("/api/drops/77", params={"name": "a"}, content=b"x").status_code == 404


# --- the command ----------------------------------------------------------------------------------------------------------------


def test_the_command_says_what_is_missing(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*words: str) -> Any:
        return CliRunner().invoke(cli, ["view", *words])

    none = run(str(tmp_path / "none.dcm"), "--model", str(tiny.model))
    assert none.exit_code == 2 and "no such file or folder" in none.output
    assert run(str(tiny.dicom), "--model", str(tmp_path)).exit_code == 2
    assert run(str(tiny.dicom), "--model", str(tiny.model), "--phrase", " ").exit_code == 2
    from tasks.commands.view import short_names

    assert short_names([Path("/a/one/model"), Path("/a/two/model")]) == ["one/model", "two/model"]
    assert short_names([Path("/a/one"), Path("/a/two")]) == ["one", "two"]
    monkeypatch.setitem(sys.modules, "starlette", None)
    bare = run(str(tiny.dicom), "--model", str(tiny.model))
    assert bare.exit_code == 2 and "pip install 'medvl[view]'" in bare.output


def test_it_serves_until_interrupted_and_leaves_nothing(tiny: Any, tmp_path: Path) -> None:
    import httpx

    words = [sys.executable, "-m", "medvl", "view", str(tiny.folder), "--model", str(tiny.model), "--device", "cpu", "--no-browser"]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    running = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert running.stdout is not None and running.stderr is not None
        address = running.stdout.readline().split()[1]
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=[\w-]{40,}", address)
        with httpx.Client(trust_env=False) as asking:
            assert asking.get(address).status_code == 200 and len(asking.get(address.split("?")[0] + "api/state").json()["studies"]) > 20
        assert list(tmp_path.glob("medvl-view-*"))
        running.send_signal(signal.SIGINT)
        out, error = running.communicate(timeout=20)
    finally:
        running.kill()
    assert running.returncode == 0 and "ended" in out and "Traceback" not in error and "GET" not in out + error
    assert not list(tmp_path.glob("medvl-view-*"))


# --- in a browser ---------------------------------------------------------------------------------------------------------------

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)


def in_browser(test: Any) -> Any:
    """A test that starts a browser: with the slow ones, and only where there is a browser."""
    return pytest.mark.slow(pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")(test))


SWITCHES = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="the page's tests need the extra 'test'")
    with playwright.sync_playwright() as started:
        made = started.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        yield made
        made.close()


def until(page: Any, condition: str) -> None:
    """Wait for a condition in the page; Playwright's own way of waiting is one that the page's policy forbids."""
    end = time.monotonic() + 30
    while not page.evaluate(condition):
        assert time.monotonic() < end, f"never came: {condition}; the page says {page.locator('#status').text_content()}"
        page.wait_for_timeout(30)


class Visit:
    """A page, what it asked for and what it complained of."""

    def __init__(self, browser: Any, address: str, width: int = 1000, height: int = 800) -> None:
        self.page = browser.new_page(viewport={"width": width, "height": height}, color_scheme="dark")
        self.asked: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda message: self.complaints.append(message.text) if message.type in ("error", "warning") else None)
        self.page.set_default_timeout(30_000)
        self.page.goto(address)
        until(self.page, "medvl.app.info || !medvl.app.panels[0].failure.hidden")

    def look_for(self, phrase: str, panel: int = 0) -> None:
        self.page.fill(f"#phrase-{panel}", phrase)
        until(
            self.page,
            f"medvl.app.panels[{panel}].found?.what === {json.dumps(' '.join(phrase.split()))} && medvl.app.panels[{panel}].busy.hidden",
        )

    def canvas(self, panel: int = 0) -> Any:
        """(rows, columns, 3) of what the canvas shows."""
        self.page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        picture = self.page.locator(".stage canvas").nth(panel).screenshot()
        return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).astype(int)

    def check(self) -> None:
        """Nothing was asked of any other machine, and nothing went wrong or was refused by the page's policy."""
        assert all(re.match(r"http://127\.0\.0\.1:\d+/|file:///|blob:|data:", address) for address in self.asked)
        ours = [one for one in self.complaints if "GPU stall" not in one and "status of 422" not in one]
        assert not ours


def coloured(pixels: Any) -> Any:
    """(row, column) of the middle of what has the map's colours: red well above green or blue."""
    found = np.argwhere(pixels.max(2) - pixels.min(2) > 60)
    assert len(found) > 20, "no map is seen"
    return found.mean(0)


@pytest.fixture
def served(files: Path) -> Iterator[Any]:
    """Serves a path on a port of its own; gives the address."""
    import uvicorn

    ends: list[Any] = []

    def start(path: Path, *models: ViewModel, phrases: tuple[str, ...] = (), max_upload: int = 10**6) -> str:
        viewer = Viewer(models or [bright_model()])
        studies = Studies([model.encoder.reader for model in viewer.models], path, max_upload)
        studies.__enter__()
        listening = socket.create_server(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        app = make_app(viewer, studies, token=TOKEN, port=port, phrases=phrases)
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        ends.append((server, thread, studies))
        return f"http://127.0.0.1:{port}/?token={TOKEN}"

    yield start
    for server, thread, studies in ends:
        server.should_exit = True
        thread.join(10)
        studies.__exit__(None, None, None)


@in_browser
def test_the_map_of_a_radiograph_lies_on_the_bright_square(browser: Any, served: Any, files: Path) -> None:
    visit = Visit(browser, served(files / "film.dcm"))
    page = visit.page
    visit.look_for("bright")
    pixels = visit.canvas()
    rows, columns = pixels.shape[:2]
    scale = min(rows / 300, columns / 200)
    expected = (rows / 2 + (59.5 - 149.5) * scale, columns / 2 + (49.5 - 99.5) * scale)
    assert coloured(pixels) == pytest.approx(expected, abs=5 * scale)
    assert page.locator(".side").all_text_contents() == ["R", "L", "H", "F"]
    assert "the patient's right" in page.locator("#status").text_content()
    assert "token" not in page.url and page.locator("#notice").is_visible()
    page.locator("#opacity").fill("0")
    page.wait_for_timeout(100)
    with pytest.raises(AssertionError, match="no map"):
        coloured(visit.canvas())
    visit.check()
    page.close()


@in_browser
def test_a_picture_without_orientation_has_no_marks(browser: Any, served: Any, files: Path) -> None:
    visit = Visit(browser, served(files / "picture.png"))
    assert visit.page.locator(".side").all_text_contents() == ["", "", "", ""]
    assert visit.page.evaluate("medvl.app.panels[0].nv.opts.isOrientationTextVisible") is False
    visit.check()
    visit.page.close()


@in_browser
def test_a_large_ct_shows_the_map_where_the_cube_is_and_goes_to_its_slice(browser: Any, served: Any, tmp_path: Path) -> None:
    volume = np.full((300, 512, 512), -900, np.int16)
    volume[220:260, 300:380, 100:180] = 900
    write_nifti(tmp_path / "large.nii.gz", volume, affine_of((1.2, 0.7, 0.7), (180, 180, -400)))
    visit = Visit(browser, served(tmp_path / "large.nii.gz"))
    page = visit.page
    visit.look_for("bright")
    page.get_by_role("button", name="Strongest slice").click()
    page.keyboard.press("x")
    page.get_by_role("button", name="Axial").click()
    slice_number = int(page.locator(".bar").get_attribute("aria-valuenow") or 0)
    assert 220 <= slice_number <= 260
    pixels = visit.canvas()
    rows, columns = pixels.shape[:2]
    scale = min(rows, columns) / 512  # the patient's right at the viewer's left, the front up: as the columns and rows run
    assert coloured(pixels) == pytest.approx((rows / 2 + (339.5 - 255.5) * scale, columns / 2 + (139.5 - 255.5) * scale), abs=12 * scale)
    visit.look_for("dark")
    moved = coloured(visit.canvas())
    assert np.abs(moved - coloured(pixels)).max() > 20
    assert "mm" in page.locator("#status").text_content()
    visit.check()
    page.close()


@in_browser
def test_a_script_in_a_phrase_is_text(browser: Any, served: Any, files: Path, tmp_path: Path) -> None:
    shutil.copy(files / "picture.png", tmp_path / "<img src=x onerror=window.hacked=3>.png")
    visit = Visit(browser, served(tmp_path, phrases=(EVIL,)))
    visit.look_for(EVIL + " again")
    page = visit.page
    page.wait_for_timeout(200)
    assert page.evaluate("window.hacked") is None and page.locator("img").count() == 0
    assert EVIL in page.locator("#status").text_content()
    assert "<img src=x" in page.locator("#study-name").text_content()
    visit.check()
    page.close()


@in_browser
def test_two_models_stand_side_by_side_and_move_together(browser: Any, served: Any, files: Path) -> None:
    visit = Visit(browser, served(files / "volume.nii.gz", bright_model(name="one"), bright_model(slices=True, name="two")))
    page = visit.page
    visit.look_for("bright")
    page.keyboard.press("Escape")
    page.keyboard.press("c")
    until(page, "medvl.app.panels[1]?.found")
    assert page.locator("#findings thead th").all_text_contents() == ["finding", "one", "two"]
    page.keyboard.press("g")
    page.keyboard.press("1")
    page.keyboard.press("x")
    left, right = (coloured(visit.canvas(panel)) for panel in (0, 1))
    assert left == pytest.approx(right, abs=6)
    before = [int(bar.get_attribute("aria-valuenow") or 0) for bar in page.locator(".bar").all()]
    page.locator(".bar").first.focus()
    page.keyboard.press("ArrowRight")
    after = [int(bar.get_attribute("aria-valuenow") or 0) for bar in page.locator(".bar").all()]
    assert before[0] == before[1] and after == [before[0] + 1, before[1] + 1]
    page.get_by_role("button", name="lung nodule").click()
    until(page, "medvl.app.panels.every((panel) => panel.found?.kind === 'finding')")
    page.keyboard.press("c")
    assert page.locator(".panel").count() == 1
    visit.check()
    page.close()


@in_browser
def test_keys_help_theme_and_windows(browser: Any, served: Any, files: Path) -> None:
    visit = Visit(browser, served(files / "series"))
    page = visit.page
    page.keyboard.press("?")
    assert page.get_by_role("dialog").is_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("w")
    assert (page.input_value("#level"), page.input_value("#width")) == ("40", "400")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.keyboard.press("t")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != ground
    page.keyboard.press("5")
    assert page.get_by_role("button", name="3D").get_attribute("aria-pressed") == "true"
    page.keyboard.press("4")
    assert (page.input_value("#level"), page.input_value("#width")) == ("40", "400")
    page.keyboard.press("/")
    page.keyboard.type("gc?")  # letters in the phrase are no keys
    assert page.input_value("#phrase-0") == "gc?" and not page.get_by_role("dialog").is_visible()
    for selector in ("button", "input", "select", "canvas[tabindex]"):
        for element in page.locator(f"{selector}:visible").all():
            name = element.evaluate(
                "(e) => e.getAttribute('aria-label') || e.textContent.trim() || e.labels?.[0]?.textContent.trim() || ''"
            )
            assert name, element.evaluate("(e) => e.outerHTML")
    visit.check()
    page.close()


@in_browser
def test_a_folder_is_listed_broken_files_are_told_and_files_can_be_opened(browser: Any, served: Any, files: Path) -> None:
    visit = Visit(browser, served(files, max_upload=50_000), width=390, height=800)
    page = visit.page
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.wait_for_selector("#studies .error")
    page.get_by_role("button", name="broken.dcm").click()
    until(page, "!medvl.app.panels[0].failure.hidden")
    assert "broken.dcm" in page.locator(".failure").text_content()
    page.get_by_role("button", name="picture.png").click()
    until(page, "medvl.app.info")
    assert page.locator(".failure").is_hidden()
    page.set_input_files("#file", str(files / "picture.png"))
    page.get_by_role("button", name="dropped: picture.png").wait_for()
    large = [{"name": "large.png", "mimeType": "image/png", "buffer": b"x" * 50_001}]
    page.set_input_files("#file", large)
    until(page, "document.getElementById('status').textContent.startsWith('Not opened')")
    visit.check()
    page.close()


@in_browser
def test_an_exported_page_opens_from_disk(browser: Any, tiny: Any, tmp_path: Path) -> None:
    folder = tmp_path / "page"
    words = ["view", str(tiny.dicom), "--model", str(tiny.model), "--device", "cpu", "--export", str(folder)]
    words += ["--phrase", "small nodule", "--phrase", "effusion"]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0 and "index.html" in done.output and "not for diagnosis" in done.output, done.output
    assert not any(b"Secret" in file.read_bytes() or b"SECRET" in file.read_bytes() for file in folder.iterdir())
    visit = Visit(browser, (folder / "index.html").as_uri())
    page = visit.page
    until(page, "medvl.app.panels[0].found?.what === 'small nodule'")
    until(page, "medvl.app.panels[1].found?.what === 'effusion'")
    for panel in (0, 1):
        coloured(visit.canvas(panel))
    page.locator("#phrase-0").focus()
    page.get_by_role("button", name="cardiomegaly").click()
    until(page, "medvl.app.panels[0].found?.what === 'cardiomegaly'")
    page.fill("#phrase-0", "something else")
    until(page, "document.getElementById('status').textContent.includes('its phrases are: small nodule; effusion')")
    assert page.locator("#drop-box").is_hidden()
    visit.check()
    page.close()


@in_browser
def test_without_the_token_a_browser_sees_nothing(browser: Any, served: Any, files: Path) -> None:
    page = browser.new_page()
    answer = page.goto(served(files / "film.dcm").split("?")[0])
    assert answer.status == 403 and "token" in page.content()
    page.close()
