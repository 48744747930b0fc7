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

    def choose(self, drafter: Drafter, room: int, greedy: bool, costs: Costs) -> list[int]:
        """The draft to check now, of at most `room` tokens. Empty if drafting does not pay here."""
        tokens = drafter.propose(room)
        probability = self.probability(greedy, drafter.streak) if tokens else 0.0
        return tokens[: draft_length(probability, len(tokens), costs)]


def draft_length(probability: float, limit: int, costs: Costs) -> int:
    """The draft length with the most expected tokens per second; 0 if drafting does not pay.

    Only `limit` and lengths that fill a decode of a calibrated size are considered: 28 to 31 tokens take as long as 32.
    """
    best, rate = 0, 1.03 / costs(1)
    for length in (*(size - 1 for size in costs.sizes), limit):
        if not 0 < length <= limit:
            continue
        expected = (1 - probability ** (length + 1)) / (1 - probability)
        if expected / costs(length + 1) > rate:
            best, rate = length, expected / costs(length + 1)
    return best


class Drafter:
    """Proposes the next tokens of one sequence by looking up what followed the same tokens before: in the sequence
    itself, or in an earlier sequence with the same prefix.

    A copy with changes continues after each change. `changes` maps replaced tokens to their replacements, and the same
    change is expected wherever the same tokens are copied again, as in a rename.
    """

    def __init__(self, tokens: Sequence[int], guide: Sequence[int] = ()) -> None:
        self.tokens, self.own = [*guide, *tokens], len(guide)  # the earlier sequence, then from `own` on this one
        self.index: dict[tuple[int, ...], list[int]] = {}  # places that follow each run of GRAM tokens
        common = common_prefix(tokens, guide)
        for place in (*range(max(GRAM, common), self.own + 1), *range(self.own + GRAM, len(self.tokens) + 1)):
            self._add(place)
        self.at = -1  # place of the token expected next, -1 for none
        self.streak = 0  # consecutive tokens the draft predicted correctly; after a change some are credited
        self.before_change = 0  # the streak before the latest mismatch
        self.changed_from = 0  # place where the latest change began
        self.changes: dict[tuple[int, ...], list[int]] = {}
        self.done = 0  # tokens already seen of the change expected at `at`
        if len(guide) > common == len(tokens):
            self.at, self.streak = common, min(common, STREAKS[-1])
        elif len(tokens) >= GRAM:
            self._search()

    def _add(self, place: int) -> None:
        self.index.setdefault(tuple(self.tokens[place - GRAM : place]), []).append(place)

    def _begin(self, place: int) -> int:
        """Where the sequence begins that ends at `place` or goes on there."""
        return self.own if place > self.own else 0

    def advance(self, token: int) -> None:
        """Append `token` to the sequence, and update the place of the next token."""
        if self.streak:
            self._follow(token)
        self.tokens.append(token)
        if len(self.tokens) >= self.own + GRAM:
            self._add(len(self.tokens))
            if not self.streak:
                self._search()

    def _follow(self, token: int) -> None:
        """Move past `token` if it was expected; otherwise the streak ends."""
        expected, place, done = self._next(self.at, self.done)
        if token == expected:
            self.streak, self.at, self.done = self.streak + 1, place, done
            return
        if old := self._changed(self.at):
            del self.changes[old]
            if token == old[0] and not self.done:  # this time the copy kept the old token
                self.streak, self.at = self.streak + 1, self.at + 1
                return
        self.before_change, self.streak = self.streak, 0
        self.changed_from, self.done = len(self.tokens) - self.done, 0

    def _changed(self, place: int) -> tuple[int, ...]:
        """The tokens at `place` that are expected to be changed; the most if several changes begin alike."""
        for length in range(MAX_CHANGE, 0, -1) if self.changes else ():
            old = tuple(self.tokens[place : place + length])
            if old in self.changes:
                return old
        return ()

    def _next(self, place: int, done: int) -> tuple[int | None, int, int]:
        """The token expected at `place` after `done` tokens of a change there, and then the next place and `done`."""
        if place in (self.own, len(self.tokens)):  # the end of a sequence
            return None, place, 0
        if old := self._changed(place):
            new = self.changes[old]
            last = done + 1 == len(new)
            return new[done], place + len(old) if last else place, 0 if last else done + 1
        return self.tokens[place], place + 1, 0

    def _search(self) -> None:
        """Find the place after an earlier occurrence of the latest tokens: soon after the place just lost, which shows
        how the copy was changed, or else the one with the most tokens alike."""
        end, lost = len(self.tokens), self.at
        places = [place for place in self.index.get(tuple(self.tokens[-GRAM:]), ())[-16:] if place != end]
        alike = [place for place in places if lost >= 0 and self._begin(place) == self._begin(lost)]
        if soon := [place for place in alike if 0 < place - lost <= NEAR]:
            self.at = min(soon)
            self._remember_change(lost)
            self.streak = self._matched(self.at) + min(self.before_change, 16)
        elif places:
            self.at = max(places, key=lambda place: (self._matched(place), place))
            self.streak = self._matched(self.at)

    def _remember_change(self, lost: int) -> None:
        """Expect the same change wherever the copy has the replaced tokens again: those from `lost` to `at`, without
        the last ones, which matched. An insertion or deletion is remembered together with the token after it."""
        fewer = min(self.at - lost, len(self.tokens) - self.changed_from)
        matched = min(self._matched(self.at), fewer - 1)
        old, new = self.tokens[lost : self.at - matched], self.tokens[self.changed_from : len(self.tokens) - matched]
        if max(len(old), len(new)) <= MAX_CHANGE:
            self.changes[tuple(old)] = new

    def _matched(self, place: int) -> int:
        """How many of the latest tokens also precede `place`."""
        limit = min(STREAKS[-1], len(self.tokens) - self.own, place - self._begin(place))
        pairs = zip(reversed(self.tokens[-limit:]), reversed(self.tokens[place - limit : place]), strict=True)
        return next((count for count, (one, other) in enumerate(pairs) if one != other), limit)

    def propose(self, limit: int) -> list[int]:
        """At most `limit` tokens that may come next. `streak` indicates how likely they are."""
        if self.streak < GRAM:
            return []
        place, done = self.at, self.done
        tokens: list[int] = []
        while len(tokens) < limit:
            token, place, done = self._next(place, done)
            if token is None:
                break
            tokens.append(token)
        return tokens
