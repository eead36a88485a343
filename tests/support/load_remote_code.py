"""Load a saved classifier by the code in its folder alone, and write down what came out.

    python -I load_remote_code.py FOLDER OUTPUT_FOLDER [BLOCKED_MODULE ...]

`test_remote_code.py` runs this in a process of its own, where importing the blocked modules fails as if they were not
installed. It cannot be done in the process of the tests: classes that are registered there win over those in a folder.
"""

import importlib.util
import json
import sys
from pathlib import Path


def main(folder: str, output_folder: str, *blocked: str) -> None:
    for name in blocked:
        sys.modules[name] = None  # `import` raises ModuleNotFoundError, and `find_spec` finds nothing
        assert importlib.util.find_spec(name) is None

    import torch
    from PIL import Image
    from safetensors.torch import load_file, save_file
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        AutoModelForImageClassification,
        pipeline,
    )

    refusals = {}
    for auto_class in (AutoConfig, AutoModel, AutoModelForImageClassification):
        try:
            auto_class.from_pretrained(folder)
        except ValueError as error:
            refusals[auto_class.__name__] = str(error)
    try:
        pipeline("image-classification", model=folder)
    except ValueError as error:
        refusals["pipeline"] = str(error)

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    classifier = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    classify = pipeline("image-classification", model=folder, trust_remote_code=True)
    torch.manual_seed(0)
    relabeled = AutoModelForImageClassification.from_pretrained(
        folder, trust_remote_code=True, num_labels=7, ignore_mismatched_sizes=True
    )

    inputs = load_file(Path(folder).parent / "inputs.safetensors")
    image = Image.fromarray(inputs["image"].numpy())
    tensors = {
        "logits": classifier(inputs["pixel_values"]).logits.detach(),
        "last_hidden_state": model(inputs["pixel_values"]).last_hidden_state.detach(),
        "processed": processor(image, return_tensors="pt")["pixel_values"],
    }
    save_file(tensors, Path(output_folder, "tensors.safetensors"))
    save_file(relabeled.state_dict(), Path(output_folder, "relabeled.safetensors"))
    package = type(classifier).__module__.rpartition(".")[0]
    report = {
        "refusals": refusals,
        "code_from": sorted({type(thing).__module__.split(".")[0] for thing in (config, classifier, model)}),
        "class_names": [type(thing).__name__ for thing in (config, classifier, model)],
        "id2label": classifier.config.id2label,
        "sequence_lengths": config.sequence_lengths,
        "answers": classify(image, top_k=3),
        "backend": sys.modules[f"{package}.selective_scan"].selective_scan_backend(inputs["pixel_values"]),
        "imported": [name for name in ("modeling_fambav", "numba") if sys.modules.get(name) is not None],
    }
    Path(output_folder, "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
