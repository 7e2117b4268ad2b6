"""Kernels compiled beside the program that calls them."""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.mlir import ir

logger = logging.getLogger(__name__)

_TARGET = "mosaic_gpu_v2"  # what Mosaic GPU lowers a kernel to
_HEAD_START = 3.0  # seconds in which a program that was compiled before is read from JAX's cache


@contextlib.contextmanager
def kernels_compiled_beside(lowered: jax.stages.Lowered) -> Iterator[None]:
    """While `lowered` compiles in this context, its kernels are compiled by threads of their own.

    XLA compiles the kernels of a program one after the other, late, and takes those that this process has
    compiled already. Here they are, on as many threads as there are cores, before XLA comes to them. They
    begin after some seconds, in which a program would come from JAX's compilation cache, and no more of them
    when the program is there. On other platforms than a GPU there are none.

    Args:
        lowered: the program, from ``jax.jit(...).lower(...)``.

    Example:
        >>> import jax
        >>> lowered = jax.jit(lambda x: x + 1).lower(1.0)
        >>> with kernels_compiled_beside(lowered):
        ...     program = lowered.compile()
        >>> float(program(1.0))
        2.0
    """
    kernels = kernels_of(lowered) if jax.default_backend() == "gpu" else []
    if not kernels:
        yield
        return
    is_done = threading.Event()
    start = time.monotonic() + _HEAD_START

    def compile_one(kernel: Mapping[str, Any]) -> None:
        if is_done.wait(max(0.0, start - time.monotonic())):
            return
        try:
            lower_alone(kernel).compile()
        except Exception:  # XLA comes to the same kernel, and says what is wrong with it.
            logger.debug("a kernel was not compiled ahead", exc_info=True)

    pool = ThreadPoolExecutor(min(len(kernels), os.cpu_count() or 1), thread_name_prefix="kernels")
    try:
        for kernel in kernels:
            pool.submit(compile_one, kernel)
        yield
    finally:
        is_done.set()
        pool.shutdown(wait=False)


def kernels_of(lowered: jax.stages.Lowered) -> list[dict[str, Any]]:
    """What the distinct kernels of a program are compiled from, in the order in which it has them first."""
    found: dict[bytes, dict[str, Any]] = {}

    def visit(operation: Any) -> Any:
        attributes = operation.attributes
        if operation.name == "stablehlo.custom_call" and attributes["call_target_name"].value == _TARGET:
            config = attributes["mhlo.backend_config"]
            kernel = {each.name: _value(each.attr) for each in map(config.__getitem__, range(len(config)))}
            found.setdefault(kernel["kernel_hash"], kernel)
        return ir.WalkResult.ADVANCE

    lowered.compiler_ir("stablehlo").operation.walk(visit)
    return list(found.values())


def lower_alone(kernel: Mapping[str, Any]) -> jax.stages.Lowered:
    """A program of one kernel, from `kernels_of`, to be compiled and not to be run: no arguments reach it."""
    result = jax.ShapeDtypeStruct((), jnp.float32)
    call = jax.jit(lambda: jax.ffi.ffi_call(_TARGET, result)(**kernel))
    return call.trace().lower(lowering_platforms=("cuda",))


def _value(attribute: Any) -> Any:
    """A string's bytes, since neither hashes nor modules are text, or a truth value."""
    return attribute.value_bytes if isinstance(attribute, ir.StringAttr) else attribute.value
