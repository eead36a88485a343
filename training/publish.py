"""Publish a trained model on the Hugging Face Hub: one commit with all its files, and a tag that names it.

    python training/publish.py outputs/cifar100 fambav-cifar100 --private --tag v1

The token is the one of `hf auth login`, or HF_TOKEN. Whatever fails on the way, the same command completes it: the
main branch holds either what it held before or the whole release, and what is there already is not sent again. A
folder of quantize.py is published in the same way.
"""

import argparse
from pathlib import Path

from fambav_training.cli import one_line_errors
from fambav_training.release.hub import check_tag, find_files, prepare_repository, publish_folder
from fambav_training.release.quantized import QUANTIZED_FILE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="output folder of a finished training run, or of quantize.py")
    parser.add_argument("repo", help="repository, NAME or OWNER/NAME; created if it is new")
    parser.add_argument("--private", action="store_true", help="create a private repository")
    parser.add_argument("--tag", help="name of this release, default step-STEPS-seed-SEED-DIGEST")
    parser.add_argument("--onnx", action="store_true", help="also the model as onnx/model.onnx, for transformers.js")
    args = parser.parse_args()
    with one_line_errors():
        # A repository is only created for something that can be published
        find_files(args.folder)
        if args.tag is not None:
            check_tag(args.tag)
        if args.onnx and (args.folder / QUANTIZED_FILE).exists():
            raise ValueError(f"--onnx: {args.folder} holds a quantised model, which is an ONNX file already")
        if args.onnx:
            from fambav_training.export.onnx_file import export_for_hub  # needs packages that publishing does not

            export_for_hub(args.folder)
        url = publish_folder(args.folder, prepare_repository(args.repo, args.private), args.tag)
    print(f"published: {url}")


if __name__ == "__main__":
    main()
