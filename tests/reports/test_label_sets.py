"""Label sets against the lists that their data sets publish, written out here, and against the sentences that name their labels."""

from __future__ import annotations

import pytest

from medvl.types import Fact
from reports.facts import LexiconFacts
from reports.facts.label_sets import LabelSet, label_set_names, load_label_set
from reports.facts.ontology import load_ontology

# fmt: off
CHEXPERT_14 = [
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation", "Pneumonia",
    "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices",
]
CHESTXRAY_14 = [
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax", "Consolidation", "Edema",
    "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia", "No Finding",
]
CT_RATE_18 = [
    "Medical material", "Arterial wall calcification", "Cardiomegaly", "Pericardial effusion", "Coronary artery wall calcification",
    "Hiatal hernia", "Lymphadenopathy", "Emphysema", "Atelectasis", "Lung nodule", "Lung opacity", "Pulmonary fibrotic sequela",
    "Pleural effusion", "Mosaic attenuation pattern", "Peribronchial thickening", "Consolidation", "Bronchiectasis",
    "Interlobular septal thickening",
]
MERLIN_30 = [
    "submucosal_edema", "renal_hypodensities", "aortic_valve_calcification", "coronary_calcification", "thrombosis", "metastatic_disease",
    "pancreatic_atrophy", "renal_cyst", "osteopenia", "surgically_absent_gallbladder", "atelectasis", "abdominal_aortic_aneurysm",
    "anasarca", "hiatal_hernia", "lymphadenopathy", "prostatomegaly", "biliary_ductal_dilation", "cardiomegaly", "splenomegaly",
    "hepatomegaly", "atherosclerosis", "ascites", "pleural_effusion", "hepatic_steatosis", "appendicitis", "gallstones", "hydronephrosis",
    "bowel_obstruction", "free_air", "fracture",
]
VINDR_CXR = [
    "Aortic enlargement", "Atelectasis", "Calcification", "Cardiomegaly", "Clavicle fracture", "Consolidation", "Edema", "Emphysema",
    "Enlarged PA", "ILD", "Infiltration", "Lung Opacity", "Lung cavity", "Lung cyst", "Mediastinal shift", "Nodule/Mass",
    "Pleural effusion", "Pleural thickening", "Pneumothorax", "Pulmonary fibrosis", "Rib fracture", "Other lesion", "COPD", "Lung tumor",
    "Pneumonia", "Tuberculosis", "Other diseases", "No finding",
]
PUBLISHED = {
    "chexpert_14": CHEXPERT_14, "chestxray_14": CHESTXRAY_14, "ct_rate_18": CT_RATE_18, "merlin_30": MERLIN_30, "vindr_cxr": VINDR_CXR,
}

PADCHEST_SAMPLE = [  # in the order of the published tree, each name as it stands there
    "normal", "obesity", "chronic changes", "calcified densities", "end on vessel", "bullas", "pneumoperitoneo", "lung vascular paucity",
    "ground glass pattern", "air bronchogram", "laminar atelectasis", "azygos lobe", "loculated fissural effusion", "kerley lines",
    "aortic button enlargement", "azygoesophageal recess shift", "mediastinic lipomatosis", "pectum carinatum", "axial hyperostosis",
    "callus rib fracture", "Chilaiditi sign", "NSG tube", "double J stent", "dai", "surgery humeral", "COVID 19", "lepidic adenocarcinoma",
    "asbestosis signs", "COPD signs", "heart insufficiency", "bone metastasis",
]
PADCHEST_PARENTS = {  # of the published tree, all but the roots "radiological finding" and "differential diagnosis"
    "calcified granuloma": ["calcified densities", "granuloma"],
    "calcified mediastinal adenopathy": ["calcified adenopathy"],
    "calcified adenopathy": ["calcified densities", "adenopathy"],
    "calcified pleural plaques": ["calcified densities", "pleural plaques"],
    "nipple shadow": ["pseudonodule"],
    "multiple nodules": ["nodule"],
    "hydropneumothorax": ["pneumothorax", "pleural effusion"],
    "ground glass pattern": ["interstitial pattern"],
    "interstitial pattern": ["infiltrates"],
    "air bronchogram": ["consolidation", "alveolar pattern"],
    "round atelectasis": ["atelectasis"],
    "loculated fissural effusion": ["fissure thickening", "pleural effusion"],
    "empyema": ["pleural effusion"],
    "pulmonary artery enlargement": ["vascular hilar enlargement"],
    "vascular hilar enlargement": ["hilar enlargement"],
    "aortic button enlargement": ["aortic elongation"],
    "mediastinal mass": ["mediastinal enlargement", "mass"],
    "kyphosis": ["thoracic cage deformation"],
    "vertebral anterior compression": ["vertebral compression"],
    "blastic bone lesion": ["sclerotic bone lesion"],
    "callus rib fracture": ["rib fracture"],
    "central venous catheter via jugular vein": ["central venous catheter"],
    "dai": ["electrical device"],
    "artificial aortic heart valve": ["artificial heart valve"],
    "osteosynthesis material": ["metal"],
    "metal": ["surgery"],
    "aortic endoprosthesis": ["endoprosthesis"],
    "mastectomy": ["surgery breast"],
    "COVID 19": ["viral pneumonia"],
    "tuberculosis sequelae": ["tuberculosis"],
    "post radiotherapy changes": ["pulmonary fibrosis"],
    "pulmonary venous hypertension": ["pulmonary hypertension"],
}
# fmt: on
NOT_KINDS = {  # parents of the published tree that the label set leaves out; the comment in label_sets.yaml says why
    "adenopathy": ["hilar enlargement"],
    "hiatal hernia": ["mediastinal enlargement"],
    "aortic aneurysm": ["mediastinal enlargement"],
    "ascendent aortic elongation": ["mediastinal enlargement"],
    "descendent aortic elongation": ["mediastinal enlargement"],
    "supra aortic elongation": ["superior mediastinal enlargement"],
    "goiter": ["superior mediastinal enlargement"],
    "vertebral compression": ["vertebral degenerative changes"],
}
OTHER_WORDS = {  # labels that no sentence says as they stand, with the words that one would say
    ("ct_rate_18", "Medical material"): "surgical material",  # the head of a family
    ("chexpert_14", "Lung Lesion"): "lung mass",  # the head of a family; a lesion of which kind is left open
    ("chexpert_14", "Pleural Other"): "pleural thickening",  # what is left of a family
    ("vindr_cxr", "Enlarged PA"): "enlarged pulmonary artery",  # PA is more often the view
    ("vindr_cxr", "Lung cavity"): "cavitation",  # "cavity" alone is more often the chest's
    ("padchest", "calcified adenopathy"): "calcified lymph node",
    ("padchest", "cyst"): "lung cyst",  # elsewhere cysts are of the liver or kidney
    ("padchest", "bronchovascular markings"): "increased bronchovascular markings",  # the markings alone are normal
    ("padchest", "mediastinal enlargement"): "widening of the mediastinum",
    ("padchest", "non axial articular degenerative changes"): "degenerative change of the shoulder",  # "non" denies
    ("padchest", "heart insufficiency"): "heart failure",  # word by word from Spanish
}
UNDENIED = {("ct_rate_18", "Medical material")}  # a family, of which a sentence denies one kind at a time
NO_WORDS = {("vindr_cxr", "Other lesion"), ("vindr_cxr", "Other diseases")}  # "other" than the rest of the list


@pytest.fixture(scope="module")
def source():
    return LexiconFacts()


def labels_of(label_set: LabelSet, *facts: Fact) -> dict[str, int | None]:
    return label_set.values(facts)


def every_label():
    for name in label_set_names():
        label_set = load_label_set(name)
        for label in label_set.names:
            if label != label_set.no_finding and (name, label) not in NO_WORDS:
                yield name, label


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_order_are_the_published(name):
    assert list(load_label_set(name).names) == PUBLISHED[name]


def test_padchest_names():
    """193: the 197 names of the tree and the data together, without the four that are no finding of their own."""
    names = list(load_label_set("padchest").names)
    assert len(names) == len(set(names)) == 193
    positions = [names.index(name) for name in PADCHEST_SAMPLE]
    assert positions == sorted(positions)
    assert not {"exclude", "suboptimal study", "unchanged", "COVID 19 uncertain"} & set(names)


@pytest.mark.parametrize("label", PADCHEST_PARENTS)
def test_padchest_parents_hold_what_is_below_them(label):
    covers = load_label_set("padchest").covers
    for parent in PADCHEST_PARENTS[label]:
        assert covers[label] and covers[label] <= covers[parent], parent


@pytest.mark.parametrize("label", NOT_KINDS)
def test_padchest_parents_left_out(label):
    covers = load_label_set("padchest").covers
    assert not any(covers[label] <= covers[parent] for parent in NOT_KINDS[label])


@pytest.mark.parametrize("name", [*PUBLISHED, "padchest"])
def test_labels_name_findings_that_exist(name):
    known, label_set = set(load_ontology().findings), load_label_set(name)
    empty = {label for label in label_set.names if not label_set.covers[label]}
    assert empty == {label for one, label in NO_WORDS if one == name} | ({label_set.no_finding} - {None})
    assert all(label_set.covers[label] | label_set.denied_by[label] <= known for label in label_set.names)
    assert label_set.beside <= set(label_set.names)


def test_all_label_sets_are_listed():
    assert set(label_set_names()) == {*PUBLISHED, "padchest"}
    with pytest.raises(ValueError, match=r"no label set 'chexpert'; known are .*chexpert_14"):
        load_label_set("chexpert")


@pytest.mark.parametrize(
    ("states", "value"),
    [
        ([], None),
        (["absent"], 0),
        (["uncertain"], -1),
        (["present"], 1),
        (["absent", "uncertain"], -1),
        (["uncertain", "absent", "present"], 1),
        (["present", "absent"], 1),
    ],
)
def test_the_strongest_state_decides(states, value):
    facts = [Fact("pleural_effusion", state) for state in states]
    assert labels_of(load_label_set("chexpert_14"), *facts)["Pleural Effusion"] == value
    assert labels_of(load_label_set("chexpert_14"), *reversed(facts))["Pleural Effusion"] == value


def test_kinds_count_and_only_what_is_above_denies():
    """A rib fracture is a fracture; without a rib fracture there may be another; without any fracture there is none of a rib."""
    chexpert, vindr = load_label_set("chexpert_14"), load_label_set("vindr_cxr")
    assert labels_of(chexpert, Fact("rib_fracture", "present"))["Fracture"] == 1
    assert labels_of(chexpert, Fact("rib_fracture", "uncertain"))["Fracture"] == -1
    assert labels_of(chexpert, Fact("rib_fracture", "absent"))["Fracture"] is None
    assert labels_of(vindr, Fact("fracture", "absent"))["Rib fracture"] == 0
    assert labels_of(vindr, Fact("fracture", "present"))["Rib fracture"] is None


def test_a_mark_leaves_the_kinds_out():
    """CT-RATE's Lung opacity is the unspecific one; consolidation has a label of its own."""
    ct_rate, chexpert = load_label_set("ct_rate_18"), load_label_set("chexpert_14")
    consolidation, opacity = Fact("consolidation", "present"), Fact("lung_opacity", "present")
    assert labels_of(ct_rate, consolidation)["Lung opacity"] is None
    assert labels_of(ct_rate, opacity)["Lung opacity"] == 1
    assert labels_of(ct_rate, Fact("lung_opacity", "absent"))["Lung opacity"] == 0
    assert labels_of(chexpert, consolidation)["Lung Opacity"] == 1


@pytest.mark.parametrize(
    ("fact", "value"),
    [
        (None, 1),
        (Fact("pneumothorax", "absent"), 1),
        (Fact("pacemaker", "present"), 1),
        (Fact("pneumothorax", "uncertain"), 0),
        (Fact("scar", "present"), 0),
    ],
)
def test_no_finding(fact, value):
    """1 where no label but Support Devices is 1 or -1."""
    assert labels_of(load_label_set("chexpert_14"), *([fact] if fact else []))["No Finding"] == value


def test_no_finding_where_devices_are_findings():
    assert labels_of(load_label_set("padchest"), Fact("pacemaker", "present"))["normal"] == 0
    assert labels_of(load_label_set("padchest"), Fact("pacemaker", "absent"))["normal"] == 1


@pytest.mark.parametrize(
    ("text", "label", "value"),
    [
        ("There is interstitial thickening.", "Lung Opacity", 1),
        ("Vascular congestion.", "Edema", 1),
        ("Congestive heart failure.", "Edema", 1),
        ("Nodular opacity in the left lung.", "Lung Lesion", 1),
        ("Findings may represent infection.", "Pneumonia", -1),
        ("Pleural scarring at the left base.", "Pleural Other", 1),
        ("Pericardial effusion.", "Pleural Effusion", None),
        ("Cervical fusion hardware.", "Support Devices", 1),
    ],
)
def test_chexpert_as_its_labeler(source, text, label, value):
    """Words that the phrase lists of stanfordmlgroup/chexpert-labeler put under the label."""
    assert labels_of(load_label_set("chexpert_14"), *(s.fact for s in source.facts(text)))[label] == value


@pytest.mark.parametrize(("name", "label"), every_label())
def test_the_simplest_sentences(source, name, label):
    words = OTHER_WORDS.get((name, label), label.replace("_", " "))
    label_set = load_label_set(name)
    assert labels_of(label_set, *(s.fact for s in source.facts(f"There is {words}.")))[label] == 1
    assert labels_of(label_set, *(s.fact for s in source.facts(f"No {words}.")))[label] == (None if (name, label) in UNDENIED else 0)
