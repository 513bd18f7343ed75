"""Command lines: options made from a dataclass, exit codes, and signals in loader processes.

    option(default, help)   a dataclass field that is also an option of the command line
    add_options             a dataclass -> options of an argparse parser, in groups
    read_options            what was typed -> (instance of the dataclass, names of the options that were typed)
    run                     main() with one-line errors and the usual exit codes
    ignore_signals          for DataLoader workers: only their own process may stop them

Not here: what the options are (train.py, mvbench.py and the commands of the rooms). A progress bar needs no helper:
tqdm(..., disable=None) draws one only on a terminal.

    pytest tests/test_cli.py
"""
import argparse
import os
import signal
import sys
import threading
from dataclasses import MISSING, field, fields

def option(default, help, group="options", choices=None, aliases=(), factory=None):
    """A field of an options dataclass. aliases: further spellings ("--accumulate"), kept for old command lines.

    factory: makes the default (field's default_factory) for one that must not be shared.
    """
    metadata = {"help": help, "group": group, "choices": choices, "aliases": aliases}
    return field(default_factory=factory, metadata=metadata) if factory else field(default=default, metadata=metadata)

def add_options(parser, config_class):
    """Adds an option for each field of config_class that option() made: grad_accum -> --grad-accum.

    A bool becomes --name and --no-name. The help text ends in the default where there is one.
    """
    groups = {}                                                # title: argparse group, in the order of the fields
    for f in fields(config_class):
        if "help" not in f.metadata:
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
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print(f"\n{stopped}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)

def ignore_signals(worker_id):
    """worker_init_fn of a DataLoader: Ctrl-C and SIGTERM reach the workers too, but only their parent may stop them.

    Otherwise a worker would die in the middle of a step that its parent still means to finish and save.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):                         # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=exit_with_parent, daemon=True).start()
    # the thread that hands tensors over may fail while the parent exits; errors of samples are passed on elsewhere
    sys.excepthook = lambda *error: None

def exit_with_parent():
    """Ends this process when a SIGTERM comes from the process that started it, as multiprocessing sends it."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
