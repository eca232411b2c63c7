"""The completion script, run by the shells that it is for."""

import os
import pty
import shutil
import signal
import subprocess

import pytest

from stateset_lightning.cli import main
from stateset_lightning.completion import in_shell, script

ASK = """
source {script}
COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _stateset_lightning
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory):
    path = tmp_path_factory.mktemp("completion") / "bash"
    path.write_text(script("bash"))
    return path


def test_bash_completes(bash_script):
    def complete(*words):
        ask = ASK.format(script=bash_script, words=" ".join(f"'{word}'" for word in ("stateset-lightning", *words)))
        done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=False)
        assert done.stderr == ""
        return done.stdout.split()

    assert complete("f") == ["fit"]
    assert complete("doc") == ["doctor"]
    assert complete("fit", "--data.overl") == ["--data.overlong_prompts"]
    assert "--model.policy.model_name" in complete("fit", "--model.policy.mo")
    assert complete("fit", "--data.overlong_prompts", "") == ["error", "drop", "truncate_left"]
    assert complete("fit", "--data.overlong_prompts", "=", "tr") == ["truncate_left"]
    assert complete("fit", "--data.shuffle", "f") == ["false"]
    assert "stateset_lightning.algorithm.GSPO" in complete("fit", "--model.algorithm", "stateset_lightning.algorithm.G")
    assert complete("export", "--over") == ["--overwrite"]
    assert set(complete("doctor", "--sample")) >= {"--sample", "--samples.num_prompts"}
    assert complete("fit", "--config", "a") == []  # left to the shell, which knows the files


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh here")
def test_zsh_completes(bash_script, tmp_path):
    (tmp_path / "zsh").write_text(in_shell("zsh", bash_script.read_text().split("\n", 1)[1]))
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(tmp_path)
        os.execvpe("zsh", ["zsh", "-f", "-i"], {**os.environ, "TERM": "dumb", "HOME": str(tmp_path)})
    try:
        shown = ""
        os.write(terminal, b"source ./zsh; echo read''y\n")
        while "ready" not in shown:
            shown += os.read(terminal, 4096).decode(errors="replace")
        os.write(terminal, b"stateset-lightning fit --data.overlong_prompts tr\t")
        while "truncate_left" not in shown:
            shown += os.read(terminal, 4096).decode(errors="replace")
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def test_an_unknown_shell_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["completion", "fish"])
    assert stopped.value.code == 2
    assert "bash, zsh" in capsys.readouterr().err.replace("'", "")
