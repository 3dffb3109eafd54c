"""A request that leaves settings open gets those of the model's card, whatever it comes through."""

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
    with running(models={"tuned": tuned_editor}) as one:
        yield one


def sent(server, path: str, body: dict) -> dict:
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as http:
        answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def taken(settings: str) -> dict:
    found = parse_infotext(settings)
    return {name: getattr(found, name) for name in TUNED}


def test_our_own_interface(server):
    body = {"image": ENCODED, "instruction": "make it night", "model": "tuned", "count": 2}
    answer = sent(server, "/v1/edits", body)
    assert [taken(result["settings"]) for result in answer["results"]] == [TUNED, TUNED]
    assert answer["step"] == answer["steps"] == 6
    answer = sent(server, "/v1/edits", body | {"count": 1, "steps": 2, "schedule": "karras"})
    assert taken(answer["results"][0]["settings"]) == TUNED | {"steps": 2, "schedule": "karras"}


def test_openai(server):
    answer = sent(server, "/v1/images/edits", {"image": ENCODED, "prompt": "x", "model": "tuned"})
    picture = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))
    assert taken(picture.info["parameters"]) == TUNED


def test_a1111_with_its_own_scales(server):
    body = {"init_images": [ENCODED], "prompt": "x", "override_settings": {"sd_model_checkpoint": "tuned"}}
    info = json.loads(sent(server, "/sdapi/v1/img2img", body)["info"])
    assert taken(info["infotexts"][0]) == TUNED | {"text_cfg": 7.0, "image_cfg": 1.0}
    assert (info["steps"], info["sampler_name"]) == (3, "Euler")


def test_the_card_publishes_them(server):
    answer = httpx.get(f"{server.url}/v1/card?model=tuned", trust_env=False).json()
    assert {name: answer["defaults"][name] for name in TUNED} == TUNED
    assert httpx.get(f"{server.url}/v1/card", trust_env=False).json()["defaults"]["steps"] == 20


def test_steps_of_the_card_stay_below_the_servers_limit():
    with running(models={"tuned": tuned_editor}, steps=2) as one:
        job = one.service.submit(
            EditRequest(image=PICTURE, settings=EditSettings(instruction="x"), model="tuned"), client="a"
        )
        assert job.wait(60) and job.error is None
        assert parse_infotext(job.results[0].image.info["parameters"]).steps == 2
