"""Everything that looks at SeqSetVAE from outside.

    python test_suite.py                           runs every test below through pytest
    python test_suite.py --soak                    runs the kill and damage tests at length, with counts
    python test_suite.py --checkpoint C            analyses a finetuned checkpoint on its test split
    python test_suite.py --checkpoint C --follow   reads events as they come, prints each stay's risk
    python test_suite.py --checkpoint C --forecast F --until 24   what each variable will show
    python test_suite.py --protocol --data_dir D   measures the tables of RESULTS.md
    python test_suite.py --forecast_benchmark --data_dir D   measures forecasts of the second day
    python test_suite.py --new_site --data_dir D   measures what old weights are worth to a new hospital
    python test_suite.py --benchmark [--data_dir D]   measures speed and memory beside a plain loop
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from baselines import baselines
from checkpoint import Checkpoint
from data import InputError
from forecast_benchmark import forecast_benchmark
from predictor import follow
from protocol import METHODS, benchmark, protocol, scale
from report import ANALYSIS, forecasts, performance
from runs import CHECKPOINTS, exit_code
from settings import SEED, SHARE, Parser, SharedSettings, changed, data_options, option
from site_benchmark import new_site


TESTS = str(Path(__file__).with_name("tests"))
# Options of a forecast, and those of which each is a command of its own.
FORECASTS = ("queries", "origin", "until", "every")
WITHOUT = ("soak", "protocol", "forecast_benchmark", "new_site", "benchmark")  # a checkpoint
INSTEAD = (*WITHOUT, "export", "follow", "forecast", "odd")


@dataclass
class Options(SharedSettings):
    """The options of test_suite.py."""
    checkpoint: list = option(
        "the checkpoint, of train.py or of the original implementation: a finetuned one (of several, the "
        "mean of their logits) or a pretrained one, whose forecasts are scored",
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
        "folder to draw in: curves, ROC and precision-recall, calibration, decision curve, features and the "
        "--trajectory (needs matplotlib)")
    plot_format: str = option("png, svg or pdf: how --plots draws", "png", choices=("png", "svg", "pdf"))
    explain: str = option(
        "file to write (CSV or .parquet): how much higher the log odds of each stay's last answer are with "
        "a variable's events, and with an event, than without them (positive: they raise the risk); of the "
        "stays that may be scored, or of --trajectory alone. Leaving one out misses what two variables tell "
        "alike. With --follow, then without a file: the three largest on each line", nargs="?", const="",
        metavar="FILE")
    explain_at: str = option("which answer of a stay: last, first_alarm, highest, all (that are asked for) "
                             "or a minute after admission", "last", metavar="MOMENT")
    explain_events: int = option("how many single events of each answer, the largest; 0: variables alone, "
                                 "some ten times faster (default: 10)", 10, low=0, metavar="N")
    faithfulness: int = option(
        "whether explanations are faithful, over this many seeded stays (default: 500): how the answer moves "
        "as events are removed in their order, beside the order of |z-score| and random ones", nargs="?",
        const=500, metavar="N")
    sensitivity: float = option("share of the positives that an alarm shall find (default: 0.8)", .8, **SHARE)
    subgroups: list = option(
        "the report in groups by these variables, such as Gender,Age,ICUType: by their first value in the "
        "stay, numbers in quartiles; events: by how many it had by then", (),
        type=lambda text: text.split(","))
    at_hours: tuple = option(
        "the report also at these hours after admission, beside the question itself; a record that ends "
        "before is asked at its end", (), low=1e-3, nargs="+", type=float, metavar="H")
    compare: str = option(
        "the report beside a score in use: file of stay_id,score (higher is worse) and perhaps minute or "
        "hour, as CSV or Parquet")
    json: str = option("file to write: the analysis' figures")
    report: str = option(
        "file to write (.html): the analysis as a page to hand in or print, with the items of TRIPOD+AI that "
        "software can fill in; it shows a patient's stay (needs matplotlib)")
    forecast: str = option(
        "instead: file to write (CSV or .parquet): stay_id, known_until, minute, variable and mean, low, "
        "high (80%%) of what is asked by --queries or --until; with --plots and --trajectory also a picture")
    queries: str = option("file of the columns stay_id, known_until, minute, variable; minutes as in the "
                          "data, of clock times from the first event on")
    origin: float = option("hours until which all is known (default: the end of each record)", low=-1e6)
    until: float = option("forecast every variable with numbers, this many hours after the origin", low=1e-3)
    every: float = option("and before that each so many minutes", low=1)
    odd: str = option(
        "instead: file to write: every charted value beside what was expected of it from the sets before, "
        "and the chance of one as far out (tail)")
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
    new_site: str = option(
        "leave out the stays of each group of --subgroups (default: ICUType) in turn, as a hospital that "
        "comes new, and score what can be begun with there, by the number of its labels, keeping what is "
        "finished in this folder (default: checkpoints/sites)", nargs="?", const=str(CHECKPOINTS / "sites"))
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
    if arguments.explain and arguments.follow:
        raise InputError("--follow --explain takes no FILE: the reasons stand on each line")
    instead = [name for name in INSTEAD if getattr(arguments, name)]
    drawn = ("trajectory", "plots") if arguments.forecast else ()
    drawn = ("subgroups",) if arguments.new_site else drawn
    others = {*instead[1:], *ANALYSIS, *(() if arguments.forecast else FORECASTS)} - {*drawn}
    if instead and (unused := [name for name in sorted(others) if getattr(arguments, name)]):
        raise InputError(f"--{instead[0]} does not go with --{', --'.join(unused)}; give them one after "
                         "another")
    if instead and instead[0] in WITHOUT and arguments.checkpoint:
        raise InputError(f"--{instead[0]} looks at no --checkpoint; leave one of the two out")
    if arguments.explain == "" and not arguments.follow:
        raise InputError("--explain: give the FILE to write, which --follow alone does without")
    if "plot_format" in given and not arguments.plots:
        raise InputError("--plot_format needs --plots DIR")
    if "explain_events" in given and not arguments.explain:
        raise InputError("--explain_events needs --explain FILE")
    if "explain_at" in given and not (arguments.explain or arguments.faithfulness or arguments.report):
        raise InputError("--explain_at needs --explain FILE, --faithfulness or --report")
    if arguments.soak:
        os.environ["SEQSETVAE_SOAK"] = "1"
        return run_tests("-s", "-k", "random")
    if (arguments.protocol or arguments.forecast_benchmark or arguments.new_site) and not arguments.data_dir:
        raise InputError(f"--{instead[0]} needs --data_dir, for instance ../shared/data/physionet2012")
    if arguments.protocol:
        protocol(data_options(arguments), arguments.splits, arguments.seeds, arguments.methods,
                 arguments.fractions, Path(arguments.protocol))
    elif arguments.forecast_benchmark:
        forecast_benchmark(data_options(arguments), given.get("seeds", range(42, 47)),
                           Path(arguments.forecast_benchmark))
    elif arguments.new_site:
        new_site(data_options(arguments), (arguments.subgroups or ["ICUType"])[0],
                 Path(arguments.new_site))
    elif arguments.benchmark == "scale":
        scale()
    elif arguments.benchmark:
        benchmark(arguments)
    elif len(arguments.checkpoint) > 1 and instead:
        raise InputError(f"--{instead[0]} takes one --checkpoint")
    elif arguments.checkpoint and arguments.export:
        Checkpoint.open(arguments.checkpoint[0]).export(arguments.export)
    elif arguments.checkpoint and arguments.follow:
        follow(arguments)
    elif arguments.checkpoint and instead:
        forecasts(arguments)
    elif any(getattr(arguments, name) is not None for name in FORECASTS):
        raise InputError("--queries, --origin, --until and --every need --forecast FILE and --checkpoint")
    elif arguments.checkpoint:
        performance(arguments, baselines if arguments.baselines else None)
    elif given:
        raise InputError("these options need --checkpoint (or --protocol, --forecast_benchmark, "
                         "--benchmark); the tests run without any option")
    else:
        return run_tests()


if __name__ == "__main__":
    sys.exit(main())
