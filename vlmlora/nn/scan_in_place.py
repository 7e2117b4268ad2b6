"""A scan of a checkpointed body that computes what it saves where that is kept.

`jax.lax.scan` collects what the backward pass needs in stacks: a step computes a value, uses it, and copies
it into a stack, which was filled with zeros before. Here the stacks are carried from step to step and begin
as memory that nobody has written. A value is put into its place as soon as it is there, and whatever follows
reads it from the stack. So its place is all that a product's result is needed for, and XLA lets the product
write to it.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Literal, Var
from jaxtyping import PyTree


def scan_in_place(
    body: Callable[[jax.Array, PyTree], tuple[jax.Array, PyTree]],
    x: jax.Array,
    steps: PyTree,
    *,
    in_place: Set[str],
) -> tuple[jax.Array, PyTree]:
    """``jax.lax.scan(body, x, steps)`` with another backward pass, to the same effect.

    It is differentiated in reverse only.

    Args:
        body: under `jax.checkpoint` with a policy that saves, on the device, what is to be kept.
        x: the carry, a single floating-point array.
        steps: arrays with a leading axis over the steps.
        in_place: names, as `jax.ad_checkpoint.checkpoint_name` gives them, of the saved values that are read
            where they are kept. Others are copied there. The carry is always read there.

    Returns:
        The last step's carry, and the steps' own outputs stacked.
    """
    leaves, steps_tree = jax.tree.flatten(steps)

    def flat_body(x: jax.Array, leaves: Sequence[jax.Array]) -> tuple[jax.Array, PyTree]:
        return body(x, jax.tree.unflatten(steps_tree, leaves))

    # What the body closes over becomes an argument, through which gradients can flow.
    closed, (_, ys) = jax.make_jaxpr(flat_body, return_shape=True)(x, _of_a_step(leaves))
    one_step = partial(_evaluate, closed.jaxpr)
    x, outputs = _scan(one_step, frozenset(in_place), list(closed.consts), x, leaves)
    return x, jax.tree.unflatten(jax.tree.structure(ys), outputs)


Value = Any
"""An array, a tracer of one, or the form in which a trace holds a constant."""
OneStep = Callable[[Sequence[Value], Sequence[jax.Array]], list[Value]]
"""The next x and the outputs of one step, from constants and from x and the step's slices."""


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(one_step: OneStep, in_place: frozenset[str], constants, x, leaves):
    def body(x: jax.Array, leaves: Sequence[jax.Array]) -> tuple[jax.Array, list[Value]]:
        x, *outputs = one_step(constants, [x, *leaves])
        return x, outputs

    return jax.lax.scan(body, x, leaves)


@dataclass(frozen=True, eq=False)
class _Trace:
    """A step and what its backward pass takes.

    Attributes:
        jaxpr: from constants, x and the step's slices to the next x, the outputs, and the residuals.
        outputs: number of results before the residuals.
        moving: which of the arguments have a gradient.
        pull: structure of the step's backward pass, whose leaves are the residuals.
        saved: those residuals that the step computes itself.
    """

    jaxpr: Any
    outputs: int
    moving: tuple[int, ...]
    pull: Any
    saved: tuple[Var, ...]

    @property
    def residuals(self) -> Sequence[Var | Literal]:
        return self.jaxpr.outvars[self.outputs :]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["constants", "leaves", "xs", "stacks", "closed_over"],
    meta_fields=["trace"],
)
@dataclass(frozen=True)
class _Residuals:
    """What the forward pass leaves.

    Attributes:
        constants: as the scan was given them.
        leaves: likewise.
        xs: every step's x, and the last one's result.
        stacks: of each of the trace's `saved`.
        closed_over: what the trace closes over.
        trace: of one step.
    """

    constants: list[Value]
    leaves: list[jax.Array]
    xs: jax.Array
    stacks: list[jax.Array]
    closed_over: list[Value]
    trace: _Trace


def _forward(one_step: OneStep, in_place: frozenset[str], constants, x, leaves):
    is_moving = [each.perturbed for each in (*constants, x, *leaves)]
    constants, x, leaves = jax.tree.map(lambda each: each.value, (constants, x, leaves))
    trace, closed_over = _trace(one_step, is_moving, constants, x, leaves)
    length = leaves[0].shape[0]
    names = _names(trace.jaxpr)
    numbers = {var: number for number, var in enumerate(trace.saved)}
    xs = _put(jax.lax.empty((length + 1, *x.shape), x.dtype), x, 0)
    stacks = [jax.lax.empty((length, *var.aval.shape), var.aval.dtype) for var in trace.saved]

    def body(number: jax.Array, carry: Any, leaves: Sequence[jax.Array]) -> Any:
        xs, stacks = carry
        stacks = list(stacks)

        def keep(var: Var, value: Value) -> Value:
            if var not in numbers:
                return value
            stacks[numbers[var]] = stack = _put(stacks[numbers[var]], value, number)
            if names.get(var) not in in_place:
                return value
            # Behind the barrier XLA does not know that what is read is what was written. The stack itself
            # goes straight to the next step, without which no product would write to it.
            return _take(jax.lax.optimization_barrier(stack), number)

        arguments = [*constants, _take(xs, number), *leaves]
        x, *outputs = _evaluate(trace.jaxpr, closed_over, arguments, keep)[: trace.outputs]
        return (_put(xs, x, number + 1), stacks), outputs

    (xs, stacks), outputs = _loop(body, (xs, stacks), leaves)
    residuals = _Residuals(constants, leaves, xs, stacks, closed_over, trace)
    return (xs[-1], outputs), residuals


def _backward(one_step: OneStep, in_place: frozenset[str], residuals: _Residuals, cotangents):
    del one_step, in_place
    trace, constants = residuals.trace, residuals.constants
    dx, d_outputs = cotangents
    if isinstance(dx, SymbolicZero):
        dx = jnp.zeros(dx.shape, dx.dtype)
    given = {number: d for number, d in enumerate(d_outputs) if not isinstance(d, SymbolicZero)}
    zeros = {
        number: _zeros(var.aval)
        for number, var in enumerate(trace.jaxpr.outvars[1 : trace.outputs])
        if number not in given
    }
    of_constants = [argument for argument in trace.moving if argument < len(constants)]
    of_leaves = [argument for argument in trace.moving if argument > len(constants)]

    def body(number: jax.Array, carry: Any, slices: Any) -> Any:
        (dx, sums), (leaves, given) = carry, slices
        arguments = [*constants, _take(residuals.xs, number), *leaves]
        found = dict(zip(trace.jaxpr.invars, arguments, strict=True))
        found |= zip(trace.jaxpr.constvars, residuals.closed_over, strict=True)
        found |= {var: _take(stack, number) for var, stack in zip(trace.saved, residuals.stacks, strict=True)}
        pull = jax.tree.unflatten(trace.pull, [_read(found, var) for var in trace.residuals])
        d_outputs = given | zeros
        gradients = pull([dx, *(d_outputs[number] for number in range(len(d_outputs)))])
        gradients = dict(zip(trace.moving, gradients, strict=True))
        sums = [total + gradients[each] for total, each in zip(sums, of_constants, strict=True)]
        return (gradients[len(constants)], sums), [gradients[each] for each in of_leaves]

    sums = [jnp.zeros(constants[each].shape, constants[each].dtype) for each in of_constants]
    (dx, sums), d_leaves = _loop(body, (dx, sums), (residuals.leaves, given), reverse=True)
    gradients = dict(zip(of_constants, sums, strict=True)) | dict(zip(of_leaves, d_leaves, strict=True))
    first = len(constants) + 1
    return (
        [gradients.get(number) for number in range(len(constants))],
        dx,
        [gradients.get(first + number) for number in range(len(residuals.leaves))],
    )


_scan.defvjp(_forward, _backward, symbolic_zeros=True)


def _trace(
    one_step: OneStep,
    is_moving: Sequence[bool],
    constants: Sequence[Value],
    x: jax.Array,
    leaves: Sequence[jax.Array],
) -> tuple[_Trace, list[Value]]:
    """One step with its residuals, and what the trace closes over."""
    arguments = [*constants, x, *_of_a_step(leaves)]
    # After one step x has a gradient in any case.
    moving = tuple(
        number
        for number, argument in enumerate(arguments)
        if (is_moving[number] or number == len(constants)) and jnp.issubdtype(argument.dtype, jnp.inexact)
    )

    def step(*arguments: Value) -> tuple[list[Value], Callable]:
        def of_moving(*values: jax.Array) -> list[Value]:
            every = list(arguments)
            for number, value in zip(moving, values, strict=True):
                every[number] = value
            return one_step(every[: len(constants)], every[len(constants) :])

        return jax.vjp(of_moving, *(arguments[number] for number in moving))

    closed, (outputs, pull) = jax.make_jaxpr(step, return_shape=True)(*arguments)
    jaxpr = closed.jaxpr
    given = {*jaxpr.invars, *jaxpr.constvars}
    residuals = dict.fromkeys(v for v in jaxpr.outvars[len(outputs) :] if not isinstance(v, Literal))
    saved = tuple(var for var in residuals if var not in given)
    return _Trace(jaxpr, len(outputs), moving, jax.tree.structure(pull), saved), list(closed.consts)


def _loop(
    body: Callable[[jax.Array, PyTree, PyTree], tuple[PyTree, PyTree]],
    carry: PyTree,
    slices: PyTree,
    *,
    reverse: bool = False,
) -> tuple[PyTree, PyTree]:
    """``jax.lax.scan`` of a body that is also given the step's number, which is the loop's counter.

    XLA lets a product read and write its part of a stack only where that follows from the counter. And the
    outputs' stacks begin as memory that nobody has written.
    """
    length = jax.tree.leaves(slices)[0].shape[0]

    def step(count: jax.Array, carry: PyTree) -> tuple[jax.Array, PyTree, PyTree]:
        number = length - 1 - count if reverse else count
        return number, *body(number, carry, jax.tree.map(lambda leaf: _take(leaf, number), slices))

    def and_put(state: Any) -> Any:
        count, carry, stacks = state
        number, carry, outputs = step(count, carry)
        return count + 1, carry, jax.tree.map(lambda stack, y: _put(stack, y, number), stacks, outputs)

    _, _, outputs = jax.eval_shape(step, jnp.int32(0), carry)
    stacks = jax.tree.map(lambda y: jax.lax.empty((length, *y.shape), y.dtype), outputs)
    start = jnp.int32(0), carry, stacks
    return jax.lax.while_loop(lambda state: state[0] < length, and_put, start)[1:]


def _evaluate(
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


def _read(values: Mapping[Var, Value], var: Var | Literal) -> Value:
    return var.val if isinstance(var, Literal) else values[var]


def _names(jaxpr: Any) -> dict[Var, str]:
    """Names of values."""
    names: dict[Var, str] = {}
    for equation in jaxpr.eqns:
        if equation.primitive.name == "name":
            names[equation.outvars[0]] = equation.params["name"]
        elif equation.primitive.name == "reduce_precision" and equation.invars[0] in names:
            # `jax.checkpoint` rounds what it saves to its own type, which changes nothing.
            names[equation.outvars[0]] = names[equation.invars[0]]
    return names


def _of_a_step(leaves: Sequence[jax.Array]) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) for leaf in leaves]


def _zeros(aval: Any) -> Any:
    if jnp.issubdtype(aval.dtype, jnp.inexact):
        return jnp.zeros(aval.shape, aval.dtype)
    return np.zeros(aval.shape, jax.dtypes.float0)


def _put(stack: jax.Array, value: jax.Array, number: jax.typing.ArrayLike) -> jax.Array:
    starts = (number, *[0] * value.ndim)
    return jax.lax.dynamic_update_slice(stack, value[None], starts, allow_negative_indices=False)


def _take(stack: jax.Array, number: jax.typing.ArrayLike) -> jax.Array:
    starts, sizes = (number, *[0] * (stack.ndim - 1)), (1, *stack.shape[1:])
    return jax.lax.dynamic_slice(stack, starts, sizes, allow_negative_indices=False)[0]
