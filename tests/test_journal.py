import pytest

from sorna_agent.journal import ENTRY_OVERHEAD, Journal


def test_an_empty_journal_has_nothing_and_its_next_number_is_one():
    journal = Journal()

    assert (journal.first, journal.last, journal.next) == (1, 0, 1)
    with pytest.raises(IndexError):
        journal.read(1)


def test_numbers_begin_at_one_and_have_no_holes():
    journal = Journal()

    numbers = [journal.append([b"%d" % i]) for i in range(3)]

    assert numbers == [1, 2, 3]
    assert [journal.read(number) for number in numbers] == [[b"0"], [b"1"], [b"2"]]
    for beyond in (0, 4, -1):
        with pytest.raises(IndexError):
            journal.read(beyond)


def test_the_oldest_go_when_there_are_more_bytes_than_it_may_keep():
    journal = Journal(retention=3 * (ENTRY_OVERHEAD + 10))

    for i in range(5):
        journal.append([bytes([i]) * 10])

    assert (journal.first, journal.last) == (3, 5)
    assert journal.read(3) == [bytes([2]) * 10]
    with pytest.raises(IndexError):
        journal.read(2)


def test_one_message_that_is_too_big_is_kept_until_the_next_comes():
    journal = Journal(retention=1000)

    journal.append([b"small"])
    journal.append([b"x" * 5000])

    assert (journal.first, journal.last) == (2, 2)
    journal.append([b"small"])
    assert (journal.first, journal.last) == (3, 3)


def test_a_long_life_costs_no_more_memory_than_a_short_one():
    journal = Journal(retention=10 * (ENTRY_OVERHEAD + 8))

    for i in range(20_000):
        journal.append([i.to_bytes(8, "big")])

    assert (journal.first, journal.last) == (19_991, 20_000)
    assert [journal.read(seq) for seq in range(19_991, 20_001)] == [
        [i.to_bytes(8, "big")] for i in range(19_990, 20_000)
    ]
    assert journal.size == 10 * (ENTRY_OVERHEAD + 8)
    assert len(journal._entries) < 3000
