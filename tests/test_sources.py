"""Where photos come from, and a sentence for each source that does not serve; and the steps that overlap."""

from __future__ import annotations

import io
import tarfile
import threading
import time
from pathlib import Path

import pytest

from lseg.errors import UserError
from lseg.pipeline import overlapped
from lseg.sources import list_photos, output_names


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


def pack(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def names_of(*inputs: object) -> list[str]:
    return [str(photo.name) for photo in list_photos(list(map(str, inputs)))[0]]


class TestList:
    def test_a_folder_with_all_below_it(self, tmp_path):
        touch(tmp_path, "b.JPG", "a.png", "c.txt", ".hidden.png", "sub/e.png", "sub/d.jpeg/f.webp", ".git/g.png")
        assert names_of(tmp_path) == ["a", "b", "sub/e", "sub/d.jpeg/f"]

    def test_files_in_the_order_given(self, tmp_path):
        touch(tmp_path, "b.jpg", "other.dat", "a.png")
        assert names_of(tmp_path / "other.dat", tmp_path / "b.jpg", tmp_path / "a.png") == ["other", "b", "a"]

    def test_patterns(self, tmp_path, monkeypatch):
        touch(tmp_path, "1.jpg", "2.jpg", "3.png", "sub/4.jpg", "odd[1].jpg")
        monkeypatch.chdir(tmp_path)
        assert names_of("*.jpg") == ["1", "2", "odd[1]"]
        assert names_of("**/*.jpg") == ["1", "2", "odd[1]", "4"]
        assert names_of("odd[1].jpg") == ["odd[1]"]  # a file of that very name comes first
        with pytest.raises(UserError, match=r"the pattern \*.webp matches no image; check it, and quote it"):
            list_photos(["*.webp"])

    def test_a_list(self, tmp_path, monkeypatch):
        touch(tmp_path, "photos/1.jpg", "photos/sub/2.jpg")
        (tmp_path / "photos" / "list.txt").write_text("1.jpg\n\n  sub/2.jpg  \n" + str(tmp_path / "photos" / "1.jpg"))
        photos, notes = list_photos([tmp_path / "photos" / "list.txt"])
        assert [str(photo.name) for photo in photos] == ["1", "2"] and len(notes) == 1
        monkeypatch.chdir(tmp_path)
        (tmp_path / "list.txt").write_text("photos/1.jpg\nnone.jpg\n")
        with pytest.raises(
            UserError, match="line 2 of list.txt, a list of photos, names 'none.jpg', which is no file; correct it"
        ):
            list_photos(["list.txt"])
        for content, sentence in (
            (b"\n", "names no photo; write one path a line"),
            (b"\xff\xfe", "is no list of paths"),
        ):
            (tmp_path / "list.txt").write_bytes(content)
            with pytest.raises(UserError, match=f"list.txt {sentence}"):
                list_photos(["list.txt"])

    def test_an_archive(self, tmp_path):
        path = pack(tmp_path / "set.tar", {"000/a.jpg": b"one", "000/a.json": b"{}", "/abs/../../b.png": b"two"})
        photos, notes = list_photos([path])
        assert [(str(photo.name), photo.read()) for photo in photos] == [("000/a", b"one"), ("abs/b", b"two")]
        assert notes == [] and photos[0].shown == f"{path}:000/a.jpg"

    def test_names_from_elsewhere(self, tmp_path):
        """Whatever an archive calls its members, results stay below the output folder."""
        odd = ("//abs/a.jpg", "/b.jpg", "../../c.jpg", "x/./../d.jpg", "...jpg/e.jpg")
        photos, _ = list_photos([pack(tmp_path / "set.tar", dict.fromkeys(odd, b"x"))])
        assert len(photos) == 5
        for photo in photos:
            assert not photo.name.is_absolute() and ".." not in photo.name.parts, photo

    def test_linked_members(self, tmp_path):
        touch(tmp_path, "in/a.jpg")
        (tmp_path / "in" / "b.jpg").hardlink_to(tmp_path / "in" / "a.jpg")
        with tarfile.open(tmp_path / "set.tar", "w") as archive:
            archive.add(tmp_path / "in", "in")
        first = list_photos([tmp_path / "set.tar"])[0]
        assert {photo.read() for photo in first} == {b"in/a.jpg"} and len(first) == 1  # one picture, once

    def test_a_damaged_header_is_told(self, tmp_path):
        path = pack(tmp_path / "set.tar", {f"{n}.jpg": b"x" for n in range(3)})
        data = bytearray(path.read_bytes())
        data[1024 + 5] ^= 1
        path.write_bytes(data)
        photos, notes = list_photos([path])
        assert len(photos) == 1 and len(notes) == 1 and "breaks off or is damaged" in notes[0]

    def test_a_size_that_cannot_be(self, tmp_path):
        member = tarfile.TarInfo("a.jpg")
        member.size = 2**42
        (tmp_path / "set.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT) + b"x" * 1024)
        (photo,), _ = list_photos([tmp_path / "set.tar"])
        with pytest.raises(UserError, match="a.jpg is cut short, with its archive"):
            photo.read()

    def test_a_name_as_long_as_may_be(self, tmp_path):
        touch(tmp_path, "é" * 120 + ".jpg", "é" * 119 + "e.jpg")
        photos, _ = list_photos([tmp_path])
        names = output_names(photos, tmp_path)
        assert len(set(names)) == 2
        assert all(len(f"{name}_labels.json".encode()) <= 255 for name in names)

    def test_an_empty_name(self):
        with pytest.raises(UserError, match="an empty name is given for a photo: leave it out, or name one"):
            list_photos([""])

    def test_an_archive_that_breaks_off(self, tmp_path):
        """What stands before the break is taken; a member that is cut is told when it is read."""
        path = pack(tmp_path / "set.tar", {f"{n}.jpg": bytes([n]) * 2000 for n in range(5)})
        path.write_bytes(path.read_bytes()[: 3 * 2560 + 512 + 100])
        photos, notes = list_photos([path])
        assert [photo.read()[:1] for photo in photos[:3]] == [b"\0", b"\1", b"\2"]
        for photo in photos[3:]:
            with pytest.raises(UserError, match="3.jpg is cut short, with its archive; copy or pack that again"):
                photo.read()
        assert len(photos) >= 3 and (len(photos) == 4 or "breaks off" in notes[0])

    @pytest.mark.parametrize(
        "name, content, sentence",
        [
            ("x.tar", b"no archive", "x.tar is no tar archive"),
            ("x.tar.gz", b"", "x.tar.gz is a compressed archive; unpack it, or give a plain .tar"),
            ("none.jpg", None, "none.jpg does not exist; check the name"),
        ],
    )
    def test_sentences(self, tmp_path, name, content, sentence):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=sentence):
            list_photos([tmp_path / name])

    def test_folders_and_archives_without_images(self, tmp_path):
        touch(tmp_path, "notes.txt")
        with pytest.raises(UserError) as error:
            list_photos([tmp_path])
        assert str(error.value) == (
            f"the folder {tmp_path} holds no image; give one with .jpg, .jpeg, .png, .bmp, .tif, .tiff, .webp files"
        )
        with pytest.raises(UserError, match="x.tar holds no image; pack .jpg, .jpeg"):
            list_photos([pack(tmp_path / "x.tar", {"a.txt": b"a"})])

    def test_names_that_would_overwrite_each_other(self, tmp_path):
        touch(tmp_path, "x/a.jpg", "y/a.jpg", "a_2_lseg.png")
        photos, _ = list_photos([tmp_path / "x", tmp_path / "y", tmp_path / "a_2_lseg.png"])
        assert [str(name) for name in output_names(photos, tmp_path)] == ["a", "a_3", "a_2_lseg"]


class TestOverlap:
    def test_order_and_overlap(self):
        """Reading goes ahead while the work is on, and results come in the order of the items."""
        reading, most, lock = set(), [0], threading.Lock()

        def load(item: int) -> int:
            with lock:
                reading.add(item)
                most[0] = max(most[0], len(reading))
            time.sleep(0.02)
            with lock:
                reading.discard(item)
            return item * 10

        main = threading.get_ident()

        def work(pairs: list[tuple[int, int]]) -> list[int]:
            assert threading.get_ident() == main
            return [loaded + item for item, loaded in pairs]

        found = list(overlapped(range(20), load, work, lambda item, made: (item, made)))
        assert found == [(n, (n, 11 * n)) for n in range(20)] and most[0] > 1

    def test_two_callers_work_at_a_time_and_order_stays(self):
        at_work, most = [], [0]

        def work(pairs: list[tuple[int, int]]) -> list[int]:
            ((item, loaded),) = pairs
            at_work.append(item)
            most[0] = max(most[0], len(at_work))
            time.sleep(0.01 * (item % 3))
            at_work.remove(item)
            return [loaded + item]

        found = list(overlapped(range(20), lambda item: item, work, lambda item, made: made, callers=2))
        assert found == [(n, 2 * n) for n in range(20)] and most[0] == 2

    @pytest.mark.parametrize("callers, group, count", [(1, 4, 12), (1, 4, 13), (3, 8, 30), (2, 8, 5), (2, 3, 0)])
    def test_groups(self, callers, group, count):
        """Of as many as there are, without those that are bad; the last may be smaller."""
        worked = []

        def load(item: int) -> int:
            if item % 5 == 2:
                raise UserError("bad")
            return item

        def work(pairs: list[tuple[int, int]]) -> list[int]:
            worked.append(pairs)
            return [10 * loaded for _, loaded in pairs]

        found = dict(overlapped(range(count), load, work, lambda _, made: made, callers=callers, group=group))
        good = [item for item in range(count) if item % 5 != 2]
        assert {item: result for item, result in found.items() if not isinstance(result, UserError)} == {
            item: 10 * item for item in good
        }
        assert len(found) == count
        assert sorted(map(len, worked), reverse=True)[: len(good) // group] == [group] * (len(good) // group)
        assert len(worked) == -(-len(good) // group)

    @pytest.mark.parametrize("group", [1, 3])
    def test_a_bad_item_is_skipped(self, group):
        def load(item: int) -> int:
            if item % 3 == 1:
                raise UserError(f"{item} is bad")
            return item

        found = dict(overlapped(range(7), load, lambda pairs: [x for _, x in pairs], lambda _, x: x, group=group))
        assert {item: str(result) for item, result in found.items() if item % 3 == 1} == {1: "1 is bad", 4: "4 is bad"}
        assert [result for result in found.values() if not isinstance(result, UserError)] == [0, 2, 3, 5, 6]

    @pytest.mark.parametrize("callers", [1, 2])
    @pytest.mark.parametrize("step", ["work", "store"])
    def test_a_failure_ends_it_and_what_was_begun_is_finished(self, step, callers):
        stored, begun = [], []

        def fail(name: str, item: int, *_: int) -> list[None]:
            if name == step and item == 3:
                raise RuntimeError("no")
            return [None]

        def store(item: int, made: int) -> None:
            begun.append(item)
            fail("store", item)
            time.sleep(0.02)
            stored.append(item)

        with pytest.raises(RuntimeError, match="no"):
            for _ in overlapped(
                range(50), lambda item: item, lambda pairs: fail("work", *pairs[0]), store, callers=callers
            ):
                pass
        assert sorted(stored) == sorted(set(begun) - ({3} if step == "store" else set())) and len(begun) < 20

    def test_memory_is_bounded(self):
        """However slow the work is, only a few items are loaded."""
        loaded, worked = [], []

        def work(pairs: list[tuple[int, None]]) -> list[None]:
            worked.extend(pairs)
            return [None] * len(pairs)

        for item, _ in overlapped(range(60), loaded.append, work, lambda *_: None):
            assert len(loaded) - len(worked) <= 6, item
