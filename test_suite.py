"""Everything that looks at SeqSetVAE from outside.

    python test_suite.py                           runs every test below through pytest
    python test_suite.py --soak                    runs the kill and damage tests at length, with counts
    python test_suite.py --checkpoint C            analyses a finetuned checkpoint on its test split
    python test_suite.py --checkpoint C --follow   reads events as they come, prints each stay's risk
    python test_suite.py --protocol --data_dir D   measures the tables of RESULTS.md
    python test_suite.py --forecast_benchmark --data_dir D   measures forecasts of the second day
    python test_suite.py --benchmark [--data_dir D]   measures speed and memory beside a plain loop
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from checkpoint import Checkpoint
from data import InputError
from predictor import follow
from protocol import METHODS, baselines, benchmark, forecast_benchmark, protocol, scale
from report import performance
from runs import CHECKPOINTS, exit_code
from settings import SEED, SHARE, Parser, SharedSettings, changed, data_options, option


TESTS = str(Path(__file__).with_name("tests"))
# Options of which each is a command of its own, and those of the analysis.
INSTEAD = ("soak", "protocol", "forecast_benchmark", "benchmark", "export", "follow")
ANALYSIS = ("baselines", "predictions", "embeddings", "trajectory", "plots", "subgroups", "json")


@dataclass
class Options(SharedSettings):
    """The options of test_suite.py."""
    checkpoint: list = option(
        "the finetuned checkpoint, of train.py or of the original implementation; of several, the mean of "
        "their logits",
        (), group="analysis", nargs="+")
    baselines: bool = option("compare with hand-made baselines and an untrained backbone", False)
    predictions: str = option(
        "file to write: stay_id, subject_id, minute, probability, split, label of every stay of the data, "
        "labelled or not, as CSV or .parquet (which of MEDS data is what meds-evaluation takes)")
    embeddings: str = option("file to write (.npz): stay_id, minute, features and h of every question asked")
    trajectory: str = option("the risk after every set of this stay")
    follow: bool = option(
        "instead of the analysis: read lines stay_id,minute,variable,value from standard input as they come, "
        "and after each set (a later minute of the stay, an empty line) print stay_id,minute,risk; needs the "
        "checkpoint alone (and --variables, where the names or units are others)", False)
    plots: str = option(
        "folder to draw in: curves, ROC and precision-recall, calibration, features and the --trajectory "
        "(needs matplotlib)")
    sensitivity: float = option("share of the positives that an alarm shall find (default: 0.8)", .8, **SHARE)
    subgroups: list = option(
        "the report in groups by these variables, such as Gender,Age,ICUType: by their first value in the "
        "stay, numbers in quartiles; events: by how many it had by then", (),
        type=lambda text: text.split(","))
    json: str = option("file to write: the analysis' figures")
    export: str = option(
        "instead: write the checkpoint (of either mode) without ids, paths and commands, to give it away")
    protocol: str = option(
        "pretrain, finetune in every way and score, on several splits of --data_dir, keeping what is "
        "finished in this folder (default: checkpoints/protocol)", group="protocol", nargs="?",
        const=str(CHECKPOINTS / "protocol"))
    forecast_benchmark: str = option(
        "pretrain and forecast all that comes after the first day, beside baselines, on several splits of "
        "--data_dir, keeping what is finished in this folder (default: checkpoints/forecasts)", nargs="?",
        const=str(CHECKPOINTS / "forecasts"))
    seeds: tuple = option(
        "of the splits, the weights and the batches (default: 0 1 2 3 4; of --forecast_benchmark, whose "
        "splits alone they draw: 42 43 44 45 46)", (0, 1, 2, 3, 4), nargs="+", type=int, **SEED)
    splits: list = option("instead of drawn splits: files as --split takes", (None,), nargs="+")
    methods: list = option(f"some of: {'; '.join(METHODS)} (default: all)", METHODS, nargs="+",
                           choices=METHODS, metavar="NAME")
    fractions: tuple = option("shares of the training labels (default: 1 0.1 0.03)", (1., .1, .03), nargs="+",
                              type=float, **SHARE)
    benchmark: str = option(
        "speed and memory on --data_dir or the embedded cohort; scale: how both grow with the vocabulary "
        "(OMP_NUM_THREADS sets the threads)", group="benchmark", nargs="?", const="speed",
        choices=("speed", "scale"))
    soak: bool = option("run the tests of killed processes and damaged inputs at length: 60 kills, 2,000 "
                        "inputs", False, group="tests")


def main(argv=None) -> int:
    parser = Parser(
        Options, {"analysis": "analysis of a checkpoint",
                  "data": "data (default: the checkpoint's, of which the recorded test split is scored; of "
                          "other data all stays are; --split: its test part)",
                  "original": "original implementation", "run": "device", "protocol": "protocol",
                  "benchmark": "benchmark", "tests": "tests"},
        description="Without options: run every test. With --checkpoint: analyse a finetuned checkpoint. "
                    "With --protocol: the measured tables of RESULTS.md. With --benchmark: speed and memory.",
        usage="python test_suite.py [--checkpoint CKPT | --protocol [FOLDER] | --benchmark] [options]")
    return exit_code(lambda: run(vars(parser.parse_args(argv))))


def run_tests(*options: str) -> int:
    """Returns the exit code of pytest, which only the tests need."""
    import pytest
    return pytest.main([TESTS, "-q", *options])


def run(given: dict) -> int | None:
    """Do what the options given ask for. Returns the exit code of the tests."""
    arguments = changed(Options(), given)
    instead = [name for name in INSTEAD if getattr(arguments, name)]
    if instead and (unused := [name for name in (*instead[1:], *ANALYSIS) if getattr(arguments, name)]):
        raise InputError(f"--{instead[0]} does not go with --{', --'.join(unused)}; give them one after "
                         "another")
    if arguments.soak:
        os.environ["SEQSETVAE_SOAK"] = "1"
        return run_tests("-s", "-k", "random")
    if (arguments.protocol or arguments.forecast_benchmark) and not arguments.data_dir:
        raise InputError(f"--{instead[0]} needs --data_dir, for instance ../shared/data/physionet2012")
    if arguments.protocol:
        protocol(data_options(arguments), arguments.splits, arguments.seeds, arguments.methods,
                 arguments.fractions, Path(arguments.protocol))
    elif arguments.forecast_benchmark:
        forecast_benchmark(data_options(arguments), given.get("seeds", range(42, 47)),
                           Path(arguments.forecast_benchmark))
    elif arguments.benchmark == "scale":
        scale()
    elif arguments.benchmark:
        benchmark(arguments)
    elif len(arguments.checkpoint) > 1 and (arguments.export or arguments.follow):
        raise InputError("--export and --follow take one --checkpoint")
    elif arguments.checkpoint and arguments.export:
        Checkpoint.open(arguments.checkpoint[0]).export(arguments.export)
    elif arguments.checkpoint and arguments.follow:
        follow(arguments)
    elif arguments.checkpoint:
        performance(arguments, baselines if arguments.baselines else None)
    elif given:
        raise InputError("these options need --checkpoint (or --protocol, --forecast_benchmark, "
                         "--benchmark); the tests run without any option")
    else:
        return run_tests()


if __name__ == "__main__":
    sys.exit(main())
