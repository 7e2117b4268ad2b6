"""Checkpoints of a run, sharded and asynchronous, with Orbax: what training changes and where it stands.

The frozen weights are not in them; they are the base checkpoint's. The adapter alone, for PEFT, is written
by `vlmlora.lora.peft_format.save_adapter`.
"""

import dataclasses
import json
import logging
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray
from orbax.checkpoint import v1 as ocp

from vlmlora.lora.config import LoraConfig
from vlmlora.training.step import TrainState

logger = logging.getLogger(__name__)

_ARRAYS = "arrays"
_KEY = "random_key"
_FORMAT = 1
# Where the base model lay may change between two machines, and these have no part in training.
_MAY_DIFFER = ("base_model_name_or_path", "revision", "task_type")


@dataclasses.dataclass(frozen=True)
class Resumed:
    """What a checkpoint gives back.

    Attributes:
        state: adapters, optimizer state and step, placed as the state that they replace.
        key: the random key of the run; None if it had none.
        position: batches that the run had taken.
        iterator_state: state of the iterator over batches; None if it had none.
    """

    state: TrainState
    key: PRNGKeyArray | None
    position: int
    iterator_state: Any = None


class Checkpoints:
    """The checkpoints of one run, each in a folder named by its step.

    A save returns when the arrays are copied to host memory; threads write the files. A checkpoint counts
    only once it is whole, so that a run that dies while saving leaves the previous one to go on from. With
    several processes all of them call every method, and each writes the shards that it holds; the directory
    is one that all of them see.

    Attributes:
        directory: the folder of all checkpoints.
        every: steps from one checkpoint to the next.
        keep: how many of the latest are kept.
        lora_config: the adapter's arguments, which a checkpoint must have too.

    Args:
        directory: made when the first checkpoint is saved.
        every: see above.
        keep: see above; None keeps all.
        lora_config: see above; None after full fine-tuning.

    Raises:
        ValueError: `every` or `keep` is less than 1.
        NotADirectoryError: `directory` is a file.

    Example:
        >>> with Checkpoints("run/checkpoints", every=100, lora_config=model.lora_config) as checkpoints:
        ...     state, history = fit(..., checkpoints=checkpoints, resume=True)  # doctest: +SKIP
    """

    def __init__(
        self,
        directory: str | PathLike[str],
        *,
        every: int = 100,
        keep: int | None = 3,
        lora_config: LoraConfig | None = None,
    ):
        for name, value in (("every", every), ("keep", keep)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: it must be at least 1")
        self.directory = Path(directory).absolute()
        if self.directory.exists() and not self.directory.is_dir():
            raise NotADirectoryError(f"{self.directory} is a file; checkpoints need a directory")
        self.every = every
        self.keep = keep
        self.lora_config = lora_config
        self._opened: ocp.training.Checkpointer | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, in ascending order."""
        if self._opened is None and not self.directory.exists():
            return []
        return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be saved after `step` steps."""
        return step % self.every == 0

    def save(
        self,
        state: TrainState,
        *,
        key: PRNGKeyArray | None = None,
        position: int | None = None,
        iterator_state: Any = None,
    ) -> None:
        """Start to save the state; waits only for an earlier save to end.

        Args:
            state: may be donated as soon as this returns.
            key: the random key of the run, not that of a step.
            position: batches taken so far; None: as many as steps.
            iterator_state: what the iterator over batches has as its state, if it has one; JSON.

        Raises:
            FileExistsError: there is a checkpoint of this step.
            OSError: an earlier save failed, for example for want of space.
        """
        step = int(state.step)
        if step in self.steps:
            raise FileExistsError(
                f"{self.directory} has a checkpoint of step {step} already; "
                "resume from it, or choose another directory"
            )
        arrays = _named(state)
        run = {
            "format": _FORMAT,
            "position": step if position is None else position,
            "iterator_state": iterator_state,
            "lora_config": _as_json(self.lora_config),
            "random_key": None if key is None else str(jax.random.key_impl(key)),
            "arrays": {name: _describe(array) for name, array in arrays.items()},
        }
        if key is not None:
            arrays[_KEY] = jax.random.key_data(key)
        self._checkpointer.save_checkpointables_async(
            step, {_ARRAYS: jax.tree.map(_to_save, arrays)}, force=True, custom_metadata=run
        )

    def restore(self, state: TrainState, step: int | None = None) -> Resumed:
        """A checkpoint's content in place of `state`.

        Args:
            state: a state of the same run, at any step, as `init_train_state` makes it; each array of the
                result is placed and sharded as its array is, whatever mesh the checkpoint was saved on.
            step: of the checkpoint; None: the latest.

        Raises:
            FileNotFoundError: there is no such checkpoint, or none at all.
            ValueError: the checkpoint was saved with other arguments of the adapter, or its arrays are not
                those of `state`.
        """
        step = self._existing(step)
        run = self._checkpointer.checkpointables_metadata(step).custom_metadata
        where = f"the checkpoint {self.directory / str(step)}"
        if not isinstance(run, dict) or run.get("format") != _FORMAT:
            found = run.get("format") if isinstance(run, dict) else None
            raise ValueError(f"{where} has format {found!r}; this version of vlmlora reads {_FORMAT}")
        _check_lora_config(where, run["lora_config"], _as_json(self.lora_config))
        wanted = _named(state)
        _check_arrays(where, run["arrays"], {name: _describe(array) for name, array in wanted.items()})
        abstract = jax.tree.map(_to_load, wanted)
        impl = run["random_key"]
        if impl is not None:
            abstract[_KEY] = np.zeros(jax.eval_shape(lambda: _key_data(impl)).shape, np.uint32)
        loaded = self._checkpointer.load_checkpointables(step, {_ARRAYS: abstract})[_ARRAYS]
        arrays = [_placed(loaded[name], like) for name, like in wanted.items()]
        key = None if impl is None else jax.random.wrap_key_data(jnp.asarray(loaded[_KEY]), impl=impl)
        restored = jax.tree.unflatten(jax.tree.structure(state), arrays)
        return Resumed(restored, key, run["position"], run["iterator_state"])

    def wait(self) -> None:
        """Wait until everything is written; raises what went wrong while writing."""
        if self._opened is not None:
            self._opened.wait()

    def close(self) -> None:
        """Wait, and end the threads; the next use opens the directory again."""
        if self._opened is not None:
            opened, self._opened = self._opened, None
            opened.close()

    @property
    def _checkpointer(self) -> ocp.training.Checkpointer:
        if self._opened is None:
            policies = ocp.training.preservation_policies
            kept = policies.PreserveAll() if self.keep is None else policies.LatestN(self.keep)
            self._opened = ocp.training.Checkpointer(
                self.directory, preservation_policy=kept, cleanup_tmp_directories=True
            )
        return self._opened

    def _existing(self, step: int | None) -> int:
        if not self.directory.exists():
            raise FileNotFoundError(f"{self.directory} does not exist: there is no checkpoint to resume from")
        steps = self.steps
        if not steps:
            raise FileNotFoundError(f"{self.directory} holds no whole checkpoint")
        if step is not None and step not in steps:
            raise FileNotFoundError(
                f"{self.directory} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}"
            )
        return steps[-1] if step is None else step


def _named(state: TrainState) -> dict[str, Any]:
    """The arrays by their path in the state, in the order of its leaves."""
    leaves, _ = jax.tree.flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _describe(array: Any) -> str:
    return f"{array.dtype}[{','.join(map(str, array.shape))}]"


def _to_save(array: Any) -> Any:
    """What Orbax takes: an array that other processes do not share is saved as NumPy's, by process 0."""
    return np.asarray(array) if _is_host_local(array) else array


def _to_load(array: Any) -> Any:
    if _is_host_local(array):
        return np.zeros(array.shape, array.dtype)
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)


def _is_host_local(array: Any) -> bool:
    return not isinstance(array, jax.Array) or (jax.process_count() > 1 and array.is_fully_addressable)


def _placed(loaded: Any, like: Any) -> Any:
    """`loaded` as an array of the kind of `like`, and bound to its devices only if that one is."""
    if not isinstance(like, jax.Array):
        return np.asarray(loaded)
    if not like.committed:
        return jnp.asarray(np.asarray(loaded))
    return jax.device_put(loaded, like.sharding) if _is_host_local(like) else loaded


def _key_data(impl: str) -> jax.Array:
    return jax.random.key_data(jax.random.key(0, impl=impl))


def _as_json(config: LoraConfig | None) -> dict[str, Any] | None:
    return None if config is None else json.loads(json.dumps(dataclasses.asdict(config)))


def _check_lora_config(where: str, found: Mapping[str, Any] | None, needed: Mapping[str, Any] | None) -> None:
    if found is None or needed is None:
        if found is not needed:
            kinds = {True: "no adapter's arguments", False: "an adapter's arguments"}
            raise ValueError(
                f"{where} has {kinds[found is None]}, and this run {kinds[needed is None]}; "
                "pass Checkpoints(lora_config=model.lora_config) as when it was saved"
            )
        return
    defaults = _as_json(LoraConfig())
    values = [
        (name, found.get(name, defaults.get(name)), needed.get(name, defaults.get(name)))
        for name in {**found, **needed}
    ]
    differ = [each for each in values if each[1] != each[2]]
    for name, was, now in differ:
        if name in _MAY_DIFFER:
            logger.warning("%s has %s=%r, and this run %r", where, name, was, now)
    if wrong := [each for each in differ if each[0] not in _MAY_DIFFER]:
        listed = "; ".join(f"{name} was {was!r} and is {now!r} now" for name, was, now in wrong)
        raise ValueError(
            f"{where} is of another adapter: {listed}. Call get_peft_model with what it was saved with, or "
            "save to another directory"
        )


def _check_arrays(where: str, found: Mapping[str, str], needed: Mapping[str, str]) -> None:
    problems = [
        f"{name} was {found.get(name, 'absent')} and is {needed.get(name, 'absent')} now"
        for name in {**needed, **found}
        if found.get(name) != needed.get(name)
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            f"{where} does not fit this run, in {len(problems)} of {len({**needed, **found})} arrays: "
            f"{'; '.join(problems[:5])}{more}. It needs the same model, adapter and optimizer"
        )
