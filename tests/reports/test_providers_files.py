"""RadGraph's JSON and CheXbert's CSV, against their published formats and hand-made graphs."""

import csv
import json
import logging
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medvl.types import Fact
from reports.facts.label_sets import load_label_set
from reports.facts.ontology import load_ontology
from reports.providers.chexbert import CheXbertFacts
from reports.providers.names import label_meanings
from reports.providers.radgraph import RadGraphFacts
from reports.providers.texts import MinimalSentences

TEXT = "FINDINGS : There is a new small left pleural effusion , 12 mm . Possible opacity in the right lower lobe . No pneumothorax ."
ORIGINAL = "FINDINGS:\nThere is a new small left pleural\neffusion, 12 mm. Possible opacity in the right lower lobe. No pneumothorax."


def entity(tokens, label, start, *relations, text=TEXT):
    words = text.split()
    length = len(tokens.split())
    assert words[start : start + length] == tokens.split()
    return {
        "tokens": tokens,
        "label": label,
        "start_ix": start,
        "end_ix": start + length - 1,
        "relations": [list(relation) for relation in relations],
    }


ENTITIES = {
    "1": entity("new", "OBS-DP", 5, ("modify", "5")),
    "2": entity("small", "OBS-DP", 6, ("modify", "5")),
    "3": entity("left", "ANAT-DP", 7, ("modify", "4")),
    "4": entity("pleural", "ANAT-DP", 8),
    "5": entity("effusion", "OBS-DP", 9, ("located_at", "4")),
    "6": entity("12 mm", "OBS-DP", 11, ("modify", "5")),
    "7": entity("opacity", "OBS-U", 15, ("located_at", "10")),
    "8": entity("right", "ANAT-DP", 18, ("modify", "10")),
    "9": entity("lower", "ANAT-DP", 19, ("modify", "10")),
    "10": entity("lobe", "ANAT-DP", 20),
    "11": entity("pneumothorax", "OBS-DA", 23),
}
XL = {
    "ANAT-DP": "Anatomy::definitely present",
    "OBS-DP": "Observation::definitely present",
    "OBS-U": "Observation::uncertain",
    "OBS-DA": "Observation::definitely absent",
}


def graph_file(path, *entries):
    names = (f"p10/p1000{i}/s5000{i}.txt" for i in range(len(entries)))
    path.write_text(json.dumps(dict(zip(names, entries, strict=True))), encoding="utf-8")
    return path


def entry(**changes):
    return {"text": TEXT, "entities": ENTITIES, "data_source": None, "data_split": "inference", **changes}


EXPECTED = [
    ("effusion", Fact("pleural_effusion", "present", "left", "pleural", "mild", 12.0), "new"),
    ("opacity", Fact("lung_opacity", "uncertain", "right", "lower lobe"), None),
    ("pneumothorax", Fact("pneumothorax", "absent"), None),
]


@pytest.mark.parametrize("text", [TEXT, ORIGINAL])
@pytest.mark.parametrize("labels", [{}, XL])
def test_a_graph_is_read_as_facts_at_their_words(tmp_path, text, labels):
    entities = {key: {**one, "label": labels.get(one["label"], one["label"])} for key, one in ENTITIES.items()}
    source = RadGraphFacts(graph_file(tmp_path / "graphs.json", entry(entities=entities)))
    assert source.rejections == ()
    assert [(text[s.start : s.end], s.fact, s.change) for s in source.facts(text)] == EXPECTED
    assert [s.compares for s in source.sentences(text)] == [True, False, False]
    assert source.reading("Another text.") is None


def test_the_order_of_entities_does_not_matter(tmp_path):
    keys = list(ENTITIES)
    random.Random(0).shuffle(keys)
    source = RadGraphFacts(graph_file(tmp_path / "graphs.json", entry(entities={key: ENTITIES[key] for key in keys})))
    statements = sorted(source.facts(TEXT), key=lambda s: s.start)
    assert [(TEXT[s.start : s.end], s.fact, s.change) for s in statements] == EXPECTED


def test_a_file_of_two_readers_gives_the_first(tmp_path):
    two = {"text": TEXT, "labeler_1": {"entities": ENTITIES}, "labeler_2": {"entities": {}}}
    source = RadGraphFacts(graph_file(tmp_path / "graphs.json", two))
    assert [s.fact.finding for s in source.facts(TEXT)] == ["pleural_effusion", "lung_opacity", "pneumothorax"]


def test_a_table_of_names_decides(tmp_path):
    path = graph_file(tmp_path / "graphs.json", entry())
    source = RadGraphFacts(
        path, names={"pleural effusion": "pleural_effusion", "lower lobe opacity": "consolidation", "pneumothorax": None}
    )
    assert [s.fact.finding for s in source.facts(TEXT)] == ["pleural_effusion", "consolidation"]
    assert list(RadGraphFacts(path, names={"effusion": "pleural_effusion"}).unmapped_words()) == ["lower lobe opacity"]


def test_heart_and_enlarged_make_a_finding(tmp_path):
    text = "The heart is mildly enlarged ."
    entities = {
        "1": entity("heart", "ANAT-DP", 1, text=text),
        "2": entity("mildly", "OBS-DP", 3, ("modify", "3"), text=text),
        "3": entity("enlarged", "OBS-DP", 4, ("located_at", "1"), text=text),
    }
    source = RadGraphFacts(graph_file(tmp_path / "graphs.json", {"text": text, "entities": entities}))
    assert [s.fact for s in source.facts(text)] == [Fact("cardiomegaly", "present", location="heart", severity="mild")]


@pytest.mark.parametrize("changes", [{"start_ix": 8}, {"end_ix": 99}, {"tokens": "effusions"}, {"start_ix": 10, "end_ix": 9}])
def test_an_entity_that_is_not_where_it_says_is_refused(tmp_path, changes):
    entities = {**ENTITIES, "5": {**ENTITIES["5"], **changes}}
    source = RadGraphFacts(graph_file(tmp_path / "graphs.json", entry(entities=entities)))
    assert [(r.row, r.place) for r in source.rejections] == [(1, "entities[4]")]
    assert "pleural_effusion" not in [s.fact.finding for s in source.facts(TEXT)]


def test_loops_and_dangling_relations_end(tmp_path):
    entities = {
        **ENTITIES,
        "3": {**ENTITIES["3"], "relations": [["modify", "4"], ["modify", "nowhere"]]},
        "4": {**ENTITIES["4"], "relations": [["modify", "3"], ["located_at", "5"]]},
        "5": {**ENTITIES["5"], "relations": [["located_at", "4"], ["modify", "5"], ["located_at", "nowhere"]]},
    }
    source = RadGraphFacts(graph_file(tmp_path / "graphs.json", entry(entities=entities)))
    assert [s.fact.side for s in source.facts(TEXT)] == ["left", "right", None]


def test_bad_entries_are_listed_and_not_shown(tmp_path, caplog):
    secret = "Zebra"
    bad = entry(entities={secret: {**ENTITIES["1"], "start_ix": secret}})
    path = graph_file(tmp_path / "graphs.json", bad, entry(text=""), entry(), [secret], entry(text=secret, entities=[secret]))
    with caplog.at_level(logging.DEBUG):
        source = RadGraphFacts(path)
    assert [(r.row, r.place) for r in source.rejections] == [(1, "entities.*.start_ix"), (2, "text"), (4, ""), (5, "entities")]
    assert secret not in repr(source.rejections) + caplog.text and "s5000" not in caplog.text
    assert source.knows(TEXT)


@given(st.integers(1, 40))
@settings(max_examples=25, deadline=None)
def test_a_file_that_was_cut_keeps_the_entries_before_the_cut(tmp_path_factory, lost):
    path = tmp_path_factory.mktemp("cut") / "graphs.json"
    other = "Größe normal ."
    graph_file(path, entry(), {"text": other, "entities": {}})
    data = path.read_bytes().replace(rb"\u00f6\u00df", "öß".encode()).replace(rb"\u00f6", "ö".encode())
    path.write_bytes(data)
    assert RadGraphFacts(path).knows(other) and RadGraphFacts(path).rejections == ()
    path.write_bytes(data[:-lost])
    source = RadGraphFacts(path)
    assert source.knows(TEXT) and len(source.rejections) == 1
    assert source.knows(other) is (lost == 1)


def test_what_is_no_graph_file_is_an_error(tmp_path):
    path = tmp_path / "graphs.json"
    path.write_text("[1]")
    with pytest.raises(ValueError, match="expected one JSON object"):
        RadGraphFacts(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="it holds no record"):
        RadGraphFacts(path)
    source = RadGraphFacts(graph_file(path, entry()))
    path.write_text(path.read_text().replace("small", "large"))
    with pytest.raises(ValueError, match="has changed since it was read, at entry 1"):
        source.sentences(TEXT)


# ---------------------------------------------------------------- CheXbert

CHEXPERT = [
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
    "No Finding",
]
IMPRESSION = "Possible edema.\nNo pneumothorax, left effusion."


def label_file(path, *rows, columns=("Report Impression", *CHEXPERT)):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_labels_of_an_impression_are_facts_of_the_whole_of_it(tmp_path):
    row = {"Report Impression": IMPRESSION, "Edema": "-1.0", "Pneumothorax": "0.0", "Pleural Effusion": "1.0", "No Finding": ""}
    source = CheXbertFacts(label_file(tmp_path / "labels.csv", row), names={"Edema": "edema"})
    (sentence,) = source.sentences(IMPRESSION)
    assert (sentence.text, sentence.start, sentence.end) == (" ".join(IMPRESSION.split()), 0, len(IMPRESSION))
    assert {(s.fact.finding, s.fact.state) for s in sentence.statements} == {
        ("edema", "uncertain"),
        ("pneumothorax", "absent"),
        ("pleural_effusion", "present"),
    }
    assert all((s.start, s.end) == (0, len(IMPRESSION)) for s in sentence.statements)
    assert set(MinimalSentences(source).texts(None, None, IMPRESSION)) == {
        "There may be edema.",
        "There is no pneumothorax.",
        "There is pleural effusion.",
    }
    assert source.sentences("Other.")[0].statements == ()


@pytest.mark.parametrize("name", ["chexpert_14", "ct_rate_18", "chestxray_14"])
def test_what_a_label_says_is_true_of_every_finding_it_stands_for(name):
    label_set, ontology = load_label_set(name), load_ontology()
    for label, meaning in label_meanings(label_set).items():
        covered = label_set.covers[label]
        says = [f for f in ontology.findings if ontology.parents[f] and all(f in (g, *ontology.ancestors(g)) for g in covered)]
        assert (meaning.present in says) if says else meaning.present is None
        assert not any(meaning.present in ontology.ancestors(f) for f in says)
        denied = [{f, *ontology.descendants(f)} for f in meaning.absent]
        assert set().union(*denied) <= covered
        assert {f for f in covered if covered.issuperset(ontology.descendants(f))} <= set().union(*denied)
        assert not any(one < other for one in denied for other in denied)
        assert label_set.values([Fact(f, "absent") for f in meaning.absent])[label] == 0
    assert "No Finding" not in label_meanings(label_set)


def test_bad_rows_are_listed_and_the_others_read(tmp_path, caplog):
    secret = "Zebra"
    path = label_file(
        tmp_path / "labels.csv",
        {"Report Impression": f"{secret} one", "Edema": secret},
        {"Report Impression": IMPRESSION, "Edema": "1"},
        {"Report Impression": f"{secret} two", "Edema": "0.5", "Fracture": "2"},
    )
    with path.open("a") as file:
        file.write(f"{secret} three,1,0\n{secret} f\0our" + "," * 14 + "\n")
    source = CheXbertFacts(path)
    listed = [(r.row, r.place) for r in source.rejections]
    assert listed[:4] == [(1, "Edema"), (3, "Edema"), (3, "Fracture"), (4, "")]
    assert secret not in repr(source.rejections) + caplog.text
    assert source.knows(IMPRESSION) and not source.knows(f"{secret} one")


def test_labels_by_study_need_the_reports(tmp_path):
    path = label_file(tmp_path / "labels.csv", {"study_id": "5", "Pneumonia": "1"}, {"study_id": "6"}, columns=("study_id", *CHEXPERT))
    with pytest.raises(ValueError, match="expected the column 'Report Impression', or 'study_id' and reports"):
        CheXbertFacts(path)
    table = tmp_path / "reports.csv"
    table.write_text("study_id,findings,impression\n5,Old.,Pneumonia.\n")
    source = CheXbertFacts(path, reports=table)
    assert [s.fact for s in source.facts("Pneumonia.")] == [Fact("lung_opacity", "present")] and not source.knows("Old.")
    assert [(r.row, r.place) for r in source.rejections] == [(2, "study_id")]
    both = CheXbertFacts(path, reports=table, labelled=("findings", "impression"))
    assert both.knows("Old.\n\nPneumonia.") and not both.knows("Pneumonia.")


def test_a_text_with_two_sets_of_labels_has_none(tmp_path):
    rows = [{"Report Impression": "No change.", "Cardiomegaly": value} for value in ("1", "0")]
    source = CheXbertFacts(label_file(tmp_path / "labels.csv", *rows, {"Report Impression": IMPRESSION, "Edema": "1"}))
    assert not source.knows("No change.") and source.knows(IMPRESSION)
    assert [(r.row, r.place) for r in source.rejections] == [(2, "Report Impression")]


def test_labels_that_are_not_there_or_not_known(tmp_path):
    path = label_file(tmp_path / "labels.csv", {"Report Impression": IMPRESSION})
    with pytest.raises(ValueError, match=r"expected the label columns \['Wet'\]"):
        CheXbertFacts(path, names={"Wet": "edema"})
    with pytest.raises(ValueError, match="none to read"):
        CheXbertFacts(path, label_set=None)
    with pytest.raises(ValueError, match="no label set"):
        CheXbertFacts(path, label_set="mine")
