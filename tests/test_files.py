import os

import pytest

from gaplab.errors import UserError
from gaplab.files import check_yaml, plain, read_json, read_text, write_whole

LAUGHS = "".join(f"b{n}: &b{n} [{', '.join([f'*b{n - 1}'] * 9 if n else ['x'])}]\n" for n in range(9))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: !!python/object/apply:os.getcwd []", "os.getcwd would make an object"),
        (LAUGHS, "more than 100000 values"),
        (LAUGHS.replace("[*", "{<<: [*").replace("]", "]}").replace("[x]}", "{x: 1}"), "more than 100000 values"),
        ("[" * 10_000, "nested more than 32 levels deep"),
        ("".join(f"b{n}: &b{n} [{f'*b{n - 1}' if n else ''}]\n" for n in range(99)), "nested more than 32 levels deep"),
        ("a: &a [*a]", "the alias a contains itself"),
        ("a: \x00", "cannot be read"),
        ("a: [", "cannot be read"),
    ],
)
def test_a_yaml_file_that_no_loader_should_be_given_is_refused(text, said):
    with pytest.raises(UserError, match=f"^here: .*{said}"):
        check_yaml(text, "here")


def test_honest_yaml_passes_and_references_only_where_they_may_stand():
    check_yaml("a: &a {x: [1, 2.5, null]}\nb: {<<: *a, y: !!str 1}\nc: ${a.x}\n", "here")
    with pytest.raises(UserError, match=r"here: \$\{a.x\} is still to be filled in"):
        check_yaml("c: ${a.x}", "here", resolved=True)


def test_only_regular_small_text_files_are_read(tmp_path):
    path = tmp_path / "a"
    with pytest.raises(UserError, match="a: cannot be read"):
        read_text(path)
    path.write_bytes(b"\xff")
    with pytest.raises(UserError, match="a: cannot be read"):
        read_text(path)
    os.truncate(path, 10_000_000)
    with pytest.raises(UserError, match=r"a: 10\.0 MB, more than the 4 MB that are read"):
        read_text(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="a: not a file"):
        read_text(path)
    assert read_json(path) == {}


@pytest.mark.parametrize("content", [b"", b"[1]", b"5", b"{", b"\xff", b"[" * 100_000, b'{"a": 1' + b"0" * 5000])
def test_json_that_is_no_object_counts_as_none(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    assert read_json(tmp_path / "a.json") == {}


def test_text_says_nothing_to_a_terminal():
    assert plain("\x1b[31mé😀\n\u202e\udcff $[red]") == r"\x1b[31mé😀\n\u202e\udcff $[red]"


def test_a_file_written_whole_follows_no_link(tmp_path):
    (tmp_path / "mine").write_text("mine")
    for name in ("a", ".a"):
        (tmp_path / name).symlink_to(tmp_path / "mine")
    write_whole(tmp_path / "a", "text")
    assert (tmp_path / "mine").read_text() == "mine"
    assert (tmp_path / "a").read_text() == "text"
