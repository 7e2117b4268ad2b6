"""Walk a jaxpr and everything inside of it."""

from collections.abc import Iterator

import jax


def equations(jaxpr) -> Iterator:
    """Every equation of a jaxpr, those of nested jaxprs included."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation
        for value in equation.params.values():
            for inner in jax.tree.leaves(value, is_leaf=_is_jaxpr):
                if _is_jaxpr(inner):
                    yield from equations(inner)


def output_shapes(jaxpr) -> set[tuple[int, ...]]:
    """Shapes of everything that any equation computes."""
    return {tuple(out.aval.shape) for eqn in equations(jaxpr) for out in eqn.outvars}


def _is_jaxpr(value) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")
