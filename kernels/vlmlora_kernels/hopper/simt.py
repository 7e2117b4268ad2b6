"""Thread-level code inside a Mosaic GPU kernel: 32-bit words, pointers, and the few instructions it needs.

`plgpu.inline_mgpu` hands the body of a kernel to the MLIR builders. This module gives those builders names
that read like CUDA: every function here emits instructions for the thread that runs them.
"""

from collections.abc import Callable, Sequence
from typing import Any

from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, scf

GLOBAL, SHARED = 1, 3  # address spaces of NVPTX
_DYNAMIC = -(2**31)  # "this index is an operand"


def i32() -> ir.Type:
    """The type of a 32-bit integer, signed or not."""
    return ir.IntegerType.get_signless(32)


def i64() -> ir.Type:
    """The type of a 64-bit integer."""
    return ir.IntegerType.get_signless(64)


def f32() -> ir.Type:
    """The type of a float32."""
    return ir.F32Type.get()


def constant(value: float) -> ir.Value:
    """A float32."""
    return mgpu_utils.c(float(value), f32())


def _integer(value: int, type_: ir.Type | None = None) -> ir.Value:
    return mgpu_utils.c(value, type_ or i32())


class Word:
    """A 32-bit integer of one thread, with the operators of an unsigned one."""

    def __init__(self, value: "ir.Value | int | Word"):
        self.value = _integer(value) if isinstance(value, int) else getattr(value, "value", value)

    def __add__(self, other):
        return Word(arith.addi(self.value, Word(other).value))

    def __sub__(self, other):
        return Word(arith.subi(self.value, Word(other).value))

    def __mul__(self, other):
        return Word(arith.muli(self.value, Word(other).value))

    def __floordiv__(self, other):
        return Word(arith.divui(self.value, Word(other).value))

    def __mod__(self, other):
        return Word(arith.remui(self.value, Word(other).value))

    def __and__(self, other):
        return Word(arith.andi(self.value, Word(other).value))

    def __or__(self, other):
        return Word(arith.ori(self.value, Word(other).value))

    def __xor__(self, other):
        return Word(arith.xori(self.value, Word(other).value))

    def __lshift__(self, other):
        return Word(arith.shli(self.value, Word(other).value))

    def __rshift__(self, other):
        return Word(arith.shrui(self.value, Word(other).value))

    __radd__ = __add__
    __rmul__ = __mul__

    def __lt__(self, other) -> ir.Value:
        return arith.cmpi(arith.CmpIPredicate.ult, self.value, Word(other).value)

    def equals(self, other) -> ir.Value:
        """A predicate: both words are the same."""
        return arith.cmpi(arith.CmpIPredicate.eq, self.value, Word(other).value)

    def min(self, other) -> "Word":
        """The smaller of two words."""
        return Word(arith.minui(self.value, Word(other).value))

    def max(self, other) -> "Word":
        """The larger of two words."""
        return Word(arith.maxui(self.value, Word(other).value))


def both(a: ir.Value, b: ir.Value) -> ir.Value:
    """Where both predicates hold."""
    return arith.andi(a, b)


def select(condition: ir.Value, a: Any, b: Any) -> Any:
    """`a` where the predicate holds, else `b`."""
    if isinstance(a, Word):
        return Word(arith.select(condition, a.value, b.value))
    return arith.select(condition, a, b)


class Pointer:
    """The address of a GMEM or SMEM reference; offsets count bytes."""

    def __init__(self, ref: ir.Value | None, space: int, _address: ir.Value | None = None):
        self.space = space
        if _address is None:
            pointer = mgpu_utils.memref_ptr(ref)
            if space == GLOBAL:
                pointer = llvm.addrspacecast(llvm.PointerType.get(GLOBAL), pointer)
            _address = pointer
        self.address = _address

    def at(self, offset: Word | int) -> ir.Value:
        """The pointer `offset` bytes further on; offsets are unsigned and below 4 GiB."""
        if isinstance(offset, int):
            index = _integer(offset, i64())
        elif self.space == GLOBAL:
            index = arith.extui(i64(), offset.value)
        else:
            index = offset.value
        byte = ir.IntegerType.get_signless(8)
        dynamic = llvm.GEPOp(
            self.address.type, self.address, [index], [_DYNAMIC], byte, llvm.GEPNoWrapFlags.none
        )
        return dynamic.result

    def shifted(self, offset: Word | int) -> "Pointer":
        """A pointer object `offset` bytes further on."""
        return Pointer(None, self.space, self.at(offset))


# A copy by the hardware reads past what orders loads and stores.
_BEFORE_COPIES = "fence.proxy.async.global;"
_LOADS = {1: ("b32", "$0"), 2: ("v2.b32", "{$0, $1}"), 4: ("v4.b32", "{$0, $1, $2, $3}")}


def load_words(pointer: Pointer, offset: Word | int, count: int, *, once: bool = False) -> list[Word]:
    """Load 1, 2 or 4 aligned words of shared memory, or of global memory that nothing writes.

    Args:
        pointer: where from.
        offset: bytes.
        count: words.
        once: of global memory, do not keep the line in the L1 cache.
    """
    kind, registers = _LOADS[count]
    how = {GLOBAL: "global.nc.", SHARED: "shared."}[pointer.space] + ("L1::no_allocate." if once else "")
    result = mgpu_utils.inline_ptx(
        f"ld.{how}{kind} {registers}, [${count}];",
        pointer.at(offset),
        result_types=[i32()] * count,
        # Shared memory is written while the kernel runs: such a load stays behind the wait before it.
        has_side_effects=pointer.space == SHARED,
    )
    return [Word(value) for value in result]


def load_shared(pointer: Pointer, offset: Word | int) -> Word:
    """Load one word of shared memory."""
    return Word(llvm.load(i32(), pointer.at(offset)))


def load_shared_float(pointer: Pointer, offset: Word | int) -> ir.Value:
    """Load one float32 of shared memory."""
    return llvm.load(f32(), pointer.at(offset))


def load_constant(pointer: Pointer, offset: Word | int, count: int) -> list[Word]:
    """Load 1 or 2 words of shared memory that nothing writes any more: the load may move."""
    kind, registers = _LOADS[count]
    result = mgpu_utils.inline_ptx(
        f"ld.shared.{kind} {registers}, [${count}];", pointer.at(offset), result_types=[i32()] * count
    )
    return [Word(value) for value in result]


def load_written(pointer: Pointer, offset: Word | int, count: int) -> list[Word]:
    """Load 1, 2 or 4 aligned words of global memory that another block of threads has written."""
    kind, registers = _LOADS[count]
    result = mgpu_utils.inline_ptx(
        f"ld.global.{kind} {registers}, [${count}];",
        pointer.at(offset),
        result_types=[i32()] * count,
        has_side_effects=True,
    )
    return [Word(value) for value in result]


def load_count(pointer: Pointer) -> Word:
    """Load a number of `count_up`; what was written before it can be read then, and copied."""
    result = mgpu_utils.inline_ptx(
        f"ld.acquire.gpu.global.b32 $0, [$1]; {_BEFORE_COPIES}",
        pointer.at(0),
        result_types=i32(),
        has_side_effects=True,
    )
    return Word(result)


def wait_for_count(pointer: Pointer, count: int) -> None:
    """Wait until a number of `count_up` is at least `count`; what was written before it can be read then."""
    mgpu_utils.inline_ptx(
        "{ .reg .pred fewer; .reg .b32 found; AGAIN: ld.acquire.gpu.global.b32 found, [$0]; "
        f"setp.lo.u32 fewer, found, {count}; @fewer bra AGAIN; {_BEFORE_COPIES} }}",
        pointer.at(0),
        has_side_effects=True,
    )


def count_up(pointers: Sequence[Pointer]) -> None:
    """Say that the warp has written something: add one to each of some numbers of global memory."""
    mgpu_utils.inline_ptx(
        "bar.warp.sync 0xffffffff; fence.acq_rel.gpu;", has_side_effects=True, convergent=True
    )
    with when(lane().equals(0)):
        for pointer in pointers:
            mgpu_utils.inline_ptx(
                "red.relaxed.gpu.global.add.u32 [$0], 1;", pointer.at(0), has_side_effects=True
            )


def take(pointer: Pointer) -> Word:
    """In lane 0, the number at a pointer to global memory, of which every warp that asks gets the next."""
    number = mgpu_utils.inline_ptx(
        "{ .reg .pred first; setp.eq.u32 first, $2, 0; mov.b32 $0, 0; "
        "@first atom.relaxed.gpu.global.add.u32 $0, [$1], 1; }",
        pointer.at(0),
        lane().value,
        result_types=i32(),
        has_side_effects=True,
    )
    return Word(number)


def load_transposed(pointer: Pointer, offset: Word) -> list[Word]:
    """Load four 8×8 matrices of 16-bit elements (PTX ``ldmatrix.x4.trans``).

    Lane ``8 * m + r`` gives the offset of row `r` of matrix `m`, 16 bytes; lane `l` gets rows
    ``2 * (l % 4)`` and the next of column ``l // 4`` of each matrix.
    """
    result = mgpu_utils.inline_ptx(
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0, $1, $2, $3}, [$4];",
        pointer.at(offset),
        result_types=[i32()] * 4,
        has_side_effects=True,
    )
    return [Word(value) for value in result]


def load_byte(pointer: Pointer, offset: Word | int) -> Word:
    """Load one byte of read-only global memory."""
    result = mgpu_utils.inline_ptx("ld.global.nc.u8 $0, [$1];", pointer.at(offset), result_types=i32())
    return Word(result)


def load_float(pointer: Pointer, offset: Word | int) -> ir.Value:
    """Load one float32 of read-only global memory."""
    return mgpu_utils.inline_ptx("ld.global.nc.f32 $0, [$1];", pointer.at(offset), result_types=f32())


def store_float(pointer: Pointer, offset: Word | int, value: ir.Value) -> None:
    """Store one float32."""
    llvm.store(value, pointer.at(offset))


def store_words(pointer: Pointer, offset: Word | int, words: Sequence[Word]) -> None:
    """Store 1, 2 or 4 words to an aligned address."""
    kind = _LOADS[len(words)][0]
    operands = ", ".join(f"${i + 1}" for i in range(len(words)))
    operands = operands if len(words) == 1 else f"{{{operands}}}"
    space = "global" if pointer.space == GLOBAL else "shared"
    mgpu_utils.inline_ptx(
        f"st.{space}.{kind} [$0], {operands};",
        pointer.at(offset),
        *[word.value for word in words],
        has_side_effects=True,
    )


def thread() -> Word:
    """Index of the thread in its block."""
    return Word(mgpu_utils.thread_idx())


def lane() -> Word:
    """Index of the thread in its warp."""
    # From the register and not from the thread's index, whose remainder would be masked again at every use.
    return Word(mgpu_utils.inline_ptx("mov.u32 $0, %laneid;", result_types=i32()))


def warp() -> Word:
    """Index of the warp in its block, known to the compiler as the same for all its lanes."""
    return Word(mgpu_utils.warp_idx())


def block() -> Word:
    """Index of the block in its grid."""
    return Word(mgpu_utils.block_idx())


def barrier() -> None:
    """Wait for every thread of the block."""
    gpu.barrier()


def barrier_of(threads: int) -> None:
    """Wait for as many threads, in whole warps; all that come here wait for each other."""
    # Mosaic GPU takes the low numbers of the 16 barriers.
    mgpu_utils.inline_ptx(f"bar.sync 15, {threads};", has_side_effects=True)


def when(condition: ir.Value):
    """A context whose instructions run where the predicate holds."""
    return mgpu_utils.when(condition)


def loop(count: Word, carry: Sequence[ir.Value], body: Callable[[Word, list[ir.Value]], Sequence[ir.Value]]):
    """``for i in range(count): carry = body(i, carry)``; returns the last carry."""
    for_op = scf.ForOp(_integer(0), count.value, _integer(1), list(carry))
    with ir.InsertionPoint(for_op.body):
        scf.YieldOp(list(body(Word(for_op.induction_variable), list(for_op.inner_iter_args))))
    return list(for_op.results)


def loop_while(
    carry: Sequence[ir.Value],
    condition: Callable[[list[ir.Value]], ir.Value],
    body: Callable[[list[ir.Value]], Sequence[ir.Value]],
) -> list[ir.Value]:
    """``while condition(carry): carry = body(carry)``; returns the last carry."""
    types = [value.type for value in carry]
    while_op = scf.WhileOp(types, list(carry))
    before, after = while_op.before.blocks.append(*types), while_op.after.blocks.append(*types)
    with ir.InsertionPoint(before):
        scf.ConditionOp(condition(list(before.arguments)), list(before.arguments))
    with ir.InsertionPoint(after):
        scf.YieldOp(list(body(list(after.arguments))))
    return list(while_op.results)


def branch(condition: ir.Value, values: Sequence[ir.Value], body: Callable[[], Sequence[ir.Value]]):
    """``body()`` where the predicate holds, else `values`."""
    if_op = scf.IfOp(condition, [value.type for value in values], has_else=True)
    with ir.InsertionPoint(if_op.then_block):
        scf.YieldOp(list(body()))
    with ir.InsertionPoint(if_op.else_block):
        scf.YieldOp(list(values))
    return list(if_op.results)


def pack_bfloat16(low: ir.Value, high: ir.Value) -> Word:
    """Round two float32 to nearest even bfloat16, in one word."""
    return Word(mgpu_utils.inline_ptx("cvt.rn.bf16x2.f32 $0, $1, $2;", high, low, result_types=i32()))


def store_bfloat16(pointer: Pointer, offset: Word | int, value: ir.Value) -> None:
    """Round a float32 to nearest even and store it."""
    llvm.store(arith.truncf(ir.BF16Type.get(), value), pointer.at(offset))


def multiply(a: ir.Value, b: ir.Value) -> ir.Value:
    """A float32 product, rounded, that no addition is fused into."""
    return mgpu_utils.inline_ptx("mul.rn.f32 $0, $1, $2;", a, b, result_types=f32())


def add(a: ir.Value, b: ir.Value) -> ir.Value:
    """A float32 sum, rounded."""
    return mgpu_utils.inline_ptx("add.rn.f32 $0, $1, $2;", a, b, result_types=f32())


def fma(a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """``a * b + c`` in float32, rounded once."""
    return mgpu_utils.inline_ptx("fma.rn.f32 $0, $1, $2, $3;", a, b, c, result_types=f32())


def as_float(word: Word) -> ir.Value:
    """The float32 with these bits."""
    return mgpu_utils.bitcast(word.value, f32())


def as_word(value: ir.Value) -> Word:
    """The bits of a float32."""
    return Word(mgpu_utils.bitcast(value, i32()))


def permute(low: Word, high: Word, selector: int | Word) -> Word:
    """Pick four of the eight bytes of two words (PTX ``prmt``)."""
    return Word(
        mgpu_utils.inline_ptx(
            "prmt.b32 $0, $1, $2, $3;", low.value, high.value, Word(selector).value, result_types=i32()
        )
    )


def shuffle(value: Word, lane: Word) -> Word:
    """The value that another lane of the warp holds."""
    return Word(
        mgpu_utils.inline_ptx(
            "shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;",
            value.value,
            lane.value,
            result_types=i32(),
            has_side_effects=True,
        )
    )


def mma(a: Sequence[Word], b: Sequence[Word], accumulator: Sequence[ir.Value]) -> list[ir.Value]:
    """A warp's product of 16×16 by 16×8 bfloat16, added to float32 (PTX ``mma.sync.m16n8k16``)."""
    result = mgpu_utils.inline_ptx(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
        *[word.value for word in a],
        *[word.value for word in b],
        *accumulator,
        result_types=[f32()] * 4,
    )
    return list(result)


def fill(target: Pointer, source: Pointer, count: int, thread: Word, threads: int) -> None:
    """Copy `count` words, a multiple of 4, from global to shared memory with all threads; a barrier must
    follow."""
    for first in range(0, count // 4, threads):
        index = thread + first
        with when(index < count // 4):
            store_words(target, index << 4, load_words(source, index << 4, 4))


def barrier_among(number: Word, threads: int) -> None:
    """Wait for `threads` threads of the block, whole warps, that meet at barrier `number` (1 to 15)."""
    mgpu_utils.inline_ptx(f"bar.sync $0, {threads};", number.value, has_side_effects=True)


def copy_async(target: Pointer, at: Word | int, source: Pointer, offset: Word | int) -> None:
    """Start copying 16 aligned bytes from global to shared memory, past the L1 cache."""
    mgpu_utils.inline_ptx(
        "cp.async.cg.shared.global [$0], [$1], 16;",
        target.at(at),
        source.at(offset),
        has_side_effects=True,
    )


def commit_copies() -> None:
    """Close a group of the thread's copies."""
    mgpu_utils.inline_ptx("cp.async.commit_group;", has_side_effects=True)


def wait_copies(pending: int) -> None:
    """Wait until no more than the last `pending` groups of the thread's copies are under way."""
    mgpu_utils.inline_ptx(f"cp.async.wait_group {pending};", has_side_effects=True)


def shuffle_xor(value: Word, mask: int) -> Word:
    """The value of the lane whose number differs in the bits of `mask`."""
    return Word(
        mgpu_utils.inline_ptx(
            f"shfl.sync.bfly.b32 $0, $1, {mask}, 0x1f, 0xffffffff;",
            value.value,
            result_types=i32(),
            has_side_effects=True,
        )
    )


def cluster() -> Word:
    """Index of the cluster of blocks in its grid."""
    return Word(mgpu_utils.inline_ptx("mov.u32 $0, %clusterid.x;", result_types=i32()))


def cluster_rank() -> Word:
    """Index of the block in its cluster."""
    return Word(mgpu_utils.inline_ptx("mov.u32 $0, %cluster_ctarank;", result_types=i32()))


def cluster_barrier() -> None:
    """Wait for every thread of the cluster; what they stored to shared memory can be read then."""
    mgpu_utils.inline_ptx("barrier.cluster.arrive.release.aligned;", has_side_effects=True)
    mgpu_utils.inline_ptx("barrier.cluster.wait.acquire.aligned;", has_side_effects=True)


def load_peer_float(pointer: Pointer, offset: Word | int, rank: int) -> ir.Value:
    """Load one float32 of the same shared array of another block of the cluster."""
    return mgpu_utils.inline_ptx(
        f"{{ .reg .b32 at; mapa.shared::cluster.u32 at, $1, {rank}; ld.shared::cluster.f32 $0, [at]; }}",
        pointer.at(offset),
        result_types=f32(),
        has_side_effects=True,
    )


def load_peer_words(pointer: Pointer, offset: Word | int, rank: Word) -> list[Word]:
    """Load four aligned words of the same shared array of another block of the cluster."""
    result = mgpu_utils.inline_ptx(
        "{ .reg .b32 at; mapa.shared::cluster.u32 at, $4, $5; "
        "ld.shared::cluster.v4.b32 {$0, $1, $2, $3}, [at]; }",
        pointer.at(offset),
        rank.value,
        result_types=[i32()] * 4,
        has_side_effects=True,
    )
    return [Word(value) for value in result]


def hidden(word: Word) -> Word:
    """The same word, of which the compiler knows nothing: it does not unroll a loop that often."""
    return Word(mgpu_utils.inline_ptx("mov.b32 $0, $1;", word.value, result_types=i32()))
