"""Unsloth's load arguments → one way of loading."""

import pytest

from vlmlora.models.loading import IMPLIED_TRUE, resolve_load_mode


@pytest.mark.parametrize(
    ("arguments", "mode"),
    [
        ({}, "nf4"),
        ({"load_in_4bit": True}, "nf4"),
        ({"load_in_4bit": False}, None),
        ({"load_in_8bit": True}, "int8"),
        ({"load_in_8bit": True, "load_in_4bit": False}, "int8"),
        ({"load_in_16bit": True}, None),
        ({"full_finetuning": True}, None),
        ({"full_finetuning": True, "load_in_16bit": True}, None),
        ({"full_finetuning": True, "load_in_4bit": False}, None),
        ({"load_in_4bit": IMPLIED_TRUE, "load_in_8bit": True}, "int8"),
    ],
)
def test_mode(arguments, mode):
    assert resolve_load_mode(**arguments) == mode


@pytest.mark.parametrize(
    "names",
    [
        ("load_in_4bit", "load_in_8bit"),
        ("load_in_4bit", "load_in_16bit"),
        ("load_in_8bit", "load_in_16bit"),
        ("load_in_4bit", "full_finetuning"),
        ("load_in_8bit", "full_finetuning"),
    ],
)
def test_two_modes_at_once(names):
    with pytest.raises(ValueError, match=f"{names[0]}=True and {names[1]}=True"):
        resolve_load_mode(**dict.fromkeys(names, True))


def test_the_default_reads_as_true():
    assert repr(IMPLIED_TRUE) == "True"
    assert IMPLIED_TRUE
