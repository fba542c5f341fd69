"""Look at the data of a job without running it. `--help` shows how; `commands.py` does it."""

import argparse
import contextlib
import dataclasses
import gc
import logging
import os
import sys
import warnings
from typing import Any

from examples.mosaic_streaming import titan
from examples.mosaic_streaming.config import Parser
from examples.mosaic_streaming.distributed import AbortChannel
from examples.mosaic_streaming.preview.first_look import print_first_look
from examples.mosaic_streaming.upstream.lazy_imports import import_llm_foundry

USAGE = """\
Look at the data of a job, with the job's own files and flags. No GPU, any number of ranks.

  python -m examples.mosaic_streaming.preview show --config JOB.toml --mosaic-config LOADER.toml
  python -m examples.mosaic_streaming.preview plan --config JOB.toml --mosaic-config LOADER.toml --world-size 64
  ... plan --checkpoint outputs/checkpoint ...     what a resume would do
  ... step 500 --dp-rank 3 ...                     what was, or will be, in a global batch
  ... step 1:500 --find "some text" ...            where a text was read
  ... ledger --step 500 ...                        what each stream has given up to there

TorchTitan's flags go after a `--`, as in training. The data and the caches of jobs are left as they are: shards are
read through a temporary folder.
"""

COMMANDS = {  # each is a function in commands.py
    "show": "rows as the model sees them: text, documents, ids, what is a target",
    "plan": "streams, epochs, settings and their owners, needs, layout, checks, warnings",
    "step": "the samples of a global batch, by dp rank",
    "ledger": "what each stream was asked for and has given",
}


def main(argv: list[str] | None = None) -> None:
    """Read the flags and both files, open the streams, and print what was asked for."""
    gc.disable()  # which makes imports take a quarter less time; a preview is short
    channel = AbortChannel()
    with channel.report_errors_once(), contextlib.ExitStack() as stack:
        channel.exit_on_signals()
        flags, titan_flags = build_parser().parse(sys.argv[1:] if argv is None else argv)
        stack.enter_context(titan.names_as_given(in_code=bool(flags.module)))
        print_first_look(flags)
        warnings.filterwarnings("ignore")  # of upstream, while it is imported
        os.environ |= {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
        with contextlib.redirect_stdout(sys.stderr):  # where TorchTitan's log goes, then
            job = dataclasses.replace(titan.load_job(flags, titan_flags), position=getattr(flags, "checkpoint", None))
        log_warnings_to_stderr()
        import_llm_foundry()
        channel.exit_on_signals()  # again, because the import of composer sets its own handlers
        from examples.mosaic_streaming.preview import commands
        from examples.mosaic_streaming.preview.open_data import open_job_data
        from examples.mosaic_streaming.preview.progress import STDERR

        with STDERR.status("Opening the streams"):
            data = stack.enter_context(open_job_data(job, flags.world_size, flags.ranks_per_node, channel))
        try:
            getattr(commands, flags.command)(data, flags)
            sys.stdout.flush()
        except BrokenPipeError:  # the reader has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def log_warnings_to_stderr() -> None:
    """Log only warnings, apart from reports. TorchTitan logs to stdout (0.2.2, tools/logging.py)."""
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("llmfoundry").setLevel(logging.ERROR)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)


def build_parser() -> Parser:
    """The parser of the flags before the `--`."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="python -m examples.mosaic_streaming.preview", description=USAGE, formatter_class=raw)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    commands: dict[str, Parser] = {}
    number: dict[str, Any] = {"type": positive, "metavar": "N"}
    for name, text in COMMANDS.items():
        command = commands[name] = subparsers.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.add_files(required=True)
        command.add_argument("--world-size", default=1, help="processes of the job (default: 1)", **number)
        command.add_argument("--ranks-per-node", help="of them on a machine (default: up to 8)", **number)
        command.add_argument("--json", action="store_true", help="for scripts")
        if name != "show":
            of_run = "of the run: a step's folder, or that of all steps for the one that a start loads"
            command.add_argument("--checkpoint", metavar="PATH", help=of_run)

    show, step, ledger = commands["show"], commands["step"], commands["ledger"]
    show.add_argument("--rows", default=2, help="of each stream (default: 2)", **number)
    which = show.add_mutually_exclusive_group()
    which.add_argument("--stream", metavar="NAME", help="of this stream alone")
    which.add_argument("--sample", type=int, action="append", metavar="ID", help="of this sample, as `step` names it")
    of = show.add_mutually_exclusive_group()
    of.add_argument("--stage", help="of this stage of the plan alone (--sample: default 1)", **number)
    of.add_argument("--validation", action="store_true", help="of the validation streams")
    show.add_argument("--full", action="store_true", help="whole texts and all ids")
    show.add_argument("--plot", metavar="FILE.png", help="draw the lengths of documents")
    step.add_argument("steps", type=steps, nargs="?", metavar="N or N:M", help="optimizer steps, counted from 1")
    step.add_argument("--around", help="the last steps before this one and it, and a [[skip]] table for them", **number)
    step.add_argument("--dp-rank", type=int, metavar="R", help="of this data-parallel rank alone")
    step.add_argument("--find", metavar="TEXT", help="only samples whose text has this")
    step.add_argument("--no-text", action="store_true", help="read no shard")
    step.add_argument("--full", action="store_true", help="whole texts")
    ledger.add_argument("--step", help="up to this step (default: that of --checkpoint, or training.steps)", **number)
    ledger.add_argument("--plot", metavar="FILE.png", help="draw the streams' shares over steps")
    return parser


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def steps(text: str) -> range:
    """The steps of `N`, or `N` to `M` of `N:M`."""
    first, *last = text.split(":")
    found = range(positive(first), positive(*last or [first]) + 1)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} has no steps")
    return found


if __name__ == "__main__":
    main()
