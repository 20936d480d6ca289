"""Layer lists that others published, beside the choice of a plan or of a scan: how much they share, and by chance.

A file of lists, YAML or JSON:

    model: smollm2              of the lists, as the run calls it; the end of a hub id will do
    layers: 30                  of that model
    replaced:                   by name, the layers that a list replaces,
      published: [3, 7, 11]
    kept:                       or those that it keeps as they are
      another: [0, 18]

A plan has its choice. A scan has, for each mechanism and each task that the model can do, as many of the cheapest
layers as the list replaces. Layers that the run could not choose do not count. No torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mismatch.errors import DataError, UsageError
from mismatch.reading import typed, yaml_of
from mismatch.report.words import columns
from mismatch.runs.folder import Run, load_run
from mismatch.stages.plan.plan import ChoicePlan
from mismatch.stages.scan.damage import students
from mismatch.stages.scan.plan import ScanPlan
from mismatch.stages.scan.reliability import Overlap, cheapest
from mismatch.stages.scan.words import done


@dataclass(frozen=True)
class Ranking:
    """What a file holds: the model, how many layers it has, and lists by name."""

    model: str
    layers: int
    replaced: dict[str, tuple[int, ...]] = field(default_factory=dict)
    kept: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def lists(self) -> dict[str, frozenset[int]]:
        """The layers that each list replaces."""
        every = frozenset(range(self.layers))
        return {
            **{name: frozenset(of) for name, of in self.replaced.items()},
            **{name: every - frozenset(of) for name, of in self.kept.items()},
        }


def read(path: Path | str) -> Ranking:
    """A file of lists.

    Raises:
        DataError: no such file, not such lists, a layer that there is not or that is named twice.
    """
    path = Path(path)
    found: Ranking = typed(
        Ranking,
        yaml_of(path, DataError) or {},
        lambda reason: DataError(
            f"{path} is no file of layer lists: {reason}",
            hint="it holds `model`, `layers`, and under `replaced` or `kept` lists of layers by name",
        ),
    )
    if not found.replaced and not found.kept:
        raise DataError(f"{path} holds no list of layers", hint="write some under `replaced`")
    if found.layers < 1:
        raise DataError(f"{path}: `layers` must be >= 1, got {found.layers}")
    for name, layers in [*found.replaced.items(), *found.kept.items()]:
        wrong = [at for at in layers if not 0 <= at < found.layers]
        if wrong or len(set(layers)) < len(layers) or not layers:
            what = f"layer {wrong[0]}" if wrong else "a layer twice" if layers else "no layer"
            raise DataError(
                f"the list `{name}` in {path} names {what}: the model has {found.layers} layers "
                f"(0-{found.layers - 1})"
            )
    if twice := found.replaced.keys() & found.kept.keys():
        raise DataError(f"{path} has the list `{min(twice)}` twice: replaced and kept")
    return found


def beside(runs: Sequence[Path | str], path: Path | str) -> list[dict[str, Any]]:
    """What each list shares with the choice of each run, and with each other list.

    Args:
        runs: folders of plans and scans.
        path: of the file.

    Returns:
        Rows run, choice, list, shared, of, chance, p.

    Raises:
        DataError: as `read`.
        UsageError: a run of another kind, or of another model.
        RunError: a run cannot be read.
    """
    ranking = read(path)
    loaded = [load_run(run) for run in runs]
    for run in loaded:
        _check(run, ranking, path)
    rows = [row for run in loaded for row in _of_run(run, ranking)]
    names = list(ranking.lists)
    for at, one in enumerate(names):
        for other in names[at + 1 :]:
            found = Overlap.between(ranking.lists[one], ranking.lists[other], ranking.layers)
            rows.append(_row("", one, other, found))
    return rows


def words(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text in columns."""
    heads = ("choice", "beside", "shared", "by chance", "p of as many by chance")
    lines = [
        (
            " ".join(filter(None, (row["run"], row["choice"]))),
            *(row["list"], f"{row['shared']} of {row['of']}"),
            *(f"{row['chance']:.1f}", f"{row['p']:.3f}"),
        )
        for row in rows
    ]
    return columns([heads, *lines], indent="")


def _check(run: Run, ranking: Ranking, path: Path | str) -> None:
    made = run.manifest["kind"]
    if made not in ("scan", "plan"):
        raise UsageError(
            f"the run in {run.path} is a {made}: it chose no layers",
            hint="give run folders of `mismatch plan` or `mismatch scan`",
        )
    if made == "scan" and run.plan.by != "layer":
        raise UsageError(f"the scan in {run.path} is by {run.plan.by}, and lists are of layers")
    model, layers = str(run.manifest["model"]), run.plan.n_layers
    if layers != ranking.layers or _short(model) != _short(ranking.model):
        raise UsageError(
            f"the lists in {path} are of {ranking.model} with {ranking.layers} layers, and the run in {run.path} is "
            f"of {model} with {layers}",
            hint="lists of another model say nothing of this one; if it is the same, name it as the run does",
        )


def _short(model: str) -> str:
    return model.rstrip("/").rpartition("/")[2].casefold()


def _of_run(run: Run, ranking: Ranking) -> Iterator[dict[str, Any]]:
    name = "" if run.path is None else run.path.name
    there = run.plan.among if isinstance(run.plan, ChoicePlan) else run.plan.layers
    for listed, layers in ranking.lists.items():
        left = layers & set(there)
        for choice, chosen in _chosen(run, len(left)):
            yield _row(name, choice, listed, Overlap.between(chosen, left, len(there)))


def _chosen(run: Run, count: int) -> Iterator[tuple[str, Sequence[int]]]:
    """What a run would replace."""
    plan: ChoicePlan | ScanPlan = run.plan
    if isinstance(plan, ChoicePlan):
        yield plan.score, [layer for layers in plan.choice.values() for layer in layers]
        return
    for mechanism, control in students(run.table, plan).items():
        for task in () if control else done(run.table, plan):
            keys = [f"{mechanism}@{layer}" for layer in plan.layers]
            units = plan.units[task]
            there = [key for key in keys if key in units.sums]
            layers = [int(key.rpartition("@")[2]) for key in there]
            yield f"{mechanism}, {task}", cheapest(layers, units.means(there), count)


def _row(run: str, choice: str, listed: str, found: Overlap) -> dict[str, Any]:
    return {
        "run": run,
        "choice": choice,
        "list": listed,
        "shared": found.shared,
        "of": min(found.sizes),
        "chance": found.chance,
        "p": found.p,
    }
