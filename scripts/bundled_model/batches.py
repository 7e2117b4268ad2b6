"""Training batches assembled on the device from rendered bytes.

What depends only on a picture's size and on the conversation is worked out once, on the host, in tables; a
batch is then a few gathers. The result equals what the processor makes of the same pictures and messages.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from PIL import Image
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLConfig

from bundled_model.conversations import PROMPTS, SYSTEM_PROMPT
from bundled_model.pool import NUM_CONVERSATIONS, RECORD, SIZES
from vlmlora.data.processing import VisionLanguageProcessor
from vlmlora.demo.printed_text import MAX_LENGTH
from vlmlora.models.qwen2_5_vl.positions import mrope_position_ids, vision_layout


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BatchTables:
    """What a batch needs to know of every size (index s) and conversation (index c).

    Attributes:
        pixel_index: Byte of the picture that stands in each value of each patch slot.
        patch_positions: Row and column of the patch in each slot.
        image_segment_ids: 1 in a filled slot, 0 in an empty one.
        image_segment_offsets: First slot of the picture, and the one after its last.
        input_ids: The conversation up to where the answer starts, then padding.
        position_ids: Positions of all tokens, the answer's included.
        image_token_index: Place of each image token among the picture's merged tokens, else -1.
        prompt_length: Tokens before the answer.
        normalised: The value that each byte of each colour becomes.
        closing: Tokens after the answer; the first one ends the turn and is learnt too.
        pad: The padding token.
        group: Patch slots that become one image token.
    """

    pixel_index: Int[Array, "s slots values"]
    patch_positions: Int[Array, "s slots 2"]
    image_segment_ids: Int[Array, "s slots"]
    image_segment_offsets: Int[Array, "s 2"]
    input_ids: Int[Array, "c s tokens"]
    position_ids: Int[Array, "c s 3 tokens"]
    image_token_index: Int[Array, "c s tokens"]
    prompt_length: Int[Array, "c s"]
    normalised: Float[Array, "3 bytes"]
    closing: Int[Array, "closing"]
    pad: Int[Array, ""]
    group: int = dataclasses.field(metadata={"static": True})


def make_tables(config: Qwen2_5_VLConfig, processor: VisionLanguageProcessor) -> BatchTables:
    """Works out the tables for the bundled model's config and processor."""
    tokenizer = processor.tokenizer
    vision = config.vision_config
    patch, merge = vision.patch_size, vision.spatial_merge_size
    layouts = [
        vision_layout([(1, height // patch, width // patch)], patch, vision.window_size, merge)
        for height, width in SIZES
    ]
    slots = max(layout.num_slots for layout in layouts)
    size_tables = [
        _size_table(*size, layout, slots, vision) for size, layout in zip(SIZES, layouts, strict=True)
    ]
    closing = tokenizer("<|im_end|>\n", add_special_tokens=False)["input_ids"]
    prompts = [
        [_expanded(_prompt_ids(tokenizer, c), config, len(layout.token_slots)) for layout in layouts]
        for c in range(NUM_CONVERSATIONS)
    ]
    tokens = max(len(ids) for row in prompts for ids in row) + MAX_LENGTH + len(closing)
    tokens += -tokens % 8
    token_tables = [
        [
            _token_table(ids, layout, size, tokens, config, tokenizer.pad_token_id)
            for ids, layout, size in zip(row, layouts, SIZES, strict=True)
        ]
        for row in prompts
    ]
    return jax.tree.map(
        jnp.asarray,
        BatchTables(
            **{name: np.stack([table[name] for table in size_tables]) for name in size_tables[0]},
            **{
                name: np.stack([[table[name] for table in row] for row in token_tables])
                for name in token_tables[0][0]
            },
            normalised=_byte_values(processor, vision),
            closing=np.asarray(closing, np.int32),
            pad=np.int32(tokenizer.pad_token_id),
            group=merge**2,
        ),
    )


def _size_table(height: int, width: int, layout: Any, slots: int, vision: Any) -> dict[str, np.ndarray]:
    patch = vision.patch_size
    positions = np.zeros((slots, 2), np.int32)
    segments = np.zeros(slots, np.int32)
    positions[: layout.num_slots] = layout.patch_positions
    segments[: layout.num_slots] = layout.image_segment_ids
    channel, _, row, column = np.indices((3, vision.temporal_patch_size, patch, patch)).reshape(4, -1)
    rows = positions[:, :1] * patch + row
    columns = positions[:, 1:] * patch + column
    return {
        "pixel_index": ((rows * width + columns) * 3 + channel).astype(np.int32),
        "patch_positions": positions,
        "image_segment_ids": segments,
        "image_segment_offsets": np.array([0, layout.num_slots], np.int32),
    }


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, conversation: int) -> list[int]:
    prompt = PROMPTS[conversation % len(PROMPTS)]
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
    if conversation >= len(PROMPTS):
        messages.insert(0, {"role": "system", "content": SYSTEM_PROMPT})
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _expanded(ids: list[int], config: Qwen2_5_VLConfig, image_tokens: int) -> list[int]:
    place = ids.index(config.image_token_id)
    return ids[:place] + [config.image_token_id] * image_tokens + ids[place + 1 :]


def _token_table(
    ids: list[int], layout: Any, size: tuple[int, int], tokens: int, config: Qwen2_5_VLConfig, pad: int
) -> dict[str, np.ndarray]:
    input_ids = np.full(tokens, pad, np.int32)
    input_ids[: len(ids)] = ids
    is_image = input_ids == config.image_token_id
    image_token_index = np.full(tokens, -1, np.int32)
    image_token_index[is_image] = layout.token_slots
    vision = config.vision_config
    position_ids, _ = mrope_position_ids(
        is_image[None].astype(np.int32),
        image_grid_thw=np.array([[1, size[0] // vision.patch_size, size[1] // vision.patch_size]]),
        spatial_merge_size=vision.spatial_merge_size,
        tokens_per_second=vision.tokens_per_second,
    )
    return {
        "input_ids": input_ids,
        "position_ids": position_ids[:, 0],
        "image_token_index": image_token_index,
        "prompt_length": np.int32(len(ids)),
    }


def _byte_values(processor: VisionLanguageProcessor, vision: Any) -> Float[np.ndarray, "3 256"]:
    """The image processor's value of every byte, read off a picture that holds each of them."""
    side = vision.patch_size * vision.spatial_merge_size
    picture = np.zeros((side, 16 * side, 3), np.uint8)
    flat = picture.reshape(-1, 3)
    flat[:256] = np.arange(256, dtype=np.uint8)[:, None]
    patches = processor.family.process_image(Image.fromarray(picture)).pixel_values
    grid = (1, side // vision.patch_size, 16 * side // vision.patch_size)
    layout = vision_layout([grid], vision.patch_size, vision.window_size, vision.spatial_merge_size)
    table = _size_table(side, 16 * side, layout, layout.num_slots, vision)["pixel_index"][layout.patch_slots]
    values = np.zeros((picture.size,), np.float32)
    values[table.reshape(-1)] = patches.reshape(-1)
    return values.reshape(-1, 3)[:256].T


def assemble(tables: BatchTables, records: dict[str, Array], *, answers: bool = True) -> dict[str, Array]:
    """The model's inputs for a batch of samples, one image and one conversation a row.

    Args:
        tables: From `make_tables`.
        records: The fields of `RECORD`, each with a leading batch axis.
        answers: Whether the answers are in the rows, with labels; without them the rows end in the prompt.

    Returns:
        The batch; `labels` mark the answer's tokens and the one that ends the turn.
    """
    size, conversation = records["size"], records["conversation"]
    batch = size.shape[0]
    filled = tables.image_segment_ids[size]
    pixel_index = tables.pixel_index[size]
    picked = jnp.take_along_axis(records["pixels"], pixel_index.reshape(batch, -1), axis=1)
    colour = jnp.repeat(jnp.arange(3), pixel_index.shape[-1] // 3)
    values = tables.normalised[colour, picked.reshape(pixel_index.shape)]

    start = tables.prompt_length[conversation, size]
    place = jnp.arange(tables.input_ids.shape[-1])[None]
    input_ids = tables.input_ids[conversation, size]
    length, labels = start, {}
    if answers:
        last = records["answer_length"].astype(jnp.int32)
        closing = tables.closing.shape[0]
        rows = jnp.pad(records["answer"].astype(jnp.int32), ((0, 0), (0, closing)))
        for i in range(closing):
            rows = rows.at[jnp.arange(batch), last + i].set(tables.closing[i])
        length = start + last + closing
        offset = place - start[:, None]
        said = jnp.take_along_axis(rows, jnp.clip(offset, 0, rows.shape[1] - 1), axis=1)
        input_ids = jnp.where((offset >= 0) & (place < length[:, None]), said, input_ids)
        learnt = (offset >= 0) & (offset <= last[:, None])
        labels = {"labels": jnp.where(learnt, input_ids, -100)}
    inside = place < length[:, None]
    image_token_index = tables.image_token_index[conversation, size]
    row_offset = jnp.arange(batch)[:, None] * (pixel_index.shape[1] // tables.group)
    return labels | {
        "input_ids": jnp.where(inside, input_ids, tables.pad),
        "position_ids": jnp.where(inside, jnp.moveaxis(tables.position_ids[conversation, size], 1, 0), 0),
        "attention_mask": inside.astype(jnp.int32),
        "pixel_values": jnp.where(filled[..., None] > 0, values, 0.0),
        "patch_positions": tables.patch_positions[size],
        "image_segment_ids": filled,
        "image_segment_offsets": tables.image_segment_offsets[size],
        "image_token_index": jnp.where(image_token_index >= 0, image_token_index + row_offset, -1),
    }


def host_fields(records: np.ndarray) -> dict[str, np.ndarray]:
    """An array of `RECORD` as one contiguous array a field."""
    return {name: np.ascontiguousarray(records[name]) for name in RECORD.names}
