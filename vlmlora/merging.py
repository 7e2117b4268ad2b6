"""An adapter's files and its base's files to a merged checkpoint, without a model in between."""

import json
from os import PathLike
from pathlib import Path

import jax.numpy as jnp
from jax.typing import DTypeLike

from vlmlora.lora.merge import dtype_of_16_bit, save_merged
from vlmlora.lora.peft_format import CONFIG_FILE, base_of_adapter, load_adapter_into
from vlmlora.models.hub import copy_processor_files, resolve
from vlmlora.models.loading import read_config
from vlmlora.models.module_table import module_table
from vlmlora.models.registry import family_of


def merge_checkpoint(
    model_name: str | PathLike[str],
    directory: str | PathLike[str],
    *,
    base: str | PathLike[str] | None = None,
    dtype: DTypeLike | None = None,
    max_shard_size: int | str = "5GB",
    token: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> None:
    """Merge a PEFT adapter into its base, from files to files.

    The base is never loaded: each of its tensors is read, decoded where it is quantised, merged in float32,
    cast and written, one after the other. The processor's files are copied: the adapter's, where it has some.

    Args:
        model_name: directory or repository of the adapter; or of a model, which is then only decoded to
            16 bit.
        directory: where the checkpoint goes; made if it does not exist.
        base: directory or repository to merge into; None takes the one that the adapter names. A quantised
            base can be replaced by the 16-bit weights behind it.
        dtype: type to write. None: bfloat16 or float16, whichever the base's config names, else bfloat16.
        max_shard_size: size of a file beyond which another is begun.
        token: for private repositories.
        revision: of `model_name`.
        local_files_only: use what is in the cache already.

    Raises:
        FileNotFoundError: no such directory or repository, or files of it are missing.
        ValueError: adapter and base do not belong together, the adapter cannot be merged, or another `dtype`.
        FileExistsError: `directory` holds an adapter.
        NotImplementedError: the adapter uses something that is not supported.
        OSError: writing failed.
    """
    hub = {"token": token, "local_files_only": local_files_only}
    source = resolve(model_name, revision=revision, **hub)
    is_adapter = (source / CONFIG_FILE).exists()
    if base is None and is_adapter:
        base, revision = base_of_adapter(source)
        base = resolve(base, revision=revision, **hub)
    elif base is None:
        base = source
    elif is_adapter:
        base = resolve(base, **hub)
    else:
        raise ValueError(f"{source} has no {CONFIG_FILE}: it is no adapter, and there is nothing to merge")
    config = read_config(base)
    table = module_table(config)
    module = family_of(config).model(config, dtype=jnp.float32)
    lora_config = None
    if is_adapter:
        _check_needs_no_weights(source)
        lora_config = load_adapter_into(module, table, source)

    def finish(staged: Path) -> None:
        for files in dict.fromkeys((base, source)):
            copy_processor_files(files, staged)

    save_merged(
        module,
        config,
        table,
        directory,
        lora_config=lora_config,
        dtype=dtype_of_16_bit(config) if dtype is None else dtype,
        base=base,
        max_shard_size=max_shard_size,
        finish=finish,
    )


def _check_needs_no_weights(adapter: Path) -> None:
    init = json.loads((adapter / CONFIG_FILE).read_text()).get("init_lora_weights")
    if init == "loftq":
        raise NotImplementedError(
            f"{adapter / CONFIG_FILE}: init_lora_weights='loftq' is repeated on the base's weights when they "
            "are loaded; merge it with FastVisionModel.from_pretrained and save_pretrained_merged"
        )
