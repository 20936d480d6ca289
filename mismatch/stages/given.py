"""A student that is there already: handed over in Python, or named by `--student`."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from mismatch.config import SwapConfig
from mismatch.models.layout import Layout
from mismatch.models.load import ModelInfo, load_tokenizer, read_config
from mismatch.models.resolve import Located
from mismatch.models.skeleton import skeleton_of
from mismatch.surgery import elsewhere, loading
from mismatch.surgery.operate import Student
from mismatch.surgery.students import Teacher

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


class GivenStudent:
    """It before and after its weights.

    Args:
        config: names it, and says how the teacher is loaded.
        given: a student or a model that is in memory; None: the one that the config names.

    Attributes:
        info: of a model that was trained elsewhere, behind `adopted`; None: it was swapped in this process.
    """

    def __init__(self, config: SwapConfig, given: Student | Teacher | None) -> None:
        self.config, self.given = config, given
        self.info: ModelInfo | None = None if given is None else getattr(given, "info", None)

    @property
    def name(self) -> str:
        """For errors."""
        return self.config.student or "that was handed over"

    @cached_property
    def source(self) -> tuple[Any, Located]:
        """transformers' config of the model that is named, and where it lies."""
        assert self.config.student is not None
        return read_config(self.config.student, trust_remote_code=self.config.trust_remote_code)

    def foreseen(self, teacher: Layout, tokenizer: Any) -> Student:
        """It as its config and its record tell it, on the meta device.

        Args:
            teacher: without its weights.
            tokenizer: the teacher's.

        Raises:
            ModelError: no such model, or one that cannot be set beside the teacher.
            LayoutError: an unknown family.
        """
        given, trusted = self.given, self.config.trust_remote_code
        if given is None:
            folder = self.source[1].folder
            plain, found = loading.plain_skeleton(self.source, trust_remote_code=trusted)
            made = elsewhere.foreseen(teacher, plain, found, self.name, folder)
            elsewhere.check_tokens(tokenizer, _tokenizer(folder, trusted), self.name)
            return made
        found = elsewhere.record_of(given.model)
        plain = skeleton_of(given.layout) if found is None else loading.bare(given.model.config)
        made = elsewhere.foreseen(teacher, plain, found, self.name, self.name)
        elsewhere.check_tokens(tokenizer, given.tokenizer, self.name)
        if isinstance(given, Student) and given.plan.spec == made.plan.spec:
            return replace(made, plan=replace(given.plan, apart=made.plan.apart))
        return made

    def adopted(self, teacher: Teacher, foreseen: Student, device: str | None) -> Student:
        """It with its weights, compared with the teacher.

        Args:
            teacher: with its weights.
            foreseen: as `foreseen` told it.
            device: where it goes; None: as the config maps it.

        Raises:
            ModelError: its weights cannot be read, or have another dtype or device than the teacher's.
        """
        given, notes = self.given, []
        if given is None:
            saved, wanted = _saved(self.source[0]), teacher.model.dtype
            if saved not in (None, wanted):
                notes.append(
                    f"the student was saved in {_word(saved)} and runs in {_word(wanted)}, as the teacher does"
                )
            given = Teacher(
                *loading.load(
                    self.source[1],
                    dtype="auto" if saved == wanted else wanted,
                    device=device,
                    device_map=self.config.device_map,
                    trust_remote_code=self.config.trust_remote_code,
                    allow_pickle=self.config.allow_pickle,
                    tokenizer=teacher.tokenizer,
                )
            )
            self.info = given.info
        if isinstance(given, Teacher):
            given = Student(given.model, given.layout, foreseen.plan, teacher.tokenizer)
        found = elsewhere.record_of(given.model)
        base = None if found is None else found.base
        student = replace(given, plan=foreseen.plan)
        return elsewhere.adopted(teacher, student, base=base, notes=notes)


def _tokenizer(folder: Any, trust_remote_code: bool) -> Any:
    """The tokenizer of a folder; None: there is none, as trainers leave it, and the teacher's is taken."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    return load_tokenizer(folder, trust_remote_code)


def _saved(config: Any) -> torch.dtype | None:
    """What the weights of a folder are saved in, where its config knows."""
    dtype = getattr(config, "dtype", None)
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def _word(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
