"""Shards: what comes out is what the reader gave, whatever is damaged is said, and a training that streams is one that reads files."""

import csv
import errno
import pickle
import shutil
import time

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file

pytest.importorskip("litdata", reason="shards need the extra 'streaming'")

from medvl.data.augment import Augment
from medvl.data.cache import CachedReader, settings_of
from medvl.data.manifest import read_manifest
from medvl.data.sampling import ShardBatches
from medvl.data.shards import SAMPLES, ShardStore, write_shards
from medvl.data.studies import StudyDataset
from medvl.training.cli import run
from medvl.training.data import StudyDataModule
from medvl.types import UnreadableImageError
from modalities.xray.reader import XrayReader
from reports.text_source import ReportSentences
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


def test_a_shard_that_is_cut_short_or_missing_is_listed_before_training(table, shards, tmp_path):
    """Image by image with their rows, at once, and without the others."""
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    chunks = sorted(copy.glob("chunk-*.bin"), key=lambda path: int(path.stem.split("-")[-1]))
    chunks[0].write_bytes(chunks[0].read_bytes()[:-1])
    chunks[1].unlink()
    store, rows = ShardStore(str(copy)).under(table.parent), read_manifest(table).select(split="train")
    lost = {row.row for row in rows if row.study_id != "s7" and store.shard(row.path) < 2}
    data = StudyDataset(rows, CachedReader(READER, store), ReportSentences())
    start = time.monotonic()
    data.drop_unreadable()
    assert time.monotonic() - start < 1, "waited for a file that does not come"
    assert {one.row for one in data.skipped} == lost | {9} and 0 < len(lost) < len(rows) - 1
    assert len(data) == len(rows) - len(lost) - 1
    assert {one.reason.partition(": shard ")[2][:1] for one in data.skipped} == {"0", "1", ""}
    assert all(("expected" in one.reason or "is missing" in one.reason) for one in data.skipped if one.row != 9)
    assert torch.equal(data.sample(0).pixels, READER.read(data.images[0].path).pixels)


def test_shards_elsewhere_are_fetched_and_kept_here(table, shards, tmp_path, monkeypatch):
    """By LitData's own way to a folder that is not read in place; what cannot be fetched is not called damaged."""
    there = tmp_path / "there"
    shutil.copytree(shards, there)
    rows = [row for row in read_manifest(table).rows if row.study_id != "s7"]
    store = ShardStore(f"local:{there}").under(table.parent)
    assert all(torch.equal(store.read(READER, row.path).pixels, READER.read(row.path).pixels) for row in rows[:8])
    with pytest.raises(FileNotFoundError, match="expected a folder that `medvl shards` wrote"):
        ShardStore(f"local:{tmp_path / 'nowhere'}")

    class Broken:
        error: Exception = ConnectionError("no route")

        def __getitem__(self, place):
            raise self.error

    broken = Broken()
    monkeypatch.setattr(store, "_items", broken)
    with pytest.raises(UnreadableImageError, match=r"could not be fetched \(ConnectionError\)"):
        store.read(READER, rows[0].path)
    broken.error = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="No space left"):
        store.read(READER, rows[0].path)


@pytest.mark.parametrize("stop_at", [1, 9, 30, 39])
def test_a_stopped_writing_goes_on_and_ends_as_an_undisturbed_one(table, shards, tmp_path, monkeypatch, stop_at):
    """What was noted is not read again; a change of a file or of an option starts anew."""
    monkeypatch.setattr("medvl.data.shards.PART_SHARDS", 1)
    rows, read = read_manifest(table).rows, []

    class Counted(XrayReader):
        def read(self, path):
            read.append(path)
            if len(read) == stop_at:
                raise KeyboardInterrupt
            return super().read(path)

    monkeypatch.setattr("medvl.data.shards.settings_of", lambda reader: settings_of(READER))
    out = tmp_path / "of"
    with pytest.raises(KeyboardInterrupt):
        write_shards(Counted(size=128), rows, table.parent, out, shard_mib=1, seed=1)
    assert not out.exists()
    seen = []
    rejected = write_shards(Counted(size=128), rows, table.parent, out, shard_mib=1, seed=1, progress=lambda: seen.append(1))
    assert len(seen) == 40
    assert len(read) <= 40 + 17  # 16 images of 64 KiB to a shard of a MiB
    assert [one.study_id for one in rejected] == ["s7"]
    assert not list(tmp_path.glob(".of-*")) and not list(out.glob("part-*")) and not (out / "asked.json").exists()
    store, other = (ShardStore(str(folder)).under(table.parent) for folder in (out, shards))
    assert store.places == other.places and store.frontal == other.frontal and store.rejected == other.rejected
    for row in rows:
        if row.study_id != "s7":
            assert torch.equal(store.read(READER, row.path).pixels, READER.read(row.path).pixels)


def test_a_stopped_writing_of_something_else_is_not_taken_up(table, tmp_path, monkeypatch):
    monkeypatch.setattr("medvl.data.shards.PART_SHARDS", 1)
    rows = read_manifest(table).rows

    def stop():
        seen.append(1)
        if len(seen) == 30:
            raise KeyboardInterrupt

    seen = []
    with pytest.raises(KeyboardInterrupt):
        write_shards(READER, rows, table.parent, tmp_path / "of", shard_mib=1, progress=stop)
    assert list((tmp_path / ".of-partial").glob("part-*.json"))
    write_shards(READER, rows, table.parent, tmp_path / "of", shard_mib=1, dtype="float16")
    store = ShardStore(str(tmp_path / "of")).under(table.parent)
    row = rows[0]
    assert torch.equal(store.read(READER, row.path).pixels, READER.read(row.path).pixels.half().float())


@pytest.fixture
def bucket(shards, monkeypatch):
    """The shards in a bucket of a stand-in for S3 on this machine; the place."""
    pytest.importorskip("moto", reason="a stand-in for S3")
    import boto3
    from litdata.streaming import downloader
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any"}
    for name, value in (settings | {"AWS_DEFAULT_REGION": "us-east-1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(getattr(downloader, "_OBSTORE_CLIENT_OPTIONS", {}), "allow_http", True)  # the stand-in has no certificate
    client = boto3.client("s3")
    client.create_bucket(Bucket="medvl-shards")
    for file in shards.iterdir():
        client.upload_file(str(file), "medvl-shards", f"films/{file.name}")
    yield "s3://medvl-shards/films"
    server.stop()


def test_shards_in_object_storage_are_those_on_the_disk(table, bucket):
    rows = [row for row in read_manifest(table).rows if row.study_id != "s7"]
    store = ShardStore(bucket).under(table.parent)
    for row in rows:
        assert torch.equal(store.read(READER, row.path).pixels, READER.read(row.path).pixels)
    with pytest.raises(FileNotFoundError, match="expected a folder that `medvl shards` wrote"):
        ShardStore("s3://medvl-shards/elsewhere")


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_loader_processes(table, shards, workers):
    """Order, texts and pixels, changed by chance and all, from any step on."""

    def batches(workers, start):
        data = StudyDataModule(
            str(table), READER, ReportSentences(), batch_size=8, augment=Augment(), workers=workers, cache=ShardStore(str(shards))
        )
        data.setup()
        data.read_images(("train",))
        loader = data.train_dataloader()
        loader.batch_sampler.epoch, loader.batch_sampler.start = 1, start
        return list(loader)

    alone, others = batches(0, 0), batches(workers, 1)
    assert len(alone) == 4 and len(others) == 3
    for one, other in zip(alone[1:], others, strict=True):
        assert one.rows == other.rows and one.texts == other.texts
        assert torch.equal(one.images.pixels, other.images.pixels) and torch.equal(one.positives, other.positives)


@pytest.mark.parametrize("when", ["chunks", "rename"])
def test_a_full_disk_says_so_and_leaves_the_shards_that_were_there(table, shards, tmp_path, monkeypatch, when):
    from litdata.streaming.writer import BinaryWriter

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    out, rows = tmp_path / "of", read_manifest(table).rows
    shutil.copytree(shards, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(*((BinaryWriter, "write_chunk_to_file") if when == "chunks" else (type(out), "rename")), full)
        with pytest.raises(OSError, match="the disk is full, the shards that were there are as they were"):
            write_shards(READER, rows, table.parent, out, shard_mib=1)
        with pytest.raises(OSError, match="the disk is full, there are no shards; make room and ask again"):
            write_shards(READER, rows, table.parent, tmp_path / "fresh", shard_mib=1)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"of", ".of-partial", ".fresh-partial"}
    write_shards(READER, rows, table.parent, out, shard_mib=1)
    assert {path.name for path in tmp_path.iterdir()} == {"of", ".fresh-partial"}
    write_shards(READER, rows, table.parent, out, shard_mib=1, seed=2)
    assert {path.name for path in tmp_path.iterdir()} == {"of", ".fresh-partial"}
    assert torch.equal(ShardStore(str(out)).under(table.parent).read(READER, rows[0].path).pixels, READER.read(rows[0].path).pixels)


def test_a_damaged_shard_costs_the_images_in_it_and_says_so(table, shards, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    store, rows = ShardStore(str(copy)).under(table.parent), [row for row in read_manifest(table).rows if row.study_id != "s7"]
    chunk = sorted(copy.glob("chunk-*.bin"), key=lambda path: int(path.stem.split("-")[-1]))[0]
    content = bytearray(chunk.read_bytes())
    for place in range(len(content) // 4, len(content), 997):
        content[place] ^= 0x55
    chunk.write_bytes(content)
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
