"""The proof of the adapter's files: logits of the real PEFT on the real transformers model."""

import copy
import warnings

import jax
import numpy as np
import peft
import pytest

from tests.models.qwen2_5_vl_cases import Case, Visual, batches, random_torch_model, tiny_config
from vlmlora.lora.apply import add_adapters, remove_adapters
from vlmlora.lora.config import LoraConfig
from vlmlora.lora.peft_format import save_adapter
from vlmlora.lora.selection import select
from vlmlora.models.loading import load_model, read_config
from vlmlora.models.module_table import module_table
from vlmlora.nn.batch import model_inputs

ADAPTERS = {
    "full": {},
    "vision only": {"finetune_language_layers": False},
    "language only": {"finetune_vision_layers": False},
    "attention only": {"finetune_mlp_modules": False, "use_rslora": True},
    "mlp only": {"finetune_attention_modules": False},
    "one layer and the projector": {"finetune_projector": True, "layers_to_transform": [1]},
    "dora on some layers": {"use_dora": True, "layers_to_transform": [1], "lora_dropout": 0.5},
    "bias and mixed ranks": {"lora_bias": True, "rank_pattern": {"layers.1.*": 5, "blocks.0.mlp.*": 2}},
    "by name": {"target_modules": ["lm_head", "merger.mlp.0", "o_proj"], "rank_pattern": {"o_proj": 4}},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """One random model, in transformers and here, and one batch with images and without."""
    config = tiny_config()
    directory = tmp_path_factory.mktemp("base")
    torch_model = random_torch_model(config)
    torch_model.save_pretrained(directory)
    config = read_config(directory)
    module = load_model(directory, config, dtype=np.float32, quantize=None, progress=False)
    theirs, ours, valid = batches(Case([[3, Visual(1, 4, 6), 5], [9]]), config)
    del theirs["labels"]
    return torch_model, module, module_table(config), theirs, ours, valid


@jax.jit
def logits(module, inputs):
    """This library's logits."""
    return module.logits(module(**model_inputs(inputs))[0])


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize("arguments", ADAPTERS.values(), ids=ADAPTERS.keys())
def test_real_peft_computes_our_logits(base, randomise, tmp_path, arguments):
    torch_model, module, table, theirs, ours, valid = base
    config = LoraConfig(**{"r": 3, "lora_alpha": 2, **arguments})
    remove_adapters(module)
    add_adapters(module, select(table, config), config, jax.random.key(0))
    # About as large as the base's weights, so that no softmax is saturated and magnifies rounding.
    randomise(module, std=0.25)
    save_adapter(tmp_path, module, table, config)
    found = np.asarray(logits(module, ours))

    plain = torch_model(**theirs).logits.detach().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(torch_model), tmp_path)
    expected = loaded(**theirs).logits.detach().numpy()
    scale = np.abs(expected[valid]).max()
    assert np.abs(expected - plain)[valid].max() > 0.1 * scale
    # float32 on both sides, in another order of sums: measured differences are near 1e-6.
    assert np.abs(found - expected)[valid].max() <= 1e-4 * scale
