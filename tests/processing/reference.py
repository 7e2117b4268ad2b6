"""A small tokenizer, and directories that transformers' own processor wrote."""

import numpy as np
import pytest
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLImageProcessorPil,
    Qwen2VLVideoProcessor,
)

from vlmlora.models.qwen2_5_vl.processing import load_processor

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# The behaviour of Qwen2.5-VL's template: a system turn by default, content as a string or in parts.
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if loop.first and m.role != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' or 'image' in part %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type == 'video' or 'video' in part %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "What is written in this image? Read the text and say what it shows.\n\n",
    "You are a helpful assistant. system user assistant\n\nThe",
    "The image shows a number, 123 and 4567.\n\n  - one\n  - two\n",
] * 3
# Splits as Qwen's tokenizer does; newlines merge with what stands before them, so turns can straddle tokens.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def small_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL),
    )


@pytest.fixture(scope="session")
def tokenizer():
    return small_tokenizer()


@pytest.fixture(scope="session")
def config(tokenizer):
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad")}
    return Qwen2_5_VLConfig(
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_config={"window_size": 112, "tokens_per_second": 2},
    )


def hf_processor(tokenizer, backend="pil", processor_class=Qwen2_5_VLProcessor):
    size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 64}
    image_processor = {"pil": Qwen2VLImageProcessorPil, "torchvision": Qwen2VLImageProcessor}[backend]
    return processor_class(
        image_processor=image_processor(size=dict(size)),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=dict(size), cap_pixels_per_frame=False),
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture(scope="session")
def reference(tokenizer):
    """transformers' processor."""
    return hf_processor(tokenizer)


@pytest.fixture(scope="session")
def directory(reference, tmp_path_factory):
    """What transformers' processor saves."""
    path = tmp_path_factory.mktemp("qwen2_5_vl")
    reference.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def family(directory, config):
    """The family's processor, loaded from what transformers saved."""
    return load_processor(directory, config)


def picture(width, height, seed=0):
    """A picture with edges, slopes and noise, which a resampling filter shows on."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [127 + 120 * np.sin(x / (3 + i) + y / (5 + 2 * i) + seed) for i in range(3)]
    pixels = np.stack(waves, -1)
    pixels[height // 4 : height // 2, width // 4 : width // 2] = rng.integers(0, 256, 3)
    pixels += rng.normal(0, 8, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
