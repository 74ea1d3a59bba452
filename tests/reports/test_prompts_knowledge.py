"""Descriptors from a language model: only what the table supports gets in, and every other line says why not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reports.prompts import PromptSet, load_prompts, prompt_faults
from reports.prompts.knowledge import EXCLUDES, FilteredDescriptors, KnowledgeRow, filter_descriptors, load_knowledge

TABLE = """finding,relation,attribute
pleural_effusion,shows,blunted costophrenic angle
pleural_effusion,shows,meniscus sign
pleural_effusion,located_at,lung base
pleural_effusion,excludes,lung markings beyond the line
edema,shows,Kerley B lines
edema,shows,oedematous haze
"""


@pytest.fixture
def knowledge(tmp_path: Path) -> tuple[KnowledgeRow, ...]:
    return load_knowledge(write(tmp_path / "table.csv", TABLE))


def write(file: Path, text: str) -> Path:
    file.write_text(text, encoding="utf-8")
    return file


def sort(folder: Path, knowledge: tuple[KnowledgeRow, ...], *lines: object) -> FilteredDescriptors:
    file = write(folder / "candidates.jsonl", "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return filter_descriptors(file, knowledge, load_prompts("chest_xray"))


def candidate(descriptor: str, finding: str = "pleural_effusion", **more: object) -> dict[str, object]:
    return {"finding": finding, "descriptor": descriptor, **more}


def test_what_the_table_supports_gets_in_with_its_rows(tmp_path: Path, knowledge: tuple[KnowledgeRow, ...]) -> None:
    found = sort(
        tmp_path,
        knowledge,
        candidate("a blunted costophrenic angle", model="any", confidence=0.3),
        candidate("blunted costophrenic angles at the lung base", number="plural"),
        candidate("a meniscus"),
        candidate("some Kerley B lines in pulmonary edema", "edema"),
        candidate("an edematous haze", "edema"),
    )
    assert [(one.line, one.descriptor) for one in found.accepted] == [
        (1, "a blunted costophrenic angle"),
        (2, "some blunted costophrenic angles at the lung base"),
        (3, "a meniscus"),
        (4, "some Kerley B lines in pulmonary edema"),
        (5, "an edematous haze"),  # the table spells it the British way
    ]
    assert found.rejected == ()
    assert [row.line for row in found.accepted[1].support] == [2, 4]
    prompts = load_prompts("chest_xray").with_descriptors(found.by_finding)
    added = [one.positive for one in prompts.descriptors("pleural_effusion")][-3:]
    assert added[1] == "There are blunted costophrenic angles at the lung base indicating a pleural effusion."
    assert prompt_faults(prompts) == ()
    assert prompts.sha256 != load_prompts("chest_xray").sha256


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (candidate("a blunted costophrenic angle with air in the biliary tree"), "the table does not support air, biliary, tree"),
        (candidate("a blunted costophrenic angle above the diaphragm"), "the table does not support above, diaphragm"),
        (candidate("a large heart"), "no attribute of its finding is in it"),
        (candidate("some Kerley B lines"), "no attribute of its finding is in it"),  # of another finding
        (candidate("lung markings beyond the line and a meniscus"), "row 5 of the table says that this speaks against the finding"),
        (candidate("absent meniscus sign"), "it denies, and a descriptor is what is seen"),
        (candidate("a meniscus sign."), "it is not a noun phrase without a stop"),
        (candidate("a meniscus {sign}"), "it has a brace in it"),
        (candidate("a tophus", "gout"), "its finding is not in the prompt set"),
        (candidate("a rounded edge", "atelectasis"), "the table has no row for its finding"),
        (candidate("   "), "descriptor is empty"),
        ({"finding": "edema"}, "descriptor is missing"),
        ({"finding": 3, "descriptor": ["a haze"]}, "finding is not text, descriptor is not text"),
        (candidate("a meniscus", number="dual"), "number is not right"),
        ("{broken", "it is not a JSON object"),
        ("[1, 2]", "it is not a mapping"),
        ('"__import__(\\"os\\")"', "it is not a mapping"),
    ],
)
def test_what_it_does_not_support_is_left_out_with_the_reason(
    tmp_path: Path, knowledge: tuple[KnowledgeRow, ...], line: object, reason: str
) -> None:
    found = sort(tmp_path, knowledge, candidate("a meniscus sign"), line)
    assert [one.line for one in found.accepted] == [1]
    (one,) = found.rejected
    assert one.line == 2 and one.reason == reason


def test_a_descriptor_is_taken_once(tmp_path: Path, knowledge: tuple[KnowledgeRow, ...]) -> None:
    found = sort(
        tmp_path, knowledge, candidate("a meniscus sign"), "", candidate("the sign of a Meniscus"), candidate("a meniscus at the lung base")
    )
    assert [one.line for one in found.accepted] == [1, 4]
    assert [(one.line, one.reason) for one in found.rejected] == [(3, "it says what another descriptor of the finding says")]
    grown = load_prompts("chest_xray").with_descriptors(found.by_finding)
    again = filter_descriptors(tmp_path / "candidates.jsonl", knowledge, grown)
    assert again.accepted == () and len(again.rejected) == 3


def test_bytes_that_are_no_text_reject_their_line_only(tmp_path: Path, knowledge: tuple[KnowledgeRow, ...]) -> None:
    file = tmp_path / "candidates.jsonl"
    file.write_bytes(b'\xff\xfe{"finding"\n' + json.dumps(candidate("a meniscus")).encode() + b"\r\n")
    found = filter_descriptors(file, knowledge, load_prompts("chest_xray"))
    assert [one.line for one in found.accepted] == [2] and [one.line for one in found.rejected] == [1]


def test_the_table_may_be_yaml(tmp_path: Path, knowledge: tuple[KnowledgeRow, ...]) -> None:
    rows = [{"finding": row.finding, "relation": row.relation, "attribute": row.attribute} for row in knowledge]
    again = load_knowledge(write(tmp_path / "table.yaml", yaml.safe_dump(rows)))
    assert [(r.finding, r.relation, r.attribute) for r in again] == [(r.finding, r.relation, r.attribute) for r in knowledge]
    assert [row.line for row in again] == list(range(1, len(rows) + 1))
    assert sum(row.relation == EXCLUDES for row in again) == 1


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "finding,attribute\nedema,haze\n", "no column relation; expected finding, relation, attribute"),
        ("t.csv", "", "no column finding, relation, attribute"),
        ("t.csv", "finding,relation,attribute\n", "it has no rows"),
        ("t.csv", "finding,relation,attribute\nedema,shows\nedema,,haze\n", "row 2: attribute is missing; row 3: relation is empty"),
        (
            "t.csv",
            "finding,relation,attribute\ngout,shows,secret words\nedema,shows,of the\n",
            "row 2: its finding is unknown; row 3: its attribute",
        ),
        ("t.csv", 'finding,relation,attribute\nedema,shows,"haze', "not readable in UTF-8"),
        ("t.yaml", "finding: edema", "expected a list of mappings"),
        ("t.yaml", "[1, {finding: edema, relation: shows}]", "row 1: it is not a mapping; row 2: attribute is missing"),
        ("t.yaml", "!!python/object/apply:os.system ['true']", "not readable in UTF-8"),
    ],
)
def test_a_wrong_table_names_every_wrong_row(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=name.replace(".", r"\.")) as caught:
        load_knowledge(write(tmp_path / name, text), known=load_prompts("chest_xray").findings)
    assert message in str(caught.value) and "secret" not in str(caught.value)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="knowledge table"):
        load_knowledge(tmp_path / "none.csv")
    with pytest.raises(FileNotFoundError, match="candidates"):
        filter_descriptors(tmp_path / "none.jsonl", (), load_prompts())


@pytest.fixture(scope="module")
def prompts() -> PromptSet:
    return load_prompts("chest_xray")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(st.one_of(st.text(max_size=20), st.builds(lambda t: json.dumps(candidate(t)), st.text(max_size=20))), max_size=6))
def test_every_line_is_accounted_for_once(
    tmp_path: Path, knowledge: tuple[KnowledgeRow, ...], prompts: PromptSet, lines: list[str]
) -> None:
    data = "\n".join(lines).encode("utf-8", "surrogatepass")
    (tmp_path / "candidates.jsonl").write_bytes(data)
    found = filter_descriptors(tmp_path / "candidates.jsonl", knowledge, prompts)
    numbers = [one.line for one in (*found.accepted, *found.rejected)]
    assert sorted(numbers) == [i for i, line in enumerate(data.splitlines(), start=1) if line.strip()]
