"""Vectors of float32 lanes for numba, so that kernels say themselves what is one instruction.

numba leaves vectorising to LLVM's guesses about loops, which here give a fifth of the speed. These vectors are LLVM
vectors: one register, or as many as the machine needs. The order of all operations is written down, so results do not
depend on the machine's vector width or on the number of threads.

    v = load(rows, row, column)           # 16 neighbouring values of one row
    store(rows, row, column, v * v + full(2.0))

A vector has 16 lanes, or WIDE lanes where every lane is on its own: four registers of a machine with 32 of them, which
are worked on in lockstep, because a chain of operations on one register leaves a core idle most of the time.

`rows` is a matrix as (address, bytes from row to row, bytes of a value), so that no kernel depends on a memory layout.
Vectors are read from and written to rows of float32 (4 bytes) and of bfloat16 (2 bytes) alike; where the number of
bytes is a constant, the compiler drops the other case.

Operators: + - * /. Functions: load, store (a vector), load_scalar, store_scalar (a float32), load_index, store_index
(an int64), prefetch, fetch_add, full, full_like, maximum, where_greater, add_products, reduce_sum, store_sums.
load_wide and full_wide make vectors of WIDE lanes. Exponentials are in numba_functions.py, made with same_floats,
same_ints, as_ints and as_floats, which are LLVM's constants and instructions.
"""

import operator

import numpy as np

try:
    from llvmlite import binding, ir
    from numba import carray as carray
    from numba import cfunc as cfunc
    from numba import njit as njit
    from numba import types
    from numba.core import config
    from numba.extending import intrinsic as intrinsic
    from numba.extending import models, overload, register_model
except ImportError:  # within `try`, because transformers loads no remote code whose other imports are missing
    raise


def _has_avx512() -> bool:
    """Whether numba compiles for a processor with 32 registers of 16 float32."""
    if config.CPU_FEATURES is not None:
        return "+avx512f" in config.CPU_FEATURES
    return binding.get_host_cpu_features().get("avx512f", False)


LANES = 16
WIDE = 64 if _has_avx512() else LANES

_FLOAT, _INT = ir.FloatType(), ir.IntType(32)
_INDEX, _HALF = ir.IntType(64), ir.IntType(16)
# Multiply and add may become one fused instruction; nothing else about floating point is relaxed.
CONTRACT = ("contract",)


class _VectorType(types.Type):
    def __init__(self, lanes: int):
        super().__init__(name=f"float32x{lanes}")
        self.lanes = lanes


_vector, _wide_vector = _VectorType(LANES), _VectorType(WIDE)
rows_type = types.UniTuple(types.int64, 3)


@register_model(_VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, data_model_manager, frontend_type):
        super().__init__(data_model_manager, frontend_type, ir.VectorType(_FLOAT, frontend_type.lanes))


def same_floats(lanes: int, value: float) -> ir.Constant:
    """The same float32 in all lanes."""
    return ir.Constant(ir.VectorType(_FLOAT, lanes), [ir.Constant(_FLOAT, float(np.float32(value)))] * lanes)


def same_ints(lanes: int, value: int) -> ir.Constant:
    """The same integer in all lanes."""
    return ir.Constant(ir.VectorType(_INT, lanes), [ir.Constant(_INT, value)] * lanes)


def as_ints(builder, value):
    """The bits of float32 lanes."""
    return builder.bitcast(value, ir.VectorType(_INT, value.type.count))


def as_floats(builder, bits):
    return builder.bitcast(bits, ir.VectorType(_FLOAT, bits.type.count))


def _part(builder, value, first: int, count: int):
    """`count` lanes of a vector, from lane `first`."""
    indices = ir.Constant(ir.VectorType(_INT, count), list(range(first, first + count)))
    return builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), indices)


def _pointer(builder, rows, row, column, item_bytes, llvm_type):
    """To a row and a column of items."""
    start, row_bytes = builder.extract_value(rows, 0), builder.extract_value(rows, 1)
    address = builder.add(start, builder.mul(row, row_bytes))
    return builder.inttoptr(builder.add(address, builder.mul(column, item_bytes)), llvm_type.as_pointer())


def _is_bfloat16(builder, rows):
    return builder.icmp_signed("==", builder.extract_value(rows, 2), ir.Constant(_INDEX, 2))


def _loader(vector: _VectorType):
    floats, halves = ir.VectorType(_FLOAT, vector.lanes), ir.VectorType(_HALF, vector.lanes)
    ints = ir.VectorType(_INT, vector.lanes)

    @intrinsic
    def load(typing_context, rows, row, column):
        """Neighbouring values of one row, from float32 or bfloat16."""

        def generate(context, builder, signature, args):
            with builder.if_else(_is_bfloat16(builder, args[0])) as (then, otherwise):
                with then:
                    bits = builder.load(_pointer(builder, *args, ir.Constant(_INDEX, 2), halves))
                    bits.align = 2
                    # A bfloat16 is the upper half of a float32
                    widened = as_floats(builder, builder.shl(builder.zext(bits, ints), same_ints(vector.lanes, 16)))
                    from_half = builder.block
                with otherwise:
                    value = builder.load(_pointer(builder, *args, ir.Constant(_INDEX, 4), floats))
                    value.align = 4
                    from_float = builder.block
            result = builder.phi(floats)
            result.add_incoming(widened, from_half)
            result.add_incoming(value, from_float)
            return result

        return vector(rows_type, types.intp, types.intp), generate

    return load


load, load_wide = _loader(_vector), _loader(_wide_vector)


def _round_to_bfloat16(builder, value):
    """The nearest bfloat16, the even one of two that are as near; NaN stays NaN."""
    bits, lanes = as_ints(builder, value), value.type.count
    is_odd = builder.and_(builder.lshr(bits, same_ints(lanes, 16)), same_ints(lanes, 1))
    rounded = builder.lshr(builder.add(builder.add(bits, same_ints(lanes, 0x7FFF)), is_odd), same_ints(lanes, 16))
    rounded = builder.select(builder.fcmp_unordered("uno", value, value), same_ints(lanes, 0x7FC0), rounded)
    return builder.trunc(rounded, ir.VectorType(_HALF, lanes))


@intrinsic
def store(typing_context, rows, row, column, value):
    """Write a vector to neighbouring values of one row, as float32 or bfloat16."""

    def generate(context, builder, signature, args):
        *place, value = args
        with builder.if_else(_is_bfloat16(builder, args[0])) as (then, otherwise):
            with then:
                halves = ir.VectorType(_HALF, value.type.count)
                pointer = _pointer(builder, *place, ir.Constant(_INDEX, 2), halves)
                builder.store(_round_to_bfloat16(builder, value), pointer).align = 2
            with otherwise:
                builder.store(value, _pointer(builder, *place, ir.Constant(_INDEX, 4), value.type)).align = 4
        return context.get_dummy_value()

    return types.void(rows_type, types.intp, types.intp, value), generate


_PREFETCH = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer(), _INT, _INT, _INT])


@intrinsic
def prefetch(typing_context, rows, row, column):
    """Begin to bring a value of one row into the cache. Reads nothing, so there need not be such a row."""

    def generate(context, builder, signature, args):
        pointer = _pointer(builder, *args, builder.extract_value(args[0], 2), ir.IntType(8))
        function = builder.module.declare_intrinsic("llvm.prefetch", [pointer.type], _PREFETCH)
        is_write, in_all_caches, is_data = (ir.Constant(_INT, number) for number in (0, 3, 1))
        builder.call(function, [pointer, is_write, in_all_caches, is_data])
        return context.get_dummy_value()

    return types.void(rows_type, types.intp, types.intp), generate


def _access(value_type, llvm_type, item_bytes):
    """The functions that read and write a single value of one type."""

    @intrinsic
    def read(typing_context, rows, row, column):
        def generate(context, builder, signature, args):
            return builder.load(_pointer(builder, *args, ir.Constant(_INDEX, item_bytes), llvm_type))

        return value_type(rows_type, types.intp, types.intp), generate

    @intrinsic
    def write(typing_context, rows, row, column, value):
        def generate(context, builder, signature, args):
            builder.store(args[3], _pointer(builder, *args[:3], ir.Constant(_INDEX, item_bytes), llvm_type))
            return context.get_dummy_value()

        return types.void(rows_type, types.intp, types.intp, value_type), generate

    return read, write


load_scalar, store_scalar = _access(types.float32, _FLOAT, 4)
load_index, store_index = _access(types.int64, _INDEX, 8)


@intrinsic
def fetch_add(typing_context, rows):
    """Add 1 to the int64 at the start of `rows` and return what it was before, safe from other threads."""

    def generate(context, builder, signature, args):
        pointer = builder.inttoptr(builder.extract_value(args[0], 0), _INDEX.as_pointer())
        return builder.atomic_rmw("add", pointer, ir.Constant(_INDEX, 1), "monotonic")

    return types.int64(rows_type), generate


def _filler(vector: _VectorType):
    @intrinsic
    def full(typing_context, value):
        """The same value in all lanes."""

        def generate(context, builder, signature, args):
            undefined = ir.Constant(ir.VectorType(_FLOAT, vector.lanes), ir.Undefined)
            first = builder.insert_element(undefined, args[0], ir.Constant(_INT, 0))
            return builder.shuffle_vector(first, undefined, same_ints(vector.lanes, 0))

        return vector(types.float32), generate

    return full


full, full_wide = _filler(_vector), _filler(_wide_vector)


@intrinsic
def full_like(typing_context, value, like):
    """The same value in as many lanes as `like` has."""

    def generate(context, builder, signature, args):
        undefined = ir.Constant(args[1].type, ir.Undefined)
        first = builder.insert_element(undefined, args[0], ir.Constant(_INT, 0))
        return builder.shuffle_vector(first, undefined, same_ints(args[1].type.count, 0))

    return like(types.float32, like), generate


def _binary(instruction: str):
    @intrinsic
    def operation(typing_context, left, right):
        def generate(context, builder, signature, args):
            return getattr(builder, instruction)(*args, flags=CONTRACT)

        return left(left, left), generate

    return operation


def _overload_operator(python_operator, instruction: str) -> None:
    operation = _binary(instruction)

    @overload(python_operator)
    def operator_of_vectors(left, right):
        if isinstance(left, _VectorType) and isinstance(right, _VectorType):
            return lambda left, right: operation(left, right)
        return None


_overload_operator(operator.add, "fadd")
_overload_operator(operator.sub, "fsub")
_overload_operator(operator.mul, "fmul")
_overload_operator(operator.truediv, "fdiv")


@intrinsic
def maximum(typing_context, left, right):
    """Larger of two lanes; `left` where one of them is NaN."""

    def generate(context, builder, signature, args):
        left, right = args
        return builder.select(builder.fcmp_ordered("<", left, right), right, left)

    return left(left, left), generate


@intrinsic
def where_greater(typing_context, left, right, if_greater, otherwise):
    """Lanes of `if_greater` where `left > right`, of `otherwise` elsewhere, also where one of the two is NaN."""

    def generate(context, builder, signature, args):
        left, right, if_greater, otherwise = args
        return builder.select(builder.fcmp_ordered(">", left, right), if_greater, otherwise)

    return left(left, left, left, left), generate


@intrinsic
def add_products(typing_context, total, left, right):
    """`total + left * right`, where `total` has 16 lanes: those of a wide product are added one after the other."""

    def generate(context, builder, signature, args):
        total, left, right = args
        for first in range(0, left.type.count, LANES):
            product = builder.fmul(
                _part(builder, left, first, LANES), _part(builder, right, first, LANES), flags=CONTRACT
            )
            total = builder.fadd(total, product, flags=CONTRACT)
        return total

    return _vector(_vector, left, left), generate


@intrinsic
def reduce_sum(typing_context, lanes):
    """Sum of the 16 lanes, halves first, as a float32."""

    def generate(context, builder, signature, args):
        lanes, width = args[0], LANES
        while width > 1:
            width //= 2
            lanes = builder.fadd(_part(builder, lanes, 0, width), _part(builder, lanes, width, width))
        return builder.extract_element(lanes, ir.Constant(_INT, 0))

    return types.float32(_vector), generate


@intrinsic
def store_sums(typing_context, rows, row, column, a, b, c, d):
    """Write the sums of the lanes of four vectors to four neighbouring float32: a quarter of the work of four sums."""

    def generate(context, builder, signature, args):
        *place, a, b, c, d = args

        def interleaved_sum(left, right, width: int):
            """Runs of `width` lanes, each the halves of one run of `left` added up, then those of `right`."""
            indices = [[], []]
            for run in range(0, LANES, 2 * width):
                for half in (0, 1):
                    lanes = range(run + half * width, run + half * width + width)
                    indices[half] += [*lanes, *(LANES + lane for lane in lanes)]
            parts = [
                builder.shuffle_vector(left, right, ir.Constant(ir.VectorType(_INT, LANES), half)) for half in indices
            ]
            return builder.fadd(*parts)

        ab, cd = interleaved_sum(a, b, 1), interleaved_sum(c, d, 1)  # a0+a1 b0+b1 a2+a3 b2+b3 ...
        lanes, width = interleaved_sum(ab, cd, 2), LANES  # four sums of four lanes, a b c d, four times
        while width > 4:
            width //= 2
            lanes = builder.fadd(_part(builder, lanes, 0, width), _part(builder, lanes, width, width))
        builder.store(lanes, _pointer(builder, *place, ir.Constant(_INDEX, 4), lanes.type)).align = 4
        return context.get_dummy_value()

    return types.void(rows_type, types.intp, types.intp, _vector, _vector, _vector, _vector), generate
