"""The `zorl` command."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Sequence

from zorl import __version__
from zorl.apps.allocator import keep_freed_memory
from zorl.apps.commands import COMMANDS
from zorl.apps.launcher import is_first
from zorl.apps.partial_result import PartialResult
from zorl.suggestions import did_you_mean

# If these are installed, transformers loads them, and they warn about kernels that nothing here needs.
TALKATIVE = ("torchao", "bitsandbytes", "torch.utils._pytree")
OVERVIEW = f"""\
zorl {__version__}: tune a language model on the metric itself (F1, accuracy, any function, a judge) with forward passes alone

  zorl train     tune a model on a file of examples
  zorl eval      compute accuracy, macro-F1 and other rewards of a model on a file
  zorl predict   answer every row of a file
  zorl replay    rebuild a tuned model from its base and a trajectory, at any step
  zorl compare   compare methods in one table: zero-shot, a threshold, probing, MeZO, fine-tuning and more
  zorl profile   measure time and memory of tuning a model here, and estimate the largest model that fits
  zorl diagnose  measure a good learning rate and epsilon for zorl train, and the model's effective rank
  zorl judge     tune a model on people's preferences: a page on which they choose the better of two answers

A first run, offline, in a minute:     python -m zorl.apps.optimize_f1
A reward of your own, in ten lines:    python -m zorl.apps.custom_reward
On your own examples, a file with the columns text and label:

  zorl train --model facebook/opt-125m --dataset train.tsv --text_column text --label_column label \\
    --prompt "{{text}} It was {{mask}}." --label_words 0=terrible 1=great --reward f1 --max_steps 600 --output_dir out
  zorl eval --model out --dataset test.tsv --text_column text --label_column label

zorl COMMAND --help explains one command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. Results go to stdout; progress, messages and anything that a reward prints go to stderr.

    Returns:
        The exit status: 0 on success, 2 on an error (one sentence on stderr) or where a part of the work failed, 130 when
        interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    keep_freed_memory()
    hush()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            text = _run(words)
        if is_first():
            print(text, flush=True)
    except KeyboardInterrupt as error:
        print(f"zorl: {error or 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `zorl … | head`: nobody reads any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except PartialResult as error:
        print(error.output, flush=True)
        print(f"zorl: error: {error}", file=sys.stderr)
        return 2
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _out_of_memory(error):
            raise  # a bug: a sentence does not explain it
        if os.environ.get("ZORL_TRACEBACK"):
            raise
        hint = "" if error.__cause__ is None else " (ZORL_TRACEBACK=1 shows where)"
        said = " ".join(str(error).split())
        if not said or type(error) is RuntimeError:
            said = f"out of memory: use smaller batches or a smaller model{said and f' ({said})'}"
        print(f"zorl: error: {said}{hint}", file=sys.stderr)
        return 2
    return 0


def hush() -> None:
    """Keeps libraries from saying what nobody who runs a command can use. Before they are loaded."""
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)


def _out_of_memory(error: RuntimeError) -> bool:
    torch = sys.modules.get("torch")  # not loaded: the error is not torch's
    if torch is None:
        return False
    from accelerate.utils.memory import should_reduce_batch_size

    # On a CPU torch raises an ordinary RuntimeError.
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


def _run(words: list[str]) -> str:
    """Runs a command and returns what it prints. It is imported only now: transformers alone takes seconds."""
    if not words or words[0] in ("-h", "--help", "help"):
        return OVERVIEW
    name, *rest = words
    if name == "--version":
        return f"zorl {__version__}"
    if name not in COMMANDS:
        raise ValueError(f"unknown command {name!r}{did_you_mean(name, COMMANDS)} (commands: {', '.join(COMMANDS)})")
    if {"-h", "--help"} & set(rest):
        return COMMANDS[name].help()
    if {"--help_all", "--help-all"} & set(rest):
        return COMMANDS[name].help(everything=True)
    if name == "train":
        from zorl.apps.train import run
    elif name == "eval":
        from zorl.apps.evaluate import run_eval as run
    elif name == "predict":
        from zorl.apps.evaluate import run_predict as run
    elif name == "replay":
        from zorl.apps.replay import run
    elif name == "profile":
        from zorl.apps.profile import run
    elif name == "diagnose":
        from zorl.apps.diagnose import run
    elif name == "compare":
        from zorl.apps.compare import run
    else:
        from zorl.apps.judge import run
    from transformers.utils import logging

    logging.disable_progress_bar()  # one per file that is read or written; training has its own
    return run(rest)


if __name__ == "__main__":
    sys.exit(main())
