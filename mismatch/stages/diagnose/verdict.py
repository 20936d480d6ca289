"""The words: what the shares say, the numbers they rest on, and the next command. No torch.

A share is spoken of only if its interval excludes zero. What an earlier run knows of retrieval and copying comes last
and weighs most: ordinary text does not ask for either, so no share shows them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mismatch import registry, spec
from mismatch.report import intervals
from mismatch.runs.plan import Apart, Replaced
from mismatch.stages.base import SEVERITIES, Finding
from mismatch.stages.diagnose.config import DiagnoseConfig
from mismatch.stages.diagnose.figure import CAUSES, percent
from mismatch.stages.diagnose.numbers import Correction, Found, Share
from mismatch.stages.lost_retrieval import ABLE, LOST, command

SPOKEN = 0.1
"""A smaller share is left to the table."""
MUCH = 0.5
CLOSED_FORM = ("scale", "mean", "affine", "linear")
SMALL_STEP = 0.3
"""||update|| / ||stream||: a larger one is no small correction to the stream."""


def verdicts(
    found: Found,
    config: DiagnoseConfig,
    clauses: Sequence[Replaced],
    apart: Apart | None = None,
) -> list[Finding]:
    """Everything that the numbers say, worst first.

    Args:
        found: the numbers.
        config: for the next commands.
        clauses: what was replaced.
        apart: what else differs in a student that was trained elsewhere.
    """
    ask = _Next(config, found, clauses, apart)
    said = [
        finding
        for rule in (_damage, _leading, _causes, _parts, _behind, _premise, _elsewhere)
        for finding in rule(found, ask)
    ]
    return sorted(said, key=lambda f: -SEVERITIES.index(f.severity))


def headline(found: Found) -> str:
    """One sentence: the damage, and the shares of its causes."""
    damage = found.damage
    if not found.corrections:
        return (
            f"Nothing to explain: the output does not move (KL {damage.value:.2g} nats, rounding)."
        )
    parts = [
        f"{_percent(share)} {CAUSES[name]}"
        for name, share in sorted(found.causes.items(), key=lambda item: -item[1].value)
        if share.value >= SPOKEN / 2
    ]
    if found.unexplained is not None:
        parts.append(f"{_percent(found.unexplained)} unexplained")
    text = f"KL {damage.value:.3g} nats per token{_band(damage)}: {', '.join(parts)}."
    lead = found.lead
    if lead is None:
        return f"{text} No simple correction recovers much of it."
    return f"{text} Leading: {lead.says} recovers {_percent(lead.share)}{_band(lead.share, 100)}."


# ---- rules --------------------------------------------------------------------------------------


def _damage(found: Found, _ask: _Next) -> Iterator[Finding]:
    kl = found.damage
    numbers: dict[str, float | str] = {"kl": kl.value}
    if not found.corrections:
        yield Finding(
            "info",
            "nothing to explain",
            f"The output does not move: KL {kl.value:.2g} nats per token, which is rounding.",
            numbers,
        )
        return
    text = f"The swap costs {kl.value:.3g} nats per token{_band(kl)}"
    zero = found.controls.get("zero")
    if zero is not None and zero.value > 0:
        numbers |= {"kl_zero": zero.value, "share_of_zero": kl.value / zero.value}
        text += f", {_percent(kl.value / zero.value)} of what deleting the module costs ({zero.value:.3g})"
    yield Finding("info", "the damage", f"{text}.", numbers)


def _leading(found: Found, ask: _Next) -> Iterator[Finding]:
    if not found.corrections:
        return
    lead = found.lead
    if lead is None:
        best = max(found.corrections, key=lambda r: r.share.value)
        yield Finding(
            "medium",
            "no simple correction recovers much",
            f"The best of {len(found.corrections)} is {best.says}: {_percent(best.share)}{_band(best.share, 100)}. "
            "What is missing is content of its own, which has to be trained.",
            {"best": best.name, "share": best.share.value},
            ask.repair(),
        )
        return
    yield Finding(
        "medium",
        f"{_percent(lead.share)} of the damage: {lead.says}",
        f"With that alone changed the KL falls from {found.damage.value:.3g} to {lead.kl.value:.3g} nats"
        f"{_band(lead.kl)}. Nothing simpler recovers as much, and nothing richer much more."
        + (" A closed form can repair that much, without gradients." if _closed(lead) else ""),
        _numbers(lead.name, lead.share),
        ask.cure(lead),
    )


def _causes(found: Found, ask: _Next) -> Iterator[Finding]:
    cures: dict[str, Callable[[], str | None]] = {
        "distribution": ask.closed_form,
        "position": ask.position,
        "premise": ask.premise,
    }
    for name, share in found.causes.items():
        if share.value < SPOKEN or not share.lo > 0:
            continue
        alone = found.joint[name]
        yield Finding(
            "medium" if share.value >= MUCH else "low",
            f"{CAUSES[name]}: {_percent(share)}",
            f"Its corrections return {_percent(alone)} of the KL alone, {_percent(share)}{_band(share, 100)} as their "
            f"share beside the other causes. {_WHAT[name]}",
            _numbers(name, share) | {"alone": alone.value},
            cures[name](),
        )
    rest = found.unexplained
    if rest is not None and rest.value >= SPOKEN and rest.lo > 0:
        yield Finding(
            "medium" if rest.value >= MUCH else "low",
            f"unexplained: {_percent(rest)}",
            f"All corrections of the three causes together leave {_percent(rest)}{_band(rest, 100)} of the KL. It is "
            "neither a shift of the vectors, nor the tokens' places, nor their sizes: "
            + (
                "what the part knew is gone, and has to be trained again."
                if ask.apart is None
                else f"what else differs from the teacher ({ask.apart.text()}), or what the part knew."
            ),
            _numbers("unexplained", rest),
            ask.repair(),
        )


def _closed(lead: Correction) -> bool:
    return lead.name in CLOSED_FORM and lead.share.lo > MUCH


_WHAT = {
    "distribution": "The layers behind receive the right content in another scale, mean or direction.",
    "position": "What a token's place decides, and what the rotary embedding carried, is missing.",
    "premise": "The part no longer makes a small, steady step: its updates have the wrong size, token by token, or it "
    "errs at the tokens that the other layers lean on.",
}


def _parts(found: Found, ask: _Next) -> Iterator[Finding]:
    for one in found.corrections:
        share = one.share
        if one.group != "part" or one.name == found.leading or not share.lo > 0:
            continue
        if share.value < SPOKEN:
            continue
        yield Finding(
            "low",
            f"{one.says}: {_percent(share)} returns",
            f"With that alone changed the KL is {one.kl.value:.3g} nats{_band(one.kl)}.",
            _numbers(one.name, share),
            ask.cure(one),
        )


def _behind(found: Found, _ask: _Next) -> Iterator[Finding]:
    layers, errors = found.behind.get("layers", []), found.behind.get("errors", [])
    if not found.corrections or len(layers) < 2 or not errors[0] > 0:
        return
    growth = found.behind["growth"]
    word = "amplify" if growth > 1.1 else "heal" if growth < 0.9 else "neither amplify nor heal"
    local = ", ".join(
        f"layer {p['layer']} {p['site']} {p['forced_error']:.2f}" for p in found.places
    )
    yield Finding(
        "medium" if growth > 2 else "info",
        f"the layers behind {word}" + (f" it {growth:.1f} times" if growth > 1.1 else ""),
        f"Local, on the teacher's own input, the squared error of the update is {local} (1 = as far as an update of "
        f"zero). The stream is off by {errors[0]:.3f} of its norm leaving layer {layers[0]}, and by {errors[-1]:.3f} "
        f"leaving layer {layers[-1]}.",
        {"growth": growth, "first": errors[0], "last": errors[-1]},
    )


def _premise(found: Found, _ask: _Next) -> Iterator[Finding]:
    for place in found.places:
        theirs, ours = place["update_to_stream"], place["update_to_stream_student"]
        if max(theirs, ours) < SMALL_STEP and ours < 2 * theirs:
            continue
        yield Finding(
            "low",
            f"layer {place['layer']}: the step is {ours:.2f} of the stream, the original's {theirs:.2f}",
            f"Deep models expect {place['site']} to be a small correction to the stream (median over tokens of the "
            "norms).",
            {"update_to_stream": theirs, "update_to_stream_student": ours},
        )


def _elsewhere(found: Found, ask: _Next) -> Iterator[Finding]:
    """What probes of an earlier run say."""
    told = {
        "passkey": ("retrieval is carried here", "the log-probability of the key"),
        "needles": ("retrieval is carried here", "the log-probability of facts in real text"),
        "kv_lookup": ("retrieval is carried here", "the log-probability of pairs of a list"),
        "induction": ("copying is carried here", "NLL of the second copy of random tokens"),
        "copying": ("copying is carried here", "NLL of the second copy of random tokens"),
    }
    for reading in found.evidence:
        name = reading["probe"]
        title, what = told[name]
        retrieval = name in ABLE
        lost = -reading["value"] if retrieval else reading["value"]
        sure = reading["hi"] < 0 if retrieval else reading["lo"] > 0
        if lost < LOST[name] or not sure or (retrieval and reading["teacher"] < ABLE[name]):
            continue
        keeps = command(ask.model, ask.clauses) if retrieval else None
        advice = (
            "Keep the exact keys and values of the far tokens that are worth it, or keep the part and add the "
            "mechanism beside it."
            if keeps
            else "Do not replace the part: keep it, and add the mechanism beside it."
        )
        yield Finding(
            "high",
            f"{title} ({name} {reading['value']:+.2f} nats)",
            f"{what} moves by {reading['value']:+.2f} [{reading['lo']:.2f}, {reading['hi']:.2f}] nats from the "
            f"teacher's {reading['teacher']:.2f}: ordinary text does not show it, and training on text brings it back "
            f"only in part. {advice}",
            {k: v for k, v in reading.items() if k != "probe"},
            keeps or ask.parallel(),
        )


# ---- next commands ------------------------------------------------------------------------------


class _Next:
    """Commands that go on from here."""

    def __init__(
        self,
        config: DiagnoseConfig,
        found: Found,
        clauses: Sequence[Replaced],
        apart: Apart | None,
    ) -> None:
        self.model, self.flag = config.model, config.flag
        self.swap = found.swap if config.student else spec.format(config.swap_spec)
        self.apart, self.evidence = apart, config.earlier_run
        self.clauses = clauses
        self.slots = {c.mechanism: c.slot for c in clauses}

    def cure(self, one: Correction) -> str | None:
        if one.name in CLOSED_FORM:
            return self.closed_form()
        if one.group == "position":
            return self.position()
        if one.name in ("first", "massive", "with first_token"):
            return self.premise()
        return self.repair()

    def closed_form(self) -> str:
        return self.repair("closed-form")

    def premise(self) -> str:
        """A mechanism that can keep the first tokens in sight should; else training."""
        text = self._changed(
            lambda call, name: _with(call, "sinks=1") if _has(name, "sinks") else None
        )
        return self._trace(text) if text is not None else self.repair("closed-form,local")

    def position(self) -> str:
        """Part of the rotary embedding kept, where the swap is about it alone; else ask what position carried."""
        text = self._changed(
            lambda _call, name: "partial_rope(fraction=0.25)" if name == "nope" else None
        )
        if text is not None:
            return self._trace(text)
        return (
            f"mismatch probe --model {self.model} {self.flag} "
            "--probes order_sensitivity,induction,passkey"
        )

    def parallel(self) -> str | None:
        if "parallel" in self.slots or "final_norm" in self.slots.values():
            return None
        text = self._changed(lambda call, _name: f"parallel({call}, alpha=0.1)", slot=True)
        return None if text is None else self._trace(text)

    def repair(self, stages: str | None = None) -> str:
        more = f" --stages {stages}" if stages else ""
        return f"mismatch repair --model {self.model} {self.flag}{more}"

    def _trace(self, swap: str) -> str:
        return f'mismatch trace --model {self.model} --swap "{swap}"'

    def _changed(self, change: Callable[[str, str], str | None], slot: bool = False) -> str | None:
        """The swap with every clause's mechanism changed; None where one cannot be."""
        found = []
        for clause in spec.parse(self.swap).clauses:
            target, _, call = spec.format(spec.Spec((clause,), "")).partition(":")
            name = clause.call.name
            new = change(call, name)
            if new is None:
                return None
            if slot and "." not in target:
                target += f".{self.slots.get(name, 'attn')}"
            found.append(f"{target}:{new}")
        return "; ".join(found)


def _has(mechanism: str, argument: str) -> bool:
    if ":" in mechanism:  # a user's own class
        return False
    return registry.mechanisms().card(mechanism).arg(argument) is not None


def _with(call: str, argument: str) -> str | None:
    if argument.partition("=")[0] + "=" in call:
        return None
    return f"{call[:-1]}, {argument})" if call.endswith(")") else f"{call}({argument})"


def _percent(share: Share | float) -> str:
    value = share if isinstance(share, float) else share.value
    return f"{percent(value)} %"


def _band(number: Any, unit: float = 1.0) -> str:
    form = percent if unit == 100 else "{:.3g}".format
    return f" {intervals.band(number.lo, number.hi, form)}"


def _numbers(name: str, share: Share) -> dict[str, float | str]:
    return {"what": name, "share": share.value, "share_lo": share.lo, "share_hi": share.hi}
