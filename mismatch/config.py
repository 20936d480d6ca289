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
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import yaml

from mismatch import reading, spec
from mismatch.errors import ConfigError, UsageError
from mismatch.registry import Registry, card, did_you_mean, mechanisms
from mismatch.registry.card import REQUIRED, Arg
from mismatch.registry.meaning import meant

MODEL = ("model", "revision", "dtype", "device", "device_map")
OUTPUT = ("output", "run_name")
DANGEROUS = ("trust_remote_code", "allow_pickle")
"""Fields that every command has, as its help groups them."""

ELSEWHERE = (*OUTPUT, "fail_on", "activations_dir", *DANGEROUS)
"""Fields that change none of the numbers: where a run lies, how it exits, what it may run. They are in no file that a
run leaves, so what is trusted is said each time."""

PATHS = (
    *("model", "student", "data", "calibration_data", "train_data"),
    *("output", "activations_dir", "scan", "earlier_run", "selected_by"),
)
"""Fields that can be paths: `~` in front is the home folder."""

C = TypeVar("C", bound="RunConfig")


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
    """auto spreads a model over devices, host memory and disk (accelerate); or a JSON map of its parts."""
    trust_remote_code: bool = False
    """Run Python code that comes with a model."""
    allow_pickle: bool = False
    """Load pickled weights, which can run code."""

    data: str = "wiki"
    """Evaluation text, behind every reported number: a fetched name, a file (.txt, .md, .jsonl, .csv, .tsv, .parquet,
    also with .gz or .zst; token ids as .npy or .bin), a folder of these, hf:NAME[:CONFIG[:SPLIT]], or - for standard
    input."""
    text_field: str | None = None
    """Column or key of rows that holds the text, the messages of a chat, or token ids. When not given the first that is
    there of text, messages, conversations, input_ids."""
    calibration_tokens: Annotated[int, ">= 1"] | None = None
    """Tokens that mechanisms and controls set themselves from, where they do; default: enough for the largest fit among
    them, 2048 for a mean, 32 a channel for the control `linear`."""
    seq_len: Annotated[int, ">= 2"] = 1024
    """Tokens per window; by default no more than the model's context. A window never mixes documents."""
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
        run_name = self.run_name
        if run_name in ("", "..") or (run_name and Path(run_name).name != run_name):
            raise ConfigError(
                f"`run_name` must be the name of a folder under runs/, got `{run_name}`",
                hint="`output` takes a path",
            )
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

    def foreign(self) -> Iterator[tuple[str, str]]:
        """Classes that the settings name by their path, `module:Class`, each with its field."""
        for name, arg in fields(type(self)).items():
            if arg.type == "list" and name != "swap":
                yield from ((name, word) for word in getattr(self, name) or () if ":" in word)

    def fitted(self, context: int | None) -> Self:
        """The settings for a model of this context, None for any: what nobody asked for becomes as long as it allows.

        Raises:
            UsageError: windows that were asked for do not fit.
        """
        if context is None or self.seq_len <= context:
            return self
        if self.seq_len != fields(type(self))["seq_len"].default:
            raise UsageError(
                f"--seq-len {self.seq_len} is longer than the context of {self.model}: {context} tokens",
                hint=f"take --seq-len {context} or less",
            )
        return dataclasses.replace(self, seq_len=context)

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


BUILDS_ON = ("selected_by", "allow_overlap")
"""The fields of commands about a swap that another run chose, as their help groups them."""

SCORED_TEXT = (
    *("data", "text_field", "answers_only", "tokens"),
    *("calibration_data", "calibration_tokens"),
)
"""The fields about text of the commands that can score answers alone, as their help groups them."""


ALL_TOKENS = {
    "diagnose": "its corrections are fitted to all tokens of a text, and what they leave is measured on the same kind",
    "probe": "a probe makes its own inputs, and counts what it asks for",
}
"""Why a command about text cannot score answers alone."""


def refused(command: str, words: str) -> str | None:
    """Why a command does not take what others do; None: it is not known.

    Args:
        command: its name.
        words: what it was given, with dashes or without.
    """
    if "answers_only" in words.replace("-", "_") and command in ALL_TOKENS:
        return f"`mismatch {command}` counts all tokens: {ALL_TOKENS[command]}"
    return None


@dataclass(frozen=True, kw_only=True)
class ScoredConfig(RunConfig):
    """A command that can leave tokens of the evaluation text out of all that it counts."""

    answers_only: bool = False
    """Count only predictions of what the assistant says, in evaluation text made of chats."""


@dataclass(frozen=True, kw_only=True)
class SwapConfig(RunConfig):
    """A command about one swap, or about a student that was trained elsewhere."""

    swap: tuple[str, ...] = ()
    """What to replace: target:mechanism, such as "layer12:infini". May be repeated."""
    student: str | None = None
    """In place of a swap, a student that was trained elsewhere: a checkpoint of a swapped model, or a fine-tune of the
    model. A folder, a fetched name or a hub id."""
    selected_by: str | None = None
    """Run folder of the plan, scan or repair that chose layers, options or weights. No document that it chose,
    calibrated or trained on is evaluated on."""
    allow_overlap: bool = False
    """Evaluate also on documents that an earlier run chose on. The report says how many there are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.student is not None:
            if self.swap:
                raise ConfigError(
                    f"`swap` ({'; '.join(self.swap)}) and `student` ({self.student}) both say what is compared with "
                    "the model",
                    hint="give one of them; a checkpoint knows its own swap",
                )
            return
        if not self.swap:
            raise ConfigError(
                "there is no swap",
                hint='give one, such as --swap "layer12:infini", or a student that was trained elsewhere, --student',
            )
        spec.check(self.swap_spec)

    @property
    def swap_spec(self) -> spec.Spec:
        """The parsed swap; of a student from elsewhere it is in its plan."""
        return spec.parse(self.swap)

    def foreign(self) -> Iterator[tuple[str, str]]:
        yield from super().foreign()
        for clause in self.swap_spec.clauses if self.swap else ():
            yield from (("swap", name) for name in clause.call.foreign())

    @property
    def subject(self) -> str:
        if self.student is not None:
            return f"student {'/'.join(Path(self.student).parts[-2:])}"
        return spec.format(self.swap_spec)

    @property
    def flag(self) -> str:
        """What is compared with the model, as it is written in a command."""
        if self.student is not None:
            return f"--student {shlex.quote(self.student)}"
        return f'--swap "{spec.format(self.swap_spec)}"'

    def canonical(self) -> dict[str, str]:
        return {} if self.student is not None else {"swap": self.subject}


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
        file: YAML, such as the `config.yaml` of a run folder. It is data: what it names may run code only when the
            flags trust it.
        flags: values by field name; None means not given. Text is read as the field's type.

    Raises:
        ConfigError: no such file, not YAML, an unknown key, a wrong type or value, no model, a file that runs code.
        SpecError: a wrong swap.
    """
    known = fields(kind)
    read: dict[str, Any] = {} if file is None else _read(Path(file), known)
    typed = {name: value for name, value in (flags or {}).items() if value is not None}
    for name, value in typed.items():
        typed[name] = _accept(known[name], value, f"`--{name.replace('_', '-')}`")
    values = read | typed
    for name, arg in known.items():
        if arg.default is REQUIRED and name not in values:
            raise ConfigError(
                f"there is no {name}", hint=f"give one, such as {kind.examples[name]}"
            )
    made = kind(**values)
    _refuse_code(made, {name: file for name in read if name not in typed})
    return made


def _refuse_code(made: RunConfig, files: Mapping[str, Any]) -> None:
    """A file turns nothing on that runs code, and names no code of its own: that is for the caller to say.

    Args:
        made: the settings.
        files: of the fields that a file set.
    """
    for name in DANGEROUS:
        if name in files and getattr(made, name):
            raise ConfigError(
                f"`{name}` in {files[name]} asks to run what comes with a model; a file cannot allow that",
                hint=f"look at the model first, then --{name.replace('_', '-')} (in Python: {name}=True)",
            )
    if made.trust_remote_code:
        return
    for name, word in made.foreign():
        if name in files:
            raise ConfigError(
                f"`{name}` in {files[name]} names `{word}`, a class that is not mismatch's own; importing it runs its "
                "code, which is off",
                hint="read that code first, then --trust-remote-code (in Python: trust_remote_code=True)",
            )


def _accept(arg: Arg, value: Any, where: str) -> Any:
    try:
        if arg.name in PATHS and isinstance(value, str) and not value:  # would be `.`
            raise ValueError("is empty")
        return arg.accept(meant(arg, value, path=arg.name in PATHS))
    except ValueError as error:
        known = arg.choices or ()
        hint = did_you_mean(value, map(str, known)) if known and isinstance(value, str) else None
        raise ConfigError(f"{where} {error}", hint=hint) from None


class _Loader(reading.PlainYaml):
    """Numbers stay text: what they mean is said by the field (`4k`, `1e-3`; `064` is no octal number)."""


_Loader.yaml_implicit_resolvers = {
    sign: [one for one in known if one[0] in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:null")]
    for sign, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _read(path: Path, known: Mapping[str, Arg]) -> dict[str, Any]:
    found = reading.yaml_of(path, ConfigError, _Loader)
    if not isinstance(found, dict):
        raise ConfigError(
            f"the config {path} must be a list of `key: value`, got {type(found).__name__}",
            hint="see the config.yaml of any run folder",
        )
    values = {}
    for key, value in found.items():
        if key not in known:
            raise ConfigError(
                f"unknown key `{key!s:.80}` in {path}", hint=did_you_mean(str(key), known)
            )
        if key == "swap":
            value = _swaps(value, path)
        values[key] = _accept(known[key], value, f"`{key}` in {path}")
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
                f"`swap` in {path} must be text, got {reading.shown(item)}",
                hint='write `swap: ["layer12:infini"]`',
            )
    return texts
