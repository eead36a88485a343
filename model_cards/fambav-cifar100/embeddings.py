"""From pixels to tokens: patches by one projection or by a convolutional stem, class token, positions."""

import torch
from torch import Tensor, nn

from .configuration_fambav import FambaVConfig


def _check_pixel_values(pixel_values: Tensor, num_channels: int) -> None:
    if pixel_values.dim() != 4 or pixel_values.shape[1] != num_channels:
        raise ValueError(
            f"pixel_values of shape {tuple(pixel_values.shape)}: "
            f"expected (batch, num_channels={num_channels}, height, width)"
        )


class FambaVPatchEmbeddings(nn.Module):
    """Cut an image into patches and project each to a token: (B, C, H, W) -> (B, patches in raster order, D)."""

    def __init__(self, config: FambaVConfig):
        super().__init__()
        self.num_channels = config.num_channels
        stride = config.patch_stride or config.patch_size
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, config.patch_size, stride)

    def forward(self, pixel_values: Tensor) -> Tensor:
        _check_pixel_values(pixel_values, self.num_channels)
        return self.projection(pixel_values.to(self.projection.weight.dtype)).flatten(2).transpose(1, 2)


class FambaVConvolutionalStem(nn.Module):
    """The grid of tokens by a few 3 x 3 convolutions: (B, C, H, W) -> (B, patches in raster order, D).

    In place of `FambaVPatchEmbeddings`, after Xiao et al., "Early convolutions help transformers see better" (2021,
    arXiv:2106.14881). Batch norm and ReLU follow all but the last convolution, which has a bias instead.
    """

    def __init__(self, config: FambaVConfig, stem_channels: list[int]):
        super().__init__()
        self.num_channels = config.num_channels
        self.patch_size = config.patch_size
        widths = [config.num_channels, *stem_channels, config.hidden_size]
        halvings = config.patch_size.bit_length() - 1
        layers: list[nn.Module] = []
        for index, (width_in, width_out) in enumerate(zip(widths, widths[1:])):
            remaining = len(widths) - 1 - index
            stride = 2 if remaining <= halvings else 1
            is_last = remaining == 1
            layers.append(nn.Conv2d(width_in, width_out, 3, stride, padding=1, bias=is_last))
            if not is_last:
                layers += [nn.BatchNorm2d(width_out), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers)

    def forward(self, pixel_values: Tensor) -> Tensor:
        _check_pixel_values(pixel_values, self.num_channels)
        # Without what no whole patch covers, as the projection of patches leaves it out
        height, width = (side // self.patch_size * self.patch_size for side in pixel_values.shape[-2:])
        pixel_values = pixel_values[..., :height, :width].to(next(self.parameters()).dtype)
        # Channels last, as in tokens: a quarter less time on a CPU, and batch norm that uses all of a GPU
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        return self.layers(pixel_values).flatten(2).transpose(1, 2)


class FambaVEmbeddings(nn.Module):
    """Patch tokens, the class token among them, plus position embeddings (paper equation 4)."""

    def __init__(self, config: FambaVConfig):
        super().__init__()
        self.config = config
        if config.stem_channels is None:
            self.patch_embeddings = FambaVPatchEmbeddings(config)
        else:
            self.patch_embeddings = FambaVConvolutionalStem(config, config.stem_channels)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.position_embeddings = nn.Parameter(torch.zeros(1, config.num_patches + 1, config.hidden_size))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> tuple[Tensor, int]:
        """Returns the tokens `(B, T, D)` and the index of the class token."""
        height, width = pixel_values.shape[-2:]
        positions = self._positions(height, width, interpolate_pos_encoding)
        patches = self.patch_embeddings(pixel_values)
        class_index = self.class_index_of(patches.shape[1])
        cls_token = self.cls_token.expand(patches.shape[0], -1, -1)
        tokens = torch.cat((patches[:, :class_index], cls_token, patches[:, class_index:]), dim=1)
        return self.dropout(tokens + positions), class_index

    def class_index_of(self, num_patches: int) -> int:
        """Where the class token stands among this many patches, before any fusion."""
        return 0 if self.config.cls_token_position == "head" else num_patches // 2

    def _positions(self, height: int, width: int, interpolate_pos_encoding: bool) -> Tensor:
        """Position embeddings for an image of this size in pixels, (1, T, D)."""
        if (height, width) == self.config.image_height_width:
            return self.position_embeddings
        if not interpolate_pos_encoding:
            raise ValueError(
                f"pixel_values of {height} x {width} pixels: expected image_size={self.config.image_size}, "
                "or interpolate_pos_encoding=True"
            )
        if min(height, width) < self.config.patch_size:
            raise ValueError(
                f"pixel_values of {height} x {width} pixels: expected at least patch_size={self.config.patch_size}"
            )
        return self._interpolated_positions(self.config.patch_grid_of(height, width))

    def _interpolated_positions(self, grid: tuple[int, int]) -> Tensor:
        """Bicubic interpolation of the patches' position embeddings; the class token keeps its own."""
        rows, columns = self.config.patch_grid
        index = self.class_index_of(rows * columns)
        before, class_position, after = self.position_embeddings.tensor_split((index, index + 1), dim=1)
        patches = torch.cat((before, after), dim=1).mT.unflatten(2, (rows, columns))
        patches = nn.functional.interpolate(patches.float(), size=grid, mode="bicubic", align_corners=False)
        patches = patches.flatten(2).mT.to(class_position.dtype)
        index = self.class_index_of(patches.shape[1])
        return torch.cat((patches[:, :index], class_position, patches[:, index:]), dim=1)
