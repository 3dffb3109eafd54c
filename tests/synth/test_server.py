"""Requests to a server: in parallel, through pauses and restarts, in a format that it accepts."""

import json
import re
import sys
import threading
import time
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ip2p.base.errors import InputError, ModelError
from ip2p.synth import server as module
from ip2p.synth.instruct import Answer, Ask, EditText, Instruct, parse_answer, prompt_of
from ip2p.synth.server import FORMS, KNOWN, SCHEMA, ServerWriter
from ip2p.synth.triples import examples

GOOD = "make it a wolf\n%%\n{} and a wolf"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(module, "FIRST_WAIT", 0.01)
    monkeypatch.delenv(module.KEY, raising=False)


class FakeServer:
    """A language model server on a local port. reply(body, path, headers) returns a status and the content,
    a dict (sent as JSON) or bytes; None closes the connection."""

    def __init__(self, reply=None):
        self.reply = reply or (lambda body, path, headers: (200, answer(body)))
        self.bodies, self.paths, self.headers, self.port = [], [], [], 0

    def start(self):
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fake.bodies.append(body)
                fake.paths.append(self.path)
                fake.headers.append(self.headers)  # case-insensitive names
                response = fake.reply(body, self.path, self.headers)
                if response is None:
                    self.close_connection = True
                    return
                status, sent, *more = response
                data = sent if isinstance(sent, bytes) else json.dumps(sent).encode()
                self.send_response(status)
                for name, value in more:
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_):  # a client that gave up
                pass

        self.server = Server(("127.0.0.1", self.port), Handler)
        self.port = self.server.server_port
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.005,))
        self.thread.start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/v1"


@contextmanager
def serving(reply=None):
    fake = FakeServer(reply)
    fake.start()
    try:
        yield fake
    finally:
        fake.stop()


def caption_of(body):
    if "prompt" in body:
        return body["prompt"].split("\n##\n")[-2].split("\n")[-1]
    return body["messages"][-1]["content"]


def answer(body, text=None, finish="stop"):
    text = GOOD.format(caption_of(body)) if text is None else text
    choice = {"text": text} if "prompt" in body else {"message": {"role": "assistant", "content": text}}
    return {
        "choices": [choice | {"finish_reason": finish}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 4},
    }


def json_answer(body, **more):
    edit = {"instruction": "make it a wolf", "edited_caption": caption_of(body) + " and a wolf"}
    return answer(body, json.dumps(edit | more))


ASKS = [Ask(caption=f"a picture of {n} foxes") for n in range(12)]
EXPECTED = [Answer(text=GOOD.format(ask.caption)) for ask in ASKS]


def make(fake, **settings):
    return ServerWriter(fake.url, "lm", **({"say": lambda _: None} | settings))


def test_a_tuned_model_gets_a_completion_request_with_the_papers_settings():
    with serving() as fake:
        writer = make(fake, price=(2.0, 10.0))
        assert writer(ASKS) == EXPECTED
    assert set(fake.paths) == {"/v1/completions"}
    body = next(body for body in fake.bodies if body["prompt"] == prompt_of(ASKS[0].caption))
    assert body == {
        "model": "lm",
        "prompt": "a picture of 0 foxes\n##\n",
        "temperature": 0.7,
        "frequency_penalty": 0.1,
        "max_tokens": 256,
        "stop": ["\nEND"],
        "seed": ASKS[0].seed >> 1,
    }
    assert 0 <= body["seed"] < 2**31
    usage = writer.usage
    assert (usage.requests, usage.retries, usage.prompt_tokens, usage.answer_tokens) == (12, 0, 120, 48)
    assert usage.cost == pytest.approx((120 * 2 + 48 * 10) / 1e6)
    assert usage.line() == "12 answers, 0 retries, 120 tokens in, 48 out, cost 0.0007"


def test_a_chat_model_gets_examples_and_a_json_schema():
    with serving(lambda body, *_: (200, json_answer(body))) as fake:
        answers = make(fake, way="chat", shots=3, key="secret")(ASKS[:1])
    assert parse_answer(answers[0].text) == EditText(
        instruction="make it a wolf", edited_caption="a picture of 0 foxes and a wolf"
    )
    body = fake.bodies[0]
    assert fake.paths == ["/v1/chat/completions"] and fake.headers[0]["Authorization"] == "Bearer secret"
    assert body["response_format"]["json_schema"]["schema"] == SCHEMA and body["temperature"] == 0.7
    roles = [message["role"] for message in body["messages"]]
    assert roles == ["system", *["user", "assistant"] * 3, "user"]
    first = examples(3, ASKS[0].caption, 0)[0]
    assert body["messages"][1]["content"] == first.caption
    assert json.loads(body["messages"][2]["content"])["edited_caption"] == first.edited_caption


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ('Sure! ```json\n{"instruction": "a\\nb", "edited_caption": "c"}\n```', ("a b", "c")),
        ('{"instruction": "a"}', None),
        ('{"instruction": 1, "edited_caption": "c"}', None),
        ("make it a wolf", None),
        (None, None),
    ],
)
def test_json_is_extracted_from_an_answer_and_anything_else_is_unparsable(text, parsed):
    reply = {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}
    with serving(lambda *_: (200, reply)) as fake:
        edit = parse_answer(make(fake, way="chat")(ASKS[:1])[0].text)
    assert edit == (None if parsed is None else EditText(instruction=parsed[0], edited_caption=parsed[1]))


def test_a_request_format_that_the_server_refuses_is_simplified_permanently():
    def reply(body, *_):
        kind = body.get("response_format", {}).get("type")
        if kind:
            return 422, {"detail": f"Unsupported fields in the request: {{'response_format'}} {kind}"}
        if "seed" in body:
            return 400, {"error": {"message": "Unrecognized request argument supplied: seed"}}
        if "max_tokens" in body:
            return 400, {"error": {"message": "use 'max_completion_tokens' instead of max_tokens"}}
        return 200, json_answer(body)

    messages = []
    with serving(reply) as fake:
        writer = make(fake, way="chat", together=4, say=messages.append)
        assert [answer.text for answer in writer(ASKS)] == [answer.text for answer in EXPECTED]
        requests = len(fake.bodies)
        assert len(writer(ASKS)) == 12
        assert len(fake.bodies) == requests + 12
    assert FORMS[writer._form] == {} and fake.bodies[-1]["max_completion_tokens"] == 256
    assert len(messages) == 1 and "does not know seed" in messages[0]


def test_the_configured_number_of_requests_run_concurrently():
    barrier = threading.Barrier(4, timeout=20)

    def reply(body, *_):
        barrier.wait()  # passes only when four have come
        return 200, answer(body)

    with serving(reply) as fake:
        assert make(fake, together=4)(ASKS[:8]) == EXPECTED[:8]


def test_requests_start_no_faster_than_the_rate():
    class Clock:
        waits: list = []  # noqa: RUF012

        def wait(self, seconds):
            self.waits.append(seconds)

    pace, clock = module._Pace(100.0), Clock()
    for _ in range(50):
        pace(clock)
    assert clock.waits[0] == 0 and 0.3 < clock.waits[-1] <= 0.49  # 49 gaps of 0.01 s, less what passed
    assert clock.waits == sorted(clock.waits)
    with serving() as fake:
        start = time.monotonic()
        make(fake, rate=100.0)(ASKS)
        assert time.monotonic() - start >= 0.11


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_transient_failure_is_retried(status):
    failures = {}

    def reply(body, *_):
        failures[body["prompt"]] = failures.get(body["prompt"], 0) + 1
        return (200, answer(body)) if failures[body["prompt"]] > 2 else (status, {"error": "busy"})

    messages = []
    with serving(reply) as fake:
        writer = make(fake, say=messages.append)
        assert writer(ASKS) == EXPECTED
    assert writer.usage.retries == 24 and writer.usage.requests == 12
    assert messages and f"{status}" in messages[0]


def test_closed_connections_are_retried():
    seen = set()

    def reply(body, *_):
        if body["prompt"] not in seen:
            seen.add(body["prompt"])
            return None
        return 200, answer(body)

    with serving(reply) as fake:
        assert make(fake)(ASKS) == EXPECTED


def test_a_server_restart_halfway_loses_no_answers():
    fake, stopped, messages = FakeServer(), threading.Event(), []
    killer = threading.Thread(target=lambda: (stopped.wait(), fake.stop()))

    def reply(body, *_):
        if len(fake.bodies) >= 6 and not stopped.is_set():
            stopped.set()
        # Requests in progress when it is killed never get an answer.
        return None if stopped.is_set() and killer.is_alive() else (200, answer(body))

    def say(line):
        messages.append(line)
        killer.join()  # it is down, and the port is free
        fake.start()

    fake.reply = reply
    fake.start()
    killer.start()
    try:
        writer = ServerWriter(fake.url, "lm", together=2, say=say)
        written = Instruct(writer)([ask.caption for ask in ASKS])
    finally:
        stopped.set()
        killer.join()
        fake.stop()
    assert [each.triples[0].edited_caption for each in written] == [f"{a.caption} and a wolf" for a in ASKS]
    assert [each.rejected for each in written] == [()] * 12
    assert len(messages) == 1 and "asking again" in messages[0]
    assert writer.usage.requests == 12 and writer.usage.retries >= 1


def test_retry_after_is_respected(monkeypatch):
    waits, first = [], threading.Event()

    def reply(body, *_):
        if not first.is_set():
            first.set()
            return 429, {"error": "slow down"}, ("Retry-After", "7")
        return 200, answer(body)

    monkeypatch.setattr(threading.Event, "wait", lambda self, timeout=None: waits.append(timeout))
    with serving(reply) as fake:
        assert make(fake)(ASKS[:1]) == EXPECTED[:1]
    assert 7 in waits
    for header, seconds in (("2.5", 2.5), (formatdate(time.time() + 60, usegmt=True), 60), ("soon", None)):
        found = module._retry_after({"Retry-After": header})
        assert found == (None if seconds is None else pytest.approx(seconds, abs=2))


def test_an_unavailable_server_is_an_error_that_says_how_to_resume():
    fake = FakeServer()
    fake.start()
    fake.stop()
    with pytest.raises(ModelError, match=r"has not answered for 0\.05 s .*it resumes"):
        make(fake, patience=0.05)(ASKS)
    with (
        serving(lambda *_: (429, {"error": "quota"}, ("Retry-After", "9999"))) as busy,
        pytest.raises(ModelError, match="quota"),
    ):
        make(busy)(ASKS[:2])


@pytest.mark.parametrize(
    ("status", "sent", "expected"),
    [
        (401, {"error": "bad key"}, "set OPENAI_API_KEY"),
        (404, {"error": "no model lm"}, "the name lm, or try --way chat"),
        (400, {"error": "context too long"}, "answered 400 .*context too long"),
        (200, {"hello": 1}, "without choices"),
        (200, b"<html>", "no JSON: <html>"),
    ],
)
def test_a_refusal_by_the_server_is_raised_immediately(status, sent, expected):
    with serving(lambda *_: (status, sent)) as fake, pytest.raises(ModelError, match=expected):
        make(fake)(ASKS)
    assert len(fake.bodies) <= 9  # each thread asked once, and one of them the known prompt


FILTERED = {"error": {"code": "content_filter", "message": "The seed of this response was filtered"}}


@pytest.mark.parametrize("together", [1, 8])
@pytest.mark.parametrize(
    ("status", "sent", "expected"),
    [
        (400, FILTERED, "400 .*content_filter"),
        (400, {"error": "context too long"}, "400 .*too long"),
        (403, {"error": "flagged by moderation"}, "403 .*moderation"),
        (413, {"error": "large"}, "413"),
        (422, {"detail": "no"}, "422"),
        (200, {"choices": []}, r'200 \(without choices: \{"choices": \[\]\}\)'),
    ],
)
def test_a_refused_prompt_does_not_stop_the_others(status, sent, expected, together):
    def reply(body, *_):
        return (status, sent) if "0 foxes" in caption_of(body) else (200, answer(body))

    with serving(reply) as fake:
        written = Instruct(make(fake, together=together))([ask.caption for ask in ASKS])
        assert len(fake.bodies) <= 15
        # Alone, as when an interrupted run resumes.
        alone = make(fake)(ASKS[:1])
    assert [len(each.triples) for each in written] == [1 if "0 foxes" not in a.caption else 0 for a in ASKS]
    refused = [rejected for each in written for rejected in each.rejected]
    assert {rejected.reason for rejected in refused} == {"refused"}
    assert [rejected.caption for rejected in refused] == [a.caption for a in ASKS if "0 foxes" in a.caption]
    assert all(re.search(expected, rejected.text) for rejected in refused)
    assert alone == [Answer(text=refused[0].text, refused=True)]
    assert "seed" in fake.bodies[-1]  # the word in the refusal is not a complaint about the field


@pytest.mark.parametrize("sent", [{"error": "no credit"}, FILTERED])
def test_a_server_that_starts_to_refuse_every_prompt_is_an_error(sent):
    asks = [Ask(caption=f"a picture of {n} hens") for n in range(60)]
    answered = []

    def reply(body, *_):
        if len(answered) >= 5:
            return 400, sent
        answered.append(body)
        return 200, answer(body)

    with serving(reply) as fake, pytest.raises(ModelError, match="answered 400"):
        make(fake, together=1)(asks)
    assert len(fake.bodies) == 5 + module.REFUSALS + 1
    # Fewer refusals at the end of a shard must not be accepted either.
    answered.clear()
    with serving(reply) as fake, pytest.raises(ModelError, match="answered 400"):
        make(fake, together=1)(asks[:8])


def test_many_refused_prompts_in_a_row_are_accepted_if_the_server_answers_a_known_one():
    asks = [Ask(caption=f"a picture of {n} hens") for n in range(60)]

    def reply(body, *_):
        return (200, answer(body)) if caption_of(body) == KNOWN.caption else (400, FILTERED)

    with serving(reply) as fake:
        writer = make(fake)
        answers = writer(asks)
    assert all(answer.refused for answer in answers) and len(answers) == 60
    assert writer.usage.requests == len(fake.bodies) - 60 <= 5


@pytest.mark.parametrize("status", [500, 503, None])
def test_a_prompt_that_breaks_the_server_is_refused_after_the_patience(status):
    def reply(body, *_):
        if "3 foxes" in body["prompt"]:
            return None if status is None else (status, {"error": "boom"})
        return 200, answer(body)

    with serving(reply) as fake:
        answers = make(fake, patience=0.2)(ASKS)
        alone = make(fake, patience=0.2)([ASKS[3]])
    assert answers[:3] + answers[4:] == EXPECTED[:3] + EXPECTED[4:]
    assert answers[3].refused and alone[0].refused
    assert status is None or answers[3] == Answer(text=f'{status} {{"error": "boom"}}', refused=True)


def test_a_busy_server_is_an_error_and_not_a_refused_prompt():
    def reply(body, *_):
        return (429, {"error": "slow"}) if "3 foxes" in body["prompt"] else (200, answer(body))

    with serving(reply) as fake, pytest.raises(ModelError, match=r"has not answered for 0\.2 s"):
        make(fake, patience=0.2)(ASKS)


def test_a_server_that_recovers_at_the_last_moment_gets_another_attempt(monkeypatch):
    writer = ServerWriter("http://localhost:1/v1", "lm", patience=10, say=lambda _: None)
    stop, failed = threading.Event(), module._Passing("refused", None)
    waits = []
    monkeypatch.setattr(stop, "wait", waits.append)
    monkeypatch.setattr(writer, "_post", lambda path, body: answer(body))
    now = time.monotonic()
    writer._answered = now - 11
    # It failed for less than the patience, so it is retried; after that, one attempt decides.
    assert not writer._wait(failed, 0.5, now - 5, stop, known=False) and len(waits) == 1
    assert writer._wait(failed, 0.5, now - 11, stop, known=False) and len(waits) == 1
    writer._answered = now - 11
    with pytest.raises(ModelError, match="has not answered"):
        writer._wait(failed, 0.5, now - 11, stop, known=True)


@pytest.mark.parametrize("key", ["sk-secret\rX: y", "sk secret", "sk-secret\u2019", "sk-sécret"])
def test_an_invalid_key_is_refused_and_not_shown(key, monkeypatch):
    monkeypatch.setenv(module.KEY, key)
    for passed, message in ((None, "set OPENAI_API_KEY to"), (key, "that of --key-variable")):
        with pytest.raises(InputError, match=message) as caught:
            ServerWriter("http://localhost:1/v1", "lm", key=passed)
        assert "cret" not in str(caught.value)
    with pytest.raises(InputError, match="set MINE to"):
        module.clean_key(key, "MINE")


def test_whitespace_around_a_key_is_stripped_and_a_key_in_an_error_is_hidden(monkeypatch):
    monkeypatch.setenv(module.KEY, " sk-secret\r\n")

    def reply(body, path, headers):
        assert headers["Authorization"] == "Bearer sk-secret"
        return 401, {"error": "bad key sk-secret"}

    with serving(reply) as fake, pytest.raises(ModelError, match="bad key …"):
        make(fake)(ASKS[:1])
    assert ServerWriter("http://localhost:1/v1", "lm", key=" \n")._key == ""


def test_lone_surrogates_in_an_answer_are_replaced():
    with serving(lambda body, *_: (200, answer(body, "make it \ud83d\n%%\na wolf"))) as fake:
        assert make(fake)(ASKS[:1]) == [Answer(text="make it ?\n%%\na wolf")]


def test_a_truncated_answer_is_marked_as_unfinished():
    with serving(lambda body, *_: (200, answer(body, finish="length"))) as fake:
        assert not make(fake)(ASKS[:1])[0].finished
    with serving(lambda body, *_: (200, answer(body, GOOD.format("x") + "\nEND and on"))) as fake:
        assert make(fake)(ASKS[:1]) == [Answer(text=GOOD.format("x"))]
        assert make(fake)([]) == []


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"url": "localhost:8000"}, "write it as http"),
        ({"url": "ftp://x/v1"}, "write it as http"),
        ({"url": "http://host:abc/v1"}, "--server http://host:abc/v1 is no address"),
        ({"url": "http://host:99999/v1"}, "write it as http"),
        ({"url": "http://[::1/v1"}, "write it as http"),
        ({"url": "http://host/v1 x"}, "write it as http"),
        ({"model": " "}, "name one: --model"),
        ({"way": "talk"}, "--way is 'talk'"),
        ({"together": 0}, "--together is 0"),
        ({"rate": 0}, "--rate is 0"),
        ({"temperature": 3}, "--temperature is 3"),
    ],
)
def test_invalid_settings_are_refused(settings, expected):
    with pytest.raises(InputError, match=expected):
        ServerWriter(**({"url": "http://localhost:1/v1", "model": "lm"} | settings))


@pytest.mark.parametrize("package", ["openai", "tenacity"])
def test_a_missing_extra_is_named_with_its_install_command(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"{package}.* pip install 'ip2p\[llm-server\]'"):
        ServerWriter("http://localhost:1/v1", "lm")


def test_only_a_configured_key_and_no_environment_credentials_are_sent(monkeypatch):
    monkeypatch.setenv("OPENAI_ORG_ID", "org-secret")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "project-secret")
    monkeypatch.setenv("OPENAI_ADMIN_KEY", "sk-admin")
    with serving() as fake:
        assert make(fake)(ASKS[:1]) == EXPECTED[:1]
        assert make(fake, key="sk-mine")(ASKS[:1]) == EXPECTED[:1]
    assert "secret" not in str(fake.headers) and "sk-admin" not in str(fake.headers)
    assert [headers["Authorization"] for headers in fake.headers] == [None, "Bearer sk-mine"]
