"""The one place where an exception becomes a line on the terminal and an exit code."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from difflib import get_close_matches

import typer

from whet.errors import INTERRUPTED, RunError, SamplerError, UserError

BUG = 1
"""Exit code of an exception that the user cannot mend: a bug in whet, shown with its traceback."""


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Of an `OSError`: the disk's, and no bug."""


def guarded(command: Callable[[], int], *, as_json: bool, show_traceback: bool) -> int:
    """Run a command and return its exit code; whatever it raises is reported here.

    A `UserError` or a `SamplerError` is one line on stderr. With `as_json` the last line on stdout is
    `{"ok": false, "error": ..., "exit_code": ...}`.
    """
    if sys.stdout is None:  # closed by the shell: `>&-`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for as long as the process lives
    try:
        code = command()
        sys.stdout.flush()
    except (UserError, SamplerError) as error:
        return _report(str(error), error.exit_code, as_json=as_json, show_traceback=show_traceback)
    except typer.TyperException as error:
        message = _with_hint(error)
        return _report(message, UserError.exit_code, as_json=as_json, show_traceback=False)
    except (KeyboardInterrupt, typer.Abort):
        return _report("interrupted", INTERRUPTED, as_json=as_json, show_traceback=False)
    except (BrokenPipeError, SystemExit):
        # The reader (`| head`) has left, which rich turns into SystemExit. Without the next line Python would
        # complain once more while it closes stdout.
        _let_go_of_stdout()
        return 0
    except Exception as error:  # noqa: BLE001  the last boundary: a bug is reported, not hidden
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            if error.filename is None:
                _let_go_of_stdout()
            message = f"{error.filename or 'standard output'}: {error.strerror}; make room, or write elsewhere"
            return _report(message, RunError.exit_code, as_json=as_json, show_traceback=show_traceback)
        message = f"{type(error).__name__}: {error} (this is a bug in whet)"
        return _report(message, BUG, as_json=as_json, show_traceback=True)
    if code == INTERRUPTED:  # typer turns Ctrl-C into this code
        return _report("interrupted", code, as_json=as_json, show_traceback=False)
    return code


def _let_go_of_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_json(result: Mapping[str, object]) -> None:
    """A command's result as the last line on stdout."""
    print(json.dumps({"ok": True, **result}, default=str), flush=True)


def exit_codes() -> str:
    """What each exit code means, from the error classes themselves."""
    codes = {0: "done", BUG: "a bug in whet"}
    kinds: list[type[UserError | SamplerError]] = [UserError, *UserError.__subclasses__(), SamplerError]
    for kind in kinds:
        assert kind.__doc__ is not None, kind
        codes[kind.exit_code] = kind.__doc__.splitlines()[0].rstrip(".").lower()
    codes[INTERRUPTED] = "interrupted, with everything up to the last step saved"
    return "; ".join(f"{code} {meaning}" for code, meaning in codes.items())


def printable(text: str) -> str:
    """Model or data text for a terminal: line ends stay, every other control character is spelled out."""
    return "\n".join(map(one_line, text.split("\n")))


def one_line(text: str) -> str:
    """Text safe for a terminal: control characters, which may come from data or a model, are spelled out."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _with_hint(error: typer.TyperException) -> str:
    """What typer says of a wrong command line; of a command of another tool, or a typo, with what it is called here."""
    message, context = error.format_message(), getattr(error, "ctx", None)
    path = context.command_path if context is not None else "whet"
    word = re.match(r"No such command '([\w-]+)'", message)
    if word is None:
        return message if message.endswith("?") else f"{message.rstrip('.')}; see {path} --help"
    from whet.config.names import names  # slow to import, for a line that is seldom read

    near = get_close_matches(word[1], context.command.list_commands(context) if context is not None else (), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"see {path} --help"
    return f"{word[0]}; {names().other_commands.get(word[1], hint)}"


def _report(message: str, code: int, *, as_json: bool, show_traceback: bool) -> int:
    if show_traceback:
        traceback.print_exc()
    print(f"whet: {one_line(message)}", file=sys.stderr, flush=True)
    if as_json:
        print(json.dumps({"ok": False, "error": message, "exit_code": code}), flush=True)
    return code
