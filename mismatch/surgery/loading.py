"""Load a checkpoint of a swapped model (written by `mismatch.surgery.saving`).

    plain model    transformers loads the folder as the model that was swapped; it handles devices, dtypes and buffers.
                   Replaced modules are random at this point
    rebuild        the swaps are made again, in order, on real tensors, so that everything is there that a mechanism
                   computes and does not save (on transformers' meta device it would hold garbage). What was measured
                   on calibration text is a placeholder
    fill           every tensor of the replaced modules is read from the file, bit for bit. A missing tensor, one too
                   many, or one of another shape is an error, never a warning

`load` is what `mismatch.load` does with any model name. `MismatchConfig` and `MismatchForCausalLM` are what
`AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)` finds in the folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers

from mismatch import spec
from mismatch.errors import MismatchError, ModelError, UsageError
from mismatch.forward.measured import measured
from mismatch.forward.verify import prove, prove_student
from mismatch.models import load as models
from mismatch.models.folder import check_weights, read_config_file, refuse_quantised
from mismatch.models.layout import Layout
from mismatch.models.load import ModelInfo
from mismatch.models.quantised import settle
from mismatch.models.resolve import Located, from_hub, locate
from mismatch.models.skeleton import skeleton as of_config_alone
from mismatch.models.swap_record import MODEL_TYPE, Record, of_config, read
from mismatch.models.target import as_target
from mismatch.models.tokenizer import check_vocabulary
from mismatch.runs.plan import Replaced
from mismatch.surgery.codes import without_codes
from mismatch.surgery.filling import fill
from mismatch.surgery.operate import layout_of, operate, placed
from mismatch.surgery.saving import Swapped

if TYPE_CHECKING:
    from mismatch.models.layout import CausalLM


LOADED = "the model that was handed over"
"""For errors."""


class Measurable(NamedTuple):
    """A model that can be run and measured."""

    model: CausalLM
    tokenizer: Any
    layout: Layout
    info: ModelInfo


def load(
    name_or_path: str | Path | Located,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    device_map: str | dict[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    tokenizer: Any = None,
) -> Measurable:
    """Load a plain model or a checkpoint, and prove its layout by a forward pass.

    Args:
        name_or_path: see `mismatch.models.resolve`.
        dtype: see `mismatch.models.load.load`; None is float32 for a plain model, and the saved dtype for a checkpoint.
        device, device_map, revision, allow_pickle: see `mismatch.models.load.load`.
        trust_remote_code: run code that comes with a model; import a class that a checkpoint names by its path.
        tokenizer: of the same model, where it was loaded already.

    Raises:
        ModelError: no such model, or weights that are not what its config says.
        LayoutError: an unknown family, or a model that does not fit its family's layout.
    """
    source = locate(name_or_path, revision, code=trust_remote_code)
    folder = source.folder
    found = read(folder)
    if found is None:
        model, tokenizer, info = models.load(
            source,
            dtype=dtype or "float32",
            device=device,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
            tokenizer=tokenizer,
        )
        layout = Layout.of(model)
        prove(layout)
        return Measurable(model, tokenizer, layout, info)
    target = as_target(device, device_map)
    wanted = models.as_dtype(dtype or "auto")
    _check_names(found, folder, trust_remote_code)
    if source.hub:
        folder = from_hub(source.name, source.revision, weights=True)
    files = check_weights(folder)
    tokenizer = tokenizer or models.load_tokenizer(folder)
    config = models.plain_config(read_config_file(folder), found, folder)
    plain = _plain(folder, config, target, dtype=wanted)
    layout = Layout.of(plain.eval().requires_grad_(False))
    prove(layout)
    whole, replaced = _restored(layout, found, folder, files, exact=wanted == "auto")
    model = whole.model.requires_grad_(False)
    prove_student(whole, whole, _first(replaced))  # no module carries state between calls
    swapped = Located(source.name, folder, _note(found))
    info = models.check_loaded(model, tokenizer, folder, files, swapped)
    return Measurable(model, tokenizer, whole, info)


def of_loaded(model: CausalLM, tokenizer: Any) -> Measurable:
    """A model that the caller loaded, its layout proven by a forward pass. Its mode stays.

    Raises:
        UsageError: something else than a model and its tokenizer.
        ModelError: it has no weights, returns tuples, or has fewer rows than its tokenizer has tokens.
        LayoutError: an unknown family, or a model that does not fit its family's layout.
    """
    _check_loaded(model, tokenizer)
    refuse_quantised(model.config.to_dict(), LOADED)
    with measured(model):
        settle(model)
        info = models.describe(model)
        layout = layout_of(model)
        if not isinstance(model, Swapped):  # that of a swapped model was proven before the swap
            prove(layout)
    return Measurable(model, tokenizer, layout, info)


def _check_loaded(model: Any, tokenizer: Any) -> None:
    fits = isinstance(model, transformers.PreTrainedModel)
    cuts = tokenizer is None or callable(tokenizer)  # without one, what reads no text can be done
    if not fits or not cuts or isinstance(tokenizer, torch.nn.Module):
        given = ", ".join("None" if x is None else type(x).__name__ for x in (model, tokenizer))
        raise UsageError(
            f"a loaded model is given as (model, tokenizer), got ({given})",
            hint="the model is a transformers model, the tokenizer the one it was trained with: "
            "AutoTokenizer.from_pretrained(...)",
        )
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        raise ModelError(
            f"{LOADED} has tensors without values: they lie on the meta device, or were offloaded",
            hint="load it with its weights: AutoModelForCausalLM.from_pretrained(...)",
        )
    if not model.config.return_dict:
        raise ModelError(
            f"{LOADED} returns tuples, and what stands where in them differs between families",
            hint="set model.config.return_dict = True",
        )
    if hasattr(tokenizer, "__len__"):
        check_vocabulary(model, tokenizer, LOADED)


def skeleton(
    found: tuple[transformers.PretrainedConfig, Located], *, trust_remote_code: bool = False
) -> Layout:
    """The model without its weights, on the meta device; of a checkpoint with its swaps.

    Args:
        found: from `mismatch.models.load.read_config`.
        trust_remote_code: import a class that a checkpoint names by its module.

    Raises:
        ModelError: a checkpoint that cannot be rebuilt.
        LayoutError: an unknown family.
    """
    layout, record = plain_skeleton(found, trust_remote_code=trust_remote_code)
    return layout if record is None else rebuilt(layout, record, found[1].folder).layout


def bare(config: transformers.PretrainedConfig) -> Layout:
    """The model of a config, without weights and without swaps.

    Raises:
        LayoutError: an unknown family.
    """
    return Layout.of(of_config_alone(config))


def plain_skeleton(
    found: tuple[transformers.PretrainedConfig, Located], *, trust_remote_code: bool = False
) -> tuple[Layout, Record | None]:
    """As `skeleton`, without the swaps of a checkpoint, and with their record; None: it is a plain model.

    Raises:
        ModelError: a record that cannot be read, or names a class that is not trusted.
        LayoutError: an unknown family.
    """
    config, source = found
    layout = bare(config)
    record = read(source.folder)
    if record is not None:
        _check_names(record, source.folder, trust_remote_code)
    return layout, record


class MismatchConfig(transformers.PretrainedConfig):
    """The class that AutoConfig finds. It makes the config of the plain model: a swapped llama is a llama."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The plain model's config, with `auto_map`, so that AutoModel calls the class below."""
        where = config_dict.get("_name_or_path", "this checkpoint")
        found = of_config(config_dict, where)
        if found is None:
            raise ModelError(f"{where} is not a checkpoint of mismatch")
        return models.plain_config(config_dict, found, where, **kwargs)


class MismatchForCausalLM:
    """The class that AutoModelForCausalLM finds: a loader. The model is of the plain model's class."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing: a swapped model writes its own `auto_map`."""

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, *args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        """As transformers' own: dtype, device_map, attn_implementation and the hub's options.

        Raises:
            ModelError: as `load`; a quantised load, a state dict or a GGUF file.
        """
        for name in ("quantization_config", "gguf_file", "state_dict"):
            if kwargs.get(name) is not None:
                raise ModelError(f"a checkpoint of a swapped model cannot be loaded with `{name}`")
        with_info = kwargs.pop("output_loading_info", False)
        hub = {name: kwargs.pop(name) for name in _HUB if name in kwargs}
        folder = _local(name_or_path, hub)
        found = read(folder)
        if found is None:
            raise ModelError(f"{folder} is not a checkpoint of mismatch")
        files = check_weights(folder)
        if config is None:
            config = models.plain_config(read_config_file(folder), found, folder)
        kwargs["trust_remote_code"] = False  # the plain model has no code of its own
        dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
        plain = _plain(folder, config, **kwargs)
        exact = dtype in (None, "auto")
        model = _restored(Layout.of(plain), found, folder, files, exact=exact).layout.model
        names = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
        return (model, {name: [] for name in names}) if with_info else model


_HUB = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)


def _local(name_or_path: str | Path, hub: dict[str, Any]) -> Path:
    """The folder of a path or of a hub id."""
    inner = hub.pop("subfolder", "") or ""
    if Path(name_or_path).is_dir():
        return Path(name_or_path, inner)
    from huggingface_hub import snapshot_download

    hub = {name: value for name, value in hub.items() if name != "proxies" and value is not None}
    return Path(snapshot_download(str(name_or_path), **hub), inner)


def _plain(folder: Path, config: Any, target: Any = None, **options: Any) -> CausalLM:
    """The model that was swapped, from the checkpoint's folder: random where a module was replaced."""
    config = without_codes(config, check_weights(folder))
    # Missing tensors are expected here, and drawn at random; `fill` checks them. The caller's random state stays.
    with _quiet(), torch.random.fork_rng(devices=[]):
        return models.pretrained(folder, config, target, ignore_mismatched_sizes=True, **options)[0]


@contextmanager
def _quiet() -> Iterator[None]:
    logging = transformers.utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


class Rebuilt(NamedTuple):
    """A swapped model, and what was replaced in it."""

    layout: Layout
    replaced: tuple[Replaced, ...]


def _restored(
    layout: Layout, found: Record, folder: Path, files: list[Path], *, exact: bool
) -> Rebuilt:
    """The swapped model with its weights."""
    whole = rebuilt(layout, found, folder)
    paths = [one.path for one in whole.replaced]
    fill(whole.layout.model, found, folder, files, paths, exact=exact)
    return whole


def rebuilt(layout: Layout, found: Record, where: Path | str, *, known: int = 0) -> Rebuilt:
    """Make every swap of the record again, on the tensors that are there.

    Args:
        layout: of the plain model.
        found: its swaps.
        where: the folder of the record, for the error.
        known: how many of the first swaps are not listed among what was replaced.

    Raises:
        ModelError: a swap that cannot be made here.
    """
    replaced: list[Replaced] = []
    for at, swap in enumerate(found.swaps):
        try:
            parsed = spec.parse(swap.text)
            student = operate(
                layout,
                placed(parsed, layout),
                spec=spec.format(parsed),
                seed=swap.seed,
                base=found.base,
                restoring=True,
            )
        except MismatchError as error:
            raise ModelError(
                f"{where}: its swap cannot be made again: {error.message}",
                hint=f"it was written by mismatch {found.version}; a mechanism of another package must be "
                "installed, or registered, before it is loaded",
            ) from error
        replaced += student.plan.clauses if at >= known else ()
        layout = layout_of(student.model)
    return Rebuilt(layout, tuple(replaced))


def _check_names(found: Record, folder: Path, trust_remote_code: bool) -> None:
    """A class named by its path is foreign code: importing it runs it.

    Raises:
        ModelError: there is one, and it is not trusted.
    """
    clauses = [clause for swap in found.swaps for clause in spec.parse(swap.text).clauses]
    names = [name for clause in clauses for name in clause.call.foreign()]
    if names and not trust_remote_code:
        raise ModelError(
            f"{folder}: its swap needs `{names[0]}`, a class that is not mismatch's own; importing it runs its code, "
            "which is off",
            hint="read that code first, then --trust-remote-code "
            "(in Python: trust_remote_code=True)",
        )


def _note(found: Record) -> str:
    swaps = "; ".join(spec.format(spec.parse(swap.text)) for swap in found.swaps)
    return f"{found.base.name if found.base else found.model_type} with {swaps}"


def _first(replaced: Iterable[Replaced]) -> int | None:
    return min((one.layer for one in replaced if one.layer is not None), default=None)
