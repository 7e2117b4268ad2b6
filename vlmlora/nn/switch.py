"""A conditional whose backward pass finds what a checkpoint policy keeps of the branch that was taken.

Before jax 0.12 a `jax.lax.switch` under differentiation returned the arrays that its branches read as new
ones, frozen weights among them. Here they are read again where they lie. What is kept leaves the conditional
under the name that it has within, and values of different branches that are alike take the same place.

In a loop what goes into a conditional or comes out of it is copied from and to the stacks of all steps. XLA
gives its few streams in turn to a loop's copies, where one that is awaited at once would stand behind a
layer's input on its way from or to host memory. So these are computations (`vlmlora.nn.saved.computed`).
"""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Literal, Var
from jaxtyping import PyTree

from vlmlora.nn.residuals import Trace, Value, trace_residuals
from vlmlora.nn.saved import computed

Branch = Callable[[PyTree, PyTree], PyTree]
"""What a branch returns, of the constants and the operands."""


def switch_saving(
    branches: Sequence[Branch],
    index: jax.Array,
    constants: PyTree,
    operands: PyTree,
    *,
    named_primitives: Mapping[str, str],
) -> PyTree:
    """``jax.lax.switch(index, branches, constants, operands)``, to be differentiated in reverse.

    Under a checkpoint policy by names the backward pass finds the named values of the branch, and runs
    nothing of it again for their sake, if the branches are under such a policy themselves.

    Args:
        branches: each under `jax.checkpoint`, if only some of what it computes is to be kept. They close over
            nothing that is traced, and return the same shapes, all of floating point.
        index: of the branch to take.
        constants: arrays that no gradient flows to.
        operands: floating-point arrays.
        named_primitives: see `vlmlora.nn.residuals.trace_residuals`.
    """
    fixed, fixed_tree = jax.tree.flatten(constants)
    given, given_tree = jax.tree.flatten(operands)
    moving = tuple(range(len(fixed), len(fixed) + len(given)))

    def of_leaves(branch: Branch) -> Callable[..., PyTree]:
        def call(*leaves: jax.Array) -> PyTree:
            fixed, given = leaves[: moving[0]], leaves[moving[0] :]
            return branch(jax.tree.unflatten(fixed_tree, fixed), jax.tree.unflatten(given_tree, given))

        return call

    functions = list(map(of_leaves, branches))

    @jax.custom_vjp
    def run(index: jax.Array, fixed: list[jax.Array], given: list[jax.Array]) -> PyTree:
        return jax.lax.switch(index, functions, *fixed, *given)

    def forward(
        index: jax.Array, fixed: list[jax.Array], given: list[jax.Array]
    ) -> tuple[PyTree, _Residuals]:
        traced = [trace_residuals(each, [*fixed, *given], moving, named_primitives) for each in functions]
        traces, closed_over = zip(*traced, strict=True)
        places = _Places(traces)

        def taking(number: int) -> Callable[..., tuple[PyTree, list[jax.Array]]]:
            def take(*leaves: jax.Array) -> tuple[PyTree, list[jax.Array]]:
                outputs, saved = traces[number].forward(closed_over[number], leaves)
                return jax.tree.unflatten(traces[number].outputs, outputs), places.fill(number, saved)

            return take

        takings = list(map(taking, range(len(branches))))
        outputs, filled = jax.lax.switch(index, takings, *fixed, *given)
        outputs, structure = jax.tree.flatten(outputs)
        outputs, filled = places.name(outputs, filled)
        kept = places.needed(outputs)
        residuals = _Residuals(index, fixed, given, list(closed_over), kept, filled, traces)
        return jax.tree.unflatten(structure, outputs), residuals

    def backward(residuals: _Residuals, cotangents: PyTree) -> tuple[None, None, list[jax.Array]]:
        traces, places = residuals.traces, _Places(residuals.traces)

        def pulling(number: int) -> Callable[..., list[jax.Array]]:
            def pull(
                cotangents: list[jax.Array],
                kept: dict[int, jax.Array],
                filled: list[jax.Array],
                *leaves: jax.Array,
            ) -> list[jax.Array]:
                saved = places.take(number, kept, filled)
                closed_over = residuals.closed_over[number]
                gradients = traces[number].backward(closed_over, leaves, saved, dict(enumerate(cotangents)))
                return [gradients[argument] for argument in moving]

            return pull

        pulls = list(map(pulling, range(len(branches))))
        leaves = (*residuals.fixed, *residuals.given)
        cotangents, filled = jax.tree.leaves(cotangents), computed(residuals.filled)
        kept = dict(zip(residuals.kept, computed(list(residuals.kept.values())), strict=True))
        return None, None, jax.lax.switch(residuals.index, pulls, cotangents, kept, filled, *leaves)

    run.defvjp(forward, backward)
    return run(index, fixed, given)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["index", "fixed", "given", "closed_over", "kept", "filled"],
    meta_fields=["traces"],
)
@dataclass(frozen=True)
class _Residuals:
    """What the forward pass leaves.

    Attributes:
        index: of the branch that was taken.
        fixed: the constants.
        given: the operands.
        closed_over: what the trace of each branch closes over.
        kept: the outputs that the backward pass takes, by their number.
        filled: the places, see `_Places`.
        traces: of each branch.
    """

    index: jax.Array
    fixed: list[jax.Array]
    given: list[jax.Array]
    closed_over: list[list[Value]]
    kept: dict[int, jax.Array]
    filled: list[jax.Array]
    traces: tuple[Trace, ...]


class _Places:
    """Where the branches leave what they save: alike values of different branches in the same place.

    Values are alike that have as many elements of one type; a place has the shape of the first of them. What
    a branch returns anyway has no place.
    """

    def __init__(self, traces: Sequence[Trace]):
        self._traces = traces
        self._numbers = [_numbers_of_outputs(trace) for trace in traces]
        self._placed = [
            [var for var in trace.saved if var not in numbers]
            for trace, numbers in zip(traces, self._numbers, strict=True)
        ]
        self._of_branches = pair_up(
            [
                [(var.aval.size, var.aval.dtype, trace.names.get(var)) for var in placed]
                for trace, placed in zip(traces, self._placed, strict=True)
            ]
        )
        self._all: dict[Any, tuple[int, ...]] = {}
        for places, placed in zip(self._of_branches, self._placed, strict=True):
            for place, var in zip(places, placed, strict=True):
                self._all.setdefault(place, var.aval.shape)

    def fill(self, branch: int, saved: Sequence[jax.Array]) -> list[jax.Array]:
        """Every place, with what a branch saves or with zeros."""
        values = dict(zip(self._traces[branch].saved, saved, strict=True))
        placed = (values[var] for var in self._placed[branch])
        found = dict(zip(self._of_branches[branch], placed, strict=True))
        return [
            found[place].reshape(shape) if place in found else jnp.zeros(shape, place[0][1])
            for place, shape in self._all.items()
        ]

    def needed(self, outputs: Sequence[jax.Array]) -> dict[int, jax.Array]:
        """Those outputs that hold what a branch saves."""
        return {
            numbers[var]: outputs[numbers[var]]
            for trace, numbers in zip(self._traces, self._numbers, strict=True)
            for var in trace.saved
            if var in numbers
        }

    def take(
        self, branch: int, outputs: Mapping[int, jax.Array], filled: Sequence[jax.Array]
    ) -> list[jax.Array]:
        """What a branch has saved."""
        by_place = dict(zip(self._all, filled, strict=True))
        found = dict(zip(self._placed[branch], map(by_place.get, self._of_branches[branch]), strict=True))
        saved, numbers = self._traces[branch].saved, self._numbers[branch]
        found |= {var: outputs[numbers[var]] for var in saved if var in numbers}
        return [found[var].reshape(var.aval.shape) for var in saved]

    def name(
        self, outputs: Sequence[jax.Array], filled: Sequence[jax.Array]
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """Outputs and places under the names that their values have in the branches."""
        of_outputs = {
            numbers[var]: name
            for trace, numbers in zip(self._traces, self._numbers, strict=True)
            for var, name in trace.names.items()
            if var in numbers
        }
        named = dict(zip(of_outputs, computed([outputs[number] for number in of_outputs]), strict=True))
        named = {number: _named(value, of_outputs[number]) for number, value in named.items()}
        outputs = [named.get(number, output) for number, output in enumerate(outputs)]
        names = [name for (_, _, name), _ in self._all]
        return outputs, [_named(*each) for each in zip(computed(filled), names, strict=True)]


def _named(value: jax.Array, name: str | None) -> jax.Array:
    return value if name is None else checkpoint_name(value, name)


def _numbers_of_outputs(trace: Trace) -> dict[Var, int]:
    """The values that a branch returns, perhaps in another shape, and each one's number among the outputs."""
    sources: dict[Var, Var] = {}
    for equation in trace.jaxpr.eqns:
        if _has_same_elements(equation):
            source = equation.invars[0]
            sources[equation.outvars[0]] = sources.get(source, source)
    outputs = enumerate(trace.output_vars)
    numbers = {sources.get(var, var): number for number, var in outputs if not isinstance(var, Literal)}
    return numbers | {var: numbers[source] for var, source in sources.items() if source in numbers}


def _has_same_elements(equation: Any) -> bool:
    """Whether an equation gives what it is given, in another shape or under a name."""
    if not equation.invars or isinstance(equation.invars[0], Literal):
        return False
    if equation.primitive.name == "reduce_precision":
        # `jax.checkpoint` rounds what it saves to its own type, which changes nothing.
        bits = jnp.finfo(equation.outvars[0].aval.dtype)
        rounded = equation.params["exponent_bits"], equation.params["mantissa_bits"]
        return rounded == (bits.nexp, bits.nmant)
    return equation.primitive.name in ("reshape", "name")


def pair_up(kinds: Sequence[Sequence[Hashable]]) -> list[list[tuple[Hashable, int]]]:
    """A name for each thing of several kinds, which is the same for things that are alike.

    The first of a sort in one kind goes with the first of that sort in another, the second with the second.

    Args:
        kinds: the sort of every thing of each kind.
    """
    named = []
    for sorts in kinds:
        seen: Counter = Counter()
        named.append([])
        for sort in sorts:
            named[-1].append((sort, seen[sort]))
            seen[sort] += 1
    return named
