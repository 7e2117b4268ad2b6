"""Qwen2.5-VL for the parity tests."""

import functools
import re

import numpy as np
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from benchmarks.shapes import qwen2_5_vl_7b
from tests.families.description import Case, Count, Description, Inputs, ProcessorCase
from tests.models.qwen2_5_vl_cases import EOS, Visual, batches, tiny_config
from tests.models.qwen2_5_vl_cases import Case as Rows
from tests.processing.reference import hf_processor, picture, small_tokenizer

MIXED = [[3, Visual(1, 8, 8), 5], [9], [2, Visual(1, 4, 12), 1, Visual(1, 6, 10), 4]]
"""One image that fills its window, none, and two with under-full windows; rows of three lengths."""

CASES = {
    "untied": Case(tiny_config(), MIXED),
    "tied": Case(tiny_config(tie_word_embeddings=True), MIXED),
    "multi_head": Case(tiny_config(text={"num_key_value_heads": 4}), MIXED),
    "multi_query": Case(tiny_config(text={"num_key_value_heads": 1}), MIXED),
    "no_full_attention_block": Case(tiny_config(vision={"depth": 3, "fullatt_block_indexes": []}), MIXED),
    "only_full_attention": Case(tiny_config(vision={"depth": 2, "fullatt_block_indexes": [0, 1]}), MIXED),
    "deep_vision_odd_mlp": Case(
        tiny_config(vision={"depth": 5, "fullatt_block_indexes": [1, 4], "intermediate_size": 51}),
        [[1, Visual(1, 18, 10), 2, Visual(1, 2, 2), 2], [4, Visual(1, 2, 30), 3]],
    ),
    "hub_patches": Case(
        tiny_config(vision={"patch_size": 14, "window_size": 112, "num_heads": 4}),
        [[2, Visual(1, 12, 20), 3], [3, Visual(1, 8, 16), 2, Visual(1, 8, 6), 3]],
    ),
    "odd_text_sizes": Case(
        tiny_config(
            text={
                "hidden_size": 60,
                "num_attention_heads": 5,
                "num_key_value_heads": 5,
                "intermediate_size": 77,
                "num_hidden_layers": 3,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 2, 3]},
            }
        ),
        MIXED,
    ),
    "video": Case(tiny_config(), [[2, Visual(3, 4, 6), 3], [2, Visual(1, 6, 4), 1, Visual(2, 10, 10), 2]]),
    "text_only": Case(tiny_config(), [[7], [12], [1]]),
}


VIDEO_ATOL = {"pixel_values_videos": 1e-6}
"""transformers rescales and normalises frames in one step in torch."""


def make_inputs(rows, config, seed):
    """The same batch on both sides."""
    return Inputs(*batches(Rows(rows), config, seed))


def one_row(theirs, row, length):
    """One row of transformers' inputs without its padding, with its own images and videos."""
    tokens = ("input_ids", "attention_mask", "mm_token_type_ids")
    out = {name: theirs[name][row : row + 1, :length] for name in tokens}
    for pixels, grid, kind in (
        ("pixel_values", "image_grid_thw", 1),
        ("pixel_values_videos", "video_grid_thw", 2),
    ):
        if pixels not in theirs:
            continue
        types = theirs["mm_token_type_ids"]
        starts = ((types == kind) & (torch.roll(types, 1, dims=1) != kind)).sum(1)
        first, count = int(starts[:row].sum()), int(starts[row])
        if not count:
            continue
        patches = theirs[grid].prod(1)
        at = int(patches[:first].sum())
        out[grid] = theirs[grid][first : first + count]
        out[pixels] = theirs[pixels][at : at + int(patches[first : first + count].sum())]
        if kind == 2 and "second_per_grid_ts" in theirs:
            out["second_per_grid_ts"] = theirs["second_per_grid_ts"][first : first + count]
    return out


def check_positions(model, inputs):
    """Positions are exactly those that transformers' model derives."""
    unused = ("labels", "pixel_values", "pixel_values_videos")
    positions, _ = model.model.get_rope_index(**{k: v for k, v in inputs.theirs.items() if k not in unused})
    ours = inputs.ours["position_ids"]
    np.testing.assert_array_equal(ours[:, inputs.valid], positions.numpy()[:, inputs.valid])


def pack(inputs):
    """All rows in one, one after the other."""
    batch, valid = inputs.ours, inputs.valid
    packed = {k: batch[k] for k in ("pixel_values", "patch_positions", "image_segment_ids")}
    for name in ("input_ids", "position_ids", "labels", "image_token_index"):
        packed[name] = batch[name][..., valid][..., None, :]
    return packed | {"segment_ids": (np.nonzero(valid)[0] + 1).astype(np.int32)[None]}


def place(name):
    """Part and role of a linear module."""
    if name == "lm_head":
        return "head", "other"
    if name.startswith("model.visual.merger."):
        return "projector", "other"
    part = "vision" if name.startswith("model.visual.") else "language"
    return part, "mlp" if ".mlp." in name else "attention"


def before_4_52(name):
    """What checkpoints called a parameter before transformers 4.52, as the hub's mostly do."""
    name = re.sub(r"^model\.language_model\.", "model.", name)
    return re.sub(r"^model\.visual\.", "visual.", name)


def processor_config(config, processor):
    """A tiny model for the tokens of a processor."""
    config.text_config.vocab_size = len(processor.tokenizer)
    config.image_token_id = processor.image_token_id
    config.video_token_id = processor.video_token_id
    return config


def conversations():
    """Images that are resized, an image beside a video, and text alone."""
    video = np.stack([np.asarray(picture(84, 56, seed=i)) for i in range(3)])

    def ask(*parts):
        return [{"role": "user", "content": [*parts, {"type": "text", "text": "What is written?"}]}]

    first, second, third = (
        {"type": "image", "image": picture(*size, seed=i)}
        for i, size in enumerate([(100, 77), (33, 150), (60, 60)])
    )
    return [ask(first, second), ask(third, {"type": "video", "video": video}), ask()]


FAMILY = Description(
    model_class=Qwen2_5_VLForConditionalGeneration,
    cases=CASES,
    make_inputs=make_inputs,
    one_row=one_row,
    end_token=EOS,
    slow=(
        "multi_head",
        "multi_query",
        "only_full_attention",
        "no_full_attention_block",
        "odd_text_sizes",
        "test_checkpointing",
    ),
    greedy=("tied", "video", "text_only"),
    eras={"before 4.52": before_4_52, "4.52 to 4.57": lambda name: name},
    place=place,
    counts=(Count(qwen2_5_vl_7b(), {"r": 16}, 51_521_536),),
    left_in_16_bit=("layers.1.self_attn.q_proj", "layers.0.mlp.down_proj", "blocks.0.mlp.down_proj"),
    check=check_positions,
    pack=pack,
    processor=ProcessorCase(
        reference=lambda: hf_processor(small_tokenizer()),
        config=functools.partial(
            processor_config,
            tiny_config(vision={"patch_size": 14, "window_size": 112, "num_heads": 4}),
        ),
        conversations=conversations,
        atol=VIDEO_ATOL,
    ),
)
