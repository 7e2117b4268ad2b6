"""The door, on the bundled model: what a user does, and the ways in which it goes wrong."""

import inspect
import json
import subprocess
import sys

import jax
import numpy as np
import optax
import peft
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import Qwen2_5_VLForConditionalGeneration
from typer.testing import CliRunner

from vlmlora import FastVisionModel, adamw, init_train_state, make_loss_fn, make_train_step
from vlmlora.cli import app
from vlmlora.demo.handwriting import bundled_model
from vlmlora.nn.batch import model_inputs


def picture(text):
    """Printed text as the bundled model knows it."""
    image = Image.new("RGB", (96, 32), "white")
    ImageDraw.Draw(image).text((6, 2), text, fill="black", font=ImageFont.load_default(24))
    return image


def conversation(text, *, answer=True):
    content = [{"type": "image", "image": picture(text)}, {"type": "text", "text": "Read the text."}]
    turns = [{"role": "user", "content": content}]
    return turns + [{"role": "assistant", "content": text}] * answer


@pytest.fixture(scope="module")
def loaded():
    """The bundled model in float32, untouched."""
    return FastVisionModel.from_pretrained(bundled_model(), load_in_16bit=True, progress=False)


@pytest.fixture
def fresh():
    """The bundled model in NF4, to be adapted by one test."""
    return FastVisionModel.from_pretrained(bundled_model(), progress=False)[0]


def prompts(processor, *texts):
    return processor.collate(
        [
            processor.encode(conversation(text, answer=False), labels=False, add_generation_prompt=True)
            for text in texts
        ]
    )


@jax.jit
def compute_logits(module, batch):
    return module.logits(module(**model_inputs(batch))[0])


def test_it_reads_what_transformers_reads(loaded):
    model, processor = loaded
    batch = prompts(processor, "2048", "Harbour", "73")
    tokens = model.generate(batch, max_new_tokens=10)
    answers = [answer.strip() for answer in processor.batch_decode(tokens)]
    assert answers[0] == "2048"
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(bundled_model(), dtype=torch.float32)
    for text, row in zip(("2048", "Harbour", "73"), np.asarray(tokens), strict=True):
        sample = processor.encode(conversation(text, answer=False), labels=False, add_generation_prompt=True)
        ids = torch.tensor(sample.input_ids[None].astype(np.int64))
        expected = theirs.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == model.config.image_token_id).int(),
            pixel_values=torch.tensor(sample.images[0].pixel_values),
            image_grid_thw=torch.tensor(np.array([sample.images[0].grid_thw])),
            max_new_tokens=10,
            do_sample=False,
        )[0, ids.shape[1] :]
        np.testing.assert_array_equal(row[: len(expected)], expected)


def test_train_save_and_load_again(fresh, tmp_path, capsys):
    model = FastVisionModel.get_peft_model(fresh, r=4, lora_alpha=8)
    assert "LoRA adapters" in capsys.readouterr().out
    model.print_trainable_parameters()
    printed = capsys.readouterr().out

    _, processor = FastVisionModel.from_pretrained(bundled_model(), progress=False)
    batch = processor.collate([processor.encode(conversation(text)) for text in ("12", "907")])
    graphdef, adapters, frozen = model.split()
    optimizer = adamw(1e-2, total_steps=4, warmup_steps=1)
    step = make_train_step(make_loss_fn(graphdef, gradient_checkpointing="unsloth"), optimizer)
    state = init_train_state(adapters, optimizer)
    for _ in range(3):
        state, _ = step(state, frozen, batch)
    model.update(state.adapters)
    model.save_pretrained(tmp_path / "adapter")

    again, _ = FastVisionModel.from_pretrained(tmp_path / "adapter", progress=False)
    before = FastVisionModel.from_pretrained(bundled_model(), progress=False)[0]
    logits = [np.asarray(compute_logits(m.module, batch)) for m in (model, again, before)]
    np.testing.assert_array_equal(logits[0], logits[1])
    assert np.abs(logits[0] - logits[2]).max() > 0.1
    assert again.lora_config.r == 4

    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(bundled_model(), dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    trainable, total = theirs.get_nb_trainable_parameters()
    assert f"trainable params: {trainable:,} || all params: {total:,} ||" in printed


def test_adapters_given_away_are_missed_until_they_come_back(fresh, tmp_path):
    model = FastVisionModel.get_peft_model(fresh, r=4)
    processor = FastVisionModel.from_pretrained(bundled_model(), progress=False)[1]
    batch = processor.collate([processor.encode(conversation("12"))])
    graphdef, adapters, frozen = model.split()
    optimizer = optax.sgd(0.1)
    step = make_train_step(make_loss_fn(graphdef), optimizer)
    copied, _ = step(init_train_state(adapters, optimizer), frozen, batch)
    state, _ = step(init_train_state(adapters, optimizer, donate=True), frozen, batch)
    jax.tree.map(np.testing.assert_array_equal, state.adapters, copied.adapters)

    missing = pytest.raises(RuntimeError, match=r"call model\.update\(state\.adapters\)")
    for use in (
        model.split,
        model.merge_and_unload,
        lambda: model.generate(batch),
        lambda: model.set_adapter("default"),
        lambda: FastVisionModel.get_peft_model(model, adapter_name="other"),
        lambda: model.add_weighted_adapter(["default"], [1.0], "sum"),
        lambda: model.save_pretrained(tmp_path / "adapter"),
        lambda: model.save_pretrained_merged(tmp_path / "merged"),
    ):
        with missing:
            use()
    assert not list(tmp_path.iterdir())
    model.update(state.adapters)
    model.save_pretrained(tmp_path / "adapter")
    jax.tree.map(np.testing.assert_array_equal, model.split()[1], copied.adapters)


def test_full_fine_tuning_leaves_a_checkpoint_that_transformers_loads(tmp_path):
    model, processor = FastVisionModel.from_pretrained(bundled_model(), full_finetuning=True, progress=False)
    with pytest.raises(ValueError, match="full_finetuning=True"):
        FastVisionModel.get_peft_model(model)
    _, parameters, frozen = model.split()
    assert not jax.tree.leaves(frozen)
    model.update(jax.tree.map(lambda a: a * 1.5, parameters))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    theirs, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    original = Qwen2_5_VLForConditionalGeneration.from_pretrained(bundled_model(), dtype=torch.float32)
    for found, expected in zip(theirs.parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(found, expected * 1.5, rtol=1e-6, atol=0)


def test_names_order_and_defaults_are_unsloths():
    parameters = inspect.signature(FastVisionModel.get_peft_model).parameters
    shared = {name: p.default for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert list(shared)[:10] == [
        *("model", "r", "target_modules", "lora_alpha", "lora_dropout", "bias"),
        *("finetune_vision_layers", "finetune_language_layers"),
        *("finetune_attention_modules", "finetune_mlp_modules"),
    ]
    assert shared["r"] == shared["lora_alpha"] == 16
    assert shared["random_state"] == 3407
    assert shared["use_gradient_checkpointing"] == "unsloth"
    load = inspect.signature(FastVisionModel.from_pretrained).parameters
    assert load["max_seq_length"].default == 2048
    assert repr(load["load_in_4bit"].default) == "True"


UNSLOTHS_DEFAULTS = {
    "max_seq_length": 2048,
    "qat_scheme": None,
    "finetune_audio_layers": False,
    "offload_layers": None,
    "checkpoint_skip_layers": 0,
}
"""Of the arguments of its `get_peft_model` (2026.10.9) that have nothing to do here."""


def test_arguments_that_only_unsloth_has_may_ask_for_nothing(fresh):
    arguments = {**UNSLOTHS_DEFAULTS, "temporary_location": "anywhere"}
    model = FastVisionModel.get_peft_model(fresh, r=2, verbose=False, **arguments)
    assert model.lora_config.r == 2
    model.delete_adapter("default")
    for name, default in UNSLOTHS_DEFAULTS.items():
        value = 4096 if name == "max_seq_length" else "other"
        with pytest.raises(ValueError, match=f"{name}={value!r}, and only {default!r} is supported: "):
            FastVisionModel.get_peft_model(model, **{name: value})
    assert not model.adapters


def test_wrong_arguments_are_refused_before_anything_is_built(fresh, tmp_path):
    with pytest.raises(TypeError, match="did you mean 'lora_alpha'"):
        FastVisionModel.get_peft_model(fresh, lora_alfa=16)
    with pytest.raises(TypeError, match="did you mean 'load_in_4bit'"):
        FastVisionModel.from_pretrained(bundled_model(), load_in_4bits=True)
    with pytest.raises(ValueError, match=r"load_in_4bit.*load_in_8bit"):
        FastVisionModel.from_pretrained(bundled_model(), load_in_4bit=True, load_in_8bit=True)
    with pytest.raises(NotImplementedError, match=r"target_parameters=.*mixture-of-experts"):
        FastVisionModel.get_peft_model(fresh, target_parameters=["experts.down_proj"])
    with pytest.raises(ValueError, match="use_gradient_checkpointing='all'"):
        FastVisionModel.get_peft_model(fresh, use_gradient_checkpointing="all")
    for dtype in ("int8", "bf17"):
        with pytest.raises(ValueError, match=f"dtype='{dtype}': it must be one of bfloat16, float16"):
            FastVisionModel.from_pretrained(bundled_model(), dtype=dtype)
    with pytest.raises(ValueError, match="max_seq_length=0"):
        FastVisionModel.from_pretrained(bundled_model(), max_seq_length=0)
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        fresh.generate({}, max_new_tokens=0)
    with pytest.raises(ValueError, match="the batch lacks input_ids and attention_mask"):
        fresh.generate({})
    with pytest.raises(ValueError, match="no adapter to save"):
        fresh.save_pretrained(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    assert fresh.lora_config is None


def test_an_adapter_without_its_base_says_where_to_name_it(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(ValueError, match="base_model_name_or_path"):
        FastVisionModel.from_pretrained(tmp_path)


def test_training_and_inference_modes(loaded):
    model, _ = loaded
    assert FastVisionModel.for_inference(model).training is False
    assert FastVisionModel.for_training(model, use_gradient_checkpointing=False).training is True
    assert model.use_gradient_checkpointing is False
    with pytest.raises(ValueError, match="'everything'"):
        FastVisionModel.for_training(model, use_gradient_checkpointing="everything")


@pytest.mark.parametrize("code", ["import vlmlora", "import vlmlora.fast_vision_model"])
def test_importing_prints_nothing(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_the_command_line_says_what_is_wrong_without_a_traceback(tmp_path):
    file = tmp_path / "file"
    file.write_text("kept")
    result = CliRunner().invoke(app, ["demo", "--out", str(file)])
    assert result.exit_code == 1
    assert result.stderr.strip() == f"vlmlora demo: {file} is a file; the demonstration writes a folder"
    assert file.read_text() == "kept"


def test_help_imports_neither_jax_nor_transformers():
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom vlmlora.cli import app\n"
        "result = CliRunner().invoke(app, ['--help'])\nassert result.exit_code == 0, result.output\n"
        "assert 'demo' in result.output\nassert not {'jax', 'flax', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
