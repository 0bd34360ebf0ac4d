"""Everything that looks at SeqSetVAE from outside.

    python test_suite.py                       runs every test below through pytest
    python test_suite.py --soak                runs the kill and damage tests at length and prints their counts
    python test_suite.py --checkpoint C        analyses a finetuned checkpoint on its test split [--baselines]
    python test_suite.py --checkpoint C --follow   reads events as they come, prints each stay's risk after every set
    python test_suite.py --protocol --data_dir D   measures the tables of RESULTS.md: several splits, every method
    python test_suite.py --benchmark [--data_dir D]   measures speed and memory beside a plain loop over single sets
"""

import argparse
import os
import sys
from pathlib import Path

from checkpoint import Checkpoint
from data import InputError
from predictor import follow
from protocol import METHODS, baselines, benchmark, protocol, scale
from report import performance
from runs import CHECKPOINTS, exit_code
from settings import add_data_options, add_head_options, data_options, fraction, seed


TESTS = str(Path(__file__).with_name("tests"))


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description="Without options: run every test. With --checkpoint: analyse a finetuned checkpoint. "
                    "With --protocol: the measured tables of RESULTS.md. With --benchmark: speed and memory.",
        usage="python test_suite.py [--checkpoint CKPT | --protocol [FOLDER] | --benchmark] [options]",
        allow_abbrev=False)
    add = parser.add_argument_group("analysis of a checkpoint").add_argument
    add("--checkpoint", metavar="CKPT", nargs="+",
        help="the finetuned checkpoint, of train.py or of the original implementation; of several, the mean of their "
             "logits")
    add("--baselines", action="store_true", help="compare with hand-made baselines and an untrained backbone")
    add("--predictions", metavar="FILE",
        help="write stay_id, minute, probability, split, label of every stay of the data, labelled or not, as CSV or "
             ".parquet (which of MEDS data is what meds-evaluation takes)")
    add("--embeddings", metavar="NPZ", help="write stay_id, minute, features and h of every question asked")
    add("--trajectory", metavar="STAY", help="the risk after every set of this stay")
    add("--follow", action="store_true",
        help="instead of the analysis: read lines stay_id,minute,variable,value from standard input as they come, and "
             "after each set (a later minute of the stay, an empty line) print stay_id,minute,risk; needs the "
             "checkpoint alone (and --variables, where the names or units are others)")
    add("--plots", metavar="DIR",
        help="draw curves, ROC and precision-recall, calibration, features and the --trajectory (needs matplotlib)")
    add("--sensitivity", type=fraction, default=.8, metavar="X",
        help="share of the positives that an alarm shall find (default: %(default)s)")
    add("--subgroups", type=lambda text: text.split(","), default=[], metavar="NAMES",
        help="the report in groups by these variables, such as Gender,Age,ICUType: by their first value in the stay, "
             "numbers in quartiles; events: by how many it had by then")
    add("--json", metavar="FILE", help="write the analysis' figures")
    add("--export", metavar="FILE",
        help="instead: write the checkpoint (of either mode) without ids, paths and commands, to give it away")
    add("--device", default="auto", help="auto (cuda where there is one, else cpu), cpu, cuda, cuda:1 (default: auto)")
    add_head_options(add)

    add = parser.add_argument_group("data (default: the checkpoint's, of which the recorded test split is scored; "
                                    "of other data all stays are; --split: its test part)").add_argument
    add_data_options(add)
    add("--params_map", "--params_map_path", metavar="FILE",
        help="original layout: statistics, CSV variable,mean,std or .pkl")

    add = parser.add_argument_group("protocol").add_argument
    add("--protocol", metavar="FOLDER", nargs="?", const=str(CHECKPOINTS / "protocol"),
        help="pretrain, finetune in every way and score, on several splits of --data_dir, keeping what is finished in "
             "FOLDER (default: checkpoints/protocol)")
    add("--seeds", type=seed, nargs="+", default=[0, 1, 2, 3, 4], metavar="N",
        help="of the splits, the weights and the batches (default: 0 1 2 3 4)")
    add("--splits", nargs="+", default=[None], metavar="CSV", help="instead of drawn splits: files as --split takes")
    add("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="NAME",
        help=f"some of: {'; '.join(METHODS)} (default: all)")
    add("--fractions", type=fraction, nargs="+", default=[1., .1, .03], metavar="X",
        help="shares of the training labels (default: 1 0.1 0.03)")
    add = parser.add_argument_group("benchmark").add_argument
    add("--benchmark", nargs="?", const="speed", choices=("speed", "scale"),
        help="speed and memory on --data_dir or the embedded cohort; scale: how both grow with the vocabulary "
             "(OMP_NUM_THREADS sets the threads)")

    add = parser.add_argument_group("tests").add_argument
    add("--soak", action="store_true",
        help="run the tests of killed processes and damaged inputs at length: 60 kills, 2,000 inputs")
    arguments = parser.parse_args(argv)
    return exit_code(lambda: run(arguments, bool(sys.argv[1:] if argv is None else argv)))


def run_tests(*options: str) -> int:
    """The exit code of pytest, which a checkpoint is scored without."""
    import pytest
    return pytest.main([TESTS, "-q", *options])


def run(arguments, given: bool) -> int | None:
    """What the command line asks for; given: it has any option. The exit code of the tests."""
    if arguments.soak:
        os.environ["SEQSETVAE_SOAK"] = "1"
        return run_tests("-s", "-k", "random")
    if arguments.protocol:
        if not arguments.data_dir:
            raise InputError("--protocol needs --data_dir, for instance ../shared/data/physionet2012")
        protocol(data_options(arguments), arguments.splits, arguments.seeds, arguments.methods,
                 arguments.fractions, Path(arguments.protocol))
    elif arguments.benchmark == "scale":
        scale()
    elif arguments.benchmark:
        benchmark(arguments)
    elif len(arguments.checkpoint or []) > 1 and (arguments.export or arguments.follow):
        raise InputError("--export and --follow take one --checkpoint")
    elif arguments.checkpoint and arguments.export:
        Checkpoint.open(arguments.checkpoint[0]).export(arguments.export)
    elif arguments.checkpoint and arguments.follow:
        follow(arguments)
    elif arguments.checkpoint:
        performance(arguments, baselines if arguments.baselines else None)
    elif given:
        raise InputError("these options need --checkpoint (or --protocol, --benchmark); "
                         "the tests run without any option")
    else:
        return run_tests()


if __name__ == "__main__":
    sys.exit(main())
