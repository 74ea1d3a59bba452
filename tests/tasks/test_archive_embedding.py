"""Sources embedded into shards and merged: the store is that of `index build`, whoever embedded, and however often it was stopped."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

import medvl as package
from reports.sentences import report_sentences
from tasks.archive import embedding
from tasks.archive.embedding import Embedding, Told, parted
from tasks.archive.opening import open_store
from tasks.archive.sources import Candidate
from tasks.cli import cli

SIZE = 8
VECTORS = ("report_vector", "sentence_vectors", "image_vectors")
NAMES = [f"shard-{number:05d}.parquet" for number in range(4)]  # of 26 studies
CPU = ("--accelerator", "cpu", "--devices", "1", "--shard-studies", str(SIZE))


def medvl(*args: Any) -> Result:
    return CliRunner().invoke(cli, [str(one) for one in args])


def told(done: Result, code: int = 0) -> Any:
    assert done.exit_code == code, done.output
    return json.loads(done.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def embed(source: Path, model: Path, out: Path, *more: Any) -> Result:
    return medvl("index", "embed", source, "--model", model, "--out", out, *CPU, "--json", *more)


def merge(store: Path | str, *folders: Path) -> Result:
    return medvl("index", "merge", *folders, "--store", store, "--json")


@pytest.fixture(scope="module")
def shards(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embedded") / "shards"
    done = told(embed(tiny.manifest, tiny.model, folder))
    assert (done["shards"], done["made"], done["studies"], done["rejected"], done["damaged"]) == (4, 4, 26, 0, 0)
    assert done["notice"] == "research use, not for diagnosis"
    return folder


@pytest.fixture(scope="module")
def built(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("built") / "archive.db"
    assert medvl("index", "build", tiny.manifest, "--model", tiny.model, "--store", path).exit_code == 0
    return path


def content(store: Path) -> dict[str, list[tuple[Any, ...]]]:
    """All rows of all tables but those of SQLite's own index, without what is drawn by chance; vectors rounded to what must be equal."""
    with sqlite3.connect(store) as db:
        names = [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'") if not row[0].startswith("words")]
        found = {}
        for name in names:
            columns = [row[1] for row in db.execute(f"PRAGMA table_info({name})")]
            kept = [one for one in columns if (name, one) != ("texts", "digest")]  # keyed by chance
            rows = db.execute(f"SELECT {', '.join(kept)} FROM {name} ORDER BY {', '.join(kept[:2])}").fetchall()
            found[name] = [row for row in rows if name != "meta" or row[0] in ("with_text",)]
    return found


def assert_same(one: Path, other: Path) -> None:
    left, right = content(one), content(other)
    assert left.keys() == right.keys() and len(left["studies"]) > 0
    for name in left:
        if name.endswith("_vectors"):
            assert [row[:2] for row in left[name]] == [row[:2] for row in right[name]] and left[name]
            a, b = (np.array([np.frombuffer(row[2], "<f4") for row in side[name]]) for side in (left, right))
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
        else:
            assert left[name] == right[name], name


def tables(folder: Path) -> dict[str, tuple[pa.Table, Any]]:
    """Of each shard its rows, and what it says of itself but for the embedding that it is of."""
    found = {}
    for path in sorted(folder.glob("*.parquet")):
        table = pq.read_table(path)
        head = json.loads(table.schema.metadata[b"medvl"])
        head.pop("set")
        found[path.name] = (table.replace_schema_metadata(None), head)
    return found


def assert_equal_shards(one: Path, other: Path) -> None:
    left, right = tables(one), tables(other)
    assert list(left) == list(right) == NAMES
    for name, (table, head) in left.items():
        assert head == right[name][1]
        assert table.drop_columns(list(VECTORS)).equals(right[name][0].drop_columns(list(VECTORS)))
        for column in VECTORS:
            for a, b in zip(table[column].to_pylist(), right[name][0][column].to_pylist(), strict=True):
                np.testing.assert_allclose(np.array(a, np.float64), np.array(b, np.float64), rtol=0, atol=1e-6)


def files(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.parquet")}


def test_a_merged_store_is_the_built_one_and_merging_again_changes_nothing(shards: Path, built: Path, tmp_path: Path) -> None:
    store = tmp_path / "new" / "merged.db"
    done = told(merge(store, shards))
    assert (done["added"], done["changed"], done["unchanged"], done["studies"]) == (26, 0, 0, 26)
    assert done["missing"] == done["damaged"] == []
    assert_same(store, built)
    again = told(merge(store, shards))
    assert (again["added"], again["changed"], again["unchanged"]) == (0, 0, 26)
    assert_same(store, built)
    assert medvl("index", "verify", "--store", store).exit_code == 0


def test_building_on_a_merged_store_finds_nothing_to_do(tiny: Any, shards: Path, tmp_path: Path) -> None:
    store = tmp_path / "merged.db"
    merge(store, shards)
    done = told(medvl("index", "build", tiny.manifest, "--model", tiny.model, "--store", store, "--json"))
    assert (done["added"], done["changed"], done["unchanged"]) == (0, 0, 26)


def test_a_shard_has_vectors_of_what_it_says_and_is_its_owners_alone(tiny: Any, shards: Path) -> None:
    model = package.load(tiny.model, device="cpu")
    with tiny.manifest.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["modality"] == "xray"]
    kept = [row for name in NAMES for row in pq.read_table(shards / name).to_pylist()]
    assert [one["study_id"] for one in kept] == [row["study_id"] for row in rows]
    assert [len(pq.read_table(shards / name)) for name in NAMES] == [8, 8, 8, 2]
    for one, row in zip(kept, rows, strict=True):
        sentences = report_sentences(None, row["findings"], row["impression"])
        assert [said["text"] for said in one["sentences"]] == list(sentences) and sentences
        units = model.encode_text(sentences).pooled.double().numpy()
        units /= np.linalg.norm(units, axis=1, keepdims=True)
        np.testing.assert_allclose(one["sentence_vectors"], units, atol=1e-5)
        np.testing.assert_allclose(one["report_vector"], units.mean(0), atol=1e-5)
        (image,) = one["images"]
        assert image["path"] == str(tiny.folder / row["path"]) and image["view"] == "PA"
        pooled = model.encode_image(image["path"]).pooled[0].double().numpy()
        np.testing.assert_allclose(one["image_vectors"][0], pooled / np.linalg.norm(pooled), atol=1e-5)
        assert dict(one["labels"])["lung_nodule"] == int(row["lung_nodule"]) and one["patient_id"] == row["patient_id"]
    assert shards.stat().st_mode & 0o777 == 0o700
    assert {path.name: path.stat().st_mode & 0o777 for path in shards.iterdir()} == dict.fromkeys([*NAMES, "embedding.json"], 0o600)


def test_parts_are_the_same_for_any_number_of_processes(tmp_path: Path) -> None:
    """Each missing part once; rejects belong to the part that was being read, those at the end to a part of their own."""

    def source(reject: Any) -> Any:
        for i in range(20):
            if i in (0, 7):
                reject(f"row {i}", "bad")
            yield Candidate(f"s{i}", f"row {i}")
        reject("row 20", "bad")

    parts = list(parted(source, 5))
    assert [len(part.studies) for part in parts] == [5, 5, 5, 5, 0]
    assert [[place for place, _ in part.rejected] for part in parts] == [["row 0"], ["row 7"], [], [], ["row 20"]]
    for present in (set(), {0, 3}, set(range(5))):
        for world in (1, 2, 3, 7):
            there = {number: Told(number, 5) for number in present}
            shares = []
            for number in range(world):
                of_rank = Embedding(tmp_path, None, source, 5, None, None)  # type: ignore[arg-type]
                shares.append([part.number for part in of_rank._missing(SimpleNamespace(number=number, world=world), there)])  # type: ignore[arg-type]
                assert of_rank._parts == 5
            assert sorted(one for share in shares for one in share) == sorted({*range(5)} - present)
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_stopped_run_goes_on_and_makes_nothing_again(
    tiny: Any, shards: Path, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, store, write = tmp_path / "shards", tmp_path / "a.db", embedding.write_shard

    def full(folder: Path, shard: Any) -> None:
        if shard.number == 2:
            raise OSError(28, "No space left on device")
        write(folder, shard)

    with monkeypatch.context() as patched:
        patched.setattr(embedding, "write_shard", full)
        assert embed(tiny.manifest, tiny.model, out).exit_code == 3
    before = files(out)
    assert list(before) and sorted(before) == NAMES[:2]
    (out / ".shard-00002.parquet.x1.tmp").write_bytes(b"half of it")
    done = merge(store, out)
    assert told(done, 1)["added"] == 16 and "did not come to the end" in done.stderr
    again = told(embed(tiny.manifest, tiny.model, out))
    assert (again["made"], again["shards"], again["studies"]) == (2, 4, 26)
    assert {name: files(out)[name] for name in before} == before and not list(out.glob(".*"))
    assert_equal_shards(out, shards)
    assert told(merge(store, out))["added"] == 10
    assert_same(store, built)
    nothing = files(out)
    assert told(embed(tiny.manifest, tiny.model, out))["made"] == 0 and files(out) == nothing


def test_damaged_and_missing_shards_are_named_and_made_anew(tiny: Any, shards: Path, built: Path, tmp_path: Path) -> None:
    out, store, listed = tmp_path / "shards", tmp_path / "a.db", tmp_path / "rejected.csv"
    shutil.copytree(shards, out)
    cut = (out / NAMES[0]).read_bytes()
    (out / NAMES[0]).write_bytes(cut[: len(cut) // 2])
    (out / NAMES[1]).unlink()
    where = pq.ParquetFile(out / NAMES[2]).metadata.row_group(0)
    vectors = next(c for i in range(where.num_columns) if (c := where.column(i)).path_in_schema.startswith("image_vectors"))
    flipped = bytearray((out / NAMES[2]).read_bytes())
    flipped[vectors.data_page_offset + vectors.total_compressed_size // 2] ^= 1
    (out / NAMES[2]).write_bytes(flipped)
    done = medvl("index", "merge", out, "--store", store, "--rejected", listed, "--json")
    found = told(done, 1)
    assert found["damaged"] == [NAMES[0], NAMES[2]] and found["missing"] == [NAMES[1]] and found["added"] == 2
    assert f"1 of 4 shards are missing: {NAMES[1]}" in done.stderr
    with listed.open(newline="") as file:
        reasons = [row["reason"] for row in csv.DictReader(file)]
    assert len(reasons) == 3 and all(f"{name}: cut short or damaged" in "".join(reasons) for name in (NAMES[0], NAMES[2]))
    assert "on this film" not in done.output + "".join(reasons)
    whole = files(out)[NAMES[3]]
    mended = told(embed(tiny.manifest, tiny.model, out))
    assert (mended["made"], mended["damaged"]) == (3, 2) and files(out)[NAMES[3]] == whole
    assert_equal_shards(out, shards)
    assert told(merge(store, out))["added"] == 24
    left, right = ({row[1:-2] for row in content(path)["studies"]} for path in (store, built))
    assert left == right and len(left) == 26


def test_metadata_that_was_tampered_with_is_damage(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    shutil.copytree(shards, out)
    table = pq.read_table(out / NAMES[0])
    told_of_it = {**table.schema.metadata, b"medvl": table.schema.metadata[b"medvl"].replace(b'"number": 0', b'"number": 1')}
    pq.write_table(table.replace_schema_metadata(told_of_it), out / NAMES[0])
    pq.write_table(table.replace_schema_metadata(None), out / NAMES[1])
    done = merge(tmp_path / "a.db", out)
    assert told(done, 1)["damaged"] == NAMES[:2] and "cut short or damaged" in done.stderr and "no shard of" in done.stderr


def test_shards_of_something_else_are_refused(tiny: Any, other_model: Path, shards: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "shards", tmp_path / "other"
    shutil.copytree(shards, out)
    before = files(out)
    for model, more, said in (
        (other_model, (), "of the model with weights"),
        (tiny.model, ("--split", "test"), "another --split"),
        (tiny.model, ("--no-text",), "another --no-text"),
        (tiny.model, ("--text-policy", "both"), "another --text-policy"),
    ):
        refused = embed(tiny.manifest, model, out, *more)
        assert refused.exit_code == 2 and said in refused.output and "another --out" in " ".join(refused.output.split()), refused.output
    assert files(out) == before
    told(embed(tiny.manifest, other_model, other))
    shutil.copy(other / NAMES[1], out / NAMES[1])
    refused = embed(tiny.manifest, tiny.model, out)
    assert refused.exit_code == 2 and NAMES[1] in refused.output and "another model" in refused.output and NAMES[0] not in refused.output
    done = merge(tmp_path / "a.db", out)
    assert told(done, 1)["damaged"] == [NAMES[1]] and "another model" in done.stderr and told(done, 1)["added"] == 18


def test_a_source_that_changed_is_told_and_its_shard_can_be_made_anew(tiny: Any, tmp_path: Path) -> None:
    studies, out, store = tmp_path / "studies", tmp_path / "shards", tmp_path / "a.db"
    shutil.copytree(tiny.folder, studies)
    manifest = studies / "manifest.csv"
    told(embed(manifest, tiny.model, out))
    told(merge(store, out))
    before = files(out)
    manifest.write_text(manifest.read_text().replace("Number 5 of the list.", "Number five of the list."))
    refused = embed(manifest, tiny.model, out)
    assert refused.exit_code == 2 and NAMES[1] in refused.output and NAMES[0] not in refused.output and "take" in refused.output.lower()
    assert files(out) == before
    (out / NAMES[1]).unlink()
    assert told(embed(manifest, tiny.model, out))["made"] == 1
    done = told(merge(store, out))
    assert (done["added"], done["changed"], done["unchanged"]) == (0, 2, 24)
    manifest.write_text("".join(manifest.read_text().splitlines(keepends=True)[:17]))
    refused = embed(manifest, tiny.model, out)
    assert refused.exit_code == 2 and "the source has no such part" in refused.output


def test_what_cannot_be_used_is_carried_through(tiny: Any, tmp_path: Path) -> None:
    studies, out = tmp_path / "studies", tmp_path / "shards"
    shutil.copytree(tiny.folder, studies)
    (studies / "images" / "s07.png").unlink()
    (studies / "images" / "s09.png").write_bytes(b"no picture")
    lists = [tmp_path / f"{name}.csv" for name in ("build", "embed", "again", "merge")]
    medvl("index", "build", studies / "manifest.csv", "--model", tiny.model, "--store", tmp_path / "b.db", "--rejected", lists[0])
    for path in lists[1:3]:
        assert told(embed(studies / "manifest.csv", tiny.model, out, "--rejected", path), 1)["rejected"] == 2
    done = medvl("index", "merge", out, "--store", tmp_path / "m.db", "--rejected", lists[3], "--json")
    assert told(done, 1)["studies"] == 25 and told(done, 1)["rejected"] == 2
    first, *others = (path.read_text() for path in lists)
    assert first.count("\n") == 3 and "s09.png" in first and all(other == first for other in others)
    assert_same(tmp_path / "m.db", tmp_path / "b.db")


def test_what_no_store_would_take_is_rejected_and_the_rest_goes_on(tiny: Any, tmp_path: Path) -> None:
    films, out = tmp_path / "films", tmp_path / "shards"
    films.mkdir()
    shutil.copy(tiny.png, films / "a.png")
    shutil.copy(tiny.png, os.fsencode(films) + b"/caf\xe9.png")
    done = embed(films, tiny.model, out)
    assert told(done, 1)["studies"] == 1 and "no Unicode text" in done.stderr
    assert told(merge(tmp_path / "a.db", out), 1)["studies"] == 1
    sick, more = tmp_path / "model", tmp_path / "more"
    shutil.copytree(tiny.model, sick)
    weights = load_file(sick / "model.safetensors")
    weights["image.stem.1.0.weight"].fill_(float("nan"))
    save_file(weights, sick / "model.safetensors")
    config = json.loads((sick / "config.json").read_text())
    config["weights_sha256"] = hashlib.sha256((sick / "model.safetensors").read_bytes()).hexdigest()
    (sick / "config.json").write_text(json.dumps(config))
    done = embed(tiny.manifest, sick, more, "--split", "train")
    assert told(done, 1)["rejected"] == 2 and done.stderr.count("a vector with NaN or infinity") == 2
    assert told(merge(tmp_path / "b.db", more), 1)["studies"] == 0


def test_an_empty_source_and_what_is_no_folder_of_shards(tiny: Any, tmp_path: Path) -> None:
    out, store = tmp_path / "shards", tmp_path / "a.db"
    done = told(embed(tiny.manifest, tiny.model, out, "--split", "val"))
    assert (done["shards"], done["studies"]) == (0, 0)
    assert told(merge(store, out))["studies"] == 0
    (tmp_path / "empty").mkdir()
    for folder in ("nowhere", "empty"):
        refused = merge(tmp_path / "b.db", tmp_path / folder)
        assert refused.exit_code == 2 and folder in refused.output and not (tmp_path / "b.db").exists()
    (out / "embedding.json").write_text('{"format": 1}')
    assert merge(store, out).exit_code == 2 and embed(tiny.manifest, tiny.model, out).exit_code == 2
    refused = embed(tiny.manifest, tiny.model, tmp_path / "more", "--strategy", "nosuch")
    assert refused.exit_code == 2 and "nosuch" in refused.output


def test_shards_without_a_plan_are_merged_and_it_is_said(shards: Path, built: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    shutil.copytree(shards, out)
    (out / "embedding.json").unlink()
    done = merge(tmp_path / "a.db", out)
    assert told(done, 1)["added"] == 26 and "embedding.json" in done.stderr
    assert_same(tmp_path / "a.db", built)


def test_without_text_no_word_is_in_a_shard(tiny: Any, shards: Path, built: Path, tmp_path: Path) -> None:
    out, store, straight = tmp_path / "shards", tmp_path / "m.db", tmp_path / "b.db"
    told(embed(tiny.manifest, tiny.model, out, "--no-text"))
    assert not any(word in path.read_bytes() for path in out.iterdir() for word in (b"on this film", b"There is", b"cardiomegaly on"))
    for name in NAMES:
        rows = pq.read_table(out / name).to_pylist()
        assert all(not row["sections"] and not row["findings"] and row["sentences"] and row["labels"] for row in rows)
        assert all(len(one["text"]) == 64 and not one["facts"] for row in rows for one in row["sentences"])
    medvl("index", "build", tiny.manifest, "--model", tiny.model, "--store", straight, "--no-text")
    assert told(merge(store, out))["added"] == 26
    assert_same(store, straight)
    again = told(medvl("index", "add", tiny.manifest, "--model", tiny.model, "--store", store, "--json"))
    assert again["unchanged"] == 26
    with_words = tmp_path / "w.db"
    shutil.copy(built, with_words)
    for refused in (merge(with_words, out), merge(tmp_path / "n.db", out, shards)):
        assert refused.exit_code == 2 and "holds no words" in refused.output
    done = medvl("index", "merge", out, shards, "--store", tmp_path / "n.db", "--no-text", "--json")
    assert (told(done)["added"], told(done)["unchanged"]) == (26, 26)


@pytest.mark.slow
def test_postgres_gets_the_same(address: str, shards: Path, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert told(merge(address, shards))["added"] == 26
    assert told(merge(address, shards))["unchanged"] == 26
    stores = open_store(address), open_store(str(built))
    sides = []
    for store in stores:
        rows = list(store.rows())
        numbers = [row.id for row in rows]
        found = store.found(numbers)
        texts = {text for one in found for text, _ in one.sentences}
        facts = store.facts(texts)
        plain = [(one.study_id, one.metadata, one.sections, one.findings, one.labels, one.images) for one in found]
        said = [[(words, facts[text]) for text, words in one.sentences] for one in found]
        vectors = {}
        for kind in ("report", "sentence", "image"):
            known = dict(store.vectors(1, kind))
            of_study: dict[int, list[bytes]] = {}
            for study, owner in store.owners(kind):
                of_study.setdefault(study, []).append(known[owner])
            vectors[kind] = [np.frombuffer(b"".join(of_study[number]), "<f4") for number in numbers]
        digests = {name: kept.digest for name, kept in store.kept([row.metadata[0] for row in rows]).items()}
        sides.append((plain, said, digests, [row.text_digest for row in rows], store.counts(), store.models(), vectors))
        store.close()
    assert sides[0][:-1] == sides[1][:-1] and len(sides[0][0]) == 26
    for kind, rows in sides[0][-1].items():
        for a, b in zip(rows, sides[1][-1][kind], strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


KILLED = """
import os, signal, sys
from tasks.archive import embedding, shards
from tasks.cli import main

write, fsync, written = embedding.write_shard, os.fsync, []

def counted(folder, shard):
    if len(written) == 2:  # half of the third is on the disk
        os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
    write(folder, shard)
    written.append(shard.number)

embedding.write_shard = counted
main()
"""


def started(*args: Any, script: tuple[str, ...] = ("-m", "medvl")) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *script, *map(str, args)]
    return subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
def test_a_killed_process_leaves_whole_shards(tiny: Any, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    args = ("index", "embed", tiny.manifest, "--model", tiny.model, "--out", out, *CPU)
    done = started(*args, script=("-c", KILLED))
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    before = files(out)
    (left,) = out.glob(".shard-00002.parquet.*.tmp")
    assert sorted(before) == NAMES[:2] and left.stat().st_mode & 0o777 == 0o600
    assert told(embed(tiny.manifest, tiny.model, out))["made"] == 2
    assert {name: files(out)[name] for name in before} == before and not list(out.glob(".*"))
    assert_equal_shards(out, shards)


@pytest.mark.slow
def test_two_processes_make_the_shards_of_one_and_one_of_them_speaks(tiny: Any, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    two = ("--accelerator", "cpu", "--devices", "2", "--strategy", "ddp", "--shard-studies", str(SIZE), "--json")
    args = ("index", "embed", tiny.manifest, "--model", tiny.model, "--out", out, *two)
    done = started(*args)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["made"] == 4
    assert_equal_shards(out, shards)
    (out / NAMES[2]).unlink()
    before = files(out)
    done = started(*args)
    assert done.returncode == 0 and json.loads(done.stdout)["made"] == 1, done.stderr[-3000:]
    assert {name: files(out)[name] for name in before} == before
    shutil.copy(out / NAMES[0], out / NAMES[1])
    done = started(*args)
    assert done.returncode == 2 and done.stderr.count(NAMES[1]) == 1 and "named as another" in " ".join(done.stderr.split()), done.stderr
