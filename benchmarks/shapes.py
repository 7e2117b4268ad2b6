"""Models of known size, and batches of known work for them."""

from collections.abc import Sequence

import numpy as np
from transformers import MllamaConfig, PreTrainedConfig, Qwen2_5_VLConfig

from vlmlora.distributed import rows_axis
from vlmlora.models.qwen2_5_vl.positions import IMAGE, mrope_position_ids, vision_layout


def qwen2_5_vl_7b() -> Qwen2_5_VLConfig:
    """The shape of Qwen/Qwen2.5-VL-7B-Instruct."""
    text = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 128000,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
    }
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)


def qwen2_5_vl_72b() -> Qwen2_5_VLConfig:
    """The shape of Qwen/Qwen2.5-VL-72B-Instruct."""
    config = qwen2_5_vl_7b()
    text, vision = config.text_config, config.vision_config
    text.hidden_size = vision.out_hidden_size = 8192
    text.intermediate_size = 29568
    text.num_hidden_layers = 80
    text.layer_types = ["full_attention"] * 80
    text.num_attention_heads, text.num_key_value_heads = 64, 8
    vision.intermediate_size = 3456
    return config


def llama_3_2_11b_vision() -> MllamaConfig:
    """The shape of meta-llama/Llama-3.2-11B-Vision-Instruct."""
    text = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38],
        "vocab_size": 128256,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }
    vision = {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_global_layers": 8,
        "attention_heads": 16,
        "image_size": 560,
        "patch_size": 14,
        "max_num_tiles": 4,
        "intermediate_layers_indices": [3, 7, 15, 23, 30],
        "vision_output_dim": 7680,
    }
    return MllamaConfig(text_config=text, vision_config=vision, image_token_index=128256)


CONFIGS = {
    "qwen2_5_vl-7b": qwen2_5_vl_7b,
    "qwen2_5_vl-72b": qwen2_5_vl_72b,
    "llama-3.2-11b-vision": llama_3_2_11b_vision,
}


def make_config(
    name: str, *, layers: int | None = None, vision_layers: int | None = None, shrink: int = 1
) -> PreTrainedConfig:
    """A model's config, or that of a smaller model of the same build, for a run without a large device.

    Args:
        name: a key of `CONFIGS`.
        layers: of the language model; None: all.
        vision_layers: of the vision tower; None: all.
        shrink: divides every width and number of heads, and leaves 1024 tokens in the vocabulary.

    Raises:
        ValueError: `shrink` does not divide a number of heads.
    """
    config = CONFIGS[name]()
    cut = _cut_mllama if config.model_type == "mllama" else _cut_qwen
    if shrink > 1:
        _shrink(config, shrink)
    cut(config, layers, vision_layers)
    return config


def _cut_qwen(config: PreTrainedConfig, layers: int | None, vision_layers: int | None) -> None:
    text, vision = config.text_config, config.vision_config
    text.num_hidden_layers = layers or text.num_hidden_layers
    text.layer_types = text.layer_types[: text.num_hidden_layers]
    if vision_layers:
        # One layer in four looks at the whole image, as in the full model.
        vision.depth = vision_layers
        vision.fullatt_block_indexes = [n for n in vision.fullatt_block_indexes if n < vision_layers] or [0]


def _cut_mllama(config: PreTrainedConfig, layers: int | None, vision_layers: int | None) -> None:
    text, vision = config.text_config, config.vision_config
    if layers:
        text.num_hidden_layers = layers
        text.cross_attention_layers = [n for n in text.cross_attention_layers if n < layers]
    if vision_layers:
        vision.num_hidden_layers = vision_layers
        vision.num_global_layers = min(vision.num_global_layers, max(1, vision_layers // 4))
        taken = [n for n in vision.intermediate_layers_indices if n < vision_layers] or [0]
        vision.intermediate_layers_indices = taken
    vision.vision_output_dim = vision.hidden_size * (1 + len(vision.intermediate_layers_indices))


def _shrink(config: PreTrainedConfig, factor: int) -> None:
    text, vision = config.text_config, config.vision_config
    vision_heads = "attention_heads" if config.model_type == "mllama" else "num_heads"
    for part, names in (
        (text, ("num_attention_heads", "num_key_value_heads", "hidden_size", "intermediate_size")),
        (vision, (vision_heads, "hidden_size", "intermediate_size")),
    ):
        for name in names:
            size = getattr(part, name)
            if size % factor:
                raise ValueError(f"shrink={factor} does not divide {name}={size}")
            setattr(part, name, size // factor)
    text.vocab_size = 1024
    if config.model_type == "mllama":
        config.image_token_index = text.vocab_size
    else:
        vision.out_hidden_size = text.hidden_size
        config.vision_start_token_id, config.vision_end_token_id = 1020, 1021
        config.image_token_id, config.video_token_id = 1022, 1023


def image_text_batch(
    config: PreTrainedConfig, rows: int, tokens: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """Rows of `tokens` tokens with one image each, labelled in the last quarter.

    The image has 448×448 pixels (1024 patches, 256 tokens), or for Mllama four whole tiles. Every slot of
    every row holds a token or a patch, so the batch has no segment ids.
    """
    make = _mllama_batch if config.model_type == "mllama" else _qwen_batch
    rng = np.random.default_rng(seed)
    batch = make(config, rng, rng.integers(0, 256, (rows, tokens)).astype(np.int32))
    labels = batch["input_ids"].copy()
    labels[:, : 3 * tokens // 4] = -100
    return {**batch, "labels": labels, "attention_mask": np.ones_like(labels)}


def join_batches(config: PreTrainedConfig, batches: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The rows of several batches as one; where images are counted, those of each follow the former's."""
    images = 0
    counted = []
    for batch in batches:
        batch = dict(batch)
        for name, per_image in (("image_index", 1), ("image_token_index", _merged_slots(config, batch))):
            if name in batch:
                batch[name] = np.where(batch[name] >= 0, batch[name] + images * per_image, batch[name])
        counted.append(batch)
        images += len(batch["pixel_values"])
    return {
        name: np.concatenate([batch[name] for batch in counted], axis=rows_axis(name, array))
        for name, array in counted[0].items()
    }


def _merged_slots(config: PreTrainedConfig, batch: dict[str, np.ndarray]) -> int:
    """Image tokens that a row of patches has room for."""
    merge = getattr(config.vision_config, "spatial_merge_size", 1)
    return batch["pixel_values"].shape[1] // merge**2


def _mllama_batch(
    config: PreTrainedConfig, rng: np.random.Generator, input_ids: np.ndarray
) -> dict[str, np.ndarray]:
    """The image stands after the first token."""
    rows, tokens = input_ids.shape
    input_ids[:, 1] = config.image_token_index
    vision = config.vision_config
    tile = (vision.num_channels, vision.image_size, vision.image_size)
    square = vision.supported_aspect_ratios.index([2, 2]) + 1
    return {
        "input_ids": input_ids,
        "position_ids": np.tile(np.arange(tokens, dtype=np.int32), (rows, 1)),
        "pixel_values": rng.standard_normal((rows, vision.max_num_tiles, *tile), np.float32),
        "aspect_ratio_ids": np.full(rows, square, np.int32),
        "num_tiles": np.full(rows, 4, np.int32),
        "image_index": np.arange(rows, dtype=np.int32)[:, None],
        "image_spans": np.tile(np.array([1, 2**30], np.int32), (rows, 1, 1)),
    }


def _qwen_batch(
    config: PreTrainedConfig, rng: np.random.Generator, input_ids: np.ndarray
) -> dict[str, np.ndarray]:
    rows = len(input_ids)
    vision = config.vision_config
    merge, side, start = vision.spatial_merge_size, 448 // vision.patch_size, 9
    count = (side // merge) ** 2
    input_ids[:, start - 1] = config.vision_start_token_id
    input_ids[:, start : start + count] = config.image_token_id
    input_ids[:, start + count] = config.vision_end_token_id
    position_ids, _ = mrope_position_ids(
        np.where(input_ids == config.image_token_id, IMAGE, 0),
        image_grid_thw=np.array([[1, side, side]] * rows),
        spatial_merge_size=merge,
    )
    layout = vision_layout([[1, side, side]], vision.patch_size, vision.window_size, merge)
    index = np.full(input_ids.shape, -1, np.int32)
    index[:, start : start + count] = layout.token_slots + count * np.arange(rows)[:, None]
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "pixel_values": rng.normal(size=(rows, layout.num_slots, values)).astype(np.float32),
        "patch_positions": np.broadcast_to(layout.patch_positions, (rows, layout.num_slots, 2)).copy(),
        "image_token_index": index,
    }
