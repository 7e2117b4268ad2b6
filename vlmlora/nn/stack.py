"""Run an activation through layers whose parameters are stacked on a leading axis."""

import dataclasses
import functools
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from vlmlora.nn.attention import ATTENTION_OUTPUT, FUSED_ATTENTION
from vlmlora.nn.flops import jaxprs_of, products_of
from vlmlora.nn.linear import Linear
from vlmlora.nn.saved import Checkpoint, computed, name_for_policies, stacks_are_carried
from vlmlora.nn.scan_in_place import scan_in_place
from vlmlora.nn.switch import pair_up, switch_saving
from vlmlora.nn.trained import TRAINED
from vlmlora.nn.variables import Prepared, Trainable
from vlmlora.quantization.sharded import ShardedWeight
from vlmlora.quantization.weights import MixedWeight, NF4Weight, Weight

logger = logging.getLogger(__name__)

LAYER_INPUT = "layer_input"
"""Name of a layer's input, for checkpoint policies that save or offload it."""
ATTENTION_RESIDUAL = "attention_residual"
"""Name of the residual stream between a layer's attention and its feed-forward block."""

Remat = Callable[[Callable], Callable]
"""A transformation of the layer's body, e.g. ``functools.partial(jax.checkpoint, policy=...)``."""

_NAMED_PRIMITIVES = {FUSED_ATTENTION: ATTENTION_OUTPUT}

HOST_FLOPS_PER_BYTE = 12_000
"""Floating-point operations of a layer's forward pass in the time in which a byte goes to pinned host memory:
an H100 or H200 sends some 42 GB/s by PCI Express 5, beside layers that run at some 500 TFLOP/s."""


@dataclass(frozen=True)
class TowerRemats:
    """How the layers of each tower are rematerialised; None saves all that they compute.

    Attributes:
        vision: wraps the body of the vision tower's scans.
        language: wraps the body of the decoder's scan.
    """

    vision: Remat | None = None
    language: Remat | None = None


SAVE_ALL = TowerRemats()
"""No rematerialisation."""


@dataclass(frozen=True)
class LayerList:
    """Which layers of a Hugging Face list a stack holds, where stacks of several kinds share the list.

    A stacked module without one holds all layers of the list that has its own name.

    Attributes:
        name: the list's name.
        numbers: the layers' numbers in the list, in ascending order.
    """

    name: str
    numbers: tuple[int, ...]


def add_attended(
    x: Float[Array, "*batch hidden"], attended: Float[Array, "*batch hidden"]
) -> Float[Array, "*batch hidden"]:
    """``x + attended``, the residual stream after attention, named `ATTENTION_RESIDUAL`.

    Whoever saves it need not run attention's output projection again.
    """
    # As the matrix that products take: XLA then knows that it is used elsewhere than in the product that is
    # added to it next, and does not copy it to add that in its place.
    rows = x.reshape(-1, x.shape[-1]) + attended.reshape(-1, x.shape[-1])
    return name_for_policies(rows, ATTENTION_RESIDUAL).reshape(x.shape)


def scan_layers(
    layers: nnx.Module,
    x: jax.Array,
    call: Callable[..., tuple[jax.Array, PyTree]],
    *,
    per_layer: PyTree = None,
    count: int | None = None,
    key: PRNGKeyArray | None = None,
    remat: Remat | None = None,
    begins_backward: bool = False,
) -> tuple[jax.Array, PyTree]:
    """``x, y = call(layer, x, per_layer[i], key=key_i)`` for every layer, as one ``jax.lax.scan``.

    Args:
        layers: one layer's module in which every array has a leading axis over the layers.
        x: input of the first layer.
        call: applies one layer; returns the next layer's input and an output of its own, or None.
        per_layer: arrays with a leading layer axis that `call` receives slices of.
        count: of layers, the first of the stack; None for all.
        key: split into one key a layer for dropout; None for none.
        remat: wraps the body of the scan; the layer's input is named `LAYER_INPUT` inside of it. Where a
            `Checkpoint` keeps values that can be computed in place or in host memory, and where not all
            layers run, the scan is `scan_in_place`, which has no forward derivative. Of what a `Checkpoint`
            has to spare, as much goes to host memory as leaves in the time in which a layer runs forward
            (`HOST_FLOPS_PER_BYTE`); nothing does on a mesh, and of layers that differ.
        begins_backward: the backward pass begins with the last of these layers, which have nothing in
            `per_layer` and no outputs of their own. That layer runs behind the scan where a `Checkpoint`
            has another for it (`Checkpoint.at_end`), but not on a mesh.

    Returns:
        The last layer's output, and the layers' own outputs stacked; None for these of no layers.
    """
    count = layers.stack if count is None else count
    if not count:
        return x, None
    at_end = remat.at_end if isinstance(remat, Checkpoint) and not _is_sharded(layers) else None
    if begins_backward and at_end is not None:
        x, _ = scan_layers(layers, x, call, count=count - 1, key=key, remat=remat)
        layer = one_layer(layers, count - 1)
        layer_key = None if key is None else jax.random.split(key, layers.stack)[count - 1]
        return at_end.alone(lambda x: call(layer, x, None, key=layer_key)[0])(x), None
    remat = _with_what_leaves(layers, x, call, per_layer, count, key, remat)
    # In a plain scan XLA copies the weights of layers whose number is not the loop's counter.
    is_in_place = _can_run_in_place(remat, [layers]) and (_keeps_more(remat) or count < layers.stack)
    body, steps = _body_and_steps(layers, x.dtype, call, per_layer, key, count, cuts_weights=not is_in_place)
    if is_in_place:
        return _scan_in_place(body, x, steps, count, remat)[:2]
    return jax.lax.scan(body if remat is None else remat(body), x, steps)


def _scan_in_place(
    body: Callable,
    x: jax.Array,
    steps: PyTree,
    length: int,
    remat: Checkpoint | None,
    keep: Sequence[int] = (),
) -> tuple[jax.Array, PyTree, jax.Array | None]:
    kept = Checkpoint() if remat is None else remat
    return scan_in_place(
        body if remat is None else remat.for_scan_in_place(body),
        x,
        steps,
        length=length,
        in_place=kept.in_place,
        on_host=kept.on_host,
        name_of_x=LAYER_INPUT,
        named_primitives=_NAMED_PRIMITIVES,
        keep=keep,
    )


def _can_run_in_place(remat: Remat | None, stacks: Sequence[nnx.Module]) -> bool:
    """Whether `scan_in_place` can run these layers."""
    is_known = remat is None or isinstance(remat, Checkpoint)
    return is_known and stacks_are_carried() and not any(map(_is_sharded, stacks))


def _keeps_more(remat: Remat | None) -> bool:
    """Whether layers keep what `scan_in_place` handles better than a plain scan."""
    return isinstance(remat, Checkpoint) and bool(remat.in_place or remat.on_host)


def _with_what_leaves(
    layers: nnx.Module,
    x: jax.Array,
    call: Callable[..., tuple[jax.Array, PyTree]],
    per_layer: PyTree,
    count: int,
    key: PRNGKeyArray | None,
    remat: Remat | None,
) -> Remat | None:
    """`remat` with what it has to spare in host memory, as far as it leaves while a layer runs forward."""
    if not isinstance(remat, Checkpoint) or not remat.spare or _is_sharded(layers):
        return remat
    body, steps = _body_and_steps(layers, x.dtype, call, per_layer, key, count)
    step = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), steps)
    jaxpr = jax.make_jaxpr(body)(x, step).jaxpr
    sizes = _bytes_by_name(jaxpr)
    # Of layers that differ the trace does not say which one runs, nor how long.
    room = 0 if _names_in_branches(jaxpr) else products_of(jaxpr).flops // HOST_FLOPS_PER_BYTE
    if remat.host_limit is not None:
        room = min(room, remat.host_limit // count)
    room -= sum(sizes[name] for name in remat.on_host)
    leaving = []
    for name in remat.spare:
        if 0 < sizes[name] <= room:
            leaving.append(name)
            room -= sizes[name]
    taken = count * sum(sizes[name] for name in leaving)
    logger.info("beside the layers %s go to host memory, %.1f GB", leaving or "no values", taken / 1e9)
    return remat.with_on_host(leaving)


def _bytes_by_name(jaxpr: Any) -> Counter:
    """Bytes of the values that policies know by name, without those inside of conditionals."""
    sizes: Counter = Counter()
    for equation in jaxpr.eqns:
        primitive = equation.primitive.name
        if primitive == "name" or primitive.startswith(FUSED_ATTENTION):
            name = equation.params["name"] if primitive == "name" else ATTENTION_OUTPUT
            sizes[name] += sum(v.aval.size * v.aval.dtype.itemsize for v in equation.outvars)
        elif primitive != "cond":
            for inner in jaxprs_of(equation.params):
                sizes += _bytes_by_name(inner)
    return sizes


def _names_in_branches(jaxpr: Any) -> bool:
    """Whether a conditional computes what policies know by name."""
    for equation in jaxpr.eqns:
        inner = jaxprs_of(equation.params)
        is_branching = equation.primitive.name == "cond"
        if any(map(_bytes_by_name if is_branching else _names_in_branches, inner)):
            return True
    return False


def last_layer(layers: nnx.Module) -> nnx.Module:
    """The last layer of a stack by itself. Its frozen weights are read where they lie."""
    return one_layer(layers, layers.stack - 1)


def one_layer(layers: nnx.Module, number: int) -> nnx.Module:
    """A layer of a stack by itself. Its frozen weights are read where they lie."""
    parts = _LayersInPlace(layers, None)
    # Behind the barrier the layer's number is none that XLA knows, and its weights none that it copies.
    place = jax.lax.optimization_barrier(jnp.int32(number))
    trainable = jax.tree.map(lambda leaf: jax.lax.index_in_dim(leaf, number, keepdims=False), parts.trainable)
    return parts.layer(parts.frozen, place, trainable)


def scan_layers_and_keep(
    layers: nnx.Module,
    x: jax.Array,
    call: Callable[..., tuple[jax.Array, PyTree]],
    keep: Sequence[int],
    *,
    key: PRNGKeyArray | None = None,
    remat: Remat | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`scan_layers`, and the outputs of some layers beside the last one's; no other layer's is stored.

    Args:
        layers, x, call, key, remat: as there.
        keep: the layers, in any order; negative numbers count from the last.

    Returns:
        The last layer's output, and those of `keep`, stacked in its order.
    """
    remat = _with_what_leaves(layers, x, call, None, layers.stack, key, remat)
    body, steps = _body_and_steps(layers, x.dtype, call, None, key, layers.stack)
    keep = [range(layers.stack)[layer] for layer in keep]
    wanted = sorted(set(keep))
    if _keeps_more(remat) and _can_run_in_place(remat, [layers]):
        x, _, kept = _scan_in_place(body, x, steps, layers.stack, remat, wanted)
        return x, jnp.zeros((0, *x.shape), x.dtype) if kept is None else kept[np.searchsorted(wanted, keep)]
    body = body if remat is None else remat(body)
    # A layer's place is that of the next wanted one, which overwrites it; after the last there is one more.
    places = np.searchsorted(wanted, np.arange(layers.stack)).astype(np.int32)
    kept = jnp.zeros((places[-1] + 1, *x.shape), x.dtype)

    def keeping_body(carry: tuple[jax.Array, jax.Array], step: Any) -> tuple[Any, None]:
        (x, kept), (place, step) = carry, step
        x, _ = body(x, step)
        return (x, jax.lax.dynamic_update_index_in_dim(kept, x, place, axis=0)), None

    (x, kept), _ = jax.lax.scan(keeping_body, (x, kept), (places, steps))
    return x, kept[np.searchsorted(wanted, keep)]


def scan_mixed_layers(
    stacks: Sequence[nnx.Module],
    x: jax.Array,
    calls: Sequence[Callable[..., tuple[jax.Array, PyTree]]],
    *,
    order: Sequence[int],
    shared: PyTree = None,
    constant: PyTree = None,
    per_layer: Sequence[PyTree] | None = None,
    key: PRNGKeyArray | None = None,
    remat: Remat | None = None,
) -> tuple[jax.Array, PyTree]:
    """Layers of several kinds in any order, as one ``jax.lax.scan`` that compiles each kind once.

    A step calls ``x, y = calls[kind](layer, x, shared, constant, per_layer[kind][i], key=key)`` for the i-th
    layer of its kind. Frozen weights are read where they lie: none is copied into the order of the steps, and
    none is saved for the backward pass. What `remat` keeps of the layers takes as much memory for a layer
    as all kinds together have of different shapes.

    Args:
        stacks: for each kind one layer's module in which every array has a leading axis over its layers.
        x: input of the first layer.
        calls: for each kind what applies one layer; returns the next layer's input and an output of its own.
            The outputs have the same shapes in every kind. What is traced comes in as an argument.
        order: the kind of every step. Steps of one kind take its layers in order.
        shared: floating-point arrays that every step reads.
        constant: arrays that every step reads; no gradient flows to them.
        per_layer: for each kind arrays with a leading axis over its layers; no gradient flows to them.
        key: split into one key a step for dropout; None for none.
        remat: wraps the body of the scan, and every layer; see `scan_layers`. Of what it has to spare nothing
            goes to host memory.

    Returns:
        The last step's x, and the steps' own outputs stacked.
    """
    kinds = np.asarray(order, np.int32)
    places = np.array([np.sum(kinds[:step] == kind) for step, kind in enumerate(kinds)], np.int32)
    parts = [_LayersInPlace(stack, x.dtype) for stack in stacks]
    trainables = tuple(part.trainable for part in parts)
    receivers, direct = _gradients_by_step(trainables, kinds, places)
    keys = None if key is None else jax.random.split(key, len(kinds))

    def branch(kind: int, constants: PyTree, operands: PyTree) -> tuple[jax.Array, PyTree]:
        frozen, trained, arrays, constant, place, step_key = constants
        x, receivers, shared = operands
        trained, arrays = _at(trained[kind], place), None if arrays is None else _at(arrays[kind], place)
        layer = parts[kind].layer(frozen[kind], place, direct(kind, trained, receivers))
        return calls[kind](layer, x, shared, constant, arrays, key=step_key)

    constants = tuple(part.frozen for part in parts), trainables, per_layer, constant
    branches = [functools.partial(branch, kind) for kind in range(len(stacks))]
    if remat is not None:
        branches = list(map(remat.for_branch if isinstance(remat, Checkpoint) else remat, branches))

    def body(x: jax.Array, step: Any) -> tuple[jax.Array, PyTree]:
        number, receivers, step_key = step
        kind, place = jnp.divmod(number, len(kinds))
        operands = checkpoint_name(x, LAYER_INPUT), _compute_slices(receivers), shared
        return switch_saving(
            branches, kind, (*constants, place, step_key), operands, named_primitives=_NAMED_PRIMITIVES
        )

    steps = (jnp.asarray(kinds * len(kinds) + places), receivers, keys)
    if _keeps_more(remat) and _can_run_in_place(remat, stacks):
        return _scan_in_place(body, x, steps, len(kinds), remat)[:2]
    return jax.lax.scan(body if remat is None else remat(body), x, steps)


def _body_and_steps(
    layers: nnx.Module,
    dtype: DTypeLike,
    call: Callable[..., tuple[jax.Array, PyTree]],
    per_layer: PyTree,
    key: PRNGKeyArray | None,
    count: int,
    *,
    cuts_weights: bool = True,
) -> tuple[Callable, PyTree]:
    """What a scan over the first `count` layers runs for each, and the arrays that it slices.

    Frozen weights among those are cut to as many layers only if `cuts_weights`.
    """
    graphdef, trainable, frozen = nnx.split(_expand_adapters(layers, dtype), Trainable, ...)
    keys = None if key is None else jax.random.split(key, layers.stack)
    leaves, treedef = jax.tree.flatten(frozen, is_leaf=_is_weight)
    leaves = list(map(_in_lines, leaves))
    if count < layers.stack:
        first = functools.partial(jax.lax.slice_in_dim, start_index=0, limit_index=count)
        trainable, per_layer, keys = jax.tree.map(first, (trainable, per_layer, keys))
        leaves = [_first_layers(leaf, count, cuts_weights) for leaf in leaves]
    pools = [leaf.split_for_scan()[0] if _is_mixed(leaf) else None for leaf in leaves]
    sliced = [leaf.split_for_scan()[1] if _is_mixed(leaf) else leaf for leaf in leaves]

    def body(x: jax.Array, slices: Any) -> tuple[jax.Array, PyTree]:
        layer_leaves, trainable, layer_inputs, layer_key = slices
        x = checkpoint_name(x, LAYER_INPUT)
        joined = [
            leaf if pool is None else MixedWeight.join(pool, leaf)
            for pool, leaf in zip(pools, layer_leaves, strict=True)
        ]
        joined, trainable, layer_inputs = _compute_slices((joined, trainable, layer_inputs))
        layer = nnx.merge(graphdef, trainable, jax.tree.unflatten(treedef, joined))
        return call(layer, x, layer_inputs, key=layer_key)

    return body, (sliced, trainable, per_layer, keys)


def _compute_slices(slices: PyTree) -> PyTree:
    """The same arrays as results of a computation, where slices alone would be copied.

    XLA gives its few streams in turn to all copies in a loop's body. There a slice that is awaited at once
    would stand behind a layer's input that is on its way to host memory, for which nothing else waits.
    Weights and prepared factors stay as they are: products read their part of a stack where it lies.
    """

    def stays(leaf: Any) -> bool:
        return _is_weight(leaf) or isinstance(leaf, Prepared)

    leaves, structure = jax.tree.flatten(slices, is_leaf=stays)
    results = iter(computed([leaf for leaf in leaves if not stays(leaf)]))
    return jax.tree.unflatten(structure, [leaf if stays(leaf) else next(results) for leaf in leaves])


def _gradients_by_step(
    trainables: Sequence[PyTree], kinds: np.ndarray, places: np.ndarray
) -> tuple[list[Array], Callable[[int, PyTree, Sequence[Array]], PyTree]]:
    """Where the gradients of trained parameters go, in the order of the steps.

    A step reads the parameters of its layer where they lie. Since the gradient of that would be as large as
    all layers', it goes to a step's slice of something else, which nothing reads. Parameters of several kinds
    that are alike in shape and type share that.

    Args:
        trainables: for each kind its parameters, every array with a leading axis over the kind's layers.
        kinds: of every step.
        places: the layer of its kind that every step takes.

    Returns:
        Arrays with a leading axis over the steps, whose gradient goes to the parameters; and what gives a
        layer's parameters, of a kind, such a gradient, of a step's slices.
    """
    flat = [jax.tree.flatten(trainable) for trainable in trainables]
    names = pair_up([[(leaf.shape[1:], leaf.dtype.name) for leaf in leaves] for leaves, _ in flat])
    shared: dict[Any, dict[int, Array]] = {}
    for kind, (leaves, _) in enumerate(flat):
        for name, leaf in zip(names[kind], leaves, strict=True):
            shared.setdefault(name, {})[kind] = leaf
    numbers = {name: number for number, name in enumerate(shared)}

    def receiver(of_kind: dict[int, Array]) -> Array:
        def of_layers(by_step: Array) -> tuple[list[Array]]:
            found = []
            for kind, leaf in of_kind.items():
                rows = by_step[np.flatnonzero(kinds == kind)]  # the first layers, in order
                found.append(jnp.pad(rows, [(0, leaf.shape[0] - rows.shape[0]), *[(0, 0)] * (rows.ndim - 1)]))
            return (found,)

        @jax.custom_vjp
        def receive(leaves: list[Array]) -> Array:
            return jnp.zeros((len(kinds), *leaves[0].shape[1:]), leaves[0].dtype)

        receive.defvjp(lambda leaves: (receive(leaves), None), lambda _, by_step: of_layers(by_step))
        return receive(list(of_kind.values()))

    def direct(kind: int, layer: PyTree, slices: Sequence[Array]) -> PyTree:
        leaves = jax.tree.leaves(layer)
        leaves = [
            _directed(leaf, slices[numbers[name]]) for leaf, name in zip(leaves, names[kind], strict=True)
        ]
        return jax.tree.unflatten(flat[kind][1], leaves)

    return list(map(receiver, shared.values())), direct


@jax.custom_vjp
def _directed(x: Array, receiver: Array) -> Array:
    """`x`, whose gradient goes to `receiver`."""
    del receiver
    return x


_directed.defvjp(lambda x, receiver: (x, None), lambda _, gradient: (None, gradient))


class _LayersInPlace:
    """A stack whose frozen arrays stay whole; a layer reads its part of them."""

    def __init__(self, stack: nnx.Module, dtype: DTypeLike | None):
        self._graphdef, self.trainable, frozen = nnx.split(_expand_adapters(stack, dtype), Trainable, ...)
        leaves, self._treedef = jax.tree.flatten(frozen, is_leaf=_is_weight)
        leaves = map(_in_lines, leaves)
        self.frozen = [_in_place(leaf, stack.stack) if _is_weight(leaf) else leaf for leaf in leaves]

    def layer(self, frozen: list[Any], place: jax.Array, trainable: PyTree) -> nnx.Module:
        leaves = [leaf.layer(place) if _is_weight(leaf) else _at(leaf, place) for leaf in frozen]
        return nnx.merge(self._graphdef, trainable, jax.tree.unflatten(self._treedef, leaves))


def _at(stacked: PyTree, place: jax.Array) -> PyTree:
    """One layer's arrays of stacked ones."""
    take = functools.partial(jax.lax.dynamic_index_in_dim, index=place, keepdims=False)
    return jax.tree.map(take, stacked)


def _in_place(weight: Weight, stack: int) -> MixedWeight:
    """A stacked weight as one whose layers are read from it; the backward pass saves no layer of it."""
    if _is_mixed(weight):
        return weight
    return MixedWeight((weight,), jnp.zeros(stack, jnp.int32), jnp.arange(stack, dtype=jnp.int32))


def _first_layers(leaf: Any, count: int, cuts_weights: bool) -> Any:
    """The first layers of a stacked array or weight, which are read where it lies.

    A scan that takes any slice of its arguments is given a weight as it is; one that cannot, what says where
    each layer is.
    """
    if not _is_weight(leaf):
        return jax.lax.slice_in_dim(leaf, 0, count)
    if not (cuts_weights or _is_mixed(leaf)):
        return leaf
    whole = _in_place(leaf, leaf.stack)
    return MixedWeight(whole.pools, whole.kind[:count], whole.index[:count])


def _is_sharded(layers: nnx.Module) -> bool:
    """Whether the layers lie on a mesh, whose compiler has a say in where stacks are."""

    def is_sharded(leaf: Any) -> bool:
        return isinstance(leaf, ShardedWeight)

    return any(map(is_sharded, jax.tree.leaves(nnx.state(layers), is_leaf=is_sharded)))


def _in_lines(leaf: Any) -> Any:
    """A stacked weight whose layers kernels read where they lie, as far as there is such a form of it."""
    if _is_mixed(leaf):
        return dataclasses.replace(leaf, pools=tuple(map(_in_lines, leaf.pools)))
    return leaf.in_lines() if isinstance(leaf, NF4Weight) else leaf


def _is_weight(leaf: Any) -> bool:
    return isinstance(leaf, Weight)


def _is_mixed(leaf: Any) -> bool:
    return isinstance(leaf, MixedWeight)


def _expand_adapters(layers: nnx.Module, dtype: DTypeLike | None) -> nnx.Module:
    """A copy in which every adapter and trained parameter has an entry for every layer.

    An adapter has zeros where it has no parameters of its own, a trained parameter the original. Adapters are
    ready to be computed with in `dtype`, unless that is None or the layers lie on a mesh.
    """
    dtype = None if _is_sharded(layers) else dtype
    layers = nnx.merge(*nnx.split(layers))
    for _, module in list(nnx.iter_modules(layers)):
        for name, value in list(vars(module).items()):
            if isinstance(value, TRAINED):
                setattr(module, name, value.expand(layers.stack))
            elif name == "adapter" and isinstance(module, Linear) and value:
                adapter = value.expand(layers.stack)
                module.adapter = adapter if dtype is None else adapter.prepared(dtype)
    return layers
