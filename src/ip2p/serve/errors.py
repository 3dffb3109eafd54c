"""Errors as each interface's clients know them: OpenAI's body, AUTOMATIC1111's, and our own."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from ip2p.base.errors import InputError, Ip2pError, ModelError, ResourceError

# What a field of an edit is called by the clients of each interface; those not named are called the same.
NATIVE_NAMES = {"seeds": "seed"}
OPENAI_NAMES = {
    "instruction": "prompt",
    "negative": "negative_prompt",
    "seeds": "seed",
    "steps": "num_inference_steps",
    "text_cfg": "guidance_scale",
    "image_cfg": "image_guidance_scale",
}
A1111_NAMES = {
    "image": "init_images",
    "instruction": "prompt",
    "negative": "negative_prompt",
    "seeds": "seed",
    "text_cfg": "cfg_scale",
    "image_cfg": "image_cfg_scale",
    "sampler": "sampler_name",
    "spacing": "scheduler",
    "feather": "mask_blur",
    "mask_padding": "inpaint_full_res_padding",
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


def refusal_of(error: Ip2pError, path: str) -> Refusal:
    """The answer to a request that ended in an error of ours."""
    if isinstance(error, Refusal):
        if error.status == 422 and is_openai(path):  # which OpenAI's clients know as 400
            return Refusal(str(error), status=400, field=error.field, headers=error.headers)
        return error
    message, field = " ".join(str(error).split()), getattr(error, "field", None)
    wait = getattr(error, "retry_after", None)
    if wait is not None:
        status = 429 if getattr(error, "scope", None) == "client" else 503
        return Refusal(
            message, status=status, field=field, headers={"Retry-After": str(max(1, math.ceil(wait)))}
        )
    if isinstance(error, InputError):
        return Refusal(message, status=400 if is_openai(path) else 422, field=field)
    if isinstance(error, ResourceError):
        return Refusal(message, status=503, field=field)
    assert isinstance(error, ModelError) or type(error) is Ip2pError, f"an error without an answer: {error!r}"
    return Refusal(message, status=500, field=field)


def body_of(path: str, refusal: Refusal) -> dict[str, Any]:
    """The body of an error, in the form of the interface at `path`."""
    if path.startswith("/sdapi/"):
        field, message = _called(refusal, A1111_NAMES)
        if refusal.status != 422:
            return {"error": "HTTPException", "detail": message, "body": "", "errors": message}
        detail = [{"loc": ["body", *([field] if field else [])], "msg": message, "type": "value_error"}]
        return {"error": "HTTPException", "detail": detail, "body": "", "errors": message}
    field, message = _called(refusal, OPENAI_NAMES if is_openai(path) else NATIVE_NAMES)
    kind, code = KINDS.get(refusal.status, ("server_error", "server_error"))
    return {"error": {"message": message, "type": kind, "param": field, "code": code}}


def is_openai(path: str) -> bool:
    return path.startswith(("/v1/images", "/v1/models"))


def _called(refusal: Refusal, names: Mapping[str, str]) -> tuple[str | None, str]:
    """The field and the message, with the interface's own name of the field in both."""
    message, field = str(refusal), refusal.field
    if field is None or field not in names:
        return field, message
    return names[field], re.sub(rf"\b{re.escape(field)}\b", names[field], message, count=1)


# Status: OpenAI's type and code of it.
KINDS = {
    400: ("invalid_request_error", "invalid_value"),
    401: ("invalid_request_error", "invalid_api_key"),
    403: ("invalid_request_error", "forbidden"),
    404: ("invalid_request_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("invalid_request_error", "timeout"),
    409: ("invalid_request_error", "cancelled"),
    410: ("invalid_request_error", "gone"),
    413: ("invalid_request_error", "too_large"),
    421: ("invalid_request_error", "wrong_host"),
    422: ("invalid_request_error", "invalid_value"),
    429: ("rate_limit_error", "too_many_requests"),
    503: ("server_error", "busy"),
}
