import pytest

from vlmlora.lora.config import LoraConfig, reject_unknown_arguments


@pytest.mark.parametrize(
    "arguments",
    [
        {"r": 0},
        {"r": True},
        {"lora_alpha": 0},
        {"lora_alpha": float("nan")},
        {"lora_dropout": 1.0},
        {"lora_dropout": -0.1},
        {"lora_dropout": float("nan")},
        {"bias": "some"},
        {"init_lora_weights": "guassian"},
        {"task_type": "SEQ_CLS"},
        {"target_modules": []},
        {"target_modules": ["q_proj", ""]},
        {"target_modules": "("},
        {"exclude_modules": []},
        {"layers_to_transform": []},
        {"layers_to_transform": [-1]},
        {"layers_to_transform": [True]},
        {"layers_pattern": "layers"},
        {"finetune_last_n_layers": 0},
        {"finetune_last_n_layers": 1, "layers_to_transform": 0},
        {"rank_pattern": {"q_proj": 0}},
        {"rank_pattern": {"(": 8}},
        {"alpha_pattern": {"q_proj": -1}},
        {"loftq_config": {"loftq_bits": 4}},
        {"loftq_config": {"loftq_bits": 2}, "init_lora_weights": "loftq"},
        {"loftq_config": {"loftq_iter": 0}, "init_lora_weights": "loftq"},
        {"eva_config": {"rho": 1.5}},
        {"eva_config": {"rho": 0.5}, "init_lora_weights": "eva"},
        {"eva_config": {"tau": 1.5}, "init_lora_weights": "eva"},
        {"init_lora_weights": "orthogonal", "r": 3},
        {"rank_pattern": {"q_proj": 3}, "init_lora_weights": "orthogonal"},
        {"lora_bias": True, "use_dora": True},
        {"lora_bias": True, "init_lora_weights": "gaussian"},
        {"modules_to_save": ["("]},
        {"modules_to_save": ["lm_head", ""]},
        {"trainable_token_indices": []},
        {"trainable_token_indices": {}},
        {"trainable_token_indices": [3, 3]},
        {"trainable_token_indices": [-1]},
    ],
)
def test_refuses_a_wrong_value_and_names_it(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        LoraConfig(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"target_parameters": ["experts.down_proj"]},
    ],
)
def test_an_unsupported_argument_fails_by_name_and_value(arguments):
    (name, value), *_ = arguments.items()
    with pytest.raises(NotImplementedError) as error:
        LoraConfig(**arguments)
    assert name in str(error.value)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("empty", [None, {}])
def test_unsloths_empty_defaults_are_accepted(empty):
    LoraConfig(loftq_config=empty, modules_to_save=None, target_parameters=None, ensure_weight_tying=False)


def test_a_misspelt_argument_names_the_nearest():
    with pytest.raises(TypeError, match=r"'finetune_vision_layer'; did you mean 'finetune_vision_layers'"):
        LoraConfig.from_arguments({"finetune_vision_layer": True})
    with pytest.raises(TypeError, match=r"get_peft_model has no argument 'zzz'; it takes r, lora_alpha"):
        reject_unknown_arguments(["zzz"], ["r", "lora_alpha"], caller="get_peft_model")
    assert LoraConfig.from_arguments({"r": 8}).r == 8


def test_peft_task_type_is_accepted():
    from peft import TaskType

    assert LoraConfig(task_type=TaskType.CAUSAL_LM).task_type == "CAUSAL_LM"


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize(
    ("rank_pattern", "alpha_pattern"),
    [
        ({}, {}),
        ({"q_proj": 4}, {"self_attn.q_proj": 7, "q_proj": 9}),
        ({"^model.layers.1.self_attn.q_proj": 2}, {r"layers\.\d+\..*": 3}),
        ({"proj": 2}, {"roj": 3}),
    ],
)
def test_rank_alpha_and_scaling_equal_peft(use_rslora, rank_pattern, alpha_pattern):
    import peft
    import torch

    class Tower(torch.nn.Module):
        def __init__(self):
            super().__init__()
            attention = [
                torch.nn.ModuleDict({leaf: torch.nn.Linear(4, 4) for leaf in ("q_proj", "o_proj")})
                for _ in range(2)
            ]
            layers = torch.nn.ModuleList([torch.nn.ModuleDict({"self_attn": each}) for each in attention])
            self.model = torch.nn.ModuleDict({"layers": layers})

    shared = {
        "r": 8,
        "lora_alpha": 20,
        "target_modules": ["q_proj", "o_proj"],
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "use_rslora": use_rslora,
    }
    config = LoraConfig(**shared)
    oracle = peft.get_peft_model(Tower(), peft.LoraConfig(**shared)).base_model.model
    for name, module in oracle.named_modules():
        if hasattr(module, "lora_A"):
            assert config.rank_of(name) == module.r["default"]
            assert config.scaling_of(name) == pytest.approx(module.scaling["default"], rel=1e-12)
