"""Records, quotes and JSONL files, against JSON schema, regular expressions and hand-made reports."""

import csv
import hashlib
import json
import logging
import os
import pickle
import re
import tarfile
from xml.etree import ElementTree

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medvl.types import Fact
from reports.facts import LexiconFacts, Statement
from reports.facts.statements import described
from reports.providers.base import audit
from reports.providers.files import JsonlFacts, read_studies, write_jsonl
from reports.providers.keys import text_key
from reports.providers.minimal import is_minimal, minimal_sentence, minimal_sentences
from reports.providers.names import FindingNames
from reports.providers.records import RecordError, Rejection, count_reasons, parse_line, parse_record, response_schema, write_rejections
from reports.providers.spans import CompactText, gives_size, names_other_side, stated_sentences
from reports.providers.texts import MinimalSentences
from reports.sentences import split_sentences
from reports.text_source import ReportSentences

REPORT = """CHEST, 2 VIEWS

FINDINGS: Small left
  pleural effusion, 1.2 cm deep. No pneumothorax or edema.
IMPRESSION:
1. Possible nodule in the right upper lobe, unchanged.
2. Endotracheal tube in place."""

RECORD = {
    "sentences": [
        {
            "text": "Small left pleural effusion, 1.2 cm deep.",
            "facts": [
                {
                    "finding": "pleural_effusion",
                    "state": "present",
                    "side": "left",
                    "severity": "mild",
                    "size_mm": 12,
                    "quote": "left pleural effusion",
                }
            ],
        },
        {
            "text": "No pneumothorax or edema.",
            "facts": [
                {"finding": "pneumothorax", "state": "absent", "quote": "No pneumothorax"},
                {"finding": "edema", "state": "absent", "quote": "edema"},
            ],
        },
        {
            "text": "Possible nodule in the right upper lobe, unchanged.",
            "compares": True,
            "facts": [
                {
                    "finding": "Nodule",
                    "state": "uncertain",
                    "side": "right",
                    "location": "upper lobe",
                    "change": "unchanged",
                    "quote": "nodule",
                }
            ],
        },
    ]
}


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def jsonl(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), encoding="utf-8")
    return path


def changed(**changes):
    """The record with its first fact changed."""
    record = json.loads(json.dumps(RECORD))
    record["sentences"][0]["facts"][0].update(changes)
    return record


@pytest.fixture
def source(tmp_path):
    return JsonlFacts(jsonl(tmp_path / "facts.jsonl", {"text_sha256": sha256(REPORT), **RECORD}))


def test_the_facts_of_a_file_come_with_the_words_they_quote(source):
    statements = list(source.facts(REPORT))
    assert [(REPORT[s.start : s.end], s.fact.finding, s.fact.state, s.change) for s in statements] == [
        ("left\n  pleural effusion", "pleural_effusion", "present", None),
        ("No pneumothorax", "pneumothorax", "absent", None),
        ("edema", "edema", "absent", None),
        ("nodule", "lung_nodule", "uncertain", "unchanged"),
    ]
    assert statements[0].fact == Fact("pleural_effusion", "present", "left", severity="mild", size_mm=12.0)


def test_sentences_are_those_of_every_other_source(source):
    got, reference = source.sentences(REPORT), LexiconFacts().sentences(REPORT)
    assert [(s.text, s.start, s.end, s.section) for s in got] == [(s.text, s.start, s.end, s.section) for s in reference]
    assert [len(s.statements) for s in got if s.section in ("findings", "impression")] == [1, 2, 1, 0]
    assert [s.compares for s in got if s.section == "impression"] == [True, False]


def test_white_space_of_the_report_may_differ_where_the_hash_leaves_it_out(source, tmp_path):
    flat = " ".join(REPORT.split())
    assert source.reading(flat) is None
    source = JsonlFacts(jsonl(tmp_path / "facts.jsonl", {"text_sha256": sha256("".join(REPORT.split())), **RECORD}))
    known = source.reading(flat)
    assert known is not None and not known.rejections
    assert [" ".join(flat[s.start : s.end].split()) for s in known.statements] == [
        "left pleural effusion",
        "No pneumothorax",
        "edema",
        "nodule",
    ]
    assert source.reading(REPORT.replace("left", "right")) is None


def test_an_unknown_report_states_nothing_or_what_the_fallback_says(source, tmp_path):
    text = "There is a pleural effusion."
    assert not source.knows(text) and [s.statements for s in source.sentences(text)] == [()]
    with_fallback = JsonlFacts(source.path, fallback=LexiconFacts())
    assert [s.fact.finding for s in with_fallback.facts(text)] == ["pleural_effusion"]
    assert source.sentences("") == ()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"quote": "right pleural effusion"}, "the quoted words are not in the sentence"),
        ({"quote": "pneumothorax"}, "the quoted words are not in the sentence"),  # there, but in another sentence
        ({"quote": "eft pleural effusion"}, "the quoted words are not in the sentence"),  # part of a word
        ({"side": "right"}, "the sentence names the other side only"),
        ({"size_mm": 14}, "the size is not in the sentence"),
        ({"finding": "phlogiston"}, "the finding is not in the table of names"),
        ({"start": 3}, "expected both start and end, or neither"),
        ({"quote": None, "start": 0, "end": 5}, "start and end are not those of words of the sentence"),
    ],
)
def test_made_up_facts_are_refused_and_the_others_stay(tmp_path, changes, reason):
    source = JsonlFacts(jsonl(tmp_path / "facts.jsonl", {"text_sha256": sha256(REPORT), **changed(**changes)}))
    reading = source.reading(REPORT)
    assert reading.rejections == (Rejection(1, "sentences[0].facts[0]", reason),)
    assert [s.fact.finding for s in reading.statements] == ["pneumothorax", "edema", "lung_nodule"]


@pytest.mark.parametrize(
    ("report", "side", "kept"),
    [
        ("There is an effusion.", "left", False),  # made up
        ("The left lung: there is an effusion.", "left", True),
        ("Left base is hazy. There is an effusion.", "left", True),  # named before
        ("There is an effusion. The left base is clear.", "left", False),  # named after
        ("Right base clear. Left base hazy. There is an effusion.", "bilateral", True),
        ("Left base hazy. There is an effusion.", "bilateral", False),
        ("Hazy lingula. There is an effusion.", "left", True),
        ("Both bases hazy. There is an effusion.", "right", True),
    ],
)
def test_a_side_is_named_in_the_sentence_or_before_it(tmp_path, report, side, kept):
    sentence = "There is an effusion." if "There is" in report else report
    sentence = report if report.startswith("The left lung") else sentence
    fact = {"finding": "pleural_effusion", "state": "present", "side": side, "quote": "effusion"}
    record = {"text_sha256": sha256(report), "sentences": [{"text": sentence, "facts": [fact]}]}
    reading = JsonlFacts(jsonl(tmp_path / "facts.jsonl", record)).reading(report)
    assert [s.fact.side for s in reading.statements] == [side] * kept
    assert [r.reason for r in reading.rejections] == ["neither the sentence nor the text before it names the side"] * (not kept)


def test_two_lines_of_one_text_are_one_if_they_say_the_same(tmp_path):
    one = {"text_sha256": sha256(REPORT), **changed()}
    other = {"text_sha256": sha256(REPORT), "sentences": []}
    assert JsonlFacts(jsonl(tmp_path / "a.jsonl", one, one)).rejections == ()
    source = JsonlFacts(jsonl(tmp_path / "b.jsonl", one, other))
    assert source.rejections == (Rejection(2, "", "the text of line 1 with other sentences; that one counts"),)
    assert len(source.reading(REPORT).statements) == 4


def test_a_sentence_that_is_not_in_the_report_is_refused_with_its_facts(tmp_path):
    record = {"text_sha256": sha256(REPORT), "sentences": [{"text": "Large mass.", "facts": [{"finding": "mass", "state": "present"}]}]}
    reading = JsonlFacts(jsonl(tmp_path / "facts.jsonl", record)).reading(REPORT)
    assert reading.statements == () and reading.rejections == (Rejection(1, "sentences[0]", "the sentence is not in the text"),)


def test_offsets_are_used_where_right_and_found_anew_where_wrong(tmp_path):
    start = REPORT.index("left\n")
    right = changed(quote=None, start=start, end=start + len("left\n  pleural effusion"))
    wrong = changed(start=0, end=4)
    for record in (right, wrong):
        source = JsonlFacts(jsonl(tmp_path / "facts.jsonl", {"text_sha256": sha256(REPORT), **record}))
        first = next(source.facts(REPORT))
        assert REPORT[first.start : first.end] == "left\n  pleural effusion"


def test_every_bad_line_is_listed_and_none_is_shown(tmp_path, caplog):
    secret = "Zebra"
    good = {"text_sha256": sha256(REPORT), **RECORD}
    lines = [
        good,
        f'{{"text_sha256": "{secret}',
        "",
        {**RECORD},
        {**good, "text_sha256": secret},
        {"text_sha256": sha256(REPORT), "sentences": [{"text": "x", secret: secret, "facts": []}]},
        {"text_sha256": sha256(REPORT), **changed(state=secret)},
        {"text_sha256": sha256(REPORT), **changed(size_mm=-3)},
        json.dumps({"text_sha256": sha256(REPORT), **changed()}).replace("12", "NaN"),
        {"study_id": secret, **RECORD},
        [good],
        f'"{secret}"',
        "[" * 100_000,
    ]
    path = jsonl(tmp_path / "facts.jsonl", *lines)
    with path.open("ab") as file:
        file.write(b'{"study_id": "\xff\xfe"}\n')
    with caplog.at_level(logging.DEBUG):
        source = JsonlFacts(path)
    assert source.knows(REPORT)
    assert [r.row for r in source.rejections] == [2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
    assert [r.place for r in source.rejections][3:6] == ["sentences[0].*", "sentences[0].facts[0].state", "sentences[0].facts[0].size_mm"]
    assert secret not in repr(source.rejections) and secret not in caplog.text
    assert "12 records refused" in caplog.text
    out = tmp_path / "refused.csv"
    assert write_rejections(out, source.rejections) == 12
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["row"]) for row in rows] == [r.row for r in source.rejections]
    assert sum(count_reasons(source.rejections).values()) == 12


def test_a_line_that_is_too_long_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr("reports.providers.files._LONGEST_LINE", 4000)
    long = {"text_sha256": sha256("x"), "sentences": [], "note": "y" * 9000}
    lines = [long, {"text_sha256": sha256(REPORT), **RECORD}, long]
    source = JsonlFacts(jsonl(tmp_path / "facts.jsonl", *lines))
    assert [r.row for r in source.rejections] == [1, 3] and source.knows(REPORT)


def test_a_file_without_a_usable_line_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"no record can be used; first at row 1, record: expected study_id or text_sha256"):
        JsonlFacts(jsonl(tmp_path / "facts.jsonl", RECORD))
    with pytest.raises(ValueError, match="it holds no record"):
        JsonlFacts(jsonl(tmp_path / "empty.jsonl"))
    with pytest.raises(FileNotFoundError):
        JsonlFacts(tmp_path / "missing.jsonl")


def test_a_file_that_changes_is_told_of(source):
    with source.path.open("a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match="has changed since it was read, at line 1"):
        source.sentences(REPORT)
    stamp = source.path.stat()
    again = JsonlFacts(source.path)
    os.utime(source.path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    with pytest.raises(ValueError, match="has changed"):
        again.sentences(REPORT)


def test_a_byte_order_mark_and_a_missing_last_line_break_do_no_harm(tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"text_sha256": sha256(REPORT), **RECORD}).encode())
    source = JsonlFacts(path)
    assert source.rejections == () and len(list(source.facts(REPORT))) == 4


def test_studies_are_found_by_any_of_their_texts(tmp_path):
    findings, impression = "Small left pleural effusion, 1.2 cm deep. No pneumothorax or edema.", "Possible nodule."
    table = tmp_path / "reports.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["study_id", "findings", "impression", "age"])
        writer.writerow(["7", findings, impression, "x"])
        writer.writerow(["8", "", "Clear lungs.", "x"])
    path = jsonl(tmp_path / "facts.jsonl", {"study_id": 7, **RECORD}, {"study_id": "7", **RECORD}, {"study_id": "9", **RECORD})
    source = JsonlFacts(path, reports=table)
    assert [(r.row, r.place) for r in source.rejections] == [(2, "study_id"), (3, "study_id")]
    assert "9" not in repr(source.rejections[1].reason)
    for text in (findings, impression, findings + "\n\n" + impression):
        assert source.knows(text)
    assert not source.knows("Clear lungs.")
    assert [s.fact.finding for s in source.facts(findings)] == ["pleural_effusion", "pneumothorax", "edema"]
    checked = audit(source, [(findings, impression), ("Clear lungs.",)])
    assert (checked.studies, checked.known, checked.statements) == (2, 1, 3)
    assert [r.place for r in checked.rejections] == ["sentences[2]"]  # the others are in one of the texts
    with pytest.raises(ValueError, match="expected the column study_id"):
        read_studies(jsonl(tmp_path / "bad.csv", "a,b", "1,2"))


def test_names_are_a_table_then_ids_then_a_lexicon():
    assert FindingNames().finding("Pleural Effusion") == FindingNames().finding("effusions") == "pleural_effusion"
    assert FindingNames().finding("phlogiston") is None
    assert FindingNames().finding("clear lungs") is None  # denies findings, names none
    table = FindingNames({"Water-Lung": "edema", "No Finding": None})
    assert table.finding("water lung") == "edema" and table.finding("effusions") is None and table.finding("edema") == "edema"
    assert table.ignores("no_finding") and table.finding("No Finding") is None and not table.ignores("edema")
    with pytest.raises(ValueError, match="is there twice"):
        FindingNames({"a b": "edema", "A-B": "pneumonia"})


def test_a_source_can_be_saved_and_sent_to_a_worker(tmp_path):
    path = jsonl(tmp_path / "facts.jsonl", {"text_sha256": sha256(REPORT), **RECORD})
    source = JsonlFacts(path, names={"nodule": "lung_nodule"})
    spec = source.spec()
    assert json.loads(json.dumps(spec)) == spec
    again = JsonlFacts.rebuild(spec["init_args"], tmp_path)
    sent = pickle.loads(pickle.dumps(source))
    assert source.sentences(REPORT) == again.sentences(REPORT) == sent.sentences(REPORT)


def test_what_is_written_is_read_again(source, tmp_path):
    out = tmp_path / "again.jsonl"
    assert write_jsonl(out, [(REPORT, record) for record in source.records()]) == 1
    assert JsonlFacts(out).sentences(REPORT) == source.sentences(REPORT)


def test_facts_of_real_reports_survive_the_way_through_a_file(tmp_path, shared_data):
    """What the lexicon says of real reports, written as records with quotes, is accepted whole and comes back as it was."""
    lexicon, texts = LexiconFacts(), []
    with tarfile.open(shared_data / "reports" / "openi_reports.tgz") as archive:
        for member in sorted((m for m in archive.getmembers() if m.name.endswith(".xml")), key=lambda m: m.name)[::20]:
            root = ElementTree.parse(archive.extractfile(member)).getroot()
            texts.append("\n".join(f"{e.get('Label')}: {e.text}" for e in root.iter("AbstractText") if e.text))
    stated = {text: lexicon.sentences(text) for text in texts if text.strip()}
    records = []
    for text, sentences in stated.items():
        listed = []
        for one in sentences:
            facts = [{**vars(s.fact), "change": s.change, "quote": text[s.start : s.end]} for s in one.statements]
            listed.append({"text": text[one.start : one.end], "compares": one.compares, "facts": facts})
        records.append((text, parse_record({"sentences": listed})))
    write_jsonl(tmp_path / "facts.jsonl", records)
    source = JsonlFacts(tmp_path / "facts.jsonl")
    assert source.rejections == () and len(stated) > 150
    for text, sentences in stated.items():
        assert source.reading(text).rejections == ()
        assert [(s.text, s.start, s.end, s.section) for s in source.sentences(text)] == [
            (s.text, s.start, s.end, s.section) for s in sentences
        ]
        expected = sorted((s for one in sentences for s in one.statements), key=lambda s: (text[s.start : s.end], s.fact.finding))
        got = sorted((s for one in source.sentences(text) for s in one.statements), key=lambda s: (text[s.start : s.end], s.fact.finding))
        assert [(s.fact, s.change) for s in got] == [(s.fact, s.change) for s in expected]


# ---------------------------------------------------------------- the format


def strict(record):
    """A record as an endpoint's strict schema wants it: every key there."""
    keys = ("finding", "state", "side", "location", "severity", "size_mm", "kind", "change", "quote")
    return {
        "sentences": [
            {"text": s["text"], "compares": s.get("compares", False), "facts": [{k: f.get(k) for k in keys} for f in s["facts"]]}
            for s in record["sentences"]
        ]
    }


def test_the_schema_is_one_and_within_the_strict_subset():
    schema = response_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(strict(RECORD), schema)

    def check(node):
        if node.get("type") == "object":
            assert node["additionalProperties"] is False and sorted(node["required"]) == sorted(node["properties"])
        assert set(node) <= {"type", "properties", "required", "additionalProperties", "items", "enum", "description"}
        for below in [*node.get("properties", {}).values(), *([node["items"]] if "items" in node else [])]:
            check(below)

    check(schema)
    limited = response_schema(["edema"])
    assert not jsonschema.Draft202012Validator(limited).is_valid(strict(RECORD))


JSON = st.recursive(
    st.none() | st.booleans() | st.floats(-3000, 3000, allow_nan=False) | st.sampled_from(["left", "present", "new", "mild", "", "x y"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["text", "facts", "side"]), inner, max_size=2),
    max_leaves=4,
)


@given(
    st.sampled_from(["finding", "state", "side", "location", "severity", "size_mm", "kind", "change", "quote", "text", "compares"]), JSON
)
@settings(max_examples=400, deadline=None)
def test_what_we_accept_the_schema_accepts(key, value):
    """Ours is the stricter: lengths and ranges are not part of strict schemas."""
    record = strict(RECORD)
    place = record["sentences"][0] if key in ("text", "compares") else record["sentences"][0]["facts"][0]
    place[key] = value
    valid = jsonschema.Draft202012Validator(response_schema()).is_valid(record)
    try:
        parse_record(record)
    except RecordError:
        ours_only = value == "" or (key == "size_mm" and isinstance(value, float) and not 0 < value <= 2000)
        assert ours_only or not valid
    else:
        assert valid or (key == "quote" and value is None)  # a quote may be missing in files


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
@settings(deadline=None)
def test_a_line_of_anything_is_a_record_or_a_record_error(data):
    try:
        parse_line(data)
    except RecordError as error:
        assert error.faults


@pytest.mark.parametrize("value", [{"sentences": {1, 2}}, {"sentences": [float("nan")]}, "no json", b"\xff", {"sentences": object()}])
def test_what_json_cannot_hold_is_a_record_error(value):
    with pytest.raises(RecordError):
        parse_record(value)


# ---------------------------------------------------------------- quotes

WORDS = st.lists(st.sampled_from(["no", "left", "Left", "nodule", "no dule", "1.2", "cm", ".", "İ", "ß", "a-b", "\u00a0"]), max_size=12)
SPACE = st.sampled_from([" ", "\n", "  ", "\t", ""])


@given(WORDS, st.lists(SPACE, min_size=12, max_size=12), st.integers(0, 12), st.integers(0, 12))
@settings(max_examples=500, deadline=None)
def test_a_quote_is_found_where_a_regular_expression_finds_it(words, spaces, first, last):
    text = "".join(word + space for word, space in zip(words, spaces, strict=False))
    quote = " ".join(words[first:last])
    letters = [c for c in quote if not c.isspace()]
    pattern = r"\s*".join(re.escape(c) for c in letters)
    bounded = rf"(?<!(?<=[^\W_])(?=[^\W_]))(?={pattern})" if letters else r"(?!)"
    expected = None
    for match in re.finditer(bounded, text, re.IGNORECASE):
        whole = re.compile(pattern, re.IGNORECASE).match(text, match.start())
        if not any(0 < cut < len(text) and text[cut - 1].isalnum() and text[cut].isalnum() for cut in whole.span()):
            expected = whole.span()
            break
    assert CompactText(text).find(quote) == expected


@given(st.text(max_size=80))
@settings(deadline=None)
def test_a_key_does_not_see_white_space(text):
    assert text_key(text) == text_key(" ".join(text.split())) == text_key("\n" + text + " ")


@given(st.text(alphabet="ab .\n:FINDGS", max_size=60), st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=4))
@settings(deadline=None)
def test_a_statement_is_in_the_sentence_that_it_begins_in(text, spans):
    statements = [Statement(Fact("edema", "present"), a, b) for a, b in spans]
    sentences = stated_sentences(text, statements)
    for statement in set(statements):
        homes = [s for s in sentences if s.start <= statement.start < s.end]
        assert len(homes) <= 1
        assert [s for s in sentences if statement in s.statements] == homes


@pytest.mark.parametrize(
    ("words", "side", "wrong"),
    [
        ("Opacity at the right base.", "left", True),
        ("Opacity at the right base.", "right", False),
        ("RUL nodule", "left", True),
        ("Opacities in the right base and the lingula.", "left", False),
        ("Left effusion and right nodule.", "right", False),
        ("Bilateral effusions, right larger than left.", "left", False),
        ("Both bases are clear; bright left apex.", "right", False),
        ("Effusion.", "left", False),
        ("Right effusion.", "bilateral", False),
        ("Right effusion.", None, False),
    ],
)
def test_a_side_against_the_only_one_named(words, side, wrong):
    assert names_other_side(words, side) is wrong


@pytest.mark.parametrize(
    ("words", "size_mm", "given"),
    [("1.2 x 0.8 cm", 12, True), ("12-mm nodule", 12, True), ("1.2 cm", 1.2, True), ("level 7", 12, False), (".5 cm", 5, True)],
)
def test_a_size_is_a_number_of_the_sentence(words, size_mm, given):
    assert gives_size(words, size_mm) is given


# ---------------------------------------------------------------- minimal sentences


@pytest.mark.parametrize(
    ("fact", "sentence"),
    [
        (Fact("pneumothorax", "absent"), "There is no pneumothorax."),
        (Fact("lung_nodule", "uncertain", "left", "upper lobe"), "There may be lung nodule of the left upper lobe."),
        (Fact("pleural_effusion", "present", "left", "pleural", "mild"), "There is mild left pleural effusion."),
        (Fact("atelectasis", "present", "bilateral", "lower lobe"), "There is bilateral atelectasis of the lower lobe."),
        (Fact("consolidation", "present", "right", "the right middle lobe"), "There is consolidation of the right middle lobe."),
        (Fact("support_device", "present", kind="endotracheal tube"), "There is endotracheal tube."),
        (Fact("edema", "absent", severity="severe"), "There is no edema."),
        (Fact("pleural_effusion", "present", "left", "pleura"), "There is left pleural effusion."),
        (Fact("aortic_aneurysm", "present", None, "aorta"), "There is aortic aneurysm."),
        (Fact("consolidation", "absent", "bilateral", "base"), "There is no consolidation of the base."),
        (Fact("cardiomegaly", "absent", None, "heart"), "There is no cardiomegaly."),
        (Fact("atelectasis", "present", "left", "basilar"), "There is atelectasis of the left base."),
        (Fact("edema", "present", None, "pulmonary", "mild"), "There is mild pulmonary edema."),
    ],
)
def test_a_fact_as_a_minimal_sentence(fact, sentence):
    assert minimal_sentence(fact) == sentence
    assert is_minimal(sentence)
    assert split_sentences(sentence) == (sentence,)


@pytest.mark.parametrize("finding", ["pneumothorax", "pleural_effusion", "cardiomegaly", "atelectasis", "lung_nodule", "edema"])
@pytest.mark.parametrize("state", ["present", "absent", "uncertain"])
@pytest.mark.parametrize(("side", "location"), [(None, None), ("left", "lower lobe"), ("right", None)])
def test_the_lexicon_reads_in_a_minimal_sentence_what_it_was_made_of(finding, state, side, location):
    facts = [s.fact for s in described(LexiconFacts().sentences(minimal_sentence(Fact(finding, state, side, location))))]
    assert (finding, state, side) in [(f.finding, f.state, f.side) for f in facts]


@pytest.mark.parametrize(
    "text", ["There is an effusion. There is a mass.", "Effusion.", "There is", "There was no mass.", "Is there edema?"]
)
def test_what_is_no_minimal_sentence(text):
    assert not is_minimal(text)


def test_resolved_findings_are_not_said_to_be_there():
    assert minimal_sentences([Statement(Fact("edema", "present"), 0, 1, "resolved")]) == ()


def test_minimal_sentences_of_a_study_are_its_texts(source):
    texts = MinimalSentences(source)
    wanted = (
        "There is mild left pleural effusion.",
        "There is no pneumothorax.",
        "There is no edema.",
        "There may be lung nodule of the right upper lobe.",
    )
    assert texts.texts(REPORT, None, None) == texts.texts(REPORT, "x", "y") == wanted
    assert MinimalSentences(source, uncertain=False, absent=False).texts(REPORT, None, None) == wanted[:1]
    assert texts.texts("Never seen.", None, None) == ()
    assert MinimalSentences(source, otherwise=ReportSentences()).texts("Never seen.", None, None) == ("Never seen.",)
    assert texts.texts(None, None, None) == ()


def test_minimal_sentences_of_sections(tmp_path):
    findings, impression = "Small left pleural effusion.", "Edema."
    lines = [
        {"text_sha256": sha256(text), "sentences": [{"text": text, "facts": [{"finding": finding, "state": "present"}]}]}
        for text, finding in ((findings, "pleural_effusion"), (impression, "edema"))
    ]
    each = JsonlFacts(jsonl(tmp_path / "each.jsonl", *lines))
    both = {"text_sha256": sha256("".join((findings + impression).split())), "sentences": [line["sentences"][0] for line in lines]}
    together = JsonlFacts(jsonl(tmp_path / "both.jsonl", both))
    for source in (each, together, LexiconFacts()):
        texts = MinimalSentences(source).texts("unknown", findings, impression)
        assert [text for text in texts if "effusion" in text] and "There is edema" in " ".join(texts)
    assert MinimalSentences(JsonlFacts(jsonl(tmp_path / "one.jsonl", lines[1]))).texts(None, findings, impression) == ("There is edema.",)


def test_minimal_sentences_made_elsewhere_are_checked_for_form_and_side(tmp_path):
    text = "Small left effusion."
    made = ["There is effusion of the left pleural space.", "Effusion on the left.", "There is effusion of the right pleural space."]
    record = {"text_sha256": sha256(text), "sentences": [{"text": text, "minimal": made}, {"text": "Made up.", "minimal": made[:1]}]}
    source = JsonlFacts(jsonl(tmp_path / "facts.jsonl", record))
    assert source.minimal(text) == (made[0],) == MinimalSentences(source).texts(text, None, None)
    places = [r.place for r in source.reading(text).rejections]
    assert places == ["sentences[0].minimal[1]", "sentences[0].minimal[2]", "sentences[1]"]
