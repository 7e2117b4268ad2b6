"""What the parity tests need to know of a model family.

``tests/families/<model_type>.py`` holds a `Description` under the name ``FAMILY`` for every family that the
library registers; the tests beside it do the rest.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from vlmlora.models.registry import supported_model_types


@dataclass(frozen=True, eq=False)
class Inputs:
    """The same batch for transformers and for this library.

    Attributes:
        theirs: arguments of transformers' model, ``labels`` among them.
        ours: what a processor's ``collate`` gives for the same samples, padded on the right.
        valid: [batch, tokens], True where a token stands.
    """

    theirs: dict[str, torch.Tensor]
    ours: dict[str, np.ndarray]
    valid: np.ndarray


@dataclass(frozen=True, eq=False)
class Case:
    """A tiny model and what goes into it.

    Attributes:
        config: of a few thousand parameters, with at least two layers in every tower.
        rows: the rows of the batch, in whatever form the family's `make_inputs` takes.
    """

    config: PreTrainedConfig
    rows: Any


@dataclass(frozen=True, eq=False)
class Count:
    """The trained parameters of a selection on a model of known size."""

    config: PreTrainedConfig
    arguments: Mapping[str, Any]
    parameters: int


@dataclass(frozen=True, eq=False)
class ProcessorCase:
    """How the family's processor is compared with transformers'.

    Attributes:
        reference: makes transformers' processor of small parts, with Pillow's image processor.
        config: the config of a tiny model for that processor's tokens.
        conversations: messages with PIL images among them; a video is ``[frames, height, width, 3]`` bytes,
            of a size that needs no resizing, because transformers resizes videos by torchvision.
        atol: array of transformers' processor → the most by which ours may differ. All others are equal.
    """

    reference: Callable[[], ProcessorMixin]
    config: Callable[[ProcessorMixin], PreTrainedConfig]
    conversations: Callable[[], list[list[dict[str, Any]]]]
    atol: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Description:
    """A family, as the parity tests see it.

    Attributes:
        model_class: transformers' class.
        cases: tiny models by name. The first is untied and has images; tests that need one model take it.
        make_inputs: ``make_inputs(rows, config, seed)``.
        one_row: ``one_row(theirs, row, length)`` takes one row out of transformers' arguments, without
            padding and labels, for its ``generate``.
        end_token: ends a row in generation, and pads it.
        greedy: cases on which generated tokens are compared.
        eras: version of transformers → what its checkpoints call a parameter of today's name.
        place: today's name of a linear module → its part and role.
        counts: selections whose number of parameters is known.
        left_in_16_bit: endings of module names; a checkpoint in NF4 that leaves them as they are has
            quantised layers and others within one stack.
        check: ``check(torch_model, inputs)`` asserts more about a batch (positions, for instance).
        pack: ``pack(inputs)`` puts the samples of a batch into one row, with ``segment_ids``; None where the
            family cannot.
        processor: None where the processor's own tests compare it.
        slow: cases that only the slow tests run, and files of tests that only they run for this family.
    """

    model_class: type[PreTrainedModel]
    cases: Mapping[str, Case]
    make_inputs: Callable[[Any, PreTrainedConfig, int], Inputs]
    one_row: Callable[[Mapping[str, torch.Tensor], int, int], dict[str, torch.Tensor]]
    end_token: int
    greedy: tuple[str, ...]
    eras: Mapping[str, Callable[[str], str]]
    place: Callable[[str], tuple[str, str]]
    counts: tuple[Count, ...]
    left_in_16_bit: tuple[str, ...]
    check: Callable[[PreTrainedModel, Inputs], None] | None = None
    pack: Callable[[Inputs], dict[str, np.ndarray]] | None = None
    processor: ProcessorCase | None = None
    slow: tuple[str, ...] = ()

    @property
    def first(self) -> Case:
        """The case of tests that need one model."""
        return next(iter(self.cases.values()))

    def random_model(self, config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
        """transformers' model in float32, every parameter random: norms, biases and gates too."""
        return random_torch_model(self.model_class, config, seed)


def random_torch_model(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, seed: int = 0
) -> PreTrainedModel:
    """A model of transformers in float32, every parameter random."""
    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter) * 0.1
            if parameter.numel() == 1:
                # A gate, often zero at first, which would hide what it gates.
                parameter.copy_(0.5 + noise)
            else:
                parameter.copy_(noise if parameter.ndim > 1 else parameter + noise)
    return model


@cache
def descriptions() -> dict[str, Description]:
    """The description of every registered family that has one."""
    folder = Path(__file__).parent
    return {
        name: importlib.import_module(f"tests.families.{name}").FAMILY
        for name in supported_model_types()
        if (folder / f"{name}.py").exists()
    }
