"""Providers that ask: a callable or an endpoint gives the record of a text, which is validated, kept on disk, and never asked for again.

What is kept is the record as it came, once its format is right; its words are checked against the text at every reading, so that a stricter
check needs no new answers. An answer that breaks the format is listed and not kept: the next run asks again.
"""

from __future__ import annotations

import abc
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from reports.facts.statements import FactSource
from reports.providers.base import Provider, Reading, read_record
from reports.providers.keys import result_key
from reports.providers.names import FindingNames
from reports.providers.records import RecordError, Rejection, ReportRecord, parse_record, response_schema
from reports.providers.store import ResultStore

Answer = Callable[[str], "Mapping[str, Any] | str | bytes"]


class ProviderError(RuntimeError):
    """No answer is to be had, of this text or (``final``) of any until something is put right. Holds no report text and no key."""

    def __init__(self, message: str, final: bool = False) -> None:
        self.final = final
        super().__init__(message)


@dataclass(frozen=True)
class Filled:
    """What :meth:`AskingProvider.fill` did. ``rejections`` have the place of the text among those given, from 1, as their row."""

    kept: int  # asked for and kept now
    found: int  # there already
    rejections: tuple[Rejection, ...]


class AskingProvider(Provider):
    """Base of providers that ask for what they do not have yet.

    Args:
        name: of the provider, in the key of what is kept.
        version: of whatever answers; another version is asked anew.
        prompt_sha256: of the words that it is asked with, or "".
        cache: the SQLite file to keep records in; None keeps none.
        names: what its names of findings mean, see :class:`reports.providers.names.FindingNames`.
        lexicon: reads findings out of names that are not in ``names``.
        fallback: see :class:`Provider`; asked for a text whose answer broke the format.
    """

    asks = True

    stops_after = 10
    """How many texts one after the other may get no answer before :meth:`fill` stops."""

    def __init__(
        self,
        name: str,
        version: str,
        prompt_sha256: str,
        cache: Path | None,
        names: dict[str, str | None] | None,
        lexicon: FactSource | None,
        fallback: FactSource | None,
    ) -> None:
        super().__init__(fallback)
        self.name, self.version, self.prompt_sha256 = name, version, prompt_sha256
        self.names = FindingNames(names, lexicon)
        self.store = ResultStore(Path(cache)) if cache is not None else None
        self._schema_sha256 = hashlib.sha256(json.dumps(self.schema()).encode()).hexdigest()

    def schema(self) -> dict[str, Any]:
        """The JSON schema of an answer; part of the key of what is kept."""
        return response_schema()

    @abc.abstractmethod
    def ask(self, text: str) -> Mapping[str, Any] | str | bytes:
        """The record of a text, as JSON or as what JSON gives. May be called by several threads at once.

        Raises:
            ProviderError: no answer.
            RecordError: an answer that is no record.
        """

    def record(self, text: str) -> ReportRecord:
        """The record of a text, from the cache or asked for and kept.

        Raises:
            ProviderError: no answer.
            RecordError: an answer that is no record.
        """
        return self.kept_record(text) or self._asked(text)

    def kept_record(self, text: str) -> ReportRecord | None:
        """The record of a text if it is in the cache. Asks nothing."""
        kept = self.store.get(self._key(text)) if self.store is not None else None
        try:
            return parse_record(kept) if kept is not None else None
        except RecordError:  # kept by another version of the format
            return None

    def reading(self, text: str) -> Reading | None:
        """The checked record; None for a blank text, or an answer that broke the format.

        Raises:
            ProviderError: no answer.
        """
        if not text.strip():
            return None
        try:
            return read_record(self.record(text), text, self.names)
        except RecordError:
            return None

    def fill(self, texts: Iterable[str], workers: int = 1, progress: Callable[[int], None] | None = None) -> Filled:
        """Ask for every text that is not in the cache, and keep the records. A run that was stopped goes on where it was.

        Args:
            texts: any number; repeats and blank texts are asked for once or not at all.
            workers: texts that are asked for at the same time.
            progress: called with the number of texts done after each.
        Raises:
            ValueError: there is no cache.
            ProviderError: something to put right first (a refused key), or ``stops_after`` texts in a row without an answer.
        """
        if self.store is None:
            raise ValueError("to fill a provider it needs a cache; give cache=PATH")
        if workers < 1:
            raise ValueError(f"workers is {workers}, expected at least 1")
        with self.store.many():
            return self._fill(texts, workers, progress)

    def kept_records(self, texts: Iterable[str]) -> Iterator[tuple[str, ReportRecord]]:
        """(text, record) of each different text that is in the cache; for :func:`reports.providers.files.write_jsonl`. Asks nothing."""
        for _, text in _once(texts):
            if (record := self.kept_record(text)) is not None:
                yield text, record

    def _fill(self, texts: Iterable[str], workers: int, progress: Callable[[int], None] | None) -> Filled:
        kept = found = failed = 0
        rejections: list[Rejection] = []
        for done, (row, outcome) in enumerate(_concurrently(self._outcome, _once(texts), workers), 1):
            failed = failed + 1 if isinstance(outcome, ProviderError) else 0
            if isinstance(outcome, ProviderError):
                if outcome.final or failed >= self.stops_after:
                    raise ProviderError(f"stopped at text {row}, {kept} kept: {outcome}", final=True) from None
                rejections.append(Rejection(row, "", str(outcome)))
            elif isinstance(outcome, RecordError):
                rejections += [Rejection(row, place, reason) for place, reason in outcome.faults]
            else:
                kept, found = kept + outcome, found + (not outcome)
            if progress is not None:
                progress(done)
        return Filled(kept, found, tuple(rejections))

    def _outcome(self, text: str) -> bool | ProviderError | RecordError:
        """Whether a text's record was kept now, or was there; or what went wrong."""
        try:
            if self.kept_record(text) is not None:
                return False
            self._asked(text)
        except (ProviderError, RecordError) as error:
            return error
        return True

    def _asked(self, text: str) -> ReportRecord:
        record = parse_record(self.ask(text))
        if self.store is not None:
            self.store.put(self._key(text), record.model_dump_json().encode())
        return record

    def _key(self, text: str) -> str:
        return result_key(text, self.name, self.version, self._schema_sha256, self.prompt_sha256)


class CallableFacts(AskingProvider):
    """Facts of a function of ours or yours: text -> record, as JSON or as what JSON gives.

    Args:
        function: called with a report or a section; by several threads at once if :meth:`fill` is told so. What it raises is not shown:
            its message may hold report text.
        name: of the function, in the key of what is kept.
        version: change it whenever the function's results change.
        cache: the SQLite file to keep records in; None calls the function at every reading.
        names: what its names of findings mean, see :class:`reports.providers.names.FindingNames`.
        lexicon: reads findings out of names that are not in ``names``.
        fallback: see :class:`Provider`; asked for a text whose answer broke the format.
    """

    def __init__(
        self,
        function: Answer,
        name: str,
        version: str,
        cache: Path | None = None,
        names: dict[str, str | None] | None = None,
        lexicon: FactSource | None = None,
        fallback: FactSource | None = None,
    ) -> None:
        super().__init__(f"callable {name}", version, "", cache, names, lexicon, fallback)
        self.function = function

    def ask(self, text: str) -> Mapping[str, Any] | str | bytes:
        """What the function returns."""
        try:
            return self.function(text)
        except (ProviderError, RecordError):
            raise
        except Exception as error:
            raise ProviderError(f"the function raised {type(error).__name__}; call it by itself to see why") from None


def _once(texts: Iterable[str]) -> Iterator[tuple[int, str]]:
    """(place from 1, text) of each different text that is not blank."""
    seen: set[bytes] = set()
    for row, text in enumerate(texts, 1):
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
        if text.strip() and digest not in seen:
            seen.add(digest)
            yield row, text


def _concurrently(
    work: Callable[[str], bool | ProviderError | RecordError], items: Iterator[tuple[int, str]], workers: int
) -> Iterator[tuple[int, bool | ProviderError | RecordError]]:
    """(place, result) of each item as it is done, with at most ``workers`` under way and none waiting."""
    with ThreadPoolExecutor(workers) as pool:
        under_way: dict[Future[bool | ProviderError | RecordError], int] = {}
        while True:
            for row, text in islice(items, workers - len(under_way)):
                under_way[pool.submit(work, text)] = row
            if not under_way:
                return
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                yield under_way.pop(future), future.result()
