"""An elementwise function whose results take the place of its arguments.

XLA gives every result of a fusion with several an array of its own, if more than one of them reads the same
argument. Here a block of threads reads its part of all arguments before it writes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.extend import core

BLOCK = 2048
"""Elements that a block of threads takes."""

_SAME = {"add_any": jnp.add, "one_minus_square": lambda x: (1 - x) * (1 + x)}
"""What derivatives consist of and Pallas does not know, in terms of what it knows."""

PRIMITIVES = frozenset(
    ("add", "convert_element_type", "copy", "div", "exp", "integer_pow", "logistic", "mul", "neg", "sub")
).union(("tanh",), _SAME)
"""What a function may be made of, beside functions of it."""


def in_place(
    function: Callable[..., Sequence[jax.Array]], *arrays: jax.Array, interpret: Any = None
) -> tuple[jax.Array, ...]:
    """``function(*arrays)`` on a Hopper GPU, computed in float32, each result in the place of an argument.

    Args:
        function: elementwise, of `PRIMITIVES`; as many results as arguments.
        arrays: of one shape, with a multiple of `BLOCK` elements.
        interpret: how Pallas interprets the kernel where there is no such GPU.
    """
    shape, size = arrays[0].shape, arrays[0].size

    def kernel_body(*refs: Any) -> None:
        own = pl.ds(jax.lax.axis_index("block") * BLOCK, BLOCK)
        results = evaluate(function, *(ref[own].astype(jnp.float32) for ref in refs))
        for ref, result in zip(refs, results, strict=True):
            ref[own] = result.astype(ref.dtype)

    def run(refs: Sequence[Any]) -> None:
        kernel = plgpu.kernel(
            kernel_body,
            out_type=(),
            grid=(size // BLOCK,),
            grid_names=("block",),
            kernel_name="elementwise_in_place",
            interpret=interpret,
        )
        kernel(*refs)

    results = pl.run_state(run)([array.reshape(size) for array in arrays])
    return tuple(result.reshape(shape) for result in results)


def primitives_of(function: Callable[..., Any], count: int) -> frozenset[str]:
    """The names of the primitives of which a function of `count` arguments is made."""
    jaxpr = jax.make_jaxpr(function)(*[jax.ShapeDtypeStruct((2,), jnp.float32)] * count)
    return frozenset(_names(jaxpr))


def _names(jaxpr: core.ClosedJaxpr) -> set[str]:
    names: set[str] = set()
    for eqn in jaxpr.jaxpr.eqns:
        inner = _inner(eqn)
        names |= {eqn.primitive.name} if inner is None else _names(inner)
    return names


def evaluate(function: Callable[..., Any], *values: jax.Array) -> list[jax.Array]:
    """``function(*values)`` in terms of what Pallas knows."""
    return _evaluate(jax.make_jaxpr(function)(*values), values)


def _evaluate(jaxpr: core.ClosedJaxpr, values: Sequence[jax.Array]) -> list[jax.Array]:
    known = dict(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True))
    known |= dict(zip(jaxpr.jaxpr.invars, values, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else known[atom]

    for eqn in jaxpr.jaxpr.eqns:
        arguments = [read(atom) for atom in eqn.invars]
        if (inner := _inner(eqn)) is not None:
            results = _evaluate(inner, arguments)
        elif eqn.primitive.name in _SAME:
            results = [_SAME[eqn.primitive.name](*arguments)]
        else:
            results = [eqn.primitive.bind(*arguments, **eqn.params)]
        known |= dict(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.jaxpr.outvars]


def _inner(eqn: core.JaxprEqn) -> core.ClosedJaxpr | None:
    """The function that an equation calls."""
    return eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
