"""Label sets of further data sets: the names that these publish, prompts for every label, and files that extend another."""

from __future__ import annotations

from pathlib import Path

import pytest

from reports.facts.label_sets import load_label_set
from reports.facts.ontology import load_ontology
from reports.prompts import load_prompts, prompt_faults

OPENI = (  # the classes that the loaders of TorchXRayVision read from MeSH terms, with the prefixes "Lung" that it gives Lesion and Opacity
    *(
        "Atelectasis",
        "Calcified Granuloma",
        "Cardiomegaly",
        "Edema",
        "Effusion",
        "Emphysema",
        "Fibrosis",
        "Fracture",
        "Granuloma",
        "Hernia",
    ),
    *("Infiltration", "Lung Lesion", "Lung Opacity", "Mass", "Nodule", "Pleural_Thickening", "Pneumonia", "Pneumothorax"),
)
VINDR = (
    *("Aortic enlargement", "Atelectasis", "Calcification", "Cardiomegaly", "Clavicle fracture", "Consolidation", "Edema", "Emphysema"),
    *("Enlarged PA", "ILD", "Infiltration", "Lung Opacity", "Lung cavity", "Lung cyst", "Mediastinal shift", "Nodule/Mass"),
    *("Pleural effusion", "Pleural thickening", "Pneumothorax", "Pulmonary fibrosis", "Rib fracture", "Other lesion"),
    *("COPD", "Lung tumor", "Pneumonia", "Tuberculosis", "Other diseases", "No finding"),
)
MERLIN = (
    *(
        "submucosal_edema",
        "renal_hypodensities",
        "aortic_valve_calcification",
        "coronary_calcification",
        "thrombosis",
        "metastatic_disease",
    ),
    *("pancreatic_atrophy", "renal_cyst", "osteopenia", "surgically_absent_gallbladder", "atelectasis", "abdominal_aortic_aneurysm"),
    *("anasarca", "hiatal_hernia", "lymphadenopathy", "prostatomegaly", "biliary_ductal_dilation", "cardiomegaly", "splenomegaly"),
    *("hepatomegaly", "atherosclerosis", "ascites", "pleural_effusion", "hepatic_steatosis", "appendicitis", "gallstones"),
    *("hydronephrosis", "bowel_obstruction", "free_air", "fracture"),
)
SETS = ("vindr_cxr", "openi_18", "rsna", "siim", "padchest", "merlin_30")


@pytest.mark.parametrize(
    ("name", "published"),
    [("vindr_cxr", VINDR), ("openi_18", OPENI), ("merlin_30", MERLIN), ("rsna", ("Pneumonia",)), ("siim", ("Pneumothorax",))],
)
def test_labels_are_called_as_the_data_set_publishes_them(name: str, published: tuple[str, ...]) -> None:
    assert tuple(load_prompts(name).label_set(name)) == published


@pytest.mark.parametrize("name", ["vindr_cxr", "padchest", "merlin_30"])
def test_labels_stand_for_what_the_report_labels_stand_for(name: str) -> None:
    """The set that labels reports is another file; both must read a label alike."""
    prompts, published = load_prompts(name), load_label_set(name)
    labels = prompts.label_set(name)
    assert tuple(labels) == published.names
    assert len(set(labels.values())) == len(labels), "a finding has one label, or scores of a label would be lost"
    for label, finding in labels.items():
        if label == published.no_finding:
            assert prompts.is_normal(finding)
        elif label not in ("Other lesion", "Other diseases"):
            kinds = {finding, *load_ontology().descendants(finding), *prompts.children(finding)}
            assert published.covers[label] & kinds, label


@pytest.mark.parametrize("name", SETS)
def test_every_label_has_prompts_that_agree_with_themselves(name: str) -> None:
    prompts = load_prompts(name)
    assert prompt_faults(prompts, load_ontology().findings) == ()
    for finding in prompts.label_set(name).values():
        pair = prompts.findings[finding]
        assert len(pair.positive) >= 2 and len(pair.negative) >= 2 and pair.phrase
        for text in (*pair.positive, *pair.negative, *(one.positive for one in prompts.descriptors(finding))):
            assert text[0].isupper() and text.endswith(".") and "{" not in text
            assert " is some " not in text and " a some " not in text and "There is some" not in text


@pytest.mark.parametrize("name", ["vindr_cxr", "openi_18", "merlin_30"])
def test_labels_have_visual_signs_but_for_classes_without_a_look_of_their_own(name: str) -> None:
    prompts = load_prompts(name)
    bare = {
        label for label, finding in prompts.label_set(name).items() if not prompts.descriptors(finding) and not prompts.is_normal(finding)
    }
    assert bare <= {"Other lesion", "Other diseases"}


def test_a_file_that_extends_another_has_its_findings_and_its_templates(tmp_path: Path) -> None:
    file = tmp_path / "more.yaml"
    file.write_text(
        "format: 2\nversion: '1'\nextends: chest_xray\nlabel_sets: {mine: {E: edema, W: wire}}\nfindings: {wire: {name: a wire}}\n"
    )
    prompts, base = load_prompts(file), load_prompts("chest_xray")
    assert set(prompts.findings) == {*base.findings, "wire"} and set(prompts.label_sets) == {"mine"}
    assert prompts.findings["edema"] == base.findings["edema"] and prompts.descriptors("edema") == base.descriptors("edema")
    assert prompts.findings["wire"].positive == ("There is a wire.", "The radiograph shows a wire.")
    file.write_text("format: 2\nversion: '1'\nextends: nothing\nfindings: {wire: {name: a wire}}\n")
    with pytest.raises(ValueError, match="extends 'nothing': no such built-in set"):
        load_prompts(file)


def test_what_a_file_says_itself_counts_over_what_it_extends(tmp_path: Path) -> None:
    file = tmp_path / "more.yaml"
    file.write_text("format: 2\nversion: '1'\nextends: chest_xray\nfindings: {clavicle_fracture: {name: a break of the clavicle}}\n")
    prompts = load_prompts(file)
    assert prompts.findings["clavicle_fracture"].phrase == "break of the clavicle" and not prompts.parents("clavicle_fracture")


@pytest.mark.parametrize(
    ("name", "sha256"),
    [("chexpert_14", "05ed612870a8"), ("chestxray_14", "4cd6d890140a"), ("ct_rate_18", "5bc5b30c2f7a")],
)
def test_the_older_sets_are_what_they_were(name: str, sha256: str) -> None:
    """Saved results name them by hash."""
    assert load_prompts(name).sha256[:12] == sha256
