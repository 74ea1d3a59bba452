"""Prompt files: YAML of two formats to a :class:`PromptSet`, with every fault of a file named at once.

A file with ``format: 2`` gives words of which prompts are made (``reports/prompts/chest_xray.yaml`` shows all keys); one without has
whole sentences, as ``reports/prompts/prompts.yaml``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError
from pydantic_core import ErrorDetails

from reports.prompts.faults import prompt_faults, template_faults
from reports.prompts.nouns import Noun
from reports.prompts.registry import FindingWords, PromptPair, PromptSet, Templates, filled, finding_words

BUILT_IN: Mapping[str, str] = {
    "phantom": "prompts.yaml",
    "chest_xray": "chest_xray.yaml",
    "chest_ct": "chest_ct.yaml",
    "chexpert_14": "chest_xray.yaml",
    "chestxray_14": "chest_xray.yaml",
    "ct_rate_18": "chest_ct.yaml",
    **dict.fromkeys(("vindr_cxr", "rsna", "siim", "openi_18", "padchest"), "chest_xray_more.yaml"),
    **dict.fromkeys(("abdomen_ct", "merlin_30"), "abdomen_ct.yaml"),
}
"""Names that :func:`load_prompts` takes in place of a path; the name of a label set gives the findings of that set and their kinds."""


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _as_noun(value: Any) -> Noun:
    if not isinstance(value, str):
        raise ValueError("expected a noun phrase; quote words such as no and yes")
    return Noun.read(value)


Text = Annotated[str, BeforeValidator(lambda v: " ".join(v.split()) if isinstance(v, str) else v), Field(min_length=1)]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$")]
NounPhrase = Annotated[Noun, BeforeValidator(_as_noun)]
Sentences = Annotated[tuple[Text, ...], Field(min_length=1, strict=False)]
Words = Annotated[tuple[Text, ...], Field(strict=False)]
Nouns = Annotated[tuple[NounPhrase, ...], Field(strict=False)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True)


class _Pair(_Part):
    """A finding of the first format."""

    positive: Sentences
    negative: Sentences
    phrase: str | None = None


class _Pairs(_Part):
    """A file of the first format."""

    version: Annotated[str, BeforeValidator(_as_text)]
    findings: dict[Name, _Pair] = Field(min_length=1)
    label_sets: dict[Name, dict[Text, Name]] = {}


class _Templates(_Part):
    positive: Words = Templates().positive
    negative: Words = Templates().negative
    uncertain: Words = Templates().uncertain
    expanded: Words = Templates().expanded
    described: Text = Templates().described
    undescribed: Text = Templates().undescribed


class _Finding(_Part):
    """A finding of the second format."""

    name: NounPhrase | None = None
    synonyms: Nouns = ()
    positive: Words = ()
    negative: Words = ()
    uncertain: Words = ()
    phrase: str | None = None
    severities: Words = ()
    subtypes: Nouns = ()
    locations: Words = ()
    descriptors: Nouns = ()
    parents: Annotated[tuple[Name, ...], Field(strict=False)] = ()
    normal: bool = False


class _Registry(_Part):
    """A file of the second format."""

    format: Literal[2]
    version: Annotated[str, BeforeValidator(_as_text)]
    extends: str | None = None
    templates: _Templates | None = None
    findings: dict[Name, _Finding] = Field(min_length=1)
    label_sets: dict[Name, dict[Text, Name]] = {}
    exceptions: Words = ()


def load_prompts(path: Path | str | None = None) -> PromptSet:
    """Read a prompt file, or one that comes with the package.

    Args:
        path: a file, or a name of :data:`BUILT_IN`; None takes the sentences for the findings of the phantoms. A file of that name in the
            working folder comes first.
    Raises:
        FileNotFoundError: no such file and no such name.
        ValueError: not YAML, not one of the formats, or (``format: 2``) sentences that contradict each other or do not say what they stand
            for, see :func:`prompt_faults`; the message names every fault, not only the first.
    """
    path = Path("phantom" if path is None else path)
    if path.is_file():
        return _read(path)
    name = str(path)
    if name not in BUILT_IN:
        raise FileNotFoundError(
            f"no prompt file {path}; omit it to use the built-in prompts, name others that are built in ({', '.join(BUILT_IN)}), "
            "or copy reports/prompts/prompts.yaml and edit"
        )
    prompts = _read(Path(__file__).with_name(BUILT_IN[name]))
    if name in prompts.label_sets:
        return prompts.subset(prompts.label_set(name).values(), with_children=True)
    return prompts


def dump_prompts(prompts: PromptSet) -> str:
    """A set as the YAML of a prompt file; :func:`load_prompts` of it gives an equal set. For a set that code has changed."""
    findings = {}
    for name, pair in prompts.findings.items():
        words = prompts.words.get(name)
        entry: dict[str, Any] = {"positive": list(pair.positive), "negative": list(pair.negative), "phrase": pair.phrase}
        if words is not None:
            entry["name"], *entry["synonyms"] = (noun.written for noun in words.names)
            entry |= {key: [noun.written for noun in getattr(words, key)] for key in ("subtypes", "descriptors")}
            entry |= {key: list(getattr(words, key)) for key in ("uncertain", "severities", "locations", "parents")}
            entry["normal"] = words.normal
        findings[name] = {key: value for key, value in entry.items() if value or key == "phrase"}
    content: dict[str, Any] = {"version": prompts.version, "findings": findings}
    if prompts.words or prompts.label_sets or prompts.templates != Templates():
        templates = {key: list(v) if isinstance(v, tuple) else v for key, v in vars(prompts.templates).items()}
        content |= {"format": 2, "templates": templates, "label_sets": {k: dict(v) for k, v in prompts.label_sets.items()}}
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)


def _read(file: Path) -> PromptSet:
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"prompt file {file} is not readable YAML in UTF-8: {' '.join(str(error).split())}") from error
    second = isinstance(content, dict) and "format" in content
    try:
        parsed = _Registry.model_validate(content) if second else _Pairs.model_validate(content)
    except ValidationError as error:
        raise _invalid(file, [_fault(one) for one in error.errors()]) from error
    if isinstance(parsed, _Pairs):
        pairs = {name: _pair(name, one) for name, one in parsed.findings.items()}
        prompts = PromptSet(parsed.version, pairs, label_sets=parsed.label_sets)
        faults = prompt_faults(prompts, wording=False)
    else:
        base = _base(file, parsed.extends)
        templates = base.templates if parsed.templates is None else Templates(**vars(parsed.templates))
        if faults := template_faults(templates):
            raise _invalid(file, faults)
        words = {name: _finding_words(name, one) for name, one in parsed.findings.items()}
        pairs = {name: _made_pair(one, words[name], templates) for name, one in parsed.findings.items()}
        given = {name: words[name] for name, one in parsed.findings.items() if one.model_fields_set - _Pair.model_fields.keys()}
        pairs, given = {**base.findings, **pairs}, {**{k: v for k, v in base.words.items() if k not in pairs}, **given}
        prompts = PromptSet(parsed.version, pairs, given, templates, parsed.label_sets)
        faults = prompt_faults(prompts, exceptions=parsed.exceptions)
    if faults:
        raise _invalid(file, faults)
    return prompts


def _base(file: Path, extends: str | None) -> PromptSet:
    """The built-in set that a file extends: it has the findings of that set besides its own, which come first, and its templates."""
    if extends is None:
        return PromptSet("", {})
    if extends not in BUILT_IN:
        raise _invalid(file, [f"extends {extends!r}: no such built-in set; known are {', '.join(BUILT_IN)}"])
    return _read(Path(__file__).with_name(BUILT_IN[extends]))


def _pair(name: str, entry: _Pair) -> PromptPair:
    return PromptPair(entry.positive, entry.negative, entry.phrase or finding_words(name))


def _finding_words(name: str, entry: _Finding) -> FindingWords:
    return FindingWords(
        names=(entry.name or Noun(finding_words(name)), *entry.synonyms),
        uncertain=entry.uncertain,
        severities=entry.severities,
        subtypes=entry.subtypes,
        locations=entry.locations,
        descriptors=entry.descriptors,
        parents=entry.parents,
        normal=entry.normal,
    )


def _made_pair(entry: _Finding, words: FindingWords, templates: Templates) -> PromptPair:
    """Sentences that the entry gives stand for those of the templates; a class that says that nothing is wrong has only its own."""
    positive, negative = ((), ()) if words.normal else (templates.positive, templates.negative)
    return PromptPair(
        entry.positive or filled(positive, words.names),
        entry.negative or filled(negative, words.names),
        entry.phrase or words.names[0].text,
    )


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML keeps the last of two equal keys without a word; a finding given twice is a fault here."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _invalid(file: Path, faults: Sequence[str]) -> ValueError:
    return ValueError(f"prompt file {file}: {'; '.join(faults)}. See reports/prompts/prompts.yaml, for format 2 chest_xray.yaml beside it")


_WHAT_IS_WRONG = {
    "missing": "is missing or empty",
    "too_short": "is missing or empty",
    "string_too_short": "is empty",
    "extra_forbidden": "is an unknown key",
    "string_type": "is not text (quote words such as no and yes)",
    "tuple_type": "is not a list",
    "dict_type": "is not a mapping",
    "model_type": "is not a mapping",
    "bool_type": "is not true or false",
    "string_pattern_mismatch": "is not a name in snake_case, such as pleural_effusion",
}
_EXPECTED = {
    "version": 'a string such as "1"',
    "findings": "a mapping from finding name to prompts",
    "positive": "a list of sentences",
    "negative": "a list of sentences",
    "it": "a mapping such as {positive: [...], negative: [...]}",
    "the file": "a mapping with the keys version and findings",
    "format": "2, or no such key for a file of whole sentences",
}


def _fault(error: ErrorDetails) -> str:
    """One error of pydantic in our words: where it is, what was expected."""
    loc = [str(part) for part in error["loc"] if part != "[key]"]
    where = f"finding {loc[1]}: " if len(loc) > 1 and loc[0] == "findings" else ""
    field = " ".join(loc[2:] if where else loc) or ("it" if where else "the file")
    wrong = _WHAT_IS_WRONG.get(error["type"]) or f"is not right ({error['msg'].removeprefix('Value error, ')})"
    expected = f" (expected {_EXPECTED[field]})" if field in _EXPECTED else ""
    return f"{where}{field} {wrong}{expected}"
