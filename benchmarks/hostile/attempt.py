"""Runs a case, in a fork of this process or as a whole one, and says what is wrong with how it ended."""

from __future__ import annotations

import base64
import dataclasses
import json
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

from cases import REWARDS, Place, Plan

HANG = 10.0
"""Seconds that nothing may take beyond what it usually does."""
USUAL = {"doctor": 10.0}
"""Seconds of a command by itself, on a quiet machine; a whole process takes `START` more."""
START = 8.0
MARK = "HOSTILE_CASE"

Files = dict[str, tuple[int, int, bytes | str]]


@dataclasses.dataclass
class Ended:
    code: int | None
    """Exit code, minus the signal that killed it; None: it hung, and was killed."""
    seconds: float
    output: str
    outlived: list[str]
    """What it left running."""


def run(plan: Plan, place: Place, whole: bool, slack: float) -> list[str]:
    """What is wrong with a case; nothing if it holds."""
    before, secrets = snapshot(place.root), place.secrets
    ended = attempt(plan, place, plan.words, whole, slack)
    wrong = faults(plan, ended, place, before, secrets)
    if plan.then is not None and not wrong:
        quiet = dataclasses.replace(plan, inside=None, sent=None, then=None)
        resumed = attempt(quiet, place, plan.then, whole, slack)
        wrong = [f"afterwards: {fault}" for fault in faults(quiet, resumed, place, before, secrets)]
        if resumed.code:
            wrong.append(f"afterwards: exit code {resumed.code}: {resumed.output[-300:]}")
    return wrong


# Ways to run ----------------------------------------------------------------------------------------------------------


def attempt(plan: Plan, place: Place, words: list[str], whole: bool, slack: float) -> Ended:
    """Until it ends, or has hung."""
    output = place.root / "output.txt"
    output.write_bytes(b"")
    environment = place.environment() | {MARK: str(place.root)}
    if whole and plan.serve is not None:
        threading.Thread(target=plan.serve, daemon=True).start()
    began = time.monotonic()
    pid = (start if whole else fork)(plan, place, words, environment, output)
    limit = HANG + plan.patience + USUAL.get(words[0], 3.0) + (START if whole else 0.0)
    code = wait(pid, began + slack * limit, plan.sent if whole else None, began + plan.seconds)
    seconds = time.monotonic() - began
    outlived = leftovers(place, pid)
    return Ended(code, seconds, output.read_text(errors="replace"), outlived)


def wait(pid: int, deadline: float, sent: int | None, sent_at: float) -> int | None:
    """The exit code; None if it had to be killed. Sends a signal on the way."""
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if sent is not None and time.monotonic() > sent_at:
            os.kill(pid, sent)
            sent = None
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None
        time.sleep(0.005)


def fork(plan: Plan, place: Place, words: list[str], environment: Mapping[str, str], output: Path) -> int:
    """Runs the command line in a fork; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        os.setsid()
        enter(plan, place, output)
        os.environ.update(environment)
        tempfile.tempdir = None
        sys.argv = ["stateset-lightning", *words]
        if plan.serve is not None:
            threading.Thread(target=plan.serve, daemon=True).start()
        if plan.inside is not None:
            plan.inside()
        from stateset_lightning.cli.main import main

        main()
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    except BaseException:
        logging.exception("it ended with an exception")  # as Python itself would print it
        status = 1
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
        with suppress(BaseException):
            end_of_interpreter()
        os._exit(status)


def end_of_interpreter() -> None:
    """What libraries have registered for the end, and threads that are waited for: where programs hang, too."""
    import atexit

    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()


def enter(plan: Plan, place: Place, output: Path) -> None:
    """The working folder, descriptors and limits of a case."""
    os.chdir(place.work)
    for number in signal.SIGTERM, signal.SIGINT, signal.SIGHUP:
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
    given = place.root / "stdin"
    given.write_bytes(plan.stdin)
    os.dup2(os.open(given, os.O_RDONLY), 0)
    written = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(written, 1)
    os.dup2(written, 2)
    if plan.file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (plan.file_limit, plan.file_limit))


def start(plan: Plan, place: Place, words: list[str], environment: Mapping[str, str], output: Path) -> int:
    """Starts the command line as a process of its own; returns its id."""

    def limits() -> None:
        if plan.file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (plan.file_limit, plan.file_limit))

    command = [sys.executable, "-m", "stateset_lightning", *words]
    given = place.root / "stdin"
    given.write_bytes(plan.stdin)
    with output.open("ab") as written, given.open("rb") as read:
        process = subprocess.Popen(
            command,
            cwd=place.work,
            env=os.environ | dict(environment),
            stdin=read,
            stdout=written,
            stderr=written,
            start_new_session=True,
            preexec_fn=limits,
        )
    process.returncode = 0  # `wait` is ours
    return process.pid


# What is wrong --------------------------------------------------------------------------------------------------------


def faults(plan: Plan, ended: Ended, place: Place, before: Files, secrets: Mapping[str, str]) -> list[str]:
    wrong = []
    if ended.code is None:
        wrong.append(f"it hung, and was killed after {ended.seconds:.1f} s: {ended.output[-200:]!r}")
    elif ended.code not in plan.codes:
        wrong.append(f"exit code {ended.code}, and not one of {plan.codes}: {ended.output.strip()[-400:]}")
    wrong += [f"a traceback: {trace}" for trace in tracebacks(ended.output)]
    after = snapshot(place.root)
    new = {name for name, what in after.items() if before.get(name) != what}
    wrong += [f"{name}: was changed or left" for name in sorted(new) if not allowed(name, plan, ended)]
    wrong += [f"{name}: is gone" for name in sorted(before.keys() - after.keys()) if not allowed(name, plan, ended)]
    wrong += [f"{process} runs on" for process in ended.outlived]
    texts = {"output": ended.output.encode()}
    written = (name for name in new if "/" in name and (place.root / name).is_file())
    texts |= {name: (place.root / name).read_bytes() for name in written}
    for where, secret in secrets.items():
        for name, text in texts.items():
            if form := next((form for form in forms(secret) if form in text), None):
                wrong.append(f"the secret of {where} is in {name}: {around(text, form)}")
    return wrong


def allowed(name: str, plan: Plan, ended: Ended) -> bool:
    """Whether a file of the case's folder may appear, change or go."""
    if name in ("output.txt", "stdin") or name.startswith("home/"):  # where libraries keep what is theirs
        return True
    if name.startswith("tmp/"):  # a process that is killed cleans up nothing
        return ended.code is None or ended.code < 0 or ended.code > 128
    return name.startswith(tuple(f"work/{output}" for output in plan.outputs))


def snapshot(root: Path) -> Files:
    """Size, time and place of each file."""
    found: Files = {}
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            status = path.lstat()
            kind = os.readlink(path) if path.is_symlink() else b""
            found[str(path.relative_to(root))] = (status.st_size, status.st_mtime_ns, kind)
    return found


def tracebacks(output: str) -> Iterator[str]:
    """The last lines of tracebacks that are not those of the reward's own file."""
    chained = "During handling of the above|The above exception was the direct cause"
    start = r"(?:Exception ignored in.*\n)?(?:^.*)Traceback \(most recent call last\):\n"
    frames = r"(?:[ \t|+].*\n|\n|" + chained + r".*\n)*"
    for match in re.finditer(rf"{start}{frames}(?:.*(?:\n|$))", output, re.MULTILINE):
        if f"{REWARDS}.py" not in match[0]:
            places = re.findall(r'File ".*/(.+?)", line (\d+), in', match[0])[-3:]
            last = match[0].strip().splitlines()[-1][:300]
            yield f"{' > '.join(':'.join(place) for place in places)}: {last}"
    signs = "Fatal Python error|never retrieved|Segmentation fault"
    for match in re.finditer(rf"^.*(?:{signs}).*\n(?:.*\n){{0,2}}", output, re.MULTILINE):
        if REWARDS not in match[0] and "'fails'" not in match[0]:  # of the reward's own tasks
            yield match[0].strip()[:300]


def forms(secret: str) -> list[bytes]:
    """A secret as it may be written."""
    encoded = [
        base64.b64encode(bytes(before) + secret.encode())[(0, 2, 3)[before] : (before + len(secret)) * 8 // 6]
        for before in range(3)
    ]
    return [secret.encode(), quote(secret, safe="").encode(), json.dumps(secret)[1:-1].encode(), *encoded]


def around(text: bytes, form: bytes) -> str:
    at = text.index(form)
    return repr(text[max(0, at - 60) : at + len(form) + 20].decode("latin-1"))


def leftovers(place: Place, pid: int) -> list[str]:
    """Processes of a case that are still there some seconds after its end; they are killed."""
    deadline = time.monotonic() + 3
    while (left := list(processes(place, pid))) and time.monotonic() < deadline:
        time.sleep(0.05)
    told = []
    for number in left:
        with suppress(OSError):
            told.append(
                Path(f"/proc/{number}/cmdline").read_bytes().replace(b"\0", b" ")[:100].decode(errors="replace")
            )
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    return told


def processes(place: Place, pid: int) -> Iterator[int]:
    """By the session of the case, or by what its environment says."""
    mark = f"{MARK}={place.root}\0".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError, IndexError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            is_mine = int(fields[3]) == pid or mark in (folder / "environ").read_bytes()
            if is_mine and fields[0] != "Z" and int(folder.name) != os.getpid():
                yield int(folder.name)


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


Maker = Callable[[Place], Plan]
