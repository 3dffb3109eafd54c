"""AUTOMATIC1111's interface, called by its Python client webuiapi."""

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
    with running() as started:
        yield started


@pytest.fixture(scope="module")
def api(server):
    client = webuiapi.WebUIApi(port=server.port, steps=2)
    client.session.trust_env = False
    return client


@pytest.fixture(scope="module")
def picture():
    return Image.linear_gradient("L").resize((64, 64)).convert("RGB")


def post(server, name, body):
    with requests.Session() as session:
        session.trust_env = False
        return session.post(f"{server.url}/sdapi/v1/{name}", json=body)


def post_edit(server, picture, **more):
    body = {"init_images": [base64.b64encode(to_bytes(picture)).decode()], "prompt": "x", "steps": 1}
    return post(server, "img2img", {**body, **more})


def test_webuiapi_edits_a_picture(api, picture):
    result = api.img2img(
        images=[picture],
        prompt="make it night",
        seed=7,
        cfg_scale=4.0,
        image_cfg_scale=1.25,
        width=96,
        height=64,
    )
    assert result.image.size == (96, 64)
    settings = parse_infotext(result.info["infotexts"][0])
    assert result.image.info["parameters"] == result.info["infotexts"][0]
    assert (settings.instruction, settings.seed, settings.steps) == ("make it night", 7, 2)
    assert (settings.text_cfg, settings.image_cfg, settings.sampler) == (4.0, 1.25, "euler_ancestral")
    assert result.info["all_seeds"] == [7] and result.parameters["cfg_scale"] == 4.0


def test_seeds_increase_by_one_across_batches(api, picture):
    result = api.img2img(
        images=[picture], prompt="x", seed=3, batch_size=2, n_iter=2, steps=1, width=64, height=64
    )
    assert len(result.images) == 4 and result.info["all_seeds"] == [3, 4, 5, 6]


def test_missing_fields_get_a1111s_defaults(server, picture):
    response = post_edit(server, picture, n_iter=None).json()
    info = json.loads(response["info"])
    settings = parse_infotext(info["infotexts"][0])
    assert (settings.text_cfg, settings.image_cfg) == (7.0, 1.0)  # a null image CFG is 1
    assert info["seed"] >= 0 and (info["width"], info["height"]) == (64, 64)


def warnings_of(answer):
    assert answer.status_code == 200, answer.text
    return " ".join(json.loads(answer.json()["info"])["warnings"])


@pytest.mark.parametrize(
    ("ignored", "named"),
    [
        ({"denoising_strength": 0.3}, "denoising_strength"),
        ({"styles": ["a"], "restore_faces": True}, "styles, restore_faces"),
        ({"subseed": 7, "subseed_strength": 0.5}, "subseed_strength"),
        ({"a_new_field": "x" * 99}, "a_new_field"),
        ({"override_settings": {"CLIP_stop_at_last_layers": 2}}, "CLIP_stop_at_last_layers"),
        ({"infotext": "x"}, "infotext"),
    ],
)
def test_ignored_fields_that_would_change_the_picture_are_reported(server, picture, ignored, named):
    assert f"These fields have no effect here: {named}." in warnings_of(post_edit(server, picture, **ignored))


def test_ignored_fields_that_change_nothing_are_not_reported(server, picture):
    neutral = {
        "denoising_strength": 1.0,
        "styles": [],
        "subseed": 7,
        "subseed_strength": 0,
        "seed_resize_from_h": -1,
        "eta": None,
        "inpainting_fill": 0,  # there is no mask
        "do_not_save_samples": True,
        "override_settings": {"CLIP_stop_at_last_layers": 1, "sd_vae": "Automatic"},
    }
    assert "no effect" not in warnings_of(post_edit(server, picture, **neutral))


def test_webuiapi_receives_the_warning_about_ignored_fields(api, picture):
    result = api.img2img(images=[picture], prompt="x", tiling=True, width=64, height=64)
    (warning,) = [text for text in result.info["warnings"] if "no effect" in text]
    assert warning == "These fields have no effect here: denoising_strength, tiling."
    assert "denoising_strength" not in result.parameters


def test_an_unsupported_inpainting_fill_is_reported(api, picture):
    mask = Image.new("L", (64, 64), 255)
    for fill, named in ((0, True), (1, False)):
        result = api.img2img(
            images=[picture], prompt="x", mask_image=mask, inpainting_fill=fill, width=64, height=64
        )
        assert ("inpainting_fill" in str(result.info["warnings"])) is named


@pytest.mark.parametrize(
    "scripts",
    [
        {},
        {"ControlNet": {"args": []}},
        {"ControlNet": {}},
        {"ControlNet": {"args": [{"enabled": False, "model": "x"}]}},
        {"ADetailer": {"args": [False]}},
        {"ADetailer": {"args": [False, {"ad_model": "x"}]}, "x": None},
    ],
)
def test_empty_or_disabled_always_on_scripts_are_accepted(server, picture, scripts):
    assert post_edit(server, picture, alwayson_scripts=scripts, script_name="None").status_code == 200


def test_url_safe_base64_is_decoded(server):
    # Noise, so that the encoding has both characters.
    noise = to_bytes(Image.effect_noise((64, 64), 100).convert("RGB"))
    encoded = base64.urlsafe_b64encode(noise).decode().rstrip("=")
    assert "-" in encoded and "_" in encoded
    body = {"init_images": [encoded], "prompt": "x", "steps": 1}
    answer = post(server, "img2img", body)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("sampler", "scheduler", "ours"),
    [
        ("Euler a", "automatic", ("euler_ancestral", "linspace")),
        ("DPM++ 2M", "Automatic", ("dpmpp_2m", "karras")),
        ("DPM++ 2M", None, ("dpmpp_2m", "karras")),
        ("DPM++ 2M", "Uniform", ("dpmpp_2m", "linspace")),
        ("DPM++ 2M", "exponential", ("dpmpp_2m", "exponential")),
        ("k_euler_a", "Exponential", ("euler_ancestral", "exponential")),
        ("DPM++ 2M", "Karras", ("dpmpp_2m", "karras")),
        ("DPM++ 2M Karras", None, ("dpmpp_2m", "karras")),
        ("Euler", "karras", ("euler", "karras")),
        ("Euler", "SGM Uniform", ("euler", "trailing")),
        ("Euler", "sgm_uniform", ("euler", "trailing")),
        ("Euler", "Uniform", ("euler", "linspace")),
        (None, None, ("euler_ancestral", "linspace")),
    ],
)
def test_a1111s_sampler_and_scheduler_names_map_to_ours_and_round_trip(
    server, picture, sampler, scheduler, ours
):
    response = post_edit(server, picture, sampler_name=sampler, scheduler=scheduler, seed=1).json()
    info = json.loads(response["info"])
    settings = parse_infotext(info["infotexts"][0])
    assert (settings.sampler, settings.schedule) == ours
    # Sending the reported names again gives the same settings.
    again = {
        "sampler_name": info["sampler_name"],
        "scheduler": info["extra_generation_params"]["Schedule type"],
    }
    info = json.loads(post_edit(server, picture, seed=1, **again).json()["info"])
    assert parse_infotext(info["infotexts"][0]) == settings


@pytest.mark.parametrize("invert", [0, 1])
def test_white_mask_areas_are_edited_or_black_ones_if_inverted(api, picture, invert):
    mask = Image.new("L", (64, 64), 255 if invert else 0)
    mask.paste(0 if invert else 255, (32, 0, 64, 64))
    result = api.img2img(
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
    assert result.image.crop(left).tobytes() == picture.crop(left).tobytes()
    assert result.image.tobytes() != picture.tobytes()


def test_a_mask_of_another_size_is_scaled(api, picture):
    mask = Image.new("L", (32, 32))
    mask.paste(255, (16, 0, 32, 32))
    result = api.img2img(images=[picture], prompt="x", mask_image=mask, width=64, height=64)
    left = (0, 0, 32, 64)
    assert result.image.crop(left).tobytes() == picture.crop(left).tobytes()


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_resize_modes_give_the_requested_size(server, picture, mode):
    response = post_edit(server, picture, width=128, height=64, resize_mode=mode).json()
    info = json.loads(response["info"])
    assert (info["width"], info["height"]) == (128, 64)


def test_webuiapi_reads_the_models_samplers_and_schedulers(api):
    assert api.util_get_model_names() == ["fake"] and api.util_get_current_model() == "fake"
    assert api.util_get_sampler_names() == ["DPM++ 2M", "Euler", "Euler a", "LCM", "TCD"]
    assert api.util_get_scheduler_names() == [
        "automatic",
        "exponential",
        "karras",
        "lcm",
        "sgm_uniform",
        "uniform",
    ]
    assert api.get_scripts() == {"txt2img": [], "img2img": []}
    api.util_set_model("fake")
    assert api.get_options()["sd_model_checkpoint"] == "fake"
    assert "is not an available model" in json.dumps(api.set_options({"sd_model_checkpoint": "../other"}))


def test_endpoints_that_clients_query_at_startup_answer(api):
    assert [each["name"] for each in api.get_upscalers()] == ["None"]
    for empty in (
        api.get_loras(),
        api.get_sd_vae(),
        api.get_prompt_styles(),
        api.get_latent_upscale_modes(),
        api.get_hypernetworks(),
        api.get_face_restorers(),
        api.get_realesrgan_models(),
    ):
        assert empty == []
    assert api.get_embeddings() == {"loaded": {}, "skipped": {}}
    assert api.get_cmd_flags() == {"api": True}
    assert api.refresh_checkpoints() == {}
    assert api.custom_get("sdapi/v1/script-info") == api.custom_get("sdapi/v1/extensions") == []


def test_the_memory_endpoint_reports_the_machines_memory(api):
    memory = api.get_memory()
    with open("/proc/meminfo") as file:
        total = int(file.readline().split()[1]) * 1024
    ram = memory["ram"]
    assert ram["total"] == pytest.approx(total, rel=0.01) and 0 < ram["free"] < ram["total"]
    assert ram["free"] + ram["used"] == ram["total"] and set(memory["cuda"]) & {"error", "system"}


def test_png_info_reads_the_infotext_of_an_edit(api, picture):
    result = api.img2img(images=[picture], prompt="make it night", seed=7, width=64, height=64)
    found = api.png_info(result.image)
    assert found.info == result.info["infotexts"][0]
    assert found.parameters["Prompt"] == "make it night" and found.parameters["Seed"] == "7"
    assert found.parameters["Sampler"] == "Euler a"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_png_info_reads_every_format(server, picture, kind):
    image = picture.copy()
    image.info["parameters"] = 'a dog, "sitting"\nNegative prompt: cat\nSteps: 3, Model: "a, \\ud800b"'
    encoded = base64.b64encode(to_bytes(image, kind)).decode()
    found = post(server, "png-info", {"image": encoded}).json()
    assert found["info"] == image.info["parameters"]
    assert found["parameters"] == {
        "Prompt": 'a dog, "sitting"',
        "Negative prompt": "cat",
        "Steps": "3",
        "Model": "a, ?b",
    }


def test_png_info_is_empty_without_metadata_and_refuses_a_non_picture(server, api, picture):
    found = api.png_info(picture)
    assert (found.info, found.parameters) == ("", {})
    answer = post(server, "png-info", {"image": base64.b64encode(b"<svg></svg>").decode()})
    assert answer.status_code == 422 and "PNG, JPEG or WebP" in answer.json()["errors"]


def test_options_without_effect_are_reported(api):
    assert api.set_options({"sd_model_checkpoint": "fake", "sd_vae": "Automatic"}) == {}
    assert "CLIP_stop_at_last_layers" in str(api.set_options({"CLIP_stop_at_last_layers": 2}))


def test_progress_is_reported_and_an_interrupt_stops_the_edit_early(picture):
    with running(seconds=0.1) as slow:
        api = webuiapi.WebUIApi(port=slow.port)
        api.session.trust_env = False
        assert api.get_progress()["state"]["job_count"] == 0
        results = []
        thread = threading.Thread(
            target=lambda: results.append(
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
        assert results[0].images == [] and results[0].info["interrupted"]
        assert api.get_progress()["progress"] == 0


@pytest.mark.parametrize("stop", ["interrupt", "skip"])
def test_interrupt_and_skip_return_the_finished_images(picture, stop):
    with running(seconds=0.03, join=1) as slow:
        responses = []
        thread = threading.Thread(
            target=lambda: responses.append(post_edit(slow, picture, steps=10, n_iter=4))
        )
        thread.start()
        until(lambda: any(len(job.results) == 2 for job in list(slow.service.queue.running.values())))
        post(slow, stop, {})
        thread.join(30)
        info = json.loads(responses[0].json()["info"])
        assert responses[0].status_code == 200 and info["interrupted"]
        assert len(responses[0].json()["images"]) == len(info["infotexts"]) in (2, 3)


def test_the_newest_edit_is_released_when_its_retention_time_ends(picture):
    jobs = []
    with running(ServeConfig(max_steps=50, keep_seconds=1)) as server:
        submit = server.service.submit

        def recorded_submit(*request, **more):
            job = submit(*request, **more)
            jobs.append(weakref.ref(job))
            return job

        server.service.submit = recorded_submit
        assert post_edit(server, picture).status_code == 200
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
        ({"alwayson_scripts": {"ControlNet": {"args": [{"model": "x"}]}}}, "alwayson_scripts", "ControlNet"),
        ({"alwayson_scripts": {"ADetailer": {"args": [True, {}]}}}, "alwayson_scripts", "ADetailer"),
        ({"script_name": "outpainting"}, "script_name", "outpainting"),
        ({"override_settings": {"sd_model_checkpoint": "x"}}, "sd_model_checkpoint", "fake"),
    ],
)
def test_errors_have_the_form_that_a1111_clients_expect(server, picture, change, field, words):
    answer = post_edit(server, picture, **change)
    assert answer.status_code == 422
    body = answer.json()
    (detail,) = body["detail"]
    assert detail["loc"] == ["body", field] and words in detail["msg"] and field in detail["msg"]
    assert body["errors"] == detail["msg"]


def test_an_unsupported_endpoint_is_404_in_a1111s_error_form(server):
    with requests.Session() as session:
        session.trust_env = False
        answer = session.post(f"{server.url}/sdapi/v1/txt2img", json={})
    assert answer.status_code == 404 and "/docs" in answer.json()["detail"]
