"""The torch-free processor against transformers' own, live."""

import json

import numpy as np
import pytest
from PIL import Image
from transformers import AutoProcessor, Qwen2_5_VLConfig

from tests.processing.reference import CHAT_TEMPLATE, hf_processor, picture
from vlmlora.models.qwen2_5_vl.processing import load_processor

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
SIZES = [(60, 60), (100, 77), (300, 200), (33, 400), (29, 29), (224, 224)]


def steps_of_255(a, b, image_processor):
    """Difference of two `pixel_values` in the steps of an 8-bit pixel."""
    std = 255 * np.array(image_processor.image_std)[:, None]
    return np.abs((a - b).reshape(len(a), 3, -1)) * std


@pytest.mark.parametrize("backend", ["pil", "torchvision"])
def test_images_equal_transformers(family, tokenizer, backend):
    images = [picture(*size, seed=i) for i, size in enumerate(SIZES)]
    text = "".join(f"Picture {i}: {IMAGE} and\n\n" for i in range(len(images)))
    expected = hf_processor(tokenizer, backend)(text=[text], images=images, return_tensors="np")
    actual = family(text, images)
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        np.testing.assert_array_equal(actual[name], expected[name][0])
    np.testing.assert_array_equal(actual["image_grid_thw"], expected["image_grid_thw"])
    if backend == "pil":
        np.testing.assert_array_equal(actual["pixel_values"], expected["pixel_values"])
    else:
        # torchvision's antialiased bicubic filter rounds its weights and sums in another order than Pillow's.
        error = steps_of_255(actual["pixel_values"], expected["pixel_values"], family.image_processor)
        assert error.max() < 2.01
        assert error.mean() < 0.01


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK", "I;16"])
def test_modes_become_rgb_as_in_transformers(family, reference, mode):
    image = Image.new(mode, (60, 40), 40000) if mode == "I;16" else picture(60, 40).convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(np.linspace(0, 255, 2400).reshape(40, 60).astype(np.uint8)))
    expected = reference(text=[IMAGE], images=[image], return_tensors="np")
    np.testing.assert_array_equal(family(IMAGE, [image])["pixel_values"], expected["pixel_values"])


@pytest.mark.parametrize(("frames", "fps"), [(1, None), (2, 2.0), (3, 0.7), (5, 24.0)])
def test_videos_equal_transformers(family, reference, frames, fps):
    video = np.stack([np.asarray(picture(90, 61, seed=i)) for i in range(frames)])
    text = f"{IMAGE}{VIDEO}Which comes first?"
    metadata = None if fps is None else [{"fps": fps, "total_num_frames": frames}]
    expected = reference(
        text=[text],
        images=[picture(60, 60)],
        videos=[video.transpose(0, 3, 1, 2)],
        video_metadata=metadata,
        return_tensors="np",
    )
    actual = family(text, [picture(60, 60)], [video], [fps])
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        np.testing.assert_array_equal(actual[name], expected[name][0])
    np.testing.assert_array_equal(actual["video_grid_thw"], expected["video_grid_thw"])
    np.testing.assert_array_equal(
        actual["second_per_grid_ts"], np.array(expected["second_per_grid_ts"], np.float32)
    )
    # transformers resizes frames with torchvision; see test_images_equal_transformers.
    error = steps_of_255(
        actual["pixel_values_videos"], expected["pixel_values_videos"], family.image_processor
    )
    assert error.max() < 2.01
    assert error.mean() < 0.01
    as_images = family(text, [picture(60, 60)], [[Image.fromarray(frame) for frame in video]], [fps])
    np.testing.assert_array_equal(as_images["pixel_values_videos"], actual["pixel_values_videos"])


def test_videos_share_a_budget_of_pixels_where_the_config_says_so(tokenizer, config, tmp_path):
    reference = hf_processor(tokenizer)
    reference.video_processor.cap_pixels_per_frame = True
    reference.video_processor.max_video_tokens = 80
    reference.save_pretrained(tmp_path)
    family = load_processor(tmp_path, config)
    video = np.stack([np.asarray(picture(300, 280, seed=i)) for i in range(6)])
    expected = reference(text=[VIDEO], videos=[video.transpose(0, 3, 1, 2)], return_tensors="np")
    actual = family(VIDEO, videos=[video])
    np.testing.assert_array_equal(actual["video_grid_thw"], expected["video_grid_thw"])
    assert actual["video_grid_thw"].tolist() != [[3, 16, 16]]


def test_placeholders_and_images_must_correspond(family):
    with pytest.raises(ValueError, match=r"1 <\|image_pad\|> placeholders for 0 images"):
        family(IMAGE)
    with pytest.raises(ValueError, match=r"0 <\|image_pad\|> placeholders for 1 images"):
        family("no image", [picture(60, 60)])
    with pytest.raises(ValueError, match=r"2 <\|video_pad\|> placeholders for 1 videos"):
        family(VIDEO * 2, videos=[[picture(60, 60)]])
    with pytest.raises(ValueError, match="frames of one size"):
        family(VIDEO, videos=[[picture(60, 60), picture(60, 61)]])
    with pytest.raises(ValueError, match="no frames"):
        family(VIDEO, videos=[[]])
    with pytest.raises(ValueError, match="fps=0"):
        family(VIDEO, videos=[[picture(60, 60)]], fps=[0])


def test_what_is_saved_loads_in_transformers_and_here(family, reference, config, tmp_path):
    family.save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    text = f"{IMAGE}{VIDEO}x"
    image, video = picture(100, 77), np.stack([np.asarray(picture(64, 64, seed=i)) for i in range(2)])
    theirs = AutoProcessor.from_pretrained(tmp_path)
    assert theirs.chat_template == CHAT_TEMPLATE
    frames = video.transpose(0, 3, 1, 2)
    expected, actual = (
        processor(text=[text], images=[image], videos=[frames], return_tensors="np")
        for processor in (reference, theirs)
    )
    for name in ("input_ids", "image_grid_thw", "video_grid_thw", "pixel_values_videos"):
        np.testing.assert_array_equal(actual[name], expected[name])
    ours = load_processor(tmp_path, config)
    first, second = family(text, [image], [video]), ours(text, [image], [video])
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(second[name], value)


@pytest.mark.parametrize("era", ["min_pixels", "size", "video_file"])
def test_directories_of_transformers_4_load(tokenizer, config, tmp_path, era):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    bounds = {"min_pixels": 28 * 28 * 6, "max_pixels": 28 * 28 * 20}
    written = {
        "min_pixels": bounds,
        "size": {"size": {"shortest_edge": 28 * 28 * 6, "longest_edge": 28 * 28 * 20}},
        "video_file": {**bounds, "size": dict(bounds)},
    }[era]
    common = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "Qwen2VLImageProcessor", **common, **written})
    )
    if era == "video_file":
        (tmp_path / "video_preprocessor_config.json").write_text(
            json.dumps(
                {"size": {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 9}, "image_mean": [0.5] * 3}
            )
        )
    config.save_pretrained(tmp_path)
    reference, family = AutoProcessor.from_pretrained(tmp_path), load_processor(tmp_path, config)
    video = np.stack([np.asarray(picture(200, 300, seed=i)) for i in range(2)])
    for size in ((30, 40), (400, 300)):
        expected = reference(
            text=[IMAGE + VIDEO],
            images=[picture(*size)],
            videos=[video.transpose(0, 3, 1, 2)],
            return_tensors="np",
        )
        actual = family(IMAGE + VIDEO, [picture(*size)], [video])
        np.testing.assert_array_equal(actual["image_grid_thw"], expected["image_grid_thw"])
        np.testing.assert_array_equal(actual["video_grid_thw"], expected["video_grid_thw"])
        difference = actual["pixel_values_videos"] - expected["pixel_values_videos"]
        assert np.abs(difference).max() < 0.05
    assert family.chat_template == CHAT_TEMPLATE


def test_files_that_contradict_the_config_are_refused(directory, tokenizer, config, tmp_path):
    ids = {"image_token_id": config.image_token_id, "video_token_id": config.video_token_id}
    with pytest.raises(ValueError, match="patch_size=14, the model's vision config 16"):
        load_processor(directory, Qwen2_5_VLConfig(vision_config={"patch_size": 16}, **ids))
    with pytest.raises(ValueError, match="image_token_id=5 in the config"):
        load_processor(directory, Qwen2_5_VLConfig(**{**ids, "image_token_id": 5}))
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"neither preprocessor_config\.json nor"):
        load_processor(tmp_path, config)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(ValueError, match="chat template"):
        load_processor(tmp_path, config)
