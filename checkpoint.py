"""A checkpoint: a model with its vocabulary, normalizer, split, settings and source; opened, checked and exported here.
Files of the original implementation are read here too."""

import hashlib
import io
import secrets
import shutil
import subprocess
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

from batches import StayDataset
from data import SPLITS, Cohort, InputError, Normalizer, make_splits
from model import ModelConfig, SeqSetVAE
from settings import PATHS
from tables import write_atomically


# ----------------------------------------------------------------------------------------------------------------------
# Reading, name mapping, the weight report
# ----------------------------------------------------------------------------------------------------------------------

CHECKPOINT_FORMAT = 2
_CHECKPOINT_TYPES = {"mode": str, "model_config": dict, "model": dict, "vocabulary": torch.Tensor, "normalizer": dict,
                     "split": dict, "subjects": dict, "source": dict, "metrics": dict}  # see train.model_content
_CHECKPOINT_ENTRIES = {"normalizer": ("variables", "mean", "std", "log_scale", "clip"), "split": SPLITS,
                       "subjects": SPLITS, "metrics": ("epoch",),
                       "source": ("data", "fingerprint", "seed", "command", "versions")}
_WRAPPERS = ("module.", "_orig_mod.", "model.")  # DDP, torch.compile, a LightningModule's attribute


# Prefix in the original implementation -> ours.
_ORIGINAL_NAMES = {
    "setvae.setvae.": "setvae.", "set_encoder.": "setvae.", "decoder.": "setvae.decoder.", "transformer.": "history.",
    "post_transformer_norm.": "history.norm.", "rel_time_bucket_embed.": "history.gap_embedding.",
    "alibi_slope": "history.slope", "time_tau": "history.tau",
}


# No weights of the backbone: the head, what only pretraining and full training use, and the original's second decoder,
# which never reached a loss.
_SKIPPED = ("cls_head.", "trees.", "feature_", "vae_feature_fusion.", "mask_token", "setvae.decoder_layers.",
            "setvae.out.")


def read_checkpoint(path, device="cpu") -> dict:
    """The checkpoint's content: plain types and tensors only, nothing in it is executed.
    Raises InputError where it cannot be used."""
    try:
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():  # torch.load takes a flipped bit for a weight
            raise zipfile.BadZipFile("checksum")
        content = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint; give the path that train.py printed") from None
    except IsADirectoryError:
        raise InputError(f"{path}: a folder, not a checkpoint; give the best.pt in it") from None
    except Exception as error:  # torch.load raises many types for damaged files; all mean the same to the user
        raise InputError(f"{path}: not a readable checkpoint of tensors and plain types ({type(error).__name__}); "
                         "it may be truncated or of another program: make it again") from None
    if not isinstance(content, dict) or not content:
        raise InputError(f"{path}: holds {type(content).__name__}, not a checkpoint; give a file that train.py wrote")
    if content.get("format", CHECKPOINT_FORMAT) != CHECKPOINT_FORMAT:
        mend = "commit 42f6991 reads it" if content["format"] == 1 else "use the version that wrote it"
        raise InputError(f"{path}: checkpoint format {content['format']}, this version reads {CHECKPOINT_FORMAT}; "
                         f"{mend}, or make it again")
    lacking = [name for name, kind in _CHECKPOINT_TYPES.items() if not isinstance(content.get(name), kind)]
    lacking = lacking or [f"{name}[{entry}]" for name, entries in _CHECKPOINT_ENTRIES.items() for entry in entries
                          if entry not in content[name]]
    if "format" in content and lacking:
        raise InputError(f"{path}: a checkpoint without {', '.join(lacking)}; it was not written by train.py: "
                         "make it again")
    return content


def checkpoint_state(content: dict, path) -> dict[str, torch.Tensor]:
    """State dict under our names, from our checkpoints, the original's (Lightning) or a bare state dict,
    behind any wrapper's prefix."""
    state = content["model"] if "format" in content else content.get("state_dict", content)
    if not isinstance(state, dict) or not state or not all(torch.is_tensor(t) for t in state.values()):
        raise InputError(f"{path}: no state dict in it; give a checkpoint that train.py or the original implementation "
                         "wrote")
    ours = {}
    for name, tensor in state.items():
        while (prefix := next((p for p in _WRAPPERS if name.startswith(p)), None)):
            name = name[len(prefix):]
        original = None if "format" in content else next((p for p in _ORIGINAL_NAMES if name.startswith(p)), None)
        if original == "alibi_slope":
            # The original's sign error kept its bias at zero for the whole past: slope 0 reproduces its outputs.
            tensor = torch.zeros_like(tensor)
        ours[_ORIGINAL_NAMES[original] + name[len(original):] if original else name] = tensor
    return ours


def load_checkpoint_weights(path, device="cpu") -> dict[str, torch.Tensor]:
    """State dict under our names of the checkpoint at `path` (see `read_checkpoint`, `checkpoint_state`)."""
    return checkpoint_state(read_checkpoint(path, device), path)


def checkpoint_config(content: dict, num_variables: int, path, set_heads: int | None = None,
                      transformer_heads: int | None = None) -> ModelConfig:
    """The model config of a checkpoint: recorded in ours. Of an original one, V is the data's, every size is read off
    the weights' shapes, and the numbers of heads, which leave no trace in a shape, come from its hyper_parameters or,
    in a bare state dict, are given."""
    if "format" in content:
        sizes = content["model_config"]
        if content.get("mode") == "pretrain":  # finetuning chooses the features; earlier versions knew others
            sizes = {name: value for name, value in sizes.items() if name != "features"}
        unknown = sorted(set(sizes) - {f.name for f in fields(ModelConfig)} | {"num_variables"} - set(sizes), key=str)
        if unknown:
            raise InputError(f"{path}: unknown or missing entry {unknown[0]!r} in its model config; "
                             "use the version that wrote it")
        make = ModelConfig
    else:
        state = checkpoint_state(content, path)
        names = {"reduced": "setvae.dim_reducer.weight", "embed": "setvae.embed.0.weight",
                 "inducing": "setvae.encoder_layers.0.inducing", "ff": "history.layers.0.linear1.weight",
                 "decoder": "setvae.decoder.out.weight"}
        if (lacking := [name for name in names.values() if name not in state]):
            raise InputError(f"{path}: no {lacking[0]} in its state dict; give a checkpoint of train.py, or the whole "
                             "model of the original implementation")
        shape = {size: state[name].shape for size, name in names.items()}
        given = content.get("hyper_parameters")
        given = given if isinstance(given, dict) else {}
        heads = {"set_heads": set_heads or given.get("heads"),
                 "heads": transformer_heads or given.get("transformer_heads")}
        for (name, number), option in zip(heads.items(), ("--set_heads", "--transformer_heads")):
            if not number:
                raise InputError(f"{path}: a bare state dict does not tell its numbers of attention heads; "
                                 f"give {option} (the original's default: {getattr(ModelConfig.original(1), name)})")
            if shape["embed"][0] % number:
                raise InputError(f"{path}: {number} heads do not divide its width of {shape['embed'][0]}; "
                                 f"correct {option}")
        levels, layers = (len({name[len(prefix):].split(".")[0] for name in state if name.startswith(prefix)})
                          for prefix in ("setvae.encoder_layers.", "history.layers."))
        make = ModelConfig.original
        sizes = dict(num_variables=num_variables, **heads, input_dim=shape["reduced"][1],
                     reduced_dim=shape["reduced"][0], set_dim=shape["embed"][0], latent_dim=shape["embed"][0],
                     inducing=shape["inducing"][0], ff_dim=shape["ff"][0], levels=levels, layers=layers)
    try:
        config = make(**sizes)
    except InputError as error:
        raise InputError(f"{path}: {error}; it is damaged, or of another version") from None
    held = tuple(content["vocabulary"].shape) if "format" in content else (num_variables, config.input_dim)
    if not held == (config.num_variables, config.input_dim) == (num_variables, config.input_dim):
        raise InputError(f"{path}: its vocabulary {list(held)}, its normalizer of {num_variables} variables and its "
                         f"model config of {config.num_variables} x {config.input_dim} disagree; "
                         "it is damaged or forged")
    return config


def load_weights(model: nn.Module, state: dict[str, torch.Tensor], path) -> None:
    """Copy every weight of a checkpoint into the model of its config. Raises InputError where they disagree."""
    own = model.state_dict()
    wrong = sorted(own.keys() ^ state.keys()) + [name for name in own.keys() & state.keys()
                                                 if own[name].shape != getattr(state[name], "shape", None)]
    if wrong:
        raise InputError(f"{path}: weight {wrong[0]} is missing, unknown or of another shape than its model config "
                         "says; use the version that wrote it")
    model.load_state_dict(state)
    trees = getattr(model, "trees", None)
    if trees is not None and not 0 <= trees.feature.min() <= trees.feature.max() < model.feature_sizes()["summaries"]:
        raise InputError(f"{path}: its trees ask for features that the model does not have; it is damaged or forged")


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
        rows = [("loaded", self.loaded), ("skipped by rule", self.skipped), ("missing", self.missing),
                ("unexpected", self.unexpected), ("shape mismatch", self.mismatched)]
        lines = [f"{title:>16}: {len(names):4d}"
                 + (f"  {', '.join(names[:6])}{' ...' if len(names) > 6 else ''}" if names and i else "")
                 for i, (title, names) in enumerate(rows)]
        return "\n".join(lines)


def load_backbone(model: SeqSetVAE, state: dict[str, torch.Tensor]) -> WeightReport:
    """Copy every backbone weight of `state` (our names) into `model`, and account for each."""
    own = {name: p for name, p in model.state_dict().items() if name.startswith(SeqSetVAE.BACKBONE)}
    absent = [name for name in own if name not in state and name != "mask_token"]  # a backbone that hid no set has none
    report = WeightReport([], [], absent, [], [])
    for name, tensor in state.items():
        if name not in own:
            (report.skipped if name.startswith(_SKIPPED) else report.unexpected).append(name)
        elif own[name].shape != tensor.shape:
            report.mismatched.append(name)
        else:
            own[name].copy_(tensor)
            report.loaded.append(name)
    return report


def original_classifier(content: dict, config: ModelConfig, vocabulary: torch.Tensor, path) -> SeqSetVAE:
    """The classifier of a checkpoint that the original implementation finetuned,
    in its classification-only mode: stable features, one head."""
    state = checkpoint_state(content, path)
    head = {name.removeprefix("cls_head."): tensor for name, tensor in state.items() if name.startswith("cls_head.")}
    if not head:
        raise InputError(f"{path}: not a finetuned checkpoint; make one with: "
                         f"python train.py --mode finetune --pretrained_ckpt {path}")
    model = SeqSetVAE(config, vocabulary)
    report = load_backbone(model, state)
    wrong = report.missing + report.mismatched
    wrong += [f"cls_head.{name}" for name, own in model.cls_head.state_dict().items()
              if name not in head or head[name].shape != own.shape]
    if wrong:
        raise InputError(f"{path}: {', '.join(wrong[:3])} missing or of another shape than in the original "
                         "implementation; give its whole checkpoint")
    model.cls_head.load_state_dict(head)
    return model.eval()


def classifier_of(path, content: dict) -> SeqSetVAE:
    """The model of a finetuned checkpoint with this content, in evaluation mode."""
    if content.get("mode") != "finetune":
        raise InputError(f"{path}: not a finetuned checkpoint; make one with: "
                         f"python train.py --mode finetune --pretrained_ckpt {path}")
    variables = len(content["normalizer"]["variables"])
    model = SeqSetVAE(checkpoint_config(content, variables, path), content["vocabulary"])
    load_weights(model, content["model"], path)
    return model.eval()


# ----------------------------------------------------------------------------------------------------------------------
# Whom a checkpoint knows, and with which data it goes
# ----------------------------------------------------------------------------------------------------------------------

HASHED = "sha256:"


def salted(salt: str, name: str) -> str:
    """What stands for an id in a checkpoint that shall not hold it (see `export`). It cannot be read off, but
    whoever has a list of ids, or can guess them, can tell which are meant."""
    return f"{HASHED}{salt}:{hashlib.sha256((salt + name).encode()).hexdigest()[:16]}"


def recognised(parts: dict[str, list[str]], ids: np.ndarray) -> dict[str, list[str]]:
    """A split with these ids in place of what stands for them; what stands for none of them stays."""
    salts = {name.split(":")[1] for names in parts.values() for name in names if name.startswith(HASHED)}
    known = {salted(salt, name): name for salt in salts for name in ids.tolist()}
    return {part: [known.get(name, name) for name in names] for part, names in parts.items()}


def data_of(content: dict, given: dict) -> dict:
    """The options with which a checkpoint's data are read: those given, else its own; of other data than its own only
    its question (hours) is. Labels that are given replace its own."""
    own = content["source"]["data"] if "format" in content else {}
    if "data_dir" in given:
        own = {"hours": own["hours"]} if "hours" in own else {}
    elif {"label_file", "task"} & set(given):
        own = {name: value for name, value in own.items() if name not in ("label_file", "task", "positive")}
    return own | given


def dataset_of(path, content: dict, cohort: Cohort) -> StayDataset:
    """A cohort with the vocabulary and normalisation of a checkpoint. Raises InputError where they share no
    variable."""
    dataset = StayDataset(cohort, Normalizer.from_state(content["normalizer"], path), points=True)
    if len(dataset.unknown_variables) == len(cohort.variables):
        named = ", ".join(cohort.variables[:5])
        raise InputError(f"{path}: its vocabulary holds none of the data's variables ({named} ...); pretrain on this "
                         "data, or rename its variables")
    return dataset


def known_part(content: dict, split: dict, cohort: Cohort, new: bool) -> np.ndarray:
    """[P] code of the part in which a checkpoint, trained by this split, knows each stay, -1 where it does not. By the
    subject's name, by the stay's where the checkpoint or the data name no patients, and in the checkpoint's own data
    (not `new`), where labels may name patients that were not known then. All stays of a subject are in the first of
    train, valid, test."""
    part, nameless = np.full(len(cohort), -1, dtype=np.int8), cohort.subject == cohort.stay_id
    for code, name in reversed([*enumerate(SPLITS)]):
        told = content.get("subjects", {}).get(name, [])
        mine = np.isin(cohort.subject, told) | np.isin(cohort.stay_id, told)
        mine |= (nameless | (not new)) & np.isin(cohort.stay_id, split.get(name, []))
        part[np.isin(cohort.subject, cohort.subject[mine])] = code
    return part


def splits_beside(known: np.ndarray, cohort: Cohort, seed: int) -> dict[str, list[str]]:
    """The split of other data than the checkpoint's: a stay that it knows keeps its part (see `known_part`), so that
    nobody is tested on who was ever trained on."""
    part = known.copy()
    for code, ids in enumerate(make_splits(cohort, seed).values()):
        part[np.isin(cohort.stay_id, ids) & (part < 0)] = code
    return {name: cohort.stay_id[part == code].tolist() for code, name in enumerate(SPLITS)}


# ----------------------------------------------------------------------------------------------------------------------
# A checkpoint to give away
# ----------------------------------------------------------------------------------------------------------------------

def export(path, out) -> None:
    """Write a checkpoint of equal predictions that names no stay, subject, path, command or machine. What stands for
    ids (see `data.salted`) still tells whom of other data it was trained on, and of its own data the test split."""
    content = read_checkpoint(path)
    if "format" not in content:
        raise InputError(f"{path}: of the original implementation, which records no ids and paths; give it as it is")
    salt, source = secrets.token_hex(8), content["source"]
    data = {name: source["data"][name] for name in ("hours", "synthetic_stays") if name in source["data"]}
    kept = {name: content[name] for name in ("format", "mode", "model_config", "model", "vocabulary", "normalizer",
                                             "metrics")}
    kept["source"] = {name: source.get(name) for name in ("seed", "fingerprint", "commit", "versions", "precision")} | {
        "command": "a command that an exported checkpoint does not tell",
        "data": data | ({"data_dir": None} if source["data"].get("data_dir", "") != "" else {})}
    for name in ("split", "subjects"):
        kept[name] = {part: sorted(text if text.startswith(HASHED) else salted(salt, text) for text in ids)
                      for part, ids in content[name].items()}
    buffer = io.BytesIO()  # given a path, torch.save would record its name
    torch.save(kept, buffer)
    write_atomically(out, lambda file: file.write_bytes(buffer.getbuffer()))
    print(f"exported: {out}, without paths and commands; salted hashes stand for the ids of "
          f"{sum(map(len, kept['split'].values())):,} stays, names and statistics of the variables are in it")


# ----------------------------------------------------------------------------------------------------------------------
# Where a checkpoint comes from
# ----------------------------------------------------------------------------------------------------------------------

def recorded(data: dict) -> dict:
    """The options that data were read with, as a checkpoint keeps them: paths whole; not where the cache lies."""
    return {name: str(Path(value).resolve()) if name in PATHS else value for name, value in data.items()
            if name != "cache_dir"}


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
    commit, changes = (subprocess.run(["git", "-C", home, *words], capture_output=True, text=True).stdout.strip()
                       for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no")))
    return f"{commit}{' + changes' if changes else ''}" or None


def difference(then: dict, now: dict) -> str:
    """What of the circumstances that decide a run's last bits is not as it was."""
    names = ("fingerprint", "labels", "pretrained", "commit", "device", "precision", "threads", "processes")
    then, now = ({name: source.get(name) for name in names} | source.get("versions", {}) for source in (then, now))
    return ", ".join(f"{name} {now[name]} (then {then.get(name)})" for name in now if now[name] != then.get(name))
