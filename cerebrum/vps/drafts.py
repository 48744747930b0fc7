"""Drafts: likely next tokens, which the model checks in one decode. They are copied from the text
itself, or a small model has written them.

Pure: no model, no clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from cerebrum.vps.prefixes import common_prefix

# ----------------------------------------------------------------------------------- policy: drafts

GRAM = 3  # this many tokens must repeat before the tokens that followed them are drafted
RECENT = 16  # latest occurrences of a gram that are looked at
# Most old or new tokens of a change in a copy. After a longer change the copy is searched for anew.
MAX_CHANGE = 8
NEAR = 48  # after a change the copy usually continues within this many tokens
MAX_MATCH = 32  # tokens that are compared before two positions
# Of drafts of the text. With the token before it, a decode of 28 to 31 tokens takes as long as one
# of 32.
LENGTHS = (0, 3, 7, 15, 31, 63)
MODEL_LENGTH = 15  # most tokens that a draft model writes ahead

# The credit of a case at its start, in the time of this many tokens without drafts. With less, a
# small model would not get as far as to read the prompt before it writes ahead of a large one.
TRIAL_TOKENS = 18
# The highest credit, in the same unit: what a case may lose of what it has saved.
MOST_TOKENS = 64
AGAIN = 0.01  # of the time without drafts; it pays for the trials later
RETRY = 64  # so many drafts in a row are compared with one decode without a draft
# The share of a 1.5B's tokens that the 0.5B of its family expected, in new code. It stands for
# every pair.
USUAL_ACCEPTANCE = 0.889

DecodeSeconds = Callable[[int], float]  # of a decode by its number of tokens


def pair_rate(costs: DecodeSeconds, draft_seconds: float) -> float:
    """Tokens a second of a model whose draft model takes `draft_seconds` for a token, if that one
    is right as often as usual. `costs` are the seconds of the model's decodes. The rate without
    drafts if that is higher.
    """
    rates = []
    tokens = 0.0
    for length in range(MODEL_LENGTH + 1):
        tokens += USUAL_ACCEPTANCE**length
        rates.append(tokens / (length * draft_seconds + costs(length + 1)))
    return max(rates)


# --------------------------------------------------------------------------- policy: a draft model

# Reading a text may take a draft model at most this share of the time in which the text's tokens
# were written. Its drafts hardly save more of the time of as many further tokens.
MOST_SAVED = 0.5


def catch_up_seconds(missing: int, piece: int, costs: DecodeSeconds) -> float:
    """How long a draft model takes to read `missing` tokens in pieces. One token is read for each
    draft in any case, and does not count.

    >>> catch_up_seconds(1, 50, lambda tokens: 1 + tokens / 10)
    0.0
    >>> catch_up_seconds(100, 50, lambda tokens: 1 + tokens / 10)  # each piece begins a decode
    12.1
    """
    return costs(missing) + (missing // piece - 1) * costs(1)


def is_worth_reading(seconds: float, written: int, left: int, pace: float) -> bool:
    """Whether drafts can save the seconds of reading, in a text of so many tokens that take `pace`
    seconds each. Nobody knows how long the text gets, but at most `left` tokens longer; it may as
    well end when it is twice as long as it is.

    >>> is_worth_reading(2.0, 20, 100, 0.2), is_worth_reading(2.0, 19, 100, 0.2)
    (True, False)
    >>> is_worth_reading(2.0, 80, 10, 0.2)  # it ends soon
    False
    """
    return seconds <= MOST_SAVED * min(written, left) * pace


def is_worth_checking(saved: float, size: int, costs: DecodeSeconds, writing: float = 0.0) -> bool:
    """Whether one more token should save more than it takes: to write it, and to check it in a
    decode of `size` tokens. `saved` has the seconds of a right token, times the probability that it
    is right and all before it are.

    >>> costs = {1: 0.1, 2: 0.15, 3: 0.17}.__getitem__
    >>> is_worth_checking(0.04, 1, costs), is_worth_checking(0.04, 2, costs)
    (False, True)
    >>> is_worth_checking(0.04, 2, costs, writing=0.03)
    False
    """
    return saved > writing + costs(size + 1) - costs(size)


# ------------------------------------------------------------------------- policy: what they gain

# The number of streams, and the length of a draft of the text or MODEL for any of a draft model.
Case = tuple[int, int]
MODEL = 0


class Gain:
    """Which drafts save time, by the number of streams, and by source and length. Owned by a worker
    and kept across requests.

    Each case has a credit of seconds. All that its drafts take is charged to it, and the time that
    the written tokens would have taken without drafts is added. So a case that never saves
    anything costs a few tokens' time once, and then a hundredth of the time.
    """

    def __init__(self) -> None:
        # By the number of streams: moving average of the seconds per token without drafts.
        self.plain = dict[int, float]()
        self.drafts = Counter[int]()  # by the number of streams: since the last decode without one
        self.credits = dict[Case, float]()

    def learn_plain(self, streams: int, tokens: int, seconds: float) -> None:
        """Count a decode without a draft that wrote `tokens`."""
        if tokens:
            pace = seconds / tokens
            self.plain[streams] = (3 * self.plain.get(streams, pace) + pace) / 4
            self.drafts[streams] = 0
            for case in self.credits:
                if case[0] == streams:
                    self.credits[case] += AGAIN * seconds

    def learn(self, case: Case, tokens: int, seconds: float) -> None:
        """Count a decode with a draft that wrote `tokens`."""
        streams, _ = case
        self.charge(case, seconds - tokens * self.plain[streams])
        self.drafts[streams] += 1

    def charge(self, case: Case, seconds: float) -> None:
        """Take seconds from the credit of a case; negative ones were saved."""
        most = MOST_TOKENS * self.plain[case[0]]
        self.credits[case] = min(self._credit(case) - seconds, most)

    def _credit(self, case: Case) -> float:
        return self.credits.get(case, TRIAL_TOKENS * self.plain[case[0]])

    def wants(self, case: Case, seconds: float = 0.0) -> bool:
        """Whether to make such a draft now, which takes so many seconds before it can save any.
        Never without a recent decode to compare with: a machine with neighbours changes its speed.
        """
        streams, _ = case
        has_plain = streams in self.plain and self.drafts[streams] < RETRY
        return has_plain and self._credit(case) > seconds


class Drafter:
    """Proposes the next tokens of one sequence by looking up what followed the same tokens before:
    in the sequence itself, or in an earlier sequence with the same prefix.

    A copy with changes continues after each change. `changes` maps replaced tokens to their
    replacements, and the same change is expected wherever the same tokens are copied again, as in a
    rename.
    """

    def __init__(self, tokens: Sequence[int], guide: Sequence[int] = ()) -> None:
        self.tokens = [*guide, *tokens]  # the earlier sequence, then from `own` on this one
        self.own = len(guide)
        self.index = dict[tuple[int, ...], list[int]]()  # positions that follow each gram
        common = common_prefix(tokens, guide)
        earlier = range(max(GRAM, common), self.own + 1)
        for position in (*earlier, *range(self.own + GRAM, len(self.tokens) + 1)):
            self._add(position)
        self.at = -1  # position of the token expected next, -1 for none
        self.streak = 0  # number of consecutive tokens predicted correctly
        self.changed_from = 0  # position where the latest change began
        self.changes = dict[tuple[int, ...], list[int]]()
        self.done = 0  # tokens already seen of the change expected at `at`
        if len(guide) > common == len(tokens):
            self.at = common
            self.streak = min(common, MAX_MATCH)
        elif len(tokens) >= GRAM:
            self._search()

    def _add(self, position: int) -> None:
        gram = tuple(self.tokens[position - GRAM : position])
        self.index.setdefault(gram, []).append(position)

    def _begin(self, position: int) -> int:
        """Where the sequence begins that ends at `position` or goes on there."""
        return self.own if position > self.own else 0

    def advance(self, token: int) -> None:
        """Append `token` to the sequence, and update the position of the next token."""
        if self.streak:
            self._follow(token)
        self.tokens.append(token)
        if len(self.tokens) >= self.own + GRAM:
            self._add(len(self.tokens))
            if not self.streak:
                self._search()

    def _follow(self, token: int) -> None:
        """Move past `token` if it was expected; otherwise the streak ends."""
        expected, at, done = next(self._ahead(), (None, 0, 0))
        if token == expected:
            self.streak += 1
            self.at = at
            self.done = done
            return
        self.streak = 0
        self.changed_from = len(self.tokens) - self.done
        self.done = 0

    def _changed(self, position: int) -> tuple[int, ...]:
        """The tokens at `position` that are expected to be changed; the most if several changes
        begin alike.
        """
        for length in range(MAX_CHANGE, 0, -1) if self.changes else ():
            old = tuple(self.tokens[position : position + length])
            if old in self.changes:
                return old
        return ()

    def _ahead(self) -> Iterator[tuple[int, int, int]]:
        """The tokens expected next, up to the end of the sequence, each with `at` and `done` behind
        it.
        """
        at = self.at
        done = self.done
        while at not in (self.own, len(self.tokens)):
            # A token that is not changed counts as a change of one token into itself.
            old = self._changed(at) or (self.tokens[at],)
            new = self.changes.get(old, old)
            token = new[done]
            done += 1
            if done == len(new):
                at += len(old)
                done = 0
            yield token, at, done

    def _search(self) -> None:
        """Find the position after an earlier occurrence of the latest tokens: soon after the
        position just lost, which shows how the copy was changed, or else the latest one.
        """
        lost = self.at
        gram = tuple(self.tokens[-GRAM:])
        found = self.index.get(gram, [])[-RECENT:]
        found = [position for position in found if position != len(self.tokens)]
        soon = [position for position in found if self._is_soon(position, lost)]
        if soon:
            self.at = min(soon)
            self._remember_change(lost)
        elif found:
            self.at = found[-1]
        else:
            return
        self.streak = self._matched(self.at)

    def _is_soon(self, position: int, lost: int) -> bool:
        """Whether a copy lost at `lost` may continue at `position`, in the same sequence."""
        if lost < 0 or not 0 < position - lost <= NEAR:
            return False
        return self._begin(position) == self._begin(lost)

    def _remember_change(self, lost: int) -> None:
        """Expect the same change wherever the copy has the replaced tokens again: those from `lost`
        to `at`, without the last ones, which matched. An insertion or deletion is remembered
        together with the token after it.
        """
        fewer = min(self.at - lost, len(self.tokens) - self.changed_from)
        matched = min(self._matched(self.at), fewer - 1)
        old = self.tokens[lost : self.at - matched]
        new = self.tokens[self.changed_from : len(self.tokens) - matched]
        if max(len(old), len(new)) <= MAX_CHANGE:
            self.changes[tuple(old)] = new

    def _matched(self, position: int) -> int:
        """How many of the latest tokens also precede `position`."""
        end = len(self.tokens)
        limit = min(MAX_MATCH, end - self.own, position - self._begin(position))
        for count in range(1, limit + 1):
            if self.tokens[end - count] != self.tokens[position - count]:
                return count - 1
        return limit

    def propose(self, limit: int) -> list[int]:
        """At most `limit` tokens that may come next. `streak` indicates how likely they are."""
        if self.streak < GRAM:
            return []
        return [token for token, _, _ in islice(self._ahead(), limit)]

    def draft(self, most: int) -> list[int]:
        """The tokens to check next, at most `most`, and about as many as were right before."""
        tokens = self.propose(min(most, self.streak))
        length = max(length for length in LENGTHS if length <= len(tokens))
        return tokens[:length]
