"""Errors as each interface's clients know them, and as OpenAPI declares them for every route."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, Field

from ip2p.base.errors import InputError, Ip2pError, ModelError, ResourceError
from ip2p.settings import voice_of

Face = Literal["native", "openai", "a1111"]
# What a field of a request that is no setting is called by the clients of an interface.
NATIVE_NAMES = {"seeds": "seed"}
# `background` alone is the setting, which that interface calls background_color.
OPENAI_NAMES = {"seeds": "seed", "background_mode": "background"}
A1111_NAMES = {
    "image": "init_images",
    "seeds": "seed",
    "model": "override_settings.sd_model_checkpoint",
}


class Refusal(Ip2pError):
    """A request that is not answered: the HTTP status, the field that is to blame, headers of the answer."""

    def __init__(
        self,
        message: str,
        *,
        status: int,
        field: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.field, self.headers = status, field, dict(headers or {})


# --- the bodies ------------------------------------------------------------------------------------


class Fault(BaseModel):
    """What went wrong."""

    message: str = Field(description="one line: what is wrong, the limit, what to do")
    type: str = Field(description="invalid_request_error, rate_limit_error or server_error")
    param: str | None = Field(description="the field of the request that is to blame")
    code: str = Field(description="a word for the status, such as too_large")


class ErrorBody(BaseModel):
    """An error of our own interface and of OpenAI's."""

    error: Fault


class A1111Detail(BaseModel):
    loc: list[str]
    msg: str
    type: str


class A1111ErrorBody(BaseModel):
    """An error of AUTOMATIC1111's interface; detail is a list for status 422."""

    error: str
    detail: str | list[A1111Detail]
    body: str
    errors: str


# Status: OpenAI's type and code of it, and what OpenAPI says of it.
KINDS = {
    400: ("invalid_request_error", "invalid_value", "A field cannot be used"),
    401: ("invalid_request_error", "invalid_api_key", "The API key is missing or wrong"),
    403: ("invalid_request_error", "forbidden", "A page of another origin may not post"),
    404: ("invalid_request_error", "not_found", "There is no such thing"),
    405: ("invalid_request_error", "method_not_allowed", "The address takes another method"),
    408: ("invalid_request_error", "timeout", "The body came too slowly"),
    409: ("invalid_request_error", "cancelled", "The edit was cancelled, or is not done"),
    410: ("invalid_request_error", "gone", "It was dropped early, to make room"),
    413: ("invalid_request_error", "too_large", "The body is too large"),
    415: ("invalid_request_error", "invalid_value", "The body is neither a form nor JSON"),
    421: ("invalid_request_error", "wrong_host", "The Host is not this server's name"),
    422: ("invalid_request_error", "invalid_value", "A field cannot be used"),
    429: ("rate_limit_error", "too_many_requests", "Too many requests of this caller; see Retry-After"),
    500: ("server_error", "server_error", "The server failed"),
    503: ("server_error", "busy", "No room, or the server is shutting down; see Retry-After"),
}


def declared_errors(face: Face) -> dict[int | str, dict[str, Any]]:
    """The errors that the routes of an interface answer with, as FastAPI's `responses` takes them."""
    kind = A1111ErrorBody if face == "a1111" else ErrorBody
    return {status: {"model": kind, "description": words} for status, (_, _, words) in KINDS.items()}


# --- from errors to answers -------------------------------------------------------------------------


def face_of(path: str) -> Face:
    """The interface that has an address; our own has all that no other has."""
    if path.startswith("/sdapi/"):
        return "a1111"
    return "openai" if path.startswith(("/v1/images", "/v1/models")) else "native"


def refusal_of(error: Ip2pError, path: str) -> Refusal:
    """The answer to a request that ended in an error of ours."""
    bad = 400 if face_of(path) == "openai" else 422  # OpenAI's clients know it as 400
    if isinstance(error, Refusal):
        if error.status != 422 or bad == 422:
            return error
        return Refusal(str(error), status=bad, field=error.field, headers=error.headers)
    message, field = " ".join(str(error).split()), getattr(error, "field", None) or None
    wait = getattr(error, "retry_after", None)
    if wait is not None:
        status = 429 if getattr(error, "scope", None) == "client" else 503
        headers = {"Retry-After": str(max(1, math.ceil(wait)))}
        return Refusal(message, status=status, field=field, headers=headers)
    if isinstance(error, InputError):
        return Refusal(message, status=bad, field=field)
    if isinstance(error, ResourceError):
        return Refusal(message, status=503, field=field)
    assert isinstance(error, ModelError) or type(error) is Ip2pError, f"an error without an answer: {error!r}"
    return Refusal(message, status=500, field=field)


def body_of(path: str, refusal: Refusal) -> dict[str, Any]:
    """The body of an error, in the form of the interface at `path`."""
    face = face_of(path)
    field, message = _in_names_of(face, refusal)
    if face == "a1111":
        detail: Any = message
        if refusal.status == 422:
            detail = [{"loc": ["body", *([field] if field else [])], "msg": message, "type": "value_error"}]
        return {"error": "HTTPException", "detail": detail, "body": "", "errors": message}
    kind, code, _ = KINDS.get(refusal.status, ("server_error", "server_error", ""))
    return {"error": {"message": message, "type": kind, "param": field, "code": code}}


def _in_names_of(face: Face, refusal: Refusal) -> tuple[str | None, str]:
    """The field and the message, with the interface's own name of the field in both."""
    message, field = str(refusal), refusal.field
    if field is None:
        return None, message
    own = {"native": NATIVE_NAMES, "openai": OPENAI_NAMES, "a1111": A1111_NAMES}[face]
    name = own.get(field) or (field if face == "native" else voice_of(face).name(field))
    if not re.search(rf"\b{re.escape(name)}\b", message):
        message = re.sub(rf"\b{re.escape(field)}\b", lambda _: name, message, count=1)
    return name, message
