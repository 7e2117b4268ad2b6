"""A family is a folder: nothing outside of ``vlmlora/models`` knows one by name."""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest
import transformers

import vlmlora
from tests.families.description import Description
from vlmlora.data.processing import FamilyProcessor
from vlmlora.models.registry import Family, family_of, supported_model_types

LIBRARY = Path(vlmlora.__file__).parent
KERNELS = LIBRARY.parent / "kernels" / "vlmlora_kernels"
OUTSIDE = [
    path
    for path in (*LIBRARY.rglob("*.py"), *KERNELS.rglob("*.py"))
    if not path.is_relative_to(LIBRARY / "models") and not path.is_relative_to(LIBRARY / "demo")
]


def plain(name: str) -> str:
    """A name as all its spellings have it: qwen2_5_vl, Qwen2_5_VL, Qwen2_5VL."""
    return name.replace("_", "").lower()


def named_in(source: str, model_types: list[str]) -> set[str]:
    """Words of a source that begin with a family's name. Prose such as "Qwen2.5-VL" is none."""
    families = tuple(map(plain, model_types))
    return {word for word in re.findall(r"\w+", source) if plain(word).startswith(families)}


def test_the_search_finds_every_spelling():
    source = "from vlmlora.models.qwen2_5_vl import x; Qwen2_5_VLConfig; Qwen2VLProcessor; 'Qwen2.5-VL'"
    found = named_in(source, ["qwen2_5_vl", "qwen2_vl"])
    assert found == {"qwen2_5_vl", "Qwen2_5_VLConfig", "Qwen2VLProcessor"}


def test_nothing_outside_models_names_a_family():
    model_types = supported_model_types()
    assert len(OUTSIDE) > 30
    named = {
        str(path): words
        for path in OUTSIDE
        if (words := named_in(path.read_text(encoding="utf-8"), model_types))
    }
    assert not named


@pytest.mark.parametrize("model_type", supported_model_types())
def test_a_family_registers_from_its_own_folder(model_type):
    family = family_of(model_type)
    assert family.config_class.model_type == model_type
    assert Path(inspect.getfile(family.model)).parent == LIBRARY / "models" / model_type
    # transformers looks for this class when it reads a checkpoint that we wrote.
    assert hasattr(transformers, family.model.__name__)


def test_the_guide_names_all_that_a_family_gives():
    guide = (LIBRARY.parent / "docs" / "adding_a_family.md").read_text(encoding="utf-8")
    needed = {field.name for each in (Family, Description) for field in dataclasses.fields(each)}
    needed |= {name for name in vars(FamilyProcessor) if not name.startswith("_")}
    needed |= set(FamilyProcessor.__annotations__)
    assert {name for name in needed if f"`{name}`" not in guide} == set()
