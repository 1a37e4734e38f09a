import pytest

from rarefy.bench.language.corpus import HELD_OUT, standard_library


def write(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of {name}\n")


def test_packages_held_out_are_never_trained_on_nor_are_their_tests(tmp_path):
    write(
        tmp_path, "abc.py", "json/decoder.py", "test/test_json/test_scan.py", "test/test_asyncio.py", "test/test_os.py"
    )
    write(tmp_path, "test/test_os.py", "site-packages/torch/json.py", "lib2to3/main.py")
    corpus = standard_library(tmp_path)
    assert [p.relative_to(tmp_path).as_posix() for p in corpus.train] == ["abc.py", "test/test_os.py"]
    assert [p.relative_to(tmp_path).as_posix() for p in corpus.judged] == [
        "json/decoder.py", "test/test_asyncio.py", "test/test_json/test_scan.py",
    ]  # fmt: skip
    assert "json" not in corpus.text("train")
    assert corpus.text("judged").startswith("# decoder\ntext of json/decoder.py\n")


def test_the_digest_follows_the_text(tmp_path):
    write(tmp_path, "abc.py", "json/decoder.py")
    before = standard_library(tmp_path).digest()
    assert standard_library(tmp_path).digest() == before
    (tmp_path / "abc.py").write_text("other")
    assert standard_library(tmp_path).digest() != before


def test_the_library_of_this_python_has_both_parts():
    corpus = standard_library()
    assert len(corpus.train) > 300
    assert {name for name in HELD_OUT if any(name in p.parts for p in corpus.judged)} >= {"asyncio", "email", "json"}


def test_a_folder_without_source_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no source"):
        standard_library(tmp_path)
