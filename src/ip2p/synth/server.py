"""Edits written by a server of language models that speaks OpenAI's protocol: vLLM, Ollama, OpenAI, …

There are two ways. `completion`: a model tuned on triples continues the prompt. `chat`: a general model sees
some seed triples as a conversation and answers with JSON of a schema. The `openai` client sends the requests
and `tenacity` retries them; both are in the extra `llm-server`.
"""

from __future__ import annotations

import email.utils
import json
import os
import random
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ip2p.base import terminal
from ip2p.base.errors import InputError, ModelError
from ip2p.synth.instruct import (
    FREQUENCY_PENALTY,
    MAX_TOKENS,
    MIDDLE,
    STOP,
    TEMPERATURE,
    Answer,
    Ask,
    check_sampling,
    prompt_of,
)
from ip2p.synth.records import Triple
from ip2p.synth.settings import Way

if TYPE_CHECKING:
    from openai import OpenAI
from ip2p.synth.triples import examples

KEY = "OPENAI_API_KEY"
SHOTS = 8  # seed triples in the prompt of a general model
PATIENCE = 300.0  # maximum outage of a server, in seconds
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds
AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # errors that may pass later
BUSY = (408, 409, 425, 429, 529)  # of these: not caused by the request
OF_PROMPT = (200, 400, 413, 422)  # statuses that may concern one prompt only
REFUSALS = 20  # in a row, before the server itself is checked
# A harmless request: a server that rejects it rejects everything.
KNOWN = Ask(caption="a cat on a red sofa")

SYSTEM = (
    "You write training data for a program that edits pictures by instruction. You are given the caption of "
    "a picture. Think of one interesting change that a person could ask for: to an object, its colour or "
    "material, the style or artist, place, time, weather, season, mood, clothing, or something added, "
    "removed or replaced. Write the instruction as the person would say it, and the caption of the picture "
    "after the change. Keep all of the caption that does not change, word for word. Do not move or turn "
    "anything, and do not change the view. Vary what you ask for and how you say it. Answer with JSON "
    "alone: an object with instruction, edited_caption and kind: whole if the edit changes the whole picture "
    "(style, place, time, weather, season, light, mood), part if it changes something in it."
)
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "instruction": {"type": "string"},
        "edited_caption": {"type": "string"},
        "kind": {"type": "string", "enum": ["whole", "part"]},
    },
    "required": ["instruction", "edited_caption", "kind"],
    "additionalProperties": False,
}
# How the form of the answer is requested, the strictest first. If a server rejects one, the next is used.
FORMS: tuple[dict[str, Any], ...] = (
    {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "edit", "strict": True, "schema": SCHEMA},
        }
    },
    {"response_format": {"type": "json_object"}},
    {},
)
_OF_FORMS = {"response_format", "json_schema", "json_object", "schema", "guided_json"}
# Names of content filters; some servers reject with 403.
_FILTERED = re.compile(r"content.?(?:filter|policy|management)|moderation|safety.?(?:filter|system)", re.I)


@dataclass
class Usage:
    """Token counts reported by a server; the cost is in the currency of the prices."""

    requests: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    cost: float = 0.0

    def line(self) -> str:
        told = (
            f"{self.requests:,} answers, {self.retries:,} retries, {self.prompt_tokens:,} tokens in, "
            f"{self.answer_tokens:,} out"
        )
        return told + (f", cost {self.cost:,.4f}" if self.cost else "")


class ServerWriter:
    """A language model on a server, called by several threads.

    url: up to /v1, such as http://localhost:8000/v1. way: `completion` for a tuned model, `chat` for a
    general one. shots: seed triples in the prompt, by default none and SHOTS. together: concurrent requests.
    rate: maximum requests per second. price: per million tokens of prompts and of answers. key: the bearer
    token, by default that of OPENAI_API_KEY.

    A request that fails temporarily (the server is down, busy or broken) is retried after a doubling wait, or
    after Retry-After, until no request of any thread was answered for `patience` seconds. A server can thus
    be killed and restarted. Every request has its seed; the server may ignore it.

    A prompt that is rejected (by a content filter, or as too long), or that fails for all of the patience,
    gets an answer that is `refused`, but only if the server answers KNOWN. KNOWN is sent after a rejection if
    nothing was answered yet, after REFUSALS in a row, and if the last answer of a call was a rejection. A
    wrong setting therefore stops at once, and the verdict does not depend on other threads.

    Raises InputError for settings, and ModelError for a server that rejects everything, stays down, or does
    not speak the protocol.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        way: Way = "completion",
        shots: int | None = None,
        temperature: float = TEMPERATURE,
        frequency_penalty: float = FREQUENCY_PENALTY,
        max_tokens: int = MAX_TOKENS,
        together: int = 8,
        rate: float | None = None,
        price: tuple[float, float] = (0.0, 0.0),
        timeout: float = 120.0,
        patience: float = PATIENCE,
        key: str | None = None,
        say: Callable[[str], None] = terminal.say,
    ) -> None:
        check_sampling(temperature, frequency_penalty, max_tokens)
        if not _is_address(url):
            raise InputError(f"--server {url} is no address; write it as http://localhost:8000/v1")
        if not model.strip():
            raise InputError("the server's model is not named; name one: --model NAME")
        if way not in ("completion", "chat"):
            raise InputError(f"--way is {way}; use completion for a tuned model, chat for a general one.")
        for flag, value in (("together", together), ("timeout", timeout)):
            if not value > 0:
                raise InputError(f"--{flag} is {value:g}; use a positive number.")
        if rate is not None and not rate > 0:
            raise InputError(f"--rate is {rate:g}; use a positive number of requests a second.")
        self.name, self.model, self.way = model, model, way
        self.url = url.rstrip("/")
        self.shots = shots if shots is not None else SHOTS if way == "chat" else 0
        self.sampling = {
            "temperature": temperature,
            "frequency_penalty": frequency_penalty,
            "max_tokens": max_tokens,
        }
        self.together, self.price, self.timeout, self.patience = together, price, timeout, patience
        self.usage = Usage()
        self.say = say
        self._key = clean_key(os.environ.get(KEY, ""), KEY) if key is None else clean_key(key)
        self._client = _open_client(self.url, self._key, timeout)
        self._lock = threading.Lock()
        self._judging = threading.Lock()  # held while the server is asked KNOWN, so that it is once
        self._pace = _Pace(rate)
        self._form = 0  # of FORMS
        self._drop: set[str] = set()  # fields that the server does not know
        self._newer = False  # it calls max_tokens max_completion_tokens
        self._answered = time.monotonic()
        self._away = False
        self._proven = False  # it has answered a question
        self._row = 0  # refusals since its last answer
        self._fault = ""  # why it cannot be used

    def __call__(self, asks: Sequence[Ask]) -> list[Answer]:
        if not asks:
            return []
        self._answered = time.monotonic()
        self._fault = ""
        stop = threading.Event()
        with ThreadPoolExecutor(min(self.together, len(asks)), "ip2p-server") as pool:
            futures = [pool.submit(self._answer, ask, stop) for ask in asks]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                if self._row:  # else answers would be written off that a key or a quota is to blame for
                    self._prove(stop)
            except BaseException:
                # What waits for a retry must not hold the error back, nor Ctrl-C.
                stop.set()
                for future in futures:
                    future.cancel()
                raise
            return [future.result() for future in futures]

    def _answer(self, ask: Ask, stop: threading.Event) -> Answer:
        try:
            choice = self._ask(ask, stop)
        except _Declined as error:
            return Answer(text=_sendable(str(error)), refused=True)
        message = choice if self.way == "completion" else choice.get("message")
        name = "text" if self.way == "completion" else "content"
        text = message.get(name) if isinstance(message, dict) else None
        if not isinstance(text, str):
            text = ""  # it declined, or only called a tool: unparsable
        if self.way == "chat":
            text = _from_json(text)
        text = _sendable(text).split(STOP)[0]
        return Answer(text=text, finished=choice.get("finish_reason") != "length")

    def _question(self, ask: Ask) -> tuple[str, dict[str, Any]]:
        """The path of a request, and of its body what is its own."""
        shown = examples(self.shots, ask.caption, ask.number)
        if self.way == "completion":
            return "completions", {"prompt": prompt_of(ask.caption, shown), "stop": [STOP]}
        return "chat/completions", {"messages": _messages(ask.caption, shown)}

    def _body(self, own: dict[str, Any], ask: Ask) -> dict[str, Any]:
        """A request in the form that the server is known to take by now."""
        # 31 bits: some servers keep seeds as signed numbers of 32.
        body = {"model": self.model, **self.sampling, "seed": ask.seed >> 1, **own}
        if self._newer:
            body["max_completion_tokens"] = body.pop("max_tokens")
        form = FORMS[self._form] if self.way == "chat" else {}
        return {name: value for name, value in (body | form).items() if name not in self._drop}

    def _ask(self, ask: Ask, stop: threading.Event) -> dict[str, Any]:
        """The answer to a request, which is repeated while there is hope. Raises _Declined, ModelError."""
        from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_exponential

        jitter = random.Random(ask.seed)  # so that threads do not repeat all at once after a pause
        doubling = wait_exponential(multiplier=FIRST_WAIT, max=LONGEST_WAIT)
        broken: float | None = None  # since when it fails, and not because the server is busy
        last = False  # the attempt under way decides
        error: _Passing

        def is_over(state: RetryCallState) -> bool:
            nonlocal broken, error
            assert state.outcome is not None
            error = state.outcome.exception()  # type: ignore[assignment]
            broken = None if error.busy else broken or time.monotonic()
            return last and not error.busy

        def sleep(seconds: float) -> None:
            nonlocal last
            seconds = max(error.after or 0.0, seconds * (0.5 + jitter.random()))
            last = self._wait(error, seconds, broken, stop, known=ask is KNOWN)

        retry = retry_if_exception_type(_Passing)
        try:
            return Retrying(retry=retry, wait=doubling, stop=is_over, sleep=sleep, reraise=True)(
                self._try, ask, stop
            )
        except (_Passing, _Refused) as failure:
            message = str(failure)
        self._judge(stop)
        raise _Declined(message)

    def _try(self, ask: Ask, stop: threading.Event) -> dict[str, Any]:
        """One attempt, in as many forms as the server needs. Raises _Passing, _Refused, ModelError."""
        path, own = self._question(ask)
        while True:
            self._pace(stop)
            if self._fault:
                raise ModelError(self._fault)
            if stop.is_set():
                raise ModelError(f"asking {self.url} was stopped.")
            sent = self._body(own, ask)
            try:
                return self._choice(self._post(path, sent))
            except _Refused as error:
                if self._adapt(sent, error):
                    continue
                if ask is KNOWN or not error.of_prompt:
                    self._fault = self._refusal(path, error)
                    raise ModelError(self._fault) from None
                raise

    def _choice(self, reply: dict[str, Any]) -> dict[str, Any]:
        """The first answer of a reply, which is counted."""
        self._count(reply)
        choices = reply.get("choices")
        if not (isinstance(choices, list) and choices and isinstance(choices[0], dict)):
            raise _Refused(200, f"without choices: {_short(json.dumps(reply))}")
        with self._lock:
            self.usage.requests += 1
            self._proven, self._row = True, 0
        return choices[0]

    def _judge(self, stop: threading.Event) -> None:
        """Count a refusal, and see whether the server or the prompt is to blame. Raises ModelError."""
        with self._judging:
            with self._lock:
                self._row += 1
                sure = self._proven and self._row < REFUSALS
            if not sure:
                self._prove(stop)

    def _prove(self, stop: threading.Event) -> None:
        """Raise ModelError unless the server answers KNOWN."""
        self._ask(KNOWN, stop)

    def _lives(self, stop: threading.Event) -> bool:
        """Whether the server answers KNOWN now."""
        self._pace(stop)
        path, own = self._question(KNOWN)
        try:
            self._choice(self._post(path, self._body(own, KNOWN)))
        except (_Passing, _Refused):
            return False
        return True

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The reply to one request. Raises _Passing, _Refused."""
        import openai

        chat = path.startswith("chat")
        endpoint: Any = self._client.chat.completions if chat else self._client.completions
        keyless = {} if self._key else {"extra_headers": {"Authorization": openai.Omit()}}
        try:
            # Raw, because servers answer with less than OpenAI's types ask for.
            text = endpoint.with_raw_response.create(**body, **keyless).text
        except openai.APIStatusError as error:
            message, code = error.response.text[:4096], error.status_code
            # Some servers repeat a key that they do not take.
            message = _short(message.replace(self._key, "…") if self._key else message)
            if code in AGAIN:
                after = _retry_after(error.response.headers)
                raise _Passing(f"{code} {message}", after, busy=code in BUSY) from None
            raise _Refused(code, message) from None
        except openai.APIError as error:  # refused, reset, timed out, cut short
            raise _Passing(str(error.__cause__ or error) or type(error).__name__, None) from None
        try:
            reply = json.loads(text)
        except ValueError:
            reply = None
        if not isinstance(reply, dict):
            raise _Refused(200, f"no JSON: {_short(text)}", of_prompt=False)
        return reply

    def _adapt(self, sent: dict[str, Any], error: _Refused) -> bool:
        """Ask in a plainer form from now on, where the server refused one; False if that is not why."""
        if error.code not in (400, 404, 422, 501) or error.filtered:
            return False
        words = set(re.findall(r"[a-z_]+", error.told.lower()))
        with self._lock:
            # What another thread has changed meanwhile is only sent again.
            if "response_format" in sent and words & _OF_FORMS:
                if sent["response_format"] == FORMS[self._form].get("response_format"):
                    self._form += 1
                return True
            if "max_tokens" in sent and "max_completion_tokens" in words:
                self._newer = True
                return True
            for field in ("seed", "frequency_penalty", "stop"):
                if field in sent and field in words:
                    if field not in self._drop:
                        self._drop.add(field)
                        self.say(f"{self.url} does not know {field}; it is left out")
                    return True
        return False

    def _refusal(self, path: str, error: _Refused) -> str:
        what = f"{self.url}/{path} answered {error}"
        if error.code == 200:
            return f"{what}; it is no server of language models in OpenAI's protocol. Check --server."
        if error.code in (401, 403):
            return f"{what}; set {KEY} to a key that it takes."
        if error.code == 404:
            other = "chat" if self.way == "completion" else "completion"
            return f"{what}; check --server (it ends in /v1), the name {self.model}, or try --way {other}."
        return f"{what}. Check --server and --model."

    def _wait(
        self,
        error: _Passing,
        pause: float,
        broken: float | None,
        stop: threading.Event,
        *,
        known: bool,
    ) -> bool:
        """Wait for `pause` seconds before a request is repeated.

        broken: since when the request fails (monotonic seconds), None if the server was only busy. Returns
        True, at once, if that is longer than the patience and the server answers KNOWN: one more try decides.
        Raises ModelError when the server has been away too long.
        """
        with self._lock:
            self.usage.retries += 1
            now = time.monotonic()
            left = self._answered + self.patience - now
            away = left <= 0 or (error.after is not None and error.after > left)
            if not (away or self._away):
                self._away = True
                self.say(f"{self.url}: {error}; asking again for up to {self.patience:g} s")
        hopeless = broken is not None and now - broken >= self.patience
        if broken is not None and (away or hopeless) and not known and self._lives(stop):
            if hopeless:
                return True
            left = self.patience
        elif away:
            raise ModelError(
                f"{self.url} has not answered for {self.patience:g} s ({error}). Start or free it, then "
                "run the same command again: it goes on where it stopped."
            )
        stop.wait(min(pause, left))
        return False

    def _count(self, reply: dict[str, Any]) -> None:
        told = reply.get("usage")
        told = told if isinstance(told, dict) else {}
        read, written = (_whole(told.get(name)) for name in ("prompt_tokens", "completion_tokens"))
        with self._lock:
            self._answered = time.monotonic()
            self._away = False
            self.usage.prompt_tokens += read
            self.usage.answer_tokens += written
            self.usage.cost += (read * self.price[0] + written * self.price[1]) / 1e6


class _Pace:
    """Lets at most `rate` callers a second through, evenly."""

    def __init__(self, rate: float | None) -> None:
        self.gap = 0.0 if rate is None else 1 / rate
        self.next = 0.0
        self.lock = threading.Lock()

    def __call__(self, stop: threading.Event) -> None:
        if not self.gap:
            return
        with self.lock:
            now = time.monotonic()
            mine = max(now, self.next)
            self.next = mine + self.gap
        stop.wait(mine - now)


class _Passing(Exception):
    """A failure that may pass. after: seconds that the server asks to wait, if it does. busy: the request is
    surely not to blame."""

    def __init__(self, told: str, after: float | None, *, busy: bool = False) -> None:
        super().__init__(told)
        self.after, self.busy = after, busy


class _Refused(Exception):
    """A failure that does not pass. of_prompt: another prompt may be answered."""

    def __init__(self, code: int, told: str, *, of_prompt: bool = True) -> None:
        super().__init__(f"{code} ({told})")
        self.code, self.told = code, told
        self.filtered = _FILTERED.search(told) is not None
        self.of_prompt = of_prompt and (code in OF_PROMPT or self.filtered)


class _Declined(Exception):
    """A prompt is given up, and the server is not to blame."""


def clean_key(key: str, variable: str = "") -> str:
    """A key as it can be sent, without the blanks around it, which files and dashboards leave there.

    variable: of the environment, that held it. Raises InputError, which never shows the key.
    """
    key = key.strip()
    if all("!" <= letter <= "~" for letter in key):
        return key
    of = variable or f"the variable it comes from (IP2P_API_KEY, {KEY}, or that of --key-variable)"
    raise InputError(
        f"the server's key holds a blank, a control character or one beyond ASCII; set {of} to the key alone."
    )


def _is_address(url: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
        _ = parts.port  # raises ValueError for a word or a number too large
    except ValueError:
        return False
    plain = all("!" <= letter <= "~" for letter in url)
    return parts.scheme in ("http", "https") and bool(parts.hostname) and plain


def _sendable(text: str) -> str:
    """Without halves of surrogate pairs, which JSON can hold and no file."""
    return text.encode(errors="replace").decode()


def _messages(caption: str, shown: Sequence[Triple]) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": SYSTEM}]
    for triple in shown:
        edit = {name: getattr(triple, name) for name in SCHEMA["properties"]}
        messages.append({"role": "user", "content": triple.caption})
        messages.append({"role": "assistant", "content": json.dumps(edit, ensure_ascii=False)})
    return [*messages, {"role": "user", "content": caption}]


def _from_json(text: str) -> str:
    """An answer in JSON, or with JSON in it, in the delimiters; unchanged if there is none."""
    start, end = text.find("{"), text.rfind("}")
    try:
        edit = json.loads(text[start : end + 1])
        instruction, edited = edit["instruction"], edit["edited_caption"]
    except (ValueError, KeyError, TypeError):
        return text
    if not (isinstance(instruction, str) and isinstance(edited, str)):
        return text
    kind = [edit["kind"]] if edit.get("kind") in ("whole", "part") else []
    return MIDDLE.join(" ".join(part.split()) for part in (instruction, edited, *kind))


def _open_client(url: str, key: str, timeout: float) -> OpenAI:
    """The client of a server, which repeats nothing itself. Raises InputError where the extra is missing."""
    try:
        import openai
        import tenacity  # noqa: F401 (used later: missing packages are named before the work)
    except ModuleNotFoundError as error:
        raise InputError(
            f"--server needs {error.name}, which is missing; install it: pip install 'ip2p[llm-server]'"
        ) from None
    # No organization or project of this machine's environment goes to a server that may be another's.
    headers: dict[str, Any] = {"OpenAI-Organization": openai.Omit(), "OpenAI-Project": openai.Omit()}
    return openai.OpenAI(
        base_url=url, api_key=key or "none", timeout=timeout, max_retries=0, default_headers=headers
    )


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds of Retry-After, given as a number or as a date."""
    value = headers.get("Retry-After")
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 300 else text[:300] + " …"


def _whole(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0
