"""The dual encoder on disk: what comes back is what went in, and a config from elsewhere runs no code."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import medvl
from medvl.files import write_atomically
from medvl.model import CONFIG, WEIGHTS, ConfigError, DualEncoder, build, load
from medvl.nn.similarity import PooledSimilarity, TokenSimilarity
from medvl.types import Configurable, ImageEncoder, Similarity
from modalities.xray.conv import ConvEncoder
from modalities.xray.reader import XrayReader
from modalities.xray.towers import TimmEncoder
from reports.towers import HuggingFaceReportEncoder, MiniLmReportEncoder


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


OFFLINE = """
import json, sys
opened, connected, watching = [], [], False

def watch(event, args):
    if watching and event == "open" and isinstance(args[0], str):
        opened.append(args[0])
    if event in ("socket.connect", "socket.getaddrinfo"):
        connected.append(event)

sys.addaudithook(watch)
import medvl, timm, transformers
run, outside = sys.argv[1:]
watching = True
model = medvl.load(run, device="cpu")
pooled = model.encode_text(["the heart is enlarged", "no effusion"]).pooled.tolist()
print(json.dumps([[path for path in opened if path.startswith(outside) and not path.startswith(run)], connected, pooled]))
"""


def test_a_run_is_all_that_its_model_needs(tiny_bert, tmp_path):
    """Initial weights of both towers are gone, the config says to fetch them; no file beside the run is opened, no network asked."""
    import subprocess
    import sys

    import timm

    torch.manual_seed(0)
    save_file(timm.create_model("resnet18", in_chans=1, num_classes=0).state_dict(), tmp_path / "bb.safetensors")
    image = TimmEncoder("resnet18", embed_dim=8, image_size=32, checkpoint=tmp_path / "bb.safetensors")
    report = HuggingFaceReportEncoder(str(tiny_bert), 8, frozen=False, cache_dir=tmp_path / "cache")
    model = DualEncoder(image, report, PooledSimilarity(), XrayReader(size=32)).eval()
    run = model.save(tmp_path / "run").rename(tmp_path / "moved")
    texts = model.encode_text(["the heart is enlarged", "no effusion"]).pooled
    picture = np.random.default_rng(0).random((40, 30), dtype=np.float32)
    (tmp_path / "bb.safetensors").unlink()
    again = medvl.load(run, device="cpu")
    assert again.spec() == model.spec()
    assert torch.equal(again.encode_image(picture).pooled, model.encode_image(picture).pooled)

    def as_if_published(config):
        config["model"]["image"]["init_args"].update(pretrained=True, checkpoint=None)
        config["model"]["report"]["init_args"]["model"] = "some-lab/some-model"

    edit(run, as_if_published)
    environment = {name: value for name, value in os.environ.items() if "OFFLINE" not in name}
    environment["PYTHONPATH"] = str(Path(medvl.__file__).parents[1])
    command = [sys.executable, "-c", OFFLINE, str(run), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    opened, connected, pooled = json.loads(done.stdout)
    assert (opened, connected) == ([], [])
    torch.testing.assert_close(torch.tensor(pooled), texts, atol=1e-6, rtol=1e-6)

    (run / "report" / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"report/tokenizer\.json is not the file"):
        load(run)
    (run / "report" / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"no report/tokenizer\.json"):
        load(run)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "report/../../secret", "elsewhere/x"])
def test_files_outside_the_folders_of_parts_are_not_opened(saved, name):
    with pytest.raises(ConfigError, match="is not in the folder of a part"):
        load(edit(saved, lambda c: c.update(files={name: "0" * 64})))


def test_files_of_parts_of_parts_stand_in_folders_of_their_own(tmp_path):
    class Leaf(Configurable):
        def __init__(self, word: str) -> None:
            self.word = word

        def files(self):
            return {"word.txt": self.word.encode()}

    class Tree(Configurable):
        def __init__(self, left: Configurable, rest: tuple[Configurable, ...] = ()) -> None:
            pass

    assert Tree(Leaf("a"), (Leaf("b"), Tree(Leaf("c")))).files() == {
        "left/word.txt": b"a",
        "rest/0/word.txt": b"b",
        "rest/1/left/word.txt": b"c",
    }


def test_a_frozen_trunk_that_is_not_here_is_said_to_be_missing(saved):
    spec = {"class_path": "reports.towers.HuggingFaceReportEncoder", "init_args": {"model": "some-lab/never-downloaded", "embed_dim": 16}}
    with pytest.raises(ConfigError, match=r"report: reports.*some-lab/never-downloaded.*downloaded models in .*was not asked.*hf download"):
        load(edit(saved, lambda c: c["model"].update(report=spec)))


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("image", "widths", [-1, 2, 3]),
        ("image", "widths", "wide"),
        ("image", "widths", None),
        ("image", "embed_dim", 1e9),
        ("image", "embed_dim", 10**9),
        ("image", "embed_dim", float("nan")),
        ("image", "embed_dim", 16.5),
        ("image", "embed_dim", 2**20),
        ("image", "blocks", [2**20, 1, 1]),
        ("report", "hidden_dim", 10**6),
        ("reader", "size", 1e7),
        ("reader", "std", 0),
    ],
)
def test_absurd_sizes_are_refused_by_part_and_class_before_memory_is_taken(saved, part, name, value):
    import resource
    import time

    edit(saved, lambda c: c["model"][part]["init_args"].update({name: value}))
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    kind = {"image": "ConvEncoder", "report": "MiniLmReportEncoder", "reader": "XrayReader"}[part]
    with pytest.raises(ConfigError, match=rf"{part}: .*{kind}"):
        load(saved)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kilobytes
    assert time.monotonic() - start < 20


def test_a_truncated_weights_file_is_refused_though_its_hash_was_adapted(saved):
    from hashlib import sha256

    for keep in (4, 100, -1000):
        blob = (saved / WEIGHTS).read_bytes()[:keep]
        (saved / WEIGHTS).write_bytes(blob)
        with pytest.raises(ConfigError, match="no whole safetensors file"):
            load(edit(saved, lambda c, blob=blob: c.update(weights_sha256=sha256(blob).hexdigest())))


def test_what_to_do_about_a_foreign_class_is_said_for_python_and_the_command(saved):
    edit(saved, lambda c: c["model"]["image"].update(class_path="elsewhere.Tower"))
    with pytest.raises(
        ConfigError, match=r"The medvl command takes classes of medvl, modalities, reports only; in Python, .*trust=\(\.\.\.\)"
    ):
        load(saved)


@pytest.mark.parametrize("texts", [[3], ["fine", None], 5, None, b"bytes"])
def test_texts_that_are_no_strings_are_refused(model, texts):
    with pytest.raises(TypeError, match=r"a string or a sequence of strings, but text \d is of type (int|NoneType)"):
        model.encode_text(texts)


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
