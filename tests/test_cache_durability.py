"""What a library promises when things go wrong: crashes, full disks, second writers, strange catalogs."""

from __future__ import annotations

import errno
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from ctxdocs.cache import Store
from ctxdocs.errors import InputError, LibraryError, StorageError
from tests.cache_samples import add, chunk, create, equal, memory, nearest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def path(tmp_path):
    with create(tmp_path / "library") as store, store.writer() as writer:
        add(writer, "a", "committed")
    return tmp_path / "library"


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    setup = "import os, sys\nfrom ctxdocs.cache import Store\nfrom tests.cache_samples import *\n"
    command = [sys.executable, "-c", setup + code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def check_committed(path: Path, texts: tuple[str, ...] = ("committed",)) -> None:
    """The library holds ``texts`` and nothing else, and takes more."""
    with Store.open(path) as store:
        assert store.counts().chunks == len(texts)
        assert sorted(nearest(store, "committed", 10)) == sorted(texts)
        assert all(equal(one, memory(0)) for one in store.memories(store.chunks([1])))
        with store.writer() as writer:
            add(writer, "later", "added later")
        assert nearest(store, "added later") == ["added later"]
        named = {f"{one.shard_id:08d}.safetensors" for one in store.chunks(range(20))}
        assert {file.name for file in (path / "memories").iterdir()} == named
        assert not list(path.rglob("*.tmp"))


@pytest.mark.parametrize(
    "moment", ["shards.save_file", "ledger.Ledger.write", "ledger.Ledger._finish", "index.VectorIndex.save"]
)
def test_a_killed_writer_leaves_the_last_committed_state(path, moment):
    module, _, name = moment.partition(".")
    dies = f"""
import importlib
owner = importlib.import_module("ctxdocs.cache.{module}")
*parents, name = "{name}".split(".")
for parent in parents:
    owner = getattr(owner, parent)
with Store.open(sys.argv[1]) as store, store.writer() as writer:
    setattr(owner, name, lambda *_, **__: os.kill(os.getpid(), 9))
    add(writer, "b", "lost or kept")
"""
    assert run(dies, path).returncode == -signal.SIGKILL
    # A shard that the catalog does not name is left by all but the first; check_committed sees that it goes.
    assert len(list((path / "memories").iterdir())) == 2
    check_committed(path, ("committed", "lost or kept") if module == "index" else ("committed",))


def test_a_crash_between_two_writes_drops_the_unfinished_document(path):
    run(
        """
with Store.open(sys.argv[1]) as store, store.writer() as writer:
    add(writer, "b", "finished")
    document = writer.begin("c", "1")
    writer.write([chunk(document, "unfinished")])
    os.kill(os.getpid(), 9)
""",
        path,
    )
    check_committed(path, ("committed", "finished"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES])
@pytest.mark.parametrize("step", ["ctxdocs.cache.shards.save_file", "os.fsync", "pathlib.Path.replace"])
def test_a_full_disk_is_a_storage_error_and_changes_nothing(path, monkeypatch, step, number):
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with Store.open(path) as store, store.writer() as writer:
        with monkeypatch.context() as patch:
            patch.setattr(step, fail)
            with pytest.raises(StorageError, match=os.strerror(number)) as caught:
                add(writer, "b", "no room")
        assert "intact" in str(caught.value)
        assert len(list((path / "memories").iterdir())) == 1
        assert store.counts().documents == 1
    check_committed(path)


@pytest.mark.parametrize("error", [sqlite3.OperationalError("database or disk is full"), KeyboardInterrupt()])
def test_a_failing_commit_takes_its_shard_back(path, monkeypatch, error):
    def fail(*_: object) -> None:
        raise error

    with Store.open(path) as store, store.writer() as writer:
        document = writer.begin("b", "1")
        with monkeypatch.context() as patch:
            patch.setattr("ctxdocs.cache.ledger.Ledger._finish", fail)
            with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else StorageError):
                writer.write([chunk(document, "tried twice")], [document])
        assert len(list((path / "memories").iterdir())) == 1
        writer.write([chunk(document, "tried twice")], [document])
    check_committed(path, ("committed", "tried twice"))


def test_an_interrupt_right_after_the_commit_keeps_the_shard(path, monkeypatch):
    from ctxdocs.cache.ledger import Ledger

    commit = Ledger.write

    def interrupted(*arguments: object) -> None:
        commit(*arguments)
        raise KeyboardInterrupt

    with Store.open(path) as store, pytest.raises(KeyboardInterrupt), store.writer() as writer:
        monkeypatch.setattr(Ledger, "write", interrupted)
        add(writer, "b", "kept")
    monkeypatch.undo()
    check_committed(path, ("committed", "kept"))


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
def test_a_file_size_limit_is_a_storage_error(path):
    done = run(
        """
import resource
from ctxdocs.errors import StorageError
with Store.open(sys.argv[1]) as store:
    with store.writer() as writer:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        big = SoftPrompt(vectors=torch.zeros(1000, 50), **STAMP)
        document = writer.begin("b", "1")
        try:
            writer.write([chunk(document, "too big", 0, big)], [document])
        except StorageError as error:
            print(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
""",
        path,
    )
    assert "too large" in done.stdout, done.stderr
    check_committed(path)


def test_an_index_that_cannot_be_saved_costs_nothing(path, monkeypatch):
    def fail(*_: object) -> None:
        raise RuntimeError("write error: No space left on device")

    with Store.open(path) as store:
        monkeypatch.setattr("faiss.write_index", fail)
        with pytest.raises(StorageError, match="No space"), store.writer() as writer:
            add(writer, "b", "kept")
        monkeypatch.undo()
    check_committed(path, ("committed", "kept"))


def test_there_is_one_writer_at_a_time(path):
    with Store.open(path) as store, Store.open(path) as other:
        with store.writer() as writer:
            with pytest.raises(LibraryError, match=f"process {os.getpid()} on"):
                other.writer()
            refused = run("Store.open(sys.argv[1]).writer()", path)
            assert "LibraryError" in refused.stderr
            assert "is being written to by process" in refused.stderr
            add(writer, "b", "unharmed")
        with other.writer():
            pass
        writer.close()
    check_committed(path, ("committed", "unharmed"))


def test_other_processes_read_what_a_writer_committed(path):
    with Store.open(path) as store, store.writer() as writer:
        add(writer, "b", "just written")
        document = writer.begin("c", "1")
        writer.write([chunk(document, "not yet")])
        reads = """
with Store.open(sys.argv[1]) as store:
    print(store.counts().chunks, nearest(store, "just written"), store.memories(store.chunks([2])))
"""
        done = run(reads, path)
    assert done.stdout.startswith("2 ['just written'] [SoftPrompt(slots=3"), done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX permissions")
def test_a_library_that_cannot_be_written_can_be_read():
    # Not below tmp_path, which no other user may enter.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        path = Path(folder) / "library"
        with create(path) as store, store.writer() as writer:
            add(writer, "a", "readable by all")
        for leftover in path.glob("catalog.sqlite-*"):
            leftover.unlink()
        path.chmod(0o555)
        reads = """
from ctxdocs.errors import StorageError
import ctxdocs.cache.vectors, faiss
if os.getuid() == 0:
    os.setuid(65534)
with Store.open(sys.argv[1]) as store:
    print(nearest(store, "readable by all"), store.matching("readable", 1), store.memories(store.chunks([1])))
    try:
        store.writer()
    except StorageError as error:
        print(error)
"""
        done = run(reads, path)
        assert "['readable by all'] [(1, " in done.stdout, done.stderr
        assert "Permission denied" in done.stdout
        assert not list(path.glob("catalog.sqlite-*"))
        path.chmod(0o755)


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX permissions")
def test_files_are_as_readable_as_the_umask_says(path):
    mask = os.umask(0)
    os.umask(mask)
    files = [path / "manifest.json", path / "index.faiss", *(path / "memories").iterdir()]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o666 & ~mask}


@pytest.mark.parametrize("shard_id", ["'../../secret'", "-1", "0", "1.5", "x'00'"])
def test_a_catalog_cannot_lead_out_of_its_folder(path, shard_id):
    with sqlite3.connect(path / "catalog.sqlite") as connection:
        connection.execute(f"UPDATE chunks SET shard_id = {shard_id}")
    connection.close()
    with Store.open(path) as store, pytest.raises(LibraryError, match="damaged"):
        store.memories(store.chunks([1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [("entry = 7", "entry 7"), ("entry = 'x'", "entry x"), ("dtype = 'load'", "chunk 1"), ("kind = 'x'", "chunk 1")],
)
def test_a_chunk_row_that_makes_no_sense_is_named(path, change, message):
    with sqlite3.connect(path / "catalog.sqlite") as connection:
        connection.execute(f"UPDATE chunks SET {change}")
    connection.close()
    with Store.open(path) as store, pytest.raises(LibraryError, match=message):
        store.memories(store.chunks([1]))


def test_a_damaged_catalog_is_named(path):
    catalog = path / "catalog.sqlite"
    for extra in path.glob("catalog.sqlite-*"):
        extra.unlink()
    with sqlite3.connect(catalog) as connection:
        connection.execute("PRAGMA user_version = 9")
    connection.close()
    with pytest.raises(LibraryError, match="schema version"):
        Store.open(path)
    catalog.write_bytes(b"no database" * 100)
    for _ in range(2):
        with pytest.raises(LibraryError, match=r"catalog\.sqlite"):
            Store.open(path)
        catalog.unlink(missing_ok=True)


def test_nothing_is_created_where_nothing_may_be(tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(StorageError, match="No space"):
        create(tmp_path / "library")
    monkeypatch.undo()
    create(tmp_path / "library").close()
    with pytest.raises(InputError):
        create(tmp_path / "other", codec="zip")
    assert not (tmp_path / "other").exists()
