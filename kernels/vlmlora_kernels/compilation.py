"""Kernels compiled beside the program that calls them."""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.mlir import ir

logger = logging.getLogger(__name__)

_MOSAIC = "mosaic_gpu_v2"
"""What Mosaic GPU lowers a kernel to."""
_CUDNN = "__cudnn$"
"""How the names of what jax lowers attention to begin, where cuDNN computes it."""
_HEAD_START = 3.0  # seconds in which a program that was compiled before is read from JAX's cache
_DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32", "i32": "int32", "ui8": "uint8"}


@contextlib.contextmanager
def kernels_compiled_beside(lowered: jax.stages.Lowered) -> Iterator[None]:
    """While `lowered` compiles in this context, its kernels are compiled by threads of their own.

    XLA compiles Pallas' kernels of a program one after the other, late, and takes those that this process has
    compiled already; cuDNN likewise, which compiles attention. Here they are, on as many threads as there are
    cores, before XLA comes to them. They begin after some seconds, in which a program would come from JAX's
    compilation cache, and no more of them when the program is there. On other platforms than a GPU there are
    none.

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

    def compile_one(kernel: PallasKernel | CudnnAttention) -> None:
        if is_done.wait(max(0.0, start - time.monotonic())):
            return
        try:
            kernel.lower().compile()
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


@dataclass(frozen=True)
class PallasKernel:
    """A kernel of Pallas' as it stands in a program.

    Attributes:
        attributes: what XLA compiles it from.
    """

    attributes: Mapping[str, Any]

    def lower(self) -> jax.stages.Lowered:
        """A program of this kernel, to be compiled and not to be run: no arguments reach it."""
        result = jax.ShapeDtypeStruct((), jnp.float32)
        return _lower(lambda: jax.ffi.ffi_call(_MOSAIC, result)(**self.attributes))


ArrayType = tuple[tuple[int, ...], str, tuple[int, ...]]
"""Shape, MLIR's name of the type, and the axes from the one that changes slowest on."""


@dataclass(frozen=True)
class CudnnAttention:
    """A call of cuDNN's attention, or of its gradient, as it stands in a program.

    Attributes:
        target: the call's name.
        config: what it is, as XLA is told.
        operands: what it takes.
        results: what it gives.
    """

    target: str
    config: str
    operands: tuple[ArrayType, ...]
    results: tuple[ArrayType, ...]

    def lower(self) -> jax.stages.Lowered:
        """A program of this call."""
        operands, results = _abstract(self.operands), _abstract(self.results)
        call = jax.ffi.ffi_call(
            self.target,
            results,
            input_layouts=[axes for *_, axes in self.operands],
            output_layouts=[axes for *_, axes in self.results],
            custom_call_api_version=2,
            legacy_backend_config=self.config,
        )
        return _lower(call, *operands)


def kernels_of(lowered: jax.stages.Lowered) -> list[PallasKernel | CudnnAttention]:
    """The distinct kernels of a program: attention first, which takes the longest to compile."""
    pallas: dict[bytes, PallasKernel] = {}
    attention: dict[CudnnAttention, None] = {}

    def visit(operation: Any) -> Any:
        attributes = operation.attributes
        target = attributes["call_target_name"].value if operation.name == "stablehlo.custom_call" else ""
        if target == _MOSAIC:
            config = attributes["mhlo.backend_config"]
            found = {each.name: _value(each.attr) for each in map(config.__getitem__, range(len(config)))}
            pallas.setdefault(found["kernel_hash"], PallasKernel(found))
        elif target.startswith(_CUDNN) and "operand_layouts" in attributes:
            operands = _arrays([each.type for each in operation.operands], attributes["operand_layouts"])
            results = _arrays([each.type for each in operation.results], attributes["result_layouts"])
            attention[CudnnAttention(target, attributes["backend_config"].value, operands, results)] = None
        return ir.WalkResult.ADVANCE

    lowered.compiler_ir("stablehlo").operation.walk(visit)
    return [*attention, *pallas.values()]


def _lower(function: Any, *arguments: jax.ShapeDtypeStruct) -> jax.stages.Lowered:
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))


def _value(attribute: Any) -> Any:
    """A string's bytes, since neither hashes nor modules are text, or a truth value."""
    return attribute.value_bytes if isinstance(attribute, ir.StringAttr) else attribute.value


def _arrays(types: Sequence[Any], layouts: Iterable[Any]) -> tuple[ArrayType, ...]:
    """Of MLIR's types, and its axes from the one that changes fastest on."""
    tensors = map(ir.RankedTensorType, types)
    return tuple(
        (tuple(each.shape), str(each.element_type), tuple(reversed([int(axis) for axis in layout])))
        for each, layout in zip(tensors, map(ir.DenseIntElementsAttr, layouts), strict=True)
    )


def _abstract(arrays: Sequence[ArrayType]) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(shape, _DTYPES[name]) for shape, name, _ in arrays]
