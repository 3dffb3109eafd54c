"""The client of AUTOMATIC1111's interface edits pictures here."""

import base64
import gc
import json
import threading
import time
import weakref

import pytest
import requests
import webuiapi
from PIL import Image
from running import running, until

from ip2p.pictures.images import to_bytes
from ip2p.pictures.infotext import parse_infotext
from ip2p.serve.options import ServeConfig


@pytest.fixture(scope="module")
def server():
    with running() as one:
        yield one


@pytest.fixture(scope="module")
def api(server):
    one = webuiapi.WebUIApi(port=server.port, steps=2)
    one.session.trust_env = False
    return one


@pytest.fixture(scope="module")
def picture():
    return Image.linear_gradient("L").resize((64, 64)).convert("RGB")


def asked(server, picture, **more):
    body = {"init_images": [base64.b64encode(to_bytes(picture)).decode()], "prompt": "x", "steps": 1}
    with requests.Session() as session:
        session.trust_env = False
        return session.post(f"{server.url}/sdapi/v1/img2img", json={**body, **more})


def test_an_edit_by_its_client(api, picture):
    told = api.img2img(
        images=[picture],
        prompt="make it night",
        seed=7,
        cfg_scale=4.0,
        image_cfg_scale=1.25,
        width=96,
        height=64,
    )
    assert told.image.size == (96, 64)
    settings = parse_infotext(told.info["infotexts"][0])
    assert told.image.info["parameters"] == told.info["infotexts"][0]
    assert (settings.instruction, settings.seed, settings.steps) == ("make it night", 7, 2)
    assert (settings.text_cfg, settings.image_cfg, settings.sampler) == (4.0, 1.25, "euler_ancestral")
    assert told.info["all_seeds"] == [7] and told.parameters["cfg_scale"] == 4.0


def test_batches_count_their_seeds_up(api, picture):
    told = api.img2img(
        images=[picture], prompt="x", seed=3, batch_size=2, n_iter=2, steps=1, width=64, height=64
    )
    assert len(told.images) == 4 and told.info["all_seeds"] == [3, 4, 5, 6]


def test_left_out_fields_are_its_defaults(server, picture):
    told = asked(server, picture, n_iter=None).json()
    info = json.loads(told["info"])
    settings = parse_infotext(info["infotexts"][0])
    assert (settings.text_cfg, settings.image_cfg) == (7.0, 1.0)  # a null image CFG is 1
    assert info["seed"] >= 0 and (info["width"], info["height"]) == (64, 64)


def test_unknown_fields_are_ignored(server, picture):
    assert asked(server, picture, denoising_strength=0.3, styles=["a"], firstphase_width=1).status_code == 200


@pytest.mark.parametrize(
    ("sampler", "scheduler", "ours"),
    [
        ("Euler a", "automatic", ("euler_ancestral", "linspace")),
        ("DPM++ 2M", "Karras", ("dpmpp_2m", "karras")),
        ("DPM++ 2M Karras", None, ("dpmpp_2m", "karras")),
        ("Euler", "karras", ("euler", "karras")),
        ("Euler", "SGM Uniform", ("euler", "trailing")),
        ("Euler", "sgm_uniform", ("euler", "trailing")),
        ("Euler", "Uniform", ("euler", "linspace")),
        (None, None, ("euler_ancestral", "linspace")),
    ],
)
def test_samplers_go_by_their_names_there(server, picture, sampler, scheduler, ours):
    told = asked(server, picture, sampler_name=sampler, scheduler=scheduler, seed=1).json()
    settings = parse_infotext(json.loads(told["info"])["infotexts"][0])
    assert (settings.sampler, settings.schedule) == ours


@pytest.mark.parametrize("invert", [0, 1])
def test_a_mask_is_edited_where_it_is_white_or_inverted_black(api, picture, invert):
    mask = Image.new("L", (64, 64), 255 if invert else 0)
    mask.paste(0 if invert else 255, (32, 0, 64, 64))
    told = api.img2img(
        images=[picture],
        prompt="x",
        mask_image=mask,
        mask_blur=2,
        inpainting_mask_invert=invert,
        inpaint_full_res=False,
        width=64,
        height=64,
    )
    left = (0, 0, 32, 64)
    assert told.image.crop(left).tobytes() == picture.crop(left).tobytes()
    assert told.image.tobytes() != picture.tobytes()


def test_a_mask_of_another_size_is_scaled(api, picture):
    mask = Image.new("L", (32, 32))
    mask.paste(255, (16, 0, 32, 32))
    told = api.img2img(images=[picture], prompt="x", mask_image=mask, width=64, height=64)
    left = (0, 0, 32, 64)
    assert told.image.crop(left).tobytes() == picture.crop(left).tobytes()


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_resize_modes_give_the_size_asked_for(server, picture, mode):
    told = asked(server, picture, width=128, height=64, resize_mode=mode).json()
    info = json.loads(told["info"])
    assert (info["width"], info["height"]) == (128, 64)


def test_the_lists_are_what_its_client_reads(api):
    assert api.util_get_model_names() == ["fake"] and api.util_get_current_model() == "fake"
    assert api.util_get_sampler_names() == ["DPM++ 2M", "Euler", "Euler a", "LCM", "TCD"]
    assert api.util_get_scheduler_names() == ["automatic", "karras", "lcm", "sgm_uniform"]
    assert api.get_scripts() == {"txt2img": [], "img2img": []}
    api.util_set_model("fake")
    assert api.get_options()["sd_model_checkpoint"] == "fake"
    assert "names none of the models" in json.dumps(api.set_options({"sd_model_checkpoint": "../other"}))


def test_progress_is_told_and_an_interrupt_stops_within_a_step(picture):
    with running(seconds=0.1) as slow:
        api = webuiapi.WebUIApi(port=slow.port)
        api.session.trust_env = False
        assert api.get_progress()["state"]["job_count"] == 0
        told = []
        thread = threading.Thread(
            target=lambda: told.append(
                api.img2img(images=[picture], prompt="x", steps=50, width=64, height=64)
            )
        )
        thread.start()
        until(lambda: api.get_progress()["state"]["sampling_step"] > 1)
        now = api.get_progress()
        assert 0 < now["progress"] < 1 and now["eta_relative"] > 0 and now["state"]["sampling_steps"] == 50
        api.interrupt()
        thread.join(3)
        assert not thread.is_alive()
        assert told[0].images == [] and told[0].info["interrupted"]
        assert api.get_progress()["progress"] == 0


def test_an_interrupt_gives_what_was_finished(picture):
    with running(seconds=0.03, join=1) as slow:
        told = []
        thread = threading.Thread(target=lambda: told.append(asked(slow, picture, steps=10, n_iter=4)))
        thread.start()
        until(lambda: any(len(job.results) == 2 for job in list(slow.service.queue.running.values())))
        requests.post(f"{slow.url}/sdapi/v1/interrupt", proxies={"http": None})
        thread.join(30)
        info = json.loads(told[0].json()["info"])
        assert told[0].status_code == 200 and info["interrupted"]
        assert len(told[0].json()["images"]) == len(info["infotexts"]) in (2, 3)


def test_the_newest_edit_is_forgotten_with_its_time(picture):
    jobs = []
    with running(ServeConfig(max_steps=50, keep_seconds=1)) as server:
        submit = server.service.submit

        def noted(*request, **more):
            job = submit(*request, **more)
            jobs.append(weakref.ref(job))
            return job

        server.service.submit = noted
        assert asked(server, picture).status_code == 200
        assert jobs[0]() is not None
        time.sleep(1.1)
        with requests.Session() as session:
            session.trust_env = False
            assert session.get(f"{server.url}/sdapi/v1/progress").json()["state"]["job_count"] == 0
        until(lambda: gc.collect() is not None and jobs[0]() is None)


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        ({"steps": 10**9}, "steps", "1 to 50"),
        ({"batch_size": 99}, "batch_size", "1 to 4"),
        ({"batch_size": 3, "n_iter": 2}, "batch_size", "n_iter times batch_size is 2 times 3"),
        ({"cfg_scale": -1}, "cfg_scale", "0 to 100"),
        ({"image_cfg_scale": 1e9}, "image_cfg_scale", "0 to 100"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"sampler_name": "Heun"}, "sampler_name", "Euler a"),
        ({"scheduler": "x"}, "scheduler", "Karras"),
        ({"width": 9, "height": 9}, "width", "16 to 4096"),
        ({"init_images": []}, "init_images", "0 pictures"),
        ({"init_images": ["a", "b"]}, "init_images", "2 pictures"),
        ({"init_images": ["!"]}, "init_images", "base64"),
        ({"alwayson_scripts": {"ControlNet": {"args": []}}}, "alwayson_scripts", "ControlNet"),
        ({"script_name": "outpainting"}, "script_name", "outpainting"),
        ({"override_settings": {"sd_model_checkpoint": "x"}}, "sd_model_checkpoint", "fake"),
    ],
)
def test_an_error_is_what_its_clients_know(server, picture, change, field, words):
    answer = asked(server, picture, **change)
    assert answer.status_code == 422
    told = answer.json()
    (detail,) = told["detail"]
    assert detail["loc"] == ["body", field] and words in detail["msg"] and field in detail["msg"]
    assert told["errors"] == detail["msg"]


def test_what_is_not_served_is_404_in_its_form(server):
    with requests.Session() as session:
        session.trust_env = False
        answer = session.post(f"{server.url}/sdapi/v1/txt2img", json={})
    assert answer.status_code == 404 and "/docs" in answer.json()["detail"]
