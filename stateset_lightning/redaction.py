"""Secrets (keys, tokens, passwords) are cut out of what is saved with a run, logged or printed.

First by value: what the environment, a config or a flag holds under a secret's name is remembered, and `***` takes its
place wherever it turns up, also encoded. Second by look: keys of known providers, passwords in addresses, `key=`.
All of it takes time in proportion to the text.

What is saved is made text that files can hold here, too: see `plain`.
"""

import base64
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from numbers import Integral, Real
from typing import Any
from urllib.parse import quote, quote_plus, unquote

HIDDEN = "***"

# Characters of a text that are looked at and kept; a longer one is cut, and says so.
LONGEST = 1_000_000

# How deep lists and mappings may be nested in what is read; half of it in what is written.
MAX_DEPTH = 100

# How many values a row may hold, in what is read as in what is written; those of an alias count each time.
MAX_VALUES = 200_000

# Characters of a value that is remembered; to cut out shorter ones would hide ordinary words.
SHORTEST = 8

# Names ----------------------------------------------------------------------------------------------------------------

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_SECRET_NAME = re.compile(
    r"(?:.*_)?(?:key|token|pat|dsn|pass|pwd|passcode|passphrases?|creds?|credentials?|o?auth|authorization|connection"
    r"|cookies?|jwt|bearer|[a-z]*(?:passwords?|passwd|secrets?|apikeys?|secretkey|accesskey|privatekey|accesstoken)"
    r"|(?:api|access|private|secret|auth)_(?:keys|tokens))(?:_.*)?"
)
_OF_TOKENIZERS = "pad|eos|bos|unk|sep|cls|mask|stop|end|start|image|video|audio|special|per"
_OF_TABLES = "sort|primary|foreign|public|group|cache|answer|prompt|question|target|label|text|column|reward"
# Besides those, what is said about a secret (where it is, how it is used), and a `key` alone.
_HARMLESS_NAME = re.compile(
    rf"(?:.*_)?(?:{_OF_TOKENIZERS})_token|(?:.*_)?(?:{_OF_TABLES})_key|key"
    r"|.*_(?:env|file|path|dir|name|type|mode|method|scheme|url|uri|host|port|timeout|limit|count|size|length|format)"
)
# Paths, words that headers and switches hold, and what stands for a secret already.
_HARMLESS_VALUE = re.compile(
    r"(?:~|\.{0,2})/[\w./ -]*|[A-Za-z]:\\.*|keep-alive|disabled|required|optional|\*+|\$\{?\w+\}?|"
)


@lru_cache(maxsize=4096)
def is_secret_name(name: str) -> bool:
    """Whether a key of this name holds a secret: `api_key`, `accessToken`, `X-Api-Key`, `sentry.dsn`.

    `max_new_tokens`, `eos_token`, `sort_key` and `api_key_env` hold none.
    """
    words = "_".join(_WORD.findall(name.rpartition(".")[2][:200])).lower()
    return bool(_SECRET_NAME.fullmatch(words)) and not _HARMLESS_NAME.fullmatch(words)


# The look of secrets --------------------------------------------------------------------------------------------------
# Each pattern begins with fixed letters, which are found quickly, and takes what follows once (`++`) or with a bound:
# nothing is looked at again and again. Letter case is spelt out for speed: re.IGNORECASE takes ten times as long.

_SCHEMES = ("Bearer ", "Basic ", "Token ", "Digest ", "bearer ", "basic ")


def _last_words() -> Iterator[str]:
    """Patterns of the end of a secret's name in a text, where the rule is narrower than for a key of a mapping."""
    words = "secret|password|passwd|passphrase|credential|authorization|apikey|token|key|dsn|pwd"
    harmless = {"token": _OF_TOKENIZERS.split("|"), "key": _OF_TABLES.split("|")}
    for word in words.split("|"):
        for form in (word, word.capitalize(), word.upper()):
            part = rf"(?<=[{'a-z' if form.istitle() else ''}_-]{form})"
            alone = "" if word == "key" else rf"|(?<![A-Za-z]{form})(?=['\"=])"  # no `unexpected token: }`
            is_short = f"(?:{part}{alone}){''.join(f'(?<!{other}_{form})' for other in harmless.get(form, ()))}"
            yield form + ("s?" if len(word) > len("token") else is_short)


_PRIVATE_KEY = r"-----BEGIN [A-Z ]{0,60}KEY[A-Z ]{0,20}-----[^-]*+(?:-{1,4}[^-]++)*+(?:-----END[A-Z ]{0,80}-----)?"
_KEYS = (
    r"sk-[\w-]{16,}+|sk_(?:live|test)_\w{16,}+|rk_(?:live|test)_\w{16,}+|hf_\w{16,}+|gh[oprsu]_\w{20,}+"
    r"|github_pat_\w{20,}+|glpat-[\w-]{16,}+|xox[abeoprs]-[\w-]{10,}+|xapp-[\w-]{20,}+|A[KS]IA[0-9A-Z]{16}"
    r"|AIza[\w-]{30,}+|ya29\.[\w-]{20,}+|GOCSPX-[\w-]{20,}+|npm_\w{30,}+|pypi-[\w-]{30,}+|gsk_\w{20,}+|r8_\w{30,}+"
    r"|nvapi-[\w-]{20,}+|xai-\w{20,}+|dckr_pat_[\w-]{20,}+|SG\.[\w-]{16,}+\.[\w-]{16,}+"
    r"|eyJ(?<![\w-]eyJ)[\w-]{7,}+\.[\w-]{7,}+(?:\.[\w-]*+)?|Bearer\s{1,4}[\w.~+/=-]{16,}+|bearer\s{1,4}[\w.~+/=-]{16,}+"
)
_ADDRESS = r"(://)[^/\s:@'\"]{0,256}:([^/\s@'\"]{3,512})(?=@)"
_ASSIGNMENT = (
    rf"((?:{'|'.join(_last_words())})"
    r"(?:[\\'\"]{0,4}\s{0,4}(?:=>?|:)\s{0,4}|[\\'\"]{1,4}\s?,\s?(?=b?\\?['\"]))b?[\\'\"]{0,4}"  # the latter: of pairs
    rf"(?:{'|'.join(_SCHEMES)})?)"
    r"((?<=['\"])[^'\"\\\n]{2,}+|[^\s'\",;&}\])<>\\/][^\s'\",;&}\])<>\\]{2,}+)"
)
_FLAG = r"(--(?<![\w.-]--)[\w.-]{0,80}+(?:(?<=key)|(?<=token)|(?<=secret)|(?<=password))\s{1,4})([^\s-]\S{2,}+)"
# The first group of a pattern, where it has groups, stands before the secret.
_PATTERNS = tuple(map(re.compile, (_PRIVATE_KEY, _KEYS, _ADDRESS, _ASSIGNMENT, _FLAG)))


# Values ---------------------------------------------------------------------------------------------------------------

_written: tuple[str, ...] = ()  # all that is remembered, in every form; the longest first: one may be a part of another
_spared: set[str] = set()
_environment: dict[Any, Any] = {}  # as it was looked at last
_DATA = ("train", "validation", "test", "predict", "rows", "scenarios")  # keys whose lists hold the data itself


def remember(value: Any, name: str = "") -> None:
    """Remember what is secret in a value: all of it under a secret's name, else what looks like a secret.

    Args:
        value: A text, or containers of texts and of pydantic's `SecretStr`; what else there is, is passed over.
        name: Under which it stands.
    """
    _copy(value, name, {})


def remember_flags(words: Sequence[str]) -> None:
    """Remember what a command line holds: `--key=value`, `--key value`, and configs as values."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        key, found, value = word.partition("=")
        remember(value if found else following, key if key.startswith("--") else "")


def spare(texts: Iterable[str]) -> None:
    """What the data holds is no secret, whatever the environment calls it: a run's samples show what was asked."""
    global _written
    suspects = [found for name, value in os.environ.items() for found in _secrets_of(value, name)]
    _spared.update(found for text in (texts if suspects else ()) for found in suspects if found in text)
    forms = {form for value in _spared for form in _forms(value)}
    _written = tuple(form for form in _written if form not in forms)


def redacted(value: Any, name: str = "") -> Any:
    """A copy of plain containers without secrets: `***` for what has a secret's name, is remembered or looks like one.

    What has a secret's name is remembered. Empty values stay, and so do paths.
    """
    remember(value, name)
    return _copy(value, name, {})


def redacted_text(text: str) -> str:
    """A text without secrets, and of `LONGEST` characters at most: `***` for what is remembered or looks like one."""
    cut = known_cut(text[: LONGEST + max(map(len, _written), default=0)])
    for pattern in _PATTERNS:  # a function: a template like \1*** takes twice as long
        cut = pattern.sub(lambda match: match[1] + HIDDEN if match.lastindex else HIDDEN, cut)
    left = len(text) - LONGEST
    return cut if left <= 0 else f"{cut[:LONGEST]}... ({left:,} more characters)"


def known_cut(text: str) -> str:
    """A text without what is remembered; what only looks like a secret stays."""
    # A tie to a private field of CPython: to compare what it holds takes microseconds, to read it a hundred times as
    # long, which would be most of the time that a short text takes. `tests/test_redaction.py` would notice.
    global _environment
    if (now := os.environ._data) != _environment:  # type: ignore[attr-defined]
        now = dict(now)
        _remember(found for name, value in os.environ.items() for found in _secrets_of(value, name))
        _environment = now
    for form in _written:
        if form in text:
            text = text.replace(form, HIDDEN)
    return text


def _copy(value: Any, name: str, done: dict[tuple[int, str], Any]) -> Any:
    """See `redacted`. `done` holds what was copied: the aliases of a YAML file can make a tree of any size."""
    if isinstance(value, Mapping | list | tuple):
        if (place := (id(value), name)) not in done:
            done[place] = HIDDEN  # where it holds itself
            if isinstance(value, Mapping):
                names = {key: key if isinstance(key, str) else "" for key in value}
                done[place] = {known_cut(names[key]) or key: _copy(value[key], names[key], done) for key in value}
            else:
                is_data = name in _DATA and value and isinstance(value[0], Mapping) and "path" not in value[0]
                done[place] = value if is_data else type(value)(_copy(item, name, done) for item in value)
        return done[place]
    if hasattr(value, "get_secret_value"):
        value, name = value.get_secret_value(), "secret"
    is_number = isinstance(value, int) and 10 ** (SHORTEST - 1) <= value < 10**99  # larger ones may have no text
    if not isinstance(value, str | bytes) and not is_number:
        return value
    text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    _remember(_secrets_of(text, name))
    if is_secret_name(name) and not _HARMLESS_VALUE.fullmatch(text):
        return HIDDEN
    return redacted_text(value) if isinstance(value, str) else value


def _secrets_of(text: str, name: str) -> Iterator[str]:
    """The secrets in a value; those under a secret's name without the word that an HTTP header has before them, too."""
    named = (text, text.rpartition(" ")[2] if text.startswith(_SCHEMES) else "") if is_secret_name(name) else ()
    looking = (unquote(match[match.lastindex or 0]) for pattern in _PATTERNS for match in pattern.finditer(text))
    for found in map(str.strip, (*named, *looking)):
        if len(found) >= SHORTEST and found not in _spared and not _HARMLESS_VALUE.fullmatch(found):
            yield found


def _remember(values: Iterable[str]) -> None:
    global _written
    if new := {form for value in values if value not in _written for form in _forms(value)}:
        _written = tuple(sorted(new.union(_written), key=len, reverse=True))


def _forms(value: str) -> Iterator[str]:
    """A value as it may be written: plain, line by line, quoted for addresses, Python and JSON, and in base64."""
    data = value.encode(errors="surrogatepass")
    yield from (quote(data, safe=""), quote_plus(data))
    for text in (value, *(line.strip() for line in value.splitlines())):
        if len(text) >= SHORTEST:
            yield from (text, repr(text)[1:-1], json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1])
    for before in range(3):  # bytes of `user:`, say; characters that hold bits of what stands beside are left out
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            yield encode(bytes(before) + data).decode()[(0, 2, 3)[before] : (before + len(data)) * 8 // 6]


# What files can hold --------------------------------------------------------------------------------------------------

_LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}  # JSON escapes the others by itself


def json_text(value: Any, **layout: Any) -> str:
    """Any value as JSON without secrets, in one line whatever ends a line for its reader; never an exception."""
    return known_cut(json.dumps(plain(value), ensure_ascii=False, allow_nan=False, **layout)).translate(_LINE_ENDS)


def plain(value: Any, max_values: int = MAX_VALUES) -> Any:
    """A copy of any value that every file and every reader of JSON can hold; never an exception.

    NaN and infinity are None. Keys, integers of more than 64 bits and what JSON has no form for are text, in which half
    of a character (a surrogate without its pair) is written as its number. What is too long, too deep or too much ends
    in "...".
    """
    return _plain(value, MAX_DEPTH // 2, iter(range(max_values)))


def _plain(value: Any, depth: int, left: Iterator[int]) -> Any:
    try:
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, Mapping | list | tuple) and not depth:
            return "..."
        if isinstance(value, Mapping):
            return {_text(key): _plain(value.get(key), depth - 1, left) for key in _first(value, left)}
        if isinstance(value, list | tuple):
            return [_plain(item, depth - 1, left) for item in _first(value, left)]
        if isinstance(value, Integral):
            return number if -(2**63) <= (number := int(value)) < 2**63 else _text(value)
        if isinstance(value, Real):
            return float(value) if math.isfinite(value) else None
        return _text(value)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # foreign code, such as `__str__`
        return f"<{type(value).__name__}: {type(error).__name__}>"


def _first(values: Iterable[Any], left: Iterator[int]) -> Iterator[Any]:
    """The values for which there is room."""
    for value in values:
        if next(left, None) is None:
            yield "..."
            return
        yield value


def _text(value: Any) -> str:
    text = str(value)
    cut = text[:LONGEST].encode(errors="backslashreplace").decode()
    return cut if len(text) <= LONGEST else f"{cut}... ({len(text) - LONGEST:,} more characters)"


# The console ----------------------------------------------------------------------------------------------------------


class RedactedStream:
    """A text stream that gets no secrets, whoever writes to it: `print`, logging, warnings, Python's tracebacks."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._write = stream, stream.write

    @property
    def write(self) -> Callable[[str], Any]:
        """W&B puts a function in the place of this one, which records what it gets and calls this one."""
        write = self._write
        return lambda text: [write(redacted_text(text[i : i + LONGEST])) for i in range(0, len(text), LONGEST)]

    @write.setter
    def write(self, write: Callable[[str], Any]) -> None:
        self._write = write

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def redact_streams() -> None:
    """Standard output and standard error get no secrets from now on, also when the caller has returned: an error that
    nobody catches is printed last of all.
    """
    for name in ("stdout", "stderr"):
        if not isinstance(stream := getattr(sys, name), RedactedStream | None):
            setattr(sys, name, RedactedStream(stream))
