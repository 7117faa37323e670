from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace import SamplingParams
from headrace.chat_cli import Conversation, printable, with_assignments
from headrace.errors import CapacityError, RequestError


def words(messages) -> int:
    """Stands in for a tokenizer: a token a word, and one a message."""
    return sum(1 + len(message["content"].split()) for message in messages)


def test_the_oldest_exchanges_leave_first():
    chat = Conversation(words, limit=12, system="be brief")
    assert chat.ask("one two") == 0  # 3 + 3
    chat.answer("three four")  # + 3
    assert chat.ask("five") == 0  # + 2 = 11
    chat.answer("six")
    assert chat.ask("seven") == 2  # 15 would not fit; without the first exchange 9 do
    assert [turn["content"] for turn in chat.messages] == ["be brief", "five", "six", "seven"]


def test_a_question_that_cannot_fit_changes_nothing():
    chat = Conversation(words, limit=8, system="be brief")
    chat.ask("one")
    chat.answer("two")
    before = list(chat.messages)
    with pytest.raises(CapacityError, match="takes 10 tokens; at most 8"):
        chat.ask("a b c d e f")
    assert chat.messages == before


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), max_size=30), st.integers(13, 40))
def test_a_conversation_always_fits(exchanges, limit):
    chat = Conversation(words, limit, system="s")
    asked: list[str] = []
    for index, (question, answer) in enumerate(exchanges):
        text = f"{index} " + "q " * (question - 1)
        asked.append(text)
        dropped = chat.ask(text)
        assert words(chat.messages) <= limit and chat.messages[0]["content"] == "s"
        kept = [turn["content"] for turn in chat.turns if turn["role"] == "user"]
        assert kept == asked[len(asked) - len(kept) :], "what stays is the newest, in order"
        if dropped:
            # One exchange more would not have fitted, or was not there.
            assert chat.turns[0]["role"] == "user"
        chat.answer("a " * answer)


def test_retry_takes_the_question_back():
    chat = Conversation(words, 100)
    assert chat.take_back() is None
    chat.ask("one")
    chat.answer("two")
    chat.ask("three")
    chat.answer("four")
    assert chat.take_back() == "three"
    assert [turn["content"] for turn in chat.turns] == ["one", "two"]
    chat.reset()
    assert chat.messages == []


def test_params_by_name():
    params = with_assignments(SamplingParams(), ["temperature=0.5", "top_k=3", 'stop=["a","b"]', "ignore_eos=true"])
    assert (params.temperature, params.top_k, params.stop, params.ignore_eos) == (0.5, 3, ("a", "b"), True)
    assert with_assignments(params, ["stop=END"]).stop == ("END",)
    assert with_assignments(params, []) == params


@pytest.mark.parametrize("word", ["temperature", "heat=1", "temperature=hot", "top_p=7", "max_tokens=1.5", "=3"])
def test_params_that_are_wrong(word):
    with pytest.raises(RequestError):
        with_assignments(SamplingParams(), [word])


def test_a_model_cannot_drive_the_terminal():
    assert printable("a\x1b[2Jb\x07\x9b31mc\r\n\td\x7f é 🙂") == "a[2Jb31mc\n\td é 🙂"
