"""Hard negatives: false of their study by the truth that phantoms are made from, read with the templates and not with our extractor."""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import yaml

import reports.synthetic
from medvl.types import FINDINGS, Fact, KnownStudy, PairStudy, SourcedText, StudyWords
from modalities.phantom import sample_phantom
from reports.facts import LexiconFacts
from reports.facts.ontology import load_ontology
from reports.pairs import HardNegatives, ReportPairs
from reports.pairs.negatives import RULES, hard_negatives, load_words
from reports.pairs.truth import claims_of, with_disputes
from reports.sentences import report_sentences
from tasks.phantoms import soften

TEMPLATES = yaml.safe_load(Path(reports.synthetic.__file__).with_name("synthetic.yaml").read_text())
SLOTS = {
    "side": "left|right", "degree": "mild|moderate|severe", "amount": "small|moderate|large", "size": r"[\d.]+ (?:mm|cm)", "rib": "rib",
    "ribs": "ribs", "kind": ".+?", "location": ".+?", "adjective": ".+?",
}  # fmt: skip
AMOUNT = {"small": "mild", "moderate": "moderate", "large": "severe"}
NOUNS = {
    "pleural_effusion": "effusions?", "pneumothorax": "pneumothora(?:x|ces)", "lung_nodule": "nodules?", "lung_mass": "mass(?:es)?",
    "consolidation": "consolidation", "atelectasis": "atelectasis", "pneumonia": "pneumonia", "edema": "o?edema", "emphysema": "emphysema",
    "cardiomegaly": "cardiomegaly",
}  # fmt: skip
OF_PHANTOMS = {"lung_mass": None, "pneumonia": "consolidation"}  # a phantom has no masses; its consolidations may be called pneumonia


def patterns() -> list[tuple[str, str, re.Pattern[str], dict[str, str]]]:
    """(finding, state, pattern of a template with its slots as groups, what the template's group says beside them)."""
    found = []
    for finding, groups in TEMPLATES["findings"].items():
        parts = [({}, {name: texts for name, texts in groups.items() if name != "kinds"})]
        parts += [({"kind": kind}, part) for kind, part in groups.get("kinds", {}).items()]
        for said, part in parts:
            for group, texts in part.items():
                meant = {**said, "side": "bilateral"} if group.endswith("bilateral") else said
                state = "uncertain" if "uncertain" in group else "absent" if "absent" in group else "present"
                for text in texts:
                    pattern = re.escape(text).replace(r"\{", "{").replace(r"\}", "}")
                    seen: set[str] = set()
                    for slot in re.findall(r"{(\w+)}", pattern):
                        pattern = pattern.replace("{" + slot + "}", f"(?P=={slot})" if slot in seen else f"(?P<{slot}>{SLOTS[slot]})", 1)
                        seen.add(slot)
                    found.append((finding, state, re.compile(pattern, re.IGNORECASE), meant))
    return found


PATTERNS = patterns()


def readings(sentence: str) -> list[tuple[str, str, dict[str, str]]]:
    """(finding, state, slots) of every template that the sentence can be a filling of."""
    found = []
    for finding, state, pattern, meant in PATTERNS:
        if match := pattern.fullmatch(sentence):
            found.append((finding, state, {name: value.lower() for name, value in match.groupdict().items() if value} | meant))
    return found


def location_of(words: str) -> str:
    return {adjective: place for place, adjective in TEMPLATES["adjectives"].items()}.get(words, words)


def fits(fact: Fact, state: str, slots: dict[str, str]) -> bool:
    """Whether a fact of the study is what a template filled with these slots says."""
    degree = slots.get("degree") or AMOUNT.get(slots.get("amount", ""))
    place = slots.get("location") or slots.get("adjective")
    side = slots.get("side")
    return (
        fact.state == state
        and (side is None or fact.side == side or (fact.side == "bilateral" and side in ("left", "right")))
        and (degree is None or fact.severity == degree)
        and (place is None or fact.location is None or location_of(place).rstrip("s") == fact.location.rstrip("s"))
        and ("kind" not in slots or slots["kind"] == fact.kind)
    )


def is_true(finding: str, state: str, slots: dict[str, str], facts: list[Fact]) -> bool:
    mine = [fact for fact in facts if fact.finding == finding]
    return not mine if state == "absent" else any(fits(fact, state, slots) for fact in mine)


def differs(fact: Fact, sentence: str) -> bool:
    """Whether the words of a sentence give a finding another side, degree or lobe than the fact has."""
    words = set(re.findall(r"[a-z]+", sentence.lower()))
    sides = words & {"left", "right"}
    degrees = {AMOUNT.get(word, word) for word in words} & set(AMOUNT.values())
    lobes = words & {"upper", "middle", "lower"}
    return (
        (bool(sides) and fact.side in ("left", "right") and fact.side not in sides)
        or (bool(degrees) and fact.severity is not None and fact.severity not in degrees)
        or (bool(lobes) and fact.location is not None and not lobes & set(fact.location.split()))
    )


def denied_findings(sentence: str) -> set[str]:
    """Findings that a sentence of the templates denies, alone or with others."""
    combined = {f for entry in TEMPLATES["combined_absent"] if entry["text"] == sentence for f in entry["findings"]}
    if sentence in TEMPLATES["normal_impression"]:
        combined |= set(FINDINGS)
    return combined | {finding for finding, state, _ in readings(sentence) if state == "absent"}


def fault(original: str, negative: str, rule: str, facts: list[Fact]) -> str | None:
    """Why the negative is, or may be, true of a study of these facts; None if it is false."""
    if rule == "negation":
        before, after = (re.findall(r"[a-z0-9.]+", text.lower().rstrip(".")) for text in (original, negative))
        negations = {"no", "not", "abnormal", "negative", "neither"}
        if bool(negations & set(before)) == bool(negations & set(after)):
            return "not a negation"
        if negations & set(before):  # what was denied is now there: the study must have none of it
            return None if not any(f.finding in denied_findings(original) and f.state == "present" for f in facts) else "denied, but there"
        if "abnormal" in after or (set(after) - set(before)) <= {"not", "does", "do", "appear"}:
            return None  # the denial of a sentence that is true
        stated = [r for r in readings(original) if r[1] == "present" and is_true(*r, facts)]
        kept = set(after) - {"no", "there", "is", "are", "a", "an"} <= set(before)
        return None if stated and kept else "denies something else"
    if rule == "finding":
        new = [
            f for f, noun in NOUNS.items() if re.search(rf"\b{noun}\b", negative, re.I) and not re.search(rf"\b{noun}\b", original, re.I)
        ]
        if len(new) != 1:
            return f"names {len(new)} new findings"
        return "is there" if any(f.finding == OF_PHANTOMS.get(new[0], new[0]) and not differs(f, negative) for f in facts) else None
    read = readings(re.sub(r"\bmarked(ly)?\b", r"severe\1", negative, flags=re.IGNORECASE))
    if not read:
        return "no template reads like this"
    return "true by a template" if any(is_true(*reading, facts) for reading in read) else None


def study(index: int) -> tuple[list[Fact], str, str]:
    def generator(purpose: str) -> np.random.Generator:
        return np.random.default_rng(int.from_bytes(hashlib.sha256(f"{purpose}{index}".encode()).digest()[:8], "big"))

    facts = soften(sample_phantom(generator("findings"), 32).facts, generator("images"))
    report = reports.synthetic.write_report(facts, generator("report"))
    return list(facts), report.findings, report.impression


def check_phantoms(count: int) -> None:
    builder, made, faults = ReportPairs(negatives=HardNegatives()), dict.fromkeys(RULES, 0), []
    without = 0
    for i in range(count):
        facts, findings, impression = study(i)
        sentences = report_sentences(None, findings, impression)
        sourced = tuple(map(SourcedText, sentences))
        builder.prepare([KnownStudy((i,), (StudyWords(str(i), None, findings, impression),), sourced)])
        negatives = [(one, n) for one in sentences for n in builder.hard_negatives(one, PairStudy(i, sourced))]
        without += not negatives
        for original, negative in negatives:
            made[negative.rule] += 1
            if reason := fault(original, negative.text, negative.rule, facts):
                faults.append((i, negative.rule, reason, original, negative.text))
    assert not faults, f"{len(faults)} of {sum(made.values())}, such as {faults[:5]}"
    assert min(made.values()) >= count // 10, made
    assert without <= count // 50


def test_no_negative_is_true_of_its_phantom() -> None:
    check_phantoms(150)


@pytest.mark.slow
def test_no_negative_is_true_of_a_thousand_phantoms() -> None:
    check_phantoms(1000)


def test_the_checker_knows_what_is_true() -> None:
    """The independent reading itself: every sentence of a report is true, and made-up falsehoods are found out."""
    for i in range(20):
        facts, findings, impression = study(i)
        for sentence in report_sentences(None, findings, impression):
            read = readings(sentence)
            known = any(is_true(*reading, facts) for reading in read) or not any(
                f.finding in denied_findings(sentence) and f.state == "present" for f in facts
            )
            assert known, sentence
    facts = [Fact("pleural_effusion", "present", "left", severity="mild")]
    assert fault("Small left pleural effusion.", "Small right pleural effusion.", "side", facts) is None
    assert fault("Small left pleural effusion.", "Small left pleural effusion.", "side", facts) == "true by a template"
    assert fault("Small left pleural effusion.", "Pleural effusion on the left.", "side", facts) == "true by a template"
    assert fault("Small left pleural effusion.", "Small left pneumothorax.", "finding", facts) is None
    both = [*facts, Fact("pneumothorax", "present", "left")]
    assert fault("Small left pleural effusion.", "Small left pneumothorax.", "finding", both) == "is there"
    assert fault("No pneumothorax.", "Pneumothorax is present.", "negation", both) == "denied, but there"


def negatives(report: str, sentence: str, rule: str) -> set[str]:
    facts = LexiconFacts()
    said = with_disputes(claims_of(report, facts.facts(report), load_ontology()), load_ontology())
    return {n.text for n in hard_negatives(sentence, tuple(facts.facts(sentence)), said, load_ontology(), (rule,))}


@pytest.mark.parametrize(
    ("rule", "sentence", "rest", "expected"),
    [
        ("negation", "There is a small left pleural effusion.", "", "There is no left pleural effusion."),
        ("negation", "A calcified granuloma is seen in the left lower lobe.", "", "No calcified granuloma is seen in the left lower lobe."),
        ("negation", "The heart is mildly enlarged.", "", "The heart is not enlarged."),
        ("negation", "Moderate cardiomegaly.", "", "No cardiomegaly."),
        ("negation", "No pneumothorax or pleural effusion is seen.", "", "Pneumothorax and pleural effusion are seen."),
        ("negation", "There is no pneumothorax.", "", "There is a pneumothorax."),
        ("negation", "No evidence of pulmonary edema.", "", "There is evidence of pulmonary edema."),
        ("negation", "No definite pneumothorax.", "", "Pneumothorax is present."),
        ("negation", "The lungs are clear.", "", "The lungs are not clear."),
        ("negation", "The heart is unremarkable.", "", "The heart is abnormal."),
        ("side", "Small left pleural effusion.", "", "Small right pleural effusion."),
        ("severity", "Small left pleural effusion.", "", "Large left pleural effusion."),
        ("severity", "The heart is mildly enlarged.", "", "The heart is markedly enlarged."),
        ("location", "Consolidation in the right upper lobe.", "", "Consolidation in the right lower lobe."),
        ("finding", "Small left pleural effusion.", "No pneumothorax.", "Small left pneumothorax."),
        ("finding", "There is a left pneumothorax.", "There is no effusion.", "There is a left pleural effusion."),
    ],
)  # fmt: skip
def test_what_the_rules_write(rule: str, sentence: str, rest: str, expected: str) -> None:
    assert expected in negatives(f"{sentence} {rest}", sentence, rule)


@pytest.mark.parametrize(
    ("rule", "sentence", "rest"),
    [
        ("side", "Small left pleural effusion.", "Right pleural effusion."),  # true of the study
        ("side", "Small left pleural effusion.", "Pleural effusions."),  # perhaps true
        ("side", "Right middle lobe atelectasis.", ""),  # cannot be written
        ("side", "Possible left pleural effusion.", ""),
        ("severity", "Mild to moderate cardiomegaly.", ""),
        ("severity", "Small left pleural effusion.", "Large left pleural effusion."),
        ("location", "Consolidation in the right upper lobe.", "Consolidation in the right lower lobe."),
        ("location", "Consolidation in the right upper and lower lobes.", ""),
        ("finding", "Small left pleural effusion.", ""),  # the study does not say that there is no pneumothorax
        ("finding", "Small left pleural effusion.", "Possible pneumothorax."),
        ("negation", "The effusion is unchanged.", ""),
        ("negation", "Heart size is normal.", "Mild cardiomegaly."),  # the report contradicts itself
        ("negation", "Probable small effusion.", ""),
    ],
)
def test_what_the_rules_leave_alone(rule: str, sentence: str, rest: str) -> None:
    assert negatives(f"{sentence} {rest}", sentence, rule) == set()


def test_articles_fit_and_capitals_stay() -> None:
    assert "There is an effusion." not in negatives("There is a pneumothorax. No effusion.", "There is a pneumothorax.", "finding")
    assert negatives("LUL opacity.", "LUL opacity.", "location") == {"LLL opacity."}
    assert negatives("LARGE RIGHT EFFUSION.", "LARGE RIGHT EFFUSION.", "severity") == {"SMALL RIGHT EFFUSION."}


def test_draws_are_a_function_of_the_generator_and_spread_over_the_rules() -> None:
    report = "Small left pleural effusion. Consolidation in the left upper lobe. No pneumothorax. Mild cardiomegaly."
    builder = ReportPairs(negatives=HardNegatives(per_study=3))
    sourced = tuple(map(SourcedText, report_sentences(report)))
    builder.prepare([KnownStudy((1,), (StudyWords("1", report),), sourced)])
    study = [PairStudy(1, sourced)]
    draws = [builder.pairs(study, np.random.default_rng(seed)).texts for seed in (0, 0, *range(1, 40))]
    assert draws[0] == draws[1]
    rules = {one.source for drawn in draws for one in drawn if one.source.startswith("hard negative")}
    assert rules == {f"hard negative: {rule}" for rule in RULES}
    assert all(sum(one.source.startswith("hard") for one in drawn) == 3 for drawn in draws)


def test_options_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rules names typo; known are negation"):
        HardNegatives(rules=["typo"])
    with pytest.raises(ValueError, match="per_study is 0"):
        HardNegatives(per_study=0)
    with pytest.raises(FileNotFoundError, match="no file of words"):
        load_words(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("version: 1\ndegrees: 3\n")
    with pytest.raises(ValueError, match="expected version, degrees, places, nouns and plain"):
        load_words(tmp_path / "bad.yaml")
    assert json.dumps(HardNegatives(per_study=2).spec())


def test_every_open_i_report_is_taken(shared_data: Path) -> None:
    """No crash, and never a text that the study also says."""
    builder, made = ReportPairs(negatives=HardNegatives(verify=False)), 0
    with tarfile.open(shared_data / "reports" / "openi_reports.tgz") as archive:
        names = sorted(m.name for m in archive.getmembers() if m.name.endswith(".xml"))[::8]
        for i, name in enumerate(names):
            file = archive.extractfile(name)
            assert file is not None
            parts = {a.get("Label"): a.text for a in ElementTree.parse(file).iter("AbstractText")}
            words = StudyWords(name, None, parts["FINDINGS"], parts["IMPRESSION"])
            sourced = tuple(map(SourcedText, report_sentences(None, words.findings, words.impression)))
            builder.prepare([KnownStudy((i,), (words,), sourced)])
            said = {one.text for one in sourced}
            texts = [n.text for one in sourced for n in builder.hard_negatives(one.text, PairStudy(i, sourced))]
            assert not said & set(texts)
            made += len(texts)
    assert made > len(names)


def test_positives_across_phantoms_are_true_of_them() -> None:
    """Of the pairs that facts add to equal texts, the share that the independent reading of the templates finds true.

    What is wrong is mostly a sentence that the lexicon misreads, such as "Neither lung shows a nodule.".
    """
    builder, studies = ReportPairs(strictness="all"), [study(i) for i in range(120)]
    sourced = [tuple(map(SourcedText, report_sentences(None, findings, impression))) for _, findings, impression in studies]
    words = [StudyWords(str(i), None, findings, impression) for i, (_, findings, impression) in enumerate(studies)]
    builder.prepare([KnownStudy((i,), (words[i],), sourced[i]) for i in range(len(studies))])
    made = builder.pairs([PairStudy(i, texts) for i, texts in enumerate(sourced)])
    right, wrong = 0, []
    for i, (facts, _, _) in enumerate(studies):
        own = {one.text for one in sourced[i]}
        for one, positive in zip(made.texts, made.positives[i].tolist(), strict=True):
            if positive and one.text not in own:
                denied = denied_findings(one.text)
                true = any(is_true(*reading, facts) for reading in readings(one.text)) or bool(
                    denied and not any(f.finding in denied and f.state == "present" for f in facts)
                )
                right += true
                wrong += [] if true else [(i, one.text)]
    assert right > 5000
    assert len(wrong) / (right + len(wrong)) < 0.04, f"{len(wrong)} of {right + len(wrong)}, such as {wrong[:: len(wrong) // 12 + 1]}"


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        ("There is a small left pleural effusion.", "There is a large left pleural effusion."),
        ("Mild cardiomegaly.", "Severe cardiomegaly."),
        ("The heart is mildly enlarged.", "The heart is markedly enlarged."),
    ],
)
def test_a_denial_is_no_positive_of_a_study_with_another_degree(mine: str, theirs: str) -> None:
    builder = ReportPairs(negatives=HardNegatives(rules=["negation"]))
    reports = {0: mine, 1: f"{theirs} The bones are intact."}
    drawn = {0: (SourcedText(mine),), 1: (SourcedText("The bones are intact."),)}
    builder.prepare([KnownStudy((i,), (StudyWords(str(i), reports[i]),), drawn[i]) for i in reports])
    made = builder.pairs([PairStudy(i, drawn[i]) for i in reports], np.random.default_rng(0))
    assert made.false_texts is not None and made.false_texts.any()
    assert not made.positives[:, made.false_texts].any()


def test_little_of_it_is_not_denied() -> None:
    assert negatives("No significant pleural effusion.", "No significant pleural effusion.", "negation") == set()
