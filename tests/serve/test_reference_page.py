"""The page of the interfaces' documentation: whole, and made of nothing but itself."""

import re

import pytest
from running import running

from ip2p.serve import reference


@pytest.fixture(scope="module")
def told():
    import httpx

    with running() as server:
        yield httpx.get(f"{server.url}/docs", trust_env=False)


def test_every_operation_and_field_stands_on_the_page(told):
    assert told.status_code == 200
    for words in (
        *("POST /v1/edits", "GET /v1/edits/{id}", "DELETE /v1/edits/{id}", "POST /v1/images/edits"),
        *("POST /sdapi/v1/img2img", "GET /sdapi/v1/progress", "GET /healthz", "GET /metrics"),
        *("auto_mask", "image_guidance_scale", "inpaint_full_res_padding", "the picture: PNG"),
    ):
        assert words in told.text


def test_nothing_on_it_is_fetched_or_run(told):
    assert not re.search(r"<(script|link|img|iframe)|https?://|@import|url\(", told.text)
    assert told.headers["content-security-policy"].startswith("default-src 'none'; style-src")


def test_words_of_the_schema_are_no_html():
    field = {"type": "string", "description": "<b>&", "default": "<i>"}
    schema = {
        "info": {"title": "<x>", "version": "1"},
        "paths": {
            "/<p>": {
                "post": {
                    "tags": ["<t>"],
                    "requestBody": {"content": {"a/b": {"schema": {"properties": {"<f>": field}}}}},
                }
            }
        },
    }
    page = reference.page(schema)
    assert not re.search(r"<(x|p>\"|t|f|b>&|i)>", page)
    assert "&lt;b&gt;&amp;" in page and "&lt;f&gt;" in page


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "integer"),
        (
            {"anyOf": [{"type": "string", "format": "binary"}, {"type": "string"}, {"type": "null"}]},
            "file or string",
        ),
        ({"enum": ["png", "jpeg"]}, "png or jpeg"),
        ({"type": "array", "items": {"type": "string"}}, "several: string"),
    ],
)
def test_types_are_told_in_words(field, words):
    assert reference._type(field) == words
