import base64
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image as hf_load_image

from tests.processing.reference import picture
from vlmlora.data.messages import load_image, read_messages


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


def encoded(image, format="PNG", **options):
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["path", "str", "bytes", "base64", "data_url", "datasets", "datasets_path"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L"])
def test_every_source_reads_as_transformers_loader_does(tmp_path, kind, mode):
    path = tmp_path / "picture.png"
    path.write_bytes(encoded(picture(40, 30).convert(mode)))
    data = path.read_bytes()
    text = base64.b64encode(data).decode()
    source = {
        "path": path,
        "str": str(path),
        "bytes": data,
        "base64": text,
        "data_url": f"data:image/png;base64,{text}",
        "datasets": {"bytes": data, "path": None},
        "datasets_path": {"bytes": None, "path": str(path)},
    }[kind]
    image = load_image(source)
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), np.asarray(hf_load_image(str(path))))


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_files_are_turned_upright_as_in_transformers(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.jpg"
    path.write_bytes(encoded(picture(40, 30), "JPEG", exif=exif))
    image = load_image(path)
    assert image.size == ((30, 40) if orientation in (6, 8) else (40, 30))
    np.testing.assert_array_equal(np.asarray(image), np.asarray(hf_load_image(str(path))))


@pytest.mark.parametrize("key", ["image", "url", "path", "base64", "bytes"])
def test_images_are_found_under_the_usual_keys(tmp_path, key):
    data = encoded(picture(40, 30))
    path = tmp_path / "p.png"
    path.write_bytes(data)
    value = {
        "image": picture(40, 30),
        "base64": base64.b64encode(data).decode(),
        "bytes": data,
    }.get(key, str(path))
    conversation = read_messages(user({"type": "image", key: value}, {"type": "text", "text": "?"}))
    assert conversation.messages == user({"type": "image"}, {"type": "text", "text": "?"})
    np.testing.assert_array_equal(np.asarray(conversation.images[0].image), np.asarray(picture(40, 30)))


def test_columns_of_a_dataset_have_none_where_a_part_has_no_such_key():
    parts = [
        {"type": "image", "image": picture(40, 30), "text": None},
        {"type": "text", "image": None, "text": "?"},
    ]
    conversation = read_messages({"messages": user(*parts), "label": 3}, row=2)
    assert conversation.messages == user({"type": "image"}, {"type": "text", "text": "?"})


def test_bare_parts_take_the_images_of_the_sample_in_order():
    own, first, second = picture(40, 30), picture(50, 30), picture(60, 30)
    sample = {
        "messages": user({"type": "image"}, {"type": "image", "image": own}, {"type": "image"}),
        "images": [first, second],
    }
    assert [p.image.width for p in read_messages(sample).images] == [50, 40, 60]
    openai = user({"type": "image_url", "image_url": {"url": "data:image/png;base64,"}})
    openai[0]["content"][0]["image_url"]["url"] += base64.b64encode(encoded(own)).decode()
    assert read_messages(openai).images[0].image.size == (40, 30)


def test_video_frames_are_images_or_an_array():
    frames = [picture(40, 30, seed=i) for i in range(3)]
    array = np.stack([np.asarray(frame) for frame in frames])
    conversation = read_messages(
        user({"type": "video", "video": frames, "fps": 2}, {"type": "video", "video": array})
    )
    assert [video.fps for video in conversation.videos] == [2, None]
    assert len(conversation.videos[0].frames) == 3
    assert conversation.messages == user({"type": "video"}, {"type": "video"})
    for video, reason in [
        ("clip.mp4", "not decoded"),
        (array[0], "uint8"),
        (array / 255, "uint8"),
        ([frames[0], "missing.png"], "no such file"),
    ]:
        with pytest.raises(ValueError, match=rf"sample, message 0: .*{reason}"):
            read_messages(user({"type": "video", "video": video}))
    with pytest.raises(ValueError, match="message 0: fps=0"):
        read_messages(user({"type": "video", "video": frames, "fps": 0}))


JPEG = encoded(picture(60, 60), "JPEG")
PNG = encoded(picture(60, 60))


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"type": "image"}, "image placeholder without image"),
        ({"type": "image", "image": "/no/such/file.png"}, "no such file: /no/such/file.png"),
        ({"type": "image", "image": "x" * 5000}, "no such file"),
        ({"type": "image", "url": "https://example.com/a.png"}, "not fetched from the web"),
        ({"type": "image", "url": "data:text/plain;base64,aGk="}, "data:image/"),
        ({"type": "image", "url": "data:image/png;base64,a%%"}, "data URL"),
        ({"type": "image", "image": b"not an image"}, "cannot read image of 12 bytes"),
        ({"type": "image", "image": JPEG[: len(JPEG) // 2]}, "truncated"),
        ({"type": "image", "image": PNG[: len(PNG) // 2]}, "cannot read"),
        ({"type": "image", "image": PNG[:200] + b"\0" * 40 + PNG[240:]}, "cannot read"),
        ({"type": "image", "image": Image.new("RGB", (0, 5))}, "no pixels"),
        ({"type": "image", "image": 7}, "found int"),
        ({"type": "image", "image": PNG, "path": "a.png"}, "given twice, under image and path"),
        ({"type": "text"}, "needs a string under 'text'"),
        ({"type": "text", "text": "an <|image_pad|> here"}, "placeholder <|image_pad|>"),
        ({"type": "audio", "audio": "a.wav"}, "type 'audio' is not one of"),
        ({"text": "no type"}, "type None is not one of"),
        ("just text", "a part of the content must be a dict"),
    ],
)
def test_errors_name_the_row_and_the_message(part, reason):
    messages = [{"role": "user", "content": "hello"}, {"role": "user", "content": [part]}]
    with pytest.raises(ValueError) as error:  # noqa: PT011
        read_messages({"messages": messages}, row=12, placeholders=["<|image_pad|>", "<|video_pad|>"])
    assert str(error.value).startswith("row 12, message 1: ")
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "human", "content": "x"}, "role 'human' is not one of"),
        ({"content": "x"}, "role None"),
        ({"role": "user", "content": None}, "content must be a string or a list"),
        ({"role": "user", "content": "an <|image_pad|> here"}, "placeholder <|image_pad|>"),
        ("user: hello", "needed a dict"),
    ],
)
def test_errors_of_a_message(message, reason):
    with pytest.raises(ValueError, match="sample, message 0: ") as error:
        read_messages([message], placeholders=["<|image_pad|>"])
    assert reason in str(error.value)


def test_errors_of_a_sample():
    with pytest.raises(ValueError, match="row 3: 1 of its images have no placeholder"):
        read_messages({"messages": user({"type": "text", "text": "x"}), "images": [picture(9, 9)]}, row=3)
    with pytest.raises(ValueError, match=r"row 3: needed a non-empty list .*found keys \['conversations'\]"):
        read_messages({"conversations": []}, row=3)
    with pytest.raises(ValueError, match=r"sample: needed a non-empty list under 'messages', found \[\]"):
        read_messages([])


@pytest.mark.parametrize("limit", [2000, 1000])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused_from_the_size_that_pillow_warns_of(monkeypatch, limit):
    image = picture(60, 40)
    data = encoded(image)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    for source in (data, image):
        with pytest.raises(ValueError, match=r"sample, message 0: .*decompression bomb"):
            read_messages(user({"type": "image", "image": source}))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2400)
    assert load_image(data).size == (60, 40)
