"""Exponentials of vectors for the CPU kernels: exp2, exp2_of_negative, sigmoid, softplus, softplus_and_sigmoid."""

import numpy as np

from .numba_vectors import (
    CONTRACT,
    as_floats,
    as_ints,
    full_like,
    intrinsic,
    maximum,
    njit,
    same_floats,
    same_ints,
    where_greater,
)


def _exp2_polynomial(degree: int) -> list[float]:
    """Coefficients, lowest first, of a near-minimax polynomial of 2^f for |f| <= 0.5."""
    nodes = 0.5 * np.cos(np.pi * (np.arange(200) + 0.5) / 200)
    fit = np.polynomial.Chebyshev.fit(nodes, 2.0**nodes, degree, domain=[-0.5, 0.5])
    return fit.convert(kind=np.polynomial.Polynomial).coef.tolist()


# Relative error 1e-7, the rounding of float32 itself; one degree less has 3e-6, which would add up along the scan.
_EXP2_COEFFICIENTS = _exp2_polynomial(degree=5)


# Added to a float32 of less than 2^22, it leaves the nearest integer in the lower bits
_ROUND = 1.5 * 2**23


def _exp2(smallest: float, largest: float | None):
    """Make an exp2 of exponents that are clamped to [smallest, largest]."""

    @intrinsic
    def exp2(typing_context, exponent):
        def generate(context, builder, signature, args):
            exponent, lanes = args[0], args[0].type.count
            for bound, comparison in ((smallest, "<"), (largest, ">")):
                if bound is not None:
                    limit = same_floats(lanes, bound)
                    exponent = builder.select(builder.fcmp_ordered(comparison, exponent, limit), limit, exponent)
            shifted = builder.fadd(exponent, same_floats(lanes, _ROUND))
            rest = builder.fsub(exponent, builder.fsub(shifted, same_floats(lanes, _ROUND)))
            result = same_floats(lanes, _EXP2_COEFFICIENTS[-1])
            for coefficient in reversed(_EXP2_COEFFICIENTS[:-1]):
                product = builder.fmul(result, rest, flags=CONTRACT)
                result = builder.fadd(product, same_floats(lanes, coefficient), flags=CONTRACT)
            power_bits = builder.shl(as_ints(builder, shifted), same_ints(lanes, 23))
            return as_floats(builder, builder.add(as_ints(builder, result), power_bits))

        return exponent(exponent), generate

    return exp2


# 2 to the power of the lanes: 2^k times a polynomial of the rest. The power of two is an addition to the exponent
# bits, which is why the smallest normal numbers stay out.
exp2 = _exp2(-125.0, 126.0)
exp2_of_negative = _exp2(-125.0, None)


def _log1p_polynomial(degree: int) -> list[float]:
    """Coefficients, lowest first, of a near-minimax polynomial of log(1 + u) / u for 0 <= u <= 1."""
    nodes = 0.5 + 0.5 * np.cos(np.pi * (np.arange(200) + 0.5) / 200)
    fit = np.polynomial.Chebyshev.fit(nodes, np.log1p(nodes) / nodes, degree, domain=[0, 1])
    return fit.convert(kind=np.polynomial.Polynomial).coef.tolist()


_LOG2_E = np.float32(np.log2(np.e))
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)
# Relative error 1.6e-7
_LOG1P_COEFFICIENTS = tuple(np.float32(coefficient) for coefficient in _log1p_polynomial(degree=8))


@njit(inline="always")
def sigmoid(x):
    """1 / (1 + e^-x)"""
    return full_like(_ONE, x) / (full_like(_ONE, x) + exp2(x * full_like(-_LOG2_E, x)))


@intrinsic
def _minus_magnitude(typing_context, x):
    """-|x|"""

    def generate(context, builder, signature, args):
        sign = same_ints(args[0].type.count, -(2**31))
        return as_floats(builder, builder.or_(as_ints(builder, args[0]), sign))

    return x(x), generate


@njit(inline="always")
def _exp_of_minus_magnitude(x):
    """e^-|x|"""
    return exp2_of_negative(_minus_magnitude(x) * full_like(_LOG2_E, x))


@njit(inline="always")
def _softplus(x, u):
    """log(1 + e^x) = max(x, 0) + log1p(u) with u = e^-|x| in (0, 1]"""
    series = full_like(_LOG1P_COEFFICIENTS[8], x)
    for k in range(7, -1, -1):
        series = series * u + full_like(_LOG1P_COEFFICIENTS[k], x)
    return maximum(x, full_like(_ZERO, x)) + u * series


@njit(inline="always")
def softplus(x):
    """log(1 + e^x)"""
    return _softplus(x, _exp_of_minus_magnitude(x))


@njit(inline="always")
def softplus_and_sigmoid(x):
    """log(1 + e^x) and its derivative"""
    u = _exp_of_minus_magnitude(x)
    numerator = where_greater(x, full_like(_ZERO, x), full_like(_ONE, x), u)
    return _softplus(x, u), numerator / (full_like(_ONE, x) + u)
