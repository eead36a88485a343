"""A layer of Famba-V: norm, fuse, mix, add. See `modeling_fambav.py` for the glossary of shapes."""

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .bidirectional_scan import bidirectional_scan
from .configuration_fambav import FambaVConfig
from .rms_norm import rms_norm
from .token_fusion import fuse


class TokenState(NamedTuple):
    """What is known of the tokens beside their values; every fusion returns a new one.

    Attributes:
        class_index (`int` or `Tensor` of shape `(B, 1)`): where the class token stands.
        sizes (`Tensor` of shape `(B, T)`, *optional*): initial tokens that each token stands for, if that is used.
        token_map (`Tensor` of shape `(B, T_0)`, *optional*): which token carries each initial token, if asked for.
    """

    class_index: int | Tensor
    sizes: Tensor | None = None
    token_map: Tensor | None = None


class FambaVRMSNorm(nn.Module):
    """Root-mean-square norm with a weight per channel."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, self.weight, self.eps)


class FambaVDropPath(nn.Module):
    """Stochastic depth: drop the whole branch of a sample with probability `drop_prob` while training."""

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return hidden_states
        keep_prob = 1.0 - self.drop_prob
        keep = hidden_states.new_empty(hidden_states.shape[0], 1, 1).bernoulli_(keep_prob)
        return hidden_states * (keep / keep_prob)


class FambaVScanDirection(nn.Module):
    """The parameters of one direction of the scan; the mixer runs both directions together.

    `x_proj` chooses time step (R), B (N) and C (N) by the input, `dt_proj` widens the time step to all channels, and
    A = -exp(A_log).
    """

    def __init__(self, config: FambaVConfig):
        super().__init__()
        channels, state_size, rank = config.intermediate_size, config.state_size, int(config.time_step_rank)
        self.conv1d = nn.Conv1d(channels, channels, config.conv_kernel, groups=channels)
        self.x_proj = nn.Linear(channels, rank + 2 * state_size, bias=False)
        self.dt_proj = nn.Linear(rank, channels)
        # In float32 whatever the default dtype is, see `_keep_in_fp32_modules_strict`
        self.dt_proj.bias = nn.Parameter(torch.zeros(channels, dtype=torch.float32))
        self.A_log = nn.Parameter(torch.zeros(channels, state_size, dtype=torch.float32))
        self.D = nn.Parameter(torch.ones(channels, dtype=torch.float32))

    def scan_parameters(self) -> tuple[Tensor, ...]:
        """Weight and bias of the convolution, x_proj, dt_proj and its bias, A_log and D."""
        conv1d, dt_proj = self.conv1d, self.dt_proj
        bias = cast(Tensor, conv1d.bias)  # which a convolution need not have
        return conv1d.weight, bias, self.x_proj.weight, dt_proj.weight, dt_proj.bias, self.A_log, self.D


class FambaVMixer(nn.Module):
    """Bidirectional Mamba: (B, T, D) -> (B, T, D). The mean of a forward and a backward scan, gated."""

    def __init__(self, config: FambaVConfig):
        super().__init__()
        self.in_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.forward_scan = FambaVScanDirection(config)
        self.backward_scan = FambaVScanDirection(config)
        self.out_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor, dt_scale: Tensor | None = None) -> Tensor:
        """`dt_scale` of shape `(B, T)` multiplies the time step of each token."""
        directions = zip(self.forward_scan.scan_parameters(), self.backward_scan.scan_parameters())
        conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D = (torch.stack(pair) for pair in directions)
        A = -torch.exp(A_log.float())
        xz = self.in_proj(hidden_states)
        y = bidirectional_scan(xz, conv_weight.squeeze(2), conv_bias, x_proj, dt_proj, dt_bias, A, D, dt_scale)
        return self.out_proj(y)


class FambaVLayer(GradientCheckpointingLayer):
    """Norm, fuse, mix, add: (B, T, D) -> (B, T - r, D).

    Vim's code carries a branch and a residual between its blocks and adds them at the next one; the residual stream
    here is their sum, which is the same function.
    """

    def __init__(self, config: FambaVConfig, drop_path_rate: float):
        super().__init__()
        self.config = config
        self.norm = FambaVRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = FambaVMixer(config)
        self.drop_path = FambaVDropPath(drop_path_rate)

    def forward(self, hidden_states: Tensor, token_state: TokenState, num_fused: int) -> tuple[Tensor, TokenState]:
        normed = self.norm(hidden_states)
        if num_fused > 0:
            normed, hidden_states, token_state = fuse_tokens(
                normed, hidden_states, token_state, num_fused, self.config
            )
        dt_scale = token_state.sizes if self.config.fusion_scale_time_step else None
        return hidden_states + self.drop_path(self.mixer(normed, dt_scale)), token_state


def fuse_tokens(
    normed: Tensor, residual: Tensor, token_state: TokenState, r: int, config: FambaVConfig
) -> tuple[Tensor, Tensor, TokenState]:
    """Remove r tokens from the normed tokens and the residual stream by one and the same matching.

    Args:
        normed, residual (`Tensor` of shape `(B, T, D)`): the branch, whose similarities decide, and the stream.
        token_state (`TokenState`): of these T tokens.
        r (`int`): tokens to remove.

    Returns:
        both tensors as `(B, T - r, D)`, and the state of the T - r tokens.
    """
    weights = token_state.sizes if config.fusion_reduction == "size_weighted" else None
    metric, order, window = config.fusion_metric, config.fusion_order, config.fusion_window
    normed, residual, matching = fuse(normed, residual, r, token_state.class_index, metric, order, weights, window)
    if isinstance(token_state.class_index, Tensor):
        class_index = matching.new_index.gather(1, token_state.class_index)
    elif token_state.class_index == 0:
        class_index = 0  # nothing can come before it
    else:
        class_index = matching.new_index[:, token_state.class_index, None]
    state = TokenState(
        class_index=class_index,
        sizes=None if token_state.sizes is None else matching.sum(token_state.sizes),
        token_map=None if token_state.token_map is None else matching.compose(token_state.token_map),
    )
    return normed, residual, state
