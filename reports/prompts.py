"""Prompts for zero-shot diagnosis and grounding: a versioned file of sentences per finding, ours or the user's, checked on loading.

A finding has positive prompts ("There is a pleural effusion."), negative prompts and one phrase that grounding looks for. The sentences
of our file differ from every sentence that ``reports.synthetic`` can write, so that a score on phantoms is not a lookup.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class PromptPair:
    """What is said of one finding when it is there and when it is not, and the phrase that grounding looks for."""

    positive: tuple[str, ...]
    negative: tuple[str, ...]
    phrase: str


@dataclass(frozen=True)
class PromptSet:
    """Prompts of every finding in one file. ``sha256`` is of the content, not of the file's comments or layout."""

    version: str
    findings: Mapping[str, PromptPair] = field(hash=False)

    @cached_property
    def sha256(self) -> str:
        """Hash of version, finding names in their order, and sentences; results carry it beside the version."""
        content = [self.version, [[n, p.positive, p.negative, p.phrase] for n, p in self.findings.items()]]
        return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).hexdigest()

    def pair(self, finding: str) -> PromptPair:
        """The prompts of a finding in the set, else the template's (:func:`prompt_pair`)."""
        return self.findings.get(finding) or prompt_pair(finding)


def prompt_pair(finding: str) -> PromptPair:
    """Template prompts for any finding name, ``hiatal_hernia`` or "hiatal hernia".

    Raises:
        ValueError: a name without a letter.
    """
    words = " ".join(finding.replace("_", " ").split()).strip(" .")
    if not any(c.isalpha() for c in words):
        raise ValueError(f"a finding name needs letters, got {finding!r}")
    return PromptPair((f"There is {words}.",), (f"There is no {words}.",), words)


def load_prompts(path: Path | None = None) -> PromptSet:
    """Read a prompt file; without ``path`` the one that comes with the package.

    The format is that of ``reports/prompts.yaml``: ``version`` and ``findings``, each finding with lists ``positive`` and ``negative``
    and optionally ``phrase`` (else the finding's name in words).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML or not the format; the message names every fault, not only the first.
    """
    path = path or Path(__file__).with_name("prompts.yaml")
    if not path.is_file():
        raise FileNotFoundError(f"no prompt file {path}; omit it to use the built-in prompts, or copy reports/prompts.yaml and edit")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"prompt file {path} is not readable YAML in UTF-8: {' '.join(str(error).split())}") from error
    faults = _faults(content)
    if faults:
        raise ValueError(f"prompt file {path}: {'; '.join(faults)}. See reports/prompts.yaml for the format")
    return PromptSet(
        version=str(content["version"]),
        findings={
            name: PromptPair(_tidy(entry["positive"]), _tidy(entry["negative"]), entry.get("phrase") or name.replace("_", " "))
            for name, entry in content["findings"].items()
        },
    )


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML keeps the last of two equal keys without a word; a finding given twice is a fault here."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _tidy(sentences: list[str]) -> tuple[str, ...]:
    return tuple(" ".join(s.split()) for s in sentences)


def _faults(content: Any) -> list[str]:
    if not isinstance(content, dict):
        return ["expected a mapping with the keys version and findings"]
    found = []
    if not isinstance(content.get("version"), str | int | float) or isinstance(content.get("version"), bool):
        found.append('version is missing (a string such as "1")')
    if extra := sorted(map(str, set(content) - {"version", "findings"})):
        found.append(f"unknown keys {', '.join(extra)}")
    findings = content.get("findings")
    if not isinstance(findings, dict) or not findings:
        return [*found, "findings is missing or empty (a mapping from finding name to prompts)"]
    for name, entry in findings.items():
        found += [f"finding {name}: {fault}" for fault in _entry_faults(name, entry)]
    return found


def _entry_faults(name: Any, entry: Any) -> list[str]:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        return ["a name is snake_case, such as pleural_effusion"]
    if not isinstance(entry, dict):
        return ["expected a mapping with the lists positive and negative"]
    found = []
    if extra := sorted(map(str, set(entry) - {"positive", "negative", "phrase"})):
        found.append(f"unknown keys {', '.join(extra)}")
    for key in ("positive", "negative"):
        sentences = entry.get(key)
        if not isinstance(sentences, list) or not sentences:
            found.append(f"{key} is missing or empty (a list of sentences)")
        elif not all(isinstance(s, str) and s.strip() for s in sentences):
            found.append(f"{key} holds something that is not a sentence (quote words such as no and yes)")
    if not isinstance(entry.get("phrase", ""), str):
        found.append("phrase is not text")
    if not found and set(map(str.casefold, _tidy(entry["positive"]))) & set(map(str.casefold, _tidy(entry["negative"]))):
        found.append("the same sentence stands in positive and negative")
    return found
