"""The cache of replies: what it keeps, how much, and what it refuses. The client itself is tested with the judge."""

import subprocess
import sys

import pytest

from stateset_lightning.errors import ConfigError
from stateset_lightning.workers.openai_client import ReplyCache


@pytest.mark.parametrize("on_disk", [False, True])
def test_it_keeps_the_newest_replies(tmp_path, on_disk):
    cache = ReplyCache(str(tmp_path / "replies") if on_disk else None, 3)
    for i in range(5):
        cache.put(f"key {i}", f"reply {i}")
    assert [cache.get(f"key {i}") for i in range(5)] == [None, None, "reply 2", "reply 3", "reply 4"]
    cache.put("key 2", "again")  # now the newest
    cache.put("key 5", "reply 5")
    assert (cache.get("key 2"), cache.get("key 3")) == ("again", None)
    cache.close()


def test_several_processes_share_a_file(tmp_path):
    file = str(tmp_path / "replies")
    code = (
        "import sys; from stateset_lightning.workers.openai_client import ReplyCache\n"
        "cache = ReplyCache(sys.argv[1], 1000)\nfor i in range(10): cache.put(f'{sys.argv[2]} {i}', 'x')"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, file, str(n)]) for n in range(2)]
    assert [writer.wait() for writer in writers] == [0, 0]
    cache = ReplyCache(file, 1000)
    assert all(cache.get(f"{n} {i}") == "x" for n in range(2) for i in range(10))


def test_a_file_that_is_no_cache_is_refused_and_left_alone(tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("my notes, " * 100)
    with pytest.raises(ConfigError, match=r"cache='.*notes.txt' cannot be opened: file is not a database"):
        ReplyCache(str(file), 3)
    assert file.read_text() == "my notes, " * 100
    with pytest.raises(ConfigError, match="cannot be opened"):
        ReplyCache(str(file / "below"), 3)
