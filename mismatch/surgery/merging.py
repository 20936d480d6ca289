"""Merge a swapped model into a plain one: what was added to a matrix, or stands in its place as factors, becomes one.

    lora, qlora      W + s B A, with dora the lengths too; a matrix that was kept in few bits is a full one then
    low_rank_mlp     up down
    identity, random the module that they wrap

The result is an ordinary transformers model without mismatch in it: `save_pretrained` writes a folder that loads
anywhere. A mechanism that computes something else than the model's own modules do cannot be merged.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from mismatch.errors import SurgeryError
from mismatch.mechanisms.base import Mechanism
from mismatch.mechanisms.parts.linears import linear_layers, put
from mismatch.models.private import private_copy
from mismatch.models.quantised import as_conv1d, bits, settings_of
from mismatch.models.skeleton import skeleton
from mismatch.registry import mechanisms
from mismatch.runs.files import guarded, whole_folder
from mismatch.surgery import saving
from mismatch.surgery.codes import of_codes

if TYPE_CHECKING:
    from mismatch.models.layout import CausalLM


def merged(model: CausalLM) -> CausalLM:
    """The plain model that computes the same; `model` stays as it is.

    Raises:
        SurgeryError: nothing is swapped in it; a mechanism that cannot be merged; tensors of somebody else's inside.
    """
    if not isinstance(model, saving.Swapped):
        raise SurgeryError(f"nothing is swapped in this {type(model).__name__}")
    _refuse(model)
    plain = private_copy(model)
    while (found := _outermost(plain)) is not None:
        path, mechanism = found
        put(plain, path, mechanism.merged())
    saving.unmark(plain)
    for module in plain.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [k for k, hook in hooks.items() if _ours(hook)]:
                del hooks[key]
    _as_built(plain)
    return plain


def save(model: CausalLM, path: str | Path, *, tokenizer: Any = None) -> Path:
    """Write the merged model into a new folder, whole or not at all.

    Raises:
        SurgeryError: as `merged`.
        OutputError: the folder exists and is not empty.
        RunError: it cannot be written.
    """
    path = Path(path).expanduser()
    saving.check_free(path, overwrite=False)
    plain = merged(model)
    with whole_folder(path) as folder, guarded("write", folder):
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        plain.save_pretrained(folder)
    return path


def _refuse(model: nn.Module) -> None:
    known = mechanisms()
    can = [name for name in known.names() if known.card(name).facts.get("merges")]
    stuck = [m for m in model.modules() if isinstance(m, Mechanism) and not m.merges]
    if stuck:
        first = stuck[0]
        others = f", and {len(stuck) - 1} more" if stuck[1:] else ""
        raise SurgeryError(
            f"`{type(first).__name__}` at {first.context.where}{others}: no module of the model's own computes what it "
            "computes, so it cannot be merged",
            hint=f"{', '.join(can)} can be; student.save() writes a checkpoint of every mechanism",
        )


def _outermost(model: nn.Module) -> tuple[str, Mechanism] | None:
    return next(((p, m) for p, m in model.named_modules() if isinstance(m, Mechanism)), None)


def _ours(hook: Any) -> bool:
    hook = getattr(hook, "func", hook)  # of a partial
    return getattr(hook, "__module__", "").partition(".")[0] == __name__.partition(".")[0]


def _as_built(plain: CausalLM) -> None:
    """Layers of the classes, and a config of the layers, that transformers builds from this config.

    Raises:
        SurgeryError: the model has other tensors than that.
    """
    config: PretrainedConfig = plain.config
    wanted = skeleton(config)
    turned = {p for p, layer in linear_layers(wanted).items() if isinstance(layer, Conv1D)}
    full = []
    for path, layer in linear_layers(plain).items():
        if bits(layer.weight):
            continue
        full.append(path)
        if path in turned and isinstance(layer, nn.Linear):
            put(plain, path, as_conv1d(layer))
    if getattr(config, "quantization_config", None):
        settings_of(config).llm_int8_skip_modules = full
    state = plain.state_dict()
    codes = of_codes(state)
    if other := {n for n in state if n not in codes} ^ {
        n for n in wanted.state_dict() if n not in codes
    }:
        raise SurgeryError(
            f"{len(other)} tensors of this model are not those of a plain {type(plain).__name__}, first {min(other)}",
            hint="merge what peft put into it (`merge_and_unload`) first",
        )
