"""Command lines: options made from a dataclass, exit codes, and signals in loader processes.

    option, add_options, read_options   a dataclass whose fields are options of an argparse parser, in groups
    run                                 main() with one-line errors and the usual exit codes
    ignore_signals                      for DataLoader workers: only their own process may stop them

Not here: what the options are (train.py, mvbench.py and the commands of the rooms).

    pytest tests/test_cli.py
"""
import argparse
import gc
import os
import signal
import sys
import threading
from dataclasses import MISSING, field, fields

def option(default, help, group="options", choices=None, aliases=()):
    """A field of an options dataclass. aliases: further spellings ("--accumulate"), for old command lines."""
    return field(default=default, metadata={"help": help, "group": group, "choices": choices, "aliases": aliases})

def add_options(parser, config_class):
    """Adds an option for each field that option() made: grad_accum -> --grad-accum, a bool -> --name and --no-name."""
    groups = {}                                                # title: argparse group, in the order of the fields
    for f in fields(config_class):
        if "help" not in f.metadata:                           # a plain field
            continue
        title = f.metadata["group"]
        group = groups.setdefault(title, parser.add_argument_group(title))

        # the parser's own default is MISSING, so that read_options knows what was typed
        kwargs = {"action": argparse.BooleanOptionalAction}
        if f.type is not bool:
            choices = f.metadata["choices"]
            metavar = {int: "N", float: "X"}.get(f.type, f.name.upper())
            kwargs = {"type": f.type, "choices": choices, "metavar": None if choices else metavar}
        shown = "" if f.default in ("", None, 0, False, MISSING) else f" (default {f.default})"
        spellings = ["--" + f.name.replace("_", "-"), *f.metadata["aliases"]]
        group.add_argument(*spellings, dest=f.name, default=MISSING, help=f.metadata["help"] + shown, **kwargs)

def read_options(parser, config_class, argv=None):
    """Parses argv -> (config_class filled in, set of the field names that were typed). Exits as argparse does."""
    typed = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not MISSING}
    return config_class(**typed), set(typed)

def run(main, name, stopped="stopped"):
    """sys.exit(main()); ValueError and OSError become the line "name: error" and code 2, Ctrl-C `stopped` and 130."""
    # what a terminal cannot show, or what is no UTF-8, must not end a run
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if hasattr(stream, "reconfigure"):                     # not where a test captures it
            stream.reconfigure(errors=errors)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print(f"\n{stopped}", file=sys.stderr)
        sys.exit(130)                                          # 128 + SIGINT, as shells have it
    except (ValueError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)

def ignore_signals(worker_id):
    """worker_init_fn of a DataLoader: Ctrl-C and SIGTERM reach the workers too, but only their parent may stop them, or
    a worker would die in the middle of a step that its parent still means to finish and save."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):                         # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=exit_with_parent, daemon=True).start()
    # what the parent left to the garbage collector stays untouched: decord's readers abort in a forked process
    gc.freeze()
    # the thread that hands tensors over may fail while the parent exits; errors of samples are passed on elsewhere
    sys.excepthook = lambda *error: None

def exit_with_parent():
    """Ends this process when the process that started it sends a SIGTERM, as multiprocessing does."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
