"""From runs to findings: the chain, the advice, the remedies, the verdict. Pure functions."""

import itertools
from collections.abc import Iterable
from typing import Any

from parity_tests.gap.arms import CHAINS, EPOCHS
from parity_tests.gap.effects import (
    CHANCE,
    Effect,
    Runs,
    Stop,
    difference,
    effect,
    paired,
    same,
    verdict,
    within_seeds,
)

# --- The chain ------------------------------------------------------------------------------


def stops(network: str, way: str) -> list[Stop]:
    """From plain Keras to TFF, one change at a time."""
    normed = network.startswith("MobileNet") and not network.endswith("Norm")
    central, iid, arm = f"{network}, central", f"{network}, IID", f"{network}, {way}"
    found = [
        Stop("Keras, all data in one place", central, "Keras"),
        Stop("jaxfed, all data in one place", central),
    ]
    if normed:
        found.append(Stop("exact statistics, not moving ones", central, rule="recalibrated"))
    found.append(Stop("federated, IID clients", iid, rule="recalibrated" if normed else "kept"))
    if normed:
        found.append(Stop("moving statistics, averaged", iid))
    if way == "shards":
        found.append(Stop("two-class shards", arm))
    if normed:
        found.append(Stop("statistics never averaged (TFF's rule)", arm, rule="frozen"))
    return [*found, Stop("TFF itself", arm, "TFF", "frozen" if normed else "kept")]


def chain(runs: Runs, network: str, way: str) -> dict[str, Any]:
    """The accuracy at every stop, the links between them, and the whole gap."""
    path = [stop for stop in stops(network, way) if runs.has(stop)]
    values = paired(*(runs.accuracy(stop) for stop in path))
    links = [difference(b, a) for a, b in itertools.pairwise(values)]
    return {
        "network": network,
        "clients": way,
        "stops": [
            {"label": stop.label, "accuracy": effect(v.values())._asdict()}
            for stop, v in zip(path, values, strict=True)
        ],
        "links": [
            {"label": stop.label, "effect": link._asdict()}
            for stop, link in zip(path[1:], links, strict=True)
        ],
        "gap": difference(values[-1], values[0])._asdict(),
    }


# --- The article's claims -------------------------------------------------------------------


def claims(runs: Runs) -> list[dict[str, Any]]:
    """What the article advises, each as `advised minus not advised`."""
    found = []
    views = (
        ("MobileNet as TFF tests it", "MobileNet", "frozen"),
        ("MobileNet, honest statistics", "MobileNet", "recalibrated"),
        ("the article's CNN", "CNN", "kept"),
    )
    pairs = (
        ("shuffle the clients' images, which arrive sorted", "IID", "IID, sorted by label"),
        ("shuffle the clients' images, which arrive mixed", "IID", "IID, not shuffled"),
        ("server Adam at 1.0 instead of averaging", "IID, server Adam 1.0", "IID"),
        (f"1 local epoch instead of {EPOCHS}, as many steps", "IID", f"IID, {EPOCHS} local epochs"),
        ("IID clients instead of two-class shards", "IID", "shards"),
    )
    for text, advised, other in pairs:
        for view, network, rule in views:
            sides = [
                runs.accuracy(Stop("", f"{network}, {way}", rule=rule)) for way in (advised, other)
            ]
            found.append(_claim(text, view, *sides))
    for view, network, rule in views:
        stop = Stop("", f"{network}, IID", rule=rule)
        rates = runs.rates(stop.arm, rule)
        best, worst = rates[0][1], rates[-1][1]
        text = "choose the client learning rate: best of those tried against worst"
        found.append(_claim(text, view, runs.accuracy(stop, best), runs.accuracy(stop, worst)))
    small = runs.accuracy(Stop("", "small CNN, IID"))
    for view, network, rule in views:
        other = runs.accuracy(Stop("", f"{network}, IID", rule=rule))
        found.append(_claim("a smaller network, the article's third, instead", view, small, other))
    narrow, wide = (
        runs.accuracy(Stop("", f"{name}, IID", rule="frozen"))
        for name in ("MobileNet", "MobileNet 0.5")
    )
    text = "a smaller network: MobileNet of width 0.25 instead of 0.5"
    found.append(_claim(text, "MobileNet as TFF tests it", narrow, wide))
    return found


def _claim(text: str, view: str, advised: dict, other: dict) -> dict[str, Any]:
    advised, other = paired(advised, other)
    found = difference(advised, other)
    return {
        "claim": text,
        "view": view,
        "advised": effect(advised.values())._asdict(),
        "other": effect(other.values())._asdict(),
        "effect": found._asdict(),
        "verdict": verdict(found),
    }


# --- What brings it back --------------------------------------------------------------------

IN_TFF = "in TFF: `recalibrated(model, weights, images)`"
REMEDIES = {
    "nothing: as TFF tests it": ("MobileNet", "TFF", "frozen"),
    IN_TFF: ("MobileNet", "TFF", "recalibrated"),
    "in TFF: batch statistics at evaluation": ("MobileNet", "TFF", "batch"),
    "in TFF: GroupNorm": ("MobileNet GroupNorm", "TFF", "kept"),
    "GroupNorm": ("MobileNet GroupNorm", "jaxfed", "kept"),
    "LayerNorm": ("MobileNet LayerNorm", "jaxfed", "kept"),
    "`mean`: statistics averaged": ("MobileNet", "jaxfed", "kept"),
    "`mean` with BatchNorm's momentum 0.9": ("MobileNet, momentum 0.9", "jaxfed", "kept"),
    "`pooled`": ("MobileNet, pooled", "jaxfed", "kept"),
    "`local` (FedBN)": ("MobileNet, local", "jaxfed", "kept"),
    "`recalibrate`": ("MobileNet", "jaxfed", "recalibrated"),
    "batch statistics at evaluation": ("MobileNet", "jaxfed", "batch"),
    "width 0.5, as TFF tests it": ("MobileNet 0.5", "jaxfed", "frozen"),
}
"""Network and variant, system, rule."""


def remedies(runs: Runs, way: str) -> list[dict[str, Any]]:
    """Each remedy's accuracy, and its gain over what TFF prints."""
    found = []
    base = runs.accuracy(Stop("", f"MobileNet, {way}", "TFF", "frozen"))
    for label, (name, system, rule) in REMEDIES.items():
        network, _, variant = name.partition(", ")
        stop = Stop(label, f"{network}, {way}" + (f", {variant}" if variant else ""), system, rule)
        if runs.has(stop):
            values = runs.accuracy(stop)
            gain = difference(values, base)._asdict()
            accuracy = effect(values.values())._asdict()
            found.append({"remedy": label, "accuracy": accuracy, "gain": gain})
    return found


# --- The verdict ----------------------------------------------------------------------------


CHANCE_LEFT = "IID clients, and still at chance: TFF prints"
FEDERATION = "federated averaging itself changes accuracy by"
RULE = "TFF's rule for BatchNorm, on the same weights, by"
BIGGER = "which is more than federated averaging costs, by"
RESIDUAL = "what is left between jaxfed under that rule and TFF is"
TRAINED = "and between their weights, both with exact statistics,"
GAIN = "recalibrated in TFF, its weights gain"


def conclusions(runs: Runs, names: Iterable[str]) -> list[dict[str, Any]]:
    """The sentences that the study is for, each with its numbers and whether it holds.

    `names` are the networks (and datasets) with BatchNorm to conclude about: what precedes
    ", central" and ", IID" in the names of arms. That two systems do the same is concluded where
    both have repeats.
    """
    found = []
    for name in names:
        central, iid = f"{name}, central", f"{name}, IID"
        printed = Stop("", iid, "TFF", "frozen")
        frozen = Stop("", iid, rule="frozen")
        exact = Stop("", iid, rule="recalibrated")
        mended = Stop("", iid, "TFF", "recalibrated")
        pooled = runs.accuracy(Stop("", central, rule="recalibrated"))
        federation = difference(runs.accuracy(exact), pooled)
        rule = difference(runs.accuracy(frozen), runs.accuracy(exact))
        more = effect(a - b for a, b in zip(rule.by_seed, federation.by_seed, strict=True))
        tested = effect(runs.accuracy(printed).values())
        gain = difference(runs.accuracy(mended), runs.accuracy(printed))
        found += [
            _conclusion(name, CHANCE_LEFT, tested, tested.high < CHANCE),
            _conclusion(name, FEDERATION, federation, None),
            _conclusion(name, RULE, rule, rule.high < 0),
            _conclusion(name, BIGGER, more, more.high < 0),
            _conclusion(name, GAIN, gain, gain.low > 0),
        ]
        repeats = [*runs.repeats(mended).values(), *runs.repeats(exact).values()]
        if min(map(len, repeats)) > 1:
            residual = within_seeds(runs.repeats(printed), runs.repeats(frozen))
            trained = within_seeds(runs.repeats(mended), runs.repeats(exact))
            found += [
                _conclusion(name, RESIDUAL, residual, same(residual)),
                _conclusion(name, TRAINED, trained, same(trained)),
            ]
    return found


def _conclusion(name: str, text: str, found: Effect, holds: bool | None) -> dict[str, Any]:
    """`holds` is None for a number that nothing is claimed of."""
    return {"about": name, "text": text, "effect": found._asdict(), "holds": holds}


def curves(runs: Runs) -> dict[str, Any]:
    """MobileNet's test accuracy over rounds under every rule, and in TFF."""
    found = {}
    for way, title in (
        ("IID", "MobileNet, IID clients"),
        ("shards", "MobileNet, two-class shards"),
    ):
        arm = f"MobileNet, {way}"
        lines = {
            "exact statistics": Stop("", arm, rule="recalibrated"),
            "moving statistics, averaged": Stop("", arm),
            "never averaged (TFF's rule)": Stop("", arm, rule="frozen"),
            "TFF itself": Stop("", arm, "TFF", "frozen"),
        }
        found[title] = {}
        for label, stop in lines.items():
            rounds, accuracy = runs.curve(stop)
            found[title][label] = {
                "rounds": rounds,
                "mean": accuracy.mean(axis=0).tolist(),
                "low": accuracy.min(axis=0).tolist(),
                "high": accuracy.max(axis=0).tolist(),
            }
    return found


def findings(runs: Runs, names: Iterable[str], *, quick: bool) -> dict[str, Any]:
    """All of it, as it stands in `gap.json`; `names` are those of the arms."""
    rates = {name: runs.rate(name) for name in names}
    if quick:
        return {"conclusions": conclusions(runs, ["MobileNet"]), "rates": rates}
    return {
        "rates": rates,
        "curves": curves(runs),
        "conclusions": conclusions(runs, ["MobileNet", "MobileNetV2", "MobileNet, Fashion-MNIST"]),
        "chains": [chain(runs, network, way) for way in ("IID", "shards") for network in CHAINS],
        "claims": claims(runs),
        "remedies": {way: remedies(runs, way) for way in ("IID", "shards")},
    }


def otherwise(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """What two studies' findings do not conclude alike: conclusions and verdicts, a line each."""

    one, other = said(ours), said(theirs)
    absent = ("absent", None)
    return [
        f"{name}: {one.get(name, absent)[0]}, published: {other.get(name, absent)[0]}"
        for name in dict.fromkeys([*other, *one])
        if one.get(name, absent)[0] != other.get(name, absent)[0]
    ]


def said(found: dict[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Of everything that is concluded: what is said of it, and its effect."""
    words = {None: "nothing claimed", True: "holds", False: "does not hold"}
    return {
        **{
            f"{c['about']}: {c['text']}": (words[c["holds"]], c["effect"])
            for c in found["conclusions"]
        },
        **{
            f"{c['claim']} ({c['view']})": (c["verdict"], c["effect"])
            for c in found.get("claims", ())
        },
    }
