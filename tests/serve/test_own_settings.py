"""In every interface, settings that a request leaves out come from the model card."""

import base64
import dataclasses
import io
import json

import httpx
import pytest
from fakes import fake_editor
from PIL import Image
from running import running

from ip2p.editing.editor import Editor
from ip2p.pictures.images import to_bytes
from ip2p.pictures.infotext import parse_infotext
from ip2p.serve.requests import EditRequest
from ip2p.settings import EditSettings

TUNED = {"steps": 3, "sampler": "euler", "schedule": "trailing", "text_cfg": 2.5, "image_cfg": 1.25}
PICTURE = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
ENCODED = base64.b64encode(to_bytes(PICTURE)).decode()


def tuned_editor() -> Editor:
    bundle = fake_editor(0.0).bundle
    return Editor(dataclasses.replace(bundle, card=dataclasses.replace(bundle.card, **TUNED)))


@pytest.fixture(scope="module")
def server():
    with running(models={"tuned": tuned_editor}) as started:
        yield started


def post_json(server, path: str, body: dict) -> dict:
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as http:
        answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def tuned_settings(settings: str) -> dict:
    record = parse_infotext(settings)
    return {name: getattr(record, name) for name in TUNED}


def test_the_native_interface_uses_the_cards_settings(server):
    body = {"image": ENCODED, "instruction": "make it night", "model": "tuned", "count": 2}
    answer = post_json(server, "/v1/edits", body)
    assert [tuned_settings(result["settings"]) for result in answer["results"]] == [TUNED, TUNED]
    assert answer["step"] == answer["steps"] == 6
    answer = post_json(server, "/v1/edits", body | {"count": 1, "steps": 2, "schedule": "karras"})
    assert tuned_settings(answer["results"][0]["settings"]) == TUNED | {"steps": 2, "schedule": "karras"}


def test_the_openai_interface_uses_the_cards_settings(server):
    answer = post_json(server, "/v1/images/edits", {"image": ENCODED, "prompt": "x", "model": "tuned"})
    picture = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))
    assert tuned_settings(picture.info["parameters"]) == TUNED


def test_the_a1111_interface_uses_the_cards_settings_but_its_own_cfg_scales(server):
    body = {"init_images": [ENCODED], "prompt": "x", "override_settings": {"sd_model_checkpoint": "tuned"}}
    info = json.loads(post_json(server, "/sdapi/v1/img2img", body)["info"])
    assert tuned_settings(info["infotexts"][0]) == TUNED | {"text_cfg": 7.0, "image_cfg": 1.0}
    assert (info["steps"], info["sampler_name"]) == (3, "Euler")


def test_the_card_endpoint_returns_the_cards_settings(server):
    answer = httpx.get(f"{server.url}/v1/card?model=tuned", trust_env=False).json()
    assert {name: answer["defaults"][name] for name in TUNED} == TUNED
    assert httpx.get(f"{server.url}/v1/card", trust_env=False).json()["defaults"]["steps"] == 20


def test_the_cards_steps_are_capped_at_the_servers_limit():
    with running(models={"tuned": tuned_editor}, steps=2) as limited:
        job = limited.service.submit(
            EditRequest(image=PICTURE, settings=EditSettings(instruction="x"), model="tuned"), client="a"
        )
        assert job.wait(60) and job.error is None
        assert parse_infotext(job.results[0].image.info["parameters"]).steps == 2
