"""Secrets do not reach saved configs, logs, checkpoints, samples, reports or the console; ordinary settings do."""

import base64
import io
import itertools
import json
import math
import random
import statistics
import sys
import time
from datetime import date
from fractions import Fraction
from pathlib import Path
from urllib.parse import quote

import numpy
import pytest
import yaml
from pydantic import SecretStr

from stateset_lightning import redaction
from stateset_lightning.cli.main import main
from stateset_lightning.data import read_split
from stateset_lightning.errors import ServerError
from stateset_lightning.redaction import (
    LONGEST,
    RedactedStream,
    is_secret_name,
    json_text,
    known_cut,
    plain,
    redacted,
    redacted_text,
    remember,
    remember_flags,
    spare,
)
from stateset_lightning.rewards.base import failure
from stateset_lightning.workers import WorkerPool

KEY = "sk-proj-0123456789abcdefghij"
VALUE = 'Zebra+8/"quoted" umlaut-ü&=%'
"""A secret that looks like none, and is written differently wherever it goes."""


@pytest.fixture(autouse=True)
def _nothing_is_remembered(monkeypatch):
    for name, nothing in {"_written": (), "_spared": set(), "_environment": {}}.items():
        monkeypatch.setattr(redaction, name, nothing)
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # `main` replaces them for good
    monkeypatch.setattr(sys, "stderr", sys.stderr)


@pytest.mark.parametrize(
    "name",
    [
        *("api_key", "WANDB_API_KEY", "hf_token", "token", "openai.api_key", "password", "client_secret", "secretKey"),
        *("passwd", "OPENAI_KEY", "accessToken", "dsn", "SENTRY_DSN", "x-api-key", "X-Api-Key", "APIKey", "apikey"),
        *("PGPASSWORD", "MYSQL_PWD", "SMTP_PASS", "GITHUB_PAT", "authToken", "basic-auth", "HTTP_AUTHORIZATION"),
        *("credentials", "AWS_SECRET_ACCESS_KEY", "dbConnection", "connection_string", "TOKEN_OF_CI", "api_keys"),
        *("session-cookie", "HFToken", "ssh_passphrase", "userpassword"),
    ],
)
def test_names_of_secrets(name):
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    [
        *("max_new_tokens", "max_prompt_tokens", "tokenizer", "eos_token", "key", "monitor", "model_name", "author"),
        *("path", "PATH", "keyboard", "monkey", "api_key_env", "token_file", "sort_key", "image_token", "auth_type"),
        *("max_connections", "passes", "compass", "authority", "special_tokens", "PATTERN", "connection_timeout", ""),
    ],
)
def test_names_that_are_none(name):
    assert not is_secret_name(name)


def test_containers_are_copied_without_secrets():
    config = {
        "judge": {"init_args": {"api_key": "hunter2", "url": f"https://me:hunter2@host/v1?k={KEY}", "max_tokens": 5}},
        "token": None,
        "pin": {"passcode": 1234567890, "auth": b"bytes-of-a-secret", "connection": 5, "password": True},
        "typed": SecretStr("hunter2"),
        "certificate_key": "/etc/tls/key.pem",
    }
    config["list"] = [{"password": "x"}, "hf_abcdefghijklmnopqrst"]
    config["itself"] = config
    found = redacted(config)
    assert found.pop("itself")["itself"] == "***"
    assert found == {
        "judge": {"init_args": {"api_key": "***", "url": "https://***@host/v1?k=***", "max_tokens": 5}},
        "token": None,
        "pin": {"passcode": "***", "auth": "***", "connection": 5, "password": True},
        "typed": "***",
        "certificate_key": "/etc/tls/key.pem",
        "list": [{"password": "***"}, "***"],
    }
    assert config["judge"]["init_args"]["api_key"] == "hunter2"


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("model.reward: api_key=hunter2 is refused", "model.reward: api_key=*** is refused"),
        ("{'hf_token': 'abc'}", "{'hf_token': '***'}"),
        (f"Incorrect key {KEY}.", "Incorrect key ***."),
        ("unexpected token: }", "unexpected token: }"),
        ("data.max_prompt_tokens=3", "data.max_prompt_tokens=3"),
        ("sort_key=name eos_token=</s> monkey=abc", "sort_key=name eos_token=</s> monkey=abc"),
        ("{'Authorization': 'Bearer abc.def'}", "{'Authorization': 'Bearer ***'}"),
        (
            "[(b'x-api-key', b'abc'), ('Authorization', 'Basic Zm9v')]",
            "[(b'x-api-key', b'***'), ('Authorization', 'Basic ***')]",
        ),
        ("curl -H 'x-api-key: abcdef' https://h", "curl -H 'x-api-key: ***' https://h"),
        ("fit --judge.api_key abcdef --lr 3", "fit --judge.api_key *** --lr 3"),
        ("https://h/v1?access_token=abcdef&page=2", "https://h/v1?access_token=***&page=2"),
        ("OPENAI_KEY=abcdef accessToken: abcdef", "OPENAI_KEY=*** accessToken: ***"),
        ("Server=h;Uid=u;Pwd=abcdef;", "Server=h;Uid=u;Pwd=***;"),
        (r'{"error": "{\"api_key\": \"abc\"}"}', r'{"error": "{\"api_key\": \"***\"}"}'),
        ("postgres://u:abcdef@h/x", "postgres://***@h/x"),
        ("bad eyJhbGciOiJI.eyJzdWIiOiIx.c2lnbmF0dXJl!", "bad ***!"),
        ("AKIA0123456789ABCDEF AIza0123456789012345678901234567890", "*** ***"),
        ("a -----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY----- b", "a *** b"),
        ("Basic arithmetic, the password", "Basic arithmetic, the password"),
    ],
)
def test_texts_lose_what_looks_like_a_key(text, clean):
    assert redacted_text(text) == clean


FORMS = {
    "plain": VALUE,
    "quoted for an address": quote(VALUE, safe=""),
    "JSON": json.dumps({"a": VALUE}),
    "JSON as it is": json.dumps({"a": VALUE}, ensure_ascii=False),
    "Python": repr({"a": VALUE}),
    "base64": base64.b64encode(VALUE.encode()).decode(),
    **{
        f"base64 after {user}": "Basic: " + base64.b64encode(f"{user}:{VALUE}".encode()).decode()
        for user in ("a", "ab", "abc")
    },
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "plant",
    [
        lambda monkeypatch: monkeypatch.setenv("JUDGE_KEY", VALUE),
        lambda monkeypatch: remember({"init_args": {"headers": {"X-Auth": VALUE}}}),
        lambda monkeypatch: remember([{"anything": SecretStr(VALUE)}]),
        lambda monkeypatch: remember_flags(["fit", f"--judge.api_key={VALUE}"]),
        lambda monkeypatch: remember_flags(["fit", "--judge.api_key", VALUE]),
    ],
    ids=["environment", "config", "SecretStr", "flag", "flag and value"],
)
def test_a_value_is_cut_out_in_every_form(plant, form, monkeypatch):
    plant(monkeypatch)
    text = f"before {FORMS[form]} after"
    cut = known_cut(text)
    assert cut.startswith("before ")
    assert cut.endswith(" after")
    assert "***" in cut
    plain = VALUE.encode()
    for start in range(len(plain) - 12):  # nor a part of it
        assert base64.b64encode(plain[start : start + 12]).decode() not in cut
    assert VALUE[:12] not in cut


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("JUDGE_API_KEY", "  correct-horse-battery\n", "401 for correct-horse-battery"),
        ("DATABASE", "postgres://u:corr%40ect-horse@h/db", "no login with corr@ect-horse"),
        ("ADO", "Server=h;Password=correct-horse;", "no login with correct-horse"),
        ("HEADERS", "Authorization: Bearer correct-horse-battery", "401 for correct-horse-battery"),
        ("MY_AUTH", "Bearer correct-horse-battery", "401 for correct-horse-battery"),
        ("SIGNING_KEY", "-----BEGIN KEY-----\nMIIEowIBAAKCAQEA\n-----END KEY-----", "line 2: MIIEowIBAAKCAQEA"),
        ("ACCOUNT", '{"private_key": "correct-horse-battery"}', "401 for correct-horse-battery"),
    ],
)
def test_what_a_value_has_inside_is_a_secret_too(name, value, text, monkeypatch):
    monkeypatch.setenv(name, value)
    assert text.split()[-1] not in redacted_text(text)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("MY_TOKEN", "short"), ("SSH_AUTH_SOCK", "/tmp/ssh-12/agent.7"), ("KEY_OF_TLS", "~/tls/key.pem")),
        *(("LANGUAGE_OF_JUDGE", "correct-horse"), ("EOS_TOKEN", "<|end_of_text|>"), ("HTTP_CONNECTION", "keep-alive")),
    ],
)
def test_what_is_no_secret_stays(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    assert redacted_text(f"it says {value} here") == f"it says {value} here"


def test_what_the_data_holds_is_no_secret(monkeypatch):
    monkeypatch.setenv("QUIZ_KEY", "Washington")
    monkeypatch.setenv("OTHER_KEY", "correct-horse-battery")
    assert known_cut("Washington") == "***"
    read_split([{"prompt": "Who was first?", "target": "George Washington"}], "train")
    assert known_cut("Washington, correct-horse-battery") == "Washington, ***"
    spare(["correct-horse-battery"])
    assert known_cut("correct-horse-battery") == "correct-horse-battery"


def test_rows_in_a_config_are_data():
    rows = [{"prompt": "Which?", "password": "hunter2hunter2"}]
    config = {"data": {"train": rows}}
    assert redacted(config) == config
    assert redacted({"data": {"train": [{"path": "https://u:hunter2@h/x.json"}]}})["data"]["train"] == [
        {"path": "https://***@h/x.json"}
    ]


def test_an_error_of_ours_shows_no_secret(monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "correct-horse-battery")
    assert str(ServerError("401 for correct-horse-battery")) == "401 for ***"
    outcome = failure(RuntimeError("401 for correct-horse-battery"))
    assert "correct-horse" not in outcome.message + outcome.traceback


@pytest.mark.parametrize(
    "value", [10**5000, "\ud800" * 20, "\0" * 20, object()], ids=["number", "surrogates", "zeros", "object"]
)
def test_any_value_can_be_a_secret(value):
    assert redacted({"api_key": value, (1, 2): "x"})[1, 2] == "x"


# Time -----------------------------------------------------------------------------------------------------------------

PIECES = ["0.", "a", "_", "-", " ", "\n", "é", "key ", "key=", "api_key=abc,", "token'", "://a:", "://a:bc@", "a=b,"]
PIECES += [
    "sk-",
    "eyJ",
    "bearer ",
    "-----BEGIN PRIVATE KEY-----",
    "--",
    "--key x ",
    "secret",
    "secret:'",
    "passwd = \\",
]


def test_redaction_takes_time_in_proportion_to_the_text(monkeypatch):
    """2,000 texts of 1 to 100 kB: of one piece again and again, of several pieces, and of random characters. Time per
    byte differs by less than three times between the lower and the upper half of the sizes, for each kind of text by
    itself; 10 kB take at most a millisecond, in the middle of all.
    """
    monkeypatch.setenv("JUDGE_KEY", "correct-horse-battery")
    generator = random.Random(0)
    per_byte = {}
    for number in range(2_000):
        size = int(10 ** generator.uniform(3, 5))
        name, kind = "mixed", generator.choices(PIECES, k=4)
        if number % 2:
            name = PIECES[number % len(PIECES)]
            kind = [name]
        elif number % 10 == 0:
            name, kind = "random", [chr(generator.randrange(32, 0x250)) for _ in range(100)]
        text = ("".join(kind) * (size // len("".join(kind)) + 1))[:size]
        started = time.thread_time()
        redacted_text(text)
        times = per_byte.setdefault(name, {"small": [], "large": []})
        times["small" if size < 10_000 else "large"].append((time.thread_time() - started) / size)
    for name, times in per_byte.items():
        small, large = map(statistics.median, times.values())
        assert max(small, large) < 3 * min(small, large), name
    assert statistics.median(found for times in per_byte.values() for half in times.values() for found in half) < 1e-7


def test_a_long_text_is_cut():
    text = redacted_text("a" * (LONGEST + 1234))
    assert text == "a" * LONGEST + "... (1,234 more characters)"
    remember({"api_key": "correct-horse-battery"})
    assert "correct" not in redacted_text("a" * (LONGEST - 10) + "correct-horse-battery")  # not even a part


# The console ----------------------------------------------------------------------------------------------------------


class Written:
    """A stream; also one that, like W&B, puts itself in the place of another's `write`."""

    def __init__(self):
        self.texts = []

    def write(self, text):
        self.texts.append(text)

    def put_before(self, stream):
        theirs = stream.write
        stream.write = lambda text: (self.write(text), theirs(text))


def test_a_stream_gets_no_secret_and_neither_does_who_records_it(monkeypatch):
    remember({"api_key": "correct-horse-battery"})
    out, recorded = Written(), Written()
    monkeypatch.setattr(sys, "stderr", RedactedStream(out))
    recorded.put_before(sys.stderr)
    print("a correct-horse-battery", file=sys.stderr)
    sys.stderr.writelines(["b correct-horse", "-battery\n"])
    try:
        raise RuntimeError("c correct-horse-battery")
    except RuntimeError as error:
        sys.__excepthook__(type(error), error, error.__traceback__)
    for written in (out, recorded):
        text = "".join(written.texts)
        assert text.startswith("a ***\nb ***\nTraceback")
        assert "RuntimeError: c ***" in text
        assert "correct-horse" not in text


def test_a_worker_prints_no_secret(monkeypatch, capfd):
    monkeypatch.setenv("JUDGE_KEY", "correct-horse-battery")
    pool = WorkerPool()
    pool.add("print", print)
    try:
        pool.submit("print", 60, "said correct-horse-battery").result()
    finally:
        pool.close()
    assert "said ***" in capfd.readouterr().err


# A run: secrets in every place, and nothing of them in what it writes and prints -------------------------------------

PLANTED = {
    "environment": "Zq1-environment",
    "bare key": "Zq2-bare-key",
    "header": "Zq3-of-a-header",
    "SecretStr": "Zq4-secret-str",
    "password in an address": "Zq5-of-an-address",
    "flag": "Zq6-of-a-flag",
    "dsn": "https://Zq7-of-a-dsn@sentry.example/1",
    "token by its look": KEY,
}

REWARD = f"""
import base64, itertools, logging, os, sys, urllib.parse
from pydantic import SecretStr
from stateset_lightning.rewards import RewardFunction, RewardResult

class Judge(RewardFunction):
    def __init__(self, api_key: str, headers: dict, pin: SecretStr, url: str, dsn: str):
        super().__init__()
        self.calls = itertools.count()
        self.secrets = [os.environ["MY_CONNECTION"], api_key, headers["X-Auth"], pin.get_secret_value()]
        self.secrets += [url[10:-5], "{PLANTED["flag"]}", dsn, "{KEY}"]
        assert self.secrets == {list(PLANTED.values())}  # the run itself gets them

    def compute_reward(self, turns, context=None):
        said = " ".join(self.secrets)
        forms = [said, str(self.secrets), urllib.parse.quote(said, safe=""), str({{"Authorization": "Bearer " + said}})]
        forms += [base64.b64encode(f"user:{{secret}}".encode()).decode() for secret in self.secrets]
        print("printed", *forms)
        sys.stderr.write(f"written {{said}}")
        logging.getLogger("stateset_lightning").warning("logged %s", said)
        if next(self.calls) % 2:
            raise PermissionError(f"401: {{forms}}")
        return RewardResult(1.0, {{"reply": str(forms), said: 1.0, "nested": {{"key": said}}}})
"""


@pytest.fixture(scope="module")
def leaked(tmp_path_factory):
    """What a run, its report and its doctor write and print, by file."""
    folder = tmp_path_factory.mktemp("planted")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        patch.setenv("MY_CONNECTION", PLANTED["environment"])
        patch.setattr(sys, "argv", ["pytest", f"--model.policy.model_kwargs.token={PLANTED['flag']}"])
        patch.setattr(redaction, "_environment", {})
        patch.setattr(sys, "stdout", io.StringIO())
        patch.setattr(sys, "stderr", io.StringIO())
        Path("judge_with_secrets.py").write_text(REWARD)
        options = {
            "api_key": PLANTED["bare key"],
            "headers": {"X-Auth": PLANTED["header"]},
            "pin": PLANTED["SecretStr"],
            "url": f"https://u:{PLANTED['password in an address']}@host",
            "dsn": PLANTED["dsn"],
        }
        config = {
            "model": {
                "policy": {"model_name": "tiny"},
                "reward": [{"class_path": "judge_with_secrets.Judge", "init_args": options}],
                "rollout": {"num_generations": 4, "max_new_tokens": 3},
                "max_reward_failures": 1.0,
            },
            "data": {"train": [{"id": "s", "prompt": "Say a."}], "batch_size": 1},
            "samples": {"every_n_episodes": 1},
            "trainer": {
                "max_steps": 1,
                "accelerator": "cpu",
                "logger": [
                    {"class_path": kind, "init_args": {"save_dir": "runs", "name": kind}}
                    for kind in ("CSVLogger", "TensorBoardLogger")
                ],
            },
        }
        Path("given").mkdir()
        Path("given/config.yaml").write_text(yaml.safe_dump(config))
        words = ["--config", "given/config.yaml", f'--model.policy.model_kwargs={{"token": "{PLANTED["flag"]}"}}']
        main(["fit", *words])
        for command in (["fit", *words, "--print_config"], ["doctor", *words], ["fit", *words, "--no_such_key=1"]):
            with pytest.raises(SystemExit):
                main(command)
        main(["report", "runs/CSVLogger/version_0"])
        texts = {"stdout": sys.stdout.getvalue(), "stderr": sys.stderr.getvalue(), "argv": str(sys.argv)}
    for path in (path for path in (folder / "runs").rglob("*") if path.is_file()):
        texts[path.name] = path.read_bytes().decode("latin-1")
    return texts


def test_a_run_writes_and_prints_what_it_should(leaked):
    assert {"config.yaml", "hparams.yaml", "samples.jsonl", "metrics.csv", "report.html"} <= leaked.keys()
    assert any(name.endswith(".ckpt") for name in leaked)
    for text, where in [
        ("printed", "stdout"),
        ("logged", "stdout"),
        ("written", "stderr"),
        ("PermissionError", "samples.jsonl"),
    ]:
        assert text in leaked[where]
    rows = [json.loads(line) for line in leaked["samples.jsonl"].splitlines()]
    assert "***" in str(rows)
    saved = yaml.safe_load(leaked["config.yaml"])
    judge = saved["model"]["reward"][0]["init_args"]
    assert judge.pop("pin") == "**********"  # as pydantic writes it
    assert judge == {"api_key": "***", "headers": {"X-Auth": "***"}, "url": "https://***@host", "dsn": "***"}
    assert saved["model"]["policy"]["model_kwargs"] == {"token": "***"}
    assert leaked["config.yaml"].count("'***'") == 4  # no other option has a secret's name
    assert saved["data"]["train"] == [{"id": "s", "prompt": "Say a."}]


@pytest.mark.parametrize("secret", PLANTED)
def test_a_run_leaves_no_secret_behind(secret, leaked):
    value = PLANTED[secret]
    forms = [value, quote(value, safe="")]
    if value != KEY:  # that one is known by its look alone
        forms.append(base64.b64encode(f"user:{value}".encode()).decode()[8:-4])
    found = {(name, form) for name, text in leaked.items() for form in forms if form in text}
    assert not found


def test_a_checkpoint_does_not_hold_the_hubs_token(tmp_path):
    from module_runs import make_module

    from stateset_lightning.policy import PolicyConfig

    module = make_module()
    module = type(module)(PolicyConfig("tiny", model_kwargs={"token": KEY}), reward=lambda turns, context: 1.0)
    assert module.hparams["policy"]["model_kwargs"] == {"token": "***"}
    assert module.policy_config.model_kwargs == {"token": KEY}


def test_a_message_of_the_parser_holds_no_key(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pytest"])
    reward = (
        f'{{"class_path": "stateset_lightning.rewards.ExactMatch", "init_args": {{"api_key": "{KEY}", "weight":'
        f' "{KEY}"}}}}'
    )
    with pytest.raises(SystemExit):
        main(["fit", "--model.policy.model_name=tiny", f"--model.reward=[{reward}]"])
    assert KEY not in capsys.readouterr().err


# What files can hold --------------------------------------------------------------------------------------------------


class Raises:
    def __init__(self, error):
        self.error = error

    def __str__(self):
        raise self.error


class Endless(dict):
    def __iter__(self):
        return itertools.count()

    def get(self, key, default=None):
        return key


def _deep(depth, leaf):
    for _ in range(depth):
        leaf = [leaf]
    return leaf


def _bomb():
    value = ["x"] * 9
    for _ in range(40):
        value = [value] * 9  # 9 ** 40 items
    return value


BIG = redaction.MAX_VALUES
FOREIGN = {
    "half of a character": ("a\ud83d", "a\\ud83d"),
    "ends of lines": ("a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\rh\ni", "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\rh\ni"),
    "zero": ("a\0b", "a\0b"),
    "keys": ({(1, 2): 1, None: 2, numpy.int64(3): 4, "\ud800": 5}, {"(1, 2)": 1, "None": 2, "3": 4, "\\ud800": 5}),
    "an integer of 64 bits": (2**63 - 1, 2**63 - 1),
    "an integer of more": (2**63, str(2**63)),
    "an integer that has no text": (-(10**5000), "<int: ValueError>"),
    "a fraction too large": (Fraction(10**400), "<Fraction: OverflowError>"),
    "no numbers": ([math.nan, math.inf, -math.inf, numpy.float32("nan")], [None] * 4),
    "numbers of numpy": ([numpy.float32(0.5), numpy.int8(7), numpy.bool_(True)], [0.5, 7, "True"]),
    "other objects": ([b"x", {1}, Fraction(1, 2), date(2026, 1, 2)], ["b'x'", "{1}", 0.5, "2026-01-02"]),
    "an object that raises": (Raises(KeyError()), "<Raises: KeyError>"),
    "an object that ends the program": (
        [Raises(SystemExit(1)), Raises(GeneratorExit())],
        ["<Raises: SystemExit>", "<Raises: GeneratorExit>"],
    ),
    "a key that raises": ({"a": 1, Raises(ValueError()): 2}, "<dict: ValueError>"),
    "depth": (_deep(60, 1), _deep(50, "...")),
    "length": ("x" * (LONGEST + 1), "x" * LONGEST + "... (1 more characters)"),
}


@pytest.mark.parametrize(("value", "expected"), FOREIGN.values(), ids=FOREIGN.keys())
def test_any_value_becomes_a_line_that_every_file_can_hold(value, expected):
    assert plain(value) == expected
    text = json_text(value)
    assert len(text.splitlines()) == 1
    assert json.loads(text.encode()) == expected


@pytest.mark.parametrize("value", [_bomb(), Endless(), [0] * (2 * BIG)], ids=["shared", "endless", "long"])
def test_what_is_too_much_is_cut_in_time(value):
    begin = time.perf_counter()
    assert '"..."' in (text := json_text(value))
    assert len(text) < 20 * BIG
    assert time.perf_counter() - begin < 10


def test_ctrl_c_is_no_fault_of_a_value():
    with pytest.raises(KeyboardInterrupt):
        plain([Raises(KeyboardInterrupt())])
