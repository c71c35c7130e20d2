"""Tokens that visitors carry: nobody else can make one, and none counts for ever."""

import hmac

import pytest
from context_sqla_hosts import Position
from context_sqla_hosts._token import Tokens
from hypothesis import given
from hypothesis import strategies as st

OLD, NEW = "the key of last month", b"the key of this month"
NOW = 1_800_000_000
CLUSTER = 7


@given(st.one_of(st.just("primary"), st.builds(Position, st.integers(1, 2**31), st.integers(0, 2**64 - 1))))
def test_a_token_says_what_was_signed(floor):
    """A position, or that only the primary will do."""
    tokens = Tokens([NEW], 60)

    assert tokens.read(tokens.sign(floor, CLUSTER, NOW), CLUSTER, NOW) == (floor, "ok")


def test_keys_rotate():
    """The first key signs; the old one is still accepted, until it is dropped."""
    signed = Tokens([OLD], 60).sign(Position(1, 5), CLUSTER, NOW)

    assert Tokens([NEW, OLD], 60).read(signed, CLUSTER, NOW)[1] == "ok"
    assert Tokens([NEW], 60).read(signed, CLUSTER, NOW)[1] == "forged"


@pytest.mark.parametrize("signer", [0, 1, 2, None])
def test_which_key_fits_does_not_show(signer, monkeypatch):
    """Every key is tried, in a comparison that takes the same time wherever it fails."""
    keys, compared, compare = [f"key number {number} of three" for number in range(3)], [], hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda one, other: compared.append(other) or compare(one, other))
    signed = Tokens(["another key altogether" if signer is None else keys[signer]], 60).sign("primary", CLUSTER, NOW)

    assert Tokens(keys, 60).read(signed, CLUSTER, NOW)[1] == ("forged" if signer is None else "ok")
    assert len(set(compared)) == len(keys)


@pytest.mark.parametrize(("later", "verdict"), [(60, "ok"), (61, "expired"), (-5, "ok"), (-6, "expired")])
def test_a_token_expires(later, verdict):
    """Nor does one from the future count, beyond what clocks differ."""
    tokens = Tokens([NEW], 60)

    assert tokens.read(tokens.sign(Position(1, 5), CLUSTER, NOW), CLUSTER, NOW + later)[1] == verdict


def test_a_token_of_another_cluster_is_none_here():
    """Its positions mean nothing here, even if the keys are the same."""
    tokens = Tokens([NEW], 60)

    assert tokens.read(tokens.sign(Position(1, 5), 8, NOW), CLUSTER, NOW) == (None, "forged")


@given(st.data())
def test_a_token_that_was_changed_is_forged(data):
    """Whatever is changed."""
    tokens = Tokens([NEW], 60)
    token = tokens.sign(Position(1, 0xABCDEF), CLUSTER, NOW)
    place = data.draw(st.integers(0, len(token) - 1))
    changed = token[:place] + data.draw(st.sampled_from("09afAF.-_x")) + token[place + 1 :]

    floor, verdict = tokens.read(changed, CLUSTER, NOW)

    assert changed == token or (floor is None and verdict in ("garbled", "forged"))


@given(st.text(max_size=200))
def test_garbage_is_nothing(text):
    """And no error either."""
    assert Tokens([NEW], 60).read(text, CLUSTER, NOW)[0] is None


@pytest.mark.parametrize("keys", [[], ["short"], [NEW, "short"]])
def test_a_weak_key_is_refused(keys):
    """A key that can be guessed is none."""
    with pytest.raises(ValueError):
        Tokens(keys, 60)


def test_one_string_is_no_list_of_keys():
    """It would be a list of characters."""
    with pytest.raises(TypeError):
        Tokens(OLD, 60)
