"""Write a bfloat16 checkpoint of a known model's shape with random weights, and a processor for it.

    python -m benchmarks.random_checkpoint DIRECTORY [--model qwen2_5_vl-7b]

The tokenizer knows bytes and the family's special tokens, whose numbers the config is given, so that every
library that reads a checkpoint with its processor reads this one. Without torchvision, which transformers'
processors need, there is only the tokenizer.
"""

import argparse
import importlib.util
import json
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from safetensors.numpy import save_file
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from benchmarks.shapes import CONFIGS, make_config
from vlmlora.models.module_table import layer_names
from vlmlora.models.registry import family_of
from vlmlora.quantization.weights import DenseWeight

SHARD_BYTES = 4 << 30
ARCHITECTURES = {
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "mllama": "MllamaForConditionalGeneration",
}
QWEN_TOKENS = {
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}
MLLAMA_TOKENS = {"image_token_index": "<|image|>"}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write(directory: Path, config: PreTrainedConfig) -> int:
    """Write processor, config.json, shards and index; returns the number of the weights' bytes.

    The numbers of special tokens in `config` become the tokenizer's.
    """
    directory.mkdir(parents=True, exist_ok=True)
    write_processor(directory, config)
    # As torch-based libraries write them, and some want them.
    config.architectures, config.dtype = [ARCHITECTURES[config.model_type]], "bfloat16"
    config.save_pretrained(directory)
    noise = (np.random.default_rng(0).standard_normal(1 << 24, np.float32) * 0.02).astype(ml_dtypes.bfloat16)
    shards, shard, size, total = [], {}, 0, 0
    module = family_of(config).model(config, dtype=jnp.bfloat16)
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        value = variable.get_value()
        value = value.value if isinstance(value, DenseWeight) else value
        for layer, name in layer_names(module, ".".join(map(str, path))):
            shape = value.shape if layer is None else value.shape[1:]
            shard[name] = _fill(variable.get_metadata("init"), shape, noise)
            size += 2 * int(np.prod(shape))
            if size >= SHARD_BYTES:
                shards.append(_write_shard(directory, len(shards), shard))
                total, shard, size = total + size, {}, 0
    if shard:
        shards.append(_write_shard(directory, len(shards), shard))
        total += size
    weight_map = {name: file for file, names in shards for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def write_processor(directory: Path, config: PreTrainedConfig) -> None:
    """Write a tokenizer, and a processor if torchvision is there; give `config` the numbers of its tokens."""
    is_mllama = config.model_type == "mllama"
    named = MLLAMA_TOKENS if is_mllama else QWEN_TOKENS
    tokenizer = _tokenizer([*named.values(), "<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    image = "<|image|>" if is_mllama else "<|vision_start|><|image_pad|><|vision_end|>"
    tokenizer.chat_template = CHAT_TEMPLATE.replace("IMAGE", image)
    for name, token in named.items():
        setattr(config, name, tokenizer.convert_tokens_to_ids(token))
    text = config.text_config
    text.bos_token_id = text.pad_token_id = tokenizer.pad_token_id
    text.eos_token_id = tokenizer.eos_token_id
    if importlib.util.find_spec("torchvision") is None:
        print("no processor is written, only its tokenizer: torchvision is not installed")
        tokenizer.save_pretrained(directory)
    elif is_mllama:
        _mllama_processor(config, tokenizer).save_pretrained(directory)
    else:
        _qwen_processor(config, tokenizer).save_pretrained(directory)


def _tokenizer(special: list[str]) -> PreTrainedTokenizerFast:
    """Bytes are numbers 0 to 255, special tokens those that follow."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={byte: n for n, byte in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=special,
    )


def _qwen_processor(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast):
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=tokenizer.chat_template,
    )


def _mllama_processor(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast):
    from transformers import MllamaImageProcessor, MllamaProcessor

    vision = config.vision_config
    side = {"height": vision.image_size, "width": vision.image_size}
    # Read by the processor, which has no argument for them.
    tokenizer.image_token, tokenizer.image_token_id = "<|image|>", config.image_token_index
    return MllamaProcessor(
        image_processor=MllamaImageProcessor(size=side, max_image_tiles=vision.max_num_tiles),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )


def _fill(init: str, shape: tuple[int, ...], noise: np.ndarray) -> np.ndarray:
    if init == "normal":
        return np.resize(noise, shape)
    return np.full(shape, {"zeros": 0, "ones": 1}[init], ml_dtypes.bfloat16)


def _write_shard(directory: Path, number: int, tensors: dict[str, np.ndarray]) -> tuple[str, list[str]]:
    file = f"model-{number:05}.safetensors"
    # Torch-based libraries refuse a file that does not say so.
    save_file(tensors, directory / file, metadata={"format": "pt"})
    return file, list(tensors)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--model", choices=CONFIGS, default="qwen2_5_vl-7b")
    parser.add_argument("--layers", type=int, help="of the language model; all if left out")
    parser.add_argument("--vision-layers", type=int, help="of the vision tower; all if left out")
    parser.add_argument("--shrink", type=int, default=1, help="divides every width")
    arguments = parser.parse_args()
    made = make_config(
        arguments.model,
        layers=arguments.layers,
        vision_layers=arguments.vision_layers,
        shrink=arguments.shrink,
    )
    print(f"{write(arguments.directory, made) / 1e9:.1f} GB in {arguments.directory}")
