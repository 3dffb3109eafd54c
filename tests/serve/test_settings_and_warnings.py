"""Every interface accepts every edit setting and returns warnings about the result."""

import base64
import io
import json

import httpx
import pytest
from PIL import Image
from running import running

from ip2p.pictures.images import to_bytes
from ip2p.pictures.infotext import parse_infotext
from ip2p.serve.requests import Limits
from ip2p.settings import EditSettings, meta_of

GLASS = Image.new("RGBA", (64, 64), (255, 0, 0, 255))
GLASS.paste((0, 0, 0, 0), (0, 0, 32, 32))
LONG = "make it night " * 60
# Settings that an interface defines differently: its size is that of the result, not of the work.
DIFFERENT = {"a1111": {"size"}}


@pytest.fixture(scope="module")
def http():
    with running() as server, httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
        yield client


def encoded(picture):
    return base64.b64encode(to_bytes(picture)).decode()


@pytest.mark.parametrize(
    ("path", "face"),
    [("/v1/edits", None), ("/v1/images/edits", "openai"), ("/sdapi/v1/img2img", "a1111")],
)
@pytest.mark.parametrize("name", EditSettings.model_fields)
def test_every_interface_declares_every_setting(http, path, face, name):
    schema = http.get("/openapi.json").json()
    body = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    called = meta_of(EditSettings.model_fields[name]).names.get(face, name)
    assert called in body["properties"] or name in DIFFERENT.get(face, ())


def test_the_schema_has_the_servers_limits(http):
    fields = http.get("/v1/schema").json()["properties"]
    assert set(EditSettings.model_fields) <= set(fields)
    assert fields["steps"]["anyOf"][0]["maximum"] == 50 and fields["count"]["maximum"] == 4
    assert fields["instruction"]["maxLength"] == Limits().words
    assert fields["text_cfg"]["group"] == meta_of(EditSettings.model_fields["text_cfg"]).group


def test_every_interface_applies_the_guidance_settings(http):
    picture = encoded(Image.new("RGB", (64, 64), "red"))
    more = {"text_cfg_rescale": 0.5, "cfg_interval": [0.1, 0.9], "seed": 3}
    native = http.post("/v1/edits", json={"image": picture, "instruction": "x", "steps": 2, **more}).json()
    body = {"image": picture, "prompt": "x", "num_inference_steps": 2, **more}
    openai = http.post("/v1/images/edits", json=body).json()["data"][0]["b64_json"]
    body = {"init_images": [picture], "prompt": "x", "steps": 2, **more}
    a1111 = http.post("/sdapi/v1/img2img", json=body).json()
    infotexts = [native["results"][0]["settings"], json.loads(a1111["info"])["infotexts"][0]]
    for infotext in infotexts:
        record = parse_infotext(infotext)
        assert (record.text_cfg_rescale, record.cfg_interval) == (0.5, (0.1, 0.9))
    assert openai == native["results"][0]["b64"]


def test_a_control_image_without_a_controlnet_is_refused(http):
    picture = encoded(Image.new("RGB", (64, 64), "red"))
    answer = http.post("/v1/edits", json={"image": picture, "instruction": "x", "control_image": picture})
    assert answer.status_code == 422 and "ControlNet" in answer.json()["error"]["message"]


def test_every_interface_keeps_transparency(http):
    picture = encoded(GLASS)
    native = http.post("/v1/edits", json={"image": picture, "instruction": "x", "steps": 1}).json()
    body = {"image": picture, "prompt": "x", "num_inference_steps": 1, "background": "transparent"}
    openai = http.post("/v1/images/edits", json=body).json()
    body = {"init_images": [picture], "prompt": "x", "steps": 1}
    a1111 = http.post("/sdapi/v1/img2img", json=body).json()
    for result in (native["results"][0]["b64"], openai["data"][0]["b64_json"], a1111["images"][0]):
        with Image.open(io.BytesIO(base64.b64decode(result))) as image:
            assert image.mode == "RGBA"
            assert image.getchannel("A").tobytes() == GLASS.getchannel("A").tobytes()


def test_every_interface_returns_warnings_about_the_result(http):
    picture = encoded(GLASS)
    native = http.post("/v1/edits", json={"image": picture, "instruction": LONG, "steps": 1}).json()
    body = {"image": picture, "prompt": LONG, "num_inference_steps": 1}
    openai = http.post("/v1/images/edits", json=body).json()
    body = {"init_images": [picture], "prompt": LONG, "steps": 1}
    a1111 = json.loads(http.post("/sdapi/v1/img2img", json=body).json()["info"])
    for warnings in (native["warnings"], openai["warnings"], a1111["warnings"]):
        assert len(warnings) == 1 and "has no effect" in warnings[0]
    plain = encoded(Image.new("RGB", (64, 64), "red"))
    assert (
        http.post("/v1/edits", json={"image": plain, "instruction": "x", "steps": 1}).json()["warnings"] == []
    )
