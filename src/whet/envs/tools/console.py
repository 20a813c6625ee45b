"""The interpreter of the python tool, which runs in the sandbox: this file goes there as text.

It reads a line of JSON, the code of a call, and writes one, what the call printed. Standard library only.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import sys
import traceback
from typing import Any


class Capped(io.StringIO):
    """Keeps the first characters that are written, and counts the others."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.left_out = most, 0

    def write(self, text: str) -> int:
        """All of it, as far as the writer can tell."""
        kept = text[: max(0, self.most - self.tell())]
        self.left_out += len(text) - len(kept)
        super().write(kept)
        return len(text)


def serve(most: int) -> None:
    """Answer calls until the input ends. Descriptors 0 and 1 are not theirs: children read nothing, and print to 2."""
    lines, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    os.dup2(2, 1)
    sys.stdin = open(0)  # noqa: SIM115 - as long as the process
    process = os.getpid()
    space: dict[str, Any] = {"__name__": "__main__", "__builtins__": __builtins__}
    for line in lines:
        printed = Capped(most)
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            run(json.loads(line), space)
        if os.getpid() != process:  # a copy that the code forked: one answers, not both
            os._exit(0)
        more = f"\n[... {printed.left_out:,} characters left out]" if printed.left_out else ""
        replies.write(json.dumps(printed.getvalue() + more) + "\n")
        replies.flush()


def run(code: str, space: dict[str, Any]) -> None:
    """Its statements, and the value of the last one where that is an expression; an error is printed."""
    try:
        tree = ast.parse(code, "call.py")
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "call.py", "exec"), space)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "call.py", "eval"), space)
            if value is not None:
                sys.stdout.write(f"{value!r}\n")
    except BaseException as error:  # noqa: BLE001 - sys.exit as well: the interpreter goes on
        own = error.__traceback__ and error.__traceback__.tb_next
        shown = traceback.TracebackException(type(error), error, None if isinstance(error, SyntaxError) else own)
        sys.stdout.write("".join(shown.format()))
