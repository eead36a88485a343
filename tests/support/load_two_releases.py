"""Load classifiers by the code beside their weights, one after the other into one process, and let all compute.

    python -I load_two_releases.py INPUTS_FILE OUTPUT_FILE FOLDER FOLDER ...

Writes `STEP.NAME.QUANTITY` for every folder: what it gave as soon as it was loaded (`first`), and after all the others
were loaded (`last`). `test_two_releases.py` runs this in a process of its own.
"""

import sys
from collections.abc import Iterator
from pathlib import Path


def main(inputs_file: str, output_file: str, *folders: str) -> None:
    sys.modules["modeling_fambav"] = None  # as if it were not installed

    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForImageClassification

    pixel_values = load_file(inputs_file)["pixel_values"]
    models, compiled, programs, results = {}, {}, {}, {}

    def compute(name: str) -> Iterator[tuple[str, torch.Tensor]]:
        model = models[name]
        model.zero_grad()
        logits = model(pixel_values).logits
        logits.square().sum().backward()
        yield "logits", logits
        yield "gradient", torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        with torch.no_grad():
            yield "compiled", compiled[name](pixel_values).logits

    def record(step: str, name: str) -> None:
        for quantity, tensor in compute(name):
            results[f"{step}.{name}.{quantity}"] = tensor.detach().clone()

    for folder in folders:
        name = Path(folder).name
        models[name] = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
        assert type(models[name]).__module__.startswith("transformers_modules.")
        compiled[name] = torch.compile(models[name], backend="aot_eager")
        programs[name] = Path(output_file).with_suffix(f".{name}.pt2")
        torch.export.save(torch.export.export(models[name], (pixel_values,)), programs[name])
        record("first", name)
    for name in models:
        record("last", name)
        results[f"exported.{name}.logits"] = torch.export.load(programs[name]).module()(pixel_values).logits.detach()
    save_file(results, output_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
