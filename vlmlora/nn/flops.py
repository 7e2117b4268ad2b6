"""The work of a traced program, from its products."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from vlmlora.nn.attention import FUSED_ATTENTION


class Products(NamedTuple):
    """The products of a program.

    Attributes:
        flops: floating-point operations of all.
        largest: elements of the largest result of a plain product.
        largest_in_while: likewise of those in loops whose length is not known, once each.
    """

    flops: int
    largest: int
    largest_in_while: int


def products_of(jaxpr: Any) -> Products:
    """What a traced program multiplies.

    Counted are plain products, the fused attention kernel's forward pass, and kernels that state their cost.
    """
    flops = largest = in_while = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left, out = equation.invars[0].aval, equation.outvars[0].aval
            flops += 2 * out.size * math.prod(left.shape[axis] for axis in contracted)
            largest = max(largest, out.size)
        elif name.startswith(FUSED_ATTENTION):
            query, keys = (v.aval for v in equation.invars[:2])
            # Two products of queries × keys, of which a causal kernel skips half.
            flops += (2 if "CAUSAL" in str(params.get("mask_type")) else 4) * query.size * keys.shape[1]
        elif params.get("cost_estimate") is not None:
            flops += params["cost_estimate"].flops
        else:
            inner = [products_of(each) for each in jaxprs_of(params)]
            each_flops = [each.flops for each in inner]
            # A conditional takes one of its branches.
            taken = max(each_flops, default=0) if name == "cond" else sum(each_flops)
            # A scan repeats its body, and under `jax.shard_map` every device runs it.
            times = params["mesh"].size if name == "shard_map" else params.get("length", 1)
            flops += times * taken
            of_inner = max((each.largest for each in inner), default=0)
            in_while = max(in_while, *(each.largest_in_while for each in inner), of_inner * (name == "while"))
            largest = max(largest, of_inner)
    return Products(flops, largest, in_while)


def jaxprs_of(params: Mapping[str, Any]) -> list[Any]:
    """The programs among an operation's parameters, one by one or in a tuple."""
    found = []
    for value in params.values():
        for each in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(each, "eqns") or hasattr(each, "jaxpr"):
                found.append(getattr(each, "jaxpr", each))
    return found
