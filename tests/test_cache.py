"""Tests of the cache of cohorts that were read, and of files that would fill the memory."""

import gzip
import multiprocessing
import os
import platform
import tarfile
import tracemalloc
from pathlib import Path

import pytest

import tables
from data import InputError
from readers import load_cohort
from tests.tiny import write, write_physionet

EVENTS = "stay_id,minute,variable,value\n1,0,a,1\n1,5,a,2\n2,0,a,high\n"


def read(folder, cache, barrier, answers):
    barrier.wait()
    try:
        answers.put(len(load_cohort(folder, cache_dir=cache)))
    except BaseException as error:
        answers.put(repr(error))


def test_any_number_of_first_readers_succeed_and_one_cache_stays(tmp_path):
    write(tmp_path / "d/events.csv", EVENTS)
    context = multiprocessing.get_context("fork")
    for attempt in range(5):
        barrier, answers, cache = context.Barrier(4), context.Queue(), tmp_path / f"cache {attempt}"
        readers = [context.Process(target=read, args=(tmp_path / "d", cache, barrier, answers)) for _ in range(4)]
        for reader in readers:
            reader.start()
        assert [answers.get(timeout=60) for _ in readers] == [2] * 4
        for reader in readers:
            reader.join()
        assert len(list(cache.iterdir())) == 1


def test_a_later_writer_takes_the_first_ones_cache(tmp_path):
    write(tmp_path / "d/events.csv", EVENTS)
    cohort = load_cohort(tmp_path / "d", cache_dir=tmp_path / "cache")
    (kept,) = (tmp_path / "cache").iterdir()
    before = kept.stat().st_ino
    tables.write_cache(kept, [cohort])
    assert kept.stat().st_ino == before and list((tmp_path / "cache").iterdir()) == [kept]
    (kept / "meta.json").write_text("{")
    tables.write_cache(kept, [cohort])
    assert kept.stat().st_ino != before and len(tables.open_cache(kept)) == 2


def test_a_changed_file_is_seen_though_its_size_and_time_are_the_same(tmp_path):
    events = write(tmp_path / "d/events.csv", EVENTS)
    before, content = events.stat(), load_cohort(tmp_path / "d", cache_dir=tmp_path / "cache").event_value[:2].tolist()
    events.write_text(EVENTS.replace("a,1", "a,9"))
    os.utime(events, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert load_cohort(tmp_path / "d", cache_dir=tmp_path / "cache").event_value[:2].tolist() == [9, 2] != content


def test_a_place_in_cached_data_is_called_by_the_folder_given_now(tmp_path, monkeypatch):
    write(tmp_path / "d/events.csv", EVENTS)
    load_cohort(tmp_path / "d", cache_dir=tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    assert "the first: d/events.csv line 4, a=high" in load_cohort("d", cache_dir=tmp_path / "cache").describe()
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_cache_of_another_user_is_passed_over_and_said_unless_its_place_was_given(tmp_path, monkeypatch):
    if os.geteuid() != 0:
        pytest.skip("needs the right to give a file away")
    write(tmp_path / "d/events.csv", EVENTS)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert "another user" not in load_cohort(tmp_path / "d").describe()
    (kept,) = (tmp_path / "caches/seqsetvae").iterdir()
    os.chown(kept, 65534, 65534)
    assert f"data: 1 cache of another user, not used: {kept}" in load_cohort(tmp_path / "d").describe()
    assert len(list((tmp_path / "caches/seqsetvae").iterdir())) == 2
    given = load_cohort(tmp_path / "d", cache_dir=tmp_path / "caches/seqsetvae")
    assert "another user" not in given.describe() and Path(given.event_value.filename).parent == kept


def test_leftovers_of_dead_processes_of_this_machine_are_removed(tmp_path):
    dead = multiprocessing.get_context("fork").Process(target=int)
    dead.start()
    dead.join()
    node = platform.node()
    names = {f".{node}-{dead.pid}-a": False, f".{node}-{os.getpid()}-a": True, f".other-{dead.pid}-a": True}
    for name in names:
        write(tmp_path / "cache" / name / "time", "")
    load_cohort(None, 24, cache_dir=tmp_path / "cache")
    assert {name: (tmp_path / "cache" / name).exists() for name in names} == names


def test_without_a_home_folder_the_place_must_be_named(tmp_path, monkeypatch):
    def nowhere():
        raise RuntimeError
    monkeypatch.setattr(Path, "home", nowhere)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tables.cache_home() == tmp_path / "seqsetvae"
    monkeypatch.delenv("XDG_CACHE_HOME")
    with pytest.raises(InputError, match="no home folder .*--cache_dir"):
        load_cohort(None, 24)


@pytest.mark.parametrize("content", [b"stay_id,minute,variable,value\n" + b"1" * 2**20, b"1" * 2**20,
                                     b"stay_id,minute,variable,value\n1,0,a,1\n" + b"\n" * 2**20],
                         ids=["a line", "a header", "blank lines"])
def test_a_packed_line_without_end_is_one_error_in_bounded_memory(tmp_path, monkeypatch, content):
    monkeypatch.setattr(tables, "PART_BYTES", 2**14)
    write(tmp_path / "events.csv.gz", gzip.compress(content))
    tracemalloc.start()
    with pytest.raises(InputError, match="events.csv.gz line .*: a (line|header) of more than"):
        load_cohort(tmp_path, cache_dir=tmp_path / "cache")
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert used < 2**19  # half of what the file unpacks to


def test_a_sparse_member_of_an_archive_is_refused_before_it_is_read(tmp_path):
    folder = write_physionet(tmp_path / "data", archive=True)
    with tarfile.open(folder / "set-a.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("set-a/1.txt")
        member.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.name": "set-a/1.txt",
                              "GNU.sparse.size": str(60 * 2**20), "GNU.sparse.map": "0,0"}
        archive.addfile(member)
    with pytest.raises(InputError, match="member set-a/1.txt is a link, a device, a sparse file"):
        load_cohort(folder, cache_dir=tmp_path / "cache")


def test_the_files_of_a_folder_are_listed_once(tmp_path, monkeypatch):
    data = write_physionet(tmp_path / "d")
    listed, walk = [], os.walk
    monkeypatch.setattr(os, "walk", lambda home, **options: (listed.append(home), walk(home, **options))[1])
    load_cohort(data, cache_dir=tmp_path / "cache")
    assert listed == [data / "set-a"]


def test_without_locks_no_process_is_asked_whether_it_lives_and_no_cache_for_its_owner(tmp_path, monkeypatch):
    """As on Windows, where the signal 0 ends a process and files have no such owners."""
    monkeypatch.setattr(tables, "fcntl", None)
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("a process was signalled"))
    monkeypatch.delattr(os, "geteuid")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write(tmp_path / "d/events.csv", EVENTS)
    left = tmp_path / f"cache/seqsetvae/.{platform.node()}-1-x"
    left.mkdir(parents=True)
    assert [len(load_cohort(tmp_path / "d")) for _ in range(2)] == [2, 2] and left.exists()
