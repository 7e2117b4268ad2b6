"""What a function leaves for its backward pass: values of its trace, which a caller keeps where it likes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal, Var

Value = Any
"""An array, a tracer of one, or the form in which a trace holds a constant."""


@dataclass(frozen=True, eq=False)
class Trace:
    """A function and what its backward pass takes.

    Attributes:
        jaxpr: from the arguments to the outputs, one by one, and after them the residuals.
        outputs: structure of what the function returns.
        moving: which of the arguments have a gradient.
        pull: structure of the backward pass, whose leaves are the residuals.
        saved: those residuals that the function computes itself.
        names: of its values, as `jax.ad_checkpoint.checkpoint_name` gives them.
    """

    jaxpr: Any
    outputs: Any
    moving: tuple[int, ...]
    pull: Any
    saved: tuple[Var, ...]
    names: Mapping[Var, str]

    @property
    def output_vars(self) -> Sequence[Var | Literal]:
        """The outputs, one by one."""
        return self.jaxpr.outvars[: self.outputs.num_leaves]

    def forward(
        self,
        closed_over: Sequence[Value],
        arguments: Sequence[Value],
        keep: Callable[[Var, Value], Value] = lambda _, value: value,
    ) -> tuple[list[Value], list[Value]]:
        """The outputs, and a value for each of `self.saved`.

        Args:
            closed_over: what the trace closes over.
            arguments: of the function.
            keep: sees every value on the way, and says what stands for it.
        """
        results, count = evaluate(self.jaxpr, closed_over, arguments, keep), self.outputs.num_leaves
        residuals = zip(self.jaxpr.outvars[count:], results[count:], strict=True)
        found = {var: value for var, value in residuals if not isinstance(var, Literal)}
        return results[:count], [found[var] for var in self.saved]

    def backward(
        self,
        closed_over: Sequence[Value],
        arguments: Sequence[Value],
        saved: Sequence[Value],
        cotangents: Mapping[int, jax.Array],
    ) -> dict[int, jax.Array]:
        """Gradients of the moving arguments, by their number.

        Args:
            closed_over: what the trace closes over.
            arguments: as those of the forward pass.
            saved: a value for each of `self.saved`.
            cotangents: of outputs by their number; those left out are zero.
        """
        found = dict(zip(self.jaxpr.invars, arguments, strict=True))
        found |= zip(self.jaxpr.constvars, closed_over, strict=True)
        found |= zip(self.saved, saved, strict=True)
        pull = jax.tree.unflatten(
            self.pull, [_read(found, var) for var in self.jaxpr.outvars[self.outputs.num_leaves :]]
        )
        given = [
            cotangents[number] if number in cotangents else _zeros(var.aval)
            for number, var in enumerate(self.output_vars)
        ]
        return dict(zip(self.moving, pull(jax.tree.unflatten(self.outputs, given)), strict=True))


def trace_residuals(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    moving: tuple[int, ...],
    named_primitives: Mapping[str, str],
) -> tuple[Trace, list[Value]]:
    """``jax.vjp`` of a function in some of its arguments, and what the trace closes over.

    Args:
        function: of arrays one by one. Where it is under `jax.checkpoint`, the residuals that it computes
            are what the policy saves.
        arguments: arrays or their shapes.
        moving: which of them have a gradient.
        named_primitives: how the names of primitives begin whose results are named without being given a
            name, and what they are named.
    """

    def with_pull(*arguments: Value) -> tuple[Any, Callable]:
        def of_moving(*values: jax.Array) -> Any:
            every = list(arguments)
            for number, value in zip(moving, values, strict=True):
                every[number] = value
            return function(*every)

        return jax.vjp(of_moving, *(arguments[number] for number in moving))

    closed, (outputs, pull) = jax.make_jaxpr(with_pull, return_shape=True)(*arguments)
    jaxpr, outputs = closed.jaxpr, jax.tree.structure(outputs)
    given = {*jaxpr.invars, *jaxpr.constvars}
    residuals = dict.fromkeys(v for v in jaxpr.outvars[outputs.num_leaves :] if not isinstance(v, Literal))
    saved = tuple(var for var in residuals if var not in given)
    names = _names(jaxpr, named_primitives)
    return Trace(jaxpr, outputs, moving, jax.tree.structure(pull), saved, names), list(closed.consts)


def is_inexact(array: Any) -> bool:
    """Whether an array, or what has its type, can have a gradient."""
    return jnp.issubdtype(array.dtype, jnp.inexact)


def evaluate(
    jaxpr: Any,
    constants: Sequence[Value],
    arguments: Sequence[Value],
    keep: Callable[[Var, Value], Value] = lambda _, value: value,
) -> list[Value]:
    """Results of a jaxpr; `keep` sees every value that it computes, and says what stands for it."""
    values = dict(zip(jaxpr.constvars, constants, strict=True))
    values |= zip(jaxpr.invars, arguments, strict=True)
    for equation in jaxpr.eqns:
        primitive = equation.primitive
        params = primitive.get_bind_params(equation.params)
        # The profiler shows the operation's own place in the program.
        with jax.named_scope(str(equation.source_info.name_stack)):
            found = primitive.bind(*(_read(values, v) for v in equation.invars), **params)
        found = found if primitive.multiple_results else [found]
        values |= {var: keep(var, value) for var, value in zip(equation.outvars, found, strict=True)}
    return [_read(values, var) for var in jaxpr.outvars]


def _names(jaxpr: Any, named_primitives: Mapping[str, str]) -> dict[Var, str]:
    names: dict[Var, str] = {}
    for equation in jaxpr.eqns:
        primitive, results = equation.primitive.name, equation.outvars
        if primitive == "name":
            names[results[0]] = equation.params["name"]
        elif primitive == "reduce_precision" and equation.invars[0] in names:
            # `jax.checkpoint` rounds what it saves to its own type, which changes nothing.
            names[results[0]] = names[equation.invars[0]]
        for start, name in named_primitives.items():
            if primitive.startswith(start):
                names |= dict.fromkeys(results, name)
    return names


def _read(values: Mapping[Var, Value], var: Var | Literal) -> Value:
    return var.val if isinstance(var, Literal) else values[var]


def _zeros(aval: Any) -> Any:
    if is_inexact(aval):
        return jnp.zeros(aval.shape, aval.dtype)
    return np.zeros(aval.shape, jax.dtypes.float0)
