"""Projectors over frozen towers: features computed once are the tower's own, and a saved run takes files as any other."""

import copy
import json
import logging
from dataclasses import replace

import pytest
import torch
import yaml

import medvl
from medvl.model import DualEncoder
from medvl.nn.features import FeatureStore, Kept, module_sha256
from medvl.nn.projector import ProjectedEncoder
from medvl.nn.similarity import TokenSimilarity
from medvl.types import ImageBatch
from modalities.xray import ConvEncoder, TimmEncoder, XrayReader
from reports import MiniLmReportEncoder


def frozen(seed=0, **options):
    torch.manual_seed(seed)
    return ConvEncoder(embed_dim=12, widths=(4, 8), blocks=(1, 1), **options)


def films(count=5, seed=0, size=32):
    pixels = torch.randn(count, 1, size, size, generator=torch.Generator().manual_seed(seed))
    valid = torch.ones(count, size, size, dtype=torch.bool)
    valid[1, :, :9] = False
    return ImageBatch(pixels, valid)


class Counting:
    """Counts the images that a tower is shown."""

    def __init__(self, tower, monkeypatch):
        self.shown = []
        original = type(tower).forward

        def forward(one, batch):
            if one is tower:
                self.shown.append(len(batch.pixels))
            return original(one, batch)

        monkeypatch.setattr(type(tower), "forward", forward)


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("hidden_dim", [None, 10])
def test_what_it_gives_is_the_projected_features_of_the_frozen_tower(tokens, hidden_dim):
    """Each layer written out, in float64, over what the tower gives by itself."""
    tower, batch = frozen(), films()
    projected = ProjectedEncoder(tower, 6, hidden_dim, tokens=tokens).eval()
    with torch.no_grad():
        got = projected(batch)
        raw = tower.eval()(batch)

    def by_hand(x):
        w = {name: p.detach().double() for name, p in projected.project.named_parameters()}
        x = x.double()
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * w["0.weight"] + w["0.bias"]
        x = x @ w["1.weight"].T + w["1.bias"]
        if hidden_dim is not None:
            x = x * 0.5 * (1 + torch.erf(x / 2**0.5)) @ w["4.weight"].T + w["4.bias"]
        return x.float()

    torch.testing.assert_close(got.pooled, by_hand(raw.pooled), rtol=1e-4, atol=1e-5)
    if tokens:
        torch.testing.assert_close(got.tokens, by_hand(raw.tokens.half()), rtol=1e-3, atol=2e-3)
        assert got.grid == raw.grid
        assert torch.equal(got.token_valid, raw.token_valid)
    else:
        assert got.tokens is None


def test_an_image_is_shown_to_the_tower_once_whatever_stands_beside_it(monkeypatch):
    projected = ProjectedEncoder(frozen(), 6, tokens=True).train()
    counting = Counting(projected.backbone, monkeypatch)
    batch = films()
    first = projected(batch)
    assert counting.shown == [1] * 5
    order = torch.tensor([3, 1, 1, 0])
    again = projected(ImageBatch(batch.pixels[order], batch.valid[order]))
    assert torch.equal(again.pooled, first.pooled[order]) and torch.equal(again.tokens, first.tokens[order])
    assert counting.shown == [1] * 5
    projected(replace(batch, pixels=batch.pixels + 1e-6))
    assert counting.shown == [1] * 10, "a changed image is another image"
    projected(replace(batch, valid=None))
    assert counting.shown == [1] * 15, "and so is one without its mask"


def test_only_the_projector_trains_and_statistics_stay():
    projected = ProjectedEncoder(frozen(drop_rate=0.5), 6, hidden_dim=8).train()
    before = copy.deepcopy(projected.backbone.state_dict())
    assert {name.split(".")[0] for name, p in projected.named_parameters() if p.requires_grad} == {"project"}
    with torch.inference_mode():
        projected.eval()(films())  # as validation does; what it computed serves training
    projected.train()(films()).pooled.square().sum().backward()
    assert all(p.grad is not None for p in projected.project.parameters())
    after = projected.backbone.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_gradients_are_those_of_a_tower_that_computes_anew():
    torch.manual_seed(3)
    kept = ProjectedEncoder(frozen(), 6, hidden_dim=8, tokens=False)
    anew = ProjectedEncoder(frozen(), 6, hidden_dim=8, tokens=False, memory_mib=0)
    anew.load_state_dict(kept.state_dict())
    for tower in (kept, kept, anew):
        tower.zero_grad()
        tower(films()).pooled.square().sum().backward()
    for one, other in zip(kept.project.parameters(), anew.project.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_features_are_kept_on_disk_for_the_same_tower_alone(tmp_path, monkeypatch, caplog):
    first = ProjectedEncoder(frozen(), 6, tokens=True, cache_dir=str(tmp_path), memory_mib=0)
    counting = Counting(first.backbone, monkeypatch)
    expected = first.frozen_features(films())
    assert sum(counting.shown) == 5 and len(list(tmp_path.glob("*/*.safetensors"))) == 5
    first.frozen_features(films())
    assert sum(counting.shown) == 5, "from disk"
    same = ProjectedEncoder(frozen(), 9, tokens=True, cache_dir=str(tmp_path))
    counting = Counting(same.backbone, monkeypatch)
    found = same.frozen_features(films())
    assert not counting.shown
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.pooled, other.pooled) and torch.equal(one.tokens, other.tokens) and torch.equal(one.valid, other.valid)
        assert one.grid == other.grid
    other = ProjectedEncoder(frozen(seed=1), 6, tokens=True, cache_dir=str(tmp_path))
    counting = Counting(other.backbone, monkeypatch)
    other.frozen_features(films())
    assert sum(counting.shown) == 5, "another tower has features of its own"
    other.load_state_dict(first.state_dict())
    other.frozen_features(films())
    assert sum(counting.shown) == 5, "weights that were loaded make it the first tower"
    damaged = sorted(tmp_path.glob("*/*.safetensors"))
    for place in damaged:
        content = bytearray(place.read_bytes())
        content[len(content) // 2] ^= 0x10
        place.write_bytes(bytes(content))
    fresh = ProjectedEncoder(frozen(), 6, tokens=True, cache_dir=str(tmp_path))
    with caplog.at_level(logging.WARNING):
        again = fresh.frozen_features(films())
    assert len([one for one in caplog.records if "damaged" in one.message]) == 5
    assert all(torch.equal(one.pooled, other.pooled) for one, other in zip(again, expected, strict=True))


def test_memory_is_bounded_and_a_full_disk_costs_nothing_but_time(tmp_path, monkeypatch, caplog):
    store = FeatureStore(None, 100)
    for name in "abc":
        store.put(name, Kept(torch.zeros(10)))
    assert store.get("a") is not None and store.get("b") is not None and store.get("c") is None
    full = FeatureStore(tmp_path, 0)

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("medvl.nn.features._save", refuse)
    with caplog.at_level(logging.WARNING):
        full.put("ab", Kept(torch.zeros(10)))
        full.put("cd", Kept(torch.zeros(10)))
    assert [one.message for one in caplog.records if "No space left" in one.message] == [caplog.records[0].message]
    assert full.get("ab") is None


def test_a_volume_is_told_without_its_padding(monkeypatch):
    """CT slices pooled by a tower of our own: the same volume beside a longer one is the same image."""
    from medvl.types import ImageEncoder, ImageFeatures

    class Mean(ImageEncoder):
        embed_dim = 4

        def __init__(self):
            super().__init__()
            self.lift = torch.nn.Linear(1, 4)

        def forward(self, batch):
            return ImageFeatures(self.lift(batch.pixels.mean((2, 3, 4))))

    projected = ProjectedEncoder(Mean(), 3)
    counting = Counting(projected.backbone, monkeypatch)
    pixels = torch.randn(2, 1, 5, 4, 4)
    pixels[0, :, 3:] = 7.0
    valid = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    height = torch.arange(5.0).expand(2, 5)
    both = projected(ImageBatch(pixels, valid, height))
    alone = projected(ImageBatch(pixels[:1, :, :3], valid[:1, :3], height[:1, :3]))
    torch.testing.assert_close(alone.pooled[0], both.pooled[0], rtol=1e-5, atol=1e-6)  # sums over strided and whole memory
    assert len(counting.shown) == 2
    with pytest.raises(ValueError, match="tokens of volumes are not kept"):
        ProjectedEncoder(Mean(), 3, tokens=True)(ImageBatch(pixels, valid, height))


def test_views_of_a_study_are_pooled_over_kept_features():
    from modalities.pooling import MeanPooling
    from modalities.xray import ViewPooledEncoder

    projected = ProjectedEncoder(frozen(), 6, tokens=True)
    studies = ViewPooledEncoder(projected, MeanPooling())
    batch = ImageBatch(films().pixels, view=torch.tensor([0, 2, 1, 0, 2]))
    got = studies.eval()(batch.grouped([2, 1, 2]))
    alone = projected(ImageBatch(batch.pixels)).pooled
    assert len(projected.store.held) == 5, "which study an image is of is no part of it"
    means = torch.stack([alone[:2].mean(0), alone[2], alone[3:].mean(0)])
    torch.testing.assert_close(torch.nn.functional.normalize(got.pooled), torch.nn.functional.normalize(means), atol=1e-5, rtol=1e-4)


def test_a_copy_shares_the_tower_and_has_a_projector_of_its_own():
    projected = ProjectedEncoder(frozen(), 6)
    twin = copy.deepcopy(projected)
    assert twin.backbone is projected.backbone and twin.store is projected.store
    assert twin.project[1].weight is not projected.project[1].weight
    assert module_sha256(twin) == module_sha256(projected)


def test_settings_that_mean_nothing_are_refused(tmp_path):
    for options in ({"embed_dim": 0}, {"hidden_dim": 0}, {"batch_size": 0}, {"memory_mib": -1}):
        with pytest.raises(ValueError, match="must be at least 1"):
            ProjectedEncoder(frozen(), **{"embed_dim": 4, **options})
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be made a folder"):
        ProjectedEncoder(frozen(), 4, cache_dir=str(tmp_path / "file"))


@pytest.mark.parametrize("tokens", [False, True])
def test_a_fit_over_kept_features_gives_a_model_that_takes_files(tiny, tmp_path, monkeypatch, tokens):
    """Each image is seen once, a run over features on disk gives the same weights, and the model that is loaded computes them itself."""
    from safetensors.torch import save_file

    from medvl.training.cli import run

    torch.manual_seed(5)
    pretrained = TimmEncoder("vit_tiny_patch16_224", None, image_size=32)
    save_file(pretrained.backbone.state_dict(), tmp_path / "vit.safetensors")
    backbone = {"name": "vit_tiny_patch16_224", "embed_dim": None, "image_size": 32, "checkpoint": str(tmp_path / "vit.safetensors")}
    table = tiny.manifest.read_text().replace(",test,", ",train,", 14)
    manifest = tiny.folder / f"projector{tokens}.csv"
    manifest.write_text(table)
    recipe = {
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1},
        "model": {
            "image": {
                "class_path": "medvl.nn.projector.ProjectedEncoder",
                "init_args": {
                    "backbone": {"class_path": "modalities.xray.TimmEncoder", "init_args": backbone},
                    "embed_dim": 8,
                    "hidden_dim": 16,
                    "dropout": 0.1,
                    "tokens": tokens,
                    "cache_dir": str(tmp_path / "features"),
                },
            },
            "report": {"class_path": "reports.towers.MiniLmReportEncoder", "init_args": {"embed_dim": 8}},
            "similarity": {"class_path": f"medvl.nn.similarity.{'TokenSimilarity' if tokens else 'PooledSimilarity'}"},
            "loss": {"class_path": "medvl.losses.MultiPositiveInfoNCE"},
        },
        "data": {
            "class_path": "medvl.training.data.StudyDataModule",
            "init_args": {
                "manifest": str(manifest),
                "reader": {"class_path": "modalities.xray.reader.XrayReader", "init_args": {"size": 32}},
                "texts": {"class_path": "reports.text_source.ReportSentences"},
                "batch_size": 5,
            },
        },
        "checkpoint_every": 1,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    shown = []
    original = TimmEncoder.forward
    monkeypatch.setattr(TimmEncoder, "forward", lambda self, batch: shown.append(len(batch.pixels)) or original(self, batch))
    out = tmp_path / "run"
    arguments = ["--config", str(tmp_path / "recipe.yaml"), "--resume", "true"]
    assert run("fit", [*arguments, "--out", str(out)]) in (0, 1)
    assert sum(shown) == len(list((tmp_path / "features").glob("*/*.safetensors"))) > 10, "each image once in two epochs"
    shown.clear()
    assert run("fit", [*arguments, "--out", str(tmp_path / "again")]) in (0, 1)
    assert not shown, "and never in a later run"
    first, second = ((folder / "model.safetensors").read_bytes() for folder in (out, tmp_path / "again"))
    assert first == second
    with pytest.raises(ValueError, match="leave out augment"):
        run("fit", [*arguments, "--out", str(tmp_path / "c"), "--data.init_args.augment", "medvl.data.augment.Augment"])
    (tmp_path / "vit.safetensors").unlink()
    for entry in (tmp_path / "features").glob("*/*"):
        entry.unlink()
    model = medvl.load(out, device="cpu")
    shown.clear()
    got = model.encode_image([tiny.dicom, tiny.png])
    assert sum(shown) == 2 and not model.image.store.keeps
    batch = model.reader.collate([model.read(tiny.dicom), model.read(tiny.png)])
    with torch.no_grad():
        plain = model.image.project(model.image.backbone(batch).pooled)
    torch.testing.assert_close(got.pooled, plain, rtol=1e-4, atol=1e-5)


def test_diagnose_takes_a_raw_file_through_a_saved_projector(tiny, tmp_path):
    from click.testing import CliRunner

    from tasks.cli import cli

    projected = ProjectedEncoder(frozen(), 8, tokens=True, cache_dir=str(tmp_path / "features"))
    DualEncoder(projected, MiniLmReportEncoder(8), TokenSimilarity(), XrayReader(size=32)).save(tmp_path / "model")
    told = CliRunner().invoke(cli, ["diagnose", str(tiny.dicom), "--model", str(tmp_path / "model"), "--device", "cpu", "--json"])
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout)["ok"]
    assert not any((tmp_path / "features").rglob("*.safetensors")), "a model that is loaded keeps nothing"
