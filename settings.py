"""The mechanism of settings: each is a field of a dataclass, whose metadata serve the command line, the
checks and the records of a run. The options that both commands share and the settings of the model are
declared at the end."""

import argparse
import ast
import math
from contextlib import suppress
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from pathlib import Path

from data import KINDS, InputError
from history_statistics import summary_features


# ------------------------------------------------------------------------------------------------------------
# A setting and its value
# ------------------------------------------------------------------------------------------------------------

def setting(default=MISSING, **metadata) -> Field:
    """A field of a dataclass of settings. A `tuple` holds numbers. All metadata are optional:

    low, high: bounds of its numbers (default: 1 for whole numbers, 0 for others; 1e9); length, items: how
        many numbers its tuple has, and of which types.
    words: values that a text stands for.
    choices, metavar, nargs, const, type, action: of an option, as argparse takes them; names: of an option,
        where they are not --NAME.
    group: the group of --help that begins with this option.
    mode: the mode of train.py that alone has it.
    scope: of an option, None (a run records it and cannot change it), "path" or "machine" (a run records it,
        and takes it anew when it is resumed) or "call" (no run records it); of a setting of the model, see
        ModelConfig.
    """
    return field(default=default, metadata=metadata)


def option(help: str, default=None, **metadata) -> Field:
    """A setting that is an option of the command line; its default is None where it need not be given."""
    return setting(default, help=help, **metadata)


def value_of(f: Field, value):
    """The value of a setting, which may be given as text. Raises InputError, see `checked`."""
    with suppress(ValueError, SyntaxError, TypeError):
        value = f.metadata.get("words", {}).get(value, value)
        if isinstance(value, str) and not isinstance(value, f.type):
            words = {"true": "True", "false": "False", "none": "None"}
            value = ast.literal_eval(words.get(value.lower(), value))
    return checked(f, value)


def checked(f: Field, value):
    """The value of a setting, which may come from JSON. Raises InputError where it is not of the setting's
    type, none of its choices or outside its bounds. (The default bounds lie far within float32.)"""
    if value is f.default or f.type in (list, dict):
        return value
    about = f.metadata
    value = tuple(value) if isinstance(value, list) else value
    if type(value) is int and isinstance(0., f.type):
        with suppress(OverflowError):
            value = float(value)
    low, high = about.get("low", int(isinstance(1, f.type))), about.get("high", 1e9)
    items = value if isinstance(value, tuple) else (value,)
    within = all(type(x) in about.get("items", (bool, int, float)) and low <= x <= high for x in items)
    if not (isinstance(value, f.type) and isinstance(value, bool) == (f.type is bool)
            and (within or isinstance(value, str | None))
            and value in about.get("choices", [value])
            and len(items) == about.get("length", len(items))):
        kind = getattr(f.type, "__name__", f.type)
        takes = " or ".join(about.get("choices", [])) or f"{kind}, {low:g} to {high:g}"
        raise InputError(f"{f.name} is {repr(value)[:40]}; it takes {takes}")
    return value


def check_settings(settings) -> None:
    """The `__post_init__` of a dataclass of settings. Raises InputError, see `checked`."""
    for f in fields(settings):
        setattr(settings, f.name, checked(f, getattr(settings, f.name)))


def changed(settings, changes: dict):
    """A dataclass of settings with those changes, values or texts, that are its own."""
    own = [f for f in fields(settings) if f.name in changes]
    return replace(settings, **{f.name: value_of(f, changes[f.name]) for f in own})


def recorded(settings) -> dict:
    """The options that a run records: those that have a value, paths whole, so that they hold in another
    working folder."""
    return {f.name: str(Path(value).resolve()) if f.metadata.get("scope") == "path" and value else value
            for f in fields(settings)
            if (value := getattr(settings, f.name)) is not None and f.metadata.get("scope") != "call"}


# ------------------------------------------------------------------------------------------------------------
# Command lines
# ------------------------------------------------------------------------------------------------------------

ARGPARSE = ("help", "choices", "metavar", "nargs", "const", "type", "action")


class LineParser(argparse.ArgumentParser):
    """A parser whose every error is one line."""

    def error(self, message: str):
        raise InputError(f"{message}; see --help")


class Parser(LineParser):
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


# ------------------------------------------------------------------------------------------------------------
# Options that both commands take
# ------------------------------------------------------------------------------------------------------------

SEED = {"low": 0, "high": 2**32 - 1}
SHARE = {"low": 1e-12, "high": 1}


@dataclass
class DataSettings:
    """What the data are and what is asked of them: the arguments of `load_cohort`. None: not given."""
    data_dir: str = option("folder of the data, of any layout that README.md lists", group="data",
                           scope="path")
    synthetic_stays: int = option("size of the embedded cohort (default: 1000)")
    label_file: str = option(
        "labels that lie elsewhere: a file or folder, CSV or Parquet, of stay_id,label and perhaps minute or "
        "hour",
        names=("--label_file", "--label_path"), scope="path")
    task: list = option("which of several tasks in the data's labels/; of more than one, each is an outcome",
                        nargs="+", metavar="NAME")
    kind: str = option("what an outcome is: 0 or 1 (binary), several of these (see --outcomes), one of "
                       "several classes, a number, or an event and its time (default: event where the labels "
                       "have columns event and hours or days, else binary)", choices=KINDS)
    outcomes: list = option("columns of the labels that hold 0 or 1, each an outcome (--kind several)",
                            nargs="+", metavar="NAME")
    site: str = option("name of the hospital: equal ids at another site are another patient's")
    positive: str = option("the word in the label column that means 1, such as yes")
    hours: float = option("ask once a stay, this many hours after admission (minute 0; of clock times the "
                          "first event); end: at its end, wherever a checkpoint learned", low=0,
                          high=math.inf, words={"end": math.inf})
    split_file: str = option("CSV stay_id,split of train, valid and test, instead of the data's own",
                             names=("--split", "--split_file"), scope="path")
    variables_map: str = option("CSV source,name,factor[,offset]: other names and units of the data's "
                                "variables, which a checkpoint keeps; none drops them",
                                names=("--variables", "--variables_map"), scope="path", words={"none": ""})
    columns: str = option("the tables' own names of columns, such as stay_id=encounter_id,minute=charted")
    cache_dir: str = option("where data that were read are kept (default: seqsetvae where the system keeps "
                            "caches)", scope="call")
    params_map: str = option("statistics of its data, CSV variable,mean,std or .pkl", group="original",
                             scope="path", names=("--params_map", "--params_map_path"))

    __post_init__ = check_settings


@dataclass
class SharedSettings(DataSettings):
    """What both commands take beside the data."""
    set_heads: int = option("attention heads of the set encoder, for a bare state dict", mode="finetune")
    transformer_heads: int = option("attention heads of the Transformer, for a bare state dict",
                                    mode="finetune")
    device: str = option("auto (cuda if there is one, else cpu), cpu, cuda, cuda:1 (default: auto)", "auto",
                         group="run", scope="machine")


def data_options(settings) -> dict:
    """Those of DataSettings that are given."""
    return {f.name: value for f in fields(DataSettings) if (value := getattr(settings, f.name)) is not None}


# ------------------------------------------------------------------------------------------------------------
# The model's settings
# ------------------------------------------------------------------------------------------------------------

FEATURES = ("stable", "multiscale")  # what the head hears of h and z: one vector, or eight


@dataclass
class ModelConfig:
    """Everything that decides the shapes and the objective of a model; travels in its checkpoint.

    Scopes of its settings: "derived" (from the data and other settings: not to be set), "head" (finetuning
    sets them, see FinetuneConfig), "pretrain" (only pretraining sets it), "loose" (whatever a backbone was
    pretrained with, it can be finetuned with another value); all others are fixed when the backbone is
    pretrained."""

    num_variables: int = setting(scope="derived")  # V, size of the vocabulary
    input_dim: int = 64             # width of the vocabulary's (frozen) vectors
    latent_dim: int = 192           # d, of a set's posterior and of the Transformer
    # Set encoder
    reduced_dim: int = 64           # r
    set_dim: int = 128              # w, its width up to the posterior
    levels: int = setting(1, high=256)  # ISAB levels
    set_heads: int = 2
    inducing: int = setting(4, high=256)  # m
    mab_residual: bool = True       # MAB of Lee et al. 2019; False: the original's, without residuals
    presence: bool = True           # learned term that says *that* a variable was measured
    # History
    layers: int = setting(3, high=256)
    heads: int = 6
    ff_dim: int = 768
    dropout: float = setting(0.0, high=1, scope="loose")
    slope_per_head: bool = True     # one slope of the time bias a head, or a single one
    # Decoder and objective. "readout": each variable's value, presence and history; "slots": a set of points,
    # compared by the Chamfer distance
    decoder: str = setting("readout", choices=("readout", "slots"))
    key_dim: int = 64               # r, of the key by which a read-out asks for a variable
    # Of a stay's sets, at most this many are asked for presence, history and future: of more a sample
    asked_sets: int = setting(64, scope="loose")
    asked_variables: int = setting(96, scope="loose")  # of a stay, at most, by the same rule
    # A sample of variables that the stay does not hold, asked whether they were measured
    other_variables: int = setting(128, high=2**20, scope="loose")
    # What a variable will show at a later minute: so many such queries of each stay (0: none, no forecasts)
    queries: int = setting(128, low=0, high=2**16)
    query_weight: float = setting(0.3, scope="loose")  # of their loss beside the other terms
    learned_seeds: bool = True      # slots decoder: learned slot seeds, or pure noise as in the original
    noise_std: float = setting(0.3, scope="loose")  # noise on learned seeds, in training
    sample_z: bool = True           # readout: each set is also decoded from its own z, which trains logvar
    # Share of the sets that pretraining and full training hide from the Transformer
    hide_sets: float = setting(0.1, high=1, scope="loose")
    # Share of the events that pretraining hides from the encoder
    drop_events: float = setting(0.1, high=1, scope="pretrain")
    max_beta: float = setting(1e-4, scope="loose")  # weight of the KL after its warm-up
    free_bits: float = setting(0.0, scope="loose")  # KL below free_bits * d costs nothing
    logvar_bonus: float = setting(0.0, scope="loose")  # the original's -0.1 * mean(logvar)
    # Classifier (SeqSetVAE)
    classes: int = setting(2, high=2**12, scope="derived")
    classification_only: bool = setting(True, scope="derived")  # frozen backbone; False: full training
    fuse: bool = setting(True, scope="head")  # mu and logvar fused, or mu alone
    features: str = setting("stable", choices=FEATURES, scope="head")
    summaries: bool = setting(False, scope="head")  # exact summaries of the stay beside the learned features
    head_variables: int = setting(0, low=0, scope="derived")  # K, how many variables the summaries speak of
    # Hidden widths of the head; None: the original's d, d/2, d/4
    head_widths: tuple | None = setting(None, items=(int,), low=1, high=2**12, scope="head")
    # Full training: width of a hidden layer beside the head, whose logits are added
    hidden_width: int | None = setting(None, high=2**12, scope="head")
    # Boosted trees of the summaries, which have a share of the head's logits
    head_trees: int | None = setting(None, high=2**12, scope="derived")
    tree_depth: int = setting(4, high=8, scope="head")

    def __post_init__(self):
        """Refuse what no model can be, before memory is allocated for it: a config may come from a stranger's
        checkpoint."""
        check_settings(self)
        if (self.latent_dim % (2 * self.heads) or self.set_dim % self.set_heads
                or self.decoder == "slots" and self.latent_dim % self.set_heads):
            raise InputError(f"model config: latent_dim {self.latent_dim} is odd or no multiple of heads "
                             f"{self.heads}, or set_dim {self.set_dim} (slots: latent_dim too) of set_heads "
                             f"{self.set_heads}")
        if self.queries and self.decoder == "slots":
            raise InputError("model config: queries need the readout decoder; --set queries=0")
        if self.weights > 2**30:
            raise InputError(f"model config: sizes of about {self.weights:.0e} weights; 1e9 is the most")

    @property
    def weights(self) -> int:
        """About how many weights such a model has: one to two times their number."""
        d, v, widest = self.latent_dim, self.num_variables, max(self.latent_dim, self.set_dim)
        weights = (d * (self.layers * (4 * d + 2 * self.ff_dim) + 16 * self.key_dim + self.reduced_dim)
                   + self.levels * widest * (40 * widest + 2 * self.inducing)
                   + self.input_dim * (2 * self.reduced_dim + self.key_dim + v) + v * self.key_dim
                   + 256 * (d + 6 * self.key_dim + 275))
        head = (10 * d + summary_features(self.head_variables), *(self.head_widths or ()), self.classes)
        return weights + head[0] * (self.hidden_width or d) + sum(n * m for n, m in zip(head, head[1:]))

    @classmethod
    def original(cls, num_variables: int, **sizes) -> "ModelConfig":
        """The original implementation's architecture and objective (section 5 of its description), for
        comparison and its checkpoints."""
        return cls(num_variables, **dict(
            input_dim=768, reduced_dim=256, set_dim=256, latent_dim=256, levels=2, inducing=16, set_heads=2,
            layers=4, heads=8, ff_dim=512, dropout=0.1, mab_residual=False, presence=False,
            slope_per_head=False, decoder="slots", queries=0, learned_seeds=False, sample_z=False,
            hide_sets=0.0, drop_events=0.0, max_beta=0.05, free_bits=0.1, logvar_bonus=0.1) | sizes)
