"""The entry point of the command line: it parses arguments, runs a command and prints errors."""

import argparse
import contextvars
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from entangle.arguments import parsers
from entangle.commands import COMMANDS, check_numbers, check_words, command_line
from entangle.model import ranks

_LONGEST = 200  # characters of a path in a message
PARALLEL = ("measure", "perplexity", "sparsify", "sweep", "ablate")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0 is success, 1 an error, 2 bad input, 130 an interrupt (SIGINT). SIGTERM exits with 143.
    """
    top, commands = parsers()
    args, unknown = top.parse_known_args(argv)
    positional = args.command in {
        "check",
        "contexts",
        "plot",
        "words",
    }  # the commands that take neurons by position
    if unknown and (not positional or any(word.startswith("-") for word in unknown)):
        commands[args.command].error(
            f"unrecognized arguments: {' '.join(unknown)}. "
            f"entangle {args.command} --help lists the options"
        )
    if unknown:  # neurons after options, which argparse does not assign
        args = argparse.Namespace(**vars(args) | {"neurons": [*args.neurons, *unknown]})
    if args.command in {"measure", "sparsify", "sweep", "ablate", "disentangle"}:
        args = argparse.Namespace(**vars(args), command_line=command_line(args))

    heard: list[int] = []  # the signals that end the command
    hook = sys.unraisablehook

    def stop(signum: int, frame: FrameType | None) -> None:
        if _ignores_exit(frame):  # try again soon
            threading.Timer(0.05, _send, [signum]).start()
            return
        heard.append(signum)
        sys.unraisablehook = lambda _: None  # destructors of what was only half made may fail
        if signum == signal.SIGINT:
            signal.default_int_handler(signum, frame)
        sys.stderr.write(f"entangle: terminated: {_state(args)}\n")
        raise SystemExit(143)

    signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it may be ignored
        signal.signal(signal.SIGINT, stop)
    try:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("ACCELERATE_LOG_LEVEL", "error")
        if not sys.stderr.isatty():  # tqdm and huggingface_hub read these when imported
            os.environ.setdefault("TQDM_DISABLE", "1")
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        if "TORCHELASTIC_RUN_ID" in os.environ:
            _join(args)
        check_words(sys.argv[1:] if argv is None else argv)
        check_numbers(args)
        try:
            contextvars.copy_context().run(COMMANDS[args.command], args)
        except BrokenPipeError:  # the reader of stdout, such as head, has closed it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        ranks.leave()
    except KeyboardInterrupt:
        return _fail(args, f"interrupted: {_state(args)}", 130)
    except Exception as error:  # noqa: BLE001  # also a bug: print no traceback without --debug
        if heard == [signal.SIGTERM]:  # code in C may replace an exit by an error of its own
            sys.exit(143)
        if heard:
            return _fail(args, f"interrupted: {_state(args)}", 130)
        return _fail(args, *_problem(error))
    finally:
        sys.unraisablehook = hook
    return 0


def _problem(error: Exception) -> tuple[str, int]:
    """Return what to print about an error, and the exit code."""
    if isinstance(error, ValueError | LookupError | OSError):
        return _message(error), 2
    if isinstance(error, RuntimeError | ImportError | MemoryError | OverflowError):
        return f"{error or type(error).__name__}", 1
    problem = f"{type(error).__name__}: {error}"
    return f"bug in entangle: {problem}. Report it with what --debug prints", 1


def _message(error: Exception) -> str:
    """Return the message of an error; one of the system has its path and no error number."""
    if isinstance(error, OSError) and error.strerror:
        name = error.filename  # of some errors a number
        place = os.fsdecode(name) if isinstance(name, str | bytes | os.PathLike) else ""
        place = f"{place[:_LONGEST]}..." if len(place) > _LONGEST else place
        return f"cannot use {place}: {error.strerror}" if place else error.strerror
    return str(error.args[0]) if isinstance(error, KeyError) else str(error)


def _join(args: argparse.Namespace) -> None:
    """Join the processes that torchrun started.

    Raises:
        ValueError: the command does not run in several processes, or not on its device.
    """
    if args.command not in PARALLEL:
        raise ValueError(
            f"{args.command} cannot run under torchrun: only {', '.join(PARALLEL)} run in several "
            f"processes. Run entangle {args.command} without torchrun"
        )
    ranks.join(args.device)


def _ignores_exit(frame: FrameType | None) -> bool:
    """Return whether Python ignores an exit here, in a destructor or llvmlite callback."""
    while frame is not None:
        if frame.f_code.co_name == "__del__" or "llvmlite" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


def _send(signum: int) -> None:
    """Send a signal to the main thread, and wake it if it sleeps and the system can."""
    if sys.platform == "win32":
        signal.raise_signal(signum)
    else:
        thread = threading.main_thread().ident
        assert thread is not None  # it has started
        signal.pthread_kill(thread, signum)


def _state(args: argparse.Namespace) -> str:
    """Return a sentence on what a stopped command leaves on disk."""
    from entangle.model import folders

    partial = folders.partial_of(Path(str(getattr(args, "out", None))))
    resumable = {"sweep", "ablate", "disentangle", "measure", "sparsify"}
    if args.command in resumable and not partial.exists() and (args.out / "run.json").is_file():
        return f"{args.out} is finished, except for figures, which entangle plot draws"
    if args.command in resumable and folders.has_work(partial):
        return f"{partial} holds the finished part: run the same command again to resume it"
    return "nothing was written"


def _fail(args: argparse.Namespace, message: str, code: int) -> int:
    if args.debug:
        traceback.print_exc()
    number = os.environ.get("RANK", "0") if ranks.LAUNCHED else "0"  # also before `join`
    where = f" (rank {number})" if number != "0" else ""
    sys.stderr.write(f"entangle{where}: {message}\n")
    return code


def run() -> NoReturn:
    """Run one command, and end this process with its exit code."""
    for stream in (sys.stdout, sys.stderr):  # whatever the locale is, ± can be printed
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    code = main()
    if ranks.LAUNCHED:  # torch.distributed's threads may abort a normal exit
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
