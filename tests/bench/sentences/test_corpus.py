import pytest

from rarefy.bench.sentences.corpus import Sentences, clean, held_out, read, sentences_of

SOURCE = '''
"""Read the configuration of a server from its file.

    >>> this is code and no sentence that anybody would want to read.

The value is returned as :class:`~a.Key` where the ``file`` has one. Too short.
:param x: The parameter is described in a line of its own here.
"""

# A comment of two lines is joined to
# one sentence before it is looked at.

def f():
    """Return the number of words that a sentence of this docstring has."""
'''


def test_sentences_of_docstrings_and_comments():
    assert list(sentences_of(SOURCE)) == [
        "Read the configuration of a server from its file.",
        "The value is returned as a.Key where the file has one.",
        "Return the number of words that a sentence of this docstring has.",
        "A comment of two lines is joined to one sentence before it is looked at.",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "Only seven words are in this one.",
        "it does not begin with a capital letter at all.",
        "This one has no full stop at its very end",
        "See https://example.org for more about all of these things here.",
        "x_1 + y_2 == z_3 and 4 * 5 = 20 and so on and on 1 2 3 4 5.",
        "Word " * 61 + "ends.",
    ],
)
def test_what_is_no_sentence_is_left_out(text):
    assert list(clean(text)) == []


def test_what_cannot_be_parsed_has_none():
    assert list(sentences_of("def f(:\n")) == []


@pytest.fixture
def library(tmp_path):
    """Modules of which some are held out, one sentence of which stands in all."""
    for index in range(120):
        words = " ".join("abcdefgh"[: 1 + index % 8]) + " " + "very " * (index // 8)
        own = f"It says {words}and more than that in a module of its own."
        (tmp_path / f"m{index}.py").write_text(
            f'"""{own}\n\nThis very sentence stands in each of all the modules."""\n'
        )
    return tmp_path


def test_whole_modules_are_held_out(library):
    found = read({"": library}, corpus=2, queries=1)
    judged = [f"m{i}" for i in range(120) if held_out(f"m{i}")]
    assert 3 <= len(judged) < 30
    assert len(found.corpus) == 2
    assert len(found.queries) == 1
    assert not set(found.train) & {*found.corpus, *found.queries}
    assert "This very sentence stands in each of all the modules." in found.train
    assert len(found.train) == 120 - len(judged) + 1


def test_the_text_is_the_same_again_and_told_by_its_digest(library, tmp_path):
    found = read({"": library}, corpus=2, queries=1)
    found.save(tmp_path / "s.json")
    assert read({"": library}, corpus=2, queries=1) == found == Sentences.load(tmp_path / "s.json")
    other = Sentences(found.train[1:], found.corpus, found.queries)
    assert other.digest() != found.digest()


def test_too_little_text_is_told(library):
    with pytest.raises(ValueError, match="held-out sentences"):
        read({"": library}, corpus=500, queries=1)
