"""torch operators of this code, under names that no other code has.

torch knows an operator by its name, for the whole process: whoever defines a name again replaces what it does, also
for models that are already running. A checkpoint brings its own code, and two checkpoints may bring different versions
of it, so every name ends with a digest of the files that decide what the operators compute. The same code has the same
names everywhere, so programs that `torch.export` has saved find their operators in another process.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch

# All files of the package but the configuration, the embeddings, the model and the public names
_SOURCES = (
    "backends",
    "bidirectional_scan",
    "bidirectional_scan_mamba_ssm",
    "causal_conv1d",
    "causal_conv1d_numba",
    "causal_conv1d_triton",
    "numba_channels",
    "numba_functions",
    "numba_jobs",
    "numba_scan_loops",
    "numba_vectors",
    "operators",
    "rms_norm",
    "rms_norm_numba",
    "selective_scan",
    "selective_scan_mamba_ssm",
    "selective_scan_numba",
    "selective_scan_torch",
    "selective_scan_triton",
    "token_fusion",
    "token_fusion_numba",
    "token_fusion_triton",
    "triton_launch",
    "workspace",
)


def digest_of(files: tuple[str, ...]) -> str:
    """Eight hexadecimal digits for the contents of these files of the package, named without their suffix."""
    digest = hashlib.sha256()
    for name in files:
        digest.update(_read(name))
    return digest.hexdigest()[:8]


def _read(name: str) -> bytes:
    """A file beside this one, which may be in a zip file, or compiled with its source taken away."""
    for suffix in (".py", ".pyc"):
        try:
            # Line ends are not code: a checkout on Windows has the same operators.
            return __loader__.get_data(str(Path(__file__).with_name(name + suffix))).replace(b"\r\n", b"\n")
        except OSError:
            continue
    raise FileNotFoundError(f"{name}.py is missing beside {__file__}: the code of this model is incomplete")


_SUFFIX = digest_of(_SOURCES)
# Holds the operators: they go when it goes.
_library = torch.library.Library("fambav", "FRAGMENT")


def define(
    name: str,
    compute: Callable,
    shapes: Callable,
    save: Callable | None = None,
    gradients: Callable | None = None,
) -> torch._ops.OpOverload:
    """Make a torch operator of a function on tensors, for torch.compile, autocast, checkpointing and export.

    Args:
        name: of the operator, without the digest.
        compute: the function, annotated; it changes none of its arguments, and its results are new tensors.
        shapes: from the same arguments, empty tensors like the results.
        save: `(ctx, inputs, output)`, keeps what `gradients` needs.
        gradients: `(ctx, *output_gradients)`, one gradient per argument.

    Returns:
        the operator. If the same code has defined it already, from another place, it is that one.
    """
    name = f"{name}_{_SUFFIX}"
    if not hasattr(torch.ops.fambav, name):
        # Not `torch.library.custom_op`, whose own calls take as long as a small kernel
        schema = torch.library.infer_schema(compute, mutates_args=())
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, compute, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fambav::{name}", shapes, lib=_library)
        if gradients is not None:
            torch.library.register_autograd(f"fambav::{name}", gradients, setup_context=save, lib=_library)
    return getattr(torch.ops.fambav, name).default


def check_shape(name: str, tensor: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    """Refuse an argument of an operator, if it is given, that has not this shape.

    Raises:
        ValueError: with the name and both shapes.
    """
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name} of shape {tuple(tensor.shape)}: expected {shape}")
