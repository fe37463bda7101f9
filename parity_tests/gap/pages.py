"""What is read of the study: `report.html`, `docs/gap.md` and the README's first screen.

All are made from `gap.json` alone, so none can say what it does not.
"""

import html
from collections.abc import Sequence
from typing import Any, NamedTuple

from parity_tests.gap import pictures
from parity_tests.gap.arms import NETWORKS
from parity_tests.gap.effects import MARGIN
from parity_tests.gap.findings import FEDERATION, IN_TFF, RESIDUAL, RULE, TRAINED, said

Row = Sequence[str]


class Table(NamedTuple):
    """A heading, what is to be said before the table, and the table."""

    title: str
    text: str
    head: Row
    rows: Sequence[Row]


BEGIN, END = "<!-- gap: begin -->", "<!-- gap: end -->"


def interval(found: dict[str, Any], *, sign: bool = False) -> str:
    """For example `0.912 [0.881, 0.943]`."""
    form = "{:+.3f} [{:+.3f}, {:+.3f}]" if sign else "{:.3f} [{:.3f}, {:.3f}]"
    # No minus in front of a zero.
    numbers = [round(found[key], 3) + 0.0 for key in ("mean", "low", "high")]
    return form.format(*numbers)


def tables(content: dict[str, Any]) -> list[Table]:
    """Everything that the study found, as tables."""
    found = content["findings"]
    made = [_conclusions(found["conclusions"])]
    made += [_chain(chain) for chain in found.get("chains", [])]
    if "claims" in found:
        made += [_claims(found["claims"]), _remedies(found["remedies"])]
    return [*made, _rates(content)]


def _conclusions(conclusions: list[dict[str, Any]]) -> Table:
    rows = [
        (each["about"], each["text"], interval(each["effect"], sign=True),
         {None: "", True: "yes", False: "**no**"}[each["holds"]])
        for each in conclusions
    ]  # fmt: skip
    text = (
        "Test accuracy, IID clients. An effect holds if zero is outside its interval. That two "
        f"systems do the same holds if the whole interval is within {MARGIN:g} of zero; it is "
        "asked where both ran every seed several times, from starts that differ by rounding alone, "
        "and its interval comes from how such repeats spread. (The exact comparison, step by step "
        "in float64, is that of `docs/parity.md`; it also shows why single runs of the two end at "
        "different numbers: as far apart as two runs of one program from starts that differ in "
        "the last digit.)"
    )
    return Table("The verdict", text, ("network", "", "95 % interval", "holds"), rows)


def _chain(chain: dict[str, Any]) -> Table:
    first, *rest = chain["stops"]
    rows = [(first["label"], interval(first["accuracy"]), "")]
    rows += [
        (stop["label"], interval(stop["accuracy"]), interval(link["effect"], sign=True))
        for stop, link in zip(rest, chain["links"], strict=True)
    ]
    rows.append(("the whole gap", "", interval(chain["gap"], sign=True)))
    way = "IID clients" if chain["clients"] == "IID" else "two-class shards"
    return Table(
        f"{chain['network']}, {way}",
        "Every line changes one thing; same seed, same initial weights and images.",
        ("", "test accuracy", "change"), rows,
    )  # fmt: skip


def _claims(claims: list[dict[str, Any]]) -> Table:
    rows = [
        (each["claim"], each["view"], f"{each['advised']['mean']:.3f}",
         f"{each['other']['mean']:.3f}", interval(each["effect"], sign=True), each["verdict"])
        for each in claims
    ]  # fmt: skip
    text = (
        "Advice as found on the web against its opposite, each side at the client learning rate "
        "that was chosen for it, with exact statistics. Supported: the interval is above zero and "
        f"the effect above {MARGIN:g}, a tenth of the gap that is to be explained (of twenty "
        "intervals, one misses zero by chance); opposite: likewise below; otherwise not supported."
    )
    head = ("advice", "measured on", "followed", "not followed", "effect", "verdict")
    return Table("The usual advice", text, head, rows)


def _remedies(remedies: dict[str, list[dict[str, Any]]]) -> Table:
    ways = list(remedies)
    by_name: dict[str, dict[str, dict]] = {}
    for way, rows in remedies.items():
        for row in rows:
            by_name.setdefault(row["remedy"], {})[way] = row
    rows = []
    for name, by_way in by_name.items():
        row = [name]
        for way in ways:
            there = by_way.get(way)
            row.append(interval(there["accuracy"]) if there else "")
            row.append(interval(there["gain"], sign=True) if there else "")
        rows.append(tuple(row))
    head = ["remedy"]
    for way in ways:
        head += [way, f"gain, {way}"]
    text = (
        "MobileNetV1 with another way to treat BatchNorm, and its gain over the accuracy that TFF "
        "prints. `in TFF` was trained and tested there; the rest in jaxfed. With `local` every "
        "client tests its own network on an equal share of all test images, of classes it may "
        "never have seen."
    )
    return Table("What brings it back", text, tuple(head), rows)


def _rates(content: dict[str, Any]) -> Table:
    rates = content["findings"]["rates"]
    rows = [(arm, f"{rate:g}") for arm, rate in rates.items()]
    return Table(
        "Chosen learning rates",
        "Of client Adam. Every arm went along the same grid from the same start until the best "
        f"rate had worse neighbours, on images that are neither trained nor tested on, in the mean "
        f"over {content['setting']['tuning']} seeds.",
        ("arm", "rate"), rows,
    )  # fmt: skip


def _again(content: dict[str, Any], again: dict[str, Any]) -> Table:
    """What is concluded from each of two studies."""
    first, second = said(content["findings"]), said(again["findings"])
    rows = [
        (name, interval(effect, sign=True), interval(second[name][1], sign=True),
         words if words == second[name][0] else f"**{words}, then {second[name][0]}**")
        for name, (words, effect) in first.items()
    ]  # fmt: skip
    changed = sum("**" in row[-1] for row in rows)
    beside = [
        one["claim"] for one, other in zip(
            content["findings"]["claims"], again["findings"]["claims"], strict=True
        ) if _side(one["effect"]) != _side(other["effect"])
    ]  # fmt: skip
    once = [
        arm for arm in content["arms"]
        if [r for r in content["runs"] if r["arm"] == arm]
        == [r for r in again["runs"] if r["arm"] == arm]
    ]  # fmt: skip
    return Table(
        "Made again on another machine",
        "The same command where the processor rounds otherwise. Training multiplies that, so that "
        "most of jaxfed's runs end at other numbers, and some arms at another learning rate. "
        f"{changed or 'None'} of {len(rows)} conclusions and verdicts became another. The margin "
        f"of {MARGIN:g} in the verdicts was set when both were there: by their intervals alone, "
        f"{len(beside)} more would have, on effects within it. Arms that were made once, and "
        f"stand in both: {'; '.join(once) or 'none'}. "
        "([`results/gap-again.json`](results/gap-again.json))",
        ("", "first", "again", "said of it"), rows,
    )  # fmt: skip


def _side(effect: dict[str, Any]) -> int:
    """1 if the whole interval is above zero, -1 if below, else 0."""
    return int(effect["low"] > 0) - int(effect["high"] < 0)


def figures(content: dict[str, Any]) -> dict[str, str]:
    """The pictures by name, as SVG."""
    found = content["findings"]
    if "chains" not in found:
        return {}
    named = {(chain["network"], chain["clients"]): chain for chain in found["chains"]}
    pair = [named["MobileNet", way] for way in ("IID", "shards")]
    return {
        "gap-waterfall": pictures.svg(pictures.waterfall(pair)),
        "gap-curves": pictures.svg(pictures.curves(list(found["curves"].items()))),
    }


def setting(content: dict[str, Any]) -> str:
    """What was run, in a paragraph."""
    s = content["setting"]
    steps = s["examples"] // 20
    grid = ", ".join(f"{rate:g}" for rate in s["rates"])
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    width = NETWORKS["MobileNet"]["model.width"]
    return (
        f"MobileNet is keras.applications' MobileNetV1 of width {width} on MNIST padded to 32x32. "
        f"{s['clients']} clients of {s['examples']} images, all of them in every one of "
        f"{s['rounds']} rounds; batches of 20, 1 local epoch ({steps} steps), client Adam with "
        f"a rate from {grid}, server averaging by examples. Central training takes as "
        f"many steps on the same images. Tested on {s['held_out']} images of the test set, drawn "
        f"by seed; {len(s['seeds'])} seeds, and {s['repeats']} runs of each for MobileNet with IID "
        f"clients, in jaxfed and in TFF, whose mean counts; {len(s['more'])} more seeds, in "
        "jaxfed, for the CNN with and without server Adam, which vary most. Dropout (0.001) is "
        "off. Made by "
        f"`{content['command']}`: {len(content['runs'])} runs on {content['device']}. {versions}."
    )


def headline(content: dict[str, Any]) -> str:
    """The answer in a paragraph, every number with its interval."""
    found = content["findings"]
    chains = {(c["network"], c["clients"]): c for c in found["chains"]}
    effects = {e["text"]: e["effect"] for e in found["conclusions"] if e["about"] == "MobileNet"}
    keras, tff = (chains["MobileNet", "IID"]["stops"][place]["accuracy"] for place in (0, -1))
    mended = {
        way: next(r["accuracy"] for r in rows if r["remedy"] == IN_TFF)
        for way, rows in found["remedies"].items()
    }
    return (
        f"MobileNet reaches {interval(keras)} on MNIST in Keras and {interval(tff)} in TFF: the "
        "same initial weights, the same images, split evenly over clients. TFF's rule for "
        "BatchNorm's statistics, which are never averaged, changes accuracy by "
        f"{interval(effects[RULE], sign=True)}; federated averaging itself by "
        f"{interval(effects[FEDERATION], sign=True)}. What is left between jaxfed and TFF is "
        f"{interval(effects[RESIDUAL], sign=True)} under that rule and "
        f"{interval(effects[TRAINED], sign=True)} with exact statistics. So the weights that TFF "
        f"trains are good: tested with exact statistics they reach {interval(mended['IID'])}, and "
        f"{interval(mended['shards'])} if every client holds two digits only."
    )


def summary(content: dict[str, Any]) -> str:
    """The README's table: one network from plain Keras to TFF."""
    chains = {(c["network"], c["clients"]): c for c in content["findings"]["chains"]}
    remedy = {r["remedy"]: r for r in content["findings"]["remedies"]["IID"]}
    lines = [headline(content), ""]
    lines += ["| MobileNet on MNIST, IID clients | test accuracy | change |", "|---|---|---|"]
    table = _chain(chains["MobileNet", "IID"])
    lines += ["| " + " | ".join(row) + " |" for row in table.rows]
    mended = remedy[IN_TFF]
    lines.append(
        f"| TFF's weights, with exact statistics | {interval(mended['accuracy'])} | "
        f"{interval(mended['gain'], sign=True)} |"
    )
    seeds = len(content["setting"]["seeds"])
    return "\n".join([*lines, "", f"Mean of {seeds} seeds and its 95 % interval."])


def in_readme(text: str, content: dict[str, Any]) -> str:
    """The README with the study's table in it."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{summary(content)}\n{END}{rest.partition(END)[2]}"


def markdown(content: dict[str, Any], again: dict[str, Any] | None = None) -> str:
    """`docs/gap.md`; its pictures are beside it. `again` is the study made once more."""
    parts = [
        "# Where MobileNet's accuracy goes",
        *([headline(content)] if "chains" in content["findings"] else []),
        f"`{content['command']} --publish` writes this page from "
        f"[`results/gap.json`](results/gap.json).",
        setting(content),
    ]
    shown = figures(content)
    for table in [*tables(content), *([_again(content, again)] if again else [])]:
        parts += [f"## {table.title}", table.text]
        lines = ["| " + " | ".join(table.head) + " |", "|" + "---|" * len(table.head)]
        parts.append("\n".join([*lines, *("| " + " | ".join(row) + " |" for row in table.rows)]))
        if table.title == "The verdict" and shown:
            parts.append("![From plain Keras to TFF](gap-waterfall.svg)")
            parts.append("![Test accuracy over rounds](gap-curves.svg)")
    return "\n\n".join(parts) + "\n"


def report(content: dict[str, Any]) -> str:
    """`report.html`: all of it on one page without outside requests."""
    parts = [f"<p>{_inline(headline(content))}</p>"] if "chains" in content["findings"] else []
    parts.append(f"<p>{_inline(setting(content))}</p>")
    shown = figures(content)
    for table in tables(content):
        parts.append(f"<h2>{_inline(table.title)}</h2><p>{_inline(table.text)}</p>")
        parts.append(_html_table(table))
        if table.title == "The verdict":
            parts += [f'<figure id="{name}">{picture}</figure>' for name, picture in shown.items()]
    return _PAGE.replace("{body}", "\n".join(parts))


def _html_table(table: Table) -> str:
    def row(cells: Row, tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{_inline(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(row(cells, "td") for cells in table.rows)
    head = row(table.head, "th")
    return f'<div class="wide"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def _inline(text: str) -> str:
    """Markdown's code and bold as HTML; everything else escaped."""
    pieces = html.escape(text).split("`")
    pieces[1::2] = [f"<code>{code}</code>" for code in pieces[1::2]]
    bold = "".join(pieces).split("**")
    bold[1::2] = [f"<strong>{words}</strong>" for words in bold[1::2]]
    return "".join(bold)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Where MobileNet's accuracy goes</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
.wide { overflow-x: auto }
figure { margin: 1rem 0 }
svg { width: 100%; height: auto; border-radius: 6px; background: white }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .3rem .8rem; border-bottom: 1px solid #8884 }
code { background: #8882; padding: 0 .2em; border-radius: 3px }
</style></head><body>
<h1>Where MobileNet's accuracy goes</h1>
{body}
</body></html>
"""
