"""Famba-V in PyTorch: Vision Mamba (Vim) with cross-layer token fusion.

The file reads in the direction of the data: pixel_values -> patches (`FambaVEmbeddings`) -> layers (`FambaVLayer`:
norm, fuse, mix) -> `FambaVModel` -> logits (`FambaVForImageClassification`) or feature maps (`FambaVBackbone`).

Glossary
    B, T, D    batch, tokens (class token included), hidden_size
    E, N, R    intermediate_size, state_size, time_step_rank
    G          scan directions, always 2: forward and backward through the sequence
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack  # pyright: ignore[reportPrivateImportUsage]
from transformers.utils.generic import TransformersKwargs, can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_fambav import FambaVConfig
from .embeddings import FambaVConvolutionalStem, FambaVEmbeddings, FambaVPatchEmbeddings
from .layers import FambaVLayer, FambaVMixer, FambaVRMSNorm, FambaVScanDirection, TokenState
from .token_fusion import unmerge

# Parameters of more than one dimension that are still not decayed
_NO_DECAY = ("A_log", "cls_token", "position_embeddings")


@dataclass
class FambaVModelOutput(BaseModelOutputWithPooling):
    """Output of [`FambaVModel`].

    Attributes:
        last_hidden_state (`Tensor` of shape `(B, T_last, D)`): tokens after the final norm.
        pooler_output (`Tensor` of shape `(B, D)`): the class token after the final norm.
        hidden_states (`tuple[Tensor]`, *optional*): the residual stream before the first and after every layer.
        token_maps (`tuple[Tensor]`, *optional*):
            Per layer, int64 `(B, T_0)`: which of the layer's tokens carries each initial token.
    """

    token_maps: tuple[Tensor, ...] | None = None


@dataclass
class FambaVImageClassifierOutput(ImageClassifierOutput):
    """Output of [`FambaVForImageClassification`]: loss, logits `(B, num_labels)`, and as [`FambaVModelOutput`]."""

    token_maps: tuple[Tensor, ...] | None = None


def _fill(value: float, *tensors: Tensor | None) -> None:
    """Set those tensors of a module that it has, unless they were loaded."""
    for tensor in tensors:
        if tensor is not None:
            init.constant_(tensor, value)


class FambaVPreTrainedModel(PreTrainedModel):
    """Weight initialisation (as Mamba and Vim), and the class attributes that transformers reads.

    `from_pretrained` with `dtype=torch.bfloat16` or `torch.float16` leaves A_log, D and the bias of the time step in
    float32, in which the scan computes with them anyway; rounded, they would be other decays and steps.
    `model.to(dtype)`, `.bfloat16()` and `.half()` are torch's own and round them like all others.
    """

    config: FambaVConfig
    base_model_prefix = "fambav"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["FambaVEmbeddings", "FambaVLayer"]
    _input_embed_layer = "patch_embeddings"
    _can_record_outputs = {"hidden_states": FambaVLayer}
    # Found anywhere in a parameter's name, hence not only "D"
    _keep_in_fp32_modules_strict = ["A_log", "dt_proj.bias", "forward_scan.D", "backward_scan.D"]
    _can_compile_fullgraph = True

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False):
        # In code outside its own package, transformers skips modules without parameters of their own (the mixer, the
        # patch embeddings), in case `_init_weights` would overwrite loaded weights. The functions of `init` never do.
        super()._initialize_weights(module, is_custom_code=False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        config = self.config
        if isinstance(module, FambaVEmbeddings):
            init.trunc_normal_(module.cls_token, std=config.initializer_range)
            init.trunc_normal_(module.position_embeddings, std=config.initializer_range)
        elif isinstance(module, FambaVPatchEmbeddings):
            # LeCun normal; cutting a normal distribution at two standard deviations leaves 0.88 of its own
            weight = module.projection.weight
            std = weight[0].numel() ** -0.5 / 0.87962566103423978
            init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
            _fill(0.0, module.projection.bias)
        elif isinstance(module, FambaVConvolutionalStem):
            self._init_stem(module)
        elif isinstance(module, FambaVRMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, FambaVMixer):
            init.kaiming_uniform_(module.in_proj.weight, a=math.sqrt(5))
            # Every layer adds one branch to the residual stream, whose variance should not grow with the depth.
            bound = 1 / math.sqrt(config.intermediate_size * config.num_hidden_layers)
            init.uniform_(module.out_proj.weight, -bound, bound)
        elif isinstance(module, FambaVScanDirection):
            self._init_scan_direction(module)
        elif isinstance(module, FambaVForImageClassification) and isinstance(module.classifier, nn.Linear):
            init.trunc_normal_(module.classifier.weight, std=config.initializer_range)
            init.zeros_(module.classifier.bias)

    def _init_stem(self, module: FambaVConvolutionalStem):
        for layer in module.layers:
            if isinstance(layer, nn.Conv2d):
                init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                _fill(0.0, layer.bias)
            elif isinstance(layer, nn.BatchNorm2d):
                _fill(1.0, layer.weight, layer.running_var)
                _fill(0.0, layer.bias, layer.running_mean, layer.num_batches_tracked)

    def _init_scan_direction(self, module: FambaVScanDirection):
        config = self.config
        init.kaiming_uniform_(module.conv1d.weight, a=math.sqrt(5))
        _fill(0.0, module.conv1d.bias)
        init.kaiming_uniform_(module.x_proj.weight, a=math.sqrt(5))
        init.uniform_(module.dt_proj.weight, -(module.dt_proj.in_features**-0.5), module.dt_proj.in_features**-0.5)
        # softplus(bias) is log-uniform in [time_step_min, time_step_max]
        log_min, log_max = math.log(config.time_step_min), math.log(config.time_step_max)
        uniform = torch.rand_like(module.dt_proj.bias, dtype=torch.float32)
        time_step = torch.exp(log_min + uniform * (log_max - log_min)).clamp(min=config.time_step_floor)
        init.copy_(module.dt_proj.bias, time_step + torch.log(-torch.expm1(-time_step)))
        A = torch.arange(1, config.state_size + 1, dtype=torch.float32, device=module.A_log.device)
        init.copy_(module.A_log, torch.log(A).expand_as(module.A_log))
        init.ones_(module.D)

    def decayed_parameters(self) -> list[str]:
        """Names of the parameters that weight decay is for, as in Vim: matrices and filters.

        Not for norms, biases and D, which have one dimension, nor for A_log, the class token and the positions. By
        name and shape, because marks on the tensors are lost when a model is loaded.
        """
        return [
            name
            for name, parameter in self.named_parameters()
            if parameter.ndim > 1 and name.rsplit(".", 1)[-1] not in _NO_DECAY
        ]


class FambaVModel(FambaVPreTrainedModel):
    """Famba-V without a head: tokens of the last layer and the class token."""

    def __init__(self, config: FambaVConfig):
        super().__init__(config)
        self.embeddings = FambaVEmbeddings(config)
        last_layer = max(1, config.num_hidden_layers - 1)
        self.layers = nn.ModuleList(
            [FambaVLayer(config, config.drop_path_rate * i / last_layer) for i in range(config.num_hidden_layers)]
        )
        self.norm: nn.Module = FambaVRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        output_token_maps: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> FambaVModelOutput:
        """Run the model.

        Args:
            pixel_values (`Tensor` of shape `(B, C, H, W)`): preprocessed images.
            interpolate_pos_encoding (`bool`): allow another image size than `config.image_size`.
            output_token_maps (`bool`): also return which token carries each initial token, per layer.
            output_hidden_states (`bool`, *optional*): also return the residual stream.

        Raises:
            ValueError: if `pixel_values` is missing or does not fit the configuration.
        """
        hidden_states, class_index = self.embeddings(_given(pixel_values), interpolate_pos_encoding)
        if self.config.residual_in_fp32:
            hidden_states = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))

        batch_size, num_tokens = hidden_states.shape[:2]
        sizes = token_map = None
        if self.config.fusion_reduction == "size_weighted" or self.config.fusion_scale_time_step:
            sizes = torch.ones(batch_size, num_tokens, dtype=torch.float32, device=hidden_states.device)
        if output_token_maps:
            token_map = torch.arange(num_tokens, device=hidden_states.device).expand(batch_size, -1)
        tokens = TokenState(class_index, sizes, token_map)

        token_maps = ()
        for layer, num_fused in zip(self.layers, self.config.fusion_schedule_for(num_tokens)):
            hidden_states, tokens = layer(hidden_states, tokens, num_fused)
            if output_token_maps:
                token_maps += (tokens.token_map,)

        last_hidden_state = self.norm(hidden_states)
        return FambaVModelOutput(
            last_hidden_state=last_hidden_state,
            pooler_output=_class_token(last_hidden_state, tokens.class_index),
            token_maps=token_maps if output_token_maps else None,
        )


def _given(pixel_values: Tensor | None) -> Tensor:
    """transformers calls models by keyword and wants defaults for all of them."""
    if pixel_values is None:
        raise ValueError("pixel_values is missing: expected a tensor of shape (batch, channels, height, width)")
    return pixel_values


def _class_token(hidden_states: Tensor, class_index: int | Tensor) -> Tensor:
    """(B, T, D) -> (B, D)"""
    if isinstance(class_index, int):
        return hidden_states[:, class_index]
    return hidden_states.gather(1, class_index.unsqueeze(-1).expand(-1, -1, hidden_states.shape[-1])).squeeze(1)


class FambaVForImageClassification(FambaVPreTrainedModel):
    """Famba-V with a linear classifier on the class token."""

    def __init__(self, config: FambaVConfig):
        super().__init__(config)
        self.num_labels = config.num_labels or 0
        self.fambav = FambaVModel(config)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels) if self.num_labels > 0 else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        output_token_maps: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> FambaVImageClassifierOutput:
        """Classify images.

        Args:
            pixel_values (`Tensor` of shape `(B, C, H, W)`): preprocessed images.
            labels (`Tensor` of shape `(B,)`, *optional*): class indices; the output then has a cross-entropy `loss`.
            interpolate_pos_encoding, output_token_maps, output_hidden_states: as [`FambaVModel.forward`].
        """
        outputs = self.fambav(
            pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            output_token_maps=output_token_maps,
            **kwargs,
        )
        logits = self.classifier(outputs.pooler_output)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels, logits, self.config, **kwargs)
        return FambaVImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, token_maps=outputs.token_maps
        )


# It stands in this file because a saved folder carries the file of the saved class and what that imports: the folder
# of a classifier must hold the backbone too.
class FambaVBackbone(BackboneMixin, FambaVPreTrainedModel):
    """Famba-V for dense tasks: a feature map over the full grid of patches from every requested stage.

    `"stem"` is the residual stream before the first layer, `"stage1"` to `"stageL"` are that after each layer. Fused
    tokens are given back to all the patches that they stand for, so detection and segmentation heads see a grid
    whatever was fused.
    """

    has_attentions = False
    # The heads of other checkpoints, and the norm before them
    _keys_to_ignore_on_load_unexpected = [r"^(fambav\.)?norm\.weight$", r"^classifier\."]

    def __init__(self, config: FambaVConfig):
        super().__init__(config)
        config.set_output_features_output_indices(config.out_features, config.out_indices)
        self.num_features = [config.hidden_size] * len(config.stage_names)
        self.fambav = FambaVModel(config)
        # The maps are read before the final norm, and a parameter without a gradient stops distributed training.
        self.fambav.norm = nn.Identity()
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the mixin's arguments come in **kwargs
        self,
        pixel_values: Tensor | None = None,
        interpolate_pos_encoding: bool = True,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BackboneOutput:
        """Compute feature maps.

        Args:
            pixel_values (`Tensor` of shape `(B, C, H, W)`): preprocessed images.
            interpolate_pos_encoding (`bool`):
                allow another image size than `config.image_size`. On by default, unlike in [`FambaVModel`], because
                dense tasks bring images of many sizes and their heads do not pass this argument on.
            output_hidden_states (`bool`, *optional*): also return the residual stream, with the tokens fused.

        Returns:
            `BackboneOutput` with `feature_maps`, one `(B, D, H', W')` per entry of `config.out_features`, where
            H' x W' is `config.patch_grid_of(H, W)`, in the dtype of the weights.

        Raises:
            ValueError: as [`FambaVModel.forward`].
        """
        pixel_values = _given(pixel_values)
        outputs = self.fambav(pixel_values, interpolate_pos_encoding, output_token_maps=True, **kwargs)
        grid = self.config.patch_grid_of(*pixel_values.shape[-2:])
        class_index = self.fambav.embeddings.class_index_of(math.prod(grid))
        first_map = torch.arange(math.prod(grid) + 1, device=pixel_values.device).expand(pixel_values.shape[0], -1)
        token_maps = (first_map, *outputs.token_maps)

        feature_maps = []
        for index in self.config.out_indices or ():
            token_map = token_maps[index]
            patch_map = torch.cat((token_map[:, :class_index], token_map[:, class_index + 1 :]), dim=1)
            patches = unmerge(outputs.hidden_states[index], patch_map)
            feature_maps.append(patches.mT.unflatten(2, grid).to(self.dtype))
        return BackboneOutput(feature_maps=tuple(feature_maps), hidden_states=outputs.hidden_states)


__all__ = ["FambaVBackbone", "FambaVForImageClassification", "FambaVModel", "FambaVPreTrainedModel"]
