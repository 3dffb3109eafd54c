"""The OpenAI interface, called by OpenAI's own client."""

import base64
import io

import httpx
import openai
import pytest
from PIL import Image
from running import running, until

from ip2p.pictures.images import to_bytes
from ip2p.pictures.infotext import parse_infotext


@pytest.fixture(scope="module")
def server():
    with running(seconds=0.02) as started:
        yield started


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(
        api_key="none", base_url=f"{server.url}/v1", max_retries=0, http_client=openai_http_client()
    ) as openai_client:
        yield openai_client


def openai_http_client():
    return openai.DefaultHttpxClient(trust_env=False)


@pytest.fixture(scope="module")
def png():
    return to_bytes(Image.linear_gradient("L").resize((64, 64)).convert("RGB"))


def data_url(png):
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def post(client, **body):
    """An edit with a JSON body, which `images.edit` does not send."""
    return client.post(
        "/images/edits",
        body={"prompt": "make it night", "num_inference_steps": 2, "seed": 7, **body},
        cast_to=openai.types.ImagesResponse,
    )


def opened(image):
    return Image.open(io.BytesIO(base64.b64decode(image.b64_json)))


def test_the_openai_client_edits_a_picture(client, png):
    response = client.images.edit(
        image=png, prompt="make it night", extra_body={"seed": 7, "num_inference_steps": 2}
    )
    (image,) = response.data
    assert opened(image).size == (64, 64) and response.size == "64x64" and response.output_format == "png"
    settings = parse_infotext(opened(image).info["parameters"])
    assert (settings.instruction, settings.seed, settings.steps) == ("make it night", 7, 2)


def test_extra_body_fields_set_the_models_settings(client, png):
    extra = {
        "seed": 1,
        "num_inference_steps": 3,
        "guidance_scale": 4.5,
        "image_guidance_scale": 1.25,
        "negative_prompt": "blurry",
    }
    response = client.images.edit(image=png, prompt="x", model="fake", extra_body=extra, user="somebody")
    settings = parse_infotext(opened(response.data[0]).info["parameters"])
    assert (settings.steps, settings.text_cfg, settings.image_cfg) == (3, 4.5, 1.25)
    assert settings.negative == "blurry"


def test_n_results_have_consecutive_seeds(client, png):
    response = client.images.edit(image=png, prompt="x", n=3, extra_body={"num_inference_steps": 1})
    seeds = [parse_infotext(opened(image).info["parameters"]).seed for image in response.data]
    assert seeds == [seeds[0], seeds[0] + 1, seeds[0] + 2]


def test_only_transparent_mask_areas_are_edited(client, png):
    mask = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (32, 0, 64, 64))
    edited = client.images.edit(
        image=("a.png", png),
        mask=("mask.png", to_bytes(mask)),
        prompt="x",
        extra_body={"num_inference_steps": 2},
    )
    edited, before = opened(edited.data[0]), Image.open(io.BytesIO(png))
    assert edited.crop((0, 0, 32, 64)).tobytes() == before.crop((0, 0, 32, 64)).tobytes()
    assert edited.crop((32, 0, 64, 64)).tobytes() != before.crop((32, 0, 64, 64)).tobytes()


def test_size_and_format_are_as_requested(client, png):
    response = client.images.edit(
        image=png,
        prompt="x",
        size="96x64",
        output_format="jpeg",
        output_compression=40,
        extra_body={"num_inference_steps": 1},
    )
    image = opened(response.data[0])
    assert (image.format, image.size, response.size) == ("JPEG", (96, 64), "96x64")


def test_response_format_url_returns_the_url_of_the_file(client, png):
    response = client.images.edit(
        image=png, prompt="x", response_format="url", extra_body={"num_inference_steps": 1}
    )
    file = httpx.get(response.data[0].url, trust_env=False)
    assert file.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(file.content)).size == (64, 64)


def test_a_stream_has_partial_images_and_ends_with_the_completed_one(client, png):
    stream = client.images.edit(
        image=png,
        prompt="x",
        stream=True,
        partial_images=2,
        extra_body={"num_inference_steps": 12, "seed": 1},
    )
    events = list(stream)
    kinds = [event.type for event in events]
    assert kinds[-1] == "image_edit.completed" and kinds.count("image_edit.completed") == 1
    partial = [event for event in events if event.type == "image_edit.partial_image"]
    assert 1 <= len(partial) <= 2
    assert [event.partial_image_index for event in partial] == list(range(len(partial)))
    assert opened(events[-1]).size == (64, 64) and events[-1].usage.total_tokens == 0


def test_a_stream_event_reports_the_size_of_its_picture(client, png):
    stream = client.images.edit(
        image=png,
        prompt="x",
        size="512x384",  # previews are smaller
        stream=True,
        partial_images=1,
        extra_body={"num_inference_steps": 12, "seed": 1},
    )
    sizes = {event.type: (event.size, "{}x{}".format(*opened(event).size)) for event in stream}
    assert sizes["image_edit.completed"] == ("512x384", "512x384")
    reported, actual = sizes["image_edit.partial_image"]
    assert reported == actual != "512x384"


def test_a_stream_of_several_results_has_a_completed_event_for_each(client, png):
    stream = client.images.edit(
        image=png, prompt="x", n=2, stream=True, extra_body={"num_inference_steps": 2}
    )
    assert [event.type for event in stream] == ["image_edit.completed"] * 2


def test_closing_a_stream_cancels_the_edit(client, server, png):
    before = server.service.stats().cancelled
    stream = client.images.edit(image=png, prompt="x", stream=True, extra_body={"num_inference_steps": 50})
    until(lambda: server.service.stats().running == 1)
    stream.response.close()
    until(lambda: server.service.stats().cancelled == before + 1, 5)


def test_the_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").owned_by == "ip2p"


@pytest.mark.parametrize(
    ("asked", "kind", "field", "words"),
    [
        ({"n": 9}, openai.BadRequestError, "n", "1 to 4"),
        ({"prompt": " "}, openai.BadRequestError, "prompt", "empty"),
        ({"prompt": "a" * 9000}, openai.BadRequestError, "prompt", "2,000"),
        ({"size": "7x7"}, openai.BadRequestError, "size", "16 to 4096"),
        ({"size": "big"}, openai.BadRequestError, "size", "576x384"),
        ({"output_format": "svg"}, openai.BadRequestError, "output_format", "png"),
        ({"output_compression": 900}, openai.BadRequestError, "output_compression", "100"),
        ({"stream": True, "partial_images": 9}, openai.BadRequestError, "partial_images", "3"),
        ({"model": "gpt-image-1"}, openai.NotFoundError, "model", "fake"),
        (
            {"extra_body": {"num_inference_steps": 10**9}},
            openai.BadRequestError,
            "num_inference_steps",
            "1 to 50",
        ),
        ({"extra_body": {"guidance_scale": -1}}, openai.BadRequestError, "guidance_scale", "0 to 100"),
        ({"extra_body": {"seed": -7}}, openai.BadRequestError, "seed", "0 to"),
        ({"image": b"<svg></svg>"}, openai.BadRequestError, "image", "SVG"),
    ],
)
def test_errors_raise_the_openai_clients_exceptions(client, png, asked, kind, field, words):
    with pytest.raises(kind) as caught:
        client.images.edit(**{"image": png, "prompt": "x", **asked})
    body = caught.value.body
    assert set(body) == {"message", "type", "param", "code"}
    assert body["param"] == field and words in body["message"] and field in body["message"]


def test_several_input_pictures_are_refused(client, png):
    with pytest.raises(openai.BadRequestError, match="image has 2 pictures"):
        client.images.edit(image=[png, png], prompt="x")
    picture = {"image_url": data_url(png)}
    with pytest.raises(openai.BadRequestError, match="images has 2 pictures") as refused:
        post(client, images=[picture, picture])
    assert refused.value.param == "images"
    with pytest.raises(openai.BadRequestError, match="images has 2 pictures"):
        post(client, images=[picture], image=data_url(png))


def test_a_json_body_with_data_urls_matches_a_form(client, png):
    mask = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (32, 0, 64, 64))
    json = post(client, images=[{"image_url": data_url(png)}], mask={"image_url": data_url(to_bytes(mask))})
    form = client.images.edit(
        image=png,
        mask=to_bytes(mask),
        prompt="make it night",
        extra_body={"num_inference_steps": 2, "seed": 7},
    )
    assert opened(json.data[0]).tobytes() == opened(form.data[0]).tobytes()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "image is missing"),
        ({"images": []}, "image is missing"),
        ({"images": [{"file_id": "file-1"}]}, "images has file_id"),
        ({"images": [{}]}, "images has no image_url"),
        ({"images": [{"image_url": "https://a.example/a.png"}]}, "does not download"),
        ({"images": [{"image_url": "data:image/png,x"}]}, "data URL"),
        ({"images": ["x"]}, "images is"),
        ({"image": "a", "mask": {"file_id": "file-1"}}, "mask has file_id"),
    ],
)
def test_a_missing_or_unsupported_picture_in_a_json_body_is_refused(client, png, body, words):
    if body.get("image"):
        body = body | {"image": data_url(png)}
    with pytest.raises(openai.BadRequestError, match=words):
        post(client, **body)


@pytest.mark.parametrize(
    "unknown", [{"markup": "x"}, {"frame_count": 4}, {"svg": {"model": "x"}}, {"strength": 0.5}]
)
def test_an_unsupported_field_is_refused_by_name(client, png, unknown):
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.edit(image=png, prompt="x", extra_body=unknown)
    assert next(iter(unknown)) in refused.value.body["message"]
    with pytest.raises(openai.BadRequestError, match=next(iter(unknown))):
        post(client, images=[{"image_url": data_url(png)}], **unknown)


def test_ignored_and_approximated_options_give_a_warning(client, png):
    usual = client.images.edit(
        image=png, prompt="x", quality="auto", user="somebody", extra_body={"num_inference_steps": 1}
    )
    assert not [text for text in usual.warnings if "levels" in text or "cropped" in text]
    response = client.images.edit(
        image=png,
        prompt="x",
        quality="high",
        input_fidelity="high",
        size="96x64",
        extra_body={"num_inference_steps": 1},
    )
    assert "quality has no effect: num_inference_steps sets the quality." in response.warnings
    assert any(text.startswith("input_fidelity") for text in response.warnings)
    assert (
        "size has a different aspect ratio than the picture, which is cropped to 96x64." in response.warnings
    )


def test_a_background_that_cannot_be_produced_is_refused(client, png):
    with pytest.raises(openai.BadRequestError, match="the picture is opaque") as refused:
        client.images.edit(image=png, prompt="x", background="transparent")
    assert refused.value.param == "background"
    with pytest.raises(openai.BadRequestError, match="jpeg does not support"):
        client.images.edit(image=png, prompt="x", background="transparent", output_format="jpeg")
    with pytest.raises(
        openai.BadRequestError, match="background is 'pink'.*auto, opaque, transparent"
    ) as refused:
        client.images.edit(image=png, prompt="x", background="pink")
    assert refused.value.param == "background"
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.edit(image=png, prompt="x", extra_body={"background_color": "no color"})
    assert refused.value.param == "background_color" and "background_color" in refused.value.message


def test_an_opaque_background_makes_transparent_areas_white(client):
    cut_out = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    keep = to_bytes(Image.new("L", (64, 64), 0).convert("RGBA"))
    mask = Image.open(io.BytesIO(keep))
    mask.putpixel((0, 0), (0, 0, 0, 0))  # nothing else is edited
    response = client.images.edit(
        image=to_bytes(cut_out),
        mask=to_bytes(mask),
        prompt="x",
        background="opaque",
        extra_body={"num_inference_steps": 1},
    )
    image = opened(response.data[0])
    assert response.background == "opaque" and image.mode == "RGB" and image.getpixel((60, 60)) == (255,) * 3


def test_every_answer_has_a_request_id_that_is_logged(client, png, caplog):
    caplog.set_level("INFO", logger="ip2p.serve.access")
    response = client.images.edit(image=png, prompt="x", extra_body={"num_inference_steps": 1})
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.edit(image=png, prompt=" ")
    with pytest.raises(openai.NotFoundError) as missing:
        client.images.generate(prompt="x")
    ids = [response._request_id, refused.value.request_id, missing.value.request_id]
    assert all(ids) and len(set(ids)) == 3
    until(lambda: all(id in caplog.text for id in ids))


def test_a_mask_that_is_opaque_or_of_another_size_is_refused(client, png):
    with pytest.raises(openai.BadRequestError, match="no transparent area"):
        client.images.edit(image=png, mask=png, prompt="x")
    small = to_bytes(Image.new("RGBA", (32, 32)))
    with pytest.raises(openai.BadRequestError, match="mask is 32x32"):
        client.images.edit(image=png, mask=small, prompt="x")


def test_an_unsupported_endpoint_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.images.generate(prompt="a cat")
    assert "/docs" in caught.value.body["message"]
