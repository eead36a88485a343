"""The tables of the paper and three of our own: rows, the paper's numbers, and the runs behind them at five scales."""

from dataclasses import dataclass, replace
from typing import Any

from fambav_training.fusion.budgets import coinciding_layers, fusion_fields
from fambav_training.fusion.multiply_adds import multiply_adds
from modeling_fambav import FambaVConfig

# ---- scales ----

_CIFAR100 = {
    "dataset_name": "uoft-cs/cifar100",
    "image_column_name": "img",
    "label_column_name": "fine_label",
    # Scored once, after the last epoch; nothing is chosen by it
    "validation_split": "test",
}
_PAPER_RECIPE = {
    "num_train_epochs": 300,
    "per_device_train_batch_size": 128,
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
    "warmup_ratio": 0.02,
    "label_smoothing": 0.1,
    "mixup_alpha": 0.8,
    "random_erasing_prob": 0.25,
    "ema_decay": 0.9999,
}
_VIM_TI = {"hidden_size": 192, "num_hidden_layers": 24, "state_size": 16}
_PATCHES_OF_32_PX = {"image_size": 32, "patch_size": 4}

SCALES: dict[str, dict[str, Any]] = {
    "paper": {
        **_CIFAR100,
        **_PAPER_RECIPE,
        **_VIM_TI,
        "image_size": 224,
        "patch_size": 16,
        "dataloader_num_workers": 8,
    },
    "native32": {**_CIFAR100, **_PAPER_RECIPE, **_VIM_TI, **_PATCHES_OF_32_PX},
    "nano": {
        **_CIFAR100,
        **_PAPER_RECIPE,
        **_PATCHES_OF_32_PX,
        "hidden_size": 64,
        "num_hidden_layers": 12,
        "state_size": 4,
        # In a few epochs a small model underfits, so images are not mixed or erased, and the average is short. The
        # learning rate is the better one of 0.001 and 0.003 after an epoch, on images set aside from training.
        "num_train_epochs": 4,
        "learning_rate": 3e-3,
        "warmup_ratio": 0.05,
        "mixup_alpha": 0.0,
        "random_erasing_prob": 0.0,
        "ema_decay": 0.999,
    },
    # The model of model_cards/fambav-cifar100 and the recipe of its first releases for few epochs. A trained model
    # is the teacher: its predictions teach so much faster than labels that accuracies come apart. Not the paper's.
    "distilled": {
        **_CIFAR100,
        **_PATCHES_OF_32_PX,
        "hidden_size": 160,
        "num_hidden_layers": 7,
        "state_size": 4,
        "stem_channels": [32, 64],
        "teacher_views": "outputs/teacher_views",
        "distillation_weight": 0.98,
        "distillation_loss": "standardized",
        "distillation_temperature": 2.0,
        "optimizer": "muon",
        "num_train_epochs": 5,
        "per_device_train_batch_size": 128,
        "learning_rate": 2e-3,
        "weight_decay": 0.05,
        "warmup_ratio": 0.05,
        "label_smoothing": 0.1,
        "mixup_alpha": 0.0,
        "random_erasing_prob": 0.0,
        "ema_decay": 0.999,
    },
    "quick": {
        "dataset_name": "digits",
        "max_train_samples": 256,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 64,
        "learning_rate": 0.01,
        "mixup_alpha": 0.0,
        "random_erasing_prob": 0.0,
        "ema_decay": 0.5,
        "image_size": 8,
        "patch_size": 2,
        "hidden_size": 32,
        "num_hidden_layers": 8,
        "state_size": 4,
    },
}
# Vim-S is Vim-Ti at twice the width.
WIDTH_FACTORS = {"ti": 1, "s": 2}


def model_fields(flags: dict[str, Any]) -> dict[str, Any]:
    """Those flags that are fields of `FambaVConfig`."""
    return {name: value for name, value in flags.items() if name in FambaVConfig.__dataclass_fields__}


# ---- the paper's tables ----


@dataclass(frozen=True)
class PaperResult:
    """A row of a table of the paper, measured at 224 px on an A100.

    Attributes:
        top1, top5: accuracy on CIFAR-100 in percent.
        training_time: of 300 epochs, h:mm:ss.
        peak_memory: as printed; the paper gives no unit.
    """

    top1: float
    top5: float
    training_time: str
    peak_memory: int

    @property
    def train_seconds(self) -> int:
        hours, minutes, seconds = map(int, self.training_time.split(":"))
        return 3600 * hours + 60 * minutes + seconds


TABLE_1 = {
    "ti": {
        "none": PaperResult(70.1, 90.6, "4:33:02", 8302),
        "all": PaperResult(61.9, 85.6, "4:06:45", 5499),
        "interleaved": PaperResult(67.0, 89.3, "3:59:21", 5354),
        "lower": PaperResult(62.2, 86.1, "3:55:56", 4741),
        "upper": PaperResult(70.5, 90.5, "4:08:40", 5996),
    },
    "s": {
        "none": PaperResult(76.9, 93.6, "7:46:16", 16439),
        "all": PaperResult(68.9, 89.3, "6:01:16", 10657),
        "interleaved": PaperResult(72.8, 91.2, "5:56:15", 10400),
        "lower": PaperResult(69.0, 89.0, "5:34:36", 9139),
        "upper": PaperResult(75.2, 92.0, "6:19:28", 12161),
    },
}
# Tokens per fused layer
TABLE_1_TOKENS = {"all": 7, "interleaved": 14, "lower": 9, "upper": 9}
# By starting layer, counted from 1: tokens per fused layer, result
TABLE_2 = {
    15: (15, PaperResult(72.7, 92.2, "4:22:04", 7185)),
    14: (14, PaperResult(73.6, 92.2, "4:20:34", 7049)),
    13: (13, PaperResult(72.7, 92.2, "4:19:23", 6936)),
    12: (12, PaperResult(72.3, 92.0, "4:15:32", 6828)),
    11: (12, PaperResult(72.0, 91.6, "4:14:33", 6574)),
    10: (11, PaperResult(71.9, 91.5, "4:12:54", 6496)),
    9: (10, PaperResult(71.7, 91.1, "4:12:35", 6498)),
    8: (10, PaperResult(70.6, 90.9, "4:10:20", 6237)),
    7: (9, PaperResult(71.0, 91.2, "4:13:21", 6258)),
    6: (9, PaperResult(70.5, 90.5, "4:08:40", 5996)),
    5: (8, PaperResult(70.5, 90.5, "4:09:31", 6071)),
    4: (8, PaperResult(69.6, 90.2, "4:11:19", 5810)),
    3: (7, PaperResult(68.1, 89.5, "4:08:11", 6007)),
    2: (7, PaperResult(66.8, 88.9, "4:16:27", 5764)),
}
# By tokens per fused layer, all from the 6th layer
TABLE_3 = {
    9: PaperResult(70.5, 90.5, "4:08:40", 5996),
    8: PaperResult(70.8, 90.4, "4:11:57", 6313),
    7: PaperResult(70.4, 90.7, "4:15:31", 6662),
    6: PaperResult(70.8, 91.2, "4:20:17", 6984),
    5: PaperResult(70.9, 91.1, "4:24:59", 7322),
    4: PaperResult(70.9, 91.2, "4:34:12", 7645),
    3: PaperResult(71.7, 91.4, "4:38:33", 7986),
    2: PaperResult(71.4, 91.6, "4:42:38", 8337),
    1: PaperResult(72.4, 91.6, "4:42:32", 8693),
}

# Ours: upper fusion as in Table 1, with one field that is not the default's, or with two that belong together
ABLATION: dict[str, tuple[str, dict[str, Any]]] = {
    "upper": ("upper: raster order, plain mean, cosine", {}),
    "appended": ("appended order, as published", {"fusion_order": "appended"}),
    "size_weighted": ("size-weighted mean", {"fusion_reduction": "size_weighted"}),
    "scaled_steps": ("time steps scaled by size", {"fusion_scale_time_step": True}),
    "both": (
        "size-weighted mean and scaled time steps",
        {"fusion_reduction": "size_weighted", "fusion_scale_time_step": True},
    ),
    "dot": ("dot product", {"fusion_metric": "dot"}),
    "euclidean": ("euclidean distance", {"fusion_metric": "euclidean"}),
}
# By name: title. Those of numbers are the paper's.
TABLES = {
    "1": "Table 1",
    "2": "Table 2",
    "3": "Table 3",
    "ablation": "Ablation",
    "order": "Order of the tokens",
    "work": "Nearly equal work",
}
# Widths are multiples of this, which suits the kernels
_WIDTH_STEP = 8


@dataclass(frozen=True)
class Cell:
    """A row of a table.

    Attributes:
        name: for folders and `--cells`.
        title: what the paper varies.
        paper: the paper's numbers; None in tables of our own.
        fields: fields of `FambaVConfig` in which it differs at this scale, nearly always those of the fusion.
        same_as: name of the cell that stands for this one, because both start at the same layer of this model.
        in_table_1: name of the row of Table 1 that is the same run, in all other tables.
    """

    name: str
    title: str
    paper: PaperResult | None
    fields: dict[str, Any]
    same_as: str | None = None
    in_table_1: str | None = None


def table_cells(table: str, flags: dict[str, Any], backbone: str) -> list[Cell]:
    """The rows of one of `TABLES` for a model of this size, the one without fusion first."""
    num_layers = flags["num_hidden_layers"]
    size = num_layers, FambaVConfig(**model_fields(flags), fusion_strategy="none").num_patches + 1
    of_none = TABLE_1[backbone]["none"] if table.isdigit() else None
    cells = [Cell("none", "no fusion", of_none, {"fusion_strategy": "none"})]
    if table == "1":
        for strategy, tokens in TABLE_1_TOKENS.items():
            fusion = fusion_fields(strategy, tokens, *size)
            cells.append(Cell(strategy, strategy, TABLE_1[backbone][strategy], fusion))
    elif table == "2":
        same_as = coinciding_layers([start - 1 for start in TABLE_2], num_layers)
        for start, (tokens, paper) in TABLE_2.items():
            run_start = same_as[start - 1] + 1
            fusion = fusion_fields("upper", TABLE_2[run_start][0], *size, start_layer=run_start - 1)
            title = f"upper, {tokens} from layer {start}"
            stand_in = None if run_start == start else f"start{run_start}"
            cells.append(Cell(f"start{start}", title, paper, fusion, stand_in))
    elif table == "3":
        for tokens, paper in TABLE_3.items():
            fusion = fusion_fields("upper", tokens, *size)
            cells.append(Cell(f"r{tokens}", f"upper, {tokens} from layer 6", paper, fusion))
    elif table == "order":
        for strategy in ("all", "lower", "upper"):
            fusion = fusion_fields(strategy, TABLE_1_TOKENS[strategy], *size)
            cells.append(Cell(strategy, strategy, None, fusion))
            appended = {**fusion, "fusion_order": "appended"}
            cells.append(Cell(f"{strategy}_appended", f"{strategy}, in the published order", None, appended))
    elif table == "work":
        upper = fusion_fields("upper", TABLE_1_TOKENS["upper"], *size)
        cells += [Cell("upper", "upper", None, upper), *_smaller_cells(model_fields(flags), upper)]
    else:
        upper = fusion_fields("upper", TABLE_1_TOKENS["upper"], *size)
        cells += [Cell(name, title, None, {**upper, **fields}) for name, (title, fields) in ABLATION.items()]
    if table == "1":
        return cells
    table_1 = table_cells("1", flags, backbone)
    return [
        replace(cell, in_table_1=next((other.name for other in table_1 if other.fields == cell.fields), None))
        for cell in cells
    ]


def _smaller_cells(fields: dict[str, Any], fusion: dict[str, Any]) -> list[Cell]:
    """Without fusion, a narrower and a shallower model that come nearest to the multiply-adds of the fused one."""
    work = multiply_adds(FambaVConfig(**fields, **fusion))
    config = FambaVConfig(**fields)

    def nearest(field: str, values: range) -> dict[str, Any]:
        candidates = [{"fusion_strategy": "none", field: value} for value in values]
        return min(candidates, key=lambda changed: abs(multiply_adds(FambaVConfig(**{**fields, **changed})) - work))

    narrow = nearest("hidden_size", range(_WIDTH_STEP, config.hidden_size, _WIDTH_STEP))
    shallow = nearest("num_hidden_layers", range(1, config.num_hidden_layers))
    return [
        Cell("narrow", f"no fusion, {narrow['hidden_size']} wide", None, narrow),
        Cell("shallow", f"no fusion, {shallow['num_hidden_layers']} layers", None, shallow),
    ]
