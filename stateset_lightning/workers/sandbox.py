"""Runs code that nobody trusts: the script of a process of its own, `python -I -S sandbox.py`, in a folder of its own.

The launcher reads a task and goes into new namespaces where the system lets it: without a network, with no processes
but the code's, and with few files. There its child, the guard, forks the code for one case after the other, and ends it
at its time, with all that it started. None of the three knows what the task's author expects as answers.

As root, the code is a user of its own, whose processes can be counted and who reads no more than everybody. It runs in
a fork of the guard, since an interpreter takes longer to start: so nothing in this process may be a secret to it.
"""

import ctypes
import gc
import json
import math
import os
import resource
import signal
import sys
import time
from contextlib import suppress
from glob import glob
from typing import IO, Any

# Of Linux: namespaces of the network, mounts, IPC and process ids; one of users lets others than root have these.
NAMESPACE_FLAGS, _USERS = 0x40000000 | 0x00020000 | 0x08000000 | 0x20000000, 0x10000000
PDEATHSIG, CHILD_SUBREAPER, _NO_NEW_PRIVS = 1, 36, 38  # of prctl
_PRIVATE, _BIND, _MOUNT_SETATTR, _READ_ONLY = 0x44000, 0x5000, 442, 1

_READABLE = "/usr /bin /lib /lib64 /etc/alternatives /etc/ld.so.cache /dev/null /dev/zero /dev/random /dev/urandom"
_PROCESSES, _FILES, _FILE_BYTES, _ANSWER_BYTES = 32, 256, 2**24, 2**24  # answers: of all cases together
_OUT_OF_MEMORY = 97  # an exit code

_LIBC = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Be the launcher: start the guard, and take everything along when the trainer has gone."""
    task = json.load(sys.stdin)
    user = os.getuid() or 61184 + os.getpid() % 4336  # what systemd gives to services as they come
    sys.path += task["site"]
    os.umask(0o022)
    os.chmod(".", 0o711)
    os.mkdir("work")
    os.chown("work", user, -1)
    prctl(PDEATHSIG, signal.SIGTERM)
    prctl(CHILD_SUBREAPER, 1)
    with open("input", "w+b", 0) as given, open("answer", "w+b", 0) as answer:
        enclosed = _enclose(task["namespaces"])
        os.chdir("/tmp" if enclosed else "work")
        os.environ["HOME"] = os.getcwd()
        gc.freeze()  # so that forks share more
        if not (guard := os.fork()):
            _guard(task, user, enclosed, given, answer)
            return
    signal.signal(signal.SIGTERM, lambda *_: os.kill(guard, signal.SIGKILL))
    _, status = os.waitpid(guard, 0)
    end_all(guard)
    os._exit(status and 1)


def plain(value: Any) -> Any:
    """A result as what JSON can hold: tuples as lists; the keys of a dict and the items of a set keep their types."""
    if isinstance(value, dict):
        return {"dict": sorted(([plain(key), plain(item)] for key, item in value.items()), key=repr)}
    if isinstance(value, set | frozenset):
        return {"set": sorted(map(plain, value), key=repr)}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def end_all(child: int) -> None:
    """Kill the group of a child that has ended, and all that it left behind to this process."""
    # Its group at once, also where there is no /proc. PermissionError: macOS says so where only the ended one is left.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    with suppress(ChildProcessError):  # none is left
        while True:
            for pid in [-1] if os.getpid() == 1 else _descendants(os.getpid()):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            os.waitpid(-1, 0)


def prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        _LIBC.prctl(option, ctypes.c_ulong(value))


def _descendants(pid: int) -> list[int]:
    """The processes below one, also those in sessions of their own. Linux only; elsewhere none."""
    below: list[int] = []
    for children in glob(f"/proc/{pid}/task/*/children"):
        with suppress(OSError), open(children) as file:  # it has ended meanwhile
            for child in map(int, file.read().split()):
                below += [child, *_descendants(child)]
    return below


# Around the code ------------------------------------------------------------------------------------------------------


def _enclose(namespaces: int) -> bool:
    """Go into new namespaces, with a tree of files in which little can be read, and nothing written but `/tmp`.

    Returns:
        Whether the system lets it. It may allow them but not to mount; then the files stay as they are.
    """
    user, group = os.getuid(), os.getgid()
    if getattr(_LIBC, "unshare", lambda flags: -1)(namespaces | (_USERS if user else 0)):
        return False
    root = os.getcwd()
    try:
        own = {"setgroups": "deny", "uid_map": f"{user} {user} 1", "gid_map": f"{group} {group} 1"}
        for name, text in own.items() if user else ():
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        _mount("/", "/", _PRIVATE)
        _mount("tmpfs", root, 0, "size=1m,nr_inodes=1k,mode=755")
        os.mkdir(f"{root}/tmp")
        _mount("tmpfs", f"{root}/tmp", 0, "size=64m,nr_inodes=4k,mode=1777")
        for path in filter(os.path.exists, [*_READABLE.split(), sys.base_prefix, *sys.path]):
            os.makedirs(root + (path if os.path.isdir(path) else os.path.dirname(path)), exist_ok=True)
            if not os.path.isdir(path):
                open(root + path, "w").close()
            _mount(path, root + path, _BIND)
        os.chroot(root)
    except OSError:
        return False
    return True


def _mount(source: str, target: str, flags: int, options: str = "") -> None:
    """Mount a temporary file system, or what is at `source` for reading alone."""
    failed = _LIBC.mount(source.encode(), target.encode(), b"tmpfs", ctypes.c_ulong(flags), options.encode())
    if flags == _BIND and not failed:
        read_only = (ctypes.c_uint64 * 4)(_READ_ONLY)
        failed = _LIBC.syscall(_MOUNT_SETATTR, -100, target.encode(), 0x8000, read_only, 32)  # with all below it
    if failed:
        raise OSError(ctypes.get_errno(), "cannot be mounted", source)


def _guard(task: dict[str, Any], user: int, enclosed: bool, given: IO[bytes], answer: IO[bytes]) -> None:
    """Run the cases, and print how each ended and what it gave; the processes of the code return from here."""
    prctl(PDEATHSIG, signal.SIGKILL)
    prctl(CHILD_SUBREAPER, 1)
    ends, until, left = [], time.monotonic() + task["total_timeout"], _ANSWER_BYTES
    for case in task["cases"]:
        # In the files' places, as they are open: the code could put others there.
        for file in (given, answer):
            file.seek(0)
            file.truncate()
        given.write(case["input"].encode())
        given.seek(0)
        nonce = os.urandom(16).hex() if case["call"] and task["language"] == "python" else ""
        seconds = max(min(task["case_timeout"], until - time.monotonic()), 0.001)
        if not (code := os.fork()):
            _limit(task, user, enclosed)
            null = os.open("/dev/null", os.O_RDWR)
            for stream, number in enumerate((given.fileno(), null if nonce else answer.fileno(), null)):
                os.dup2(number, stream)
            _run(task, case["call"], nonce, answer)
            return
        end = _end(code, seconds)
        end_all(code)
        output = os.pread(answer.fileno(), left, 0).decode(errors="replace")
        left -= len(output)
        # What the code itself has written is no result.
        ends.append((end, output.removeprefix(nonce) if output.startswith(nonce) else ""))
    print(json.dumps((enclosed, ends)))


def _end(code: int, seconds: float) -> str:
    """Wait for a process of the code, end it at its time, and say how it ended."""
    until = time.monotonic() + seconds

    def stop(*_: object) -> None:
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(code, signal.SIGKILL)

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    _, status = os.waitpid(code, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    known = {0: "ended", _OUT_OF_MEMORY: "memory", -signal.SIGXCPU: "timeout"}
    return "timeout" if time.monotonic() > until else known.get(os.waitstatus_to_exitcode(status), "error")


# The code -------------------------------------------------------------------------------------------------------------


def _limit(task: dict[str, Any], user: int, enclosed: bool) -> None:
    """Give up what the code must not have."""
    os.setsid()
    processes = _PROCESSES
    if os.getuid() != user:
        if not enclosed:
            _open_path()
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    elif not enclosed:  # all that the user has are counted
        with suppress(OSError), open("/proc/loadavg") as file:
            processes += int(file.read().split()[3].split("/")[1])
    prctl(PDEATHSIG, signal.SIGKILL)
    prctl(_NO_NEW_PRIVS, 1)
    if hasattr(_LIBC, "capset"):
        _LIBC.capset((ctypes.c_uint * 2)(0x20080522, 0), (ctypes.c_uint * 6)())
    limits = {"CPU": math.ceil(task["case_timeout"]) + 1, "AS": task["memory"] * 2**20, "FSIZE": _FILE_BYTES}
    for name, limit in {**limits, "NPROC": processes, "NOFILE": _FILES, "CORE": 0}.items():
        with suppress(ValueError, OSError):  # it is lower already, or macOS has none
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))


def _open_path() -> None:
    """Python may lie where root alone can go: its modules are found through open folders."""
    opened = {path: f"/proc/self/fd/{os.open(path, os.O_PATH)}" for path in filter(os.path.isdir, sys.path)}
    sys.path[:] = opened.values()
    for module in list(sys.modules.values()):
        if places := getattr(module, "__path__", ()):
            folder, name = os.path.split(places[0])
            module.__path__ = [f"{opened.get(folder, folder)}/{name}"]


def _run(task: dict[str, Any], call: str, nonce: str, answer: IO[bytes]) -> None:
    """Be the code; what it raises ends the process in Python's own way."""
    if task["language"] == "sh":
        script = 'eval "$1" > /dev/null\neval "$2"' if call else 'eval "$1"'
        os.execv("/bin/sh", ["sh", "-c", script, "sh", task["code"], call])
    sys.stdin = open(0)  # noqa: SIM115
    module = type(sys)("solution" if call else "__main__")
    sys.modules[module.__name__] = module
    vars(module).update(exit=sys.exit, quit=sys.exit)  # as without -S
    try:
        exec(compile(task["code"], "solution.py", "exec", dont_inherit=True), vars(module))
        if call:
            result = json.dumps(plain(eval(call, vars(module))), default=lambda value: value.item())
            answer.write((nonce + result).encode())
            os._exit(0)
    except MemoryError:
        os._exit(_OUT_OF_MEMORY)


if __name__ == "__main__":
    main()
