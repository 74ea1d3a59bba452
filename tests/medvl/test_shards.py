"""Shards: what comes out is what the reader gave, whatever is damaged is said, and a training that streams is one that reads files."""

import csv
import pickle
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file

pytest.importorskip("litdata", reason="shards need the extra 'streaming'")

from medvl.data.manifest import read_manifest
from medvl.data.shards import SAMPLES, ShardStore, write_shards
from medvl.data.studies import ShardBatches
from medvl.training.cli import run
from medvl.types import UnreadableImageError
from modalities.xray.reader import XrayReader
from tasks.cli import cli
from tasks.demo import recipe_path

READER = XrayReader(size=128)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """40 films, one of which is no image."""
    root = tmp_path_factory.mktemp("films")
    rng = np.random.default_rng(0)
    with (root / "manifest.csv").open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["study_id", "patient_id", "modality", "path", "view", "split", "findings"])
        for i in range(40):
            Image.fromarray(rng.integers(0, 255, (70, 60), dtype=np.uint8)).save(root / f"{i}.png")
            said = ["No lung nodule.", "There is a nodule in the right lung.", "There is an effusion."][i % 3]
            lines.writerow([f"s{i}", f"p{i}", "xray", f"{i}.png", "PA", "train" if i < 34 else "val", f"{said} Film {i}."])
    (root / "7.png").write_bytes(b"no image")
    return root / "manifest.csv"


@pytest.fixture(scope="module")
def shards(table, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards") / "of"
    rows = read_manifest(table).rows
    rejected = write_shards(READER, rows, table.parent, out, shard_mib=1, seed=1)
    assert [(one.study_id, one.row) for one in rejected] == [("s7", 9)]
    return out


def test_every_image_comes_back_to_the_bit(table, shards):
    store = ShardStore(str(shards)).under(table.parent)
    rows = read_manifest(table).rows
    assert 1 < len({store.shard(row.path) for row in rows if row.study_id != "s7"}) < 39
    for row in rows[::-1]:
        if row.study_id == "s7":
            with pytest.raises(UnreadableImageError, match="could not be read when the shards were written"):
                store.read(READER, row.path)
            continue
        found, expected = store.read(READER, row.path), READER.read(row.path)
        assert torch.equal(found.pixels, expected.pixels) and torch.equal(found.valid, expected.valid)
        assert found.transform == expected.transform and found.view == expected.view
    again = pickle.loads(pickle.dumps(store))  # as a loader process gets it
    assert torch.equal(again.read(READER, rows[3].path).pixels, READER.read(rows[3].path).pixels)


def test_what_does_not_fit_is_said(table, shards, tmp_path):
    store, rows = ShardStore(str(shards)).under(table.parent), read_manifest(table).rows
    with pytest.raises(ValueError, match="another reader"):
        store.read(XrayReader(size=64), rows[0].path)
    with pytest.raises(UnreadableImageError, match="not among the shards"):
        store.known(READER, table.parent / "99.png")
    with pytest.raises(FileNotFoundError, match="medvl shards"):
        ShardStore(str(tmp_path))
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    index = (copy / "index.json").read_text()
    (copy / "index.json").write_text(index.replace('["bytes"]', '["pickle"]'))
    with pytest.raises(ValueError, match="another format"):
        ShardStore(str(copy))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(FileExistsError, match="holds no shards"):
        write_shards(READER, rows, table.parent, tmp_path / "mine")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy", "mine"]


def _whole(store, path):
    """Whether an image comes back as it is; if not, the error says which."""
    try:
        return torch.equal(store.read(READER, path).pixels, READER.read(path).pixels)
    except UnreadableImageError as error:
        assert "is damaged" in str(error) and str(path) in str(error)
        return False


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_damaged_shard_costs_the_images_in_it_and_says_so(table, shards, tmp_path, damage):
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    store, rows = ShardStore(str(copy)).under(table.parent), [row for row in read_manifest(table).rows if row.study_id != "s7"]
    chunk = sorted(copy.glob("chunk-*.bin"), key=lambda path: int(path.stem.split("-")[-1]))[0]
    content = bytearray(chunk.read_bytes())
    if damage == "flip":
        for place in range(len(content) // 4, len(content), 997):
            content[place] ^= 0x55
        chunk.write_bytes(content)
    else:
        chunk.write_bytes(content[: len(content) // 3])
    outcomes = []
    for row in rows:
        whole = _whole(store, row.path)
        assert whole or store.shard(row.path) == 0
        outcomes.append(whole)
    assert any(outcomes) and not all(outcomes)


def test_the_order_holds_so_many_shards_at_a_time():
    shards = np.repeat(np.arange(10), 12)
    plan = ShardBatches(shards, 3, 6, seed=2)
    order = plan.order()
    assert sorted(order.tolist()) == list(range(120))
    for start in range(0, 120, 36):
        assert len(set(shards[order[start : start + 36]])) <= 3
    first = shards[order[:36]]
    assert len(set(first[:12])) == 3  # mixed, not one after the other
    other = ShardBatches(shards, 3, 6, seed=2)
    other.set_epoch(1)
    assert not np.array_equal(order, other.order())
    batches = list(plan)
    again = ShardBatches(shards, 3, 6, seed=2)
    again.start = 5
    assert list(again) == batches[5:]


def test_a_training_that_streams_is_one_that_reads_files_in_that_order(table, tmp_path):
    """The command, a fit without the films, and the same fit from the films with the order of the shards."""
    args = [
        "--config",
        str(recipe_path("xray_phantom.yaml")),
        "--manifest",
        str(table),
        "--out",
        str(tmp_path / "shards"),
        "--shard-mib",
        "1",
    ]
    done = CliRunner().invoke(cli, ["shards", *args])
    assert done.exit_code == 1 and "39 images" in done.output, done.output
    assert "7.png" in (tmp_path / "shards" / "rejected.csv").read_text()
    away = tmp_path / "away"
    away.mkdir()
    shutil.copy(table, away)  # the table alone
    for i in range(40):
        (away / f"{i}.png").write_bytes(b"gone")
    recipe = ["--config", str(recipe_path("xray_phantom.yaml")), "--trainer.max_epochs", "2", "--trainer.enable_progress_bar", "false"]
    recipe += [
        "--model.image.init_args.widths",
        "[8, 8, 8]",
        "--model.image.init_args.blocks",
        "[1, 1, 1]",
        "--data.init_args.batch_size",
        "8",
    ]
    streamed = [
        "--data.init_args.cache",
        "medvl.data.shards.ShardStore",
        "--data.init_args.cache.init_args.folder",
        str(tmp_path / "shards"),
    ]
    assert run("fit", [*recipe, *streamed, "--data.init_args.manifest", str(away / "manifest.csv"), "--out", str(tmp_path / "one")]) == 1
    assert run("fit", [*recipe, *streamed, "--data.init_args.manifest", str(table), "--out", str(tmp_path / "two")]) == 1
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert "s7" in (tmp_path / "one" / "rejected.csv").read_text()
    assert (tmp_path / "shards" / SAMPLES).is_file()
