"""`mismatch train`: transformers' Trainer goes on where a swap or a repair ends; the drift from the teacher is watched.

The swap stays as it was; a second student over the same teacher trains. Its checkpoint is one like any other.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PrinterCallback, TrainingArguments

from mismatch import spec
from mismatch.errors import DataError, UsageError
from mismatch.forward.heldout import HeldOut
from mismatch.runs.files import whole_folder
from mismatch.runs.plan import as_json
from mismatch.runs.stopping import polite
from mismatch.stages.base import Outcome, Stage
from mismatch.stages.offloading import refuse_offloaded
from mismatch.stages.opening import Opened
from mismatch.stages.probe.questions import Questions, questions_behind
from mismatch.stages.swapped import calibration_tokens, warned
from mismatch.stages.train.arguments import check_optimizer, training_arguments
from mismatch.stages.train.config import TrainConfig
from mismatch.stages.train.looks import Looks
from mismatch.stages.train.plan import TrainPlan
from mismatch.stages.train.result import CHECKPOINT, Trained
from mismatch.stages.train.rows import readings, rows_of
from mismatch.stages.train.trainer import (
    Collator,
    Course,
    DistillationTrainer,
    Rows,
    last_checkpoint,
)
from mismatch.stages.training_texts import TrainingTexts, training_texts
from mismatch.surgery import saving
from mismatch.surgery.operate import Student, copied
from mismatch.texts.windows import Windows


@dataclass(frozen=True)
class Prepared:
    """Texts in their roles, windows to train on in whole batches, windows to calibrate on (None: nothing does), probes
    (None: none), settings of the Trainer, notes."""

    texts: TrainingTexts
    train: Windows
    calibration: Windows | None
    asked: Questions | None
    arguments: TrainingArguments
    notes: tuple[str, ...]


class Train(Stage[TrainConfig, Prepared]):
    help = "Train a swapped or repaired model on with transformers' Trainer, and watch it drift from its teacher."
    Config = TrainConfig
    Result = Trained
    examples = (
        "mismatch train --model smollm2 --student runs/REPAIR/checkpoint --trainer learning_rate=1e-4",
        'mismatch train --model smollm2 --swap "layer12:infini" --parameters all --train-tokens 10M '
        "--trainer num_train_epochs=1",
    )
    report = "mismatch.stages.train.report"
    plan = "mismatch.stages.train.plan:TrainPlan"
    resumable = True
    distributed = True

    def check(self, config: TrainConfig, *, overwrite: bool = False) -> None:
        if config.device_map is not None:
            raise UsageError(
                f"--device-map {config.device_map} spreads a model over devices, and `mismatch train` does not",
                hint="a model that does not fit on one: torchrun or accelerate launch, with FSDP2",
            )
        if config.device not in ("auto", "cpu", "cuda", "cuda:0", "mps"):
            raise UsageError(
                f"--device {config.device}: the Trainer takes the first device that it sees",
                hint="choose it by CUDA_VISIBLE_DEVICES",
            )

    def prepare(self, opened: Opened[TrainConfig]) -> Prepared:
        config = opened.config
        swap, *_ = opened.planned()  # refuses what model, swap and controls do not allow
        if not trainable(swap, config.parameters):
            kind = "new weights" if config.parameters == "new" else "weights"
            what = (
                f"`{swap.plan.spec}` has no {kind}"
                if swap.plan.clauses
                else "no module was swapped"
            )
            raise _nothing(config, what)
        arguments = _arguments(opened)
        check_optimizer(arguments, swap.model)
        sharded = arguments.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
        if config.probes and sharded:
            raise UsageError(
                "--probes run parts of a model, which cannot be done while FSDP shards it",
                hint="leave them out, and ask the checkpoint: mismatch probe --student RUN/checkpoint",
            )
        refuse_offloaded(opened, "training needs all of them there")
        texts = training_texts(opened, config.train_tokens)
        train = _whole_batches(texts.train, config.batch_size * opened.ranks.world)
        clauses = () if opened.has_student else spec.check(config.swap_spec).clauses
        calls = [clause.call for clause in clauses]
        wanted = calibration_tokens(calls, config.controls, d_model=opened.skeleton.d_model)
        calibration = opened.calibration(wanted, texts.training)
        return Prepared(
            texts,
            train,
            calibration,
            questions_behind(opened),
            arguments,
            _notes(config, texts, train),
        )

    def announce(self, opened: Opened[TrainConfig], prepared: Prepared) -> str:
        config, texts = opened.config, prepared.texts
        return (
            f"train {config.parameters} parameters on {prepared.train.tokens:,} tokens of {config.train_data}, "
            f"evaluate on {texts.evaluation.tokens:,} of {config.data}"
        )

    def run(self, opened: Opened[TrainConfig], prepared: Prepared) -> Outcome | None:
        # Of several ranks one alone would stop, and the others wait for it.
        asked_to_stop = polite() if opened.ranks.world == 1 else nullcontext(lambda: False)
        with (
            asked_to_stop as stopping,
            tempfile.TemporaryDirectory(prefix="mismatch-") as temporary,
            torch.random.fork_rng(devices=[]),
        ):
            folder = Path(temporary) if opened.path is None else opened.path / "trainer"
            return _run(opened, prepared, stopping, folder)


def _run(
    opened: Opened[TrainConfig], prepared: Prepared, stopping: Callable[[], bool], folder: Path
) -> Outcome | None:
    config, teacher, ranks = opened.config, opened.teacher, opened.ranks
    swap, *controls = opened.students(prepared.calibration)
    student = copied(swap)
    student.model.requires_grad_(False)
    learning = trainable(student, config.parameters)
    for parameter in learning:
        parameter.requires_grad_(True)
    if (state := opened.state("training")) is not None and state.load(
        opened.fingerprints()
    ) is None:
        state.save({}, {}, opened.fingerprints())
    whole = config.parameters == "all"
    first = 0 if whole else swap.plan.first or 0
    evaluation = prepared.texts.evaluation
    evaluated = {}
    if ranks.first:
        opened.say(f"the teacher runs over {evaluation.tokens:,} evaluation tokens")
        before = HeldOut(teacher.layout, evaluation, first, config.batch_size)
        evaluated = {each.name: before.evaluate(each.layout) for each in (swap, *controls)}
        del before
    trainer = _trainer(opened, prepared, student, folder)
    if not trainer.learns():
        raise _nothing(config, f"no weight of `{swap.plan.spec}` changes what the model says")
    looks = Looks(opened, trainer, prepared, student)
    resumed = ranks.from_first(last_checkpoint(folder))
    if resumed is not None:
        opened.say(f"the training goes on from {Path(resumed).name}")
    with opened.bar(_steps(trainer, prepared), "training", "step") as bar:
        trainer.add_callback(looks)
        trainer.add_callback(Course(stopping, bar.update))
        trainer.train(resume_from_checkpoint=resumed)
    if stopping() and trainer.state.global_step < trainer.state.max_steps:
        raise KeyboardInterrupt
    kept = ranks.from_first(_kept(trainer))
    found = looks.of_run(prepared.train, kept)
    trained = _alone(trainer, student, swap)
    if not ranks.first:
        return None
    trained.model.requires_grad_(False)
    after = HeldOut(teacher.layout, evaluation, first, config.batch_size)
    evaluated["trained"] = after.evaluate(trained.layout)
    base = warned(student.plan, evaluation.seq_len)
    plan = TrainPlan(
        spec=base.spec,
        clauses=base.clauses,
        warnings=base.warnings,
        apart=base.apart,
        looks=found,
        step=kept,
        students=readings(evaluated),
        parameters=sum(parameter.numel() for parameter in trainable(trained, config.parameters)),
        notes=(*prepared.notes, *_kept_note(kept, trainer.state.global_step)),
        over=evaluated["trained"].kl.mean().over,
    )
    if opened.folder is not None:
        _save(trained, opened.folder.path / CHECKPOINT, plan)
    return Outcome(rows_of(plan, evaluated), plan, memory={"student": trained})


def trainable(student: Student, parameters: str) -> list[nn.Parameter]:
    """The tensors that learn. Codes of quantised weights cannot."""
    model = student.model
    if parameters == "all":
        found = list(model.parameters())
    else:
        found = [
            parameter
            for clause in student.plan.clauses
            for name, parameter in model.get_submodule(clause.path).named_parameters()
            if parameters == "swapped" or name in clause.new_parameters
        ]
    return list({id(p): p for p in found if p.is_floating_point()}.values())


def _nothing(config: TrainConfig, what: str) -> UsageError:
    return UsageError(
        f"there is nothing to train: {what}, and --parameters {config.parameters} trains nothing else",
        hint="--parameters all trains the whole model",
    )


def _arguments(opened: Opened[TrainConfig]) -> TrainingArguments:
    config = opened.config
    cpu = config.device == "cpu" or not (
        torch.cuda.is_available() or torch.backends.mps.is_available()
    )
    made = training_arguments(
        config.trainer,
        output_dir="trainer",
        seed=config.seed,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        use_cpu=cpu,
        use_cache=getattr(
            opened.model_config, "use_cache", True
        ),  # the config of the model stays as it is
        remove_unused_columns=False,
        label_names=["labels"],
        prediction_loss_only=True,
        logging_nan_inf_filter=False,  # a loss that is no number is an error here
        disable_tqdm=True,
    )
    made._n_gpu = min(made.n_gpu, 1)  # several GPUs are several processes
    return made


def _trainer(
    opened: Opened[TrainConfig], prepared: Prepared, student: Student, folder: Path
) -> DistillationTrainer:
    config, arguments = opened.config, prepared.arguments
    arguments.output_dir = str(folder)
    if opened.path is None:
        arguments.save_strategy = "no"
    made = DistillationTrainer(
        teacher=opened.teacher.model,
        kl_weight=config.kl_weight,
        ce_weight=config.ce_weight,
        model=student.model,
        args=arguments,
        data_collator=Collator(student.tokenizer),
        train_dataset=Rows(prepared.train),
        eval_dataset=Rows(prepared.texts.validation),
    )
    made.remove_callback(PrinterCallback)  # stdout is for results
    # Written once and loaded once: that the second name of a tied weight is in no checkpoint is no news.
    student.model._keys_to_ignore_on_save = [
        *saving.shared_names(student.model.state_dict(keep_vars=True))
    ]
    return made


def _steps(trainer: DistillationTrainer, prepared: Prepared) -> int:
    """How many there will be, for the bar."""
    arguments = trainer.args
    if arguments.max_steps > 0:
        return arguments.max_steps
    rows = len(prepared.train) // (arguments.train_batch_size * arguments.world_size)
    each = -(-rows // arguments.gradient_accumulation_steps)
    return int(each * arguments.num_train_epochs)


def _kept(trainer: DistillationTrainer) -> int:
    """The step whose weights the model has behind the training."""
    best = trainer.state.best_model_checkpoint
    if trainer.args.load_best_model_at_end and best is not None:
        return int(best.rpartition("-")[2])
    return trainer.state.global_step


def _kept_note(kept: int, last: int) -> tuple[str, ...]:
    if kept == last:
        return ()
    return (f"the weights are those of step {kept} of {last}, by the loss on validation text",)


def _alone(trainer: DistillationTrainer, student: Student, swap: Student) -> Student:
    """The trained student as it was before accelerate wrapped it; of a sharded one a copy with all weights."""
    if not trainer.is_fsdp_enabled:
        trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
        for name in ("forward", "_original_forward"):  # what mixed precision leaves on the model
            vars(student.model).pop(name, None)
        return student
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    whole = copied(swap)
    if trainer.args.should_save:
        whole.model.load_state_dict(weights)
    return whole


def _save(student: Student, path: Path, plan: TrainPlan) -> None:
    model, tokenizer = student.model, student.tokenizer
    if isinstance(model, saving.Swapped):
        extra = {"train": as_json(plan)}
        saving.save(model, path, tokenizer=tokenizer, extra=extra, overwrite=True)
        return
    with whole_folder(path) as folder:  # a fine-tune, in which nothing was swapped
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _whole_batches(train: Windows, batch: int) -> Windows:
    """The windows that fill batches of all ranks: with equal batches, a mean of their means is that of the tokens."""
    whole = len(train) // batch * batch
    if not whole:
        raise DataError(
            f"{len(train)} windows of training text do not fill one batch of {batch}",
            hint="give more --train-tokens, a shorter --seq-len, or a smaller --batch-size",
        )
    return train.part(slice(whole))


def _notes(config: TrainConfig, texts: TrainingTexts, train: Windows) -> tuple[str, ...]:
    notes = [f"training text: {train.tokens:,} tokens of {config.train_data}"]
    if len(train) < len(texts.train):
        left = len(texts.train) - len(train)
        notes.append(f"windows left out, for they fill no batch: {left} of {len(texts.train)}")
    if config.dtype in ("bfloat16", "float16"):
        notes.append(
            f"weights trained in {config.dtype}: small updates are rounded away; --dtype float32 with --trainer "
            "bf16=true keeps them"
        )
    return tuple(notes)
