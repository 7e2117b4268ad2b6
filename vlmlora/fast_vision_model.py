"""The door that Unsloth users know: load a model, choose what learns, save the adapter."""

import copy
import functools
import inspect
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Int, PyTree
from rich.console import Console
from transformers import PreTrainedConfig

from vlmlora.compilation_cache import enable_compilation_cache
from vlmlora.data.processing import VisionLanguageProcessor
from vlmlora.distributed import attach_mesh, parameter_shardings, place_trainable
from vlmlora.generation.greedy import greedy_decode
from vlmlora.lora.adapters import DEFAULT, AdapterSet, weighted_adapter
from vlmlora.lora.apply import add_adapters, trainable_parameters
from vlmlora.lora.config import EvaConfig, LoraConfig, reject_unknown_arguments
from vlmlora.lora.merge import dtype_of_16_bit, merge_adapters, save_merged, untie, unties_head
from vlmlora.lora.peft_format import base_of_adapter, load_adapter_into, read_adapter_config, save_adapter
from vlmlora.lora.selection import select
from vlmlora.lora.trained import BaseModel, attach_trained, plan_trained, trained_parts
from vlmlora.models.hub import copy_processor_files, resolve, upload
from vlmlora.models.loading import IMPLIED_TRUE, check_dtype, load_model, read_config, resolve_load_mode
from vlmlora.models.module_table import ModuleTable, module_table
from vlmlora.models.registry import family_of
from vlmlora.models.saving import save_checkpoint
from vlmlora.multi_process import on_first_process, with_whole_adapters
from vlmlora.nn.variables import Trainable
from vlmlora.training.remat import GradientCheckpointing, policy_by_part


class FastVisionModel:
    """A loaded vision-language model, and the functions that Unsloth's class of this name has.

    Make one with `from_pretrained`; `split` gives the pieces of a functional training loop.

    Attributes:
        module: the Flax module.
        config: transformers' config.
        adapters: the adapters' arguments, by name.
        active_adapter: name of the adapter that the model computes with and trains; None without one.
        lora_config: the active adapter's arguments; None without one.
        use_gradient_checkpointing: the policy, for `vlmlora.training.loss.make_loss_fn`.
        max_seq_length: tokens a row may have.
        directory: where the base's files lie; None for a model that came from none.
        full_finetuning: whether every parameter is trainable.

    Example:
        >>> model, processor = FastVisionModel.from_pretrained("unsloth/Qwen2.5-VL-7B-Instruct-bnb-4bit")
        ... # doctest: +SKIP
        >>> model = FastVisionModel.get_peft_model(model, r=16)  # doctest: +SKIP
        >>> graphdef, adapters, frozen = model.split()  # doctest: +SKIP
    """

    def __init__(
        self,
        module: nnx.Module,
        config: PreTrainedConfig,
        *,
        name_or_path: str,
        revision: str | None = None,
        directory: Path | None = None,
        eos_token_ids: tuple[int, ...] = (),
        pad_token_id: int = 0,
        max_seq_length: int = 2048,
        use_gradient_checkpointing: GradientCheckpointing = "unsloth",
        full_finetuning: bool = False,
    ):
        self.module = module
        self.config = config
        self.name_or_path = name_or_path
        self.revision = revision
        self.directory = directory
        self.eos_token_ids = eos_token_ids
        self.pad_token_id = pad_token_id
        self.max_seq_length = max_seq_length
        self.use_gradient_checkpointing = use_gradient_checkpointing
        self.full_finetuning = full_finetuning
        self.training = True
        self._adapters = AdapterSet(module)

    def __repr__(self) -> str:
        names = [f"{name} (active)" if name == self.active_adapter else name for name in self.adapters]
        return f"{type(self).__name__}({self.name_or_path!r}, adapters=[{', '.join(names)}])"

    @property
    def adapters(self) -> Mapping[str, LoraConfig]:
        """The adapters' arguments, by name."""
        return MappingProxyType(self._adapters.configs)

    @property
    def active_adapter(self) -> str | None:
        """Name of the adapter that the model computes with and trains."""
        return self._adapters.active

    @property
    def lora_config(self) -> LoraConfig | None:
        """The active adapter's arguments."""
        return None if self.active_adapter is None else self.adapters[self.active_adapter]

    @lora_config.setter
    def lora_config(self, config: LoraConfig | None) -> None:
        if config is None:
            self._adapters.forget()
        else:
            self._adapters.active = self.active_adapter or DEFAULT
            self._adapters.configs[self.active_adapter] = config

    @staticmethod
    def from_pretrained(
        model_name: str | PathLike[str],
        *,
        max_seq_length: int = 2048,
        dtype: DTypeLike | None = None,
        load_in_4bit: bool = IMPLIED_TRUE,
        load_in_8bit: bool = False,
        load_in_16bit: bool = False,
        full_finetuning: bool = False,
        token: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        use_gradient_checkpointing: GradientCheckpointing = "unsloth",
        random_state: int = 3407,
        progress: bool = True,
        mesh: Mesh | None = None,
        **unknown: Any,
    ) -> tuple["FastVisionModel", VisionLanguageProcessor]:
        """Load a model and its processor from a directory or a hub repository.

        On a GPU, what JAX compiles from here on is kept for the next run, see
        `vlmlora.compilation_cache.enable_compilation_cache`.

        Args:
            model_name: a directory or repository with ``config.json`` and safetensors, in 16 or 32 bit or
                quantised by bitsandbytes; or a PEFT adapter, whose base is loaded with it.
            max_seq_length: tokens that a row of a batch may have.
            dtype: type of the computation and of the weights that are not quantised. None: bfloat16, or
                float32 where the device is a CPU, which has no fast bfloat16.
            load_in_4bit: quantise a 16-bit checkpoint to NF4 while loading, as bitsandbytes does. What the
                checkpoint stores quantised is loaded as it is stored.
            load_in_8bit: quantise to INT8 instead.
            load_in_16bit: do not quantise.
            full_finetuning: make every parameter trainable; nothing is quantised.
            token: for private repositories.
            revision: branch, tag or commit of the repository.
            local_files_only: use what is in the cache already.
            use_gradient_checkpointing: a policy, see `vlmlora.training.remat.tower_remats`; or ``"auto"``.
            random_state: Unsloth has it here too; loading draws nothing at random.
            progress: show a bar with bytes and rate.
            mesh: many devices, from `vlmlora.distributed.make_mesh`. Each reads its part of the checkpoint,
                and the adapters that the model gets are cut as well.
            unknown: refused.

        Returns:
            The model and its processor.

        Raises:
            TypeError: unknown argument; the message names the nearest.
            ValueError: two load modes at once, a `dtype` or `max_seq_length` that cannot be, an unsupported
                model, or a checkpoint that does not fit its config; every tensor concerned is named.
            FileNotFoundError: no such directory or repository, or no network and nothing in the cache.
        """
        _reject_unknown(FastVisionModel.from_pretrained, unknown)
        policy_by_part(use_gradient_checkpointing)
        dtype = check_dtype(default_dtype() if dtype is None else dtype)
        enable_compilation_cache()
        quantize = resolve_load_mode(
            load_in_4bit=load_in_4bit,
            load_in_8bit=load_in_8bit,
            load_in_16bit=load_in_16bit,
            full_finetuning=full_finetuning,
        )
        hub = {"token": token, "local_files_only": local_files_only}
        directory = resolve(model_name, revision=revision, **hub)
        adapter, base, base_revision = None, str(model_name), revision
        if (directory / "adapter_config.json").exists() and not (directory / "config.json").exists():
            adapter, (base, base_revision) = directory, base_of_adapter(directory)
            directory = resolve(base, revision=base_revision, **hub)

        config = read_config(directory)
        processor = VisionLanguageProcessor(
            family_of(config).processor(directory, config), max_seq_length=max_seq_length
        )
        family, shardings = family_of(config), None
        if mesh is not None:
            shardings = parameter_shardings(family.model(config, dtype=dtype), family, mesh)
        module = load_model(
            directory,
            config,
            dtype=dtype,
            quantize=quantize,
            trainable=full_finetuning,
            progress=progress,
            shardings=shardings,
        )
        if mesh is not None:
            attach_mesh(module, mesh)
        model = FastVisionModel(
            module,
            config,
            name_or_path=base,
            revision=base_revision,
            directory=directory,
            eos_token_ids=_eos_token_ids(directory, config, processor),
            pad_token_id=processor.tokenizer.pad_token_id or 0,
            max_seq_length=max_seq_length,
            use_gradient_checkpointing=use_gradient_checkpointing,
            full_finetuning=full_finetuning,
        )
        if adapter is not None:
            model._adapters.add(DEFAULT, lambda: load_adapter_into(module, model.module_table, adapter))
            _place_on_mesh(module)
        return model, processor

    @staticmethod
    def get_peft_model(
        model: "FastVisionModel",
        r: int = 16,
        target_modules: str | Sequence[str] | None = None,
        lora_alpha: int | float = 16,
        lora_dropout: float = 0.0,
        bias: str = "none",
        finetune_vision_layers: bool = True,
        finetune_language_layers: bool = True,
        finetune_attention_modules: bool = True,
        finetune_mlp_modules: bool = True,
        finetune_last_n_layers: int | None = None,
        layers_to_transform: int | Sequence[int] | None = None,
        layers_pattern: str | Sequence[str] | None = None,
        use_gradient_checkpointing: GradientCheckpointing = "unsloth",
        random_state: int = 3407,
        use_rslora: bool = False,
        modules_to_save: str | Sequence[str] | None = None,
        init_lora_weights: bool | str = True,
        loftq_config: Mapping[str, Any] | None = None,
        task_type: str | None = "CAUSAL_LM",
        target_parameters: Sequence[str] | None = None,
        ensure_weight_tying: bool = False,
        *,
        finetune_projector: bool = False,
        use_dora: bool = False,
        rank_pattern: Mapping[str, int] | None = None,
        alpha_pattern: Mapping[str, int | float] | None = None,
        exclude_modules: str | Sequence[str] | None = None,
        lora_bias: bool = False,
        eva_config: EvaConfig | Mapping[str, Any] | None = None,
        trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
        adapter_name: str = DEFAULT,
        verbose: bool = True,
        **unknown: Any,
    ) -> "FastVisionModel":
        """Put LoRA adapters on the chosen modules, in place, and show the choice as a table.

        With another `adapter_name` the model gets another adapter, which becomes the active one.

        The arguments and their defaults are Unsloth's and PEFT's; `vlmlora.lora.config.LoraConfig` explains
        each, and `vlmlora.lora.selection.select` how modules are chosen. After ``init_lora_weights="eva"``
        call `vlmlora.lora.eva.initialize_lora_eva_weights`, which looks at data, before training.

        Args:
            model: from `from_pretrained`.
            use_gradient_checkpointing: a policy, see `vlmlora.training.remat.tower_remats`; or ``"auto"``.
            random_state: seed of the adapters' initial values; touches no other generator.
            adapter_name: name of the adapter; see `set_adapter`.
            verbose: print the table of selected modules.
            unknown: refused, but for arguments of Unsloth's that ask for nothing.

        Returns:
            The same model.

        Raises:
            TypeError: unknown argument; the message names the nearest.
            ValueError: the arguments contradict each other or the model, or it has an adapter of this name.
            NotImplementedError: an argument that is not supported yet.
            RuntimeError: the active adapter's parameters are gone, see `update`.
        """
        arguments = {k: v for k, v in locals().items() if k in LoraConfig.__dataclass_fields__}
        _reject_unknown(FastVisionModel.get_peft_model, _without_unsloths_own(unknown, model.max_seq_length))
        model._check_is_whole()
        policy_by_part(use_gradient_checkpointing)
        if model.full_finetuning:
            raise ValueError(
                "the model was loaded with full_finetuning=True, which trains every parameter; "
                "load it without to train an adapter"
            )
        arguments |= {"rank_pattern": rank_pattern or {}, "alpha_pattern": alpha_pattern or {}}
        config = LoraConfig(**arguments, base_model_name_or_path=model.name_or_path, revision=model.revision)
        selection = select(model.module_table, config)
        parts = plan_trained(BaseModel.of(model.module), config, selection.names)

        def build() -> LoraConfig:
            add_adapters(model.module, selection, config, jax.random.key(random_state))
            attach_trained(model.module, parts)
            return config

        model._adapters.add(adapter_name, build, config)
        _place_on_mesh(model.module)
        model.use_gradient_checkpointing = use_gradient_checkpointing
        if verbose:
            Console().print(selection.summary())
            if trained := trained_parts(model.module):
                count = sum(part.trained.get_value().size for part in trained.values())
                Console().print(f"Trained beside the adapters: {count:,} parameters of {', '.join(trained)}")
        return model

    @staticmethod
    def for_training(
        model: "FastVisionModel", use_gradient_checkpointing: GradientCheckpointing | None = None
    ) -> "FastVisionModel":
        """Set the model to train, with another kind of checkpointing if one is given; returns it.

        Raises:
            ValueError: unknown kind of checkpointing.
        """
        if use_gradient_checkpointing is not None:
            policy_by_part(use_gradient_checkpointing)
            model.use_gradient_checkpointing = use_gradient_checkpointing
        model.training = True
        return model

    @staticmethod
    def for_inference(model: "FastVisionModel") -> "FastVisionModel":
        """Set the model to infer; returns it. Dropout needs a key here, so nothing else changes."""
        model.training = False
        return model

    @cached_property
    def module_table(self) -> ModuleTable:
        """Every linear module of the model."""
        return module_table(self.config)

    def split(self) -> tuple[nnx.GraphDef, PyTree, PyTree]:
        """The model as (structure, trainable parameters, frozen parameters).

        The two pytrees share the model's arrays. `vlmlora.make_loss_fn` takes the structure.

        Raises:
            RuntimeError: the trainable parameters are gone, see `update`.
        """
        self._check_is_whole()
        return nnx.split(self.module, Trainable, ...)

    def update(self, adapters: PyTree) -> None:
        """Put trained parameters, as `split` gave them, back into the model.

        The model shares their arrays. A further step with the state that they come from frees these; whatever
        needs the model after that raises a RuntimeError until it is updated again.
        """
        nnx.update(self.module, adapters)

    def _check_is_whole(self) -> None:
        trainable = jax.tree.leaves(nnx.state(self.module, Trainable))
        if any(isinstance(array, jax.Array) and array.is_deleted() for array in trainable):
            raise RuntimeError(
                "the model's trainable parameters were donated to a training step since they were last put "
                "into it; call model.update(state.adapters) with the newest state"
            )

    def print_trainable_parameters(self) -> None:
        """Print the count of trainable parameters, of all, and their share, as PEFT does."""
        trainable = trainable_parameters(self.module)
        total = _parameters(family_of(self.config).model(self.config, dtype=jnp.float32))
        total += 0 if self.full_finetuning else trainable
        # PEFT trains biases themselves, and copies of everything else.
        in_place = (part for part in trained_parts(self.module).values() if not part.is_copy)
        total -= sum(part.trained.get_value().size for part in in_place)
        share = 100 * trainable / total
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share:.4f}")

    def load_adapter(
        self,
        model_id: str | PathLike[str],
        adapter_name: str,
        *,
        token: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> None:
        """Load a further adapter beside those that the model has. As in PEFT it is not made the active one.

        Args:
            model_id: what `save_pretrained` or PEFT wrote: a directory, or a repository of the hub.
            adapter_name: its name from now on.
            token: for private repositories.
            revision: branch, tag or commit of the repository.
            local_files_only: use what is in the cache already.

        Raises:
            ValueError: there is an adapter of that name, or this one does not fit the model; the keys are
                listed, and nothing has changed.
            FileNotFoundError: no such directory or repository.
            NotImplementedError: the adapter uses something that is not supported.
        """
        directory = resolve(model_id, token=token, revision=revision, local_files_only=local_files_only)
        self._adapters.add(
            adapter_name,
            lambda: load_adapter_into(self.module, self.module_table, directory),
            read_adapter_config(directory),
            activate=False,
        )
        _place_on_mesh(self.module)

    def set_adapter(self, adapter_name: str) -> None:
        """Compute with and train another adapter; the others are kept beside the model, out of every loss.

        Split the model again afterwards: structure and parameters are the new adapter's.

        Raises:
            ValueError: there is none of that name.
            RuntimeError: the active one's parameters are gone, see `update`.
        """
        self._check_is_whole()
        self._adapters.activate(adapter_name)
        _place_on_mesh(self.module)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter. If it was the active one, the first of the others takes its place.

        Raises:
            ValueError: there is none of that name, or it has changed the base weights.
        """
        self._adapters.delete(adapter_name)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """While the body runs the model is the base model, trained biases and modules included.

        Raises:
            ValueError: an adapter has changed the base weights.
        """
        self._adapters.check_can_disable()
        with self._adapters.suspended():
            yield

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[int | float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
    ) -> None:
        """Add an adapter that is a weighted sum of others, as in PEFT; it is not made the active one.

        Args:
            adapters: names of those to combine.
            weights: of each; may be negative.
            adapter_name: name of the new one.
            combination_type: ``"svd"``, ``"linear"`` or ``"cat"``; see
                `vlmlora.lora.adapters.weighted_adapter`.
            svd_rank: rank for ``"svd"``; None: the largest.

        Raises:
            ValueError: a name does not exist or exists already, or the adapters cannot be combined so.
            NotImplementedError: another combination of PEFT.
            RuntimeError: the active one's parameters are gone, see `update`.
        """
        self._check_is_whole()
        if adapter_name in self.adapters:
            raise ValueError(f"the model already has an adapter {adapter_name!r}")
        new = weighted_adapter(
            self.module,
            self.module_table,
            self._adapters,
            adapters,
            weights,
            combination_type=combination_type,
            svd_rank=svd_rank,
        )
        self._adapters.park(adapter_name, *new)

    def save_pretrained(
        self, directory: str | PathLike[str], selected_adapters: Sequence[str] | None = None
    ) -> None:
        """Write the adapters in PEFT's format, or after full fine-tuning the whole checkpoint.

        The adapter ``"default"`` goes into the directory itself, another into a folder of its name there.
        With several processes all of them call it; the first writes, and the others wait for it.

        Args:
            directory: made if it does not exist.
            selected_adapters: names of those to write; None: all.

        Raises:
            ValueError: the model has neither adapters nor trainable parameters, or none of a selected name.
            NotImplementedError: a whole checkpoint, with several processes.
            RuntimeError: the trainable parameters are gone, see `update`.
        """
        self._check_is_whole()
        if self.adapters:
            selected = list(self.adapters) if selected_adapters is None else list(selected_adapters)
            for name in selected:
                self._adapters.check(name)
            for name in selected:
                where = Path(directory) if name == DEFAULT else Path(directory) / name
                with self._adapters.activated(name):
                    write = partial(
                        save_adapter,
                        where,
                        with_whole_adapters(self.module),
                        self.module_table,
                        self.adapters[name],
                    )
                    on_first_process(write)
        elif self.full_finetuning:
            if jax.process_count() > 1:
                raise NotImplementedError(
                    "a whole checkpoint is written by one process alone: resume from the run's Checkpoints "
                    "in a single process, and save there"
                )
            save_checkpoint(self.module, self.config, directory)
        else:
            raise ValueError("the model has no adapter to save; make one with FastVisionModel.get_peft_model")

    def merge_and_unload(self) -> "FastVisionModel":
        """Put the adapter into the weights, in place, as PEFT's method of this name does; returns the model.

        What was split from the model before is given away. Quantised weights that are adapted come out in 16
        bit (see `vlmlora.lora.merge.merge_adapters`), and the result can be trained again.

        Raises:
            ValueError: the model has no adapter, or one that no weight and bias can hold.
            RuntimeError: the trainable parameters are gone, see `update`.
        """
        self._check_is_whole()
        table, unties = self.module_table, unties_head(self.module)
        merge_adapters(self.module, table)
        if unties:
            self.config = copy.deepcopy(self.config)
            untie(self.config)
        self._adapters.forget()
        return self

    def save_pretrained_merged(
        self,
        directory: str | PathLike[str],
        processor: VisionLanguageProcessor | None = None,
        save_method: str = "merged_16bit",
        *,
        base: str | PathLike[str] | None = None,
        dtype: DTypeLike | None = None,
        max_shard_size: int | str = "5GB",
        token: str | None = None,
        **unknown: Any,
    ) -> None:
        """Write a checkpoint of transformers with the adapter merged into it; the model stays as it is.

        Config, generation config and the processor's files are included. Tensors are merged in float32 and
        written one by one: the host holds one at a time, and on failure nothing is left behind.

        Args:
            directory: made if it does not exist.
            processor: whose files to write; None copies those of the base.
            save_method: ``"merged_16bit"``, or ``"lora"`` for the adapter alone.
            base: directory or repository of the 16-bit weights behind a quantised base, to merge into these.
                None takes the model's own weights, decoded where they are quantised: those that the adapter
                was trained on, so that the merged model computes what the model does.
            dtype: type to write. None: bfloat16 or float16, whichever the config names, else bfloat16.
            max_shard_size: size of a file beyond which another is begun.
            token: for a private `base`.
            unknown: refused.

        Raises:
            TypeError: unknown argument; the message names the nearest.
            ValueError: no adapter, another `save_method` or `dtype`, or `base` is not the adapter's.
            FileExistsError: `directory` holds an adapter.
            OSError: writing failed.
            RuntimeError: the trainable parameters are gone, see `update`.
        """
        _reject_unknown(FastVisionModel.save_pretrained_merged, unknown)
        self._check_is_whole()
        _check_save_method(save_method)
        if save_method == "lora":
            self.save_pretrained(directory)
            if processor is not None:
                processor.save_pretrained(directory)
            return
        if self.lora_config is None:
            raise ValueError(
                "the model has no adapter to merge; make one with FastVisionModel.get_peft_model"
            )

        def finish(staged: Path) -> None:
            if self.directory is not None:
                copy_processor_files(self.directory, staged)
            if processor is not None:
                processor.save_pretrained(staged)

        save_merged(
            self.module,
            self.config,
            self.module_table,
            directory,
            lora_config=self.lora_config,
            dtype=dtype_of_16_bit(self.config) if dtype is None else dtype,
            base=None if base is None else resolve(base, token=token),
            max_shard_size=max_shard_size,
            finish=finish,
        )

    def push_to_hub(
        self,
        repo_id: str,
        processor: VisionLanguageProcessor | None = None,
        *,
        token: str | None = None,
        private: bool | None = None,
        commit_message: str = "Upload adapter",
        commit_description: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        **unknown: Any,
    ) -> str:
        """Upload the adapter, or after full fine-tuning the checkpoint, to a repository of the hub.

        Args:
            repo_id: ``owner/name``; made if it does not exist.
            processor: whose files to upload too.
            token: with write access; None uses the one that ``hf auth login`` stored.
            private: whether a new repository is private.
            commit_message: of the commit.
            commit_description: what else the commit says.
            revision: branch to commit to, which is made if it does not exist.
            create_pr: open a pull request.
            unknown: refused.

        Returns:
            The address of the commit.

        Raises:
            TypeError: unknown argument; the message names the nearest.
            ValueError: there is nothing to save, or `repo_id` is no name of a repository.
            OSError: the hub cannot be reached or refuses.
        """
        _reject_unknown(FastVisionModel.push_to_hub, unknown)

        def save(directory: Path) -> None:
            self.save_pretrained(directory)
            if processor is not None:
                processor.save_pretrained(directory)

        commit = {"commit_message": commit_message, "commit_description": commit_description}
        commit |= {"token": token, "private": private, "revision": revision, "create_pr": create_pr}
        return _save_and_upload(save, repo_id, commit)

    def push_to_hub_merged(
        self,
        repo_id: str,
        processor: VisionLanguageProcessor | None = None,
        save_method: str = "merged_16bit",
        *,
        base: str | PathLike[str] | None = None,
        dtype: DTypeLike | None = None,
        max_shard_size: int | str = "5GB",
        token: str | None = None,
        private: bool | None = None,
        commit_message: str = "Upload merged model",
        commit_description: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        **unknown: Any,
    ) -> str:
        """Upload what `save_pretrained_merged` writes to a repository of the hub.

        It is written to a temporary directory first, which needs room for it. The arguments are those of
        `save_pretrained_merged` and `push_to_hub`.

        Returns:
            The address of the commit.

        Raises:
            TypeError: unknown argument; the message names the nearest.
            ValueError: see `save_pretrained_merged`, or `repo_id` is no name of a repository.
            OSError: the hub cannot be reached or refuses.
        """
        _reject_unknown(FastVisionModel.push_to_hub_merged, unknown)
        save = functools.partial(
            self.save_pretrained_merged,
            processor=processor,
            save_method=save_method,
            base=base,
            dtype=dtype,
            max_shard_size=max_shard_size,
            token=token,
        )
        commit = {"commit_message": commit_message, "commit_description": commit_description}
        commit |= {"token": token, "private": private, "revision": revision, "create_pr": create_pr}
        return _save_and_upload(save, repo_id, commit)

    def generate(
        self,
        batch: Mapping[str, np.ndarray],
        *,
        max_new_tokens: int = 128,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
    ) -> Int[Array, "batch max_new_tokens"]:
        """Continue every prompt greedily.

        Args:
            batch: prompts from ``processor.collate``.
            max_new_tokens: tokens at most.
            eos_token_id: tokens that end a row; None: those of the generation config.
            pad_token_id: fills a row after its end; None: the tokenizer's.

        Returns:
            The new tokens alone; ``processor.batch_decode`` reads them.

        Raises:
            ValueError: `max_new_tokens` is less than 1, or `batch` is no batch.
            RuntimeError: the trainable parameters are gone, see `update`.
        """
        self._check_is_whole()
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens}: it must be at least 1")
        found = batch if isinstance(batch, Mapping) else {}
        if missing := [name for name in ("input_ids", "attention_mask") if name not in found]:
            raise ValueError(f"the batch lacks {' and '.join(missing)}; make it with processor.collate")
        ends = self.eos_token_ids if eos_token_id is None else np.atleast_1d(eos_token_id).tolist()
        graphdef, state = nnx.split(self.module)
        return greedy_decode(
            graphdef,
            state,
            dict(batch),
            max_new_tokens=max_new_tokens,
            eos_token_ids=tuple(ends),
            pad_token_id=self.pad_token_id if pad_token_id is None else pad_token_id,
        )


def _place_on_mesh(module: nnx.Module) -> None:
    """Put a new adapter where its model is."""
    if (mesh := getattr(module, "mesh", None)) is not None:
        place_trainable(module, mesh)


def default_dtype() -> DTypeLike:
    """bfloat16, or float32 where the default device is a CPU."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


UNSLOTHS_OWN = {
    "qat_scheme": (None, "training does not imitate a later quantisation; leave it out"),
    "finetune_audio_layers": (False, "no supported model hears; leave it out"),
    "offload_layers": (None, "weights stay on the device, and a mesh divides them; leave it out"),
    "checkpoint_skip_layers": (0, "use_gradient_checkpointing says which values layers keep; leave it out"),
}
"""Arguments that Unsloth's `get_peft_model` has alone: the value that asks for nothing, and why no other is
taken."""


def _without_unsloths_own(unknown: Mapping[str, Any], max_seq_length: int) -> dict[str, Any]:
    """What is left without arguments that Unsloth's has alone and that ask for nothing."""
    of_loading = max_seq_length, "rows are as long as from_pretrained was told; give it there"
    own = {"max_seq_length": of_loading, **UNSLOTHS_OWN}
    for name, (nothing, reason) in own.items():
        if name in unknown and unknown[name] not in (None, nothing):
            raise ValueError(f"{name}={unknown[name]!r}, and only {nothing!r} is supported: {reason}")
    # Wherever its files would go, there are none here.
    harmless = {*own, "temporary_location"}
    return {name: value for name, value in unknown.items() if name not in harmless}


SAVE_METHODS = {
    "merged_4bit": "rounding the merged weights to 4 bit again loses most of what the adapter learnt; save "
    "16 bit and load that with load_in_4bit=True",
    "merged_4bit_forced": "rounding the merged weights to 4 bit again loses most of what the adapter learnt; "
    "save 16 bit and load that with load_in_4bit=True",
}
"""Unsloth's other values of `save_method`, and why they are refused."""


def _check_save_method(save_method: str) -> None:
    if save_method not in ("merged_16bit", "lora"):
        reason = SAVE_METHODS.get(save_method, "it must be 'merged_16bit' or 'lora'")
        raise ValueError(f"save_method={save_method!r} is not supported: {reason}")


def _save_and_upload(save: Callable[[Path], None], repo_id: str, commit: Mapping[str, Any]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "upload"
        save(directory)
        return upload(directory, repo_id, **commit)


def _reject_unknown(function: Callable, unknown: Mapping[str, Any]) -> None:
    parameters = inspect.signature(function).parameters.values()
    known = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
    reject_unknown_arguments(unknown, known, caller=function.__name__)


def _eos_token_ids(
    directory: Path, config: PreTrainedConfig, processor: VisionLanguageProcessor
) -> tuple[int, ...]:
    """End tokens of the generation config, else of the config, else of the tokenizer."""
    file = directory / "generation_config.json"
    declared = json.loads(file.read_text()).get("eos_token_id") if file.exists() else None
    for candidate in (declared, config.get_text_config().eos_token_id, processor.tokenizer.eos_token_id):
        if candidate is not None:
            return tuple(np.atleast_1d(candidate).tolist())
    return ()


def _parameters(module: nnx.Module) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module)))
