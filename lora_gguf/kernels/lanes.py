"""Sixteen numbers side by side inside kernels: ``F32`` (f32), ``U32`` (uint32) and ``I8`` (int8) lanes, as vector
registers hold them.

LLVM turns loops into vector code by rules of its own, and leaves short loops scalar; code on lanes is vector code on
every machine, two or four registers wide where there are no sixteen lanes, with the same results bit for bit: ``fma``
rounds once everywhere. Python's operators work lane by lane.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from lora_gguf.kernels.decorators import kernel
from lora_gguf.kernels.internals import (
    AbstractTemplate,
    TypingError,
    cgutils,
    infer_global,
    intrinsic,
    ir,
    lower_builtin,
    models,
    register_model,
    signature,
    types,
)

N = 16
# for indices, unsigned: a signed one could count from the end, which is looked up each time
ONE, STRIDE = np.uint64(1), np.uint64(N)
_SCALARS = {"F32": ir.FloatType(), "U32": ir.IntType(32), "I8": ir.IntType(8)}


class Lanes(types.Type):
    """The numba type of sixteen numbers."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        super().__init__(name=f"Lanes({kind})")


F32, U32, I8 = Lanes("F32"), Lanes("U32"), Lanes("I8")


def _vector(scalar: Any) -> ir.VectorType:
    return ir.VectorType(scalar, N)


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, lanes: Any) -> None:
        super().__init__(manager, lanes, _vector(_SCALARS[lanes.kind]))


def _operator(op: Any, lanes: Lanes, emit: str) -> None:
    """Let ``op`` of two ``lanes`` be the LLVM instruction ``emit``."""

    @infer_global(op)
    class _Template(AbstractTemplate):
        def generic(self, args: Any, _: Any) -> Any:
            return signature(lanes, *args) if args == (lanes, lanes) else None

    lower_builtin(op, lanes, lanes)(lambda context, builder, sig, args: getattr(builder, emit)(*args))


for _op, _lanes, _emit in (
    (operator.add, F32, "fadd"),
    (operator.sub, F32, "fsub"),
    (operator.mul, F32, "fmul"),
    (operator.truediv, F32, "fdiv"),
    (operator.add, U32, "add"),
    (operator.mul, U32, "mul"),
    (operator.and_, U32, "and_"),
    (operator.xor, U32, "xor"),
    (operator.rshift, U32, "lshr"),
    (operator.add, I8, "add"),
    (operator.sub, I8, "sub"),
    (operator.and_, I8, "and_"),
    (operator.xor, I8, "xor"),
):
    _operator(_op, _lanes, _emit)


def _llvm(name: str) -> Any:
    """What calls LLVM's function ``name`` on f32 lanes, or on f32."""

    def emit(_context: Any, builder: Any, sig: Any, args: Any) -> Any:
        function = ir.FunctionType(args[0].type, [arg.type for arg in args])
        suffix = f"v{N}f32" if sig.return_type == F32 else "f32"
        return builder.call(cgutils.get_or_insert_function(builder.module, function, f"llvm.{name}.{suffix}"), args)

    return emit


def _select(comparison: str) -> Any:
    """What takes the first of two lanes where the comparison holds, and the second elsewhere: one instruction, unlike
    minnum.
    """
    return lambda context, builder, sig, args: builder.select(builder.fcmp_ordered(comparison, *args), *args)


@intrinsic
def floor(typing: Any, x: Any) -> Any:
    return x(x), _llvm("floor")


@intrinsic
def magnitude(typing: Any, x: Any) -> Any:
    return x(x), _llvm("fabs")


@intrinsic
def fma(typing: Any, x: Any, y: Any, z: Any) -> Any:
    """Return x * y + z, rounded once; also of three f32."""
    return x(x, y, z), _llvm("fma")


@intrinsic
def least(typing: Any, x: Any, y: Any) -> Any:
    """Return the smaller of each two; ``y`` where ``x`` is NaN."""
    return x(x, y), _select("<")


@intrinsic
def most(typing: Any, x: Any, y: Any) -> Any:
    """Return the larger of each two; ``y`` where ``x`` is NaN."""
    return x(x, y), _select(">")


def _splat(builder: Any, scalar: Any) -> Any:
    vector = ir.Constant(_vector(scalar.type), ir.Undefined)
    first = builder.insert_element(vector, scalar, ir.IntType(32)(0))
    return builder.shuffle_vector(first, vector, ir.Constant(_vector(ir.IntType(32)), [0] * N))


@intrinsic
def splat(typing: Any, value: Any) -> Any:
    """Return all lanes the one f32, uint32 or int8 ``value``."""
    lanes = {types.float32: F32, types.uint32: U32, types.int8: I8}[value]
    return lanes(value), lambda context, builder, sig, args: _splat(builder, args[0])


@intrinsic
def iota(typing: Any) -> Any:
    """Return 0 to 15, uint32."""
    return U32(), lambda *_: _numbers(range(N))


@intrinsic
def to_f32(typing: Any, lanes: Any) -> Any:
    """Return int8 numbers, or whole numbers below 2**31, as f32."""
    return F32(lanes), lambda context, builder, sig, args: builder.sitofp(args[0], _vector(ir.FloatType()))


@intrinsic
def to_u32(typing: Any, lanes: Any) -> Any:
    """Return whole f32 numbers from 0 to below 2**31 as uint32."""
    return U32(F32), lambda context, builder, sig, args: builder.fptosi(args[0], _vector(ir.IntType(32)))


@intrinsic
def to_i8(typing: Any, lanes: Any) -> Any:
    """Return whole f32 numbers from -128 to 127 as int8."""
    return I8(F32), lambda context, builder, sig, args: _as_i8(builder, args[0])


def _as_i8(builder: Any, lanes: Any) -> Any:
    return builder.trunc(builder.fptosi(lanes, _vector(ir.IntType(32))), _vector(ir.IntType(8)))


def _mask(compare: Any) -> Any:
    """What returns int8 lanes, -1 where two lanes compare so, and 0 elsewhere."""
    return lambda context, builder, sig, args: builder.sext(compare(builder, *args), _vector(ir.IntType(8)))


@intrinsic
def is_less(typing: Any, x: Any, y: Any) -> Any:
    """Return int8 lanes, -1 where x < y, and 0 elsewhere."""
    if x == F32:
        return I8(x, y), _mask(lambda builder, *args: builder.fcmp_ordered("<", *args))
    return I8(x, y), _mask(lambda builder, *args: builder.icmp_signed("<", *args))


@intrinsic
def is_other(typing: Any, x: Any, y: Any) -> Any:
    """Return int8 lanes, -1 where the int8 lanes x and y differ, and 0 elsewhere."""
    return I8(I8, I8), _mask(lambda builder, *args: builder.icmp_signed("!=", *args))


@intrinsic
def upper_half(typing: Any, numbers: Any) -> Any:
    """Return the upper four bits of int8 ``numbers``, 0 to 15."""
    return I8(I8), lambda context, builder, sig, args: builder.lshr(args[0], ir.Constant(args[0].type, [4] * N))


@intrinsic
def pick(typing: Any, table: Any, numbers: Any) -> Any:
    """Return the lanes of ``table`` of ``numbers`` 0 to 15, which nothing checks: all of them are int8."""

    def emit(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        found = ir.Constant(args[0].type, ir.Undefined)
        for n in range(N):
            number = builder.extract_element(args[1], ir.IntType(32)(n))
            found = builder.insert_element(found, builder.extract_element(args[0], number), ir.IntType(32)(n))
        return found

    return I8(I8, I8), emit


@intrinsic
def where_less(typing: Any, x: Any, y: Any, one: Any, other: Any) -> Any:
    """Return ``one`` where x < y, and ``other`` elsewhere."""

    def emit(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered("<", *args[:2]), *args[2:])

    return one(x, y, one, other), emit


@intrinsic
def bits(typing: Any, lanes: Any) -> Any:
    """Return the bit patterns of f32 lanes, as U32, or the f32 that U32 lanes are the patterns of."""
    other = U32 if lanes == F32 else F32
    return other(lanes), lambda context, builder, sig, args: builder.bitcast(args[0], _vector(_SCALARS[other.kind]))


@intrinsic
def nonzero(typing: Any, lanes: Any) -> Any:
    """Return 1 where a lane is not 0 (or NaN), else 0."""

    def emit(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        zero = ir.Constant(args[0].type, [0.0] * N)
        return builder.uitofp(builder.fcmp_unordered("!=", args[0], zero), args[0].type)

    return F32(F32), emit


def _numbers(numbers: Any) -> Any:
    """Which lanes a shuffle takes."""
    return ir.Constant(_vector(ir.IntType(32)), list(numbers))


def _halved(combine: Any) -> Any:
    """What makes one number of all lanes, by halves, the upper on the lower: in one order on every machine."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        lanes = args[0]
        for half in (8, 4, 2, 1):
            upper = builder.shuffle_vector(lanes, lanes, _numbers((k + half) % N for k in range(N)))
            lanes = combine(context, builder, sig, (lanes, upper))
        return builder.extract_element(lanes, ir.IntType(32)(0))

    return emit


@intrinsic
def total(typing: Any, lanes: Any) -> Any:
    """Return the sum of all lanes."""
    return types.float32(F32), _halved(lambda context, builder, sig, args: builder.fadd(*args))


@intrinsic
def totals(typing: Any, w: Any, x: Any, y: Any, z: Any) -> Any:
    """Return what ``total`` does of each of four, in half the instructions."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        def halves_added(one: Any, other: Any, width: int) -> Any:
            lower = [k for k in range(2 * N) if k % (2 * width) < width]
            parts = (lower, [k + width for k in lower])
            return builder.fadd(*(builder.shuffle_vector(one, other, _numbers(part)) for part in parts))

        lanes = halves_added(halves_added(*args[:2], 8), halves_added(*args[2:], 8), 4)
        for half in (2, 1):
            lanes = builder.fadd(
                lanes, builder.shuffle_vector(lanes, lanes, _numbers((k + half) % N for k in range(N)))
            )
        return context.make_tuple(
            builder, sig.return_type, [builder.extract_element(lanes, ir.IntType(32)(4 * n)) for n in range(4)]
        )

    return types.UniTuple(types.float32, 4)(F32, F32, F32, F32), emit


@intrinsic
def greatest(typing: Any, lanes: Any) -> Any:
    """Return the largest of all lanes."""
    return types.float32(F32), _halved(_select(">"))


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, at: int, scalar: Any) -> Any:
    """Where lanes of ``scalar`` begin in a C-contiguous array: at a flat index, or at (row, column)."""
    struct = context.make_array(array_type)(context, builder, value=array)
    if isinstance(at.type, ir.ArrayType):
        row, column = cgutils.unpack_tuple(builder, at, 2)
        at = builder.add(builder.mul(row, builder.extract_value(struct.shape, 1)), column)
    return builder.bitcast(builder.gep(struct.data, [at]), _vector(scalar).as_pointer())


def _is_f32(array: Any) -> bool:
    """Whether lanes of an array are f32, not int8. Raises ``TypingError`` for an array of anything else, or not in C
    order.
    """
    if not isinstance(array, types.Array) or array.layout != "C" or array.dtype not in (types.float32, types.int8):
        raise TypingError(f"lanes are loaded from and stored to C-contiguous arrays of f32 or int8, found {array}")
    return array.dtype == types.float32


@intrinsic
def load(typing: Any, array: Any, at: int) -> Any:
    """Load sixteen of ``array`` from ``at`` on, f32, or int8 as f32. There must be as many: nothing checks it."""
    is_f32 = _is_f32(array)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        scalar = ir.FloatType() if is_f32 else ir.IntType(8)
        lanes = builder.load(_pointer(context, builder, array, *args, scalar), align=4 if is_f32 else 1)
        return (
            lanes if is_f32 else builder.sitofp(builder.sext(lanes, _vector(ir.IntType(32))), _vector(ir.FloatType()))
        )

    return F32(array, at), emit


@intrinsic
def load_i8(typing: Any, array: Any, at: int) -> Any:
    """Load sixteen of the int8 ``array`` from ``at`` on, as they are."""
    if _is_f32(array):
        raise TypingError(f"expected an array of int8, found {array}")

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load(_pointer(context, builder, array, *args, ir.IntType(8)), align=1)

    return I8(array, at), emit


@intrinsic
def store(typing: Any, lanes: Any, array: Any, at: int) -> Any:
    """Put ``lanes`` into ``array`` from ``at`` on: f32, int8, or whole f32 numbers as int8. There must be room: nothing
    checks it.
    """
    is_f32 = _is_f32(array)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        scalar, found = (ir.FloatType() if is_f32 else ir.IntType(8)), args[0]
        if lanes == F32 and not is_f32:
            found = _as_i8(builder, found)
        builder.store(found, _pointer(context, builder, array, *args[1:], scalar), align=4 if is_f32 else 1)
        return context.get_dummy_value()

    return types.void(lanes, array, at), emit


@kernel
def copy(source: np.ndarray, target: np.ndarray) -> None:
    """Copy the f32 or int8 row ``source`` into ``target``, a multiple of sixteen long: ``target[:] = source`` takes
    five times as long.
    """
    for j in range(0, len(source), N):
        store(load(source, j), target, j)
