"""Callables and endpoints, against a server on this machine that answers as it is told to."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jsonschema
import pytest

from reports.facts import LexiconFacts
from reports.providers import endpoint as module
from reports.providers.answers import CallableFacts, ProviderError
from reports.providers.endpoint import EndpointFacts, answer_content, check_base_url, system_prompt
from reports.providers.files import JsonlFacts, write_jsonl
from reports.providers.records import RecordError, Rejection

TEXT = "There is a left pleural effusion."
KEY = "sk-Zebra-4711"


def answer_of(text):
    """What a model that does as it is told says of one sentence about an effusion."""
    fact = {
        "finding": "pleural_effusion",
        "state": "present",
        "side": "left",
        "location": None,
        "severity": None,
        "size_mm": None,
        "kind": None,
        "change": None,
        "quote": "left pleural effusion",
    }
    return {"sentences": [{"text": text, "compares": False, "facts": [fact]}]}


def completion(content, **choice):
    return 200, {"choices": [{"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop", **choice}]}, {}


class Server:
    """A chat endpoint; ``script`` holds the next replies (status, body, headers), after which it answers as a model that is right."""

    def __init__(self):
        self.script, self.requests, self.under_way, self.most, self.delay_s, self.drip_s = [], [], 0, 0, 0.0, 0.0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.requests.append((self.path, dict(self.headers), body))
                    outer.under_way += 1
                    outer.most = max(outer.most, outer.under_way)
                    reply = outer.script.pop(0) if outer.script else None
                time.sleep(outer.delay_s)
                with outer.lock:
                    outer.under_way -= 1
                status, answer, headers = reply or completion(json.dumps(answer_of(body["messages"][1]["content"])))
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                step = len(data) if not outer.drip_s else 64
                for start in range(0, len(data), step or 1):
                    time.sleep(outer.drip_s)
                    with suppress(OSError):  # the caller has hung up
                        self.wfile.write(data[start : start + step])
                        self.wfile.flush()

            def do_GET(self):  # where a redirect would lead
                self.do_POST()

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()


@pytest.fixture
def server():
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("STUB_KEY", KEY)


@pytest.fixture
def make(server, tmp_path):
    def make(**changes):
        options = {"send_reports": True, "backoff_s": 0.01, "timeout_s": 5.0, "attempts": 3, "cache": tmp_path / "answers.sqlite"}
        return EndpointFacts(**{"base_url": server.url, "model": "tiny", **options, **changes})

    return make


@contextmanager
def nothing_told(caplog, *secrets):
    with caplog.at_level(logging.DEBUG):
        yield
    for secret in secrets:
        assert secret not in caplog.text


def test_an_answer_becomes_facts_and_is_asked_for_once(server, make, key):
    source = make(key_variable="STUB_KEY")
    for _ in range(2):
        (sentence,) = source.sentences(TEXT)
    assert [(s.fact.finding, s.fact.side, TEXT[s.start : s.end]) for s in sentence.statements] == [
        ("pleural_effusion", "left", "left pleural effusion")
    ]
    assert source.minimal(TEXT) == ("There is left pleural effusion.",)
    assert make().sentences(TEXT) == (sentence,)
    assert len(server.requests) == 1
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert [m["role"] for m in body["messages"]] == ["system", "user"] and body["messages"][1]["content"] == TEXT
    assert body["model"] == "tiny" and body["temperature"] == 0
    form = body["response_format"]
    assert form["type"] == "json_schema" and form["json_schema"]["strict"] is True
    jsonschema.Draft202012Validator.check_schema(form["json_schema"]["schema"])
    jsonschema.validate(answer_of(TEXT), form["json_schema"]["schema"])
    assert "`pleural_effusion`" in body["messages"][0]["content"] and "{" not in body["messages"][0]["content"]


def test_nothing_is_sent_without_consent(server, make):
    for consent in (False, None, 1, "yes"):
        with pytest.raises(ValueError, match="it leaves this machine"):
            make(send_reports=consent)
    with pytest.raises(ValueError, match="it leaves this machine"):
        EndpointFacts(server.url, "tiny", Path("never.sqlite"))
    assert server.requests == [] and not Path("never.sqlite").exists()


@pytest.mark.parametrize(
    ("content", "place", "reason"),
    [
        ("{", "", "not JSON"),
        ("I see an effusion.", "", "not JSON"),
        ('{"sentences": [{"text": "Zebra"', "", "not JSON"),
        (
            json.dumps({"sentences": [{"text": "Zebra", "facts": [{"finding": "Zebra", "state": "Zebra"}]}]}),
            "sentences[0].facts[0].state",
            "",
        ),
        (json.dumps({"Zebra": 1}), "sentences", "field required"),
        ("", "", "the answer is empty"),
    ],
)
def test_an_answer_that_breaks_the_format_is_listed_and_asked_for_again(server, make, caplog, content, place, reason):
    source = make()
    server.script = [completion(content)]
    with nothing_told(caplog, "Zebra"):
        filled = source.fill([TEXT])
    assert (filled.kept, filled.found) == (0, 0)
    assert filled.rejections[0].row == 1 and filled.rejections[0].place == place and reason in filled.rejections[0].reason
    assert "Zebra" not in repr(filled)
    assert source.fill([TEXT]).kept == 1 and source.knows(TEXT)


def test_a_bad_answer_states_nothing_or_what_the_fallback_says(server, make):
    server.script = [completion("no JSON")] * 2
    assert [s.statements for s in make().sentences(TEXT)] == [()]
    assert [s.fact.finding for s in make(fallback=LexiconFacts()).facts(TEXT)] == ["pleural_effusion"]


def test_made_up_words_are_refused(server, make):
    made_up = answer_of(TEXT)
    made_up["sentences"][0]["facts"].append({**made_up["sentences"][0]["facts"][0], "finding": "pneumothorax", "quote": "pneumothorax"})
    made_up["sentences"].append({"text": "No edema.", "compares": False, "facts": []})
    server.script = [completion(json.dumps(made_up))]
    source = make()
    assert source.fill([TEXT]).kept == 1
    reading = source.reading(TEXT)
    assert [s.fact.finding for s in reading.statements] == ["pleural_effusion"]
    assert reading.rejections == (
        Rejection(None, "sentences[0].facts[1]", "the quoted words are not in the sentence"),
        Rejection(None, "sentences[1]", "the sentence is not in the text"),
    )


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_busy_endpoint_is_asked_again(server, make, status):
    server.script = [(status, {"error": "busy"}, {}), (status, b"", {"Retry-After": "0"})]
    assert make().fill([TEXT]).kept == 1
    assert len(server.requests) == 3


def test_waits_double_and_the_endpoint_may_say_how_long(server, make, monkeypatch):
    waits = []
    monkeypatch.setattr(module.time, "sleep", waits.append)
    soon = formatdate(time.time() + 30, usegmt=True)
    headers = [{}, {}, {"Retry-After": "7"}, {"Retry-After": soon}, {"Retry-After": "9e9"}, {"Retry-After": "soon"}]
    server.script = [(status, b"", header) for status, header in zip([429, 503, 429, 429, 429, 500], headers, strict=True)]
    make(attempts=7, backoff_s=2.0).ask(TEXT)
    waits = [wait for wait in waits if wait]  # the server sleeps, too
    assert 1.5 <= waits[0] <= 2.5 and 3.0 <= waits[1] <= 5.0
    assert waits[2] == 7.0 and 25 < waits[3] <= 30 and waits[4] == 120.0 and 48 <= waits[5] <= 80


def test_what_cannot_be_had_is_listed_and_the_batch_goes_on(server, make):
    server.script = [(400, b"Zebra", {}), *[(500, b"Zebra", {})] * 3]
    filled = make().fill(["a", "b", "c", "b", " "])
    assert filled.kept == 1
    assert filled.rejections == (
        Rejection(1, "", "the endpoint: 400 Bad Request"),
        Rejection(2, "", "the endpoint: 500 Internal Server Error"),
    )
    assert len(server.requests) == 5


@pytest.mark.parametrize("status", [401, 403, 404, 302, 307])
def test_what_another_request_does_not_change_stops_at_once(server, make, key, caplog, status):
    server.script = [(status, KEY.encode(), {"Location": server.url + "/elsewhere"})] * 9
    with nothing_told(caplog, KEY, TEXT), pytest.raises(ProviderError, match=f"stopped at text 1, 0 kept: the endpoint: {status}") as error:
        make(key_variable="STUB_KEY").fill([TEXT, "b"])
    assert len(server.requests) == 1 and KEY not in repr(error.value)


def test_an_endpoint_that_answers_nothing_stops_after_a_while(tmp_path, make, caplog):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"  # bound and not listening: refused
        source = make(base_url=address, attempts=2)
        source.stops_after = 3
        with (
            nothing_told(caplog, TEXT),
            pytest.raises(ProviderError, match=r"stopped at text 3, 0 kept: .*no answer \(ConnectionRefusedError\)"),
        ):
            source.fill([TEXT, "b", "c", "d"])
        with pytest.raises(ProviderError, match="no answer"):
            source.sentences(TEXT)


def test_a_slow_or_broken_answer_is_given_up(server, make):
    server.delay_s = 0.5
    with pytest.raises(ProviderError, match="no answer"):
        make(timeout_s=0.1, attempts=1).ask(TEXT)
    server.delay_s = 0
    for body in (b"\xff", b'{"choices": []}', b"[" * 9999, b"null"):
        server.script = [(200, body, {})]
        with pytest.raises(RecordError, match="not a chat completion"):
            make().ask(TEXT)
    whole = json.dumps(completion(json.dumps(answer_of(TEXT)))[1]).encode()
    server.script = [(200, whole, {"Content-Length": str(len(whole) + 9)})] * 2  # the connection ends before the answer does
    with pytest.raises(ProviderError, match=r"no answer \(IncompleteRead\)"):
        make(attempts=2).ask(TEXT)


def test_an_answer_in_drops_is_given_up_when_its_time_is_over(server, make):
    server.drip_s = 0.05
    begin = time.monotonic()
    with pytest.raises(ProviderError, match=r"no answer \(TimeoutError\)"):
        make(timeout_s=0.2, attempts=1).ask(TEXT)
    assert time.monotonic() - begin < 5  # all of it takes longer than the timeout between two drops


def test_an_answer_without_end_is_cut(server, make, monkeypatch):
    monkeypatch.setattr(module, "_LONGEST_ANSWER", 1000)
    server.script = [(200, b" " * 200_000, {})] * 3
    with pytest.raises(ProviderError, match="no answer"):
        make().ask(TEXT)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        ({"finish_reason": "length"}, "cut off"),
        ({"finish_reason": "content_filter"}, "declined"),
        ({"message": {"refusal": "no"}}, "declined"),
    ],
)
def test_cut_or_declined_answers_are_told_apart(choice, reason):
    with pytest.raises(RecordError, match=reason):
        answer_content(json.dumps(completion("{}", **choice)[1]).encode())


def test_a_fence_around_the_answer_is_taken_off():
    assert answer_content(json.dumps(completion('```json\n{"sentences": []}\n```')[1]).encode()) == '{"sentences": []}'


def test_the_key_is_never_told(server, make, monkeypatch, caplog):
    with nothing_told(caplog, KEY):
        with pytest.raises(ProviderError, match="the environment variable STUB_KEY is not set"):
            make(key_variable="STUB_KEY").fill([TEXT])
        for bad in (f"{KEY}\r\nX: y", f"{KEY} x", f"{KEY}é"):
            monkeypatch.setenv("STUB_KEY", bad)
            with pytest.raises(ProviderError, match="holds white space or letters") as error:
                make(key_variable="STUB_KEY").fill([TEXT])
            assert KEY not in repr(error.value)
        monkeypatch.setenv("STUB_KEY", KEY)
        source = make(key_variable="STUB_KEY")
        server.script = [(400, KEY.encode(), {"X": KEY})]
        assert KEY not in repr(source.fill([TEXT])) + repr(vars(source)) + json.dumps(source.spec())
    assert server.requests[0][1]["Authorization"].endswith(KEY)
    assert KEY.encode() not in b"".join(path.read_bytes() for path in source.store.path.parent.iterdir())


@pytest.mark.parametrize(
    "address",
    [
        "ftp://host/v1",
        "host/v1",
        "http://",
        "https://host:port",
        "https://host/v1\nX: y",
        "https://Zebra@host/",
        "https://h/?key=Zebra",
        "http://10.0.0.5/v1",
        "http://model.example/v1",
    ],
)
def test_addresses_that_are_refused_are_not_shown(address):
    with pytest.raises(ValueError, match="base_url") as error:
        check_base_url(address, plain_http=False)
    assert "Zebra" not in str(error.value) and "example" not in str(error.value)


def test_addresses_that_are_taken():
    assert check_base_url("http://model.example/v1/", plain_http=True) == "http://model.example/v1"
    for address in ("https://model.example/v1", "http://localhost:8000/v1", "http://[::1]:8000", "http://127.0.0.1:8000"):
        assert check_base_url(address, plain_http=False) == address


def test_a_proxy_of_the_environment_does_not_get_what_stays_on_this_machine(make, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert make().knows(TEXT)


def test_what_may_change_the_answer_is_in_the_key(server, make, tmp_path):
    prompt = tmp_path / "prompt.md"
    prompt.write_text("Another prompt. {findings}")
    changes = [{}, {"model": "big"}, {"version": "2"}, {"options": {"max_tokens": 9}}, {"findings": ["edema"]}, {"prompt": prompt}]
    for count, change in enumerate(changes, 1):
        assert make(**change).fill([TEXT]).kept == 1 and len(server.requests) == count
        assert make(**change, base_url=server.url + "/", timeout_s=3.0).fill([TEXT]).found == 1
    assert server.requests[3][2]["max_tokens"] == 9
    for wrong in ({"messages": []}, {"n": 2}, {"stream": True}):
        with pytest.raises(ValueError, match="are set here"):
            make(options=wrong)
    assert system_prompt(["edema"], prompt) == "Another prompt. one of `edema`. Leave out other findings."


def test_no_more_are_under_way_than_workers(server, make):
    server.delay_s = 0.03
    done = []
    filled = make().fill([f"Text {i}." for i in range(24)], workers=4, progress=done.append)
    assert filled.kept == 24 and server.most == 4 and done == list(range(1, 25))
    with pytest.raises(ValueError, match="workers is 0"):
        make().fill([], workers=0)


KILLED = """
import sys
from pathlib import Path
from reports.providers.endpoint import EndpointFacts
source = EndpointFacts(sys.argv[1], "tiny", Path(sys.argv[2]), send_reports=True)
source.fill([f"Text {i}." for i in range(60)], workers=2)
"""


def test_a_killed_run_goes_on_where_it_was(server, make, tmp_path):
    server.delay_s = 0.01
    root = Path(module.__file__).parents[2]
    command = [sys.executable, "-c", KILLED, server.url, str(tmp_path / "answers.sqlite")]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(root)})
    while len(server.requests) < 20 and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    time.sleep(0.1)
    before = len(server.requests)
    filled = make().fill([f"Text {i}." for i in range(60)], workers=2)
    assert filled.found >= before - 2 - 2 and filled.kept + filled.found == 60  # at most those under way are asked for twice
    assert len(server.requests) - before == filled.kept
    assert make().fill([f"Text {i}." for i in range(60)]).found == 60


def test_what_was_asked_for_can_be_kept_as_a_file(server, make, tmp_path):
    source = make()
    source.fill([TEXT])
    assert write_jsonl(tmp_path / "facts.jsonl", source.kept_records([TEXT, "Never asked."])) == 1
    assert JsonlFacts(tmp_path / "facts.jsonl").sentences(TEXT) == source.sentences(TEXT)
    assert len(server.requests) == 1


# ---------------------------------------------------------------- callables


@pytest.mark.parametrize("form", [lambda record: record, json.dumps, lambda record: json.dumps(record).encode()])
def test_a_function_is_a_source(tmp_path, form):
    calls = []

    def function(text):
        calls.append(text)
        return form(answer_of(text))

    for cache, expected in ((None, 2), (tmp_path / "results.sqlite", 1)):
        calls.clear()
        source = CallableFacts(function, "mine", "1", cache)
        assert source.sentences(TEXT) == source.sentences(TEXT)
        assert [s.fact.finding for s in source.sentences(TEXT)[0].statements] == ["pleural_effusion"]
        assert len(calls) == expected + (cache is None)
    assert CallableFacts(function, "mine", "2", cache).knows(TEXT) and len(calls) == 2
    assert source.sentences("  ") == ()


def test_a_function_that_fails_is_listed_and_not_shown(tmp_path, caplog):
    def function(text):
        if text == "b":
            raise RuntimeError("Zebra")
        return {"a": {"sentences": []}, "c": {"Zebra": 1}}.get(text)

    source = CallableFacts(function, "mine", "1", tmp_path / "results.sqlite")
    with nothing_told(caplog, "Zebra"):
        filled = source.fill("abcd")
    assert filled.kept == 1 and [r.row for r in filled.rejections] == [2, 3, 3, 4] and "Zebra" not in repr(filled)
    assert filled.rejections[0].reason == "the function raised RuntimeError; call it by itself to see why"
    with pytest.raises(ProviderError, match="RuntimeError"):
        source.sentences("b")
    with pytest.raises(ValueError, match="needs a cache"):
        CallableFacts(function, "mine", "1").fill("a")
    with pytest.raises(TypeError, match="function"):
        source.spec()


def test_results_of_an_older_format_are_asked_for_again(tmp_path):
    source = CallableFacts(answer_of, "mine", "1", tmp_path / "results.sqlite")
    source.fill([TEXT])
    (stored,) = source.store.keys()
    source.store.put(stored, b'{"old": 1}')
    assert source.fill([TEXT]).kept == 1 and source.kept_record(TEXT) is not None
