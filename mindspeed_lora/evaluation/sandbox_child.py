"""Confines itself, then runs the program from standard input: a script of its own that imports no package.

Before the program starts: limits on processor time, wall time, memory, files and processes (``setrlimit``, an alarm);
where that is possible no network interface (``unshare``) and no rights of root; and always a filter on system calls
(seccomp) by which no process or thread can be made, no signal sent, no other process slowed down, no socket opened, and
no file written, created, renamed or removed anywhere. Reading stays possible, for ``import``.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import signal
import sys

_CANNOT_CONFINE = 97
_NOBODY = 65534
_CLONE_NEWNET, _CLONE_NEWIPC, _CLONE_NEWUSER = 0x40000000, 0x08000000, 0x10000000
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _FILTER = 22, 38, 2
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050001, 0x80000000
_MISSING = 0x00050000 | 38
"""Answers of the filter: EPERM, and ENOSYS where a library then takes an older call that is refused too."""
_LOAD, _EQUAL, _ANY_BIT, _AT_LEAST, _ANSWER = 0x20, 0x15, 0x45, 0x35, 0x06
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_NEW_CALLS = "435 437"
"""clone3, openat2; numbers from 424 on are the same everywhere."""
_EVERYWHERE = "424 425 426 427 428 429 430 431 432 433 434 438 440 442 443 448 452"
_FIRST_UNKNOWN = 453
"""Calls from here on are younger than these lists, and are missing for the program."""
_X86_64 = """
    29 30 31 41 42 43 44 49 50 53 56 57 58 59 62 64 65 66 68 69 70 71 76 77 82 83 84 85 86 87 88 90 91 92 93 94 101 103
    109 112 126 129 132 133 135 141 142 144 153 155 159 160 161 163 164 165 166 167 168 169 170 171 172 173 175 176 179
    180 188 189 190 197 198 199 200 203 206 212 220 227 234 235 240 241 246 248 249 250 251 256 258 259 260 261 263 264
    265 266 268 272 279 280 285 288 297 298 300 302 304 305 308 310 311 313 314 316 319 320 321 322 323
"""
"""shm*, sockets, clone … execve, kill, IPC, truncate … chown, ptrace, queued signals, other processes' priorities and
processors, clocks, quotas, sessions, mounts, attributes, keys, the *at family, namespaces, other processes' memory,
modules, memfd_create, bpf, execveat."""
_AARCH64 = """
    0 5 6 7 14 15 16 18 30 33 34 35 36 37 38 39 40 41 42 45 46 47 51 52 53 54 55 58 60 88 89 91 92 97 104 105
    106 112 116 117 118 119 122 129 130 131 138 140 142 154 157 161 162 164 170 171 180 181 186 187 188 189 190
    191 192 193 194 195 196 198 199 200 201 202 203 206 217 218 219 220 221 224 225 238 239 240 241 242 261 262
    265 266 268 270 271 273 274 276 279 280 281 282 294
"""
_MACHINES = {
    # AUDIT_ARCH, refused calls, calls that open a file → the number of their argument with the flags, fcntl
    "x86_64": (0xC000003E, _X86_64, {2: 1, 257: 2}, 72),
    "aarch64": (0xC00000B7, _AARCH64, {56: 2}, 25),
}
_F_SETOWN, _F_SETSIG, _F_SETOWN_EX = 8, 10, 15
"""Commands of fcntl by which a file that becomes ready sends a signal to any process."""
_CAPABILITY_VERSION, _CAP_DAC_READ_SEARCH = 0x20080522, 1 << 2


class _Instruction(ctypes.Structure):
    _fields_ = [
        ("code", ctypes.c_ushort),
        ("if_true", ctypes.c_ubyte),
        ("if_false", ctypes.c_ubyte),
        ("value", ctypes.c_uint32),
    ]


class _CapabilityHeader(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _Capabilities(ctypes.Structure):
    _fields_ = [
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    ]


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.POINTER(_Instruction))]


def _limit(seconds: float, memory: int) -> None:
    whole = int(seconds) + 1
    limits = {
        resource.RLIMIT_CPU: whole,
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 0,
    }
    for kind, most in limits.items():
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def _without_network(libc: ctypes.CDLL) -> None:
    """A namespace with no interface, where the system grants one; sockets are refused by the filter anyway."""
    flags = _CLONE_NEWNET | _CLONE_NEWIPC
    if os.geteuid() != 0:
        flags |= _CLONE_NEWUSER
    libc.unshare(flags)


def _without_root() -> None:
    """Another user's rights, where that user can read the interpreter's own files."""
    if os.geteuid() != 0:
        return
    os.setgroups([])
    os.setegid(_NOBODY)
    os.seteuid(_NOBODY)
    try:
        with open(os.__file__, "rb"):
            pass
    except OSError:
        os.seteuid(0)
        os.setegid(0)
        return
    os.seteuid(0)
    os.setresgid(_NOBODY, _NOBODY, _NOBODY)
    os.setresuid(_NOBODY, _NOBODY, _NOBODY)


def _without_capabilities(libc: ctypes.CDLL) -> None:
    """What is left of root's rights, where it is still root: reading files."""
    kept = _CAP_DAC_READ_SEARCH if os.geteuid() == 0 else 0
    rights = (_Capabilities * 2)(_Capabilities(kept, kept, 0), _Capabilities(0, 0, 0))
    header = _CapabilityHeader(_CAPABILITY_VERSION, 0)
    if libc.capset(ctypes.byref(header), rights) != 0:
        # A right that the process did not have is none that it may keep.
        libc.capset(ctypes.byref(header), (_Capabilities * 2)())


def _filter_calls(libc: ctypes.CDLL) -> bool:
    """Installs the filter; False where this system has none."""
    if platform.machine() not in _MACHINES:
        return False
    architecture, refused, opening, fcntl = _MACHINES[platform.machine()]
    code = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 1, 0, architecture),
        (_ANSWER, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),
        # x86-64 has its calls a second time above this number.
        (_AT_LEAST, 0, 1, 0x40000000),
        (_ANSWER, 0, 0, _KILL),
        (_AT_LEAST, 0, 1, _FIRST_UNKNOWN),
        (_ANSWER, 0, 0, _MISSING),
    ]
    for number, argument in opening.items():
        code += [
            (_EQUAL, 0, 4, number),
            (_LOAD, 0, 0, 16 + 8 * argument),
            (_ANY_BIT, 0, 1, _WRITING),
            (_ANSWER, 0, 0, _REFUSE),
            (_ANSWER, 0, 0, _ALLOW),
        ]
    code += [
        (_EQUAL, 0, 6, fcntl),
        (_LOAD, 0, 0, 16 + 8),
        (_EQUAL, 3, 0, _F_SETOWN),
        (_EQUAL, 2, 0, _F_SETSIG),
        (_EQUAL, 1, 0, _F_SETOWN_EX),
        (_ANSWER, 0, 0, _ALLOW),
        (_ANSWER, 0, 0, _REFUSE),
    ]
    answers = {
        **dict.fromkeys((refused + _EVERYWHERE).split(), _REFUSE),
        **dict.fromkeys(_NEW_CALLS.split(), _MISSING),
    }
    for call, answer in answers.items():
        code += [(_EQUAL, 0, 1, int(call)), (_ANSWER, 0, 0, answer)]
    code.append((_ANSWER, 0, 0, _ALLOW))
    instructions = (_Instruction * len(code))(*(_Instruction(*fields) for fields in code))
    program = _Program(len(code), instructions)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return False
    installed: int = libc.prctl(_PR_SET_SECCOMP, _FILTER, ctypes.byref(program), 0, 0)
    return installed == 0


class _Nowhere:
    """Takes what a program prints."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass


def _main() -> None:
    seconds, memory = float(sys.argv[1]), int(sys.argv[2])
    password, _, program = sys.stdin.buffer.read().decode().partition("\n")
    libc = ctypes.CDLL(None, use_errno=True)
    _without_network(libc)
    with contextlib.suppress(OSError):
        _without_root()
    _without_capabilities(libc)
    _limit(seconds, memory)
    if not _filter_calls(libc):
        os._exit(_CANNOT_CONFINE)
    sys.stdin = open(os.devnull)  # noqa: SIM115  (stays open for the program)
    sys.stdout = sys.stderr = _Nowhere()
    exec(compile(program, "<program>", "exec"), {"__name__": "__program__"})
    os.write(1, password.encode())
    os._exit(0)


if __name__ == "__main__":
    try:
        _main()
    except BaseException:
        os._exit(1)
