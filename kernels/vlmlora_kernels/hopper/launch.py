"""A kernel written for one thread, and how to run it."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.typing import DTypeLike

from vlmlora_kernels.hopper import simt

MULTIPROCESSORS = 132  # of an H100 or H200; a grid for another number is right, and slower.


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What every thread of every block does.

    Attributes:
        body: called as ``body(t, inputs, out, scratch)``; `t` has the names of `simt`, the rest are pointers.
        shape: of the result.
        dtype: of the result.
        grid: number of blocks of threads, or of clusters of them.
        warps: warps of a block; a multiple of 4.
        scratch: words of each array in shared memory.
        name: what a profiler shows.
        cluster: blocks of a cluster, which can read each other's shared memory.
    """

    body: Callable[..., None]
    shape: tuple[int, ...]
    dtype: DTypeLike
    grid: int
    warps: int
    scratch: tuple[int, ...]
    name: str
    cluster: int = 1

    def __call__(self, *inputs: jax.Array) -> jax.Array:
        """Run on a Hopper GPU."""
        return varying_like(self.launch(*inputs), inputs)

    def launch(self, *inputs: jax.Array) -> jax.Array:
        """The call of the kernel itself."""
        count = len(inputs)

        def kernel_body(*refs: Any) -> None:
            @plgpu.inline_mgpu(arg_types=tuple(plgpu.RefType() for _ in refs))
            def thread_body(_, *refs: Any) -> None:
                arrays = [simt.Pointer(ref, simt.GLOBAL) for ref in refs[: count + 1]]
                scratch = [simt.Pointer(ref, simt.SHARED) for ref in refs[count + 1 :]]
                self.body(simt, arrays[:count], arrays[count], scratch)

            thread_body(*refs)

        run = plgpu.kernel(
            kernel_body,
            out_type=jax.ShapeDtypeStruct(self.shape, self.dtype),
            grid=(self.grid,),
            grid_names=("block",),
            cluster=(self.cluster,) if self.cluster > 1 else (),
            cluster_names=("rank",) if self.cluster > 1 else (),
            num_threads=self.warps // 4,
            thread_name="warpgroup",
            scratch_types=[plgpu.SMEM((words,), jnp.int32) for words in self.scratch],
            kernel_name=self.name,
        )
        return run(*inputs)


def varying_like(result: jax.Array, inputs: Sequence[jax.Array]) -> jax.Array:
    """The result of a kernel inside shard_map: it varies over the mesh axes that an input varies over, which
    Pallas drops."""
    missing = frozenset().union(*map(varying, inputs)) - varying(result)
    return jax.lax.pcast(result, tuple(missing), to="varying") if missing else result


def varying(x: jax.Array) -> frozenset:
    """Axes of a mesh over which an array differs, inside shard_map."""
    return jax.typeof(x).manual_axis_type.varying
