"""Configuration of Famba-V: the geometry of the model and where token fusion removes how many tokens.

A fusion strategy is interpreted here and nowhere else: `FambaVConfig.fusion_schedule_for` turns the strategy fields
into one number per layer, and the model only reads those numbers.
"""

import math
from typing import Any, Literal, cast

from huggingface_hub.dataclasses import strict, validated_field
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig

from .field_validators import auto_or_integer, image_size_or_pair, integer, number

# The paper gives its budgets for 24 layers; other depths use the same fraction of the stack.
_PAPER_NUM_LAYERS = 24
_PAPER_LOWER_END_LAYER = 19
_PAPER_UPPER_START_LAYER = 5

# The sizes of Vim: all of 24 layers and state size 16, so that only the width tells them apart.
_PRESETS = {
    "vim-ti": {"hidden_size": 192},
    "vim-s": {"hidden_size": 384},
    "vim-b": {"hidden_size": 768},
}


@strict
class FambaVConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""
    Configuration of a [`FambaVModel`]: Vision Mamba (Vim) with cross-layer token fusion.

    The defaults are Vim-Ti at 224 px with the paper's upper-layer fusion. Every field is checked when it is set; the
    fields are checked against each other when the config is made, when it is saved and when the model runs, because
    the fusion fields may be changed on a trained model (`model.config.fusion_tokens = 12`) and take effect at once.

    Args:
        image_size (`int` or `(height, width)`): Size of the input in pixels.
        patch_size (`int`): Side of a square patch in pixels.
        patch_stride (`int`, *optional*): Distance between patches in pixels; `patch_size` if not given.
        num_channels (`int`): Channels of the input.
        stem_channels (`list[int]`, *optional*):
            Instead of cutting patches, make the same grid of tokens by 3 x 3 convolutions: the channels of all but
            the last, which has `hidden_size`. The last log2(`patch_size`) of them halve the image. By default, as in
            the paper, one projection per patch.
        hidden_size (`int`): Width D of a token.
        num_hidden_layers (`int`): Number of layers L.
        state_size (`int`): Size N of the scan state per channel.
        expand (`int`): Width of the mixer in units of `hidden_size`; `intermediate_size` is E = expand * D.
        conv_kernel (`int`): Taps K of the depthwise causal convolution.
        time_step_rank (`int` or `"auto"`): Rank R of the time-step projection; `"auto"` is ceil(D / 16).
        time_step_min, time_step_max, time_step_floor (`float`):
            Time steps are initialised log-uniformly in [min, max] and floored.
        cls_token_position (`"head"` or `"middle"`):
            Where the class token stands: first (Famba-V), or after half of the patches (the original Vim).
        layer_norm_epsilon (`float`): Epsilon of the RMS norms.
        residual_in_fp32 (`bool`): Whether the residual stream is kept in float32 when the weights are not.
        drop_path_rate (`float`): Stochastic depth of the last layer; rises linearly from 0 at the first.
        hidden_dropout_prob (`float`): Dropout after the position embeddings.
        initializer_range (`float`): Standard deviation of the class token, positions and classifier.
        fusion_strategy (`"upper"`, `"none"`, `"all"`, `"interleaved"`, `"lower"` or `"custom"`):
            Which layers fuse (paper section 3.2). `interleaved` is every other layer from index 1.
        fusion_tokens (`int`): Tokens r removed at each fused layer, clamped to what the sequence still has.
        fusion_start_layer, fusion_end_layer (`int`, *optional*):
            Half-open range of 0-based layer indices that may fuse. By default that of the strategy: `lower` ends at
            round(19/24 * L), `upper` starts at round(5/24 * L), `interleaved` starts at 1.
        fusion_schedule (`list[int]`, *optional*): Tokens removed per layer, for `fusion_strategy="custom"`.
        fusion_metric (`"cosine"`, `"dot"` or `"euclidean"`): Similarity of two tokens.
        fusion_window (`int`, *optional*):
            Compare only tokens at most this many places apart in the current sequence, always an odd number: 16 equals
            15. Meant for `fusion_order="raster"`; where they are `"appended"`, neighbours in the sequence are not
            neighbours in the image. The CPU and Triton kernels then compute only those products; other backends and
            ONNX give the same result without the saving. By default, as in the paper, all are compared.
        fusion_reduction (`"mean"` or `"size_weighted"`):
            Plain mean, or mean weighted by the patches that each token stands for.
        fusion_order (`"raster"` or `"appended"`):
            Survivors keep their places, or stand as the published code leaves them: class token, unfused even
            tokens, odd tokens.
        fusion_scale_time_step (`bool`):
            Multiply the time step of a fused token by the number of patches it stands for.
        out_features (`list[str]`, *optional*):
            Feature maps that [`FambaVBackbone`] returns, of `"stem"` (the patch embeddings), `"stage1"`, ...,
            `"stageL"` (the layers). The last one if neither this nor `out_indices` is given.
        out_indices (`list[int]`, *optional*):
            The same as indices into `stage_names`; negative ones count from the end.

    Example:

    ```python
    >>> from modeling_fambav import FambaVConfig

    >>> config = FambaVConfig(fusion_strategy="upper", fusion_tokens=9)
    >>> sum(config.tokens_removed), config.sequence_lengths[-1]
    (171, 26)
    ```
    """

    model_type = "fambav"

    image_size: int | list[int] | tuple[int, int] = validated_field(image_size_or_pair, default=224)
    patch_size: int = validated_field(integer(1), default=16)
    patch_stride: int | None = validated_field(integer(1), default=None)
    num_channels: int = validated_field(integer(1), default=3)
    stem_channels: list[int] | None = None
    hidden_size: int = validated_field(integer(1), default=192)
    num_hidden_layers: int = validated_field(integer(1), default=24)
    state_size: int = validated_field(integer(1), default=16)
    expand: int = validated_field(integer(1), default=2)
    conv_kernel: int = validated_field(integer(1), default=4)
    time_step_rank: int | str = validated_field([auto_or_integer, integer(1)], default="auto")
    time_step_min: float | int = validated_field(number(1e-12), default=0.001)
    time_step_max: float | int = validated_field(number(1e-12), default=0.1)
    time_step_floor: float | int = validated_field(number(1e-12), default=1e-4)
    cls_token_position: Literal["head", "middle"] = "head"
    layer_norm_epsilon: float | int = validated_field(number(0.0), default=1e-5)
    residual_in_fp32: bool = True
    drop_path_rate: float | int = validated_field(number(0.0, 1.0, open_maximum=True), default=0.0)
    hidden_dropout_prob: float | int = validated_field(number(0.0, 1.0), default=0.0)
    initializer_range: float | int = validated_field(number(1e-12), default=0.02)

    fusion_strategy: Literal["upper", "none", "all", "interleaved", "lower", "custom"] = "upper"
    fusion_tokens: int = validated_field(integer(0), default=9)
    fusion_start_layer: int | None = validated_field(integer(0), default=None)
    fusion_end_layer: int | None = validated_field(integer(1), default=None)
    fusion_schedule: list[int] | None = None
    fusion_metric: Literal["cosine", "dot", "euclidean"] = "cosine"
    fusion_window: int | None = validated_field(integer(1), default=None)
    fusion_reduction: Literal["mean", "size_weighted"] = "mean"
    fusion_order: Literal["raster", "appended"] = "raster"
    fusion_scale_time_step: bool = False

    auto_map: dict | None = None

    def __post_init__(self, **kwargs):
        num_labels = kwargs.get("num_labels", 2)
        if type(num_labels) is not int or num_labels < 0:
            raise ValueError(f"num_labels={num_labels!r}: expected an integer >= 0")
        if isinstance(self.image_size, list):  # JSON has no tuples
            self.image_size = cast(tuple[int, int], tuple(self.image_size))
        if self.patch_stride is None:
            self.patch_stride = self.patch_size
        if self.time_step_rank == "auto":
            self.time_step_rank = math.ceil(self.hidden_size / 16)
        if self.auto_map is None:
            # All entries at once: saving one class would otherwise name only itself, and AutoModel could not load
            # the folder of a classifier.
            self.auto_map = {
                "AutoConfig": "configuration_fambav.FambaVConfig",
                "AutoModel": "modeling_fambav.FambaVModel",
                "AutoModelForImageClassification": "modeling_fambav.FambaVForImageClassification",
                "AutoBackbone": "modeling_fambav.FambaVBackbone",
            }
        self._set_stages(kwargs.pop("out_features", None), kwargs.pop("out_indices", None))
        super().__post_init__(**kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        self._refuse_unknown_fusion_fields({name: value})
        super().__setattr__(name, value)

    @classmethod
    def from_preset(cls, name: str, **fields) -> "FambaVConfig":
        """Configuration of one of Vim's sizes: `"vim-ti"`, `"vim-s"` or `"vim-b"`.

        With 1000 classes they have 7, 26 and 98 million parameters.

        Args:
            name: name of the size.
            fields: fields of the configuration that shall differ from it.

        Raises:
            ValueError: if there is no such size, or a field is wrong.
        """
        if name not in _PRESETS:
            raise ValueError(f"preset {name!r}: expected one of {list(_PRESETS)}")
        return cls(**{**_PRESETS[name], **fields})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        cls._refuse_unknown_fusion_fields(kwargs)
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def _refuse_unknown_fusion_fields(cls, fields: dict[str, Any]) -> None:
        """The base class takes any keyword; a misspelt fusion field would be a silent no-op."""
        for name, value in fields.items():
            if name.startswith("fusion") and name not in cls.__dataclass_fields__:
                known = [field for field in cls.__dataclass_fields__ if field.startswith("fusion")]
                raise ValueError(f"{name}={value!r}: no such field, expected one of {known}")

    # ---- geometry ----

    @property
    def image_height_width(self) -> tuple[int, int]:
        """`image_size` as a pair, in pixels."""
        height, width = (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size
        return height, width

    @property
    def intermediate_size(self) -> int:
        """Width E of the mixer."""
        return self.expand * self.hidden_size

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Rows and columns of patches of an `image_size` input."""
        return self.patch_grid_of(*self.image_height_width)

    @property
    def num_patches(self) -> int:
        """Patches of an `image_size` input."""
        rows, columns = self.patch_grid
        return rows * columns

    def patch_grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an input of `height` x `width` pixels."""
        stride = self.patch_stride or self.patch_size
        return (height - self.patch_size) // stride + 1, (width - self.patch_size) // stride + 1

    # ---- stages of a backbone ----

    def _set_stages(self, out_features: list[str] | None, out_indices: list[int] | None) -> None:
        # What nobody asked for is not fixed here: a config that is given another depth would name a missing stage.
        self._out_features = self._out_indices = None
        if out_features is not None or out_indices is not None:
            self.set_output_features_output_indices(out_features, out_indices)

    @property
    def stage_names(self) -> list[str]:
        """Names of the feature maps that a backbone can return: before the first and after every layer."""
        return ["stem", *(f"stage{layer}" for layer in range(1, self.num_hidden_layers + 1))]

    @BackboneConfigMixin.out_features.getter
    def out_features(self) -> list[str]:
        """Names of the feature maps that a backbone returns."""
        return self.stage_names[-1:] if self._out_features is None else self._out_features

    @BackboneConfigMixin.out_indices.getter
    def out_indices(self) -> list[int]:
        """Indices of these maps in `stage_names`."""
        return [self.num_hidden_layers] if self._out_indices is None else self._out_indices

    # ---- token fusion ----

    @property
    def tokens_removed(self) -> list[int]:
        """Tokens that fusion removes on entry to each layer, after clamping; length L."""
        return self.fusion_schedule_for(self.num_patches + 1)

    @property
    def sequence_lengths(self) -> list[int]:
        """Tokens that the scans of each layer see; length L."""
        lengths, num_tokens = [], self.num_patches + 1
        for removed in self.tokens_removed:
            num_tokens -= removed
            lengths.append(num_tokens)
        return lengths

    def fusion_schedule_for(self, num_tokens: int) -> list[int]:
        """Tokens removed on entry to each layer when the first one receives `num_tokens`, class token included.

        A layer can remove at most half of its patch tokens, so what is asked for is clamped to (T - 1) // 2.

        Raises:
            ValueError: if the fusion fields contradict each other or remove nothing at all.
        """
        removed = []
        for tokens in self._requested_tokens():
            removed.append(min(tokens, (num_tokens - 1) // 2))
            num_tokens -= removed[-1]
        return removed

    def _requested_tokens(self) -> list[int]:
        """What the strategy asks each layer to remove: the one place that knows what a strategy means."""
        num_layers = self.num_hidden_layers
        self._check_layer_range()
        if self.fusion_strategy == "none":
            return [0] * num_layers
        if self.fusion_strategy == "custom":
            return self._custom_schedule()
        if self.fusion_schedule is not None:
            raise ValueError(
                f"fusion_schedule={self.fusion_schedule} is only read with fusion_strategy='custom', "
                f"got fusion_strategy={self.fusion_strategy!r}"
            )

        start, end, step = 0, num_layers, 1
        if self.fusion_strategy == "interleaved":
            start, step = 1, 2
        elif self.fusion_strategy == "lower":
            end = max(1, round(_PAPER_LOWER_END_LAYER / _PAPER_NUM_LAYERS * num_layers))
        elif self.fusion_strategy == "upper":
            start = round(_PAPER_UPPER_START_LAYER / _PAPER_NUM_LAYERS * num_layers)
        start = start if self.fusion_start_layer is None else self.fusion_start_layer
        end = end if self.fusion_end_layer is None else self.fusion_end_layer

        fused_layers = range(start, end, step)
        if len(fused_layers) == 0:
            raise ValueError(
                f"fusion_strategy={self.fusion_strategy!r} fuses no layer in [{start}, {end}) of {num_layers}; "
                "widen fusion_start_layer/fusion_end_layer, or set fusion_strategy='none'"
            )
        if self.fusion_tokens == 0:
            raise ValueError(
                f"fusion_tokens=0 with fusion_strategy={self.fusion_strategy!r} would remove no token; "
                "expected fusion_tokens >= 1, or fusion_strategy='none'"
            )
        return [self.fusion_tokens if layer in fused_layers else 0 for layer in range(num_layers)]

    def _custom_schedule(self) -> list[int]:
        schedule = self.fusion_schedule
        if schedule is None or len(schedule) != self.num_hidden_layers:
            raise ValueError(
                f"fusion_schedule={schedule} with fusion_strategy='custom': expected one integer per layer, "
                f"{self.num_hidden_layers} of them"
            )
        if min(schedule) < 0 or max(schedule) == 0:
            raise ValueError(
                f"fusion_schedule={schedule}: expected integers >= 0, at least one of them positive "
                "(fusion_strategy='none' turns fusion off)"
            )
        if self.fusion_start_layer is not None or self.fusion_end_layer is not None:
            raise ValueError(
                f"fusion_start_layer={self.fusion_start_layer} and fusion_end_layer={self.fusion_end_layer} are not "
                "read with fusion_strategy='custom': expected None, write zeros into fusion_schedule"
            )
        return list(schedule)

    def _check_layer_range(self) -> None:
        num_layers, start, end = self.num_hidden_layers, self.fusion_start_layer, self.fusion_end_layer
        if start is not None and start >= num_layers:
            raise ValueError(
                f"fusion_start_layer={start}: expected 0 <= fusion_start_layer < num_hidden_layers={num_layers}"
            )
        if end is not None and end > num_layers:
            raise ValueError(f"fusion_end_layer={end}: expected at most num_hidden_layers={num_layers}")
        if start is not None and end is not None and start >= end:
            raise ValueError(f"fusion_start_layer={start}: expected less than fusion_end_layer={end}")

    # ---- checks of fields against each other, run by `strict` after __init__ and before saving ----

    def validate_patches(self):
        """Part of `@strict`-powered validation. The image must hold a whole number of patches."""
        for name, side in zip(("height", "width"), self.image_height_width):
            if self.patch_size > side:
                raise ValueError(
                    f"patch_size={self.patch_size}: expected at most the {name} of image_size={self.image_size}"
                )
            if (side - self.patch_size) % (self.patch_stride or self.patch_size) != 0:
                raise ValueError(
                    f"image_size={self.image_size}: expected a {name} that whole patches cover, that is "
                    f"patch_size={self.patch_size} plus a multiple of patch_stride={self.patch_stride}"
                )

    def validate_stem(self):
        """Part of `@strict`-powered validation. The convolutions of a stem must end in the grid of the patches."""
        channels = self.stem_channels
        if channels is None:
            return
        if any(isinstance(width, bool) or width < 1 for width in channels):
            raise ValueError(f"stem_channels={channels}: expected integers >= 1")
        halvings = self.patch_size.bit_length() - 1
        if self.patch_size != 2**halvings or halvings == 0 or self.patch_stride != self.patch_size:
            raise ValueError(
                f"stem_channels={channels} with patch_size={self.patch_size} and patch_stride={self.patch_stride}: "
                "expected a patch_size of 2, 4, 8, ... and the same patch_stride"
            )
        if len(channels) + 1 < halvings:
            raise ValueError(
                f"stem_channels={channels}: expected at least {halvings - 1} integers, because {halvings} "
                f"convolutions halve an image to the grid of patch_size={self.patch_size}"
            )

    def validate_time_steps(self):
        """Part of `@strict`-powered validation. The range of initial time steps must not be empty."""
        if self.time_step_min > self.time_step_max:
            raise ValueError(
                f"time_step_min={self.time_step_min}: expected at most time_step_max={self.time_step_max}"
            )

    def validate_fusion(self):
        """Part of `@strict`-powered validation. A strategy must remove at least one token: no silent no-op."""
        self.validate_patches()  # validators run by name; without patches there is nothing to say about tokens
        if sum(self.tokens_removed) == 0 and self.fusion_strategy != "none":
            raise ValueError(
                f"fusion_strategy={self.fusion_strategy!r} removes no token from the {self.num_patches} patches of "
                f"image_size={self.image_size} and patch_size={self.patch_size}; expected at least 2 patches, or "
                "fusion_strategy='none'"
            )


__all__ = ["FambaVConfig"]
