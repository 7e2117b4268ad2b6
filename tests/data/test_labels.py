"""Labels against incremental rendering, and against transformers' own assistant mask."""

import numpy as np
import pytest
import transformers
from packaging.version import Version

from tests.processing.reference import CHAT_TEMPLATE, picture
from vlmlora.data.labels import response_spans
from vlmlora.data.processing import VisionLanguageProcessor
from vlmlora.models.qwen2_5_vl.processing import Qwen2_5_VLProcessor

CONVERSATIONS = {
    "one turn": [("user", "What is written?"), ("assistant", "123")],
    "system": [("system", "Read."), ("user", "What?"), ("assistant", "The number 4567.")],
    "turns": [
        ("user", "What?"),
        ("assistant", "  - one\n  - two\n"),
        ("user", "And?\n\n"),
        ("assistant", ""),
        ("user", "assistant"),
        ("assistant", " The image <|im_end|> shows a\n\n"),
    ],
    "ends with the user": [("user", "a"), ("assistant", "b"), ("user", "c")],
    "one after the other": [("user", "a"), ("assistant", "b"), ("assistant", "c")],
}
TEMPLATES = {
    "qwen": CHAT_TEMPLATE,
    "strips": "{% for m in messages %}<|im_start|>{{ m.role }}\n\n{{ m.content | trim }}<|im_end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}",
    "no generation prompt": "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}<|im_end|>"
    "{% else %}[INST]{{ m.content }}[/INST]{% endif %}{% endfor %}",
    "no end of turn": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
}


def messages_of(turns):
    return [{"role": role, "content": content} for role, content in turns]


@pytest.fixture
def processor_with(family, config):
    def make(template):
        return VisionLanguageProcessor(
            Qwen2_5_VLProcessor(family.tokenizer, family.image_processor, config, chat_template=template)
        )

    return make


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_labels_are_what_generation_would_write(processor_with, template, name):
    """Each turn's labels continue, token for token, the prompt that generation would be given."""
    processor = processor_with(TEMPLATES[template])
    tokenizer = processor.tokenizer
    messages = messages_of(CONVERSATIONS[name])
    sample = processor.encode(messages)
    text = processor.apply_chat_template(messages)
    assert sample.input_ids.tolist() == tokenizer(text)["input_ids"]
    labelled = np.zeros(len(sample), bool)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = tokenizer(processor.apply_chat_template(messages[:i], add_generation_prompt=True))
        through = processor.apply_chat_template(messages[: i + 1])
        if "<|im_end|>" in TEMPLATES[template]:
            through = through[: through.rindex("<|im_end|>") + len("<|im_end|>")]
        through = tokenizer(through)["input_ids"]
        start = len(prompt["input_ids"])
        if through[:start] != prompt["input_ids"]:
            # Answer and prompt share a token, which generation cannot write either.
            assert template == "no end of turn"
            continue
        np.testing.assert_array_equal(sample.labels[start : len(through)], through[start:])
        labelled[start : len(through)] = True
    if template != "no end of turn":
        np.testing.assert_array_equal(sample.labels != -100, labelled)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="transformers 5.17 misplaces its mask behind an expanded placeholder",
)
def test_labels_are_transformers_assistant_mask(processor_with, reference):
    """The same conversation through transformers, with a template that marks what is generated."""
    marked = CHAT_TEMPLATE.replace(
        "{% if m.content is string %}",
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{{ '\n' }}"
        "{% elif m.content is string %}",
    ).replace("<|im_end|>\n{% endfor %}", "{% if m.role != 'assistant' %}<|im_end|>\n{% endif %}{% endfor %}")
    image = {"type": "image", "image": picture(100, 77)}
    messages = [
        {"role": "user", "content": [image, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "The number 123"},
        {"role": "user", "content": [{"type": "text", "text": "And"}, image]},
        {"role": "assistant", "content": "4567\n"},
    ]
    expected = reference.apply_chat_template(
        messages,
        chat_template=marked,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids, mask = np.array(expected["input_ids"][0]), np.array(expected["assistant_masks"][0], bool)
    sample = processor_with(CHAT_TEMPLATE).encode(messages)
    np.testing.assert_array_equal(sample.input_ids, ids)
    np.testing.assert_array_equal(sample.labels, np.where(mask, ids, -100))
    assert mask.sum() > 5


def test_a_token_shared_by_prompt_and_answer_has_no_label(processor_with):
    processor = processor_with(CHAT_TEMPLATE)
    sample = processor.encode(messages_of([("user", "What?"), ("assistant", "\nThe number")]))
    text = processor.decode(sample.labels[sample.labels != -100], skip_special_tokens=False)
    assert text == "The number<|im_end|>"


def test_train_on_all_leaves_out_images_alone(processor_with, family):
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": picture(60, 60)}, {"type": "text", "text": "What?"}],
        },
        {"role": "assistant", "content": "123"},
    ]
    sample = processor_with(CHAT_TEMPLATE).encode(messages, train_on="all")
    np.testing.assert_array_equal(sample.labels == -100, family.mm_token_type_ids(sample.input_ids) > 0)


def test_templates_in_which_the_turns_cannot_be_found_are_refused(processor_with):
    rewrites = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    turns = messages_of(CONVERSATIONS["ends with the user"])
    with pytest.raises(ValueError, match=r"row 5: message 1: the chat template renders .* train_on='all'"):
        processor_with(rewrites).encode(turns, row=5)
    assert (processor_with(rewrites).encode(turns, train_on="all").labels != -100).all()
    with pytest.raises(ValueError, match="must begin with a prompt"):
        response_spans(messages_of([("assistant", "a")]), lambda messages, prompt: "", [])


def test_a_sample_without_labels_is_refused(processor_with):
    processor = processor_with(CHAT_TEMPLATE)
    with pytest.raises(ValueError, match="row 9: no token carries a label"):
        processor.encode(messages_of([("user", "a")]), row=9)
    assert (processor.encode(messages_of([("user", "a")]), labels=False).labels == -100).all()
