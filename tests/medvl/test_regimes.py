"""Regimes of training: stages, rates by depth, averaged weights; what is frozen does not move, and a stopped run goes on exactly."""

import csv
import json
import os
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import LearningRateMonitor
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import medvl
from medvl.training.averaging import Ema, ema_decay, ema_update
from medvl.training.stages import Stage, Stages, frozen_modules, layer_decay_groups, layer_rates, layer_stacks, stage_at, trained_names

STEPS = 8  # of a whole run: 8 training studies, batches of 4, 4 epochs


@pytest.fixture(scope="session")
def table(tmp_path_factory):
    """12 small pictures, bright at the left or the right, and a report that says so."""
    root = tmp_path_factory.mktemp("films")
    rng = np.random.default_rng(0)
    lines = []
    for i in range(12):
        picture = rng.integers(20, 60, (32, 32), dtype=np.uint8)
        picture[10:18, 4 + 16 * (i % 2) : 12 + 16 * (i % 2)] = 230
        Image.fromarray(picture).save(root / f"{i}.png")
        said = f"There is a nodule in the {('right', 'left')[i % 2]} lung. Film {i}."
        lines.append([f"s{i}", f"p{i}", "xray", f"{i}.png", "train" if i < 8 else "val", said])
    with (root / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["study_id", "patient_id", "modality", "path", "split", "findings"], *lines])
    return root / "manifest.csv"


@pytest.fixture
def written(table, tmp_path):
    """Writes a recipe of tiny towers with the callbacks given, and gives its path."""

    def write(*callbacks, **changes):
        recipe = {
            "trainer": {"max_epochs": 4, "accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1},
            "model": {
                "image": {
                    "class_path": "modalities.xray.conv.ConvEncoder",
                    "init_args": {"embed_dim": 8, "widths": [4, 4], "blocks": [1, 1], "drop_rate": 0.2},
                },
                "report": {"class_path": "reports.towers.MiniLmReportEncoder", "init_args": {"embed_dim": 8, "dropout": 0.2}},
                "similarity": {"class_path": "medvl.nn.similarity.TokenSimilarity"},
                "loss": {"class_path": "medvl.losses.MultiPositiveInfoNCE"},
                "weight_decay": 0.1,
            },
            "data": {
                "class_path": "medvl.training.data.StudyDataModule",
                "init_args": {
                    "manifest": str(table),
                    "reader": {"class_path": "modalities.xray.reader.XrayReader", "init_args": {"size": 32}},
                    "texts": {"class_path": "reports.text_source.ReportSentences"},
                    "batch_size": 4,
                },
            },
            "checkpoint_every": 1,
        }
        recipe["trainer"]["callbacks"] = [{"class_path": path, "init_args": arguments} for path, arguments in callbacks]
        recipe["model"] |= changes
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return path

    return write


@pytest.fixture
def watched(monkeypatch):
    """What there was after every optimiser step of every run of the test: weights, buffers, and which modules were in training mode."""
    seen: list[dict] = []

    def after(self, trainer, module, outputs, batch, batch_idx):
        seen.append(
            {
                "step": trainer.global_step,
                "weights": {name: p.detach().clone() for name, p in module.named_parameters()},
                "buffers": {name: b.clone() for name, b in module.named_buffers()},
                "training": {name for name, one in module.named_modules() if one.training},
            }
        )

    monkeypatch.setattr(LearningRateMonitor, "on_train_batch_end", after)  # every fit has it, after all other callbacks
    return seen


def fit(recipe: Path, out: Path, *options: str) -> dict[str, torch.Tensor]:
    """Weights of the model that the run kept."""
    from medvl.training.cli import run

    assert run("fit", ["--config", str(recipe), "--out", str(out), "--resume", "true", *options]) == 0
    return load_file(out / "model.safetensors")


def fit_with_a_stop(recipe: Path, out: Path, stop_at: int) -> dict[str, torch.Tensor]:
    """The same of a run that is stopped after ``stop_at`` steps and then goes on."""
    from medvl.training.cli import run

    class StopNowError(Exception):
        pass

    original, calls = torch.optim.AdamW.step, {"n": 0}

    def step(self, *args, **kwargs):
        if calls["n"] == stop_at:
            raise StopNowError
        calls["n"] += 1
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        with pytest.raises(StopNowError):
            run("fit", ["--config", str(recipe), "--out", str(out), "--resume", "true"])
    assert torch.load(out / "resume.ckpt", weights_only=True)["global_step"] == stop_at
    return fit(recipe, out)


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


STAGES = (
    "medvl.training.stages.Stages",
    {"stages": [{"epoch": 0, "freeze": ["image.stages"]}, {"step": 3, "train": ["image"], "rate": 0.5}, {"epoch": 3}]},
)


def test_each_stage_trains_what_it_names_and_nothing_else(written, watched, tmp_path):
    """Two steps an epoch: stage 0 takes the steps 1 to 3, stage 1 the steps 4 to 6, stage 2 the steps 7 and 8."""
    fit(written(STAGES), tmp_path / "run")
    assert [one["step"] for one in watched] == list(range(1, STEPS + 1))

    def moved(before, after):
        return {name for name, value in after["weights"].items() if not torch.equal(value, before["weights"][name])}

    steps = [moved(before, after) for before, after in pairwise(watched)]
    frozen_first = {name for name in watched[0]["weights"] if name.startswith("image.stages.")}
    everything = set(watched[0]["weights"])
    expected = [everything - frozen_first] * 2 + [{n for n in everything if n.startswith("image.")}] * 3 + [everything] * 2
    for found, wanted in zip(steps, expected, strict=True):
        assert found <= wanted
        assert {name for name in wanted if name.endswith("weight")} <= found
    still = {name for name in watched[0]["buffers"] if name.startswith("image.stages.")}
    assert still
    for before, after in pairwise(watched[:3]):
        assert all(torch.equal(before["buffers"][name], after["buffers"][name]) for name in still), "statistics of frozen layers stay"
    assert any(not torch.equal(watched[2]["buffers"][name], watched[3]["buffers"][name]) for name in still)
    assert "image.stages.0" not in watched[0]["training"] and "image.stem" in watched[0]["training"]
    assert "report.head" not in watched[4]["training"] and "image.stages.0" in watched[4]["training"]


def test_the_rate_of_a_stage_is_a_factor_on_the_schedule(written, monkeypatch, tmp_path):
    rates = []
    original = torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    fit(written(STAGES), tmp_path / "run", "--model.warmup", "0.5")
    plain = [(i + 1) / 4 if i < 4 else 0.01 + 0.99 * (1 + np.cos(np.pi * (i - 4) / 4)) / 2 for i in range(STEPS)]
    np.testing.assert_allclose(rates, 1e-3 * np.array(plain) * [1, 1, 1, 0.5, 0.5, 0.5, 1, 1], rtol=1e-12)


@pytest.mark.parametrize("stop_at", [2, 3, 5, 6, 7])
def test_a_staged_run_stopped_anywhere_ends_with_the_same_weights(written, tmp_path, stop_at):
    recipe = written(STAGES)
    assert_same(fit_with_a_stop(recipe, tmp_path / "stopped", stop_at), fit(recipe, tmp_path / "whole"))


def test_a_single_stage_is_the_run_without_stages(written, tmp_path):
    plain = fit(written(), tmp_path / "plain")
    assert_same(fit(written(("medvl.training.stages.Stages", {"stages": [{"epoch": 0}]})), tmp_path / "staged"), plain)


@pytest.mark.slow
def test_two_processes_freeze_alike_and_ddp_that_would_wait_is_refused(written, tmp_path):
    """By gloo; what is frozen after it was trained (and has moments) does not move on either rank."""
    stages = {"stages": [{"epoch": 0, "freeze": ["image.stages"]}, {"step": 2, "train": ["report"]}]}
    recipe = written(("medvl.training.stages.Stages", stages), EMA)
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, torch\n"
        "from lightning.pytorch.callbacks import LearningRateMonitor\n"
        "from medvl.training.cli import run\n"
        "def after(self, trainer, module, *_):\n"
        "    weights = {name: p.detach().clone() for name, p in module.named_parameters()}\n"
        "    torch.save(weights, f'{sys.argv[1]}/{trainer.global_step}-{trainer.global_rank}.pt')\n"
        "LearningRateMonitor.on_train_batch_end = after\n"
        "run('fit', sys.argv[2:])\n"
    )
    options = ["--config", str(recipe), "--out", str(tmp_path / "run"), "--trainer.devices", "2", "--data.init_args.batch_size", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(medvl.__file__).parents[1]), *sys.path])}
    command = [sys.executable, str(script), str(tmp_path), *options, "--trainer.strategy"]
    told = subprocess.run([*command, "ddp"], env=environment, capture_output=True, text=True, timeout=120)
    assert told.returncode and "set trainer.strategy to ddp_find_unused_parameters_true" in told.stderr
    subprocess.run([*command, "ddp_find_unused_parameters_true"], env=environment, check=True, capture_output=True, timeout=120)
    steps = [[torch.load(tmp_path / f"{step}-{rank}.pt", weights_only=True) for rank in (0, 1)] for step in range(1, 7)]
    for i, (one, other) in enumerate(steps):
        assert_same(one, other)
        moved = set() if not i else {name for name in one if not torch.equal(one[name], steps[i - 1][0][name])}
        assert all(name.startswith("report.") if i >= 2 else not name.startswith("image.stages.") for name in moved)
        assert moved or not i


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "stages is empty"),
        ([{"epoch": 1}], "expected epoch 0 or step 0"),
        ([{"epoch": 0, "step": 0}], "one of the two"),
        ([{"epoch": 0}, {"epoch": 2}, {"epoch": 2}], "each later than the one before"),
        ([{"epoch": 0, "rate": -1.0}], "rate is -1.0"),
    ],
)
def test_stages_that_mean_nothing_are_refused(stages, message):
    with pytest.raises(ValueError, match=message):
        Stages([Stage(**one) for one in stages])


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"freeze": ["image.bacbone.*"]}, "'image.bacbone.*' names no parameter; names are such as image"),
        ({"train": ["report"]}, "'report' names is frozen by the recipe"),
        ({"freeze": ["*"]}, "nothing is left to train"),
    ],
)
def test_patterns_that_do_nothing_are_refused(written, tmp_path, stage, message):
    recipe = written(("medvl.training.stages.Stages", {"stages": [{"epoch": 0, **stage}]}), locked=["report"])
    with pytest.raises(ValueError, match=message.replace("*", r"\*")):
        fit(recipe, tmp_path / "run")


def test_the_stage_is_the_last_that_has_begun():
    stages = [Stage(epoch=0), Stage(step=10), Stage(epoch=3)]
    assert [stage_at(stages, epoch, step) for epoch, step in ((0, 0), (0, 9), (1, 10), (2, 40), (3, 41), (3, 5))] == [0, 0, 1, 1, 2, 2]


@settings(deadline=None)
@given(st.sets(st.sampled_from(["image.a.weight", "image.ab.bias", "image.b.0.weight", "report.a.weight"])))
def test_a_module_pattern_names_all_in_it_and_nothing_beside_it(names):
    assert trained_names(Stage(epoch=0, train=["image.a"]), names) == names & {"image.a.weight"}
    assert trained_names(Stage(epoch=0, freeze=["image.*"]), names) == names & {"report.a.weight"}
    assert trained_names(Stage(epoch=0, train=["*.weight"], freeze=["report"]), names) == names & {"image.a.weight", "image.b.0.weight"}


def test_frozen_modules_are_the_largest_without_a_trained_parameter():
    inner = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.BatchNorm1d(2))
    model = nn.Sequential(inner, nn.Dropout(), nn.Linear(2, 2))
    inner.requires_grad_(False)
    assert frozen_modules(model) == [inner]
    inner[2].requires_grad_(True)
    assert frozen_modules(model) == [inner[0]]


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_rates_of_a_timm_tower_are_those_of_timm(name):
    """The groups that timm makes, from patterns of names for each family of models; it counts a ViT's last norm to the last block."""
    import timm
    from timm.optim import param_groups_layer_decay

    vit = name.startswith("vit")
    model = timm.create_model(name, num_classes=5 if vit else 0, **({"embed_dim": 24, "depth": 3, "num_heads": 2} if vit else {}))
    names = {id(p): key for key, p in model.named_parameters()}
    if not vit:  # timm's coarse layers are the stages
        matcher = model.group_matcher
        model.group_matcher = lambda coarse=False: matcher(coarse=True)
    theirs = {names[id(p)]: group["lr_scale"] for group in param_groups_layer_decay(model, layer_decay=0.7) for p in group["params"]}
    ours = layer_rates(model, 0.7)
    assert ours.keys() == theirs.keys()
    order = sorted(set(theirs.values()))
    assert {round(v, 9) for v in ours.values()} == {round(0.7 ** (len(order) - 1 - i), 9) for i in range(len(order))}
    differing = {key for key in ours if ours[key] != pytest.approx(theirs[key])}
    assert differing == ({"norm.weight", "norm.bias"} if vit else set())


def test_rates_of_hugging_face_and_open_clip_towers_follow_the_blocks():
    import open_clip
    from transformers import BertConfig, BertModel, Dinov2Config, Dinov2Model

    size = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    bert = layer_rates(BertModel(BertConfig(vocab_size=10, intermediate_size=16, **size)), 0.5)
    assert bert["embeddings.word_embeddings.weight"] == 0.5**4
    assert [bert[f"encoder.layer.{i}.attention.self.query.weight"] for i in range(3)] == [0.125, 0.25, 0.5]
    assert bert["pooler.dense.weight"] == 1
    dino = layer_rates(Dinov2Model(Dinov2Config(image_size=28, patch_size=14, **size)), 0.5)
    assert dino["embeddings.cls_token"] == 0.5**4 and dino["layernorm.weight"] == 1 and Counter(dino.values())[0.25] > 5
    vision = open_clip.model._build_vision_tower(8, {"image_size": 32, "patch_size": 16, "width": 16, "layers": 3, "head_width": 8})
    clip = layer_rates(vision, 0.5)
    assert (
        clip["proj"] == clip["ln_post.weight"] == 1 and clip["class_embedding"] == clip["ln_pre.weight"] == clip["conv1.weight"] == 1 / 16
    )
    assert clip["transformer.resblocks.2.mlp.c_fc.weight"] == 0.5


def test_layers_over_another_tower_come_after_its_blocks():
    from modalities.xray import TimmEncoder
    from modalities.xray.extended import ExtendedEncoder

    small = TimmEncoder("vit_tiny_patch16_224", None, image_size=32)
    small.backbone.blocks = small.backbone.blocks[:3]
    tower = ExtendedEncoder(small, layers=2, heads=4, embed_dim=8)
    assert layer_stacks(tower) == [[f"backbone.backbone.blocks.{i}" for i in range(3)], ["layers.0", "layers.1"]]
    rates = layer_rates(tower, 0.5)
    assert rates["backbone.backbone.blocks.2.mlp.fc1.weight"] == rates["backbone.backbone.norm.weight"] == 0.125
    assert rates["layers.1.norm1.weight"] == 0.5 and rates["project.weight"] == 1


def test_groups_hold_every_trained_parameter_once(tiny):
    from medvl.losses import MultiPositiveInfoNCE
    from medvl.training.module import AlignmentModule

    model = medvl.load(tiny.model)
    module = AlignmentModule(model.image, model.report, model.similarity, MultiPositiveInfoNCE())
    module.image.stem.requires_grad_(False)
    groups = layer_decay_groups(module, 0.5, 1e-3, 0.05)
    held = [p for group in groups for p in group["params"]]
    assert sorted(map(id, held)) == sorted(id(p) for p in module.parameters() if p.requires_grad)
    assert all((group["weight_decay"] > 0) == (p.ndim > 1) for group in groups for p in group["params"])
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert all(rates[id(p)] == 1e-3 for p in module.similarity.parameters())
    assert max(rates.values()) == 1e-3
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    assert len(optimizer.param_groups) == len(groups)
    with pytest.raises(ValueError, match="layer_decay is 0"):
        layer_rates(module.image, 0)
    assert set(layer_rates(nn.Linear(2, 2), 0.5).values()) == {1.0}


EMA = ("medvl.training.averaging.Ema", {"decay": 0.8})


def recursion(values: list[torch.Tensor], decays: list[float]) -> np.ndarray:
    mean = values[0].double().numpy()
    for value, decay in zip(values[1:], decays[1:], strict=True):
        mean = decay * mean + (1 - decay) * value.double().numpy()
    return mean


@pytest.mark.parametrize(
    ("options", "first", "decays"),
    [
        ({"decay": 0.8}, 0, [0.8] * STEPS),
        ({"decay": 0.8, "warmup": True}, 0, [min(0.8, n / (9 + n)) for n in range(1, STEPS + 1)]),
        ({"decay": 0.5, "start_step": 3}, 3, [0.5] * (STEPS - 3)),
    ],
)
def test_the_saved_model_is_the_average_of_the_formula(written, watched, tmp_path, options, first, decays):
    """With the last model kept; integers (hash of the frozen trunk, batch counts) are the last ones."""
    saved = fit(written((EMA[0], options)), tmp_path / "run", "--keep_best", "false")
    for name, value in saved.items():
        steps = [(one["weights"] | one["buffers"])[name] for one in watched[first:]]
        if value.is_floating_point():
            np.testing.assert_allclose(value.numpy(), recursion(steps, decays), rtol=2e-5, atol=2e-7, err_msg=name)
        else:
            assert torch.equal(value, steps[-1])
    assert any(not torch.allclose(saved[name], watched[-1]["weights"][name], atol=1e-5) for name in saved if name in watched[-1]["weights"])


def test_validation_measures_and_keeps_the_average(written, watched, tmp_path):
    """The model that validation chose has the loss that the run noted for it when it is measured again by itself."""
    from medvl.training.cli import run

    out = tmp_path / "run"
    saved = fit(written(EMA), out)
    told = json.loads((out / "config.json").read_text())["provenance"]
    step = told["step"]
    weights = [one["weights"] for one in watched if one["step"] <= step]
    name = "image.stem.1.0.weight"
    np.testing.assert_allclose(saved[name].numpy(), recursion([one[name] for one in weights], [0.8] * step), rtol=2e-5, atol=2e-7)
    measured = {}

    def note(self, trainer, module):
        measured.update({key: float(value) for key, value in trainer.callback_metrics.items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ema, "on_validation_end", note)
        assert run("validate", ["--config", str(out / "config.yaml"), "--out", str(out)]) == 0
    assert measured["val/loss"] == pytest.approx(told["value"], rel=1e-5)


@pytest.mark.parametrize("stop_at", [1, 2, 4, 5])
def test_an_averaged_run_stopped_anywhere_ends_with_the_same_weights(written, tmp_path, stop_at):
    recipe = written(STAGES, (EMA[0], {"decay": 0.8, "warmup": True, "start_step": 1}))
    whole = fit(recipe, tmp_path / "whole")
    assert_same(fit_with_a_stop(recipe, tmp_path / "stopped", stop_at), whole)
    states = [torch.load(tmp_path / name / "resume.ckpt", weights_only=True) for name in ("whole", "stopped")]
    for part in ("state_dict", "current_model_state"):
        assert_same(states[0][part], states[1][part])
    assert states[0]["averaging_state"]["n_averaged"] == STEPS - 1


def adapted(name, **options):
    return {"class_path": "modalities.xray.TimmEncoder", "init_args": {"name": name, "embed_dim": 8, "image_size": 32, **options}}


def test_adapters_are_averaged_and_the_weights_below_keep_every_bit(written, tmp_path):
    """A tower with LoRA under an average and in stages, stopped and resumed; what it is loaded as needs no adapters."""
    lora = {"class_path": "medvl.nn.lora.Lora", "init_args": {"rank": 2}}
    stages = {"stages": [{"epoch": 0, "freeze": ["*.lora_*"]}, {"step": 3}]}
    recipe = written(("medvl.training.stages.Stages", stages), EMA, image=adapted("test_vit.r160_in1k", lora=lora))
    whole = fit(recipe, tmp_path / "whole")
    assert_same(fit_with_a_stop(recipe, tmp_path / "stopped", 4), whole)
    first = torch.load(tmp_path / "stopped" / "resume.ckpt", weights_only=True)
    base = [name for name in first["state_dict"] if ".base_layer." in name]
    assert base and all(torch.equal(first["state_dict"][name], first["current_model_state"][name]) for name in base)
    assert any(value.abs().sum() > 0 for name, value in whole.items() if ".lora_B." in name)
    assert not any(".lora_" in name for name in medvl.load(tmp_path / "whole", device="cpu").image.state_dict())


def test_a_projector_is_averaged_over_a_tower_that_is_shared(written, tmp_path):
    projected = {"backbone": adapted("test_vit.r160_in1k", embed_dim=None), "embed_dim": 8, "dropout": 0.1, "hidden_dim": 8}
    recipe = written(EMA, image={"class_path": "medvl.nn.projector.ProjectedEncoder", "init_args": projected})
    recipe.write_text(recipe.read_text().replace("TokenSimilarity", "PooledSimilarity"))
    assert_same(fit_with_a_stop(recipe, tmp_path / "stopped", 3), fit(recipe, tmp_path / "whole"))


def test_the_average_changes_nothing_of_what_is_trained(written, tmp_path):
    fit(written(), tmp_path / "plain")
    fit(written(EMA), tmp_path / "averaged")
    plain, averaged = (torch.load(tmp_path / name / "resume.ckpt", weights_only=True) for name in ("plain", "averaged"))
    assert_same(averaged["current_model_state"], plain["state_dict"])


@settings(deadline=None)
@given(st.floats(-1e6, 1e6, width=32), st.floats(0, 1, exclude_max=True))
def test_a_weight_that_does_not_move_keeps_every_bit(value, decay):
    weight = torch.tensor([value])
    assert torch.equal(ema_update(weight, weight.clone(), decay), weight)
    assert torch.equal(ema_update(torch.tensor([3]), torch.tensor([5]), decay), torch.tensor([5]))


def test_decays_that_are_none_are_refused():
    assert [ema_decay(n, 0.99, True) for n in (1, 81, 10**6)] == pytest.approx([0.1, 0.9, 0.99])
    for options in ({"decay": 1.0}, {"decay": -0.1}, {"start_step": -1}):
        with pytest.raises(ValueError, match="ema: decay lies in"):
            Ema(**options)
