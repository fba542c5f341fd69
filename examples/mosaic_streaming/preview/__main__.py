"""Shows the data of a job without running it. `--help` says how; the commands are in `commands.py`."""

import argparse
import contextlib
import logging
import os
import sys
import warnings

from examples.mosaic_streaming import titan
from examples.mosaic_streaming.config import Parser, read_loaders, read_toml
from examples.mosaic_streaming.distributed import AbortChannel
from examples.mosaic_streaming.upstream.lazy_imports import import_llm_foundry

USAGE = """\
Look at the data of a job, with the job's own files and flags. No GPU, any number of ranks.

  python -m examples.mosaic_streaming.preview show --config JOB.toml --mosaic-config LOADER.toml
  python -m examples.mosaic_streaming.preview plan --config JOB.toml --mosaic-config LOADER.toml --world-size 64
  ... plan --checkpoint outputs/checkpoint ...     what a resume would do
  ... step 500 --dp-rank 3 ...                     what was, or will be, in a global batch
  ... step 1:500 --find "some text" ...            where a text was read
  ... ledger --step 500 ...                        what each stream has given up to there

TorchTitan's flags go behind a `--`, as in training. The data and the caches of jobs are left as they are: shards are
read through a temporary folder.
"""

COMMANDS = {
    "show": "rows as the model sees them: text, documents, ids, what is a target",
    "plan": "streams, epochs, settings and their owners, needs, layout, checks, warnings",
    "step": "the samples of a global batch, by dp rank",
    "ledger": "what each stream was asked for and has given",
}


CHECKPOINT = "of the run: a step's folder, or that of all steps for the one that a start loads"


def main(argv: list[str] | None = None) -> None:
    """Read the flags and the files, open the streams, and run the command."""
    channel = AbortChannel()
    with channel.report_errors_once():
        channel.exit_on_signals()
        flags, titan_flags = parse(sys.argv[1:] if argv is None else argv)
        read_toml(flags.config)  # before the slow imports
        train, validation = read_loaders(flags.mosaic_config, flags.mosaic_validation_config)
        be_quiet()
        job_config = titan.load_job_config([f"--job.config_file={flags.config}", *titan_flags])
        settings = titan.settings_of(job_config, flags.config, titan_flags)
        log_aside()
        import_llm_foundry()
        channel.exit_on_signals()  # again: the import of composer sets its own
        from examples.mosaic_streaming.preview import commands
        from examples.mosaic_streaming.preview.job_data import open_job_data

        with contextlib.ExitStack() as stack:
            layout = (flags.world_size, flags.ranks_per_node)
            with commands.waiting("Opening the streams"):
                data = stack.enter_context(open_job_data(job_config, settings, train, validation, *layout, channel))
            try:
                commands.COMMANDS[flags.command](data, flags)
                sys.stdout.flush()
            except BrokenPipeError:  # the reader has seen enough
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def be_quiet() -> None:
    """Silence the warnings of other packages, which say nothing of the data."""
    warnings.filterwarnings("ignore")
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}


def log_aside() -> None:
    """Log only warnings, to stderr: reports go to stdout, to which TorchTitan logs (0.2.2, tools/logging.py)."""
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("llmfoundry").setLevel(logging.ERROR)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse the command with its flags, and TorchTitan's flags after the `--`; a ConfigError says what is wrong."""
    parser = Parser(
        prog="python -m examples.mosaic_streaming.preview",
        description=USAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, text in COMMANDS.items():
        command = subparsers.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.add_files(required=True)
        command.add_argument(
            "--world-size", type=positive, default=1, metavar="N", help="processes of the job (default: 1)"
        )
        command.add_argument(
            "--ranks-per-node", type=positive, metavar="N", help="of them on a machine (default: up to 8)"
        )
        command.add_argument("--json", action="store_true", help="for scripts")
        ADD_FLAGS[name](command)
    return parser.parse(argv)


def add_show(command: argparse.ArgumentParser) -> None:
    """The flags of `show`."""
    command.add_argument("--rows", type=positive, default=2, metavar="N", help="of each stream (default: 2)")
    which = command.add_mutually_exclusive_group()
    which.add_argument("--stream", metavar="NAME", help="of this stream alone")
    which.add_argument("--sample", type=int, action="append", metavar="ID", help="of this sample, as `step` names it")
    command.add_argument("--validation", action="store_true", help="of the validation streams")
    command.add_argument("--full", action="store_true", help="whole texts and all ids")
    command.add_argument("--plot", metavar="FILE.png", help="draw the lengths of documents")


def add_plan(command: argparse.ArgumentParser) -> None:
    """The flags of `plan`."""
    command.add_argument("--checkpoint", metavar="PATH", help=CHECKPOINT)


def add_step(command: argparse.ArgumentParser) -> None:
    """The flags of `step`."""
    command.add_argument("steps", type=steps, metavar="N or N:M", help="optimizer steps, counted from 1")
    command.add_argument("--checkpoint", metavar="PATH", help=CHECKPOINT)
    command.add_argument("--dp-rank", type=int, metavar="R", help="of this data-parallel rank alone")
    command.add_argument("--find", metavar="TEXT", help="only samples whose text has this")
    command.add_argument("--no-text", action="store_true", help="read no shard")
    command.add_argument("--full", action="store_true", help="whole texts")


def add_ledger(command: argparse.ArgumentParser) -> None:
    """The flags of `ledger`."""
    command.add_argument(
        "--step", type=positive, metavar="N", help="up to this step (default: that of --checkpoint, or training.steps)"
    )
    command.add_argument("--checkpoint", metavar="PATH", help=CHECKPOINT)
    command.add_argument("--plot", metavar="FILE.png", help="draw the streams' shares over steps")


ADD_FLAGS = {"show": add_show, "plan": add_plan, "step": add_step, "ledger": add_ledger}


def positive(text: str) -> int:
    """Parse a whole number from 1 on."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def steps(text: str) -> range:
    """Parse steps `N` or `N:M`, with both ends."""
    first, *last = text.split(":")
    found = range(positive(first), positive(*last or [first]) + 1)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} has no steps")
    return found


if __name__ == "__main__":
    main()
