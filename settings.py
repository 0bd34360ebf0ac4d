"""How settings are changed: the options that several commands share, and a setting's value from its text."""

import argparse
import ast
from contextlib import suppress
from dataclasses import asdict, fields, replace

from data import InputError


# ----------------------------------------------------------------------------------------------------------------------
# Settings
# ----------------------------------------------------------------------------------------------------------------------

def setting(name: str, text: str, field):
    """The value that `text` means to a dataclass's field."""
    kind, value = field.type, text
    if kind is not str:
        with suppress(ValueError, SyntaxError, TypeError):
            value = ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text.lower(), text))
        if isinstance(value, list):  # of a config.json
            value = tuple(value)
        if kind is float and type(value) is int:
            value = float(value)
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
        raise InputError(f"--set {name}={text}: takes {getattr(kind, '__name__', kind)}, such as {field.default}")
    return value


def changed(config, changes: dict):
    """A dataclass of settings with those changes that are its own."""
    own = {f.name for f in fields(config)}
    return replace(config, **{name: value for name, value in changes.items() if name in own})


def check_settings(settings, bounds: dict) -> None:
    """Raises InputError where a number among the settings is outside its bounds (by default 0 and 1e9, far within
    float32)."""
    for name, value in asdict(settings).items():
        low, high = bounds.get(name, (0, 1e9))
        numbers = value if isinstance(value, tuple) else () if value is None or isinstance(value, str) else (value,)
        if not all(isinstance(x, (int, float)) and low <= x <= high for x in numbers):
            raise InputError(f"{name} is {value}; it takes numbers from {low:g} to {high:g}")
    if len(settings.betas) != 2 or max(settings.betas) >= 1:
        raise InputError(f"betas is {settings.betas}; it takes two numbers below 1, such as (0.9, 0.999)")


# ----------------------------------------------------------------------------------------------------------------------
# Options that several commands share
# ----------------------------------------------------------------------------------------------------------------------

# Options that name files.
PATHS = ("data_dir", "params_map", "variables_map", "label_file", "split_file", "pretrained_ckpt")
DATA = ("data_dir", "synthetic_stays", "params_map", "variables_map", "label_file", "task", "positive", "hours",
        "split_file")  # the options that say what the data are and what is asked of them, as `load_cohort` takes them


def add_data_options(add) -> None:
    """The options in DATA, but --params_map, which stands with those of the original implementation."""
    add("--data_dir", help="folder of the data, of any layout that README.md lists")
    add("--synthetic_stays", type=positive, metavar="N", help="size of the embedded cohort (default: 1000)")
    add("--label_file", "--label_path", dest="label_file", metavar="FILE",
        help="labels that lie elsewhere: a file or folder, CSV or Parquet, of stay_id,label and perhaps minute or hour")
    add("--task", metavar="NAME", help="which of several tasks in the data's labels/")
    add("--positive", metavar="WORD", help="the word in the label column that means 1, such as yes")
    add("--hours", type=hours, metavar="H",
        help="ask once a stay, H hours after its first set, from what is known by then")
    add("--split", "--split_file", dest="split_file", metavar="CSV",
        help="stay_id,split of train, valid and test, instead of the data's own")
    add("--variables", "--variables_map", dest="variables_map", metavar="CSV",
        help="source,name,factor[,offset]: other names and units of the data's variables")
    add("--cache_dir", metavar="DIR",
        help="where data that were read are kept (default: seqsetvae where the system keeps caches)")


def data_options(arguments) -> dict:
    """Those of DATA that the command line gives, and the cache's place, which no run records."""
    return {name: value for name in (*DATA, "cache_dir") if (value := getattr(arguments, name)) is not None}


def add_head_options(add) -> None:
    """What the shapes in a bare state dict of the original implementation do not tell."""
    for option, of in (("--set_heads", "set encoder"), ("--transformer_heads", "Transformer")):
        add(option, type=positive, metavar="N", help=f"attention heads of the {of}, for a bare state dict")


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(text)


def seed(text: str) -> int:
    if not 0 <= int(text) < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 2**32)")
    return int(text)


def hours(text: str) -> float:
    if not 0 < float(text) < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is not a number of hours")
    return float(text)


def fraction(text: str) -> float:
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in (0, 1]")
    return float(text)


def shorthand(name: str):
    """The type of an option --NAME N that stands for a --set; in full training, of the setting of its own."""
    def number(text: str) -> str:
        return f"--{name}={positive(text)}"
    return number
