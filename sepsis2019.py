"""What only the PhysioNet/CinC Challenge 2019 knows: how an alarm an hour of a stay is scored (Reyna et al., Crit Care Med
2020;48(2):210-217).

The label of an hour turns 1 six hours before the onset of sepsis and stays 1; the record ends a few hours after the onset.
An alarm is worth most at the first label, little twelve hours before the onset, and nothing from three hours after it on.
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
    """[n] hours since the onset of the stay's sepsis, negative before it; -inf in a stay without: six hours after the first
    label 1."""
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


def stay_utilities(stay, since, alarm) -> np.ndarray:
    """[P, 3] utility of each stay, in ascending order: as alarmed [n] bool, of no alarm at all, and the best possible: from
    s - 12 to s + 3 in stays with sepsis, never in others."""
    quiet, loud = utilities(since)
    stay = np.unique(stay, return_inverse=True)[1]
    best = (since >= -EARLY) & (since <= LATE)
    return np.stack([np.bincount(stay, np.where(chosen, loud, quiet)) for chosen in (alarm, np.zeros_like(best), best)], 1)


def normalised(utility) -> np.ndarray:
    """[..., 3] sums over stays as `stay_utilities` gives them -> [...]: 0 of no alarm at all, 1 of the best possible."""
    own, none, best = np.moveaxis(utility, -1, 0)
    return (own - none) / (best - none)


def best_threshold(stay, since, probability) -> tuple[float, float]:
    """The probability from which an alarm pays most over these hours, and the normalised utility that it gives."""
    quiet, loud = utilities(since)
    order = np.argsort(-probability, kind="stable")
    last = np.append(np.diff(probability[order]) != 0, True)         # of the hours of one probability, which go together
    gain, cut = np.cumsum((loud - quiet)[order])[last], probability[order][last]
    best = gain.argmax()
    threshold = cut[best] if gain[best] > 0 else np.nextafter(cut[0], np.inf)  # above all: no alarm at all
    return float(threshold), float(normalised(stay_utilities(stay, since, probability >= threshold).sum(0)))


def bedside(stay, since, alarm) -> dict:
    """What a ward would ask of these alarms [n] bool: of the stays with sepsis the share with an alarm in the twelve hours
    before the onset, the median lead time in hours from the first of these to the onset (stays whose first label is already
    1 aside), and the false alarms a patient-day: those that begin outside the time that counts."""
    begins = np.append(True, np.diff(stay) != 0)                                 # the first hour of a stay
    stay = np.cumsum(begins) - 1
    onset, late = since[begins] > -np.inf, since[begins] >= -AHEAD               # [P]; late: labelled 1 from the first hour
    lead = np.zeros(len(onset))
    warning = alarm & (since >= -EARLY) & (since < 0)
    np.maximum.at(lead, stay[warning], -since[warning])
    edge = alarm & (begins | ~np.append(False, alarm[:-1]))
    false = edge & ~((since >= -EARLY) & (since <= LATE))
    timely = lead[onset & ~late & (lead > 0)]
    return {"septic_stays": int(onset.sum()), "warned": int((lead > 0).sum()),
            "share_warned": float((lead > 0).sum() / max(1, onset.sum())), "septic_from_the_first_hour": int((onset & late).sum()),
            "lead_hours": float(np.median(timely)) if len(timely) else None, "lead_stays": len(timely),
            "patient_days": len(stay) / 24, "false_alarms": int(false.sum()),
            "false_alarms_a_patient_day": float(false.sum() / (len(stay) / 24))}


def sepsis_figures(stay, minute, label, probability, threshold: float, repeats: int = 200, seed: int = 0) -> dict:
    """Plain numbers about the risk at these hours: normalised utility with its 95% interval over stays (bootstrap), AUROC and
    AUPRC of all hours and of those not after the onset, and what a ward would ask; see `bedside`."""
    since, alarm = hours_since_onset(stay, minute, label), probability >= threshold
    utility = stay_utilities(stay, since, alarm)
    drawn = np.random.default_rng(seed).multinomial(len(utility), np.full(len(utility), 1 / len(utility)), repeats)
    before = since <= 0
    ranked = {what: {"hours": int(hours.sum()), "auroc": float(roc_auc_score(label[hours], probability[hours])),
                     "auprc": float(average_precision_score(label[hours], probability[hours]))}
              for what, hours in (("all_hours", np.ones_like(before)), ("until_the_onset", before))}
    draws = normalised((drawn @ utility)[(drawn @ utility)[:, 2] > (drawn @ utility)[:, 1]])  # one with sepsis, at least
    return {"utility": {"value": float(normalised(utility.sum(0))), "interval": np.percentile(draws, [2.5, 97.5]).tolist()},
            "threshold": threshold, **ranked, **bedside(stay, since, alarm)}


def print_sepsis(figures: dict) -> None:
    """The report of `sepsis_figures`."""
    low, high = figures["utility"]["interval"]
    print("\nAs the PhysioNet/CinC Challenge 2019 scores (onset: six hours after the first label 1)")
    print(f"Utility              {figures['utility']['value']:.4f}  95% [{low:.3f}, {high:.3f}]  "
          f"(no alarm at all: 0, the best possible: 1), threshold {figures['threshold']:.4f}")
    for what, name in (("all_hours", "All hours"), ("until_the_onset", "Hours up to onset")):
        print(f"{name:20} AUROC {figures[what]['auroc']:.4f}, AUPRC {figures[what]['auprc']:.4f}  "
              f"({figures[what]['hours']:,} hours)")
    lead = figures["lead_hours"]
    print("Septic stays warned  {share_warned:.1%}: {warned:,} of {septic_stays:,} with an alarm in the 12 hours before the "
          "onset".format(**figures))
    print(f"Lead time            {'none' if lead is None else f'median {lead:.1f} hours'} in {figures['lead_stays']:,} stays "
          f"({figures['septic_from_the_first_hour']:,} whose first label is already 1 aside)")
    print("False alarms         {false_alarms_a_patient_day:.2f} a patient-day ({false_alarms:,} in {patient_days:,.0f} days)"
          .format(**figures))
