"""Drafts: likely next tokens, copied from the text itself and checked by the model in one decode.

Pure: no model, no clock.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Sequence

from cerebrum.vps.llama import common_prefix
from cerebrum.vps.schedule import Costs

# --------------------------------------------------------------------------------------- policy: drafts

GRAM = 3  # this many tokens must repeat before the tokens that followed them are drafted
MAX_CHANGE = 8  # most old or new tokens of a change in a copy; after a longer change the copy is searched for anew
NEAR = 48  # after a change the copy usually continues within this many tokens
STREAKS = (GRAM, 5, 8, 12, 16, 24, 32)  # lower bounds of the streak lengths by which acceptance is counted
PRIORS = (0.55, 0.65, 0.78, 0.88, 0.92, 0.95, 0.97)  # assumed acceptance of each before any draft is checked
PRIOR_WEIGHT = 12.0  # in tokens


class Acceptance:
    """How often drafted tokens were right, by the draft's streak and by whether decoding is greedy. Owned by a worker
    and kept across requests."""

    def __init__(self) -> None:
        self.right, self.wrong = Counter[tuple[bool, int]](), Counter[tuple[bool, int]]()

    @staticmethod
    def bucket(streak: int) -> int:
        return bisect.bisect_right(STREAKS, streak) - 1

    def probability(self, greedy: bool, streak: int) -> float:
        """Probability that the next drafted token is right."""
        key = greedy, self.bucket(streak)
        prior = PRIORS[key[1]] * (1.0 if greedy else 0.9)
        return (self.right[key] + prior * PRIOR_WEIGHT) / (self.right[key] + self.wrong[key] + PRIOR_WEIGHT)

    def learn(self, greedy: bool, streak: int, drafted: int, accepted: int) -> None:
        """Count a draft of `drafted` tokens, the first `accepted` of which were right."""
        key = greedy, self.bucket(streak)
        self.right[key] += accepted
        self.wrong[key] += accepted < drafted

    def choose(self, drafter: Drafter, room: int, greedy: bool, costs: Costs, others: int) -> list[int]:
        """The draft to check now, of at most `room` tokens, while each of `others` decodes one token. Empty if drafting
        does not pay here."""
        tokens = drafter.propose(room)
        probability = self.probability(greedy, drafter.streak) if tokens else 0.0
        return tokens[: draft_length(probability, len(tokens), costs, others)]


def draft_length(probability: float, limit: int, costs: Costs, others: int = 0) -> int:
    """The draft length with the most expected tokens per second; 0 if drafting does not pay.

    Only `limit` and lengths that fill a decode of a calibrated size (with one token of each of `others`) are
    considered: 28 to 31 tokens take as long as 32.
    """
    best, rate = 0, 1.03 / costs.beside(others, 1)
    for length in (*(size - 1 - others for size in costs.sizes), limit):
        if not 0 < length <= limit:
            continue
        expected = (1 - probability ** (length + 1)) / (1 - probability)
        price = costs.beside(others, length + 1)
        if expected / price > rate:
            best, rate = length, expected / price
    return best


class Drafter:
    """Proposes the next tokens of one sequence by looking up what followed the same tokens before: in the sequence
    itself (source 0), or in an earlier sequence with the same prefix (source 1).

    A copy with changes continues after each change. `changes` maps replaced tokens to their replacements, and the same
    change is expected wherever the same tokens are copied again, as in a rename.
    """

    def __init__(self, tokens: Sequence[int], guide: Sequence[int] = ()) -> None:
        self.sources, common = [list(tokens), list(guide)], common_prefix(tokens, guide)
        self.index: dict[tuple[int, ...], list[tuple[int, int]]] = {}  # places that follow each run of GRAM tokens
        for position in range(max(GRAM, common), len(guide) + 1):
            self._add(1, position)
        for position in range(GRAM, len(tokens) + 1):
            self._add(0, position)
        self.at: tuple[int, int] | None = None  # source and position of the token expected next
        self.streak = 0  # consecutive tokens the draft predicted correctly; after a change some are credited
        self.before_change = 0  # the streak before the latest mismatch
        self.changed_from = 0  # position in the own sequence where the latest change began
        self.changes: dict[tuple[int, ...], list[int]] = {}
        self.done = 0  # tokens already seen of the change expected at `at`
        if len(guide) > common == len(tokens):
            self.at, self.streak = (1, common), min(common, STREAKS[-1])
        else:
            self._search()

    def _add(self, source: int, end: int) -> None:
        self.index.setdefault(tuple(self.sources[source][end - GRAM : end]), []).append((source, end))

    def advance(self, token: int) -> None:
        """Append `token` to the sequence, and update the place of the next token."""
        own = self.sources[0]
        if self.streak:
            self._follow(token)
        own.append(token)
        if len(own) >= GRAM:
            self._add(0, len(own))
        if not self.streak:
            self._search()

    def _follow(self, token: int) -> None:
        """Move past `token` if it was expected; otherwise the streak ends."""
        assert self.at
        expected, place, done = self._next(self.at, self.done)
        if token == expected:
            self.streak, self.at, self.done = self.streak + 1, place, done
            return
        if change := self._change(self.at):
            del self.changes[change[0]]
            if token == change[0][0] and not self.done:  # this time the copy kept the old token
                self.streak, self.at = self.streak + 1, (self.at[0], self.at[1] + 1)
                return
        self.before_change, self.streak = self.streak, 0
        self.changed_from, self.done = len(self.sources[0]) - self.done, 0

    def _change(self, place: tuple[int, int]) -> tuple[tuple[int, ...], list[int]] | None:
        """The change expected at `place`; the longest if several begin alike."""
        tokens, position = self.sources[place[0]], place[1]
        for length in range(MAX_CHANGE, 0, -1) if self.changes else ():
            old = tuple(tokens[position : position + length])
            if old in self.changes:
                return old, self.changes[old]
        return None

    def _next(self, place: tuple[int, int], done: int) -> tuple[int | None, tuple[int, int], int]:
        """The token expected at `place` after `done` tokens of a change there, and then the next place and `done`."""
        source, position = place
        if change := self._change(place):
            old, new = change
            last = done + 1 == len(new)
            return new[done], (source, position + len(old)) if last else place, 0 if last else done + 1
        if position == len(self.sources[source]):
            return None, place, 0
        return self.sources[source][position], (source, position + 1), 0

    def _search(self) -> None:
        """Find the place after an earlier occurrence of the latest tokens: soon after the place just lost, which shows
        how the copy was changed, or else the one with the most tokens alike."""
        own, lost = self.sources[0], self.at
        places = [place for place in self.index.get(tuple(own[-GRAM:]), ())[-16:] if place != (0, len(own))]
        soon = [place for place in places if lost and place[0] == lost[0] and 0 < place[1] - lost[1] <= NEAR]
        if soon and lost:
            self.at = min(soon)
            matched = self._matched(self.at)
            self._remember_change(lost, matched)
            self.streak = matched + min(self.before_change, 16)
        elif places:
            self.at = max(places, key=lambda place: (self._matched(place), place[1]))
            self.streak = self._matched(self.at)

    def _remember_change(self, lost: tuple[int, int], matched: int) -> None:
        """Expect the same change wherever the copy has the replaced tokens again: those from `lost` to `at`, without
        the last ones, which `matched`. An insertion or deletion is remembered together with the token after it."""
        assert self.at
        (source, begin), end, own = lost, self.at[1], self.sources[0]
        matched = min(matched, end - begin, len(own) - self.changed_from)
        matched -= matched in (end - begin, len(own) - self.changed_from)
        old, new = self.sources[source][begin : end - matched], own[self.changed_from : len(own) - matched]
        if max(len(old), len(new)) <= MAX_CHANGE:
            self.changes[tuple(old)] = new

    def _matched(self, place: tuple[int, int]) -> int:
        """How many of the latest tokens also precede `place`."""
        own, other, count = self.sources[0], self.sources[place[0]], 0
        limit = min(STREAKS[-1], len(own), place[1])
        while count < limit and own[-1 - count] == other[place[1] - 1 - count]:
            count += 1
        return count

    def propose(self, limit: int) -> list[int]:
        """At most `limit` tokens that may come next. `streak` indicates how likely they are."""
        if not self.at or self.streak < GRAM:
            return []
        place, done = self.at, self.done
        tokens: list[int] = []
        while len(tokens) < limit:
            token, place, done = self._next(place, done)
            if token is None:
                break
            tokens.append(token)
        return tokens
