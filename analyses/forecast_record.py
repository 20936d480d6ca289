"""What is known of a swap before anything is trained, and what each stage of repair then recovered: a row per swap.

    python analyses/forecast_record.py              about 28 minutes of CPU, one thread; goes on where it was stopped

Eight layers of SmolLM2 by five attention mechanisms. First the numbers of `before` and `controls` are read: what the
swap and its controls cost on held-out text, and what the module does on the teacher's own input. Then the cell runs the
stages closed-form and local, some also block, all on the same text with the same steps. Then four swaps in layers
between those, two with mechanisms that are not among the five and one with another argument. Trained on `sotu`,
evaluated on `wiki`; the numbers of the module are read on other documents of it than those that are evaluated on.
Writes figures/forecast_score/rows/; `forecast_score.py` says what they are worth.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mismatch
from mismatch.stages.opening import Opened
from mismatch.stages.repair.config import RepairConfig
from mismatch.stages.repair.judge import Judge, Selection
from mismatch.stages.repair.ladder import Ladder, Texts
from mismatch.stages.repair.ladder_stages import block_window_kl as stream
from mismatch.stages.repair.ladder_stages.activation_store import Example, Store
from mismatch.stages.repair.ladder_stages.closed_form import Sums
from mismatch.stages.repair.ladder_stages.module_pair import ModulePair, watch
from mismatch.stages.repair.texts import RepairTexts, read_texts
from mismatch.stages.repair.trainable import trainable

LAYERS = (2, 10, 18, 26, 6, 14, 22, 12)
"""In the order in which they are run: stopped half-way, the record still spans the depth."""
MECHANISMS = {
    "infini": "infini(segment=64)",
    "nope": "nope",
    "sliding_window": "sliding_window(window=64)",
    "linear_attention": "linear_attention(feature_map=hedgehog)",
    "gated_deltanet": "gated_deltanet",
}
CONTROLS = ("zero", "mean", "linear")
STAGES = ("closed-form", "local", "block")
FRESH = {
    (8, "mamba2"): "mamba2",
    (20, "infini"): "infini(segment=64)",
    (16, "sliding_window_sink"): "sliding_window(window=32, sinks=1)",
    (4, "partial_rope"): "partial_rope(fraction=0.25)",
}
"""Forecast from the others, and in the record of none: by layer and name."""
BLOCK_LAYERS = (2, 10, 18, 26, *(layer for layer, _ in FRESH))
"""Whose cells run the stage block, too."""
SIZES: dict[str, Any] = {
    "train_tokens": 8192,
    "tokens": 2048,
    "val_tokens": 1024,
    "seq_len": 512,
    "epochs": 3,
}
EVERY = (*LAYERS, *(layer for layer, _ in FRESH))
FITTED = 8192
"""Tokens that fit the linear map of `errors`."""
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Towards the map that leaves the output as it is, in means of the diagonal; held-out text chooses."""
DRAWS = 4
"""Times that labels are drawn from the teacher's prediction, for `guess`."""
ROWS = Path(__file__).resolve().parent.parent / "figures" / "forecast_score" / "rows"


@dataclass
class Bench:
    """The teacher and everything that cells share: texts, activations, slopes of the loss, held-out text."""

    teacher: Any
    config: RepairConfig
    read: RepairTexts
    texts: Texts
    folder: Path
    slopes: dict[int, list[Tensor]] = field(default_factory=dict)
    held_out: dict[int, mismatch.HeldOut] = field(default_factory=dict)
    controls: dict[int, dict[str, float]] = field(default_factory=dict)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=Path, default=ROWS, help="folder of the rows")
    rows = parser.parse_args().rows
    rows.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    run_all(rows)


def run_all(rows: Path) -> None:
    """Every cell that has no row yet."""
    cells = {(layer, name): call for layer in LAYERS for name, call in MECHANISMS.items()} | FRESH
    missing = [cell for cell in cells if not _row(rows, *cell).exists()]
    if not missing:
        return
    with tempfile.TemporaryDirectory(prefix="mismatch-") as store:
        bench = prepared(Path(store))
        for layer, name in missing:
            started = time.process_time()
            found = one_cell(bench, layer, name, cells[layer, name])
            found["cpu_seconds"] = time.process_time() - started
            _row(rows, layer, name).write_text(json.dumps(found, indent=2) + "\n")
            print(json.dumps(found), file=sys.stderr, flush=True)


def _row(rows: Path, layer: int, name: str) -> Path:
    return rows / f"{layer:02d}-{name}.json"


def prepared(folder: Path) -> Bench:
    """One pass of the teacher over the training text, one over the validation text."""
    teacher = mismatch.load("smollm2")
    config = _config("layer2:nope", ("closed-form", "local"))
    read = read_texts(Opened(config, teacher=teacher))
    cuts = (read.train, read.validation)
    batches = [[torch.from_numpy(b.ids) for b in cut.batches(config.batch_size)] for cut in cuts]
    key = {
        "model": teacher.info.sha256,
        "train": cuts[0].fingerprint,
        "validation": cuts[1].fingerprint,
    }
    bench = Bench(teacher, config, read, Texts(batches[0], batches[1], key), folder)
    modules = []
    for layer in EVERY:
        path = teacher.layout.slot_path(layer, "attn")
        module = teacher.model.get_submodule(path)
        modules.append(ModulePair(layer, "attn", path, module, module))
        if layer in BLOCK_LAYERS:
            modules.append(stream.block(teacher.layout, layer))
    for text, ids in zip(("train", "look"), batches, strict=True):
        _store(bench, modules, ids, text).fill()
    bench.slopes = slopes(teacher, bench.texts.look)
    return bench


def _config(swap: str, stages: tuple[str, ...]) -> RepairConfig:
    return RepairConfig(
        model="smollm2", swap=(swap,), stages=stages, controls=(), max_minutes=None, min_gain=0.0,
        trace_tokens=0, probes=(), self_generated=0.0, **SIZES,
    )  # fmt: skip


def _store(bench: Bench, modules: list[ModulePair], ids: Any, text: str) -> Store:
    """As the ladder makes it, so that it finds what is stored."""
    return Store(
        bench.teacher.layout,
        modules,
        ids,
        folder=bench.folder,
        budget=4e9,
        key={**bench.texts.key, "text": text, "inputs": "teacher"},
    )


def one_cell(bench: Bench, layer: int, name: str, call: str) -> dict[str, Any]:
    """Numbers before training, then the repair."""
    teacher, swap_text = bench.teacher, f"layer{layer}:{call}"
    if layer not in bench.held_out:
        bench.held_out = {layer: mismatch.HeldOut(teacher.layout, bench.read.evaluation, layer, 2)}
        bench.controls = {layer: controls(bench, layer)}
    held_out, known = bench.held_out[layer], dict(bench.controls[layer])
    stages = STAGES if layer in BLOCK_LAYERS else STAGES[:2]
    config = _config(swap_text, stages)
    swap = _swap(bench, swap_text)
    mine = trainable(teacher.layout, config, swap)
    known |= before(bench, mine.parts[0])
    judge = Judge(held_out, Selection(why_not="nothing is undone for it"))
    ladder = Ladder(
        config, teacher.layout, mine, judge, bench.texts, folder=bench.folder, state=None,
        fingerprint={}, stopping=lambda: False, say=lambda line: print(line, file=sys.stderr),
    )  # fmt: skip
    ladder.begin()
    ran = ladder.run()
    found = {"layer": layer, "mechanism": name, "swap": swap_text, "kl": ran[0].kl, **known}
    closed = 0.0
    for stage in ran[1:]:
        closed = (
            stage.gap_closed if stage.kept else closed
        )  # undone: what was there before it stands
        found[f"closed {stage.name}"] = closed
        found[f"seconds {stage.name}"] = stage.seconds
    return found


def _swap(bench: Bench, text: str) -> Any:
    return mismatch.swap(
        bench.teacher, text, calibration_data=bench.read.documents, seq_len=SIZES["seq_len"]
    )


def controls(bench: Bench, layer: int) -> dict[str, float]:
    """KL of each control in this slot, on the evaluation text."""
    found = {}
    for control in CONTROLS:
        student = _swap(bench, f"layer{layer}.attn:{control}")
        found[f"kl_{control}"] = bench.held_out[layer].evaluate(student.layout).kl.mean().value
    return found


@torch.no_grad()
def before(bench: Bench, part: ModulePair) -> dict[str, float]:
    """What the module does on the teacher's own input: errors, and medians over tokens behind the first."""
    texts, layout = bench.texts, bench.teacher.layout
    found = errors(
        part, _store(bench, [part], texts.train, "train"), _store(bench, [part], texts.look, "look")
    )
    ratios: dict[str, list[Tensor]] = {
        "turn": [],
        "size": [],
        "step": [],
        "step_student": [],
        "step_error": [],
    }
    guess, block = 0.0, stream.block(layout, part.layer)
    for index, ids in enumerate(texts.look):
        seen = watch(layout, [block.path, part.path], ids, last=part.layer)
        onto, (x, y, call) = seen[block.path][0], seen[part.path]
        s = call(part.student, x)
        theirs, ours, wrong, stood = (t[:, 1:].norm(dim=-1) for t in (y, s, s - y, onto))
        for name, value in (
            ("turn", 1 - torch.cosine_similarity(s, y, dim=-1)[:, 1:]),
            ("size", ours / theirs),
            ("step", theirs / stood),
            ("step_student", ours / stood),
            ("step_error", wrong / stood),
        ):
            ratios[name].append(value.flatten())
        slope = bench.slopes[part.layer][index]
        guess += float(0.5 * (slope * (s - y)).sum((-1, -2)).square().mean()) / ids.numel()
    found |= {name: float(torch.cat(values).median()) for name, values in ratios.items()}
    return {**found, "guess": guess / len(texts.look)}


@torch.no_grad()
def errors(part: ModulePair, store: Store, held: Store) -> dict[str, float]:
    """`local_error` of a part and `mapped_error`, what the best linear map of its own output leaves of it, on held-out
    inputs of the teacher; errors as in `mismatch.stages.repair.ladder_stages.loss`.

    Args:
        part: as swapped.
        store: `FITTED` tokens of it fit the map.
        held: of another source.
    """
    fit, check = Sums(), Sums()
    count = math.ceil(FITTED / store.batches[0].numel())
    for index in range(min(count, len(store.batches))):
        fit.add(*_pair(part, store.batch(part, index)))
    for example in held.batches_of(part):
        check.add(*_pair(part, example))
    size = fit.hh.diagonal().mean()
    eye = torch.eye(len(fit.hh), dtype=torch.float64, device=fit.hh.device)
    asis = eye[:, :-1]
    maps = (
        torch.linalg.solve(fit.hh + ridge * size * eye, fit.hy + ridge * size * asis)
        for ridge in RIDGES
    )
    local = check.error(asis)
    return {"local_error": local, "mapped_error": min(local, *(check.error(one) for one in maps))}


def _pair(part: ModulePair, example: Example) -> tuple[Tensor, Tensor]:
    """The part's output with a one behind it, for the bias, and the teacher's."""
    s = example.call(part.student, example.x).to(example.y.dtype)
    return torch.cat([s, torch.ones_like(s[..., :1])], dim=-1), example.y


def slopes(teacher: Any, look: Any) -> dict[int, list[Tensor]]:
    """By layer and batch, d log p(y) / d attn_out, y drawn from the model's own prediction: `draws pos d`."""
    layout = teacher.layout
    generator = torch.Generator().manual_seed(0)
    wanted = [
        tap for layer in EVERY for tap in mismatch.taps(layout, layer) if tap.site == "attn_out"
    ]
    start = layout.model.get_input_embeddings().register_forward_hook(
        lambda _module, _args, out: out.requires_grad_()
    )
    found: dict[int, list[Tensor]] = {layer: [] for layer in EVERY}
    for ids in look:
        seen: dict[int, Tensor] = {}
        final = mismatch.run_tapped(layout, ids, wanted, partial(_keep, seen))
        log_p = layout.model.get_output_embeddings()(final).log_softmax(-1)[0]
        drawn: dict[int, list[Tensor]] = {layer: [] for layer in EVERY}
        for _ in range(DRAWS):
            labels = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
            score = log_p.gather(-1, labels).sum()
            grads = torch.autograd.grad(score, [seen[n] for n in EVERY], retain_graph=True)
            for layer, grad in zip(EVERY, grads, strict=True):
                drawn[layer].append(grad[0])
        for layer in EVERY:
            found[layer].append(torch.stack(drawn[layer]))
    start.remove()
    return found


def _keep(seen: dict[int, Tensor], tap: Any, x: Tensor) -> None:
    seen[tap.layer] = x


if __name__ == "__main__":
    main()
