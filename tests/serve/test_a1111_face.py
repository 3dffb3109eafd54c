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


def post(server, name, body):
    with requests.Session() as session:
        session.trust_env = False
        return session.post(f"{server.url}/sdapi/v1/{name}", json=body)


def asked(server, picture, **more):
    body = {"init_images": [base64.b64encode(to_bytes(picture)).decode()], "prompt": "x", "steps": 1}
    return post(server, "img2img", {**body, **more})


def test_an_edit_by_its_client(api, picture):
    made = api.img2img(
        images=[picture],
        prompt="make it night",
        seed=7,
        cfg_scale=4.0,
        image_cfg_scale=1.25,
        width=96,
        height=64,
    )
    assert made.image.size == (96, 64)
    settings = parse_infotext(made.info["infotexts"][0])
    assert made.image.info["parameters"] == made.info["infotexts"][0]
    assert (settings.instruction, settings.seed, settings.steps) == ("make it night", 7, 2)
    assert (settings.text_cfg, settings.image_cfg, settings.sampler) == (4.0, 1.25, "euler_ancestral")
    assert made.info["all_seeds"] == [7] and made.parameters["cfg_scale"] == 4.0


def test_batches_count_their_seeds_up(api, picture):
    made = api.img2img(
        images=[picture], prompt="x", seed=3, batch_size=2, n_iter=2, steps=1, width=64, height=64
    )
    assert len(made.images) == 4 and made.info["all_seeds"] == [3, 4, 5, 6]


def test_left_out_fields_are_its_defaults(server, picture):
    made = asked(server, picture, n_iter=None).json()
    info = json.loads(made["info"])
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
def test_ignored_fields_that_would_change_the_picture_are_named(server, picture, ignored, named):
    assert f"These fields have no effect here: {named}." in warnings_of(asked(server, picture, **ignored))


def test_ignored_fields_that_change_nothing_are_not_named(server, picture):
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
    assert "no effect" not in warnings_of(asked(server, picture, **neutral))


def test_its_client_reads_which_fields_had_no_effect(api, picture):
    made = api.img2img(images=[picture], prompt="x", tiling=True, width=64, height=64)
    (warning,) = [text for text in made.info["warnings"] if "no effect" in text]
    assert warning == "These fields have no effect here: denoising_strength, tiling."
    assert "denoising_strength" not in made.parameters


def test_the_region_under_a_mask_cannot_be_filled_first(api, picture):
    mask = Image.new("L", (64, 64), 255)
    for fill, named in ((0, True), (1, False)):
        made = api.img2img(
            images=[picture], prompt="x", mask_image=mask, inpainting_fill=fill, width=64, height=64
        )
        assert ("inpainting_fill" in str(made.info["warnings"])) is named


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
def test_an_empty_or_disabled_always_on_script_is_no_error(server, picture, scripts):
    assert asked(server, picture, alwayson_scripts=scripts, script_name="None").status_code == 200


def test_url_safe_base64_is_read(server):
    # Noise, so that both characters are in it.
    noise = to_bytes(Image.effect_noise((64, 64), 100).convert("RGB"))
    coded = base64.urlsafe_b64encode(noise).decode().rstrip("=")
    assert "-" in coded and "_" in coded
    body = {"init_images": [coded], "prompt": "x", "steps": 1}
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
def test_samplers_go_by_their_names_there(server, picture, sampler, scheduler, ours):
    made = asked(server, picture, sampler_name=sampler, scheduler=scheduler, seed=1).json()
    info = json.loads(made["info"])
    settings = parse_infotext(info["infotexts"][0])
    assert (settings.sampler, settings.schedule) == ours
    # What is reported means the same when it is sent again.
    again = {
        "sampler_name": info["sampler_name"],
        "scheduler": info["extra_generation_params"]["Schedule type"],
    }
    info = json.loads(asked(server, picture, seed=1, **again).json()["info"])
    assert parse_infotext(info["infotexts"][0]) == settings


@pytest.mark.parametrize("invert", [0, 1])
def test_a_mask_is_edited_where_it_is_white_or_inverted_black(api, picture, invert):
    mask = Image.new("L", (64, 64), 255 if invert else 0)
    mask.paste(0 if invert else 255, (32, 0, 64, 64))
    made = api.img2img(
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
    assert made.image.crop(left).tobytes() == picture.crop(left).tobytes()
    assert made.image.tobytes() != picture.tobytes()


def test_a_mask_of_another_size_is_scaled(api, picture):
    mask = Image.new("L", (32, 32))
    mask.paste(255, (16, 0, 32, 32))
    made = api.img2img(images=[picture], prompt="x", mask_image=mask, width=64, height=64)
    left = (0, 0, 32, 64)
    assert made.image.crop(left).tobytes() == picture.crop(left).tobytes()


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_resize_modes_give_the_size_asked_for(server, picture, mode):
    made = asked(server, picture, width=128, height=64, resize_mode=mode).json()
    info = json.loads(made["info"])
    assert (info["width"], info["height"]) == (128, 64)


def test_the_lists_are_what_its_client_reads(api):
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


def test_what_clients_list_at_start_answers(api):
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


def test_memory_is_that_of_the_machine(api):
    memory = api.get_memory()
    with open("/proc/meminfo") as file:
        total = int(file.readline().split()[1]) * 1024
    ram = memory["ram"]
    assert ram["total"] == pytest.approx(total, rel=0.01) and 0 < ram["free"] < ram["total"]
    assert ram["free"] + ram["used"] == ram["total"] and set(memory["cuda"]) & {"error", "system"}


def test_png_info_reads_what_we_wrote(api, picture):
    made = api.img2img(images=[picture], prompt="make it night", seed=7, width=64, height=64)
    found = api.png_info(made.image)
    assert found.info == made.info["infotexts"][0]
    assert found.parameters["Prompt"] == "make it night" and found.parameters["Seed"] == "7"
    assert found.parameters["Sampler"] == "Euler a"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_png_info_reads_every_format(server, picture, kind):
    image = picture.copy()
    image.info["parameters"] = 'a dog, "sitting"\nNegative prompt: cat\nSteps: 3, Model: "a, \\ud800b"'
    coded = base64.b64encode(to_bytes(image, kind)).decode()
    found = post(server, "png-info", {"image": coded}).json()
    assert found["info"] == image.info["parameters"]
    assert found["parameters"] == {
        "Prompt": 'a dog, "sitting"',
        "Negative prompt": "cat",
        "Steps": "3",
        "Model": "a, ?b",
    }


def test_png_info_of_a_plain_picture_is_empty_and_of_no_picture_an_error(server, api, picture):
    found = api.png_info(picture)
    assert (found.info, found.parameters) == ("", {})
    answer = post(server, "png-info", {"image": base64.b64encode(b"<svg></svg>").decode()})
    assert answer.status_code == 422 and "PNG, JPEG or WebP" in answer.json()["errors"]


def test_options_without_an_effect_are_named(api):
    assert api.set_options({"sd_model_checkpoint": "fake", "sd_vae": "Automatic"}) == {}
    assert "CLIP_stop_at_last_layers" in str(api.set_options({"CLIP_stop_at_last_layers": 2}))


def test_progress_is_made_and_an_interrupt_stops_within_a_step(picture):
    with running(seconds=0.1) as slow:
        api = webuiapi.WebUIApi(port=slow.port)
        api.session.trust_env = False
        assert api.get_progress()["state"]["job_count"] == 0
        made = []
        thread = threading.Thread(
            target=lambda: made.append(
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
        assert made[0].images == [] and made[0].info["interrupted"]
        assert api.get_progress()["progress"] == 0


@pytest.mark.parametrize("stop", ["interrupt", "skip"])
def test_an_interrupt_gives_what_was_finished(picture, stop):
    with running(seconds=0.03, join=1) as slow:
        made = []
        thread = threading.Thread(target=lambda: made.append(asked(slow, picture, steps=10, n_iter=4)))
        thread.start()
        until(lambda: any(len(job.results) == 2 for job in list(slow.service.queue.running.values())))
        post(slow, stop, {})
        thread.join(30)
        info = json.loads(made[0].json()["info"])
        assert made[0].status_code == 200 and info["interrupted"]
        assert len(made[0].json()["images"]) == len(info["infotexts"]) in (2, 3)


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
        ({"alwayson_scripts": {"ControlNet": {"args": [{"model": "x"}]}}}, "alwayson_scripts", "ControlNet"),
        ({"alwayson_scripts": {"ADetailer": {"args": [True, {}]}}}, "alwayson_scripts", "ADetailer"),
        ({"script_name": "outpainting"}, "script_name", "outpainting"),
        ({"override_settings": {"sd_model_checkpoint": "x"}}, "sd_model_checkpoint", "fake"),
    ],
)
def test_an_error_is_what_its_clients_know(server, picture, change, field, words):
    answer = asked(server, picture, **change)
    assert answer.status_code == 422
    made = answer.json()
    (detail,) = made["detail"]
    assert detail["loc"] == ["body", field] and words in detail["msg"] and field in detail["msg"]
    assert made["errors"] == detail["msg"]


def test_what_is_not_served_is_404_in_its_form(server):
    with requests.Session() as session:
        session.trust_env = False
        answer = session.post(f"{server.url}/sdapi/v1/txt2img", json={})
    assert answer.status_code == 404 and "/docs" in answer.json()["detail"]
