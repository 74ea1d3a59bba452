"""Facts from a language model behind an OpenAI-compatible endpoint (POST BASE_URL/chat/completions with a JSON schema).

Privacy: **the text of every report that is asked for leaves this machine** and goes to whoever runs the endpoint, and to what proxies the
environment names. Nothing is sent unless ``send_reports=True`` is given. See first whether your approval and the data's terms allow it (the
agreement for PhysioNet's credentialed data forbids to share it with third parties); de-identify before. The cache holds sentences of the
reports.

The key comes from an environment variable and is never kept, logged, or shown in an error, nor is anything the endpoint says but its status
code. Redirects are not followed. Answers are validated and, at every reading, checked against the text.
"""

from __future__ import annotations

import email.utils
import http.client
import ipaddress
import json
import os
import random
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from reports.facts.ontology import load_ontology
from reports.facts.statements import FactSource
from reports.providers.answers import AskingProvider, ProviderError
from reports.providers.keys import text_sha256
from reports.providers.records import RecordError, response_schema

_LONGEST_ANSWER = 16 * 2**20  # bytes
_LONGEST_WAIT_S = 120.0
_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
_FINAL = frozenset({301, 302, 303, 307, 308, 401, 403, 404, 405})
_FENCE = re.compile(r"\s*```(?:json)?\s*(.*?)\s*```\s*", re.DOTALL)
_OURS = frozenset({"model", "messages", "response_format", "stream", "n", "tools"})


class EndpointFacts(AskingProvider):
    """Facts of a language model. Off unless it is told where to ask, which model, and that reports may be sent.

    Args:
        base_url: up to and without "/chat/completions", say "http://localhost:8000/v1". Plain http is for this machine only.
        model: as the endpoint names it.
        cache: the SQLite file to keep records in.
        send_reports: must be True: report text leaves this machine (see the module).
        key_variable: the environment variable that holds the API key; None sends no key.
        findings: the finding ids to choose from; None is those of the ontology.
        names: what the model's names of findings mean, see :class:`reports.providers.names.FindingNames`.
        lexicon: reads findings out of names that are not in ``names``.
        prompt: a text file to use as the system message; {findings} in it becomes the list of ids. None is the one of the package.
        version: change it when the model behind the name changes; another version is asked anew.
        options: more of the request's body; in the key of what is kept.
        plain_http: send over http to another machine, unencrypted.
        timeout_s: for one request, all of it.
        attempts: requests for a text before it is given up; the waits between them double from ``backoff_s``, or are what the endpoint
            asks for, up to two minutes.
        backoff_s: the first wait.
        fallback: see :class:`reports.providers.base.Provider`; asked for a text whose answer broke the format.
    Raises:
        ValueError: no consent, an address that is none, or options that are not the caller's to give.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        cache: Path,
        send_reports: bool = False,
        key_variable: str | None = None,
        findings: list[str] | None = None,
        names: dict[str, str | None] | None = None,
        lexicon: FactSource | None = None,
        prompt: Path | None = None,
        version: str = "",
        options: dict[str, Any] | None = None,
        plain_http: bool = False,
        timeout_s: float = 120.0,
        attempts: int = 5,
        backoff_s: float = 1.0,
        fallback: FactSource | None = None,
    ) -> None:
        if send_reports is not True:
            raise ValueError(
                "an endpoint gets the text of the reports: it leaves this machine. If your approval and the data's terms allow that, "
                "give send_reports=True; reports.providers.files reads what was made elsewhere"
            )
        if not model or attempts < 1 or timeout_s <= 0 or backoff_s < 0:
            raise ValueError("expected a model, at least one attempt, a timeout above 0 s and a first wait of 0 s or more")
        if wrong := sorted(_OURS & set(options or {})):
            raise ValueError(f"options: {wrong} are set here and cannot be given")
        self.url = check_base_url(base_url, plain_http) + "/chat/completions"
        self.model, self.key_variable = model, key_variable
        self.findings = list(load_ontology().findings) if findings is None else findings
        self.options = {"temperature": 0, **(options or {})}
        self.timeout_s, self.attempts, self.backoff_s = timeout_s, attempts, backoff_s
        self.prompt = system_prompt(self.findings, Path(prompt) if prompt is not None else None)
        answers = json.dumps([model, version, self.options], sort_keys=True)
        super().__init__("endpoint", answers, text_sha256(self.prompt), cache, names, lexicon, fallback)

    def schema(self) -> dict[str, Any]:
        """The schema that the model is held to."""
        return response_schema(self.findings)

    def ask(self, text: str) -> str:
        """The content of the model's answer.

        Raises:
            ProviderError: no answer after all attempts, or a refusal that another attempt does not change.
            RecordError: an answer without content, cut off, or declined by the model.
        """
        body = json.dumps(request_body(self.model, self.prompt, text, self.schema(), self.options)).encode()
        wait_s = self.backoff_s
        for attempt in range(1, self.attempts + 1):
            reply = _post(self.url, body, api_key(self.key_variable), self.timeout_s)
            if reply.status == HTTPStatus.OK:
                return answer_content(reply.body)
            if not reply.again or attempt == self.attempts:
                raise ProviderError(f"the endpoint: {reply.reason}", final=reply.status in _FINAL)
            time.sleep(min(_LONGEST_WAIT_S, wait_s * _jitter() if reply.wait_s is None else reply.wait_s))
            wait_s *= 2
        raise AssertionError("unreachable: the last attempt returns or raises")


def request_body(model: str, prompt: str, text: str, schema: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The body of one request: the prompt as system message, the report alone as the user's."""
    return {
        **options,
        "model": model,
        "messages": [{"role": "system", "content": prompt}, {"role": "user", "content": text}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "report_facts", "strict": True, "schema": schema}},
    }


def system_prompt(findings: Sequence[str], path: Path | None = None) -> str:
    """The prompt, with the finding ids to choose from in place of {findings}.

    Raises:
        FileNotFoundError: no such file.
    """
    text = (path or Path(__file__).with_name("prompt.md")).read_text(encoding="utf-8")
    return text.replace("{findings}", "one of " + ", ".join(f"`{finding}`" for finding in findings) + ". Leave out other findings.")


def answer_content(body: bytes) -> str:
    """The model's words in the body of an answer.

    Raises:
        RecordError: there are none, they are cut off, or the model declined.
    """
    try:
        choice = json.loads(body)["choices"][0]
        content, refusal, finish = choice["message"].get("content"), choice["message"].get("refusal"), choice.get("finish_reason")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise RecordError([("", "the endpoint's answer is not a chat completion")]) from None
    if refusal or finish == "content_filter":
        raise RecordError([("", "the model declined")])
    if finish == "length":
        raise RecordError([("", "the answer was cut off at the limit of tokens; raise it in options")])
    if not isinstance(content, str) or not content.strip():
        raise RecordError([("", "the answer is empty")])
    fenced = _FENCE.fullmatch(content)
    return fenced[1] if fenced else content


def check_base_url(base_url: str, plain_http: bool) -> str:
    """The address without a slash at its end.

    Raises:
        ValueError: not http or https, a name or password, a query in it, or http to another machine. The address is not shown: it may hold
            a key.
    """
    try:
        parts = urllib.parse.urlsplit(base_url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host, parts = None, urllib.parse.urlsplit("")
    if parts.scheme not in ("http", "https") or not host or re.search(r"[\s\x00-\x1f\x7f]", base_url):
        raise ValueError("base_url: expected an address like https://host/v1")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError("base_url: expected no name, password, query or fragment; a key goes into the variable that key_variable names")
    if parts.scheme == "http" and not is_this_machine(host) and not plain_http:
        raise ValueError("base_url: reports would go over the network unencrypted; use https, or plain_http=True if the network is trusted")
    return base_url.rstrip("/")


def is_this_machine(host: str) -> bool:
    """Whether a host name is that of the loopback interface."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def api_key(variable: str | None) -> str | None:
    """The key in an environment variable.

    Raises:
        ProviderError: it is not set, or cannot be sent in a header. The key is not shown.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ProviderError(f"the environment variable {variable} is not set; put the API key there, or give key_variable=None", final=True)
    if not re.fullmatch(r"[!-~]+", key):
        raise ProviderError(f"the environment variable {variable} holds white space or letters that a header cannot carry", final=True)
    return key


@dataclass(frozen=True)
class _Reply:
    """What came of one request. ``status`` is 0 if there was no answer."""

    status: int
    body: bytes = b""
    reason: str = ""
    again: bool = False  # whether another attempt may help
    wait_s: float | None = None  # what the endpoint asks to wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry reports and key to an address that nobody gave."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _post(url: str, body: bytes, key: str | None, timeout_s: float) -> _Reply:
    headers = {"Content-Type": "application/json", "Accept": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    request = urllib.request.Request(url, data=body, headers=headers, method="POST")  # noqa: S310 (check_base_url allows http and https)
    local = is_this_machine(urllib.parse.urlsplit(url).hostname or "")
    opener = urllib.request.build_opener(_NoRedirect, *([urllib.request.ProxyHandler({})] if local else []))
    give_up = time.monotonic() + timeout_s
    try:
        with opener.open(request, timeout=timeout_s) as response:
            return _Reply(response.status, _read(response, give_up))
    except urllib.error.HTTPError as error:
        with error:
            status = error.code
            known = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else "unknown status"
            return _Reply(status, b"", f"{status} {known}", status in _AGAIN, _asked_wait_s(error.headers.get("Retry-After")))
    except (TimeoutError, http.client.HTTPException, OSError, ValueError) as error:  # URLError is an OSError
        cause = error.reason if isinstance(error, urllib.error.URLError) and isinstance(error.reason, Exception) else error
        return _Reply(0, b"", f"no answer ({type(cause).__name__})", not isinstance(cause, ValueError))


def _read(response: http.client.HTTPResponse, give_up: float) -> bytes:
    """The body, within the time and size that are allowed."""
    parts: list[bytes] = []
    size = 0
    while part := response.read1(65_536):
        parts.append(part)
        size += len(part)
        if size > _LONGEST_ANSWER:
            raise ValueError("too long")
        if time.monotonic() > give_up:
            raise TimeoutError
    if response.length:  # bytes that were announced and did not come
        raise http.client.IncompleteRead(b"", response.length)
    return b"".join(parts)


def _asked_wait_s(header: str | None) -> float | None:
    """Seconds of a Retry-After header, which is a number or a date."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _jitter() -> float:
    """A factor that parts the next attempts of several workers."""
    return random.uniform(0.75, 1.25)  # noqa: S311 (no secret)
