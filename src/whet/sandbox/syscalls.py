"""System calls by name, as `name:x86_64:aarch64` (from the kernel's headers), and the filters made of them."""

from __future__ import annotations

import platform
import struct

RUN = """read:0:63 write:1:64 readv:19:65 writev:20:66 pread64:17:67 pwrite64:18:68 close:3:57 close_range:436:436
lseek:8:62 open:2:- openat:257:56 stat:4:- fstat:5:80 lstat:6:- newfstatat:262:79 statx:332:291 access:21:-
faccessat:269:48 faccessat2:439:439 getdents64:217:61 getcwd:79:17 chdir:80:49 readlink:89:- readlinkat:267:78
dup:32:23 dup2:33:- dup3:292:24 pipe:22:- pipe2:293:59 poll:7:- ppoll:271:73 select:23:- pselect6:270:72
epoll_create1:291:20 epoll_ctl:233:21 epoll_wait:232:- epoll_pwait:281:22 eventfd2:290:19 mmap:9:222 munmap:11:215
mprotect:10:226 mremap:25:216 madvise:28:233 brk:12:214 mincore:27:232 membarrier:324:283 futex:202:98
set_robust_list:273:99 rseq:334:293 set_tid_address:218:96 arch_prctl:158:- exit:60:93 exit_group:231:94
sched_yield:24:124 sched_getaffinity:204:123 getpid:39:172 getppid:110:173 gettid:186:178 getpgrp:111:- getpgid:121:155
getsid:124:156 getuid:102:174 geteuid:107:175 getgid:104:176 getegid:108:177 getresuid:118:148 getresgid:120:150
getgroups:115:158 rt_sigaction:13:134 rt_sigprocmask:14:135 rt_sigreturn:15:139 rt_sigpending:127:136
rt_sigtimedwait:128:137 rt_sigsuspend:130:133 sigaltstack:131:132 pause:34:- alarm:37:- setitimer:38:103
getitimer:36:102 nanosleep:35:101 clock_nanosleep:230:115 clock_gettime:228:113 clock_getres:229:114 gettimeofday:96:169
time:201:- times:100:153 getrusage:98:165 getrlimit:97:163 uname:63:160 sysinfo:99:179 getrandom:318:278 umask:95:166
restart_syscall:219:128 getcpu:309:168"""
"""What a program needs that computes and reads files. Opening for writing is left to the file system."""
WRITE = """mkdir:83:- mkdirat:258:34 unlink:87:- unlinkat:263:35 rmdir:84:- rename:82:- renameat:264:38
renameat2:316:276 link:86:- linkat:265:37 symlink:88:- symlinkat:266:36 truncate:76:45 ftruncate:77:46
fallocate:285:47 chmod:90:- fchmod:91:52 fchmodat:268:53 creat:85:- utimensat:280:88 fsync:74:82 fdatasync:75:83
flock:73:32 sendfile:40:71 copy_file_range:326:285 statfs:137:43 fstatfs:138:44 fadvise64:221:223 kill:62:129
tkill:200:130 tgkill:234:131"""
"""Where the files and the processes that can be reached are the program's own."""
NEVER = """ptrace:101:117 process_vm_readv:310:270 process_vm_writev:311:271 kcmp:312:272 bpf:321:280 seccomp:317:277
perf_event_open:298:241 userfaultfd:323:282 io_uring_setup:425:425 io_uring_enter:426:426 io_uring_register:427:427
keyctl:250:219 add_key:248:217 request_key:249:218 mount:165:40 umount2:166:39 pivot_root:155:41 chroot:161:51
unshare:272:97 setns:308:268 mount_setattr:442:442 move_mount:429:429 open_tree:428:428 fsopen:430:430 fsmount:432:432
fsconfig:431:431 fspick:433:433 swapon:167:224 swapoff:168:225 reboot:169:142 kexec_load:246:104
kexec_file_load:320:294 init_module:175:105 finit_module:313:273 delete_module:176:106 acct:163:89 quotactl:179:60
settimeofday:164:170 clock_settime:227:112 clock_adjtime:305:266 adjtimex:159:171 personality:135:92 iopl:172:-
ioperm:173:- name_to_handle_at:303:264 open_by_handle_at:304:265 memfd_create:319:279 memfd_secret:447:447
pidfd_getfd:438:438 process_madvise:440:440 move_pages:279:239 mbind:237:235 migrate_pages:256:238 vmsplice:278:75
shmget:29:194 shmat:30:196 shmctl:31:195 semget:64:190 semop:65:193 semctl:66:191 msgget:68:186 msgsnd:69:189
msgrcv:70:188 msgctl:71:187 mq_open:240:180 mknod:133:- mknodat:259:33 fanotify_init:300:262 syslog:103:116
vhangup:153:58 landlock_create_ruleset:444:444"""
"""What not even tools need: the kernel's larger surfaces, other processes' memory, memory that no limit counts."""
SPECIAL = "clone:56:220 clone3:435:435 ioctl:16:29 prlimit64:302:261 fcntl:72:25 socket:41:198"
NEWEST = 451
"""Calls that are newer than this list do not exist."""

ARCHITECTURES = {"x86_64": (1, 0xC000003E), "aarch64": (2, 0xC00000B7)}
ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
EPERM, ENOTTY, ENOSYS = ERRNO | 1, ERRNO | 25, ERRNO | 38
LOAD, EQUAL, AT_LEAST, ANY_OF, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
FIRST, SECOND = 16, 24
"""Where the first two arguments stand in `struct seccomp_data` (their lower halves, little-endian)."""
CLONE_THREAD, CLONE_NAMESPACES = 0x00010000, 0x7E020000

_Step = tuple[int, int, int, int]


def number_of(name: str) -> int:
    """A system call's number on this machine. Raises KeyError for another architecture."""
    return _numbers(SPECIAL + " " + RUN + " " + NEVER)[name]


def program(*, write: bool, processes: bool) -> bytes:
    """A seccomp filter as BPF. Raises KeyError for an architecture whose numbers are not listed.

    `write`: files may be changed and processes signalled (where both are the program's own). `processes`: all but what
    is never allowed: children, programs, sockets.
    """
    arch = ARCHITECTURES[platform.machine()][1]
    special = _numbers(SPECIAL)
    arguments: dict[str, list[_Step]] = {
        "clone3": [(RETURN, 0, 0, ENOSYS)],  # its flags lie in memory; the C library falls back to clone
        "prlimit64": [(LOAD, 0, 0, FIRST), (EQUAL, 0, 1, 0), (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, EPERM)],
    }
    if processes:
        families = [step for family in (1, 2, 10) for step in ((EQUAL, 0, 1, family), (RETURN, 0, 0, ALLOW))]
        arguments["socket"] = [(LOAD, 0, 0, FIRST), *families, (RETURN, 0, 0, EPERM)]
        arguments["clone"] = _flag(CLONE_NAMESPACES, EPERM, ALLOW)
        listed, listed_get, others_get = _numbers(NEVER), EPERM, ALLOW
    else:
        arguments["ioctl"] = [(RETURN, 0, 0, ENOTTY)]
        arguments["clone"] = _flag(CLONE_THREAD, ALLOW, EPERM)
        # F_DUPFD to F_SETLKW, and F_DUPFD_CLOEXEC: none that sends signals or resizes pipes.
        few = [(AT_LEAST, 1, 0, 8), (RETURN, 0, 0, ALLOW), (EQUAL, 0, 1, 1030), (RETURN, 0, 0, ALLOW)]
        arguments["fcntl"] = [(LOAD, 0, 0, SECOND), *few, (RETURN, 0, 0, EPERM)]
        listed, listed_get, others_get = _numbers(f"{RUN} {WRITE}" if write else RUN), ALLOW, EPERM
    steps: list[_Step] = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, arch), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    steps += [(AT_LEAST, 0, 1, NEWEST), (RETURN, 0, 0, ENOSYS)]  # the x32 calls of x86_64 as well
    for name, body in arguments.items():
        steps += [(EQUAL, 0, len(body), special[name]), *body]
    for number in listed.values():
        steps += [(EQUAL, 0, 1, number), (RETURN, 0, 0, listed_get)]
    return b"".join(struct.pack("HBBI", *step) for step in [*steps, (RETURN, 0, 0, others_get)])


def _flag(mask: int, there: int, absent: int) -> list[_Step]:
    return [(LOAD, 0, 0, FIRST), (ANY_OF, 0, 1, mask), (RETURN, 0, 0, there), (RETURN, 0, 0, absent)]


def _numbers(names: str) -> dict[str, int]:
    column = ARCHITECTURES[platform.machine()][0]
    found = (entry.split(":") for entry in names.split())
    return {entry[0]: int(entry[column]) for entry in found if entry[column] != "-"}
