"""The directory of the bundled model against transformers, before any training."""

import numpy as np
import pytest
import torch
from bundled_model.conversations import SYSTEM_PROMPT
from bundled_model.directory import write_directory
from bundled_model.weights import write_initial_weights
from PIL import Image
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

from vlmlora.demo.handwritten_digits import handwritten_samples
from vlmlora.demo.text_image import reading_messages

IMAGE = {"type": "image", "image": Image.new("RGB", (96, 32), "white")}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("bundled")
    write_directory(path)
    assert 2e6 < write_initial_weights(path, seed=0) < 4e6
    return path


@pytest.fixture(scope="module")
def processor(directory):
    return AutoProcessor.from_pretrained(directory)


def test_transformers_loads_every_weight_and_reads_a_picture(directory, processor):
    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    messages = reading_messages(handwritten_samples("test", 1, seed=0)[0], answer=False)
    inputs = processor.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        logits = model(**inputs).logits
    assert torch.isfinite(logits).all()
    assert model.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2


def test_the_tokenizer_has_one_token_a_byte_and_one_a_prompt_word(processor):
    tokenizer = processor.tokenizer
    text = "$12.50 Zebra ü<|im_end|>\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(ids) == len("$12.50 Zebra ") + 2 + 2
    assert tokenizer.tokenize("Read the text.") == ["Read", "Ġthe", "Ġtext", "."]
    assert tokenizer.eos_token == "<|im_end|>"


def test_the_chat_template_speaks_like_qwen(processor):
    messages = [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": [IMAGE, {"type": "text", "text": "Read the text."}]},
        {"role": "assistant", "content": [{"type": "text", "text": "42"}]},
        {
            "role": "user",
            "content": [{"type": "video", "video": "clip.mp4"}, {"type": "text", "text": "And?"}],
        },
    ]
    assert processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Read the text.<|im_end|>\n"
        "<|im_start|>assistant\n42<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>And?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    with_id = processor.apply_chat_template(messages, tokenize=False, add_vision_id=True)
    assert "Picture 1: <|vision_start|>" in with_id
    assert "Video 1: <|vision_start|>" in with_id


@pytest.mark.parametrize("size", [(32, 32), (32, 192), (48, 96), (64, 32)])
def test_small_pictures_are_not_resized(processor, size):
    picture = Image.fromarray(np.zeros((*size, 3), np.uint8))
    grid = processor.image_processor(picture, return_tensors="pt")["image_grid_thw"][0]
    assert grid.tolist() == [1, size[0] // 8, size[1] // 8]
