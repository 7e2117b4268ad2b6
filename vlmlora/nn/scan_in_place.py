"""A scan of a checkpointed body that computes what it saves where that is kept, or sends it to host memory.

`jax.lax.scan` collects what the backward pass needs in stacks: a step computes a value, uses it, and copies
it into a stack, which was filled with zeros before. Here the stacks are carried from step to step and begin
as memory that nobody has written. A value is put into its place as soon as it is there, and whatever follows
reads it from the stack. So its place is all that a product's result is needed for, and XLA lets the product
write to it.

What goes to host memory leaves while all of the next step runs: a step leaves its values in the carry, and
the next one sends them off. In the backward pass a step fetches those of the step that comes next. The last
step's values stay on the device, where the backward pass begins with them. So that a step's values lie
elsewhere than those that are under way, the loop has two steps in its body.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Var
from jaxtyping import PyTree

from vlmlora.nn.residuals import Trace, Value, evaluate, is_inexact, trace_residuals
from vlmlora.nn.saved import computed


def scan_in_place(
    body: Callable[[jax.Array, PyTree], tuple[jax.Array, PyTree]],
    x: jax.Array,
    steps: PyTree,
    *,
    length: int | None = None,
    in_place: Set[str] = frozenset(),
    on_host: Set[str] = frozenset(),
    name_of_x: str | None = None,
    named_primitives: Mapping[str, str] = MappingProxyType({}),
    keep: Sequence[int] = (),
) -> tuple[jax.Array, PyTree, jax.Array | None]:
    """``jax.lax.scan(body, x, steps)`` with another backward pass, to the same effect.

    It is differentiated in reverse only.

    Args:
        body: under `jax.checkpoint` with a policy that saves on the device what is to be kept, wherever.
        x: the carry, a single floating-point array.
        steps: arrays with a leading axis over the steps.
        length: number of steps. Arrays without a gradient may have more, and are not copied for having them.
        in_place: names, as `jax.ad_checkpoint.checkpoint_name` gives them, of the saved values that are read
            where they are kept. Others are copied there. The carry is read there if it is on the device.
        on_host: names of the saved values that are kept in pinned host memory.
        name_of_x: of the carry, which is kept in any case.
        named_primitives: how the names of primitives begin whose results are named without being given a
            name, and what they are named.
        keep: steps whose carry is returned too, in ascending order.

    Returns:
        The last step's carry, the steps' own outputs stacked, and the carries that the steps of `keep` give,
        stacked; None for these of no steps.
    """
    leaves, steps_tree = jax.tree.flatten(steps)
    length = leaves[0].shape[0] if length is None else length

    def flat_body(x: jax.Array, leaves: Sequence[jax.Array]) -> tuple[jax.Array, PyTree]:
        return body(x, jax.tree.unflatten(steps_tree, leaves))

    # What the body closes over becomes an argument, through which gradients can flow.
    closed, (_, ys) = jax.make_jaxpr(flat_body, return_shape=True)(x, _of_a_step(leaves))
    one_step = partial(evaluate, closed.jaxpr)
    primitives = tuple(named_primitives.items())
    places = _Places(frozenset(in_place), frozenset(on_host), name_of_x in on_host, primitives, tuple(keep))
    x, outputs, kept = _scan(one_step, places, length, list(closed.consts), x, leaves)
    return x, jax.tree.unflatten(jax.tree.structure(ys), outputs), kept


OneStep = Callable[[Sequence[Value], Sequence[jax.Array]], list[Value]]
"""The next x and the outputs of one step, from constants and from x and the step's slices."""


@dataclass(frozen=True)
class _Places:
    """Where the values are kept that the backward pass takes, and which are returned.

    Attributes:
        in_place: names of those that are read where they are kept.
        on_host: names of those that are kept in host memory.
        x_on_host: whether every step's x is.
        named_primitives, keep: see `scan_in_place`.
    """

    in_place: frozenset[str]
    on_host: frozenset[str]
    x_on_host: bool
    named_primitives: tuple[tuple[str, str], ...]
    keep: tuple[int, ...]

    def sends(self, trace: Trace, var: Var) -> bool:
        """Whether a saved value is kept in host memory."""
        return trace.names.get(var) in self.on_host


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _scan(one_step: OneStep, places: _Places, length: int, constants, x, leaves):
    def body(number: jax.Array, carry: Any, leaves: Sequence[jax.Array]) -> tuple[Any, list[Value]]:
        x, kept = carry
        x, *outputs = one_step(constants, [x, *leaves])
        return (x, _keep(kept, x, number, places.keep)), outputs

    (x, kept), outputs = _loop(body, (x, _room_for_kept(x, places.keep)), leaves, length)
    return x, outputs, _cut(kept, places.keep)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["constants", "leaves", "xs", "stacks", "last", "closed_over"],
    meta_fields=["trace"],
)
@dataclass(frozen=True)
class _Residuals:
    """What the forward pass leaves.

    Attributes:
        constants: as the scan was given them.
        leaves: likewise.
        xs: every step's x, and on the device the last one's result; in host memory see `stacks`.
        stacks: of each of the trace's `saved`. In host memory a step's value is in the next step's place, and
            the last step's is not there.
        last: what the last step would send to host memory.
        closed_over: what the trace closes over.
        trace: of one step.
    """

    constants: list[Value]
    leaves: list[jax.Array]
    xs: jax.Array
    stacks: list[jax.Array]
    last: "_Sent"
    closed_over: list[Value]
    trace: Trace


_Sent = tuple[jax.Array | None, dict[int, jax.Array]]
"""x, if it goes to host memory, and the saved values of a step that go there, by their number."""


def _forward(one_step: OneStep, places: _Places, length: int, constants, x, leaves):
    is_moving = [each.perturbed for each in (*constants, x, *leaves)]
    constants, x, leaves = jax.tree.map(lambda each: each.value, (constants, x, leaves))
    trace, closed_over = _trace(one_step, places, is_moving, constants, x, leaves)
    numbers = {var: number for number, var in enumerate(trace.saved)}
    stacks = [_empty(length, var.aval, numbers[var], on_host=places.sends(trace, var)) for var in trace.saved]
    # The first step sends nothing if it stands before the loop. Else what it sends nobody has written, and
    # nobody reads where it goes.
    sent = None, {}
    if length % 2 == 0:
        values_sent = {number: _one(var.aval) for var, number in numbers.items() if places.sends(trace, var)}
        sent = _one(x) if places.x_on_host else None, values_sent
    kept = None
    if places.x_on_host:
        xs, kept = _empty(length, x, len(stacks), on_host=True), _room_for_kept(x, places.keep)
    else:
        xs, x = _put(jax.lax.empty((length + 1, *x.shape), x.dtype), x, 0), None

    def body(number: jax.Array, carry: Any, leaves: Sequence[jax.Array]) -> Any:
        x, kept, xs, stacks, (sent_x, sent) = carry
        stacks, leaving = list(stacks), {}
        for each, value in sent.items():
            stacks[each] = _put(stacks[each], _to_host(value), number)

        def keep(var: Var, value: Value) -> Value:
            if var not in numbers:
                return value
            if places.sends(trace, var):
                leaving[numbers[var]] = value
                return value
            is_in_place = trace.names.get(var) in places.in_place
            kept_value = value
            if places.on_host and not is_in_place:
                # A mere copy would be one more beside those to host memory, and wait for them.
                (kept_value,) = computed([value])
            stacks[numbers[var]] = stack = _put(stacks[numbers[var]], kept_value, number)
            if not is_in_place:
                return value
            # Behind the barrier XLA does not know that what is read is what was written. The stack itself
            # goes straight to the next step, without which no product would write to it.
            return _take(jax.lax.optimization_barrier(stack), number)

        if sent_x is not None:
            xs = _put(xs, _to_host(sent_x), number)
        if not places.x_on_host:
            x = _take(xs, number)
        (result, *outputs), _ = trace.forward(closed_over, [*constants, x, *leaves], keep)
        if leaving or places.x_on_host:
            of_step = (x if places.x_on_host else None, leaving)
            result, (sent_x, sent) = jax.lax.optimization_barrier((result, of_step))
        if places.x_on_host:
            return (result, _keep(kept, result, number, places.keep), xs, stacks, (sent_x, sent)), outputs
        return (None, None, _put(xs, result, number + 1), stacks, (sent_x, sent)), outputs

    start = x, kept, xs, stacks, sent
    end, outputs = _loop(body, start, leaves, length, in_pairs=bool(places.on_host))
    x, kept, xs, stacks, last = end
    residuals = _Residuals(constants, leaves, xs, stacks, last, closed_over, trace)
    if places.x_on_host:
        return (x, outputs, _cut(kept, places.keep)), residuals
    return (xs[-1], outputs, xs[1 + np.array(places.keep)] if places.keep else None), residuals


def _backward(one_step: OneStep, places: _Places, length: int, residuals: _Residuals, cotangents):
    del one_step
    trace, constants = residuals.trace, residuals.constants
    dx, d_outputs, d_kept = cotangents
    if isinstance(dx, SymbolicZero):
        dx = jnp.zeros(dx.shape, dx.dtype)
    if isinstance(d_kept, SymbolicZero):
        d_kept = None
    # The first output is x.
    given = {number + 1: d for number, d in enumerate(d_outputs) if not isinstance(d, SymbolicZero)}
    of_constants = [argument for argument in trace.moving if argument < len(constants)]
    of_leaves = [argument for argument in trace.moving if argument > len(constants)]

    def body(number: jax.Array, carry: Any, slices: Any) -> Any:
        (dx, sums, (x, fetched)), (leaves, given) = carry, slices
        if d_kept is not None:
            place, is_kept = _place_of_kept(number, places.keep)
            dx += jnp.where(is_kept, _take(d_kept, place), 0)
        # Of the step that comes next, which is the one before; the last one fetches what nobody reads.
        # Barriers keep that from beginning before this step and from ending after it.
        coming = (
            residuals.xs if places.x_on_host else None,
            {each: residuals.stacks[each] for each in fetched},
        )
        if places.on_host:
            dx, coming = jax.lax.optimization_barrier((dx, coming))
        coming = jax.tree.map(lambda stack: _to_device(_take(stack, number)), coming)
        x = x if places.x_on_host else _take(residuals.xs, number)
        saved = [
            fetched[each] if each in fetched else _take(stack, number)
            for each, stack in enumerate(residuals.stacks)
        ]
        gradients = trace.backward(residuals.closed_over, [*constants, x, *leaves], saved, {0: dx} | given)
        sums = [total + gradients[each] for total, each in zip(sums, of_constants, strict=True)]
        dx = gradients[len(constants)]
        if places.on_host:
            dx, coming = jax.lax.optimization_barrier((dx, coming))
        return (dx, sums, coming), [gradients[each] for each in of_leaves]

    sums = [jnp.zeros(constants[each].shape, constants[each].dtype) for each in of_constants]
    carry, slices = (dx, sums, residuals.last), (residuals.leaves, given)
    end, d_leaves = _loop(body, carry, slices, length, is_reverse=True, in_pairs=bool(places.on_host))
    dx, sums, _ = end
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
    places: _Places,
    is_moving: Sequence[bool],
    constants: Sequence[Value],
    x: jax.Array,
    leaves: Sequence[jax.Array],
) -> tuple[Trace, list[Value]]:
    """One step with its residuals, and what the trace closes over."""
    arguments = [*constants, x, *_of_a_step(leaves)]
    # After one step x has a gradient in any case.
    moving = tuple(
        number
        for number, argument in enumerate(arguments)
        if (is_moving[number] or number == len(constants)) and is_inexact(argument)
    )

    def step(*arguments: Value) -> list[Value]:
        return one_step(arguments[: len(constants)], arguments[len(constants) :])

    return trace_residuals(step, arguments, moving, dict(places.named_primitives))


def _loop(
    body: Callable[[jax.Array, PyTree, PyTree], tuple[PyTree, PyTree]],
    carry: PyTree,
    slices: PyTree,
    length: int,
    *,
    is_reverse: bool = False,
    in_pairs: bool = False,
) -> tuple[PyTree, PyTree]:
    """``jax.lax.scan`` of a body that is also given the step's number, which is the loop's counter.

    XLA lets a product read and write its part of a stack only where that follows from the counter. And the
    outputs' stacks begin as memory that nobody has written.

    Args:
        body: of a step's number, the carry and the slices to the next carry and the outputs.
        carry: for the first step.
        slices: arrays with a leading axis over the steps.
        length: number of steps.
        is_reverse: the last step comes first.
        in_pairs: two steps to the loop's body and, if their number is odd, step 0 before or behind the loop.
            What a step makes for the carry while what it was given is still in use then takes the place of
            what the step before was given; with one step to the body XLA copies it.
    """

    def step(count: jax.Array, carry: PyTree) -> tuple[jax.Array, PyTree, PyTree]:
        number = length - 1 - count if is_reverse else count
        of_all = slices
        if in_pairs:
            # Else XLA prepares the weights of all steps of a body at once.
            carry, of_all = jax.lax.optimization_barrier((carry, slices))
        return number, *body(number, carry, jax.tree.map(lambda leaf: _take(leaf, number), of_all))

    def and_put(count: jax.Array, carry: PyTree, stacks: PyTree) -> tuple[PyTree, PyTree]:
        number, carry, outputs = step(count, carry)
        return carry, jax.tree.map(lambda stack, y: _put(stack, y, number), stacks, outputs)

    _, _, outputs = jax.eval_shape(step, jnp.int32(0), carry)
    stacks = jax.tree.map(lambda y: jax.lax.empty((length, *y.shape), y.dtype), outputs)
    in_body = 2 if in_pairs else 1
    alone = length % in_body
    first, end = (0, length - alone) if is_reverse else (alone, length)
    # A jitted step is traced and lowered once for all of its places that are given the same kind of carry.
    one = jax.jit(and_put) if in_pairs else and_put

    def several(state: Any) -> Any:
        count, *state = state
        for place in range(in_body):
            state = one(count + place, *state)
        return count + in_body, *state

    state = carry, stacks
    if first:
        state = one(jnp.int32(0), *state)
    _, *state = jax.lax.while_loop(lambda state: state[0] < end, several, (jnp.int32(first), *state))
    if end < length:
        state = one(jnp.int32(end), *state)
    return tuple(state)


def _room_for_kept(x: jax.Array, keep: Sequence[int]) -> jax.Array | None:
    """Where `_keep` puts what is kept; after the last there is one place more, for what is not."""
    return jax.lax.empty((len(keep) + 1, *x.shape), x.dtype) if keep else None


def _keep(kept: jax.Array | None, x: jax.Array, number: jax.Array, keep: Sequence[int]) -> jax.Array | None:
    """`kept` with the x that a step gives in the place of the next kept one, which overwrites it."""
    return None if kept is None else _put(kept, x, _place_of_kept(number, keep)[0])


def _cut(kept: jax.Array | None, keep: Sequence[int]) -> jax.Array | None:
    return None if kept is None else kept[: len(keep)]


def _place_of_kept(number: jax.Array, keep: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """Number of kept steps before one, and whether it is one itself."""
    steps = jnp.asarray(keep, jnp.int32)
    return jnp.sum(steps < number, dtype=jnp.int32), jnp.any(steps == number)


def _of_a_step(leaves: Sequence[jax.Array]) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) for leaf in leaves]


def _to_host(x: jax.Array) -> jax.Array:
    return jax.device_put(x, jax.memory.Space.Host)


def _to_device(x: jax.Array) -> jax.Array:
    return jax.device_put(x, jax.memory.Space.Device)


def _one(value: Any) -> jax.Array:
    """Room for one of these."""
    return jax.lax.empty(value.shape, value.dtype)


def _empty(length: int, one: Any, number: int, *, on_host: bool) -> jax.Array:
    """Room for a stack, which is written before it is read; no other stack has the same number."""
    if not on_host:
        return jax.lax.empty((length, *one.shape), one.dtype)
    # XLA takes memory for it and fills none. For equal arrays it would do so once, and copy.
    return _to_host(jnp.full((length, *one.shape), number, one.dtype))


def _put(stack: jax.Array, value: jax.Array, number: jax.typing.ArrayLike) -> jax.Array:
    starts = (number, *[0] * value.ndim)
    return jax.lax.dynamic_update_slice(stack, value[None], starts, allow_negative_indices=False)


def _take(stack: jax.Array, number: jax.typing.ArrayLike) -> jax.Array:
    starts, sizes = (number, *[0] * (stack.ndim - 1)), (1, *stack.shape[1:])
    return jax.lax.dynamic_slice(stack, starts, sizes, allow_negative_indices=False)[0]
