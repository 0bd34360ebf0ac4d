"""The mechanism of settings: each is a field of a dataclass, whose metadata serve the command line, the checks and the
records of a run. The options that both commands share are declared at the end."""

import argparse
import ast
from contextlib import suppress
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from pathlib import Path

from data import InputError


# ----------------------------------------------------------------------------------------------------------------------
# A setting and its value
# ----------------------------------------------------------------------------------------------------------------------

def setting(default=MISSING, **metadata) -> Field:
    """A field of a dataclass of settings. A `tuple` holds numbers. All metadata are optional:

    low, high: bounds of its numbers (default: 1 for whole numbers, 0 for others; 1e9); length, items: how many numbers
        its tuple has, and of which types.
    words: values that a text stands for.
    choices, metavar, nargs, const, type, action: of an option, as argparse takes them; names: of an option, where they
        are not --NAME.
    group: the group of --help that begins with this option.
    mode: the mode of train.py that alone has it.
    scope: of an option, None (a run records it and cannot change it), "path" or "machine" (a run records it, and takes it
        anew when it is resumed) or "call" (no run records it); of a setting of the model, see ModelConfig.
    """
    return field(default=default, metadata=metadata)


def option(help: str, default=None, **metadata) -> Field:
    """A setting that is an option of the command line; its default is None where it need not be given."""
    return setting(default, help=help, **metadata)


def value_of(f: Field, value):
    """The value of a setting, from a text or from JSON. Raises InputError, see `check`."""
    if f.type in (list, dict):
        return value
    if isinstance(value, str):
        value = f.metadata.get("words", {}).get(value, value)
    if isinstance(value, str) and not isinstance(value, f.type):
        with suppress(ValueError, SyntaxError, TypeError):
            value = ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(value.lower(), value))
    value = tuple(value) if isinstance(value, list) else value
    check(f, value)
    return float(value) if type(value) is int and isinstance(0., f.type) else value


def check(f: Field, value) -> None:
    """Raises InputError where a value is not of the setting's type, none of its choices or outside its bounds. (The
    default bounds lie far within float32.)"""
    about = f.metadata
    kind = f.type | int if isinstance(0., f.type) else f.type
    low, high = about.get("low", int(isinstance(1, f.type))), about.get("high", 1e9)
    items = value if isinstance(value, tuple) else (value,)
    within = all(type(x) in about.get("items", (bool, int, float)) and low <= x <= high for x in items)
    if not (isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
            and (within or isinstance(value, str | None))
            and value in about.get("choices", [value])
            and len(items) == about.get("length", len(items))):
        takes = " or ".join(about.get("choices", [])) or f"{getattr(f.type, '__name__', f.type)}, {low:g} to {high:g}"
        raise InputError(f"{f.name} is {repr(value)[:40]}; it takes {takes}")


def check_settings(settings) -> None:
    for f in fields(settings):
        check(f, getattr(settings, f.name))


def changed(settings, changes: dict):
    """A dataclass of settings with those changes, values or texts, that are its own."""
    return replace(settings, **{f.name: value_of(f, changes[f.name]) for f in fields(settings) if f.name in changes})


def recorded(settings) -> dict:
    """The options that a run records: those that have a value, paths whole, so that they hold in another working
    folder."""
    scopes = {f.name: f.metadata.get("scope") for f in fields(settings)}
    return {name: str(Path(value).resolve()) if scopes[name] == "path" and value else value
            for name, value in vars(settings).items() if value is not None and scopes[name] != "call"}


# ----------------------------------------------------------------------------------------------------------------------
# Command lines
# ----------------------------------------------------------------------------------------------------------------------

ARGPARSE = ("help", "choices", "metavar", "nargs", "const", "type", "action")


class Parser(argparse.ArgumentParser):
    """A parser of the options of a dataclass of settings. What is not given is no attribute of its result."""

    def __init__(self, kind, groups: dict[str, str], **texts):
        """groups: titles by name, in the order of --help; texts: as argparse takes them."""
        super().__init__(allow_abbrev=False, argument_default=argparse.SUPPRESS,
                         formatter_class=argparse.RawDescriptionHelpFormatter, **texts)
        groups = {name: self.add_argument_group(title) for name, title in groups.items()}
        group = None
        for f in fields(kind):
            about = {name: f.metadata[name] for name in ARGPARSE if name in f.metadata}
            group = f.metadata.get("group", group)
            if f.type is bool:
                about["action"] = "store_true"
            if "help" in about:
                groups[group].add_argument(*f.metadata.get("names", [f"--{f.name}"]), dest=f.name, **about)

    def error(self, message: str):
        """Raises every error as one line."""
        raise InputError(f"{message}; see --help")


# ----------------------------------------------------------------------------------------------------------------------
# Options that both commands take
# ----------------------------------------------------------------------------------------------------------------------

SEED = {"low": 0, "high": 2**32 - 1}
SHARE = {"low": 1e-12, "high": 1}


@dataclass
class DataSettings:
    """What the data are and what is asked of them: the arguments of `load_cohort`. None: not given."""
    data_dir: str = option("folder of the data, of any layout that README.md lists", group="data", scope="path")
    synthetic_stays: int = option("size of the embedded cohort (default: 1000)")
    label_file: str = option(
        "labels that lie elsewhere: a file or folder, CSV or Parquet, of stay_id,label and perhaps minute or hour",
        names=("--label_file", "--label_path"), scope="path")
    task: str = option("which of several tasks in the data's labels/")
    positive: str = option("the word in the label column that means 1, such as yes")
    hours: float = option("ask once a stay, this many hours after its first set, from what is known by then; end: at its "
                          "end, wherever a checkpoint learned", low=0, high=1e6, words={"end": 0.})
    split_file: str = option("CSV stay_id,split of train, valid and test, instead of the data's own",
                             names=("--split", "--split_file"), scope="path")
    variables_map: str = option("CSV source,name,factor[,offset]: other names and units of the data's variables, which a "
                                "checkpoint keeps; none drops them",
                                names=("--variables", "--variables_map"), scope="path", words={"none": ""})
    cache_dir: str = option("where data that were read are kept (default: seqsetvae where the system keeps caches)",
                            scope="call")
    params_map: str = option("statistics of its data, CSV variable,mean,std or .pkl", group="original", scope="path",
                             names=("--params_map", "--params_map_path"))


@dataclass
class SharedSettings(DataSettings):
    """What both commands take beside the data."""
    set_heads: int = option("attention heads of the set encoder, for a bare state dict", mode="finetune")
    transformer_heads: int = option("attention heads of the Transformer, for a bare state dict", mode="finetune")
    device: str = option("auto (cuda if there is one, else cpu), cpu, cuda, cuda:1 (default: auto)", "auto",
                         group="run", scope="machine")


def data_options(settings) -> dict:
    """Those of DataSettings that are given."""
    own = {f.name for f in fields(DataSettings)}
    return {name: value for name, value in vars(settings).items() if name in own and value is not None}
