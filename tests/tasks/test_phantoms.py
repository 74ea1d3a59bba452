"""Cohorts on disk: the same bytes however they are made, nothing shared between seeds, patients in one split."""

import csv
import json
import os

import numpy as np
import pydicom
import pytest
from PIL import Image

from medvl.data.manifest import read_manifest
from medvl.types import FINDINGS, Fact
from tasks.phantoms import CohortSettings, labels, patient_of, seed_digest, soften, usable_cpus, write_cohort

SIZE = 32


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def rows(manifest):
    with manifest.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    out = tmp_path_factory.mktemp("cohort")
    write_cohort(out, 20, 3, size=SIZE, workers=1)
    return out


def test_the_number_of_workers_changes_no_byte(cohort, tmp_path):
    write_cohort(tmp_path, 20, 3, size=SIZE, workers=2)
    assert contents(tmp_path) == contents(cohort)


def test_a_study_does_not_depend_on_the_size_of_the_cohort(cohort, tmp_path):
    write_cohort(tmp_path, 4, 3, size=SIZE, workers=1)
    small, large = contents(tmp_path), contents(cohort)
    assert all(large[name] == small[name] for name in small if name != "manifest.csv")
    assert sum(name.startswith("xray/") for name in small) == 4


def test_a_stopped_run_goes_on_and_ends_the_same(cohort, tmp_path):
    told = []
    write_cohort(tmp_path, 20, 3, size=SIZE, workers=1)
    victims = sorted((tmp_path / "xray").iterdir())[3:5]
    for victim in victims:
        victim.unlink()
    (tmp_path / "manifest.csv").unlink()
    untouched = sorted((tmp_path / "xray").iterdir())[0]
    before = untouched.stat().st_mtime_ns
    write_cohort(tmp_path, 20, 3, size=SIZE, workers=1, progress=told.append)
    assert contents(tmp_path) == contents(cohort)
    assert told == [18, 1, 1] and untouched.stat().st_mtime_ns == before


def test_seeds_share_nothing(cohort, tmp_path):
    write_cohort(tmp_path, 3, 4, size=SIZE, workers=1)
    ones, others = rows(cohort / "manifest.csv"), rows(tmp_path / "manifest.csv")
    for column in ("study_id", "patient_id", "path"):
        assert not {r[column] for r in ones} & {r[column] for r in others}
    uids = [
        {
            str(ds.get(name))
            for p in (folder / "xray").iterdir()
            for ds in [pydicom.dcmread(p)]
            for name in ("StudyInstanceUID", "SOPInstanceUID", "PatientID")
        }
        for folder in (cohort, tmp_path)
    ]
    assert not uids[0] & uids[1] and len(uids[0]) >= 55
    assert seed_digest(3) in ones[0]["study_id"] and seed_digest(3) in ones[0]["patient_id"]


def test_the_manifest_reads_without_complaint(cohort):
    manifest = read_manifest(cohort / "manifest.csv", check_files=True)
    table = rows(cohort / "manifest.csv")
    assert len(table) == 20 and list(manifest.label_names) == list(FINDINGS)
    for row in table:
        assert row["origin"] == "synthetic" and row["modality"] == "xray" and row["view"] in {"PA", "AP"}
        assert row["findings"] and row["impression"]
        ds = pydicom.dcmread(cohort / row["path"])
        for name in FINDINGS:
            assert row[name] in {"0", "1", "-1"}
            assert bool(row[f"mask_{name}"]) == (row[name] != "0")
            if row[f"mask_{name}"]:
                mask = np.asarray(Image.open(cohort / row[f"mask_{name}"]))
                assert mask.shape == (ds.Rows, ds.Columns) and mask.dtype == np.uint8 and set(np.unique(mask)) <= {0, 255}
                assert mask.any()


def test_patients_keep_to_one_split(cohort):
    table = rows(cohort / "manifest.csv")
    for patient in {r["patient_id"] for r in table}:
        assert len({r["split"] for r in table if r["patient_id"] == patient}) == 1


def test_about_one_patient_in_twenty_has_two_studies():
    studies = 20000
    patients = np.unique([patient_of(9, i) for i in range(studies)], return_counts=True)[1]
    assert np.mean(patients == 2) == pytest.approx(0.053, abs=0.01) and patients.max() == 2


def test_counts_set_the_splits(tmp_path):
    write_cohort(tmp_path, 8, 3, size=SIZE, workers=1, counts={"train": 4, "val": 2, "test": 2})
    assert [r["split"] for r in rows(tmp_path / "manifest.csv")] == ["train"] * 4 + ["val"] * 2 + ["test"] * 2
    with pytest.raises(ValueError, match="add to the 8 studies"):
        write_cohort(tmp_path, 8, 3, size=SIZE, counts={"train": 9})


def test_ct_lateral_and_series_agree(tmp_path):
    write_cohort(tmp_path, 2, 5, size=SIZE, ct=True, ct_series=True, lateral=True, workers=1)
    table = rows(tmp_path / "manifest.csv")
    assert [r["modality"] for r in table] == ["xray", "xray", "ct", "ct"] * 2
    assert {r["view"] for r in table if r["modality"] == "xray"} >= {"lateral"}
    assert all((tmp_path / r["path"]).exists() for r in table)
    assert len(list((tmp_path / table[3]["path"]).glob("*.dcm"))) == SIZE
    read_manifest(tmp_path / "manifest.csv", check_files=True)


def test_another_cohorts_folder_is_refused(cohort):
    with pytest.raises(ValueError, match="another phantom cohort"):
        write_cohort(cohort, 2, 99, size=SIZE, workers=1)
    with pytest.raises(ValueError, match="at least one"):
        write_cohort(cohort, 0, 3, size=SIZE)


def test_an_odd_size_leaves_nothing_behind(tmp_path):
    with pytest.raises(ValueError, match="multiple of 16"):
        write_cohort(tmp_path / "new", 2, 3, size=100)
    assert not (tmp_path / "new").exists()


def test_only_mild_lone_findings_are_softened():
    rng = np.random.default_rng(0)
    mild, severe = Fact("edema", "present", severity="mild"), Fact("cardiomegaly", "present", severity="severe")
    softened = [soften((mild, severe), rng) for _ in range(4000)]
    assert np.mean([facts[0].state == "uncertain" for facts in softened]) == pytest.approx(0.03, abs=0.01)
    assert all(facts[1].state == "present" for facts in softened)
    unsure = next(facts for facts in softened if facts[0].state == "uncertain")
    assert labels(unsure)["edema"] == -1 and labels(unsure)["cardiomegaly"] == 1 and labels(unsure)["lung_nodule"] == 0


def test_workers_are_counted_by_the_cpus_that_this_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 5, 9}, raising=False)
    assert usable_cpus() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_cpus() == 64


def test_a_cohort_of_an_older_generator_is_not_mixed_with_ours(tmp_path):
    write_cohort(tmp_path, 1, 3, size=SIZE, workers=1)
    note = json.loads((tmp_path / "cohort.json").read_text())
    assert note["version"] == CohortSettings("", SIZE, False, False, False).version == 3
    (tmp_path / "cohort.json").write_text(json.dumps({**note, "version": 2}))
    with pytest.raises(ValueError, match="differs in version"):
        write_cohort(tmp_path, 2, 3, size=SIZE, workers=1)


def test_a_cohort_of_ct_alone_has_the_volumes_of_one_with_films(tmp_path):
    both = write_cohort(tmp_path / "both", 2, 9, size=SIZE, ct=True, workers=1)
    alone = write_cohort(tmp_path / "alone", 2, 9, size=SIZE, ct=True, xray=False, workers=1)
    volumes = [row for row in rows(both) if row["modality"] == "ct"]
    assert rows(alone) == volumes and len(volumes) == 2
    assert not (tmp_path / "alone" / "xray").exists()
    for row in volumes:
        assert (tmp_path / "alone" / row["path"]).read_bytes() == (tmp_path / "both" / row["path"]).read_bytes()
    with pytest.raises(ValueError, match=r"needs radiographs .* CT or both"):
        write_cohort(tmp_path / "nothing", 2, 9, size=SIZE, xray=False)
    with pytest.raises(ValueError, match="differs in xray"):
        write_cohort(tmp_path / "both", 2, 9, size=SIZE, ct=True, xray=False)
