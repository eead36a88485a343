"""Run a table of the paper, and write what comes out beside what the paper reports; or one of our own.

    python training/reproduce.py --table 1 --scale nano --dataset_name path/to/cifar100

Every cell of the table and every seed is a training run of its own. An interrupted table resumes where it was
when the same command is given again; runs that are finished are only read. All that is left is in one folder:

    OUTPUT_DIR/table1_nano/
        upper_seed0/             what train.py leaves
        upper_seed0.train.log    what it printed
        table.json, table.md, table.png

Scales: `paper` (224 px, 24 layers, 300 epochs), `native32` (the same model on 32 px), `nano` (a small model on 32 px,
for a laptop), `distilled` (the model of model_cards/fambav-cifar100, taught by a checkpoint of it, whose predictions
store_teacher_views.py has put into outputs/teacher_views) and `quick` (seconds; says nothing about accuracy). At all
of them a strategy removes the same share of the tokens as in the paper. `--table ablation` varies how tokens are
fused, which the paper leaves open, `--table order` where a fused token stands, and `--table work` compares the fused
model with smaller unfused ones of about as many multiply-adds. Rows that are finished in Table 1, such as the one
without fusion, are not trained again for another table.
"""

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

from fambav_training.paper.report import duration, make_report, write_report
from fambav_training.paper.runs import Run, launch, log_tail, table_runs
from fambav_training.paper.tables import SCALES, TABLES, WIDTH_FACTORS, Cell, table_cells
from fambav_training.processes import exit_on_signal


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", choices=TABLES, required=True, help="table of the paper, or ours")
    parser.add_argument("--scale", choices=SCALES, default="nano", help="size of images, model and run")
    parser.add_argument("--backbone", choices=WIDTH_FACTORS, default="ti", help="Vim-Ti or Vim-S, twice as wide")
    parser.add_argument("--seeds", type=int, default=1, metavar="K", help="runs per cell, with seeds 0 to K-1")
    parser.add_argument("--dataset_name", help="Hub id or local folder instead of the scale's own dataset")
    parser.add_argument("--epochs", type=int, help="epochs per run instead of the scale's own")
    parser.add_argument("--cells", nargs="+", metavar="NAME", help="run only these; the others keep what they have")
    parser.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), default="no", help="of all runs")
    parser.add_argument("--cuda_graphs", action="store_true", help="on a GPU, record and replay the steps of all runs")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/reproduce"), help="folder of all tables")
    args = parser.parse_args(argv)
    if args.backbone == "s" and args.table in ("2", "3"):
        parser.error("--backbone s: tables 2 and 3 have no Vim-S")
    for name in ("seeds", "epochs"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value}: expected at least 1")
    return args


def shared_flags(args: argparse.Namespace) -> dict[str, Any]:
    """Flags of train.py that all runs of a table have."""
    flags = {**SCALES[args.scale], "mixed_precision": args.mixed_precision}
    flags["hidden_size"] *= WIDTH_FACTORS[args.backbone]
    if args.dataset_name is not None:
        flags["dataset_name"] = args.dataset_name
    if args.epochs is not None:
        flags["num_train_epochs"] = args.epochs
    if args.cuda_graphs:
        flags["cuda_graphs"] = True
    return flags


def table_folder(args: argparse.Namespace, table: str) -> Path:
    """Folder of a table for the model and scale of this call."""
    name = f"table{table}" if table.isdigit() else table
    return args.output_dir / f"{name}_{args.scale}{'_s' if args.backbone == 's' else ''}"


def choose_runs(cells: list[Cell], runs: dict[str, list[Run]], names: list[str] | None) -> list[Run]:
    """Runs of these cells, of all cells if None, seed by seed so that the table fills early.

    Raises:
        ValueError: if a name is not that of a cell.
    """
    stand_ins = {cell.name: cell.same_as or cell.name for cell in cells}
    unknown = sorted(set(names or ()) - stand_ins.keys())
    if unknown:
        raise ValueError(f"--cells {' '.join(unknown)}: expected some of {' '.join(stand_ins)}")
    chosen = {stand_ins[name] for name in names or stand_ins}
    return sorted((run for name in runs if name in chosen for run in runs[name]), key=lambda run: run.seed)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    exit_on_signal(signal.SIGTERM)
    title = f"{TABLES[args.table]}, Vim-{args.backbone.capitalize()}, scale {args.scale}"
    folder, flags = table_folder(args, args.table), shared_flags(args)
    cells = table_cells(args.table, flags, args.backbone)
    runs = table_runs(cells, range(args.seeds), flags, folder, table_folder(args, "1"))
    failed = []
    try:
        chosen = choose_runs(cells, runs, args.cells)
        write_report(title, make_report(cells, runs, flags), folder)
        for number, run in enumerate(chosen, 1):
            if run.results() is not None:
                print(f"[{number}/{len(chosen)}] {run.source}: finished before", flush=True)
                continue
            progress = f"[{number}/{len(chosen)}] {run.folder}"
            print(f"{progress}: training, see {run.log}", flush=True)
            exit_code = launch(run)
            results = run.results()
            if exit_code != 0 or results is None:
                failed.append(run)
                print(f"{progress}: FAILED with exit code {exit_code}; {run.log} ends with", flush=True)
                print(log_tail(run), flush=True)
                continue
            print(f"{progress}: top-1 {results['top1']:.2f} %, {duration(results['train_seconds'])}", flush=True)
            write_report(title, make_report(cells, runs, flags), folder)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; run the same command again to resume")
    print(f"\n{(folder / 'table.md').read_text()}")
    print(f"{folder}: table.json, table.md, table.png")
    if failed:
        sys.exit(f"{len(failed)} of {len(chosen)} runs failed: {', '.join(str(run.folder) for run in failed)}")


if __name__ == "__main__":
    main()
