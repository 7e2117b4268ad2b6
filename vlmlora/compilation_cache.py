"""Compiled programs kept between runs, so that a second run starts training at once."""

import os
from pathlib import Path

import jax


def cache_directory() -> Path | None:
    """Where the package keeps what would take long to find out again: ``$XDG_CACHE_HOME/vlmlora``.

    By default that is ``~/.cache/vlmlora``. None where JAX was told to keep nothing.
    """
    if not jax.config.jax_enable_compilation_cache:
        return None
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlmlora"


def enable_compilation_cache() -> Path | None:
    """Keep compiled programs in the user's cache directory, unless JAX was told where, or told not to.

    The directory is ``$XDG_CACHE_HOME/vlmlora/xla``, by default ``~/.cache/vlmlora/xla``. JAX's own settings
    go first: ``JAX_COMPILATION_CACHE_DIR`` for another place, ``JAX_ENABLE_COMPILATION_CACHE=false`` for
    none (https://docs.jax.dev/en/latest/persistent_compilation_cache.html). On a CPU nothing is kept: what is
    compiled there holds for one kind of processor, which computers that share a home directory may not be.

    Returns:
        Where programs are kept; None for nowhere.
    """
    if not jax.config.jax_enable_compilation_cache:
        return None
    if jax.config.jax_compilation_cache_dir is not None:
        return Path(jax.config.jax_compilation_cache_dir)
    if jax.default_backend() == "cpu":
        return None
    directory = cache_directory() / "xla"
    jax.config.update("jax_compilation_cache_dir", str(directory))
    return directory
