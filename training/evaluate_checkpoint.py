"""Score a trained classifier on a dataset, with the fusion it was trained with or another.

    python training/evaluate_checkpoint.py outputs/demo/upper --dataset_name digits --fusion_strategy none

Prints top-1 and top-5 accuracy in percent, and writes them to `--output_file` with all that they depend on. Without
`--validation_split` it scores the fifth of the training split that training with the same `--seed` has set aside.

    python training/evaluate_checkpoint.py outputs/demo/none --sweep all upper --sweep_tokens 2 4 8
    python training/evaluate_checkpoint.py outputs/demo/none --ablate --fusion_strategy upper --fusion_tokens 4
    python training/evaluate_checkpoint.py outputs/demo/none --target_speedup 1.5
    python training/evaluate_checkpoint.py outputs/demo/none --target_tokens 0.5 --fusion_strategy lower

`--sweep` scores without fusion and with every strategy and number of tokens asked for (or share of the multiply-adds
saved, or order of the tokens), and leaves a table and a plot beside `--output_file`; `--ablate` does so with one field
of the fusion changed at a time. A target finds how much fusion it takes, and scores with that.
"""

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from fambav_training.cli import add_model_flags, config_overrides, one_line_errors
from fambav_training.data.labeled_images import load_labeled_images
from fambav_training.evaluation.scoring import Scorer, load_classifier
from fambav_training.fusion.settings import STRATEGIES, set_fusion, with_fusion
from fambav_training.fusion.speed import measured_speedup
from fambav_training.fusion.sweep import ablation_settings, markdown, sweep, sweep_settings, write_report
from fambav_training.fusion.targets import fusion_for_share, fusion_for_speedup, token_share
from fambav_training.machine.memory import keep_freed_memory
from fambav_training.machine.provenance import environment
from modeling_fambav import selective_scan_backend

# Of the measurement that is reported; those of the search have less, because there are many
_MAX_SECONDS_OF_THE_RESULT = 30.0


def find_fusion(scorer: Scorer, strategy: str | None, args: argparse.Namespace) -> dict[str, Any]:
    """The fusion that reaches `--target_tokens` or `--target_speedup`, and what it does.

    Args:
        scorer: its model and its first batch are what is measured.
        strategy: the model's own if None; `"upper"` where that has no number of tokens per layer.
        args: the command line, with one of the two targets.

    Returns:
        the fusion fields, the share of the tokens that they leave, and how many times as fast as without fusion they
        make the forward pass, measured once more, with its uncertainty.

    Raises:
        ValueError: if the strategy does not reach the target.
    """
    model, pixel_values = scorer.model, scorer.pixel_values
    if strategy is None:
        strategy = model.config.fusion_strategy if model.config.fusion_strategy in STRATEGIES else "upper"
    if args.target_tokens is not None:
        fusion = fusion_for_share(model.config, args.target_tokens, strategy)
    else:
        fusion = fusion_for_speedup(model, pixel_values, args.target_speedup, strategy, measured_speedup)
    # Not one of the measurements by which it was chosen: the chosen one is more often too high than too low
    measured = measured_speedup(model, pixel_values, fusion, _MAX_SECONDS_OF_THE_RESULT)
    return {
        "fusion": fusion,
        "token_share": token_share(with_fusion(model.config, fusion)),
        "speedup": measured.times,
        "speedup_uncertainty": measured.uncertainty,
        "speedup_quartiles": [measured.low, measured.high],
        "speedup_rounds": measured.rounds,
        "speedup_is_noisy": measured.is_noisy,
    }


def found_sentence(found: dict[str, Any]) -> str:
    """One line on a result of `find_fusion`, with the flags that give the same fusion."""
    words = []
    for name, value in found["fusion"].items():
        words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    low, high = found["speedup_quartiles"]
    spread = f"half of {found['speedup_rounds']} rounds between {low:.2f} and {high:.2f}"
    if found["speedup_is_noisy"]:
        spread += "; this machine does other work too, measure again when it is idle"
    return (
        f"found {' '.join(words)}: {found['token_share']:.1%} of the tokens, {found['speedup']:.2f} +- "
        f"{found['speedup_uncertainty']:.2f} times as fast as without fusion ({spread})"
    )


def check_flags(args: argparse.Namespace, fusion: dict[str, Any]) -> None:
    """Raises ValueError if a number is out of range, or flags contradict each other."""
    for name in ("max_eval_samples", "per_device_eval_batch_size"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name} {value}: expected a number >= 1")
    for name in ("sweep_tokens", "sweep_saved", "sweep_orders"):
        if getattr(args, name) is not None and args.sweep is None:
            raise ValueError(f"--{name}: expected --sweep with it")
    if args.sweep_tokens is not None and args.sweep_saved is not None:
        raise ValueError("--sweep_tokens: --sweep_saved chooses them, expected one of the two")
    for share in args.sweep_saved or ():
        if not 0 < share < 1:
            raise ValueError(f"--sweep_saved {share}: expected numbers above 0 and below 1")
    # Those that choose the fusion themselves
    modes = [name for name in ("sweep", "target_speedup", "target_tokens") if getattr(args, name) is not None]
    if not modes:
        return
    chosen = {"fusion_tokens", "fusion_start_layer", "fusion_end_layer", "fusion_schedule"}
    if args.sweep is not None:
        chosen.add("fusion_strategy")
    if args.sweep_orders is not None:
        chosen.add("fusion_order")
    if given := sorted(chosen & fusion.keys()):
        raise ValueError(f"--{given[0]}: --{modes[0]} chooses it, expected one of the two")


def parse_command_line() -> tuple[argparse.Namespace, dict[str, Any]]:
    """The flags of this script, and the fusion fields that were given."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", help="folder or Hub id of a trained classifier")
    parser.add_argument("--dataset_name", default="digits", help="as of train.py")
    parser.add_argument("--image_column_name", help="column with the images; found by its type if not given")
    parser.add_argument("--label_column_name", help="column with the labels; found by its type if not given")
    parser.add_argument("--train_split", default="train", help="split that a fifth is scored of")
    parser.add_argument("--validation_split", help="split to score, instead of a fifth of the training split")
    parser.add_argument("--max_eval_samples", type=int, help="score only this many images")
    parser.add_argument("--per_device_eval_batch_size", type=int, default=128, help="images per process and batch")
    parser.add_argument("--seed", type=int, default=0, help="of the fifth that is set aside")
    parser.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help="accelerate's own if not given")
    parser.add_argument("--cpu", action="store_true", help="use the CPU even if there is an accelerator")
    parser.add_argument("--output_file", type=Path, default=Path("outputs/evaluation.json"), help="where to write")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument(
        "--sweep", nargs="*", choices=STRATEGIES, help="score without fusion and with these strategies, all if empty"
    )
    modes.add_argument("--ablate", action="store_true", help="score with one field of the fusion changed at a time")
    modes.add_argument(
        "--target_speedup", type=float, help="score with the least fusion that is this many times as fast"
    )
    modes.add_argument(
        "--target_tokens", type=float, help="score with the fusion that leaves this share of the tokens"
    )
    parser.add_argument("--sweep_tokens", type=int, nargs="+", help="numbers of tokens per layer that --sweep tries")
    parser.add_argument(
        "--sweep_saved",
        type=float,
        nargs="+",
        help="shares of the multiply-adds to save, in place of --sweep_tokens",
    )
    parser.add_argument(
        "--sweep_orders", nargs="+", choices=("raster", "appended"), help="orders of the tokens that --sweep tries"
    )
    add_model_flags(parser, prefix="fusion_")
    args = parser.parse_args()
    return args, config_overrides(args)


def run_sweep(args: argparse.Namespace, scorer: Scorer, conditions: dict[str, Any]) -> None:
    """Score with every fusion asked for, print the table, and write it after every row."""
    config = scorer.model.config
    if args.ablate:
        settings = ablation_settings(config)
    else:
        settings = sweep_settings(
            config,
            args.sweep or STRATEGIES,
            tokens=args.sweep_tokens,
            saved=args.sweep_saved,
            orders=args.sweep_orders,
        )
    report = {
        "model": args.model,
        "batch_size": len(scorer.pixel_values),
        "settings": len(settings),
        **conditions,
        "rows": [],
    }
    try:
        for row in sweep(config, settings, scorer.score_and_time):
            report["rows"].append(row)
            write_report(report, args.output_file)
    except KeyboardInterrupt:
        # Not through sys.exit(text), whose exit code is always 1
        sys.stderr.write(f"stopped after {len(report['rows'])} of {len(settings)} rows; see {args.output_file}\n")
        sys.exit(128 + signal.SIGINT)
    print(markdown(report))


def main() -> None:
    args, fusion = parse_command_line()
    keep_freed_memory()
    with one_line_errors():
        check_flags(args, fusion)
        args.output_file.parent.mkdir(parents=True, exist_ok=True)
        accelerator = Accelerator(mixed_precision=args.mixed_precision, cpu=args.cpu)
        is_table = args.sweep is not None or args.ablate
        if accelerator.num_processes > 1 and (is_table or args.target_speedup is not None):
            raise ValueError("--sweep, --ablate and --target_speedup measure one process, expected a launch with one")
        has_target = args.target_speedup is not None or args.target_tokens is not None
        strategy = fusion.pop("fusion_strategy", None) if has_target else None
        model, processor = load_classifier(args.model, fusion)
        images = load_labeled_images(
            args.dataset_name,
            args.image_column_name,
            args.label_column_name,
            args.train_split,
            args.validation_split,
            args.seed,
        )
        batch_size, max_samples = args.per_device_eval_batch_size, args.max_eval_samples
        scorer = Scorer(model, processor, images, accelerator, batch_size, max_samples, args.seed)
        conditions = {
            "scan_backend": selective_scan_backend(next(model.parameters())),
            "arguments": {
                name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()
            },
            **environment(accelerator),
        }
        if is_table:
            run_sweep(args, scorer, conditions)
            return
        found = None
        if has_target:
            found = find_fusion(scorer, strategy, args)
            set_fusion(model.config, found["fusion"])
        scores = scorer.score()
    if not accelerator.is_main_process:
        return
    results = {
        "model": args.model,
        **scores,
        "found": found,
        "sequence_lengths": model.config.sequence_lengths,
        **conditions,
    }
    args.output_file.write_text(json.dumps(results, indent=2) + "\n")
    if found is not None:
        print(found_sentence(found))
    print(
        f"{args.model}: top-1 {scores['top1']:.2f} %, top-5 {scores['top5']:.2f} % of {scores['validation_images']} "
        f"images, {scores['images_per_second']:.0f} images/s, fusion {model.config.fusion_strategy}, tokens per layer "
        f"{' '.join(map(str, model.config.sequence_lengths))}"
    )


if __name__ == "__main__":
    main()
