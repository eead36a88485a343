"""A vector of 16 float32 lanes for numba, so that kernels say themselves what is one instruction.

numba leaves vectorising to LLVM's guesses about loops, which here give a fifth of the speed. These vectors are LLVM
vectors: one AVX-512 register, or as many narrower ones as the machine needs. The order of all operations is written
down, so results do not depend on the machine's vector width or on the number of threads.

    v = load(rows, row, column)           # 16 neighbouring values of one row
    store(rows, row, column, v * v + full(2.0))

`rows` is a matrix as (address, bytes from row to row, bytes of a value), so that no kernel depends on a memory layout.
Vectors are read from and written to rows of float32 (4 bytes) and of bfloat16 (2 bytes) alike; where the number of
bytes is a constant, the compiler drops the other case.

Operators: + - * /. Functions: load, store (a vector), load_scalar, store_scalar (a float32), load_index, store_index
(an int64), fetch_add, full, maximum, where_greater, exp2, reduce_sum, and exp, sigmoid, softplus made of them.
"""

import operator

import numpy as np

try:
    from llvmlite import ir
    from numba import carray as carray
    from numba import cfunc as cfunc
    from numba import njit, types
    from numba.core import cgutils
    from numba.extending import intrinsic as intrinsic
    from numba.extending import models, overload, register_model
except ImportError as error:
    raise ImportError("The CPU kernels of Famba-V need numba: `pip install numba`.") from error

LANES = 16

_FLOAT, _INT = ir.FloatType(), ir.IntType(32)
_INDEX, _HALF = ir.IntType(64), ir.IntType(16)
_FLOATS, _INTS, _HALVES = (ir.VectorType(kind, LANES) for kind in (_FLOAT, _INT, _HALF))
# Multiply and add may become one fused instruction; nothing else about floating point is relaxed.
_CONTRACT = ("contract",)


class _VectorType(types.Type):
    def __init__(self):
        super().__init__(name="float32x16")


_vector = _VectorType()
rows_type = types.UniTuple(types.int64, 3)


@register_model(_VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, data_model_manager, frontend_type):
        super().__init__(data_model_manager, frontend_type, _FLOATS)


def _constant(value: float) -> ir.Constant:
    return ir.Constant(_FLOATS, [ir.Constant(_FLOAT, float(np.float32(value)))] * LANES)


def _lanes(constant: int) -> ir.Constant:
    """The same integer in all lanes."""
    return ir.Constant(_INTS, [ir.Constant(_INT, constant)] * LANES)


def _pointer(builder, rows, row, column, item_bytes, llvm_type):
    """To a row and a column of items."""
    start, row_bytes = builder.extract_value(rows, 0), builder.extract_value(rows, 1)
    address = builder.add(start, builder.mul(row, row_bytes))
    return builder.inttoptr(builder.add(address, builder.mul(column, item_bytes)), llvm_type.as_pointer())


def _is_bfloat16(builder, rows):
    return builder.icmp_signed("==", builder.extract_value(rows, 2), ir.Constant(_INDEX, 2))


@intrinsic
def load(typing_context, rows, row, column):
    """16 neighbouring values of one row, from float32 or bfloat16."""

    def generate(context, builder, signature, args):
        with builder.if_else(_is_bfloat16(builder, args[0])) as (then, otherwise):
            with then:
                halves = builder.load(_pointer(builder, *args, ir.Constant(_INDEX, 2), _HALVES))
                halves.align = 2
                # A bfloat16 is the upper half of a float32
                widened = builder.bitcast(builder.shl(builder.zext(halves, _INTS), _lanes(16)), _FLOATS)
                from_half = builder.block
            with otherwise:
                value = builder.load(_pointer(builder, *args, ir.Constant(_INDEX, 4), _FLOATS))
                value.align = 4
                from_float = builder.block
        result = builder.phi(_FLOATS)
        result.add_incoming(widened, from_half)
        result.add_incoming(value, from_float)
        return result

    return _vector(rows_type, types.intp, types.intp), generate


def _round_to_bfloat16(builder, value):
    """The nearest bfloat16, the even one of two that are as near; NaN stays NaN."""
    bits = builder.bitcast(value, _INTS)
    is_odd = builder.and_(builder.lshr(bits, _lanes(16)), _lanes(1))
    rounded = builder.lshr(builder.add(builder.add(bits, _lanes(0x7FFF)), is_odd), _lanes(16))
    return builder.trunc(builder.select(builder.fcmp_unordered("uno", value, value), _lanes(0x7FC0), rounded), _HALVES)


@intrinsic
def store(typing_context, rows, row, column, value):
    """Write 16 neighbouring values of one row, as float32 or bfloat16."""

    def generate(context, builder, signature, args):
        *place, value = args
        with builder.if_else(_is_bfloat16(builder, args[0])) as (then, otherwise):
            with then:
                pointer = _pointer(builder, *place, ir.Constant(_INDEX, 2), _HALVES)
                builder.store(_round_to_bfloat16(builder, value), pointer).align = 2
            with otherwise:
                builder.store(value, _pointer(builder, *place, ir.Constant(_INDEX, 4), _FLOATS)).align = 4
        return context.get_dummy_value()

    return types.void(rows_type, types.intp, types.intp, _vector), generate


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


@intrinsic
def full(typing_context, value):
    """The same value in all lanes."""

    def generate(context, builder, signature, args):
        undefined = ir.Constant(_FLOATS, ir.Undefined)
        first = builder.insert_element(undefined, args[0], ir.Constant(_INT, 0))
        return builder.shuffle_vector(first, undefined, ir.Constant(_INTS, [0] * LANES))

    return _vector(types.float32), generate


def _binary(instruction: str):
    @intrinsic
    def operation(typing_context, left, right):
        def generate(context, builder, signature, args):
            return getattr(builder, instruction)(*args, flags=_CONTRACT)

        return _vector(_vector, _vector), generate

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

    return _vector(_vector, _vector), generate


@intrinsic
def where_greater(typing_context, left, right, if_greater, otherwise):
    """Lanes of `if_greater` where `left > right`, of `otherwise` elsewhere, also where one of the two is NaN."""

    def generate(context, builder, signature, args):
        left, right, if_greater, otherwise = args
        return builder.select(builder.fcmp_ordered(">", left, right), if_greater, otherwise)

    return _vector(_vector, _vector, _vector, _vector), generate


@intrinsic
def reduce_sum(typing_context, lanes):
    """Sum of the lanes, halves first, as a float32."""

    def generate(context, builder, signature, args):
        lanes, width = args[0], LANES
        while width > 1:
            width //= 2
            undefined = ir.Constant(lanes.type, ir.Undefined)
            low, high = (
                builder.shuffle_vector(
                    lanes, undefined, ir.Constant(ir.VectorType(_INT, width), list(range(first, first + width)))
                )
                for first in (0, width)
            )
            lanes = builder.fadd(low, high)
        return builder.extract_element(lanes, ir.Constant(_INT, 0))

    return types.float32(_vector), generate


def _exp2_polynomial(degree: int) -> list[float]:
    """Coefficients, lowest first, of a near-minimax polynomial of 2^f for |f| <= 0.5."""
    nodes = 0.5 * np.cos(np.pi * (np.arange(200) + 0.5) / 200)
    fit = np.polynomial.Chebyshev.fit(nodes, 2.0**nodes, degree, domain=[-0.5, 0.5])
    return fit.convert(kind=np.polynomial.Polynomial).coef.tolist()


# Relative error 1e-7, the rounding of float32 itself; one degree less has 3e-6, which would add up along the scan.
_EXP2_COEFFICIENTS = _exp2_polynomial(degree=5)


@intrinsic
def exp2(typing_context, exponent):
    """2 to the power of the lanes, which are clamped to [-125, 126]: 2^k times a polynomial of the rest.

    The power of two is an addition to the exponent bits, which is why the smallest normal numbers stay out."""

    def generate(context, builder, signature, args):
        exponent = args[0]
        for bound, comparison in ((_constant(-125.0), "<"), (_constant(126.0), ">")):
            exponent = builder.select(builder.fcmp_ordered(comparison, exponent, bound), bound, exponent)
        floor_type = ir.FunctionType(_FLOATS, [_FLOATS])
        floor = cgutils.get_or_insert_function(builder.module, floor_type, f"llvm.floor.v{LANES}f32")
        power = builder.call(floor, [builder.fadd(exponent, _constant(0.5))])
        rest = builder.fsub(exponent, power)
        result = _constant(_EXP2_COEFFICIENTS[-1])
        for coefficient in reversed(_EXP2_COEFFICIENTS[:-1]):
            product = builder.fmul(result, rest, flags=_CONTRACT)
            result = builder.fadd(product, _constant(coefficient), flags=_CONTRACT)
        power_bits = builder.shl(builder.fptosi(power, _INTS), _lanes(23))
        return builder.bitcast(builder.add(builder.bitcast(result, _INTS), power_bits), _FLOATS)

    return _vector(_vector), generate


_LOG2_E = np.float32(np.log2(np.e))
_ZERO, _ONE, _TWO = np.float32(0.0), np.float32(1.0), np.float32(2.0)
# atanh(s) = s (1 + s^2/3 + s^4/5 + ...)
_ATANH = tuple(np.float32(1 / (2 * k + 1)) for k in range(8))


@njit(inline="always")
def exp(x):
    """e to the power of the lanes."""
    return exp2(x * full(_LOG2_E))


@njit(inline="always")
def sigmoid(x):
    """1 / (1 + e^-x)"""
    return full(_ONE) / (full(_ONE) + exp(full(_ZERO) - x))


@njit(inline="always")
def softplus(x):
    """log(1 + e^x) = max(x, 0) + log1p(u) with u = e^-|x| in (0, 1], and log1p(u) = 2 atanh(u / (2 + u))."""
    negative = full(_ZERO) - x
    u = exp(full(_ZERO) - maximum(x, negative))
    s = u / (full(_TWO) + u)
    s2 = s * s
    series = full(_ATANH[7])
    for k in range(6, -1, -1):
        series = series * s2 + full(_ATANH[k])
    return maximum(x, full(_ZERO)) + full(_TWO) * s * series
