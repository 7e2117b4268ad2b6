"""Llama 3.2 Vision for the parity tests."""

import re

from transformers import (
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaImageProcessorPil,
    MllamaProcessor,
)

from benchmarks.shapes import llama_3_2_11b_vision
from tests.families.description import Case, Count, Description, Inputs, ProcessorCase
from tests.models.mllama_cases import EOS, IMAGE_TOKEN, Tiles, batches, tiny_config
from tests.models.mllama_cases import Case as Rows
from tests.processing.reference import picture, small_tokenizer

SEVERAL = [[3, Tiles(1, 2), 5, Tiles(3, 1), 3], [1, Tiles(1, 1), Tiles(1, 3), 4], [9]]
"""Images that later ones replace, two that are seen together, and a row without an image."""
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # So short that the head's frequencies lie on both sides of its bounds, and between.
    "original_max_position_embeddings": 64,
}

CASES = {
    "one_image": Case(tiny_config(), [[3, Tiles(1, 2), 5], [Tiles(2, 2), 7], [2, Tiles(1, 1), 2]]),
    "several_images": Case(
        tiny_config(
            text={
                "cross_attention_layers": [0, 1, 4],
                "num_hidden_layers": 5,
                "rope_parameters": LLAMA3,
            }
        ),
        SEVERAL,
    ),
    "llama3_rotary": Case(
        tiny_config(
            text={
                "cross_attention_layers": [2],
                "num_key_value_heads": 4,
                "hidden_size": 64,
                "rope_parameters": LLAMA3,
            },
            vision={"intermediate_layers_indices": [2, 0], "num_global_layers": 1},
        ),
        [[40, Tiles(4, 1), 30]],
    ),
    "other_tiles": Case(
        tiny_config(
            text={"cross_attention_layers": [0, 3], "num_key_value_heads": 1, "tie_word_embeddings": True},
            vision={
                "max_num_tiles": 2,
                "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
                "image_size": 24,
                "hidden_act": "quick_gelu",
            },
        ),
        [[4, Tiles(1, 2), 5], [Tiles(1, 1), 3]],
    ),
    "text_only": Case(tiny_config(), [[7], [12], [1]]),
    "no_cross_attention": Case(tiny_config(text={"cross_attention_layers": []}), [[3, Tiles(1, 2), 5], [9]]),
}


def make_inputs(rows, config, seed):
    """The same batch on both sides."""
    return Inputs(*batches(Rows(rows), config, seed))


def one_row(theirs, row, length):
    """One row of transformers' inputs without its padding, with its own images alone."""
    out = {name: theirs[name][row : row + 1, :length] for name in ("input_ids", "attention_mask")}
    if images := int((out["input_ids"] == IMAGE_TOKEN).sum()):
        for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
            out[name] = theirs[name][row : row + 1, :images]
        out["cross_attention_mask"] = theirs["cross_attention_mask"][row : row + 1, :length, :images]
    return out


def place(name):
    """Part and role of a linear module."""
    if name == "lm_head":
        return "head", "other"
    if name == "model.multi_modal_projector":
        return "projector", "other"
    part = "vision" if name.startswith("model.vision_model.") else "language"
    return part, "mlp" if ".mlp." in name else "attention"


def before_4_52(name):
    """What checkpoints called a parameter before transformers 4.52, as the hub's mostly do."""
    name = re.sub(r"^model\.language_model\.", "language_model.model.", name)
    return re.sub(r"^lm_head\.", "language_model.lm_head.", name.removeprefix("model."))


# The behaviour of Llama 3.2 Vision's template.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}<|image|>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def reference_processor():
    """transformers' processor with small tiles."""
    tokenizer = small_tokenizer()
    names = ("start_header_id", "end_header_id", "eot_id", "image", "python_tag", "begin_of_text")
    tokens = [f"<|{name}|>" for name in names]
    tokenizer.add_special_tokens({"bos_token": tokens[-1], "additional_special_tokens": tokens[:-1]})
    return MllamaProcessor(
        MllamaImageProcessorPil(size={"height": 28, "width": 28}, max_image_tiles=4),
        tokenizer,
        chat_template=CHAT_TEMPLATE,
    )


def processor_config(processor) -> MllamaConfig:
    """A tiny model for that processor."""
    config = tiny_config(
        text={"vocab_size": len(processor.tokenizer)}, vision={"image_size": 28, "patch_size": 14}
    )
    config.image_token_index = processor.image_token_id
    return config


def conversations():
    """One image, three of which two stand together, and text alone."""
    wide, tall, small, large = (
        {"type": "image", "image": picture(*size, seed=i)}
        for i, size in enumerate([(90, 31), (20, 77), (13, 9), (150, 140)])
    )
    question, answer = {"type": "text", "text": "What is written?"}, {"type": "text", "text": "A number, 12"}
    return [
        [{"role": "user", "content": [wide, question]}],
        [
            {"role": "user", "content": [tall, question]},
            {"role": "assistant", "content": [answer]},
            {"role": "user", "content": [small, large, question]},
        ],
        [{"role": "user", "content": [question]}],
    ]


FAMILY = Description(
    model_class=MllamaForConditionalGeneration,
    cases=CASES,
    make_inputs=make_inputs,
    one_row=one_row,
    end_token=EOS,
    greedy=("one_image", "text_only"),
    eras={"before 4.52": before_4_52, "4.52 to 4.57": lambda name: name},
    place=place,
    counts=(
        Count(llama_3_2_11b_vision(), {"r": 16}, 67_174_400),
        Count(llama_3_2_11b_vision(), {"r": 16, "finetune_vision_layers": False}, 52_428_800),
    ),
    left_in_16_bit=(
        *("layers.0.mlp.down_proj", "layers.1.mlp.down_proj", "layers.1.cross_attn.k_proj"),
        *("transformer.layers.0.mlp.fc2", "global_transformer.layers.1.self_attn.q_proj"),
    ),
    processor=ProcessorCase(
        reference=reference_processor, config=processor_config, conversations=conversations
    ),
    slow=("several_images", "other_tiles", "no_cross_attention", "llama3_rotary"),
)
