"""Edits written by a language model on a server with OpenAI's API: vLLM, Ollama, OpenAI, …

Two modes. `completion`: a model tuned on triples continues the prompt. `chat`: a general model sees some seed
triples as a conversation and answers with JSON of a schema. The `openai` client sends the requests
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
from ip2p.settings import COMMAND_LINE
from ip2p.synth.instruct import MIDDLE, STOP, Answer, Ask, prompt_of
from ip2p.synth.records import Triple
from ip2p.synth.settings import SynthInstructConfig
from ip2p.synth.triples import examples

if TYPE_CHECKING:
    from openai import OpenAI
    from typing_extensions import Unpack

    from ip2p.synth.arguments import InstructArguments

OUR_KEY, KEY = "IP2P_API_KEY", "OPENAI_API_KEY"  # environment variables; the first is preferred
SHOTS = 8  # seed triples in the prompt of a general model
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
        """A summary for display."""
        line = (
            f"{self.requests:,.0f} answers, {self.retries:,.0f} retries, "
            f"{self.prompt_tokens:,.0f} tokens in, {self.answer_tokens:,.0f} out"
        )
        return line + (f", cost {self.cost:,.4f}" if self.cost else "")


class ServerWriter:
    """A language model on a server, called by several threads.

    url: up to /v1, such as http://localhost:8000/v1. key: the bearer token, by default that of
    OPENAI_API_KEY. settings: way, shots, temperature, frequency_penalty, max_tokens, together, rate, price,
    timeout and patience, as in `SynthInstructConfig`.

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
        key: str | None = None,
        say: Callable[[str], None] = terminal.say,
        **settings: Unpack[InstructArguments],
    ) -> None:
        config = SynthInstructConfig.read(settings, COMMAND_LINE)
        if not _is_address(url):
            raise InputError(f"--server {url} is no address; write it as http://localhost:8000/v1")
        if not model.strip():
            raise InputError("the server's model is not named; name one: --model NAME")
        self.name, self.way, self.url = model, config.way, url.rstrip("/")
        self.config, self.say = config, say
        self.shots = config.shots if config.shots is not None else SHOTS if config.way == "chat" else 0
        self.usage = Usage()
        self._key = clean_key(os.environ.get(KEY, ""), KEY) if key is None else clean_key(key)
        self._client = _open_client(self.url, self._key, config.timeout)
        self._lock = threading.Lock()
        self._judging = threading.Lock()  # held while KNOWN is sent, so that only one thread sends it
        self._pace = _Pace(config.rate)
        self._form = 0  # index into FORMS
        self._drop: set[str] = set()  # fields that the server does not know
        self._newer = False  # the server calls max_tokens max_completion_tokens
        self._answered = time.monotonic()
        self._away = False
        self._proven = False  # whether any request was answered
        self._row = 0  # refusals since the last answer
        self._fault = ""  # why the server cannot be used

    def __call__(self, asks: Sequence[Ask]) -> list[Answer]:
        if not asks:
            return []
        self._answered = time.monotonic()
        self._fault = ""
        stop = threading.Event()
        with ThreadPoolExecutor(min(self.config.together, len(asks)), "ip2p-server") as pool:
            futures = [pool.submit(self._answer, ask, stop) for ask in asks]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                if self._row:  # otherwise a bad key or an empty quota would count as refused prompts
                    self._prove(stop)
            except BaseException:
                # Waiting retries must not delay the error or Ctrl-C.
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
        chat = self.way == "chat"
        message = choice.get("message") if chat else choice
        text = message.get("content" if chat else "text") if isinstance(message, dict) else None
        if not isinstance(text, str):
            text = ""  # the model declined or only called a tool: unparsable
        text = _sendable(_from_json(text) if chat else text).split(STOP)[0]
        return Answer(text=text, finished=choice.get("finish_reason") != "length")

    def _question(self, ask: Ask) -> tuple[str, dict[str, Any]]:
        """The path of a request, and the fields of its body that depend on the request."""
        shown = examples(self.shots, ask.caption, ask.number)
        if self.way == "completion":
            return "completions", {"prompt": prompt_of(ask.caption, shown), "stop": [STOP]}
        return "chat/completions", {"messages": _messages(ask.caption, shown)}

    def _body(self, own: dict[str, Any], ask: Ask) -> dict[str, Any]:
        """The body of a request, in the form that the server accepts as far as is known."""
        names = ("temperature", "frequency_penalty", "max_tokens")
        body = {"model": self.name} | {name: getattr(self.config, name) for name in names}
        body |= {"seed": ask.seed >> 1, **own}  # 31 bits: some servers store seeds as signed 32-bit numbers
        if self._newer:
            body["max_completion_tokens"] = body.pop("max_tokens")
        form = FORMS[self._form] if self.way == "chat" else {}
        return {name: value for name, value in (body | form).items() if name not in self._drop}

    def _ask(self, ask: Ask, stop: threading.Event) -> dict[str, Any]:
        """The answer to a request, with retries. Raises _Declined, ModelError."""
        from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_exponential

        jitter = random.Random(ask.seed)  # so that threads do not retry all at once
        doubling = wait_exponential(multiplier=FIRST_WAIT, max=LONGEST_WAIT)
        broken: float | None = None  # since when it has failed with the server not busy
        last = False  # whether this attempt is the last
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
        """The first answer of a reply; counts the usage."""
        self._count(reply)
        choices = reply.get("choices")
        if not (isinstance(choices, list) and choices and isinstance(choices[0], dict)):
            raise _Refused(200, f"without choices: {_short(json.dumps(reply))}")
        with self._lock:
            self.usage.requests += 1
            self._proven, self._row = True, 0
        return choices[0]

    def _judge(self, stop: threading.Event) -> None:
        """Count a refusal, and check the server if needed. Raises ModelError if it refuses everything."""
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
            # Raw, because some servers leave out fields that OpenAI's types require.
            text = endpoint.with_raw_response.create(**body, **keyless).text
        except openai.APIStatusError as error:
            message, code = error.response.text[:4096], error.status_code
            # Some servers repeat a key that they reject.
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
        """Use a simpler form from now on if the server rejected this one; False for another error."""
        if error.code not in (400, 404, 422, 501) or error.filtered:
            return False
        words = set(re.findall(r"[a-z_]+", error.message.lower()))
        with self._lock:
            # If another thread has changed the form meanwhile, the request is only sent again.
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
                        self.say(f"{self.url} does not know {field}; leaving it out")
                    return True
        return False

    def _refusal(self, path: str, error: _Refused) -> str:
        what = f"{self.url}/{path} answered {error}"
        if error.code == 200:
            return f"{what}; it does not speak OpenAI's protocol. Check --server."
        if error.code in (401, 403):
            return f"{what}; set {KEY} to a key that it accepts."
        if error.code == 404:
            other = "chat" if self.way == "completion" else "completion"
            return f"{what}; check --server (it ends in /v1), the name {self.name}, or try --way {other}."
        return f"{what}. Check --server and --model."

    def _wait(
        self, error: _Passing, pause: float, broken: float | None, stop: threading.Event, *, known: bool
    ) -> bool:
        """Wait for `pause` seconds before a retry.

        broken: since when the request has failed (monotonic seconds), None if the server was only busy.
        Returns True, at once, if that exceeds the patience but the server answers KNOWN: the next attempt is
        the last. Raises ModelError when the server has been away too long.
        """
        with self._lock:
            self.usage.retries += 1
            now = time.monotonic()
            left = self._answered + self.config.patience - now
            away = left <= 0 or (error.after is not None and error.after > left)
            if not (away or self._away):
                self._away = True
                self.say(f"{self.url}: {error}; asking again for up to {self.config.patience:g} s")
        hopeless = broken is not None and now - broken >= self.config.patience
        if broken is not None and (away or hopeless) and not known and self._lives(stop):
            if hopeless:
                return True
            left = self.config.patience
        elif away:
            raise ModelError(
                f"{self.url} has not answered for {self.config.patience:g} s ({error}). Start it or free it, "
                "then run the same command again: it resumes."
            )
        stop.wait(min(pause, left))
        return False

    def _count(self, reply: dict[str, Any]) -> None:
        counts = reply.get("usage")
        counts = counts if isinstance(counts, dict) else {}
        read, written = (_whole(counts.get(name)) for name in ("prompt_tokens", "completion_tokens"))
        with self._lock:
            self._answered = time.monotonic()
            self._away = False
            self.usage.prompt_tokens += read
            self.usage.answer_tokens += written
            self.usage.cost += (read * self.config.price[0] + written * self.config.price[1]) / 1e6


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
    """A temporary failure. after: the server's Retry-After in seconds. busy: the request did not cause it."""

    def __init__(self, message: str, after: float | None, *, busy: bool = False) -> None:
        super().__init__(message)
        self.after, self.busy = after, busy


class _Refused(Exception):
    """A permanent failure. of_prompt: another prompt may be answered."""

    def __init__(self, code: int, message: str, *, of_prompt: bool = True) -> None:
        super().__init__(f"{code} ({message})")
        self.code, self.message = code, message
        self.filtered = _FILTERED.search(message) is not None
        self.of_prompt = of_prompt and (code in OF_PROMPT or self.filtered)


class _Declined(Exception):
    """The server will not answer this prompt, but it answers others."""


def server_key(variable: str | None) -> str:
    """The server's key from the environment. Raises InputError for a named variable that is not set."""
    if variable is not None and variable not in os.environ:
        raise InputError(f"the environment has no {variable}, which --key-variable names; set it to the key.")
    name = variable or (OUR_KEY if os.environ.get(OUR_KEY) else KEY)
    return clean_key(os.environ.get(name, ""), name)


def clean_key(key: str, variable: str = "") -> str:
    """A key without the whitespace around it, which files and dashboards leave there.

    variable: the environment variable that held it. Raises InputError, which never shows the key.
    """
    key = key.strip()
    if all("!" <= letter <= "~" for letter in key):
        return key
    of = variable or f"the variable it comes from ({OUR_KEY}, {KEY}, or that of --key-variable)"
    raise InputError(
        "the server's key contains whitespace, a control character or a non-ASCII character; set "
        f"{of} to the key alone."
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
    """Replace unpaired surrogates, which JSON can hold but UTF-8 cannot."""
    return text.encode(errors="replace").decode()


def _messages(caption: str, shown: Sequence[Triple]) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": SYSTEM}]
    for triple in shown:
        edit = {name: getattr(triple, name) for name in SCHEMA["properties"]}
        messages.append({"role": "user", "content": triple.caption})
        messages.append({"role": "assistant", "content": json.dumps(edit, ensure_ascii=False)})
    return [*messages, {"role": "user", "content": caption}]


def _from_json(text: str) -> str:
    """An answer that contains JSON, rewritten with the delimiters; unchanged if there is none."""
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
    """A client without retries of its own. Raises InputError if the extra is missing."""
    try:
        import openai
        import tenacity  # noqa: F401 (used later; a missing package must show before any work)
    except ModuleNotFoundError as error:
        raise InputError(
            f"--server needs {error.name}, which is missing; install it: pip install 'ip2p[llm-server]'"
        ) from None
    # The environment's organization and project must not go to another provider's server.
    headers: dict[str, Any] = {"OpenAI-Organization": openai.Omit(), "OpenAI-Project": openai.Omit()}
    return openai.OpenAI(
        base_url=url, api_key=key or "none", timeout=timeout, max_retries=0, default_headers=headers
    )


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds of Retry-After, which is a number or a date."""
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
