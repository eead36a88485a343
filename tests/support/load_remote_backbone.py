"""Load a backbone by the code beside its weights alone, and write down its feature maps.

    python -I load_remote_backbone.py FOLDER_OR_NAME INPUTS_FILE OUTPUT_FOLDER

`test_modeling_fambav_backbone.py` runs this in a process of its own, where this package counts as not installed.
"""

import sys
from pathlib import Path


def main(name: str, inputs_file: str, output_folder: str) -> None:
    for blocked in ("modeling_fambav", "numba", "llvmlite"):  # without the last two, no kernel has to be compiled
        sys.modules[blocked] = None  # `import` raises ModuleNotFoundError

    from safetensors.torch import load_file, save_file
    from transformers import AutoBackbone
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    if Path(name).is_dir():
        # AutoBackbone.from_pretrained looks up every name on the Hub, also that of a folder, which is an error.
        backbone_class = get_class_from_dynamic_module("modeling_fambav.FambaVBackbone", name)
        backbone = backbone_class.from_pretrained(name, out_indices=[1, 3])
    else:
        backbone = AutoBackbone.from_pretrained(name, trust_remote_code=True, out_indices=[1, 3])
    assert type(backbone).__module__.startswith("transformers_modules."), type(backbone)

    feature_maps = backbone(load_file(inputs_file)["pixel_values"]).feature_maps
    maps = {str(index): feature_map.detach().contiguous() for index, feature_map in enumerate(feature_maps)}
    save_file(maps, Path(output_folder, "maps.safetensors"))


if __name__ == "__main__":
    main(*sys.argv[1:])
