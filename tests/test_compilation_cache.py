from pathlib import Path

import jax
import pytest

from vlmlora.compilation_cache import enable_compilation_cache


@pytest.fixture
def unset(monkeypatch, tmp_path):
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)


def test_programs_are_kept_in_the_users_cache_directory(unset, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert enable_compilation_cache() == unset / "vlmlora" / "xla"
    assert jax.config.jax_compilation_cache_dir == str(unset / "vlmlora" / "xla")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    jax.config.update("jax_compilation_cache_dir", None)
    assert enable_compilation_cache() == Path.home() / ".cache" / "vlmlora" / "xla"


def test_on_a_cpu_nothing_is_kept(unset):
    assert enable_compilation_cache() is None
    assert jax.config.jax_compilation_cache_dir is None


def test_the_users_own_setting_stays(unset, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    jax.config.update("jax_compilation_cache_dir", str(unset / "own"))
    assert enable_compilation_cache() == unset / "own"
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        assert enable_compilation_cache() is None
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
