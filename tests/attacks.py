"""Programs that attack: to score without solving, or to harm the machine."""

from __future__ import annotations

FORGERIES = {
    "exit at import": "import sys; sys.exit(0)",
    "hard exit at import": "import os; os._exit(0)",
    "hard exit in the call": "import os\ndef add(a, b): os._exit(0)",
    "exit in the call": "import sys\ndef add(a, b): sys.exit(0)",
    "exit when printed": "class E(Exception):\n def __str__(self): import os; os._exit(0)\ndef add(a, b): raise E",
    "equal to everything": "class E:\n def __eq__(self, o): return True\n __hash__ = None\ndef add(a, b): return E()",
    "an int equal to everything": "class I(int):\n def __eq__(self, o): return True\n def __sub__(self, o): return 0\n"
    " __hash__ = int.__hash__\ndef add(a, b): return I(0)",
    "a float that lies": "class F(float):\n def __eq__(self, o): return True\n def __abs__(self): return 0.0\n"
    " def __sub__(self, o): return 0.0\n __hash__ = float.__hash__\ndef add(a, b): return F('nan')",
    "a mock": "from unittest.mock import ANY\ndef add(a, b): return ANY",
    "patched json": 'import json\n_said = \'{"value": 5, "passed": [true]}\'\njson.dumps = lambda *a, **k: _said\n'
    "def add(a, b): return 5",
    "patched builtins": "import builtins\nbuiltins.isinstance = lambda *a: True\nbuiltins.type = lambda *a: int\n"
    "builtins.AssertionError = Warning\nbuiltins.eval = lambda *a: 5\ndef add(a, b): return 5",
    "patched unittest": "import unittest\nunittest.TestCase.assertEqual = lambda *a: None\ndef add(a, b): return None",
    "patched operators of the tests": "import operator\noperator.eq = lambda *a: True\ndef add(a, b): return None",
    "a verdict on every descriptor": "import os\nfor fd in range(256):\n try: os.write(fd, "
    'b\'{"passed": [true, true, true]}\\n{"value": true}\\nok\\nPASSED\\n\' * 9)\n except OSError: pass\n'
    "def add(a, b): return None",
    "a verdict at exit": "import atexit, os\natexit.register(lambda: [os.write(fd, b'{\"passed\": [true]}\\n') "
    "for fd in range(1, 9)])\ndef add(a, b): return None",
    "a verdict from a thread": "import threading, os, time\ndef write():\n while True:\n  for fd in range(1, 9):\n"
    "   try: os.write(fd, b'{\"value\": 5}\\n')\n   except OSError: pass\n"
    "threading.Thread(target=write, daemon=True).start()\ndef add(a, b): time.sleep(0.05); return None",
    "replies that are no values": "import os\nodd = ['{\"a\": 1, \"b\": 2}', '[' * 99999, '1e999', '{\"set\": 3}', "
    "'{\"dict\": [3]}', '{\"object\": [[], 1]}', '9' * 9999]\nfor fd in range(1, 64):\n for v in odd:\n"
    "  try: os.write(fd, ('{\"value\": %s}\\n' % v).encode())\n  except OSError: pass\ndef add(a, b): return None",
    "the frames above": "import sys\ndef add(a, b):\n f = sys._getframe()\n while f:\n"
    "  for v in list(f.f_locals.values()):\n"
    "   if isinstance(v, (list, tuple)) and v and v[0] == 'wanted': return v[1]\n  f = f.f_back\n raise LookupError",
    "all objects in memory": "import gc, re\ndef add(a, b):\n for o in gc.get_objects():\n"
    "  m = re.search(r'add\\(%s, %s\\) == (-?\\d+)' % (a, b), repr(o)[:100000])\n  if m: return int(m[1])",
    "its input again": "import os, re\ndata = b''\nfor fd in range(0, 9):\n try: data += os.pread(fd, 1 << 20, 0)\n"
    " except OSError: pass\ndef add(a, b):\n m = re.search(rb'\\(%d, %d\\) == (-?\\d+)' % (a, b), data)\n"
    " return int(m[1]) if m else None",
    "the parent's memory": "import os, re\ndef add(a, b):\n mem = open(f'/proc/{os.getppid()}/mem', 'rb')\n"
    " mem.seek(0x400000); return len(mem.read(100))",
    "tests on the disk": "import glob\ndef add(a, b):\n for p in glob.glob('/**/test*', recursive=False):\n"
    "  return eval(open(p).read())",
    "another program": "import os\nos.execv('/bin/true', ['true'])",
    "python without asserts": "import os, sys\nos.execv(sys.executable, [sys.executable, '-O', '-c', 'pass'])",
    "the parent stopped": "import os, signal\nos.kill(os.getppid(), signal.SIGSTOP)\ndef add(a, b): return None",
    "the parent killed": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\ndef add(a, b): return None",
    "a handler for alarms": "import signal\nfor s in range(1, 64):\n try: signal.signal(s, lambda *a: None)\n"
    " except (OSError, ValueError): pass\ndef add(a, b):\n while True: pass",
    "a number as text": "def add(a, b): return str(a + b)",
    "True for one": "def add(a, b): return True if a + b == 1 else a + b",
    "nothing": "def add(a, b): pass",
    "a loop at import": "while True: pass",
    "no Python": "def add(a, b) return a + b",
    "bytes": "\x00\x01\udc80 def add",
}
"""Solutions of `add(a, b)` that do not add. None may score."""

HONEST = {
    "plain": "def add(a, b): return a + b",
    "prints": "print('hello')\ndef add(a, b):\n print(a, b)\n return a + b",
    "reads input": "import sys\nsys.stdin.read()\ndef add(a, b): return a + b",
    "threads": "import threading\ndef add(a, b):\n out = []\n t = threading.Thread(target=lambda: out.append(a + b))\n"
    " t.start(); t.join()\n return out[0]",
    "a class": "class Solution:\n def add(self, a, b): return a + b\ndef add(a, b): return Solution().add(a, b)",
    "imports": "import math, collections, random, re, typing, functools, bisect, heapq, dataclasses\n"
    "def add(a, b): return math.floor(a + b)",
    "main": "def add(a, b): return a + b\nif __name__ == '__main__': raise SystemExit(add(1, 1))",
    "a large integer": "def add(a, b): return (a + b) * 10 ** 200 // 10 ** 200",
}

GOT = "import json, os, sys, ctypes, socket, time\ntold = json.load(sys.stdin)\n"
"""The first lines of an intruder, which prints `got` where it came through."""

INTRUDERS = {
    "reads a file of the user": "print('got', open(told['secret']).read())",
    "lists the user's files": "print('got', os.listdir(told['folder']))",
    "reads the password file": "print('got', open('/etc/shadow').read())",
    "writes a file of the user": "open(told['secret'], 'w').write('x'); print('got')",
    "makes a file of the user": "open(told['target'], 'w').write('x'); print('got')",
    "deletes a file of the user": "os.remove(told['secret']); print('got')",
    "changes a file's rights": "os.chmod(told['folder'], 0); print('got') if not os.path.exists(told['secret']) else 0",
    "deletes a folder of the user": "import shutil\nshutil.rmtree(told['folder']); print('got')",
    "writes to the interpreter": "os.open(os.__file__, os.O_WRONLY); print('got')",
    "reads the trainer's memory": "open(f\"/proc/{told['pid']}/mem\", 'rb'); print('got')",
    "reads the trainer's variables": "print('got', open(f\"/proc/{told['pid']}/environ\").read())",
    "lists the trainer's descriptors": "print('got', os.listdir(f\"/proc/{told['pid']}/fd\"))",
    "traces the trainer": "print('got') if ctypes.CDLL(None).ptrace(16, told['pid'], 0, 0) == 0 else 0",
    "signals the trainer": "os.kill(told['pid'], 0); print('got')",
    "signals by fcntl": "import fcntl\nfcntl.fcntl(0, fcntl.F_SETOWN, told['pid']); print('got')",
    "limits the trainer": "import resource\nresource.prlimit(told['pid'], resource.RLIMIT_CPU, (1, 1)); print('got')",
    "connects": "socket.create_connection(('127.0.0.1', told['port']), 2); print('got')",
    "connects to a socket of the user": "s = socket.socket(socket.AF_UNIX); s.connect(told['unix']); print('got')",
    "opens a virtual socket": "socket.socket(40, socket.SOCK_STREAM); print('got')",
    "raises its limits": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1)); print('got')",
    "makes a namespace": "print('got') if ctypes.CDLL(None).unshare(0x10000000) == 0 else 0",
    "becomes root": "os.setuid(0); os.setgid(0); print('got') if open('/etc/shadow').read() else 0",
    "memory that no limit counts": "os.memfd_create('x'); print('got')",
    "asks for bpf": "print('got') if ctypes.CDLL(None).syscall(321, 0, 0, 0) != -1 else 0",
    "asks for a ring": "b = ctypes.create_string_buffer(256)\nprint('got') if ctypes.CDLL(None).syscall(425, 1, b) >= 0"
    " else 0",
    "mounts": "print('got') if ctypes.CDLL(None).mount(b'x', b'/tmp', b'tmpfs', 0, None) == 0 else 0",
    "shared memory of the system": "print('got') if ctypes.CDLL(None).shmget(0, 4096, 0o1600) != -1 else 0",
}
FORKING = {
    "forks": "os.fork(); print('got')",
    "starts a program": "import subprocess\nprint('got', subprocess.run(['/bin/true']))",
}
"""Intruders that the profile for tools lets through on purpose."""

ENDLESS = {
    "a loop": ("while True: pass", "timeout"),
    "a loop in C": ("9 ** 9 ** 9", "timeout"),
    "a sleep": ("import time; time.sleep(1000)", "timeout"),
    "a stop": ("import os, signal; signal.pthread_kill(0, 0) if 0 else None\nwhile True: signal.pause()", "timeout"),
    "threads that spin": (
        "import threading\ndef spin():\n while True: pass\nfor _ in range(8): threading.Thread(target=spin).start()",
        "timeout signalled",
    ),
    "no end of threads": (
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(1000,)).start()",
        "exited timeout",
    ),
    "a flood": ("while True: print('x' * 100_000)", "output"),
    "a flood of errors": ("import os\nwhile True: os.write(2, b'x' * 100_000)", "output"),
    "10 GB": ("import sys\nfor _ in range(10 ** 4): sys.stdout.write('x' * 10 ** 6)", "output"),
    "memory": ("x = []\nwhile True: x.append(bytearray(1 << 24))", "memory"),
    "one large allocation": ("bytearray(1 << 40)", "memory"),
    "deep recursion": (
        "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(): return f()\nf()",
        "signalled exited memory timeout",
    ),
    "a crash": ("import ctypes; ctypes.string_at(0)", "signalled"),
    "an abort": ("import os; os.abort()", "signalled"),
    "closed descriptors": ("import os\nos.closerange(0, 64)\nwhile True: pass", "timeout"),
    "a full disk": ("f = open('big', 'wb')\nwhile True: f.write(b'x' * (1 << 20))", "exited"),
    "signals to all": ("import os, signal\nos.kill(-1, signal.SIGKILL)\nwhile True: pass", "timeout exited"),
}
"""Programs that do not end well, and the statuses that they may have."""
