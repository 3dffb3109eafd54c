"""Error responses in the format of each API, and their OpenAPI declarations."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from ip2p.base.errors import InputError, Ip2pError, ResourceError
from ip2p.settings import EditSettings, voice_of

Face = Literal["native", "openai", "a1111"]
# Each API's names for the request fields that are not settings.
FIELD_NAMES: dict[Face, dict[str, str]] = {
    "native": {"seeds": "seed"},
    # Not `background`, which is a setting that this API calls background_color.
    "openai": {"seeds": "seed", "background_mode": "background"},
    "a1111": {"image": "init_images", "seeds": "seed", "model": "override_settings.sd_model_checkpoint"},
}


class Refusal(Ip2pError):
    """A rejected request. status: of HTTP. field: the field at fault. headers: of the response."""

    def __init__(
        self, message: str, *, status: int, field: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.field, self.headers = status, field, dict(headers or {})


# --- error bodies ----------------------------------------------------------------------------------


class Fault(BaseModel):
    """Details of an error."""

    message: str = Field(description="what is wrong, the limit, and what to do, in one line")
    type: str = Field(description="invalid_request_error, rate_limit_error or server_error")
    param: str | None = Field(description="the field of the request that caused the error")
    code: str = Field(description="short name of the error, such as too_large")


class ErrorBody(BaseModel):
    """An error of the native or OpenAI API."""

    error: Fault


class A1111Detail(BaseModel):
    loc: list[str]
    msg: str
    type: str


class A1111ErrorBody(BaseModel):
    """An error of the AUTOMATIC1111 API. `detail` is a list for status 422."""

    error: str
    detail: str | list[A1111Detail]
    body: str
    errors: str


# By status: OpenAI's type and code, and the OpenAPI description.
KINDS = {
    400: ("invalid_request_error", "invalid_value", "A field is invalid"),
    401: ("invalid_request_error", "invalid_api_key", "The API key is missing or wrong"),
    403: ("invalid_request_error", "forbidden", "Requests from another origin are not allowed"),
    404: ("invalid_request_error", "not_found", "Not found"),
    405: ("invalid_request_error", "method_not_allowed", "Method not allowed"),
    408: ("invalid_request_error", "timeout", "The body arrived too slowly"),
    409: ("invalid_request_error", "cancelled", "The edit was cancelled, or is not done"),
    410: ("invalid_request_error", "gone", "The result was removed early to make room"),
    413: ("invalid_request_error", "too_large", "The body is too large"),
    415: ("invalid_request_error", "invalid_value", "The body is neither a form nor JSON"),
    421: ("invalid_request_error", "wrong_host", "Host is not a name of this server"),
    422: ("invalid_request_error", "invalid_value", "A field is invalid"),
    429: ("rate_limit_error", "too_many_requests", "Too many requests from this client; see Retry-After"),
    500: ("server_error", "server_error", "Internal error"),
    503: ("server_error", "busy", "The server is full or shutting down; see Retry-After"),
}


def declared_errors(face: Face) -> dict[int | str, dict[str, Any]]:
    """The error responses of an API's routes, for FastAPI's `responses`."""
    kind = A1111ErrorBody if face == "a1111" else ErrorBody
    return {status: {"model": kind, "description": text} for status, (_, _, text) in KINDS.items()}


# --- error responses --------------------------------------------------------------------------------


def face_of(path: str) -> Face:
    """The API that a URL path belongs to; native if it belongs to no other."""
    if path.startswith("/sdapi/"):
        return "a1111"
    return "openai" if path.startswith(("/v1/images", "/v1/models")) else "native"


def refusal_of(error: Exception, path: str) -> Refusal:
    """Convert an error of ip2p, Starlette or FastAPI to a Refusal."""
    bad = 400 if face_of(path) == "openai" else 422  # OpenAI's API uses 400 for invalid fields
    message, field = " ".join(str(error).split()), getattr(error, "field", None) or None
    status, headers = 500, dict(getattr(error, "headers", None) or {})
    wait = getattr(error, "retry_after", None)
    if isinstance(error, Refusal):
        message, status = str(error), bad if error.status == 422 else error.status
    elif isinstance(error, HTTPException):
        status = error.status_code
        texts = {
            404: "Not found. See /docs.",
            405: "Method not allowed. See /docs.",
        }
        message = texts.get(status, str(error.detail))
    elif isinstance(error, RequestValidationError):
        first = error.errors()[0]
        field, status = str(first["loc"][-1]), bad
        message = f"{field} is invalid: {first['msg']}."
    elif wait is not None:
        status = 429 if getattr(error, "scope", None) == "client" else 503
        headers = {"Retry-After": str(max(1, math.ceil(wait)))}
    elif isinstance(error, InputError):
        status = bad
    elif isinstance(error, ResourceError):
        status = 503
    return Refusal(message, status=status, field=field, headers=headers)


def outer_name(field: str, face: Face) -> str:
    """An API's name for a request field."""
    return FIELD_NAMES[face].get(field) or (field if face == "native" else voice_of(face).name(field))


def inner_name(name: str, face: Face) -> str:
    """The request field that an API calls `name`: the inverse of `outer_name`."""
    fields = (*FIELD_NAMES[face], *EditSettings.model_fields)
    return next((field for field in fields if outer_name(field, face) == name), name)


def error_response(error: Exception, path: str) -> JSONResponse:
    """The response for an error, in the format of the API at `path`."""
    refusal = refusal_of(error, path)
    return JSONResponse(error_body(refusal, path), status_code=refusal.status, headers=refusal.headers)


def error_body(error: Exception, path: str) -> dict[str, Any]:
    """The response body for an error, in the format of the API at `path`."""
    face, refusal = face_of(path), refusal_of(error, path)
    message, field = str(refusal), refusal.field
    if field is not None:
        # Use the API's name for the field, also in the message.
        name = outer_name(field, face)
        if not re.search(rf"\b{re.escape(name)}\b", message):
            message = re.sub(rf"\b{re.escape(field)}\b", lambda _: name, message, count=1)
        field = name
    if face == "a1111":
        detail: Any = message
        if refusal.status == 422:
            detail = [{"loc": ["body", *([field] if field else [])], "msg": message, "type": "value_error"}]
        return {"error": "HTTPException", "detail": detail, "body": "", "errors": message}
    kind, code, _ = KINDS.get(refusal.status, ("server_error", "server_error", ""))
    return {"error": {"message": message, "type": kind, "param": field, "code": code}}
