"""Is the memory used, and for what? Branches, gates and state of a mechanism that has them.

Definition: of every mechanism that names branches (`Mechanism.branches`) each branch is switched off in turn, and
(whole - without it) is its contribution. On text, from the second segment on (the memory is empty before, and with
overlap in as many segments more), per swapped layer:
    kl               KL(teacher || student) of the whole model as it is; kl[without=B] with a branch switched off,
                     kl[with=first_token] with the first token (the attention sink) restored; kl_change[...]
                     is the paired difference to kl: below 0 is better without; nll likewise
    share            per head: ||contribution of a branch|| / sum over branches, on the teacher's stream
    query_variation  per head: ||c - mean over the segment's queries|| / ||c||, c the contribution of a branch: 0 is
                     the same answer to every query
    gate             per head: the weight of a branch, 0..1. Not applicable where no branch has one of its own:
                     under a shared denominator (infini, normalizer=shared) it is another at every token, and
                     `share` says what comes of it
    gate_gradient    d MSE(update, teacher's update) / d gate, mean over heads, from the first segment (part=first),
                     where the memory is empty, and from all others (part=rest)
    travel           how far the planned training can move a gate: sum of the planned learning rates
                      (--planned-gate-lr, --planned-gate-steps)
    state_max        largest number of each carried tensor after the text; overflow_fp16: tokens until it passes
                     65504, at the growth of the second half of the text
Unit: nats per token. Range: [0, inf). Null: the teacher has no branches: not applicable, except kl = 0 and its nll.
Chance: kl[without=memory] = kl: the memory adds nothing that the model uses.
Source: branches and gates arXiv 2404.07143, eq. 10; measured on SmolLM2-135M: query_variation .008-.037 in all layers
when Infini-attention is swapped in; the first token alone takes layer 12 from .043 to .007; a gate needs a travel of
about 4 (sigmoid from .5 to .98), and Adam moves it by at most the sum of the learning rates.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from mismatch.forward.head import log_probs
from mismatch.forward.hooks import on_device
from mismatch.forward.shared_prefix import finals
from mismatch.mechanisms.base import Mechanism
from mismatch.mechanisms.parts.own_state import OwnState
from mismatch.mechanisms.parts.projections import AttentionParts
from mismatch.mechanisms.parts.side_by_side import flat
from mismatch.metrics.sums.logits import kl_float64
from mismatch.probes.base import Answers, Measure, Probe, Setting, Subject, swapped_layers
from mismatch.probes.forced import entering, update
from mismatch.runs.table import under

SEGMENT = 64
"""The segment where the mechanism has none: queries that are compared, text that is skipped."""

TRAVEL = 4.0
"""sigmoid(4) = .98: how far a gate must be able to move to select one branch."""

SLOPES = (-1, "slopes")
"""The gradients of the gates of all mechanisms of a layer, among what each of them reads."""

LARGEST_FP16 = 65504.0
TINY = 1e-30  # against division by 0 where a branch contributes nothing


class Memory(Probe):
    headline = "kl"
    unit = "nats per token"
    range = "[0, inf)"
    better = "lower"
    chance = "kl[without=memory] = kl: the output of the memory is not used"
    shows = (
        "what each branch is worth, whether the memory answers the query, whether gates can move"
    )
    blind = (
        "retrieval (passkey): a memory may matter for text and hold no key; branches share a gate, "
        "so switching one off leaves the other at its weight"
    )
    source = "arXiv 2404.07143, eq. 7-10"
    needs = "text"
    by_batch = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.ids = setting.windows("memory")
        self._warnings: list[str] = []
        if setting.travel is not None and setting.travel < TRAVEL:
            self._warnings.append(
                f"gates: the planned learning rates sum up to {setting.travel:.3g}; below {TRAVEL:g} a gate cannot "
                "select a branch, whatever the data: raise its learning rate or the steps"
            )

    def warnings(self) -> tuple[str, ...]:
        return tuple(self._warnings)

    def run(self, subjects: Sequence[Subject]) -> Answers:
        answers: dict[str, list[Measure]] = {subject.name: [] for subject in subjects}
        found = {subject.name: mechanisms(subject) for subject in subjects}
        size = next((s.segment for s in subjects if s.segment is not None), SEGMENT)
        if size >= self.ids.shape[1]:
            self._warnings.append(
                f"memory: one segment of {size} tokens holds the whole window of {self.ids.shape[1]}; "
                f"take --seq-len {2 * size} or more"
            )
            return {name: [Measure.absent("kl")] for name in answers}
        for name, measures in self._output(subjects, found, size).items():
            answers[name] += measures
        for layer in swapped_layers(subjects):
            for subject in subjects:
                several = found[subject.name].get(layer)
                if several is None:
                    answers[subject.name].append(
                        Measure.absent("share", layer=layer, site="attn_out")
                    )
                    continue
                answers[subject.name] += self._layer(subjects[0], subject, layer, several, size)
        for subject in subjects[1:]:
            if found[subject.name] and self.setting.travel is not None:
                answers[subject.name].append(Measure.number("travel", self.setting.travel))
        return answers

    def _output(
        self,
        subjects: Sequence[Subject],
        found: Mapping[str, Mapping[int, Sequence[Mechanism]]],
        size: int,
    ) -> dict[str, list[Measure]]:
        """KL and NLL of the whole model, as it is and under each intervention in all its mechanisms at once."""
        cases: dict[str, list[tuple[str, str] | None]] = {}
        all_of = {s.name: [m for each in found[s.name].values() for m in each] for s in subjects}
        for subject in subjects:
            names = {("without", name) for m in all_of[subject.name] for name in m.branch_names}
            names |= {("with", name) for m in all_of[subject.name] for name in m.restores()}
            cases[subject.name] = [None, *sorted(names)]
        runs = [(subject, case) for subject in subjects for case in cases[subject.name]]

        def one(part: slice) -> dict[tuple[str, Any, str], np.ndarray]:
            read = {}
            ids = on_device(subjects[0].layout, self.ids[part])
            targets = ids[:, size + 1 :]
            teacher: Tensor | None = None
            # The models run one by one as the loop takes them, so each can be changed for its turn.
            models = finals([subject for subject, _ in runs], ids)
            for subject, case in runs:
                with intervened(all_of[subject.name], case):
                    _, final = next(models)
                logp = log_probs(subject.layout, final[:, size:-1])
                teacher = logp if teacher is None else teacher
                nll = -logp.gather(-1, targets.to(logp.device)[..., None])[..., 0]
                for stat, value in (("kl", kl_float64(teacher, logp)), ("nll", nll)):
                    read[subject.name, case, stat] = value.double().cpu().numpy()
            return read

        with torch.no_grad():
            numbers = self.setting.by_batch(len(self.ids), one)
        answers: dict[str, list[Measure]] = {subject.name: [] for subject in subjects}
        for (name, case, stat), values in numbers.items():
            if case is None:
                answers[name].append(Measure.mean(stat, values))
                continue
            given = {case[0]: case[1]}
            change = values - numbers[name, None, stat]
            answers[name].append(Measure.mean(under(stat, **given), values))
            answers[name].append(Measure.mean(under(f"{stat}_change", **given), change))
        return answers

    def _layer(
        self,
        teacher: Subject,
        subject: Subject,
        layer: int,
        mechanisms: Sequence[Mechanism],
        size: int,
    ) -> Iterator[Measure]:
        """The measures of the mechanisms of a layer, each in its heads, on the teacher's stream."""
        address = {"layer": layer, "site": "attn_out", "mode": "forced"}

        def one(part: slice) -> dict[tuple[int, str], np.ndarray]:
            read: dict[tuple[int, str], np.ndarray] = {}
            ids = on_device(teacher.layout, self.ids[part])
            with torch.no_grad():
                stream = entering(teacher.layout, ids, [layer])[layer]
                target = update(teacher, layer, ids, stream)
                for number, mechanism in enumerate(mechanisms):
                    taken = contributions(subject, layer, ids, stream, mechanism)
                    read |= {(number, s): value for s, value in _of_branches(taken, size).items()}
            read[SLOPES] = _slopes(subject, layer, ids, stream, target, mechanisms, size)
            return read

        found = self.setting.by_batch(len(self.ids), one)
        slopes = found.pop(SLOPES)
        tokens = self.ids.shape[1] - size
        for (number, stat), values in found.items():
            for head, own in _used(mechanisms[number], values.T):
                yield Measure.mean(stat, own, tokens, head=head, **address)
        for mechanism in mechanisms:
            for name, gate in mechanism.gates().items():
                shares = torch.sigmoid(gate.detach().float()).tolist()
                for head, value in _used(mechanism, shares):
                    yield Measure.number(under("gate", branch=name), value, 1, head=head, **address)
        if not any(mechanism.gates() for mechanism in mechanisms):
            yield Measure.absent("gate", layer=layer, site="attn_out")
        else:
            first, rest = slopes.T
            yield Measure.mean(under("gate_gradient", part="first"), first, size, **address)
            yield Measure.mean(under("gate_gradient", part="rest"), rest, tokens, **address)
        yield from _state(subject, layer, on_device(subject.layout, self.ids), size, address)


def mechanisms(subject: Subject) -> dict[int, list[Mechanism]]:
    """The mechanisms with branches of each swapped layer: the outermost where several are nested, one in other heads
    each."""
    found: dict[int, list[Mechanism]] = {}
    for clause in subject.clauses:
        if clause.layer is None or clause.layer in found:
            continue
        replaced = subject.layout.model.get_submodule(clause.path)
        named = [m for m in replaced.modules() if isinstance(m, Mechanism) and m.branch_names]
        outer = {m.used_heads: m for m in reversed(named)}
        if outer:
            found[clause.layer] = list(outer.values())[::-1]
    return found


def _used(mechanism: Mechanism, of_heads: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """What was read of each head, with its number, of those whose output is used."""
    for head, value in enumerate(of_heads):
        if mechanism.used_heads is None or head in mechanism.used_heads:
            yield head, value


@contextmanager
def intervened(mechanisms: Iterable[Mechanism], case: tuple[str, str] | None) -> Iterator[None]:
    """Switch a branch off, or restore something, in every mechanism that can.

    Args:
        mechanisms: of one model.
        case: ("without", branch) or ("with", name); None changes nothing.
    """
    if case is None:
        yield
        return
    kind, name = case
    with ExitStack() as stack:
        for mechanism in mechanisms:
            known: dict[str, AbstractContextManager[None]] = (
                mechanism.branches() if kind == "without" else mechanism.restores()
            )
            if name in known:
                stack.enter_context(known[name])
        yield


def contributions(
    subject: Subject, layer: int, ids: Tensor, stream: Tensor, mechanism: Mechanism
) -> dict[str, Tensor]:
    """What each branch adds, per head before the output projection where there is one: `batch H pos D`."""
    whole = _heads(subject, layer, ids, stream, mechanism)
    taken = {}
    for name, out in mechanism.branches().items():
        with out:
            taken[name] = whole - _heads(subject, layer, ids, stream, mechanism)
    return taken


def _heads(
    subject: Subject, layer: int, ids: Tensor, stream: Tensor, mechanism: Mechanism
) -> Tensor:
    if not isinstance(mechanism, AttentionParts):
        return update(subject, layer, ids, stream)[:, None].double()
    found: list[Tensor] = []

    def look(_module: nn.Module, args: tuple) -> None:
        heads = args[0].unflatten(-1, (mechanism.n_heads, mechanism.head_dim))
        found.append(heads.transpose(1, 2).double())

    output = mechanism.get_submodule(mechanism._output)
    handle = output.register_forward_pre_hook(look)
    try:
        update(subject, layer, ids, stream)
    finally:
        handle.remove()
    return found[-1]


def _of_branches(taken: Mapping[str, Tensor], size: int) -> dict[str, np.ndarray]:
    """`share` and `query_variation` of each branch, `samples heads`, from the second segment on."""
    norms = {name: x[:, :, size:].norm(dim=-1) for name, x in taken.items()}
    total = torch.stack(list(norms.values())).sum(0)
    found = {}
    for name, x in taken.items():
        share = torch.where(total > 0, norms[name] / total, 0.0).mean(-1)
        found[under("share", branch=name)] = share.cpu().numpy()
        apart, length = [], []
        for segment in x.split(size, dim=2)[1:]:
            if segment.shape[2] > 1:
                centred = segment - segment.mean(2, keepdim=True)
                apart.append(centred.norm(dim=-1).mean(-1))
                length.append(segment.norm(dim=-1).mean(-1))
        varied = torch.stack(apart).mean(0) / torch.stack(length).mean(0).clamp_min(TINY)
        found[under("query_variation", branch=name)] = varied.cpu().numpy()
    return found


def _slopes(
    subject: Subject,
    layer: int,
    ids: Tensor,
    stream: Tensor,
    target: Tensor,
    mechanisms: Sequence[Mechanism],
    size: int,
) -> np.ndarray:
    """d loss / d gate, mean over heads, from the first segment and from the rest: `samples 2`. The loss is the mean
    squared error of the update over the whole window, in units of its mean square."""
    used = [(gate, m.used_heads) for m in mechanisms for gate in m.gates().values()]
    gates = [gate for gate, _ in used]
    if not gates:
        return np.zeros((len(ids), 2))
    wanted = [gate.requires_grad for gate in gates]
    rows = []
    try:
        for gate in gates:
            gate.requires_grad_(True)
        for row in range(len(ids)):
            with torch.enable_grad():
                made = update(subject, layer, ids[row : row + 1], stream[row : row + 1])
                error = (made - target[row : row + 1]).float().square().sum(-1)[0]
                error = error / target[row].float().square().sum()
                pair = []
                for part in (error[:size], error[size:]):
                    slopes = torch.autograd.grad(part.sum(), gates, retain_graph=True)
                    own = [
                        slope if heads is None else slope[list(heads)]
                        for slope, (_, heads) in zip(slopes, used, strict=True)
                    ]
                    pair.append(sum(float(slope.float().mean()) for slope in own))
            rows.append(pair)
    finally:
        for gate, before in zip(gates, wanted, strict=True):
            gate.requires_grad_(before)
    return np.array(rows)


def _state(
    subject: Subject, layer: int, ids: Tensor, size: int, address: Mapping[str, Any]
) -> Iterator[Measure]:
    """Largest number of each carried tensor, and the tokens after which it would overflow float16."""
    end = ids.shape[1] // size * size
    half = end // 2 // size * size
    largest: dict[str, list[float]] = {}
    with torch.no_grad():
        cache = DynamicCache(config=subject.layout.config)
        for start, stop in ((0, half), (half, end)):
            if stop > start:
                subject.layout.decoder(
                    input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True
                )
            now: dict[str, float] = {}
            for name, tensor in _carried(cache, layer):
                now[name] = max(now.get(name, 0.0), float(tensor.float().abs().max()))
            for name, value in now.items():
                largest.setdefault(name, []).append(value)
    for name, values in sorted(largest.items()):
        given = {"tensor": name}
        yield Measure.number(under("state_max", **given), values[-1], ids.numel(), **address)
        growth = (values[-1] - values[0]) / (end - half) if len(values) == 2 and half else 0.0
        if growth > 0:
            tokens = end + (LARGEST_FP16 - values[-1]) / growth
            yield Measure.number(under("overflow_fp16", **given), tokens, ids.numel(), **address)


def _carried(cache: DynamicCache, layer: int) -> list[tuple[str, Tensor]]:
    """The state of fixed size that a mechanism carries; keys and values of an open segment do not grow."""
    entry = cache.layers[layer] if layer < len(cache.layers) else None
    return [
        (name, tensor)
        for one in flat(entry)
        if isinstance(one, OwnState)
        for name, tensor in one.rows.items()
        if tensor.is_floating_point()
        and tensor.numel()
        and not name.startswith(("open", "near", "earlier", "sink", "slot"))
    ]
