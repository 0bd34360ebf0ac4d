"""What only the PhysioNet/CinC Challenge 2019 knows: how an hour's alarm is scored (Reyna et al., Crit Care Med
2020;48(2):210-217).

The label of an hour turns 1 six hours before the onset of sepsis and stays 1; the record ends a few hours after it. An
alarm is worth most at the first label, little twelve hours before the onset, nothing from three hours after it on.
Everything here is a function of flat arrays over hours, [n] each: of the stay (any integer), the minute, the label.
"""

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score


AHEAD, EARLY, LATE = 6, 12, 3  # hours: the label before the onset s; an alarm counts in [s - EARLY, s + LATE]
FALSE_ALARM = -0.05            # utility of an hour's alarm without sepsis, or too early


def of_this_kind(stay, minute, label) -> bool:
    """Whether these labelled points are the challenge's: hourly, once 1 always 1, and 1 for no more hours than from the
    first label to the end of the time that counts. Points of a stay rise and stand together."""
    within = np.diff(stay) == 0
    hourly, rising = np.diff(minute)[within] == 60, np.diff(label)[within] >= 0
    longest = np.bincount(np.unique(stay, return_inverse=True)[1], label == 1).max(initial=0)
    return bool(within.any() and hourly.all() and rising.all() and 1 < longest <= AHEAD + LATE + 1)


def hours_since_onset(stay, minute, label) -> np.ndarray:
    """[n] hours since the onset of the stay's sepsis (six hours after the first label 1), negative before it; -inf in a
    stay without."""
    stay = np.unique(stay, return_inverse=True)[1]
    first = np.full(stay.max(initial=-1) + 1, np.inf)
    np.minimum.at(first, stay[label == 1], minute[label == 1])
    return (minute - first[stay]) / 60 - AHEAD


def utilities(since) -> tuple[np.ndarray, np.ndarray]:
    """Utility [n] of no alarm, and of an alarm, at hours `since` the onset."""
    early, late = since <= -AHEAD, (since > -AHEAD) & (since <= LATE)
    septic = since > -np.inf
    quiet = np.where(late, -2 * (since + AHEAD) / (AHEAD + LATE), 0)
    rise = np.maximum((since + EARLY) / (EARLY - AHEAD), FALSE_ALARM)
    alarm = np.where(early & septic, rise, np.where(late, (LATE - since) / (AHEAD + LATE), 0))
    return np.where(septic, quiet, 0), np.where(septic, alarm, FALSE_ALARM)


def counts(since) -> np.ndarray:
    """Where the best possible has its alarms: from s - 12 to s + 3 in stays with sepsis, never in others."""
    return (since >= -EARLY) & (since <= LATE)


def stay_utilities(stay, since, alarm) -> np.ndarray:
    """[P, 3] utility of each stay, in ascending order: with these alarms [n] bool, without any, with the best."""
    quiet, loud = utilities(since)
    stay = np.unique(stay, return_inverse=True)[1]
    return np.stack([np.bincount(stay, np.where(chosen, loud, quiet))
                     for chosen in (alarm, np.zeros(len(alarm), dtype=bool), counts(since))], axis=1)


def normalised(utility) -> np.ndarray:
    """[..., 3] sums over stays of `stay_utilities` -> [...]: 0 without any alarm, 1 with the best possible."""
    own, none, best = np.moveaxis(utility, -1, 0)
    return (own - none) / (best - none)


def resampled(utility: np.ndarray, repeats: int, seed: int = 0) -> np.ndarray:
    """[repeats] normalised utility of as many stays, drawn from these [P, 3] anew; NaN: a sample without sepsis."""
    stays = len(utility)
    sums = np.random.default_rng(seed).multinomial(stays, np.full(stays, 1 / stays), repeats) @ utility
    draws, septic = np.full(repeats, np.nan), sums[:, 2] > sums[:, 1]
    draws[septic] = normalised(sums[septic])
    return draws


def best_threshold(stay, since, probability) -> tuple[float, float]:
    """The probability from which an alarm pays most over these hours, and the normalised utility that it gives."""
    quiet, loud = utilities(since)
    order = np.argsort(-probability, kind="stable")
    last = np.append(np.diff(probability[order]) != 0, True)       # hours of one probability go together
    gain, cut = np.cumsum((loud - quiet)[order])[last], probability[order][last]
    best = gain.argmax()
    threshold = cut[best] if gain[best] > 0 else np.nextafter(cut[0], np.inf)  # above all: no alarm
    return float(threshold), float(normalised(stay_utilities(stay, since, probability >= threshold).sum(0)))


def bedside(stay, since, alarm) -> dict:
    """What a ward would ask of these alarms [n] bool: of the stays with sepsis the share with one in the twelve hours
    before the onset, the median lead time in hours from the first of these to the onset (stays whose first label is
    already 1 aside), and false alarms a patient-day: those that begin outside the time that counts."""
    begins = np.append(True, np.diff(stay) != 0)                   # the first hour of a stay
    stay = np.cumsum(begins) - 1
    septic, late = since[begins] > -np.inf, since[begins] >= -AHEAD  # [P]; late: labelled 1 from its first hour on
    warning, lead = alarm & (since >= -EARLY) & (since < 0), np.zeros(begins.sum())
    np.maximum.at(lead, stay[warning], -since[warning])
    false = alarm & (begins | ~np.append(False, alarm[:-1])) & ~counts(since)
    timely, days = lead[~late & (lead > 0)], len(stay) / 24
    return {"septic_stays": int(septic.sum()), "labelled_from_the_first_hour": int(late.sum()),
            "warned": int((lead > 0).sum()), "share_warned": float((lead > 0).sum() / septic.sum()),
            "lead_hours": float(np.median(timely)) if len(timely) else None, "lead_stays": len(timely),
            "patient_days": days, "false_alarms": int(false.sum()), "false_alarms_a_day": float(false.sum() / days)}


def figures(stay, minute, label, probability, threshold: float, repeats: int = 200, seed: int = 0) -> dict:
    """Plain numbers about the risk at these hours: normalised utility with its 95% interval over stays (bootstrap),
    AUROC and AUPRC of all hours and of those not after the onset, and what `bedside` tells."""
    since, alarm = hours_since_onset(stay, minute, label), probability >= threshold
    utility = stay_utilities(stay, since, alarm)
    interval = np.nanpercentile(resampled(utility, repeats, seed), [2.5, 97.5]).tolist()
    result = {"threshold": threshold, "utility": {"value": float(normalised(utility.sum(0))), "interval": interval}}
    for name, hours in (("all_hours", since < np.inf), ("until_the_onset", since <= 0)):
        result[name] = {"hours": int(hours.sum()), "auroc": float(roc_auc_score(label[hours], probability[hours])),
                        "auprc": float(average_precision_score(label[hours], probability[hours]))}
    return result | bedside(stay, since, alarm)


def print_figures(methods: dict) -> None:
    """The report of `figures` by method: the first in full."""
    first = next(iter(methods.values()))
    lead = "none" if first["lead_hours"] is None else f"median {first['lead_hours']:.1f} hours"
    print("\nAs the PhysioNet/CinC Challenge 2019 scores (the onset is six hours after the first label 1)")
    print("Utility              {value:.4f}  95% [{0:.3f}, {1:.3f}]".format(*first["utility"]["interval"],
                                                                            value=first["utility"]["value"])
          + f"  (no alarm: 0, the best possible: 1; alarm from {first['threshold']:.4f} on)")
    for key, name in (("all_hours", "All hours"), ("until_the_onset", "Up to the onset")):
        print(f"{name:20} AUROC {{auroc:.4f}}, AUPRC {{auprc:.4f}}  ({{hours:,}} hours)".format(**first[key]))
    print("Septic stays warned  {share_warned:.1%}  "
          "({warned:,} of {septic_stays:,} have an alarm in the 12 hours before the onset)".format(**first))
    print(f"Lead time            {lead}  "
          "({lead_stays:,} stays; {labelled_from_the_first_hour:,} labelled from the first hour aside)".format(**first))
    print("False alarms         {false_alarms_a_day:.2f} a patient-day  "
          "({false_alarms:,} in {patient_days:,.0f} days)".format(**first))
    if len(methods) > 1:
        print(f"\n{'':32}  utility  95% interval     AUROC   AUPRC   warned  lead  false alarms a day")
        for name, told in methods.items():
            low, high = told["utility"]["interval"]
            lead = "-" if told["lead_hours"] is None else f"{told['lead_hours']:.1f}"
            print(f"{name:32}  {told['utility']['value']:7.4f}  [{low:.3f}, {high:.3f}]  "
                  "{auroc:.4f}  {auprc:.4f}  ".format(**told["all_hours"])
                  + f"{told['share_warned']:6.1%}  {lead:>4}  {told['false_alarms_a_day']:.2f}")
