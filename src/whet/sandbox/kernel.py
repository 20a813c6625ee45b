"""The Linux layers that confine a process and what it starts, through the C library. Each raises OSError if it fails.

Namespaces give it a file system, process numbers and a network of its own; Landlock takes file access from it where
namespaces cannot be had; seccomp takes system calls; capabilities and limits go in any case.
"""

from __future__ import annotations

import ctypes
import os
import resource
import socket
import struct
import sys
from collections.abc import Sequence
from contextlib import suppress
from fcntl import ioctl
from functools import partial
from pathlib import Path

from whet.sandbox import syscalls

NEW_NS, NEW_UTS, NEW_IPC, NEW_USER, NEW_PID, NEW_NET = (
    0x00020000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
SET_PDEATHSIG, SET_DUMPABLE, SET_SECCOMP, CAPBSET_DROP, SET_NO_NEW_PRIVS = 1, 4, 22, 24, 38
MS_NOSUID, MS_NODEV, MS_PRIVATE, MS_REC, MNT_DETACH = 2, 4, 1 << 18, 1 << 14, 2
READ_ONLY, CLONE_TREE, RECURSIVE, EMPTY_PATH, HERE = 1, 1, 0x8000, 0x1000, -100
LANDLOCK_READ = 1 << 2 | 1 << 3
NOBODY = 65534
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
SEEN = ("/usr", "/lib", "/lib64", "/bin", "/sbin", "/etc/ld.so.cache", "/etc/alternatives", *DEVICES)
"""What of the machine a program may read, beside the interpreter: no user's own files."""

_libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: object) -> int:
    """A function of the C library, or `syscall` of a number. Raises OSError where it returns -1."""
    result: int = getattr(_libc, name)(*arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result


prctl = partial(call, "prctl")
unshare = partial(call, "unshare")


PACKAGES = sys.argv[3:]
"""Folders of installed packages, which programs may import."""


def seen() -> list[str]:
    """The readable paths that there are, the interpreter's own included."""
    own = (sys.base_prefix, sys.base_exec_prefix)
    return list(dict.fromkeys(path for path in (*SEEN, *own, *PACKAGES) if os.path.exists(path)))


# ------------------------------------------------------------------------------------------------ Landlock


def landlock_rules(*folders: str) -> int:
    """Rules by which only `seen()` and these can be read, nothing be written, no TCP, no signals to processes outside.

    What the kernel is too old for is left out, and found missing by the canaries.
    """
    version = call("syscall", 444, None, 0, 1)
    files = (1 << (13 + (version >= 2) + (version >= 3))) - 1 | (1 << 15 if version >= 5 else 0)
    whole = struct.pack("QQQ", files, 3, 3)  # files; TCP from version 4; signals and abstract sockets from version 6
    rules = call("syscall", 444, whole, 24 if version >= 6 else 16 if version >= 4 else 8, 0)
    for path in (*seen(), *folders):
        place = os.open(path, os.O_PATH)
        allowed = LANDLOCK_READ if os.path.isdir(path) else LANDLOCK_READ & -LANDLOCK_READ
        call("syscall", 445, rules, 1, struct.pack("=Qi", allowed, place), 0)
        os.close(place)
    return rules


def landlock(rules: int) -> None:
    """These rules hold from now on."""
    prctl(SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    call("syscall", 446, rules, 0)


# ---------------------------------------------------------------------------------------------- namespaces


def enter_namespaces(*, proc: bool) -> int:
    """A root of its own with `seen()` read-only in it, no network, and this process's children numbered from 1.

    Returns in a new process, the first of them, with a descriptor of their numbers; this one waits for it and exits.
    `proc`: with a /proc, which shows the new numbers only, so that programs can get one.
    """
    if os.geteuid() == 0:
        with suppress(PermissionError):  # of a container without rights
            os.setgroups([])
    helper, go = _mapper()
    unshare(NEW_USER | NEW_NS | NEW_UTS | NEW_IPC | NEW_NET | NEW_PID)
    os.write(go, b"g")
    if os.waitpid(helper, 0)[1] != 0:
        raise OSError(0, "the ids of the user namespace cannot be mapped")
    prctl(SET_DUMPABLE, 1, 0, 0, 0)
    call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
    # Held while they can still be reached: the interpreter may lie in a folder that is its owner's alone.
    trees = [(path, os.path.isdir(path), _tree(path)) for path in seen() if not os.path.islink(path)]
    links = [(path, os.readlink(path)) for path in seen() if os.path.islink(path)]
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    first = os.fork()
    if first:
        os.waitpid(first, 0)
        os._exit(0)
    prctl(SET_PDEATHSIG, 9, 0, 0, 0)
    numbers = os.open("/proc/self/ns/pid", os.O_RDONLY)
    call("mount", b"root", b"/tmp", b"tmpfs", MS_NOSUID, b"size=1m")
    for path, folder, tree in trees:
        target = Path(f"/tmp{path}")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.mkdir(exist_ok=True) if folder else target.touch()
        call("syscall", syscalls.number_of("move_mount"), tree, b"", HERE, bytes(target), 4)
        os.close(tree)
    for path, leads in links:
        Path(f"/tmp{path}").symlink_to(leads)
    for name in ("tmp", "proc", "old"):
        Path("/tmp", name).mkdir()
    if proc:  # while the machine's own is in sight, without which the kernel allows no other
        call("mount", b"proc", b"/tmp/proc", b"proc", MS_NOSUID | MS_NODEV, None)
    call("syscall", syscalls.number_of("pivot_root"), b"/tmp", b"/tmp/old")
    call("umount2", b"/old", MNT_DETACH)
    os.chdir("/")
    _read_only(HERE, b"/", 0)
    return numbers


def own_namespaces(*, tools: bool, disk_mb: int) -> None:
    """For one program, process 1 of its numbers: an empty /tmp; with `tools` a /proc, IPC and a loopback as well."""
    unshare(NEW_NS | (NEW_NET | NEW_IPC if tools else 0))
    call("mount", b"tmp", b"/tmp", b"tmpfs", MS_NOSUID | MS_NODEV, f"size={disk_mb}m,nr_inodes=4096".encode())
    os.chdir("/tmp")
    if tools:
        call("mount", b"proc", b"/proc", b"proc", MS_NOSUID | MS_NODEV, None)
        with socket.socket() as any_socket:  # SIOCSIFFLAGS: up
            ioctl(any_socket, 0x8914, struct.pack("16sH14x", b"lo", 1))


def _mapper() -> tuple[int, int]:
    """A process that stays outside and, at a byte in the pipe, names the user of this one's namespace: its number 0.

    The user outside is nobody where this is root, and where there is a nobody: not so in a container without rights.
    """
    (wait, go), parent = os.pipe(), os.getpid()
    known = [[int(number) for number in line.split()] for line in Path("/proc/self/uid_map").read_text().splitlines()]
    root = os.geteuid() == 0 and any(first <= NOBODY < first + count for first, _, count in known)
    user, group = (NOBODY, NOBODY) if root else (os.geteuid(), os.getegid())
    if helper := os.fork():
        os.close(wait)
        return helper, go
    try:
        os.close(go)
        os.read(wait, 1)
        for file, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            Path(f"/proc/{parent}/{file}").write_text(text)
        os._exit(0)
    finally:
        os._exit(1)


def _tree(path: str) -> int:
    """A copy of what is mounted there, read-only, not in sight yet."""
    tree = call("syscall", syscalls.number_of("open_tree"), HERE, path.encode(), CLONE_TREE | RECURSIVE)
    _read_only(tree, b"", EMPTY_PATH | RECURSIVE)
    return tree


def _read_only(place: int, path: bytes, flags: int) -> None:
    wanted = struct.pack("QQQQ", READ_ONLY | 2, 0, 0, 0)  # and without set-user-id
    call("syscall", syscalls.number_of("mount_setattr"), place, path, flags, wanted, len(wanted))


# ------------------------------------------------------------------------------------ rights and limits


def drop_capabilities() -> None:
    """Of user 0 too, and for good: no program that it starts gets any back."""
    for capability in range(64):
        if _libc.prctl(CAPBSET_DROP, capability, 0, 0, 0) < 0:
            break
    call("capset", struct.pack("II", 0x20080522, 0), struct.pack("IIIIII", *[0] * 6))


def filter_calls(bpf: bytes) -> None:
    """System calls that the filter refuses are refused from now on."""
    held = ctypes.create_string_buffer(bpf, len(bpf))
    prctl(SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    prctl(SET_SECCOMP, 2, struct.pack("HxxxxxxQ", len(bpf) // 8, ctypes.addressof(held)), 0, 0)


def limit(*, memory_mb: int, cpu_s: int, file_mb: int, processes: int) -> None:
    """Limits of each process, hard: memory as address space.

    `processes` counts threads as well, of all that the user has in this user namespace; it holds for ordinary users.
    """
    numbers: Sequence[tuple[int, int]] = (
        (resource.RLIMIT_AS, memory_mb << 20), (resource.RLIMIT_CPU, cpu_s), (resource.RLIMIT_FSIZE, file_mb << 20),
        (resource.RLIMIT_NOFILE, 64), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NPROC, processes),
        (resource.RLIMIT_MEMLOCK, 0), (resource.RLIMIT_STACK, min(64, memory_mb) << 20),
    )  # fmt: skip
    for which, most in numbers:
        ceiling = resource.getrlimit(which)[1]
        most = most if ceiling == resource.RLIM_INFINITY else min(most, ceiling)
        resource.setrlimit(which, (most, most))
