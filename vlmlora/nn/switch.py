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

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
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
        return outputs, _Residuals(index, fixed, given, list(closed_over), places.name(filled), traces)

    def backward(residuals: _Residuals, cotangents: PyTree) -> tuple[None, None, list[jax.Array]]:
        traces, places = residuals.traces, _Places(residuals.traces)

        def pulling(number: int) -> Callable[..., list[jax.Array]]:
            def pull(
                cotangents: list[jax.Array], filled: list[jax.Array], *leaves: jax.Array
            ) -> list[jax.Array]:
                saved = places.take(number, filled)
                closed_over = residuals.closed_over[number]
                gradients = traces[number].backward(closed_over, leaves, saved, dict(enumerate(cotangents)))
                return [gradients[argument] for argument in moving]

            return pull

        pulls = list(map(pulling, range(len(branches))))
        leaves = (*residuals.fixed, *residuals.given)
        cotangents, filled = jax.tree.leaves(cotangents), computed(residuals.filled)
        return None, None, jax.lax.switch(residuals.index, pulls, cotangents, filled, *leaves)

    run.defvjp(forward, backward)
    return run(index, fixed, given)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["index", "fixed", "given", "closed_over", "filled"],
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
        filled: the places, see `_Places`.
        traces: of each branch.
    """

    index: jax.Array
    fixed: list[jax.Array]
    given: list[jax.Array]
    closed_over: list[list[Value]]
    filled: list[jax.Array]
    traces: tuple[Trace, ...]


class _Places:
    """Where the branches leave what they save: alike values of different branches in the same place."""

    def __init__(self, traces: Sequence[Trace]):
        sorts = [
            [(var.aval.shape, var.aval.dtype, trace.names.get(var)) for var in trace.saved]
            for trace in traces
        ]
        self._of_branches = pair_up(sorts)
        self._all = list(dict.fromkeys(place for places in self._of_branches for place in places))

    def fill(self, branch: int, saved: Sequence[jax.Array]) -> list[jax.Array]:
        """Every place, with what a branch saves or with zeros."""
        found = dict(zip(self._of_branches[branch], saved, strict=True))
        for place in self._all:
            (shape, dtype, _), _ = place
            if place not in found:
                found[place] = jnp.zeros(shape, dtype)
        return [found[place] for place in self._all]

    def take(self, branch: int, filled: Sequence[jax.Array]) -> list[jax.Array]:
        """What a branch has saved."""
        found = dict(zip(self._all, filled, strict=True))
        return [found[place] for place in self._of_branches[branch]]

    def name(self, filled: Sequence[jax.Array]) -> list[jax.Array]:
        """The values under the names that they have in the branches."""
        return [
            value if name is None else checkpoint_name(value, name)
            for ((_, _, name), _), value in zip(self._all, computed(filled), strict=True)
        ]


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
