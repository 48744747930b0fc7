"""Drafts: likely next tokens, copied from the text itself and checked by the model in one decode.

Pure: no model, no clock.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Sequence

from cerebrum.vps.tokens import common_prefix

# ----------------------------------------------------------------------------------- policy: drafts

GRAM = 3  # this many tokens must repeat before the tokens that followed them are drafted
# most old or new tokens of a change in a copy; after a longer change the copy is searched for anew
MAX_CHANGE = 8
NEAR = 48  # after a change the copy usually continues within this many tokens
ALIKE = 32  # tokens that are compared before two places
LENGTHS = (
    0,
    3,
    7,
    15,
    31,
    63,
)  # of drafts: with the token before it, 28 to 31 tokens take as long as 32
SEEN, TRIALS = 50, 8  # drafts by which a length is judged: at most, at least
FRESH = 4  # of them behind a decode without drafts: later the machine may have another speed
RETRY = 64


class Gain:
    """Whether drafts save time, by their length and the number of streams. Owned by a worker and
    kept across requests.

    A draft is judged by the decodes without drafts just before it, because a machine with
    neighbours changes its speed.
    """

    def __init__(self) -> None:
        self.plain: dict[int, float] = {}  # seconds for a token lately, by the number of streams
        self.age = Counter[int]()  # drafts since then
        # Of the latest drafts by streams and length: the seconds, and those that the tokens would
        # have taken plainly.
        self.seen: dict[tuple[int, int], deque[tuple[float, float]]] = defaultdict(
            lambda: deque(maxlen=SEEN)
        )
        self.passed = Counter[
            tuple[int, int, bool]
        ]()  # how often such a draft was made, or not made

    def learn(self, streams: int, length: int, tokens: int, seconds: float) -> None:
        """Count a decode with a draft of this length, 0 for none, that wrote `tokens`."""
        if not length and tokens:
            self.plain[streams] = (
                3 * self.plain.get(streams, seconds / tokens) + seconds / tokens
            ) / 4
            self.age[streams] = 0
        elif tokens and self.age[streams] < FRESH:
            self.seen[streams, length].append((seconds, tokens * self.plain[streams]))
            self.age[streams] += 1

    def pays(self, streams: int, length: int) -> bool:
        """Whether to make a draft of this length: such drafts saved time, or had few trials. After
        RETRY of one answer the other comes once.
        """
        seen = self.seen[streams, length]
        if streams not in self.plain:
            return False
        judged = len(seen) >= TRIALS
        faster = (
            sum(drafted - plain for drafted, plain in seen) <= 0
            if judged
            else self.age[streams] < FRESH
        )
        self.passed[streams, length, faster] += 1
        if self.passed[streams, length, faster] > RETRY:
            self.passed[streams, length, faster] = 0
            return not faster
        return faster


class Drafter:
    """Proposes the next tokens of one sequence by looking up what followed the same tokens before:
    in the sequence itself, or in an earlier sequence with the same prefix.

    A copy with changes continues after each change. `changes` maps replaced tokens to their
    replacements, and the same change is expected wherever the same tokens are copied again, as in a
    rename.
    """

    def __init__(self, tokens: Sequence[int], guide: Sequence[int] = ()) -> None:
        self.tokens, self.own = (
            [*guide, *tokens],
            len(guide),
        )  # the earlier sequence, then from `own` on this one
        self.index: dict[
            tuple[int, ...], list[int]
        ] = {}  # places that follow each run of GRAM tokens
        common = common_prefix(tokens, guide)
        for place in (
            *range(max(GRAM, common), self.own + 1),
            *range(self.own + GRAM, len(self.tokens) + 1),
        ):
            self._add(place)
        self.at = -1  # place of the token expected next, -1 for none
        self.streak = (
            0  # consecutive tokens the draft predicted correctly; after a change some are credited
        )
        self.before_change = 0  # the streak before the latest mismatch
        self.changed_from = 0  # place where the latest change began
        self.changes: dict[tuple[int, ...], list[int]] = {}
        self.done = 0  # tokens already seen of the change expected at `at`
        if len(guide) > common == len(tokens):
            self.at, self.streak = common, min(common, ALIKE)
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
        """The tokens at `place` that are expected to be changed; the most if several changes begin
        alike.
        """
        for length in range(MAX_CHANGE, 0, -1) if self.changes else ():
            old = tuple(self.tokens[place : place + length])
            if old in self.changes:
                return old
        return ()

    def _next(self, place: int, done: int) -> tuple[int | None, int, int]:
        """The token expected at `place` after `done` tokens of a change there, and then the next
        place and `done`.
        """
        if place in (self.own, len(self.tokens)):  # the end of a sequence
            return None, place, 0
        if old := self._changed(place):
            new = self.changes[old]
            last = done + 1 == len(new)
            return new[done], place + len(old) if last else place, 0 if last else done + 1
        return self.tokens[place], place + 1, 0

    def _search(self) -> None:
        """Find the place after an earlier occurrence of the latest tokens: soon after the place
        just lost, which shows how the copy was changed, or else the one with the most tokens alike.
        """
        end, lost = len(self.tokens), self.at
        places = [
            place for place in self.index.get(tuple(self.tokens[-GRAM:]), ())[-16:] if place != end
        ]
        alike = [place for place in places if lost >= 0 and self._begin(place) == self._begin(lost)]
        if soon := [place for place in alike if 0 < place - lost <= NEAR]:
            self.at = min(soon)
            self._remember_change(lost)
            self.streak = self._matched(self.at) + min(self.before_change, 16)
        elif places:
            self.at = max(places, key=lambda place: (self._matched(place), place))
            self.streak = self._matched(self.at)

    def _remember_change(self, lost: int) -> None:
        """Expect the same change wherever the copy has the replaced tokens again: those from `lost`
        to `at`, without the last ones, which matched. An insertion or deletion is remembered
        together with the token after it.
        """
        fewer = min(self.at - lost, len(self.tokens) - self.changed_from)
        matched = min(self._matched(self.at), fewer - 1)
        old, new = (
            self.tokens[lost : self.at - matched],
            self.tokens[self.changed_from : len(self.tokens) - matched],
        )
        if max(len(old), len(new)) <= MAX_CHANGE:
            self.changes[tuple(old)] = new

    def _matched(self, place: int) -> int:
        """How many of the latest tokens also precede `place`."""
        limit = min(ALIKE, len(self.tokens) - self.own, place - self._begin(place))
        pairs = zip(
            reversed(self.tokens[-limit:]),
            reversed(self.tokens[place - limit : place]),
            strict=True,
        )
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

    def draft(self, room: int) -> list[int]:
        """The tokens to check next, at most `room`, and about as many as were right before."""
        tokens = self.propose(min(room, self.streak))
        return tokens[: max(length for length in LENGTHS if length <= len(tokens))]
