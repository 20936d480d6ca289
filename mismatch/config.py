"""What a command is told: typed, strict, and written into the run folder so that the run can be repeated.

One class a command (`TraceConfig`, `ProbeConfig`) over what they share. Each field is described once, here. The flags
of the command, their help, the checks of a YAML file and the errors are all made from these annotations and the texts
under them (read by `mismatch.registry.card`).
Precedence: flags > file > defaults. An unknown key or a wrong type is an error, never ignored.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml

from mismatch import spec
from mismatch.errors import ConfigError
from mismatch.registry import Registry, card, did_you_mean, mechanisms, metrics, probes
from mismatch.registry.card import REQUIRED, Arg

ELSEWHERE = ("output", "run_name", "fail_on", "store")
"""Fields that change where a run lies and how it exits, but none of its numbers."""

WINDOWS = 4
"""Windows of text per sample of a probe: a decoder learns on three quarters of them and is judged on the rest."""

C = TypeVar("C", bound="RunConfig")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every command says that runs a changed model beside the original."""

    examples = {"model": "--model smollm2"}  # of the fields that must be given

    model: str
    """A fetched name, a folder, or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """Number format of the models. Metrics are always summed in float64."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto takes the first accelerator there is."""
    device_map: str | None = None
    """auto spreads a model over several devices (accelerate)."""
    trust_remote_code: bool = False
    """Run Python code that comes with a model."""
    allow_pickle: bool = False
    """Load pickled weights, which can run code."""

    data: str = "wiki"
    """Held-out text: a fetched name, a .txt or .jsonl file, or a folder."""
    calibration: str = "sotu"
    """Text for swaps that need calibration. Never overlaps with the held-out text."""
    calibration_tokens: Annotated[int, ">= 1"] = 2048
    """Tokens to calibrate on."""
    batch_size: Annotated[int, ">= 1"] = 4
    """Windows per forward pass."""

    controls: tuple[str, ...] = ("zero", "mean")
    """Controls that run along on the same tokens; none for no control."""
    seed: Annotated[int, ">= 0"] = 0
    """Of every random choice."""

    output: str | None = None
    """Run folder to make. By default a new folder under runs/."""
    run_name: str | None = None
    """Name of the run folder under runs/, in place of one made from time, model and swap."""

    def __post_init__(self) -> None:
        for name, arg in fields(type(self)).items():
            object.__setattr__(self, name, _accept(arg, getattr(self, name), f"`{name}`"))
        if self.output is not None and self.run_name is not None:
            raise ConfigError(
                f"`output` ({self.output}) and `run_name` ({self.run_name}) both name the run folder",
                hint="give one of them",
            )
        self._known(self.controls, mechanisms())

    @staticmethod
    def _known(names: tuple[str, ...], registry: Registry) -> None:
        for index, name in enumerate(names):
            registry.target(name, ConfigError)
            if name in names[:index]:
                raise ConfigError(f"the {registry.kind} `{name}` is named twice")

    @property
    def folder(self) -> Path | None:
        """The run folder that was asked for; None leaves its name to the run."""
        if self.output:
            return Path(self.output)
        return Path("runs", self.run_name) if self.run_name else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and YAML."""
        values = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def to_yaml(self) -> str:
        """The whole config; `mismatch trace --config FILE` with it repeats the run."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=1000)

    def fingerprint(self) -> str:
        """16 hex digits of all that determines the numbers. Two spellings of one swap have one fingerprint."""
        values = {k: v for k, v in self.to_dict().items() if k not in ELSEWHERE}
        text = json.dumps(values | self.canonical(), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def canonical(self) -> dict[str, str]:
        """Fields that can be spelt in several ways, in the one way that counts."""
        return {}


@dataclass(frozen=True, kw_only=True)
class SwapConfig(RunConfig):
    """A command about one swap."""

    examples = {**RunConfig.examples, "swap": '--swap "layer12:infini"'}

    swap: tuple[str, ...]
    """What to replace: target:mechanism, such as "layer12:infini". May be repeated."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.swap:
            raise ConfigError("there is no swap", hint='give one, such as --swap "layer12:infini"')
        spec.check(self.swap_spec)

    @property
    def swap_spec(self) -> spec.Spec:
        """The parsed swap."""
        return spec.parse(self.swap)

    def canonical(self) -> dict[str, str]:
        return {"swap": spec.format(self.swap_spec)}


@dataclass(frozen=True, kw_only=True)
class TraceConfig(SwapConfig):
    """What `mismatch trace` is told."""

    tokens: Annotated[int, ">= 1"] = 8192
    """Held-out tokens to measure on."""
    seq_len: Annotated[int, ">= 2"] = 1024
    """Tokens per window. A window never mixes documents."""
    metrics: tuple[str, ...] | None = None
    """Metrics to compute; all but js when not given. Named metrics of covariances are taken behind every block."""
    moment_tokens: Annotated[int, ">= 1"] = 2048
    """Tokens that feed the metrics of second moments (cka, frechet, ...)."""
    probes: tuple[str, ...] = ()
    """Probes to run behind the trace, with short inputs, into the same table (see `mismatch probe`)."""
    backend: Literal["hooks", "nnsight"] = "hooks"
    """How sites are read. Both give the same bits."""
    fail_on: Literal["low", "medium", "high"] | None = None
    """Exit with 3 when a finding is at least this severe."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._known(self.metrics or (), metrics())
        self._known(self.probes, probes())
        if self.metrics == ():
            raise ConfigError("`metrics` is empty", hint="leave it out to compute the usual ones")


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(SwapConfig):
    """What `mismatch probe` is told."""

    controls: tuple[str, ...] = ("zero",)
    """Controls that get the same inputs; none for no control."""
    probes: tuple[str, ...] | None = None
    """Probes to run; all of them when not given."""
    samples: Annotated[int, ">= 2"] = 8
    """Prompts of each kind, and windows of text. With fewer than 8 the intervals are too narrow."""
    seq_len: Annotated[int, ">= 32"] = 160
    """Tokens per window of held-out text."""
    lengths: tuple[str, ...] = ("256", "512", "1024")
    """Tokens of the passkey prompts."""
    depths: tuple[str, ...] = ("0.1", "0.5", "0.9")
    """Where the passkey stands: 0 is the start of the prompt, 1 its end."""
    gate_lr: float | None = None
    """Peak learning rate that is planned for gates (cosine schedule): says how far they can move."""
    gate_steps: Annotated[int, ">= 1"] = 1000
    """Steps of that plan."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._known(self.probes or (), probes())
        if self.probes == ():
            raise ConfigError("`probes` is empty", hint="leave it out to run all of them")
        for name, kind, fits in (
            ("lengths", int, lambda x: x >= 1),
            ("depths", float, lambda x: 0 <= x <= 1),
        ):
            given = getattr(self, name)
            if not given:
                raise ConfigError(f"`{name}` is empty", hint="leave it out for the usual ones")
            if len(set(given)) < len(given):
                raise ConfigError(f"`{name}` names a value twice: {', '.join(given)}")
            for text in given:
                if not _reads(kind, fits, text):
                    what = "whole numbers >= 1" if kind is int else "numbers in 0..1"
                    raise ConfigError(f"`{name}` must be {what}, got `{text}`")

    @property
    def tokens(self) -> int:
        """Held-out tokens: windows for training a decoder, and as many again as there are samples for judging it."""
        return WINDOWS * self.samples * self.seq_len

    @property
    def prompt_lengths(self) -> tuple[int, ...]:
        """Tokens of the passkey prompts."""
        return tuple(int(text) for text in self.lengths)

    @property
    def prompt_depths(self) -> tuple[float, ...]:
        """Where the passkey stands in them."""
        return tuple(float(text) for text in self.depths)


def _reads(kind: type, fits: Callable[[Any], bool], text: str) -> bool:
    try:
        return fits(kind(text))
    except ValueError:
        return False


@functools.cache
def fields(kind: type[RunConfig] = TraceConfig) -> dict[str, Arg]:
    """Name, type, bounds, default and text of each field of a command's config."""
    return {arg.name: arg for arg in card.fields(f"{kind.__module__}:{kind.__name__}")}


def load(
    file: str | Path | None = None,
    flags: Mapping[str, Any] | None = None,
    kind: type[C] = TraceConfig,
) -> C:
    """Flags over file over defaults.

    Args:
        file: YAML, such as the `config.yaml` of a run folder.
        flags: values by field name; None means not given. Text is read as the field's type.
        kind: of which command.

    Raises:
        ConfigError: no such file, not YAML, an unknown key, a wrong type or value, no model.
        SpecError: a wrong swap.
    """
    known = fields(kind)
    values: dict[str, Any] = {} if file is None else _read(Path(file), known)
    for name, value in (flags or {}).items():
        if value is not None:
            flag = "--" + name.replace("_", "-")
            values[name] = _accept(known[name], _from_text(known[name], value), f"`{flag}`")
    for name, arg in known.items():
        if arg.default is REQUIRED and name not in values:
            raise ConfigError(
                f"there is no {name}", hint=f"give one, such as {kind.examples[name]}"
            )
    return kind(**values)


def _accept(arg: Arg, value: Any, where: str) -> Any:
    try:
        return arg.accept(value)
    except ValueError:
        known = arg.choices or ()
        hint = did_you_mean(value, map(str, known)) if known and isinstance(value, str) else None
        got = f"`{value}`" if isinstance(value, str) else repr(value)
        raise ConfigError(f"{where} must be {arg.allowed}, got {got}", hint=hint) from None


def _from_text(arg: Arg, value: Any) -> Any:
    """What a flag's text means. Text that does not fit is left for `_accept` to refuse."""
    if arg.type == "list" and arg.name != "swap" and isinstance(value, str):
        return () if value == "none" else tuple(part.strip() for part in value.split(","))
    if arg.optional and value == "none":
        return None
    if arg.type in ("int", "float") and isinstance(value, str):
        many = re.fullmatch(r"(\d+)([kM])", value)  # 64k, 1M: counts of tokens
        try:
            if many:
                return int(many[1]) * {"k": 1000, "M": 1_000_000}[many[2]]
            return {"int": int, "float": float}[arg.type](value)
        except ValueError:
            return value
    return value


class _Loader(yaml.SafeLoader):
    """A key given twice is an error; plain YAML would keep the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"`{key}` is there twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _read(path: Path, known: Mapping[str, Arg]) -> dict[str, Any]:
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the config {path} is not UTF-8 text") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f", line {mark.line + 1}"
        raise ConfigError(
            f"the config {path} is not YAML{line}: {getattr(error, 'problem', error)}"
        ) from error
    if not isinstance(found, dict):
        raise ConfigError(
            f"the config {path} must be a list of `key: value`, got {type(found).__name__}",
            hint="see the config.yaml of any run folder",
        )
    values = {}
    for key, value in found.items():
        if key not in known:
            raise ConfigError(f"unknown key `{key}` in {path}", hint=did_you_mean(str(key), known))
        arg = known[key]
        if key == "swap":
            value = _swaps(value, path)
        elif arg.type == "list" and isinstance(value, str):
            value = _from_text(arg, value)
        values[key] = _accept(arg, value, f"`{key}` in {path}")
    return values


def _swaps(value: Any, path: Path) -> Any:
    """YAML makes a mapping of the unquoted text `layer12: infini`: what was meant is clear."""
    items = value if isinstance(value, list) else [value]
    texts = []
    for item in items:
        if isinstance(item, dict) and all(
            isinstance(text, str) for text in (*item, *item.values())
        ):
            texts += [f"{target}:{call}" for target, call in item.items()]
        elif isinstance(item, str):
            texts.append(item)
        else:
            raise ConfigError(
                f"`swap` in {path} must be text, got {item!r}",
                hint='write `swap: ["layer12:infini"]`',
            )
    return texts
