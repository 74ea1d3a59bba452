"""Published schemes: the texts that their authors' code makes, written out here by hand."""

from __future__ import annotations

import pytest

from reports.prompts import PromptGroup, load_prompts, scheme, scheme_names


def texts(
    name: str, finding: str, label_set: str | None = None, prompts: str = "chest_xray"
) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    (one,) = scheme(name).prompts(load_prompts(prompts), [finding], label_set=label_set)
    assert one.finding == finding
    return [(group.positive, group.negative) for group in one.groups]


@pytest.mark.parametrize(
    ("name", "positive", "negative"),
    [
        ("chexzero", "pleural effusion", "no pleural effusion"),
        ("ct_clip", "pleural effusion is present.", "pleural effusion is not present."),
        ("radzero", "There is pleural effusion", None),
        ("carzero", "There is pleural effusion", None),
        ("cxr_clip", "pleural effusion", "No pleural effusion"),
        ("fvlm", "pleural effusion.", "Not pleural effusion."),
        ("colipri", "Pleural effusion present", "No pleural effusion present"),
        ("concept_clip", "a chest radiology presents pleural effusion", None),
    ],
)
def test_a_class_by_its_name(name: str, positive: str, negative: str | None) -> None:
    assert texts(name, "pleural_effusion") == [((positive,), () if negative is None else (negative,))]


def test_a_class_as_the_data_set_calls_it() -> None:
    assert texts("chexzero", "pleural_effusion", "chexpert_14") == [(("Pleural Effusion",), ("no Pleural Effusion",))]
    assert texts("chexzero", "pleural_effusion", "chestxray_14") == [(("Effusion",), ("no Effusion",))]
    assert texts("radzero", "pleural_effusion", "chexpert_14") == [(("There is pleural effusion",), ())]
    calcified = "Arterial wall calcification is present.", "Arterial wall calcification is not present."
    assert texts("ct_clip", "arterial_calcification", "ct_rate_18", "chest_ct") == [((calcified[0],), (calcified[1],))]


def test_a_class_by_its_signs_has_a_group_for_each() -> None:
    prompts = load_prompts("chest_xray")
    (one,) = scheme("xplainer").prompts(prompts, ["edema"])
    assert [group.about for group in one.groups] == [d.descriptor for d in prompts.descriptors("edema")]
    assert one.groups[0].positive == ("There are widening of the upper lobe vessels indicating pulmonary edema",)
    assert one.groups[0].negative == ("There are no widening of the upper lobe vessels indicating pulmonary edema",)
    assert all(len(group.positive) == len(group.negative) == 1 for group in one.groups)


def test_no_finding_is_left_to_the_others_where_signs_are_scored() -> None:
    classes = {one.finding: one.groups for one in scheme("xplainer").prompts(load_prompts("chexpert_14"), label_set="chexpert_14")}
    assert len(classes) == 14 and classes["no_finding"] == ()
    assert all(groups for finding, groups in classes.items() if finding != "no_finding")


def test_what_has_no_signs_is_named() -> None:
    with pytest.raises(ValueError, match="needs descriptors, and the set has none for edema, emphysema"):
        scheme("xplainer").prompts(load_prompts(), ["edema", "emphysema"])


def test_combinations_are_drawn() -> None:
    prompts = load_prompts("chest_xray")
    (one,) = scheme("gloria").prompts(prompts, ["atelectasis"], seed=1)
    assert len(one.groups) == 1 and len(one.groups[0].positive) == 5 and one.groups[0].negative == ()
    assert set(one.groups[0].positive) < set(prompts.phrases("atelectasis"))
    (other,) = scheme("gloria").prompts(prompts, ["atelectasis"], seed=2)
    assert other != one
    (more,) = scheme("gloria").prompts(prompts, ["atelectasis"], n=10, seed=1)
    assert set(one.groups[0].positive) < set(more.groups[0].positive)


def test_pairs_and_kinds_come_from_the_set() -> None:
    prompts = load_prompts("chest_xray")
    pair = prompts.pair("fracture")
    (one,) = scheme("merlin").prompts(prompts, ["fracture"])
    assert one.groups == (PromptGroup("fracture", pair.positive, pair.negative),)
    (one,) = scheme("chils").prompts(prompts, ["fracture"])
    assert [group.about for group in one.groups] == ["fracture", "rib_fracture", "clavicle_fracture", "vertebral_fracture"]
    assert one.groups[1].positive == prompts.pair("rib_fracture").positive


@pytest.mark.parametrize("name", scheme_names())
def test_every_scheme_words_every_label(name: str) -> None:
    for label_set in ("chexpert_14", "chestxray_14", "ct_rate_18"):
        prompts = load_prompts(label_set)
        classes = scheme(name).prompts(prompts, label_set=label_set)
        assert [one.finding for one in classes] == list(prompts.label_set(label_set).values())
        for one in classes:
            for group in one.groups:
                assert group.positive and all(text.strip() and "{" not in text for text in (*group.positive, *group.negative))
                assert not set(group.positive) & set(group.negative)
    assert scheme(name).source


def test_an_unknown_scheme_is_refused_with_the_known_ones() -> None:
    with pytest.raises(KeyError, match="no prompt scheme xplain; known are chexzero, ct_clip"):
        scheme("xplain")
    with pytest.raises(KeyError, match="no prompts for gout"):
        scheme("chexzero").prompts(load_prompts(), ["gout"])
