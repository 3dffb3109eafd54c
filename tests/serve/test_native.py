"""The native interface, over HTTP."""

import base64
import io
import json

import httpx
import pytest
from PIL import Image
from running import running, until

from ip2p.pictures.images import to_bytes
from ip2p.pictures.infotext import parse_infotext
from ip2p.settings import SettingError


@pytest.fixture(scope="module")
def server():
    with running() as started:
        yield started


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
        yield client


@pytest.fixture(scope="module")
def png():
    return to_bytes(Image.linear_gradient("L").resize((64, 64)).convert("RGB"))


def opened(text):
    return Image.open(io.BytesIO(base64.b64decode(text)))


def events_of(response):
    name = None
    for line in response.iter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def test_a_form_request_returns_every_result_with_embedded_settings(http, png):
    answer = http.post(
        "/v1/edits",
        files={"image": ("a.png", png)},
        data={"instruction": "make it night", "steps": "2", "count": "2", "seed": "7", "text_cfg": "3"},
    )
    assert answer.status_code == 200
    record = answer.json()
    assert record["state"] == "done" and record["model"] == "fake"
    assert [result["seed"] for result in record["results"]] == [7, 8]
    for result in record["results"]:
        picture = opened(result["b64"])
        assert (picture.format, picture.size) == ("PNG", (64, 64))
        assert picture.info["parameters"] == result["settings"]
        settings = parse_infotext(result["settings"])
        assert (settings.instruction, settings.steps, settings.text_cfg) == ("make it night", 2, 3.0)
        assert "compositeWithTrainedAlgorithmicMedia" in str(picture.info["xmp"])


def test_json_and_form_requests_match_the_editor(http, server, png):
    body = {"instruction": "make it night", "steps": 2, "seed": 3, "size": "64x64", "image_cfg": 1.2}
    form = http.post("/v1/edits", files={"image": png}, data={name: str(v) for name, v in body.items()})
    for text in (base64.b64encode(png).decode(), "data:image/png;base64," + base64.b64encode(png).decode()):
        answer = http.post("/v1/edits", json={**body, "image": text})
        assert answer.json()["results"][0]["b64"] == form.json()["results"][0]["b64"]
    (alone,) = server.editor.edit(png, "make it night", seeds=[3], steps=2, size=(64, 64), image_cfg=1.2)
    edited = opened(form.json()["results"][0]["b64"])
    levels = [abs(a - b) for a, b in zip(alone.tobytes(), edited.tobytes(), strict=True)]
    assert max(levels) <= 1  # joined calls round sums differently


def test_an_image_accept_header_returns_the_file_itself(http, png):
    answer = http.post(
        "/v1/edits",
        headers={"Accept": "image/webp"},
        files={"image": png},
        data={"instruction": "x", "steps": "1", "format": "webp", "quality": "50"},
    )
    assert answer.headers["content-type"] == "image/webp"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert Image.open(io.BytesIO(answer.content)).format == "WEBP"


def test_black_mask_areas_stay_unchanged(http, png):
    mask = Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    answer = http.post(
        "/v1/edits", files={"image": png, "mask": to_bytes(mask)}, data={"instruction": "x", "steps": "2"}
    )
    after, before = opened(answer.json()["results"][0]["b64"]), Image.open(io.BytesIO(png))
    assert after.crop((0, 0, 32, 64)).tobytes() == before.crop((0, 0, 32, 64)).tobytes()
    assert after.tobytes() != before.tobytes()


def test_an_automatic_mask_is_returned_with_the_result(http, png):
    answer = http.post(
        "/v1/edits", files={"image": png}, data={"instruction": "x", "steps": "2", "auto_mask": "0.5"}
    )
    assert opened(answer.json()["results"][0]["mask"]).size == (64, 64)


def test_wait_false_returns_a_url_for_fetching_the_results(http, png):
    answer = http.post(
        "/v1/edits",
        files={"image": png},
        data={"instruction": "x", "steps": "2", "wait": "false", "format": "jpeg"},
    )
    assert answer.status_code == 202 and answer.headers["location"] == answer.json()["url"]
    url = answer.json()["url"]
    until(lambda: http.get(url).json()["state"] == "done")
    record = http.get(url).json()
    (result,) = record["results"]
    file = http.get(result["url"])
    assert (
        file.headers["content-type"] == "image/jpeg" and file.headers["x-content-type-options"] == "nosniff"
    )
    assert http.get(url).json()["results"] == record["results"]  # not written again
    assert http.get(f"{url}/results/0").content == file.content
    assert Image.open(io.BytesIO(http.get(f"{url}/results/0?format=png").content)).format == "PNG"
    missing = http.get(f"{url}/results/1")
    assert missing.status_code == 404 and "0 to 0" in missing.json()["error"]["message"]


def test_events_report_the_steps_in_order_and_end_with_the_results(http, png):
    with http.stream(
        "POST",
        "/v1/edits",
        headers={"Accept": "text/event-stream"},
        files={"image": png},
        data={"instruction": "x", "steps": "4", "count": "1"},
    ) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = list(events_of(answer))
    names = [name for name, _ in events]
    assert names[-1] == "done" and set(names) <= {"position", "step", "done"}
    steps = [record["step"] for name, record in events if name == "step"]
    assert steps == sorted(steps) and steps[-1] == 4
    assert opened(events[-1][1]["results"][0]["b64"]).size == (64, 64)


def test_previews_are_jpegs_of_the_result_in_progress():
    with running(seconds=0.05) as slow, httpx.Client(base_url=slow.url, timeout=60, trust_env=False) as http:
        body = {"instruction": "x", "steps": "10", "previews": "2", "stream": "true"}
        picture = to_bytes(Image.new("RGB", (64, 64), "red"))
        with http.stream("POST", "/v1/edits", files={"image": picture}, data=body) as answer:
            previews = [record for name, record in events_of(answer) if name == "preview"]
    assert previews and all(record["result"] == 0 for record in previews)
    assert opened(previews[0]["b64"]).format == "JPEG"


def test_events_requested_by_the_accept_header_include_previews():
    with running(seconds=0.05) as slow, httpx.Client(base_url=slow.url, timeout=60, trust_env=False) as http:
        body = {"instruction": "x", "steps": "10", "previews": "2"}
        with http.stream(
            *("POST", "/v1/edits"),
            headers={"Accept": "text/event-stream"},
            files={"image": to_bytes(Image.new("RGB", (64, 64), "red"))},
            data=body,
        ) as answer:
            assert "preview" in [name for name, _ in events_of(answer)]


def test_results_with_wait_false_outlive_their_eviction_from_memory(png):
    with running() as server, httpx.Client(base_url=server.url, timeout=60, trust_env=False) as http:
        server.service.jobs.shelf.size = 1
        body = {"instruction": "x", "steps": "1", "auto_mask": "0.5"}
        urls = []
        for _ in range(3):
            answer = http.post(
                "/v1/edits", files={"image": png}, data={**body, "wait": "false", "count": "2"}
            )
            urls.append(answer.json()["url"])
            until(lambda: http.get(urls[-1]).json()["state"] == "done")
        immediate = [http.post("/v1/edits", files={"image": png}, data=body).json()["id"] for _ in range(2)]
        for url in urls:
            results = http.get(url).json()["results"]
            assert [result["seed"] for result in results] == [0, 1]
            assert all(opened(result["mask"]).size == (64, 64) for result in results)
            assert all(Image.open(io.BytesIO(http.get(r["url"]).content)).size == (64, 64) for r in results)
            again = Image.open(io.BytesIO(http.get(f"{url}/results/1?format=png").content))
            assert again.info["parameters"] == results[1]["settings"] and "xmp" in again.info
        gone = http.get(f"/v1/edits/{immediate[0]}")
        assert gone.status_code == 410 and gone.json()["error"]["code"] == "gone"
        assert "to make room" in gone.json()["error"]["message"]
        assert http.get(f"/v1/edits/{immediate[1]}").status_code == 200  # the newest


def test_a_file_evicted_to_make_room_is_reported_as_gone(png):
    with running() as server, httpx.Client(base_url=server.url, timeout=60, trust_env=False) as http:
        body = {"instruction": "x", "steps": "1", "response": "url"}
        first = http.post("/v1/edits", files={"image": png}, data=body).json()
        server.service.store.shelf.size = server.service.store.shelf.bytes
        http.post("/v1/edits", files={"image": png}, data={**body, "format": "jpeg"})
        for url in (first["results"][0]["url"], f"/v1/edits/{first['id']}/results/0"):
            gone = http.get(url)
            assert gone.status_code == 410 and "to make room" in gone.json()["error"]["message"]


def test_an_image_accept_header_with_several_results_is_refused_before_any_work(server, http, png):
    before = server.service.stats().done
    for accept in ("image/png", "image/*"):
        answer = http.post(
            "/v1/edits",
            headers={"Accept": accept},
            files={"image": png},
            data={"instruction": "x", "steps": "1", "count": "2"},
        )
        assert answer.status_code == 422 and answer.json()["error"]["param"] == "count"
    assert server.service.stats().done == before


def test_a_failure_names_its_field_in_the_response_the_stream_and_the_job(png):
    def finish(picture):
        raise SettingError("seeds: no luck with these", field="seeds")

    with running() as server, httpx.Client(base_url=server.url, timeout=60, trust_env=False) as http:
        server.service.maker.finish_result = finish
        body = {"instruction": "x", "steps": "1"}
        expected = {
            **{"message": "seed: no luck with these", "type": "invalid_request_error"},
            **{"param": "seed", "code": "invalid_value"},
        }
        response = http.post("/v1/edits", files={"image": png}, data=body)
        assert response.status_code == 422 and response.json()["error"] == expected
        with http.stream(
            "POST", "/v1/edits", files={"image": png}, data={**body, "stream": "true"}
        ) as answer:
            name, record = list(events_of(answer))[-1]
        assert name == "failed" and record["error"] == expected
        url = http.post("/v1/edits", files={"image": png}, data={**body, "wait": "false"}).json()["url"]
        until(lambda: http.get(url).json()["state"] == "failed")
        assert http.get(url).json()["error"] == expected


def test_delete_stops_a_running_edit():
    with running(seconds=0.1) as slow, httpx.Client(base_url=slow.url, timeout=60, trust_env=False) as http:
        body = {"instruction": "x", "steps": "50", "wait": "false"}
        picture = to_bytes(Image.new("RGB", (64, 64), "red"))
        url = http.post("/v1/edits", files={"image": picture}, data=body).json()["url"]
        until(lambda: http.get(url).json()["state"] == "running")
        http.delete(url)
        until(lambda: http.get(url).json()["state"] == "cancelled", 3)
        refused = http.get(f"{url}/results/0")
        assert refused.status_code == 409 and "cancelled" in refused.json()["error"]["message"]


@pytest.mark.parametrize("stream", ["false", "true"])
def test_a_client_disconnect_cancels_the_edit(stream):
    with running(seconds=0.1) as slow, httpx.Client(base_url=slow.url, timeout=60, trust_env=False) as http:
        picture = to_bytes(Image.new("RGB", (64, 64), "red"))
        body = {"instruction": "x", "steps": "50", "stream": stream}
        # In either case, at most a first event arrives within this time.
        with (
            pytest.raises(httpx.ReadTimeout),
            http.stream("POST", "/v1/edits", files={"image": picture}, data=body, timeout=0.05) as answer,
        ):
            for _ in answer.iter_lines():
                pass
        until(lambda: slow.service.stats().cancelled == 1, 3)
        assert slow.service.stats().running == 0


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        ({"steps": "0"}, "steps", "1 to 50"),
        ({"steps": "1000000000"}, "steps", "1 to 50"),
        ({"steps": "1e9"}, "steps", "whole number"),
        ({"count": "5"}, "count", "1 to 4"),
        ({"count": "-1"}, "count", "1 to 4"),
        ({"seed": "-2"}, "seed", "0 to"),
        ({"text_cfg": "nan"}, "text_cfg", "0 to 100"),
        ({"image_cfg": "1e9"}, "image_cfg", "0 to 100"),
        ({"instruction": ""}, "instruction", "empty"),
        ({"instruction": "a" * 9000}, "instruction", "2,000"),
        ({"negative": "a" * 9000}, "negative", "2,000"),
        ({"sampler": "heun"}, "sampler", "euler_ancestral"),
        ({"schedule": "x"}, "schedule", "karras"),
        ({"spacing": "x"}, "schedule", "karras"),
        ({"fit": "x"}, "fit", "original"),
        ({"size": "9x9x9"}, "size", "576x384"),
        ({"size": "100000"}, "size", "4096"),
        ({"model": "../../etc/passwd"}, "model", "fake"),
        ({"auto_mask": "2"}, "auto_mask", "0 to 1"),
        ({"format": "svg"}, "format", "png"),
        ({"quality": "101"}, "quality", "100"),
        ({"stesp": "5"}, "stesp", "did you mean steps?"),
    ],
)
def test_an_error_names_the_field_and_the_limit(http, png, change, field, words):
    answer = http.post("/v1/edits", files={"image": png}, data={"instruction": "x", **change})
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert error["param"] == field and words in error["message"]


def test_picture_and_mask_errors_name_the_field_or_the_reason(http, png):
    without = http.post("/v1/edits", data={"instruction": "x"})
    assert (without.status_code, without.json()["error"]["param"]) == (422, "image")
    text = http.post("/v1/edits", json={"instruction": "x", "image": "not base64!"})
    assert "base64" in text.json()["error"]["message"]
    address = http.post("/v1/edits", json={"instruction": "x", "image": "http://127.0.0.1/a.png"})
    assert address.status_code == 422 and "does not download" in address.json()["error"]["message"]
    small = http.post(
        "/v1/edits",
        files={"image": png, "mask": to_bytes(Image.new("L", (32, 32), 255))},
        data={"instruction": "x"},
    )
    assert small.json()["error"]["param"] == "mask" and "32x32" in small.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/edits/none", "/v1/files/none", "/v1/models/none", "/v1/none"])
def test_unknown_resources_are_404_in_the_same_error_form(http, path):
    answer = http.get(path)
    assert answer.status_code == 404 and answer.json()["error"]["message"]


def test_malformed_and_unsupported_bodies_are_refused(http):
    for content, kind, status in (
        (b"[1, 2]", "application/json", 422),
        (b"{", "application/json", 422),
        (b"[" * 100_000, "application/json", 422),
        (b"x", "text/plain", 415),
        (b"x", "multipart/form-data", 422),
    ):
        answer = http.post("/v1/edits", content=content, headers={"Content-Type": kind})
        assert answer.status_code == status and answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("limits", "status", "kind"),
    [
        ({"per_client": 2}, 429, "rate_limit_error"),
        ({"queue": 1}, 503, "server_error"),
    ],
)
def test_a_full_server_sends_retry_after(png, limits, status, kind):
    with (
        running(seconds=0.2, join=1, **limits) as slow,
        httpx.Client(base_url=slow.url, timeout=60, trust_env=False) as http,
    ):
        body = {"instruction": "x", "steps": "50", "wait": "false"}
        assert http.post("/v1/edits", files={"image": png}, data=body).status_code == 202
        until(lambda: slow.service.stats().running == 1)
        assert http.post("/v1/edits", files={"image": png}, data=body).status_code == 202
        refused = http.post("/v1/edits", files={"image": png}, data=body)
        assert refused.status_code == status and int(refused.headers["retry-after"]) >= 1
        error = refused.json()["error"]
        assert error["type"] == kind and str(*limits.values()) in error["message"]


def test_metrics_are_prometheus_text(http, png):
    edited = http.post("/v1/edits", files={"image": png}, data={"instruction": "x", "steps": "1"})
    assert edited.status_code == 200
    answer = http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = [line for line in answer.text.splitlines() if not line.startswith("#")]
    numbers = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}
    assert numbers['ip2p_requests_total{outcome="done"}'] >= 1
    assert numbers['ip2p_request_seconds_bucket{le="+Inf"}'] == numbers["ip2p_request_seconds_count"]
    assert numbers["ip2p_joined_requests_count"] >= 1


def test_the_openapi_schema_has_the_edit_fields_and_the_docs_page_is_served(http):
    schema = http.get("/openapi.json").json()
    fields = schema["paths"]["/v1/edits"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert {"image", "instruction", "text_cfg", "auto_mask", "stream"} <= set(fields["properties"])
    assert http.get("/docs").status_code == 200
