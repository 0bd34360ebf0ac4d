"""A checkpoint: a model with its vocabulary, normalizer, split, settings and source; opened, checked, saved
and exported here. A file of the original implementation becomes the same object."""

import hashlib
import io
import re
import secrets
import shutil
import subprocess
import zipfile
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch

from batches import Normalizer, StayDataset, variable_vectors
from data import SPLITS, Cohort, InputError, at_site, write_atomically
from labels import read_map
from model import ModelConfig, SeqSetVAE, SeqSetVAEPretrain
from questions import at_hours
from settings import DataSettings
from tasks import Task


# ------------------------------------------------------------------------------------------------------------
# The file: plain types and tensors, every entry checked
# ------------------------------------------------------------------------------------------------------------

FORMAT = 3  # 2 had none of the optional entries
# Entries that are attributes of a `Checkpoint`, of the types declared there; and the others.
_PLAIN = ("mode", "split", "subjects", "source", "metrics", "run", "task", "maps", "asked_at", "calibration",
          "sites", "trainer")
_OTHERS = {"model_config": dict, "model": dict, "vocabulary": torch.Tensor, "normalizer": dict}
_DATA = {f.name: f.type | None for f in fields(DataSettings) if f.metadata.get("scope") != "call"}
_SOURCE = {"data": dict, "fingerprint": str, "command": str, "versions": dict, "seed": int}
_FORGED = "it is damaged or forged: make it again"


def _read(path) -> dict:
    """The content of a file that torch.save wrote; nothing in it is executed. Raises InputError where it
    cannot be used. What is read takes no more memory than the file has bytes: nothing in it may be packed or
    overlap."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
            size = sum(member.file_size for member in members)
            if packed or size > Path(path).stat().st_size or archive.testzip():
                raise zipfile.BadZipFile  # torch.load takes a flipped bit for a weight
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: no such checkpoint; give the path that train.py printed") from None
    except IsADirectoryError:
        raise InputError(f"{path}: a folder, not a checkpoint; give the best.pt in it") from None
    except Exception as error:  # torch.load raises many types for damaged files; all mean the same
        raise InputError(f"{path}: not a readable checkpoint of tensors and plain types "
                         f"({type(error).__name__}); it is truncated or of another program: make it again"
                         ) from None
    if not isinstance(content, dict) or not content:
        raise InputError(f"{path}: holds {type(content).__name__}, not a checkpoint; give a file that "
                         "train.py wrote")
    return content


def _check(content: dict, path) -> None:
    """Raises InputError where the content is of another format, or was not written by train.py."""
    version = content["format"]
    if version not in (2, FORMAT):
        mend = "commit 42f6991 reads it" if version == 1 else "use the version that wrote it"
        raise InputError(f"{path}: checkpoint format {version}, this version reads {FORMAT}; {mend}, or make "
                         "it again")
    if version == 2 and content.get("trainer") is not None:
        raise InputError(f"{path}: the last.pt of an earlier version; commit 96d43df resumes it (its best.pt "
                         "is read)")
    for name, sound in _entries(content):
        if not sound:
            raise InputError(f"{path}: {name} is missing, or nothing that train.py writes; {_FORGED}")


def _entries(content: dict):
    """Yields the name of every entry and whether it is what train.py writes. The outer ones come first, so
    that whoever stops at a wrong one never looks into it."""
    declared = {f.name: f.type for f in fields(Checkpoint) if f.name in _PLAIN}
    for name, kind in (declared | _OTHERS).items():
        yield name, isinstance(content.get(name), kind)
    source, metrics, maps = content["source"], content["metrics"], content.get("maps") or {}
    for name, kind in _SOURCE.items():
        yield f"{name} of the source", isinstance(source.get(name), kind)
    for name, value in source["data"].items():
        yield f"{str(name)[:40]!r} of the source's data", name in _DATA and isinstance(value, _DATA[name])
    for name in ("split", "subjects"):
        for part, ids in (dict.fromkeys(SPLITS) | content[name]).items():
            yield f"{part} of {name}", isinstance(ids, list) and set(map(type, ids)) <= {str}
    renamed = maps.get("variables", {})
    yield "maps", isinstance(maps.get("positive", ""), str) and isinstance(renamed, dict)
    for source, to in renamed.items():
        kinds = [*map(type, to)] if isinstance(to, tuple) else None
        yield "a variable of maps", (isinstance(source, str)
                                      and kinds in ([str, float, float], [str, float, float, str]))
    threshold = metrics.get("threshold", 0.5)
    yield "the threshold", type(threshold) is float and 0 <= threshold <= 1
    yield "the epoch", "epoch" in metrics


def _config(content: dict, path) -> ModelConfig:
    """The model config that the file records. Raises InputError where it is none, or is that of other
    tensors."""
    sizes, vocabulary = content["model_config"], content["vocabulary"]
    if content["mode"] == "pretrain":  # finetuning chooses the features; earlier versions knew others
        sizes = {name: value for name, value in sizes.items() if name != "features"}
    try:
        config = ModelConfig(**{"queries": 0} | sizes)  # earlier versions asked none
    except (InputError, TypeError) as error:  # a TypeError names the unknown or missing entry
        raise InputError(f"{path}: its model config: {error}; it is damaged, or use the version that wrote "
                         "it") from None
    variables = len(content["normalizer"]["variables"])
    if vocabulary.dtype != torch.float32 or variables != config.num_variables or (
            vocabulary.shape != (variables, config.input_dim)):
        raise InputError(f"{path}: its vocabulary {list(vocabulary.shape)}, its normalizer of {variables} "
                         f"variables and its model config of {config.num_variables} x {config.input_dim} "
                         f"disagree; {_FORGED}")
    return config


# ------------------------------------------------------------------------------------------------------------
# Weights
# ------------------------------------------------------------------------------------------------------------

# DDP, torch.compile, a LightningModule's attribute
_WRAPPERS = re.compile(r"((module|_orig_mod|model)\.)+")
# Prefix in the original implementation -> ours.
_ORIGINAL_NAMES = {
    "setvae.setvae.": "setvae.", "set_encoder.": "setvae.", "decoder.": "setvae.decoder.",
    "transformer.": "history.", "post_transformer_norm.": "history.norm.",
    "rel_time_bucket_embed.": "history.gap_embedding.",
    "alibi_slope": "history.slope", "time_tau": "history.tau",
}
_ORIGINAL = re.compile("|".join(map(re.escape, _ORIGINAL_NAMES)))
# No weights of the backbone: the head, what only pretraining and full training use, and the original's second
# decoder, which never reached a loss.
_SKIPPED = ("cls_head.", "hidden_head.", "head_variables", "trees", "feature_", "vae_feature_fusion.",
            "mask_token", "setvae.decoder_layers.", "setvae.out.")


def _weights(state, path, original: bool) -> dict[str, torch.Tensor]:
    """A state dict under our names, behind any wrapper's prefix. Raises InputError where it is none."""
    if not isinstance(state, dict) or not state or not all(
            torch.is_tensor(t) and t.layout == torch.strided for t in state.values()):
        raise InputError(f"{path}: no state dict in it; give a checkpoint that train.py or the original "
                         "implementation wrote")
    ours = {}
    for name, tensor in state.items():
        if wrapper := _WRAPPERS.match(name):
            name = name[wrapper.end():]
        if original and (prefix := _ORIGINAL.match(name)):
            # The original's sign error kept its bias at zero for the whole past: slope 0 reproduces its
            # outputs.
            tensor = torch.zeros_like(tensor) if prefix[0] == "alibi_slope" else tensor
            name = _ORIGINAL_NAMES[prefix[0]] + name[prefix.end():]
        ours[name] = tensor
    return ours


def load_weights(model, state: dict[str, torch.Tensor], path) -> None:
    """Copy every weight of a checkpoint into the model of its config. Raises InputError where they
    disagree."""
    own, given = ({(name, weight.shape, weight.dtype) for name, weight in weights.items()}
                  for weights in (model.state_dict(), state))
    if wrong := own ^ given:
        raise InputError(f"{path}: weight {min(name for name, *_ in wrong)} is missing, unknown or of "
                         "another shape or type than its model config says; use the version that wrote it")
    model.load_state_dict(state)
    trees = getattr(model, "trees", None)
    if trees is not None and not (
            0 <= trees.feature.min() <= trees.feature.max() < model.feature_sizes()["summaries"]):
        raise InputError(f"{path}: its trees ask for features that the model does not have; {_FORGED}")


@dataclass
class WeightReport:
    """What became of every weight, by name."""

    loaded: list
    skipped: list      # by rule: see _SKIPPED
    missing: list      # backbone parameters that the checkpoint does not hold
    unexpected: list   # in the checkpoint, without a place in the model
    mismatched: list   # of another shape

    @property
    def complete(self) -> bool:
        return not (self.missing or self.mismatched)

    def __str__(self) -> str:
        lines = [f"{what:>16}: {len(names):4d}  {', '.join(names[:6])}{' ...' * (len(names) > 6)}".rstrip()
                 for what, names in vars(self).items()]
        return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------
# The checkpoint
# ------------------------------------------------------------------------------------------------------------

HASHED = "sha256:"


@dataclass
class Checkpoint:
    """All that a file of train.py holds. One of the original implementation has weights alone until
    `completed`."""

    path: str | Path
    mode: str                               # pretrain or finetune
    config: ModelConfig | None
    weights: dict[str, torch.Tensor]        # under our names
    vocabulary: torch.Tensor | None         # [V, input_dim]
    normalizer: Normalizer | None
    split: dict                             # stay ids (or hashes, see `salted`) of train, valid and test
    subjects: dict                          # the same of subjects
    source: dict                            # see `runs.source_of`
    metrics: dict                           # of the epoch; of a finetuned one with its threshold
    run: dict | None = None                 # options and settings of the run; an export has none
    task: dict | None = None                # what was asked, see tasks.py
    maps: dict | None = None                # "variables": see `read_map`, "positive": word
    asked_at: float | None = None           # hours after admission, where training asked at one time
    calibration: dict | None = None
    sites: list | None = None
    trainer: dict | None = None             # of a last.pt, see `runs.Run`
    original: bool = False

    @classmethod
    def open(cls, path) -> "Checkpoint":
        """The checkpoint in a file. Raises InputError where it cannot be used."""
        content = _read(path)
        if "format" not in content:
            return cls._of_original(content, path)
        _check(content, path)
        plain = {name: content.get(name) for name in _PLAIN}
        if content["format"] == 2:
            hours = content["source"]["data"].get("hours")
            plain["asked_at"] = hours if content["mode"] == "finetune" else None
        normalizer = Normalizer.from_state(content["normalizer"], path)
        config, weights = _config(content, path), _weights(content["model"], path, original=False)
        # A forged config may ask for more than the file holds: at most four times as much is built, and 16
        # MB.
        held = sum(tensor.untyped_storage().nbytes() for tensor in weights.values())
        if 4 * config.weights > 4 * held + 2**24:
            raise InputError(f"{path}: its model config asks for about {config.weights:.0e} weights, which "
                             f"the file does not hold; {_FORGED}")
        return cls(path, config=config, weights=weights, vocabulary=content["vocabulary"],
                   normalizer=normalizer, **plain)

    @classmethod
    def of(cls, model: SeqSetVAE, normalizer: Normalizer) -> "Checkpoint":
        """One of a finetuned model in memory."""
        return cls(None, "finetune", model.config, model.state_dict(), model.setvae.vocabulary, normalizer,
                   {}, {}, {}, {})

    @classmethod
    def _of_original(cls, content: dict, path) -> "Checkpoint":
        weights = _weights(content.get("state_dict", content), path, original=True)
        finetuned = any(name.startswith("cls_head.") for name in weights)
        given = content.get("hyper_parameters")
        given = given if isinstance(given, dict) else {}
        source = {"command": "the original implementation", "fingerprint": "", "data": {},
                  "heads": (given.get("heads"), given.get("transformer_heads")),
                  "versions": {"pytorch-lightning": str(content.get("pytorch-lightning_version", "unknown"))}}
        return cls(path, "finetune" if finetuned else "pretrain", None, weights, None, None, {}, {}, source,
                   {"epoch": content.get("epoch"), "threshold": 0.5}, original=True)

    def completed(self, cohort: Cohort, stays: np.ndarray, set_heads=None,
                  transformer_heads=None) -> "Checkpoint":
        """One of the original implementation with what its data give: the variables' vectors, and their
        statistics in these stays. Every size is read off the weights' shapes. The numbers of heads leave no
        trace in a shape: they are given, or come from its hyper_parameters. Another checkpoint is returned as
        it is."""
        if not self.original:
            return self
        given = self.source["heads"]
        layers = sum(name.endswith("linear1.weight") for name in self.weights)
        levels = sum("encoder_layers" in name and name.endswith("inducing") for name in self.weights)
        shape = {name: tensor.shape for name, tensor in self.weights.items() if tensor.dim() == 2}
        try:
            reduced_dim, input_dim = shape["setvae.dim_reducer.weight"]
            width, _ = shape["setvae.embed.0.weight"]
            config = ModelConfig.original(
                len(cohort.variables), input_dim=input_dim, reduced_dim=reduced_dim, set_dim=width,
                latent_dim=width, inducing=shape["setvae.encoder_layers.0.inducing"][0],
                ff_dim=shape["history.layers.0.linear1.weight"][0], levels=levels, layers=layers,
                set_heads=set_heads or given[0], heads=transformer_heads or given[1])
        except KeyError as error:
            raise InputError(f"{self.path}: no {error} in its state dict; give a checkpoint of train.py, or "
                             "the whole model of the original implementation") from None
        except InputError as error:
            raise InputError(f"{self.path}: {error}; a bare state dict does not tell its numbers of "
                             "attention heads: give --set_heads and --transformer_heads") from None
        return replace(self, config=config, normalizer=Normalizer.fit(cohort, stays),
                       vocabulary=variable_vectors(cohort.variables, config.input_dim, cohort.vectors),
                       source=self.source | {"fingerprint": cohort.fingerprint})

    # ---- the model -----------------------------------------------------------------------------------------

    def check_finetuned(self) -> None:
        """Raises InputError where it has no head."""
        if self.mode != "finetune":
            raise InputError(f"{self.path}: not a finetuned checkpoint; make one with: "
                             f"python train.py --mode finetune --pretrained_ckpt {self.path}")

    def classifier(self) -> SeqSetVAE:
        """The finetuned model, in evaluation mode. Raises InputError where it is not finetuned, or its
        weights are others than its config says."""
        self.check_finetuned()
        if self.config is None:
            raise InputError(f"{self.path}: of the original implementation, which needs its data at hand; "
                             "open it by Predictor.with_data")
        task = Task.from_state(self.task, self.path)
        if task.outputs != self.config.classes:
            raise InputError(f"{self.path}: its task is of {task.outputs} outputs, its model config of "
                             f"{self.config.classes}; {_FORGED}")
        with torch.random.fork_rng(devices=[]):  # the weights that a module draws are overwritten
            model = SeqSetVAE(self.config, self.vocabulary, task)
        weights = self.weights
        if self.original:  # what only training used is left out; a buffer that it lacks keeps its value
            own = model.state_dict()
            learned = (*SeqSetVAE.BACKBONE, "cls_head.")
            weights = {name: tensor for name, tensor in own.items() if not name.startswith(learned)} | {
                name: tensor.float() for name, tensor in weights.items() if name in own}
        load_weights(model, weights, self.path)
        return model.eval()

    def check_forecasts(self) -> None:
        """Raises InputError where no training taught its backbone to answer queries."""
        if self.config is None or not (self.config.queries and self.config.query_weight):
            raise InputError(f"{self.path}: its pretraining asked for no value at a later minute, so it "
                             "cannot forecast; pretrain again, with queries above 0")
        if self.source.get("forecasts") is False:
            raise InputError(f"{self.path}: finetuning left its forecasts untrained (--random_init, or full "
                             "training with reconstruction_weight=0); give the checkpoint of --mode pretrain")

    def forecaster(self) -> SeqSetVAEPretrain | SeqSetVAE:
        """The model that forecasts, in evaluation mode: the pretrained one, or the classifier. Raises
        InputError, see `check_forecasts`."""
        self.check_forecasts()
        if self.mode == "finetune":
            return self.classifier()
        with torch.random.fork_rng(devices=[]):  # the weights that a module draws are overwritten
            model = SeqSetVAEPretrain(self.config, self.vocabulary)
        load_weights(model, self.weights, self.path)
        return model.eval()

    def backbone_into(self, model: SeqSetVAE) -> WeightReport:
        """Copy every weight of the backbone into `model`, and account for each."""
        own = {name: p for name, p in model.state_dict().items() if name.startswith(SeqSetVAE.BACKBONE)}
        # A backbone that hid no set has no mask token.
        absent = [name for name in own if name not in self.weights and name != "mask_token"]
        report = WeightReport([], [], absent, [], [])
        for name, tensor in self.weights.items():
            if name not in own:
                (report.skipped if name.startswith(_SKIPPED) else report.unexpected).append(name)
            elif own[name].shape != tensor.shape:
                report.mismatched.append(name)
            else:
                own[name].copy_(tensor)
                report.loaded.append(name)
        return report

    # ---- the data ------------------------------------------------------------------------------------------

    def data_settings(self, given: dict) -> dict:
        """The options with which its data are read: those given, else its own. Of other data than its own
        only the names and units (`maps`) are, the word that is label 1 and the kind and names of its
        outcomes. Labels that are given replace its own."""
        own, maps = self.source["data"], self.maps or {}
        if "data_dir" in given:
            own = {}
        elif {"label_file", "task"} & set(given):
            own = {name: value for name, value in own.items() if name not in ("label_file", "task")}
        kept = {"variables_map": maps.get("variables"), "positive": maps.get("positive")}
        task = Task.from_state(self.task, self.path)
        if task.kind != "binary" and not {"kind", "outcomes"} & set(given):
            kept |= {"kind": task.kind, "outcomes": list(task.names) if task.kind == "several" else None}
        data = own | {name: value for name, value in kept.items() if value} | given
        if data.get("data_dir", "") is None:
            raise InputError(f"{self.path}: an exported checkpoint, which does not tell where its data lie; "
                             "give --data_dir")
        return data

    def asked(self, cohort: Cohort, given: dict = {}) -> Cohort:
        """The cohort asked where its training questions were, if that is one time and --hours is not given.
        Labels that have times of their own keep them."""
        if self.asked_at is None or "hours" in given:
            return cohort
        asked = at_hours(cohort, self.asked_at)
        return cohort if asked is None else asked

    def describe_kept(self, given: dict) -> list[str]:
        """The lines that tell what it keeps beside its weights and is applied to the data."""
        maps, lines = self.maps or {}, []
        if "variables" in maps and "variables_map" not in given:
            # Of (name, factor, offset, label) the label, where there is one.
            renamed = [f"{source} as {(to[3:] or to)[0]}" for source, to in maps["variables"].items()]
            lines.append("checkpoint: kept from --variables: "
                         f"{', '.join(renamed[:4])}{' ...' * (len(renamed) > 4)} (--variables none drops it)")
        if "positive" in maps and "positive" not in given:
            lines.append(f"checkpoint: kept from --positive: {maps['positive']}")
        known = {name for ids in self.subjects.values() for name in ids}
        sites = {name.partition("\x1f")[0] for name in known if "\x1f" in name}
        if sites and "data_dir" in given and "site" not in given:
            lines.append(f"checkpoint: it knows patients of the sites {', '.join(sorted(sites))}; without "
                         "--site equal ids of these data are taken for theirs")
        if self.asked_at is not None and "hours" not in given:
            lines.append(f"checkpoint: asked {self.asked_at:.4g} hours after admission, as in training, "
                         "where labels have no times of their own (--hours end: at the end)")
        return lines

    def is_new(self, cohort: Cohort) -> bool:
        """Whether the cohort is not the one that it was trained on (by content)."""
        return cohort.fingerprint != self.source["fingerprint"]

    def recognising(self, cohort: Cohort) -> "Checkpoint":
        """The same with the cohort's ids in place of their hashes; an id without a match is kept as it is."""
        salts = {name.split(":")[1] for parts in (self.split, self.subjects) for ids in parts.values()
                 for name in ids if name.startswith(HASHED)}
        ids = np.union1d(cohort.subject, cohort.stay_id).tolist()
        ids += at_site(cohort.site, ids)
        known = {salted(salt, name): name for salt in salts for name in ids}
        return self.renamed(lambda name: known.get(name, name)) if salts else self

    def renamed(self, rename) -> "Checkpoint":
        """The same with other names of stays and subjects, sorted: rename is a function of one."""
        split, subjects = ({part: sorted(map(rename, ids)) for part, ids in parts.items()}
                           for parts in (self.split, self.subjects))
        return replace(self, split=split, subjects=subjects)

    def dataset(self, cohort: Cohort) -> StayDataset:
        """A cohort with its vocabulary and normalisation. Raises InputError where they share no variable."""
        dataset = StayDataset(cohort, self.normalizer, points=True)
        if len(dataset.unknown_variables) == len(cohort.variables):
            named = ", ".join(cohort.variables[:5])
            raise InputError(f"{self.path}: its vocabulary holds none of the data's variables ({named} ...); "
                             "pretrain on this data, or rename its variables")
        return dataset

    def known_part(self, cohort: Cohort) -> np.ndarray:
        """[P] code of the part in which it knows each stay, -1 where it does not. By the subject's name and
        site (of data without a site: at any, so that nobody is overlooked), by the stay's where it or the
        data name no patients, and in its own data, where labels may name patients that were not known then.
        All stays of a subject are in the first of train, valid, test."""
        part = np.full(len(cohort), -1, dtype=np.int8)
        by_stay = cohort.subject == cohort.stay_id
        if self.is_new(cohort):
            by_stay &= cohort.site in ("", self.source["data"].get("site", ""))
        else:
            by_stay[:] = True
        subject, stay = at_site(cohort.site, cohort.subject), at_site(cohort.site, cohort.stay_id)
        for code, name in reversed([*enumerate(SPLITS)]):
            subjects = self.subjects.get(name, [])
            subjects = subjects if cohort.site else [known.rpartition("\x1f")[2] for known in subjects]
            mine = np.isin(subject, subjects) | np.isin(stay, subjects)
            mine |= by_stay & np.isin(cohort.stay_id, self.split.get(name, []))
            part[np.isin(cohort.subject, cohort.subject[mine])] = code
        return part

    # ---- the file ------------------------------------------------------------------------------------------

    @property
    def record(self) -> dict:
        """What the config.json beside it says too."""
        return {"mode": self.mode, "run": self.run, "model_config": asdict(self.config),
                "source": self.source}

    def save(self, path) -> None:
        """Write it to a file, whole or not at all."""
        content = {name: getattr(self, name) for name in _PLAIN}
        content |= {"format": FORMAT, "model_config": asdict(self.config), "model": self.weights,
                    "vocabulary": self.vocabulary, "normalizer": self.normalizer.state_dict()}
        buffer = io.BytesIO()  # given a path, torch.save would record its name, and not say what went wrong
        torch.save(content, buffer)
        write_atomically(path, lambda out: out.write_bytes(buffer.getbuffer()))

    def export(self, path) -> None:
        """Write a checkpoint of equal predictions that names no stay, subject, path, command or machine. What
        stands for ids (see `salted`) still tells whom of other data it was trained on, and of its own data
        the test split."""
        if self.original:
            raise InputError(f"{self.path}: of the original implementation, which records no ids and paths; "
                             "give it as it is")
        salt, source = secrets.token_hex(8), self.source
        data = {name: source["data"][name] for name in ("hours", "synthetic_stays") if name in source["data"]}
        names = ("seed", "fingerprint", "commit", "versions", "precision", "asked", "forecasts")
        kept = {name: source[name] for name in names if name in source} | {
            "command": "a command that an exported checkpoint does not tell",
            "data": data | ({"data_dir": None} if source["data"].get("data_dir", "") != "" else {})}
        given = self.renamed(lambda name: name if name.startswith(HASHED) else salted(salt, name))
        replace(given, source=kept, run=None, trainer=None).save(path)
        stays = sum(map(len, self.split.values()))
        print(f"exported: {path}, without paths and commands; salted hashes stand for the ids of "
              f"{stays:,} stays, names and statistics of the variables are in it")


def salted(salt: str, name: str) -> str:
    """What stands for an id in a checkpoint that shall not hold it (see `Checkpoint.export`). It cannot be
    read off, but whoever has a list of ids, or can guess them, can tell which are meant."""
    return f"{HASHED}{salt}:{hashlib.sha256((salt + name).encode()).hexdigest()[:16]}"


def splits_beside(known: np.ndarray, drawn: dict, cohort: Cohort) -> dict[str, list[str]]:
    """The split of other data than the checkpoint's: as drawn, but a stay that it knows keeps its part (see
    `known_part`), so that nobody is tested on who was ever trained on."""
    part = known.copy()
    for code, ids in enumerate(drawn.values()):
        part[np.isin(cohort.stay_id, ids) & (part < 0)] = code
    return {name: cohort.stay_id[part == code].tolist() for code, name in enumerate(SPLITS)}


# ------------------------------------------------------------------------------------------------------------
# Where a checkpoint comes from
# ------------------------------------------------------------------------------------------------------------

def maps_of(data: dict) -> dict | None:
    """What a checkpoint keeps of these options, see `Checkpoint.maps`."""
    given = data.get("variables_map")
    renamed = given if isinstance(given, dict) else read_map(Path(given)) if given else None
    maps = {"variables": renamed, "positive": data.get("positive")}
    return {name: value for name, value in maps.items() if value} or None


def label_digest(cohort: Cohort) -> str:
    """Of what is asked of the data: the prediction points and their answers."""
    digest = hashlib.sha256()
    for array in (cohort.point_start, cohort.point_minute, cohort.answers):
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()[:16]


def git_commit() -> str | None:
    """The commit of this code, and whether files differ from it; None where it is no git checkout."""
    home = Path(__file__).resolve().parent
    if not (home / ".git").exists() or not shutil.which("git"):
        return None

    words = ["git", "-C", home, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty= + changes"]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip() or None


def difference(then: dict, now: dict) -> str:
    """What of the circumstances that decide a run's last bits is not as it was."""
    names = ("fingerprint", "labels", "pretrained", "commit", "device", "precision", "threads", "processes")
    then, now = ({name: source.get(name) for name in names} | source.get("versions", {})
                 for source in (then, now))
    return ", ".join(f"{name} {now[name]} (then {then.get(name)})" for name in now
                     if now[name] != then.get(name))
