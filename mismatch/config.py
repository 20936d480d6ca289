"""What a command is told: typed, strict, and written into the run folder so that the run can be repeated.

One class a command (`mismatch/stages/*/config.py`) over what they share, which is here. Each field is described once.
The flags of the command, their help, the keyword arguments of the function, the checks of a YAML file and the errors
are all made from these annotations and the texts under them (read by `mismatch.registry.card`).
Precedence: flags > file > defaults. An unknown key or a wrong type is an error, never ignored.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import yaml

from mismatch import spec
from mismatch.errors import ConfigError
from mismatch.registry import Registry, card, did_you_mean, mechanisms
from mismatch.registry.card import REQUIRED, Arg

ELSEWHERE = ("output", "run_name", "fail_on", "activations_dir")
"""Fields that change where a run lies and how it exits, but none of its numbers."""

C = TypeVar("C", bound="RunConfig")


MODEL = ("model", "revision", "dtype", "device", "device_map")
OUTPUT = ("output", "run_name")
DANGEROUS = ("trust_remote_code", "allow_pickle")
"""Fields that every command has, as its help groups them."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every command has that runs a changed model beside the teacher."""

    groups: ClassVar[dict[str, tuple[str, ...]]] = {}
    """Title -> fields, as the help groups those of one command; a test asks that none is missing."""
    examples: ClassVar[dict[str, str]] = {"model": "--model smollm2"}
    """How the fields are given that must be given."""

    model: str
    """A fetched name, a folder, or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """dtype of the models. Metrics are always summed in float64."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto takes the first accelerator there is."""
    device_map: str | None = None
    """auto spreads a model over several devices (accelerate)."""
    trust_remote_code: bool = False
    """Run Python code that comes with a model."""
    allow_pickle: bool = False
    """Load pickled weights, which can run code."""

    data: str = "wiki"
    """Evaluation text, behind every reported number: a fetched name, a .txt or .jsonl file, or a folder."""
    calibration_tokens: Annotated[int, ">= 1"] = 2048
    """Tokens that mechanisms and controls set themselves from, where they do."""
    seq_len: Annotated[int, ">= 2"] = 1024
    """Tokens per window. A window never mixes documents."""
    batch_size: Annotated[int, ">= 1"] = 4
    """Windows per forward pass."""

    controls: tuple[str, ...] = ("zero", "mean")
    """Controls that are measured on the same tokens; none for no control."""
    seed: Annotated[int, ">= 0"] = 0
    """Random seed."""

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
    def subject(self) -> str:
        """What the run is about, in canonical form: goes into its name and its manifest."""
        raise NotImplementedError

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

    def settings(self) -> dict[str, Any]:
        """What config.yaml holds and the run id hashes: all that changes a number, not where the run lies."""
        return {name: value for name, value in self.to_dict().items() if name not in ELSEWHERE}

    def to_yaml(self) -> str:
        """The whole config; `mismatch COMMAND --config FILE` with it repeats the run."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=1000)

    def fingerprint(self) -> str:
        """16 hex digits of all that determines the numbers. Two spellings of one swap have one fingerprint."""
        text = json.dumps(self.settings() | self.canonical(), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def canonical(self) -> dict[str, str]:
        """Fields that can be spelt in several ways, in the one way that counts."""
        return {}


@dataclass(frozen=True, kw_only=True)
class CalibratedConfig(RunConfig):
    """A command whose calibration text is a text of its own."""

    calibration_data: str = "sotu"
    """Calibration text, which mechanisms and controls set themselves from. Never overlaps with the evaluation text."""


@dataclass(frozen=True, kw_only=True)
class SwapConfig(RunConfig):
    """A command about one swap."""

    examples: ClassVar[dict[str, str]] = {
        **RunConfig.examples,
        "swap": '--swap "layer12:infini"',
    }

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

    @property
    def subject(self) -> str:
        return spec.format(self.swap_spec)

    def canonical(self) -> dict[str, str]:
        return {"swap": self.subject}


def fields(kind: type[RunConfig]) -> dict[str, Arg]:
    """Name, type, bounds, default and text of each field of a command's config."""
    return _fields(f"{kind.__module__}:{kind.__name__}")


@functools.cache
def _fields(target: str) -> dict[str, Arg]:
    return {arg.name: arg for arg in card.fields(target)}


def load(
    kind: type[C], file: str | Path | None = None, flags: Mapping[str, Any] | None = None
) -> C:
    """Flags over file over defaults.

    Args:
        kind: the config class of a command.
        file: YAML, such as the `config.yaml` of a run folder.
        flags: values by field name; None means not given. Text is read as the field's type.

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
