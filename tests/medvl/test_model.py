"""The dual encoder on disk: what comes back is what went in, and a config from elsewhere runs no code."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import medvl
from medvl.model import CONFIG, WEIGHTS, ConfigError, DualEncoder, build, load, write_atomically
from medvl.nn.similarity import PooledSimilarity, TokenSimilarity
from medvl.types import Configurable, ImageEncoder, Similarity
from modalities.xray.conv import ConvEncoder
from modalities.xray.reader import XrayReader
from reports.towers import MiniLmReportEncoder


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    image = ConvEncoder(embed_dim=16, widths=(8, 8, 8), blocks=(1, 1, 1))
    return DualEncoder(image, MiniLmReportEncoder(embed_dim=16, hidden_dim=32), TokenSimilarity(), XrayReader(size=32)).eval()


@pytest.fixture
def saved(model, tmp_path):
    return model.save(tmp_path / "run", recipe="test")


def edit(folder: Path, change):
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def test_what_is_loaded_gives_the_same_answers(model, saved):
    again = medvl.load(saved, device="cpu")
    assert not again.training
    assert again.spec() == model.spec()
    picture = np.random.default_rng(0).random((40, 30), dtype=np.float32)
    for dual in (model, again):
        assert dual.encode_image(picture).pooled.shape == (1, 16)
    texts = ["There is a small left pleural effusion.", "No pneumothorax."]
    scores = [dual.similarity(dual.encode_image([picture, 1 - picture]), dual.encode_text(texts)) for dual in (model, again)]
    assert scores[0].shape == (2, 2)
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=0)


def test_config_carries_the_notice_provenance_and_the_hash_of_the_weights(saved):
    import hashlib

    config = json.loads((saved / CONFIG).read_text())
    assert config["notice"] == "research use, not for diagnosis"
    assert config["provenance"] == {"recipe": "test"}
    assert config["weights_sha256"] == hashlib.sha256((saved / WEIGHTS).read_bytes()).hexdigest()


def test_batches_do_not_change_the_features(model):
    pictures = [np.random.default_rng(i).random((32, 32), dtype=np.float32) for i in range(5)]
    torch.testing.assert_close(
        model.encode_image(pictures, batch_size=2).pooled, model.encode_image(pictures, batch_size=5).pooled, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("os.system", "outside the trusted packages"),
        ("subprocess.Popen", "outside the trusted packages"),
        ("builtins.eval", "outside the trusted packages"),
        ("medvl_evil.Tower", "outside the trusted packages"),
        ("medvl.model.load", "is no ImageEncoder"),
        ("medvl.nn.similarity.PooledSimilarity", "is no ImageEncoder"),
        ("modalities.xray.conv.torch.nn.Linear", "names nothing"),
        ("modalities.no_such.Tower", "names nothing"),
        ("Tower", "outside the trusted packages"),
    ],
)
def test_a_config_from_elsewhere_runs_no_code(saved, path, why):
    edit(saved, lambda c: c["model"]["image"].update(class_path=path))
    with pytest.raises(ConfigError, match=why):
        load(saved)


def test_a_module_outside_our_packages_is_not_even_imported(saved, tmp_path, monkeypatch):
    (tmp_path / "foreign_tower.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    edit(saved, lambda c: c["model"]["image"].update(class_path="foreign_tower.Tower"))
    with pytest.raises(ConfigError, match="outside the trusted packages"):
        load(saved)
    with pytest.raises(SystemExit, match="imported"):
        load(saved, trust=("medvl", "modalities", "reports", "foreign_tower"))


def test_nested_classes_are_checked_too():
    with pytest.raises(ConfigError, match="outside the trusted packages"):
        build({"class_path": "medvl.nn.similarity.PooledSimilarity", "init_args": {"temperature": {"class_path": "os.getcwd"}}}, Similarity)


def test_faults_of_a_config_are_named(saved):
    with pytest.raises(ConfigError, match=r"does not take the arguments \['depth'\]"):
        load(edit(saved, lambda c: c["model"]["image"].update(init_args={"depth": 3})))
    with pytest.raises(ConfigError, match="format 99"):
        load(edit(saved, lambda c: c.update(format=99)))
    (saved / CONFIG).write_text("[]")
    with pytest.raises(ConfigError, match=r"not a medvl config\.json"):
        load(saved)


def test_weights_that_do_not_belong_are_refused(saved):
    (saved / WEIGHTS).write_bytes((saved / WEIGHTS).read_bytes()[:-8] + b"\0" * 8)
    with pytest.raises(ConfigError, match="sha256 differs"):
        load(saved)
    (saved / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        load(saved)


def test_a_missing_weight_is_refused(saved):
    from hashlib import sha256

    from safetensors.torch import load as from_bytes
    from safetensors.torch import save as to_bytes

    weights = from_bytes((saved / WEIGHTS).read_bytes())
    weights.pop("similarity.sharpness.log")
    blob = to_bytes(weights)
    (saved / WEIGHTS).write_bytes(blob)
    with pytest.raises(ConfigError, match="sharpness"):
        load(edit(saved, lambda c: c.update(weights_sha256=sha256(blob).hexdigest())))


def test_towers_of_different_width_are_refused(model):
    with pytest.raises(ValueError, match="16 dimensions, the report tower in 24"):
        DualEncoder(model.image, MiniLmReportEncoder(embed_dim=24), PooledSimilarity(), model.reader)


def test_configurable_remembers_the_outermost_constructor():
    class Base(Configurable):
        def __init__(self, a: int, b: tuple[int, ...] = (1, 2)) -> None:
            self.a = a

    class Child(Base):
        def __init__(self, c: Path, **kwargs: int) -> None:
            super().__init__(a=5)

    assert Base(3).spec()["init_args"] == {"a": 3, "b": [1, 2]}
    assert Child(Path("x"), more=4).spec()["init_args"] == {"c": "x", "more": 4}
    with pytest.raises(TypeError, match=r"Base\.a is a object"):
        Base(object()).spec()  # type: ignore[arg-type]


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "file"
    write_atomically(target, b"old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(target, b"new")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_importing_medvl_loads_nothing_heavy():
    import subprocess
    import sys

    code = "import sys, medvl; print(sorted(m for m in ('torch', 'numpy', 'transformers', 'lightning') if m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_base_classes_stay_abstract():
    with pytest.raises(TypeError, match="abstract"):
        ImageEncoder()  # type: ignore[abstract]
