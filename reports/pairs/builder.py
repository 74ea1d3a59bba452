"""Which texts of a batch are true of which study: the pair builder that a recipe names.

What the sentences say is read once, before training, and kept by text. A batch then costs look-ups: of each finding that a sentence
claims, and of what each study says of it.

Shapes: B studies, M different texts of the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medvl.types import KnownStudy, PairBuilder, PairStudy, SourcedText, StudyWords, TextPairs, equal_text_pairs
from reports.facts import LexiconFacts
from reports.facts.ontology import load_ontology
from reports.facts.statements import FactSource, StatedSentence, Statement
from reports.pairs.laterality import swap_left_and_right
from reports.pairs.negatives import HardNegatives, Negative, hard_negatives
from reports.pairs.null import has_no_visual_content
from reports.pairs.soft import SoftTargets, label_similarity, text_similarity
from reports.pairs.truth import FALSE, TRUE, UNKNOWN, Claim, Strictness, TruthTable, claims_of, swap_sides, with_disputes
from reports.placeholders import is_doubtful
from reports.providers.answers import AskingProvider, ProviderError
from reports.providers.base import Provider, Reading
from reports.sentences import report_sentences, split_sentences

Across = Literal["text", "findings"]
Unknown = Literal["negative", "ignore_related", "ignore"]
WithoutContent = Literal["keep", "drop", "ignore", "target"]


class ReportPairs(PairBuilder):
    """Positives, soft positives, unknown pairs, hard negatives and texts without visual content, from what reports say.

    A study's own texts, those that were not drawn for it too, are its positives whatever else is said. Of the others:

    Args:
        across: ``text``: equal texts alone are positives; ``findings``: a text is a positive of every study whose facts entail it.
        strictness: how much of a finding has to agree: ``finding`` its state, ``side`` also that, ``location`` also place and kind,
            ``all`` also degree and size.
        unknown: what becomes of a pair of which the facts tell nothing: a ``negative``; ``ignore_related`` leaves it out of the loss if the
            study speaks of a finding of the text (it is uncertain, or elsewhere); ``ignore`` leaves out also what the study is silent on.
        unmentioned: ``absent`` takes findings that a report does not mention to be absent.
        without_content: what becomes of texts without visual content (:mod:`reports.pairs.null`): ``keep`` trains on them; ``drop`` never
            draws them; ``ignore`` draws them and leaves them out of the loss; ``target`` aligns them with a learned null image
            (``null_target`` of the module), so that they keep away from every image. Leaving out is the plain choice; the target also
            teaches the text tower what is no finding.
        soft: weights of pairs that are no positives; None: such pairs have none.
        negatives: hard negatives of every training batch; None: none.
        facts: finds what a text states; None takes :class:`reports.facts.LexiconFacts`. A provider of facts made elsewhere is asked for
            whole reports and sections; give it the lexicon as its fallback for texts that are no part of them.
        lexicon: folder of the lexicon whose ontology is used; None takes the one that comes with the package.
    Raises:
        ValueError: a word that is none of these.
    """

    def __init__(
        self,
        across: Across = "findings",
        strictness: Strictness = "location",
        unknown: Unknown = "negative",
        unmentioned: Literal["unknown", "absent"] = "unknown",
        without_content: WithoutContent = "keep",
        soft: SoftTargets | None = None,
        negatives: HardNegatives | None = None,
        facts: FactSource | None = None,
        lexicon: Path | None = None,
    ) -> None:
        words = {"across": (across, Across), "unknown": (unknown, Unknown), "without_content": (without_content, WithoutContent)}
        for name, (value, known) in words.items():
            if value not in get_args(known):
                raise ValueError(f"{name} is {value!r}, expected one of {', '.join(get_args(known))}")
        self.across, self.unknown, self.without_content, self.soft, self.negatives = across, unknown, without_content, soft, negatives
        self.facts = LexiconFacts(lexicon) if facts is None else facts
        self.ontology = load_ontology(lexicon)
        self.table = TruthTable(self.ontology, strictness, unmentioned)
        self.exact = TruthTable(self.ontology, "all", unmentioned)  # for texts that must not be true by accident
        self.unread: dict[str, str] = {}
        self._statements: dict[str, tuple[Statement, ...]] = {}
        self._told: dict[str, tuple[Statement, ...]] = {}  # what reports that a provider knows say in these words
        self._claimed: dict[str, tuple[Claim, ...]] = {}
        self._null: dict[str, bool] = {}
        self._claims: dict[int, tuple[Claim, ...]] = {}
        self._own: dict[int, frozenset[str]] = {}
        self._profiles: dict[tuple[TruthTable, int, bool], NDArray[np.int32]] = {}
        self._negatives: dict[tuple[int, bool, str], tuple[Negative, ...]] = {}

    def prepare(self, studies: Sequence[KnownStudy]) -> None:
        """Read every sentence of every report, and every text that may be drawn, once."""
        texts: dict[str, None] = {}
        wholes = self._read_wholes(studies)
        for study, whole in zip(studies, wholes, strict=True):
            said = [s for one in study.words for s in report_sentences(one.report, one.findings, one.impression)]
            drawn = [one.text for one in study.texts]
            claims = with_disputes([*whole, *(claim for text in (*said, *drawn) for claim in self.claims(text))], self.ontology)
            self._claims.update(dict.fromkeys(study.rows, claims))
            self._own.update(dict.fromkeys(study.rows, frozenset(drawn)))
            texts.update(dict.fromkeys(drawn))
        if self.soft is not None:
            self.soft.prepare(list(texts))

    def statements(self, text: str) -> tuple[Statement, ...]:
        """What a text states; read once. A provider is asked for whole reports alone, its fallback for other texts."""
        if text not in self._statements:
            source = self.facts.fallback if isinstance(self.facts, Provider) else self.facts
            self._statements[text] = () if source is None else tuple(source.facts(text))
        return self._statements[text]

    def _read_wholes(self, studies: Sequence[KnownStudy]) -> list[list[Claim]]:
        """What a provider knows of each study's reports; a report without an answer is noted in ``unread``.

        Providers know texts by the hash of the whole text; a lexicon is asked sentence by sentence, for those recur.
        """
        if not isinstance(self.facts, Provider):
            return [[] for _ in studies]
        found, in_a_row = [], 0
        for study in studies:
            claims: list[Claim] = []
            for words in study.words:
                known = _answer(self.facts, words)
                if isinstance(known, ProviderError):
                    in_a_row += 1
                    if known.final or in_a_row >= AskingProvider.stops_after:
                        raise known
                    self._note_unread(words, str(known))
                    continue
                in_a_row = 0
                if self.facts.asks and not known and any((words.report, words.findings, words.impression)):
                    self._note_unread(words, "the answer breaks the format")
                for sentence in (one for text, reading in known for one in reading.image_sentences(text)):
                    self._keep(sentence)
                    claims += claims_of(sentence.text, sentence.statements, self.ontology)
            found.append(claims)
        return found

    def _note_unread(self, words: StudyWords, reason: str) -> None:
        self.unread[words.study_id] = f"no facts of the report: {reason}; its texts are read by the provider's fallback"

    def _keep(self, sentence: StatedSentence) -> None:
        """Note what a sentence of a report states. One that states other things in another report ("It is unchanged.") states nothing by
        itself: what it means hangs on its neighbours, and each report has its own meaning of it already.
        """
        here = tuple(replace(s, start=s.start - sentence.start, end=s.end - sentence.start) for s in sentence.statements)
        if sentence.text in self._told and self._told[sentence.text] != here:
            here = ()
        self._told[sentence.text] = self._statements[sentence.text] = here
        self._claimed.pop(sentence.text, None)
        self._null.pop(sentence.text, None)

    def claims(self, text: str) -> tuple[Claim, ...]:
        """What a text claims, each once; nothing where a removed word may have denied it ("XXXX pneumothorax")."""
        if text not in self._claimed:
            doubtful = any(map(is_doubtful, split_sentences(text)))
            self._claimed[text] = () if doubtful else claims_of(text, self.statements(text), self.ontology)
        return self._claimed[text]

    def is_null(self, text: str) -> bool:
        """Whether no sentence of a text has visual content."""
        if text not in self._null:
            self._null[text] = not self.statements(text) and all(map(has_no_visual_content, split_sentences(text)))
        return self._null[text]

    def keeps(self, text: str) -> bool:
        """Whether a text may be drawn."""
        return self.without_content != "drop" or not self.is_null(text)

    def mirrored(self, text: str) -> str | None:
        """The text with left and right exchanged, see :func:`reports.pairs.laterality.swap_left_and_right`."""
        return swap_left_and_right(text)

    def pairs(self, studies: Sequence[PairStudy], rng: np.random.Generator | None = None) -> TextPairs:
        """Pair a batch; without ``rng`` there are no hard negatives."""
        studies = [self._written(study) for study in studies]
        made = equal_text_pairs(studies)
        own, texts = made.positives | self._undrawn(studies, made.texts), list(made.texts)
        false = [] if rng is None else self._false_texts(studies, {one.text for one in texts}, rng)
        real, m = len(texts), len(texts) + len(false)
        values, silent = self._truth(studies, [one.text for one in texts], [negative for _, negative in false])
        for j, (whose, _) in enumerate(false):
            values[whose, real + j] = FALSE
        truth, quiet = torch.from_numpy(values), torch.from_numpy(silent)
        own = torch.cat([own, torch.zeros(len(studies), len(false), dtype=torch.bool)], dim=1)
        truth[own] = TRUE
        is_false = torch.arange(m) >= real
        is_null = torch.tensor([self.without_content != "keep" and self.is_null(one.text) for one in texts] + [False] * len(false))

        positives = (truth == TRUE) if self.across == "findings" else own
        ignore = self._ignored(truth, quiet) | (is_false & (truth != FALSE) & ~positives)
        weights = positives
        if self.soft is not None:
            similarity = self._similarity(studies, texts, own, len(false))
            weights = self.soft.weights(positives, similarity, truth == FALSE, ignore | is_false | is_null)
        if self.without_content == "ignore":
            weights, ignore = torch.where(is_null, 0, weights).to(weights.dtype), ignore | is_null
            ignore |= ~(weights > 0).any(1, keepdim=True)
        return TextPairs(
            (*texts, *(SourcedText(negative.text, f"hard negative: {negative.rule}") for _, negative in false)),
            weights,
            ignore if bool(ignore.any()) else None,
            is_false if false else None,
            is_null if self.without_content == "target" else None,
        )

    def _written(self, study: PairStudy) -> PairStudy:
        """The study with the texts of its flipped images."""
        if not study.mirrored:
            return study
        swapped = [(one, self.mirrored(one.text)) for one in study.texts]
        return replace(study, texts=tuple(replace(one, text=text) for one, text in swapped if text is not None))

    def _undrawn(self, studies: Sequence[PairStudy], texts: Sequence[SourcedText]) -> Tensor:
        """(B, M) bool, the texts of the batch that might have been drawn for a study as well."""
        plain = [one.text for one in texts]
        swapped = [self.mirrored(text) for text in plain] if any(study.mirrored for study in studies) else plain
        none: frozenset[str] = frozenset()
        own = [(self._own.get(study.row, none), swapped if study.mirrored else plain) for study in studies]
        return torch.tensor([[text in mine for text in written] for mine, written in own])

    def _said(self, study: PairStudy) -> tuple[Claim, ...]:
        claims = self._claims.get(study.row)
        if claims is None:  # not told of before: its drawn texts are all there is
            return with_disputes([claim for one in study.texts for claim in self.claims(one.text)], self.ontology)
        return swap_sides(claims) if study.mirrored else claims

    def _profile(self, study: PairStudy, table: TruthTable) -> NDArray[np.int32]:
        key = (table, study.row, study.mirrored)
        if key not in self._profiles:
            made = table.profile(self._said(study))
            if study.row not in self._claims:
                return made
            self._profiles[key] = made
        return self._profiles[key]

    def _truth(
        self, studies: Sequence[PairStudy], texts: Sequence[str], false: Sequence[Negative]
    ) -> tuple[NDArray[np.int8], NDArray[np.bool_]]:
        """(B, M) truth and silence; of hard negatives with every detail compared."""
        if self.across == "text" and self.unknown == "negative" and self.soft is None and not false:  # nobody asks
            return np.zeros((len(studies), len(texts)), dtype=np.int8), np.ones((len(studies), len(texts)), dtype=np.bool_)
        values, silent = self.table.of([self.claims(text) for text in texts], self._stack(studies, self.table))
        if not false:
            return values, silent
        theirs, quiet = self.exact.of([negative.claims for negative in false], self._stack(studies, self.exact))
        theirs = theirs * np.array([-1 if negative.negated else 1 for negative in false], dtype=np.int8)
        return np.concatenate([values, theirs], axis=1), np.concatenate([silent, quiet], axis=1)

    def _stack(self, studies: Sequence[PairStudy], table: TruthTable) -> NDArray[np.int32]:
        return np.stack([self._profile(study, table) for study in studies])

    def _ignored(self, truth: Tensor, quiet: Tensor) -> Tensor:
        if self.unknown == "negative":
            return torch.zeros_like(quiet)
        unknown = truth == UNKNOWN
        return unknown if self.unknown == "ignore" else unknown & ~quiet

    def _similarity(self, studies: Sequence[PairStudy], texts: Sequence[SourcedText], own: Tensor, false: int) -> Tensor:
        """(B, M) cosines; of hard negatives, which get no weight, -1."""
        assert self.soft is not None
        if self.soft.likeness == "text":
            found = text_similarity(self.soft.embeddings([one.text for one in texts]), own[:, : len(texts)])
        else:
            claims = [self.claims(one.text) for one in texts]
            found = label_similarity([self._said(study) for study in studies], claims, self.ontology.findings)
        return torch.cat([found, torch.full((len(studies), false), -1.0)], dim=1)

    def _false_texts(self, studies: Sequence[PairStudy], taken: set[str], rng: np.random.Generator) -> list[tuple[list[int], Negative]]:
        """Hard negatives of the batch, each once, with the studies that they were made for."""
        found: dict[str, tuple[list[int], Negative]] = {}
        if self.negatives is None:
            return []
        for i, study in enumerate(studies):
            candidates = [n for one in study.texts for n in self.hard_negatives(one.text, study) if n.text not in taken]
            for negative in self.negatives.draw(list(dict.fromkeys(candidates)), rng):
                found.setdefault(negative.text, ([], negative))[0].append(i)
        return list(found.values())

    def hard_negatives(self, text: str, study: PairStudy) -> tuple[Negative, ...]:
        """Every hard negative of one text of a study; worked out once."""
        assert self.negatives is not None
        key = (study.row, study.mirrored, text)
        if key not in self._negatives:
            if len(split_sentences(text)) == 1 and self.claims(text):
                rules, words = self.negatives.rules, self.negatives.words
                made = hard_negatives(text, self.statements(text), self._said(study), self.ontology, rules, words)
            else:
                made = ()
            self._negatives[key] = tuple(n for n in made if not self.negatives.verify or self._reads_as_meant(n))
        return self._negatives[key]

    def _reads_as_meant(self, negative: Negative) -> bool:
        """Whether the fact source reads in the text what the rule meant to write."""
        read = set(self.claims(negative.text))
        if negative.negated:
            return not _agree(negative.claims, read)
        return _agree(negative.claims, read)


def _answer(facts: Provider, words: StudyWords) -> tuple[tuple[str, Reading], ...] | ProviderError:
    """What a provider knows of a study, or why it gives no answer."""
    try:
        return facts.known(words.report, words.findings, words.impression)
    except ProviderError as error:
        return error


def _agree(meant: Iterable[Claim], read: Iterable[Claim]) -> bool:
    """Whether every claim that is meant was read, in finding, state, side and degree."""
    known = {(c.finding, c.state, c.side, c.severity) for c in read}
    return all((c.finding, c.state, c.side, c.severity) in known for c in meant)
