"""The projections around the scan, rewritten so that narrow tensors are transposed instead of wide ones.

The scan of onnx_operators.py has time first, and the model has images first: between the two stand a `Transpose` of
what in_proj gives, 4 times as wide as what it takes, and one of what out_proj takes, twice as wide as what it gives. A
product with a matrix gives the same rows in any order of the rows.
"""

from onnxscript.rewriter import pattern

_TIME_FIRST = [1, 0, 2]


def transpose_narrow_tensors(model) -> None:
    """Rewrite all layers of an `onnx_ir.Model`; what is no longer used stays in it."""
    # In this order, because the second rule gives what the first takes
    pattern.RewriteRule(_product_of_transposed, _transposed_product).apply_to_model(model)
    # The same product serves two slices, so it cannot be removed with the first
    pattern.RewriteRule(_part_of_transposed, _product_with_part, remove_nodes=False).apply_to_model(model)


def _product_of_transposed(op, tokens, weight):
    return op.MatMul(op.Transpose(tokens, perm=_TIME_FIRST), weight)


def _transposed_product(op, tokens, weight):
    return op.Transpose(op.MatMul(tokens, weight), perm=_TIME_FIRST)


def _part_of_transposed(op, tokens, weight, first, end):
    by_time = op.Transpose(op.MatMul(tokens, weight), perm=_TIME_FIRST)
    return op.Slice(by_time, first, end, [2], [1])


def _product_with_part(op, tokens, weight, first, end):
    """Input and gate are products of their own, so that none of them is copied out of the other's rows."""
    columns = op.Slice(weight, first, end, op.Constant(value_ints=[1]), op.Constant(value_ints=[1]))
    return op.MatMul(op.Transpose(tokens, perm=_TIME_FIRST), columns)
