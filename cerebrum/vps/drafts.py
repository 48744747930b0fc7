"""Drafts: likely next tokens, which the model checks in one decode. They are copied from the text
itself, or a small model has written them.

Pure: no model, no clock.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from cerebrum.vps.tokens import common_prefix

# ----------------------------------------------------------------------------------- policy: drafts

GRAM = 3  # this many tokens must repeat before the tokens that followed them are drafted
RECENT = 16  # latest occurrences of a gram that are looked at
# Most old or new tokens of a change in a copy. After a longer change the copy is searched for anew.
MAX_CHANGE = 8
NEAR = 48  # after a change the copy usually continues within this many tokens
MAX_MATCH = 32  # tokens that are compared before two positions
MAX_CREDIT = 16  # of the tokens before a change, these many count for the streak after it
# Of drafts of the text. With the token before it, a decode of 28 to 31 tokens takes as long as one
# of 32.
LENGTHS = (0, 3, 7, 15, 31, 63)
SEEN, TRIALS = 50, 8  # drafts by which a length is judged: at most, at least
# Only so many drafts in a row are judged by the decode without one before them: later the machine
# may have another speed.
FRESH = 4
RETRY = 64  # a verdict that was followed this often is contradicted once


TEXT, MODEL = "text", "model"  # sources of drafts
MODEL_LENGTH = 15  # most tokens that a draft model writes ahead
# The share of a 1.5B's tokens that the 0.5B of its family expected, in new code. It stands for
# pairs that nothing is known of yet.
USUAL_ACCEPTANCE = 0.889


def pair_rate(costs: Callable[[int], float], draft_seconds: float, acceptance: float) -> float:
    """Tokens a second of a model whose draft model takes `draft_seconds` for a token and is right
    with a probability of `acceptance`. `costs` are the seconds of the model's decodes. The rate
    without drafts if that is higher.
    """
    rates = []
    tokens, likely = 0.0, 1.0
    for length in range(MODEL_LENGTH + 1):
        tokens += likely
        likely *= acceptance
        rates.append(tokens / (length * draft_seconds + costs(length + 1)))
    return max(rates)


Case = tuple[int, str, int]  # the number of streams, a draft's source and its length


class Gain:
    """Whether drafts save time, by their source, their length and the number of streams. Owned by a
    worker and kept across requests. Whatever a draft model writes counts as a draft of
    MODEL_LENGTH, the most that it may write.

    A draft is judged by the decodes without drafts just before it, because a machine with
    neighbours changes its speed.
    """

    def __init__(self) -> None:
        # By the number of streams: moving average of the seconds per token without drafts.
        self.plain: dict[int, float] = {}
        self.judged = Counter[int]()  # by the number of streams: drafts judged by this average
        # By streams, source and length, for each of the latest drafts: the seconds that its tokens
        # took longer than without it.
        self.losses: dict[Case, deque[float]] = defaultdict(lambda: deque(maxlen=SEEN))
        # How often each verdict was given.
        self.verdicts = Counter[tuple[Case, bool]]()

    def learn_plain(self, streams: int, tokens: int, seconds: float) -> None:
        """Count a decode without a draft that wrote `tokens`."""
        if tokens:
            pace = seconds / tokens
            self.plain[streams] = (3 * self.plain.get(streams, pace) + pace) / 4
            self.judged[streams] = 0

    def learn(self, case: Case, tokens: int, seconds: float) -> None:
        """Count a decode with a draft, and the time that making the draft took: `tokens` were
        written.
        """
        streams = case[0]
        if tokens and self.judged[streams] < FRESH:
            self.losses[case].append(seconds - tokens * self.plain[streams])
            self.judged[streams] += 1

    def wants(self, case: Case) -> bool:
        """Whether to make such a draft now; each call counts. Each verdict is contradicted once
        after it was followed RETRY times, so that an outdated one is tested again.
        """
        streams, source, _ = case
        if streams not in self.plain:
            return False  # there is nothing to compare with
        losses = self.losses[case]
        verdict = sum(losses) <= 0
        if len(losses) < TRIALS:
            # Too few: make it if it can be judged. A draft model's are made in any case: it is only
            # loaded if they should save time.
            verdict = source == MODEL or self.judged[streams] < FRESH
        given = case, verdict
        self.verdicts[given] += 1
        is_test = self.verdicts[given] % (RETRY + 1) == 0
        return not verdict if is_test else verdict


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
        self.index: dict[tuple[int, ...], list[int]] = {}  # positions that follow each gram
        common = common_prefix(tokens, guide)
        for position in range(max(GRAM, common), self.own + 1):
            self._add(position)
        for position in range(self.own + GRAM, len(self.tokens) + 1):
            self._add(position)
        self.at = -1  # position of the token expected next, -1 for none
        # Number of consecutive tokens predicted correctly. After a change some are credited.
        self.streak = 0
        self.before_change = 0  # the streak before the latest mismatch
        self.changed_from = 0  # position where the latest change began
        self.changes: dict[tuple[int, ...], list[int]] = {}
        self.done = 0  # tokens already seen of the change expected at `at`
        if len(guide) > common == len(tokens):
            self.at, self.streak = common, min(common, MAX_MATCH)
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
            self.at, self.done = at, done
            return
        if old := self._changed(self.at):
            del self.changes[old]
            if token == old[0] and not self.done:  # this time the copy kept the old token
                self.streak += 1
                self.at += 1
                return
        self.before_change = self.streak
        self.streak = 0
        self.changed_from = len(self.tokens) - self.done
        self.done = 0

    def _changed(self, position: int) -> tuple[int, ...]:
        """The tokens at `position` that are expected to be changed; the most if several changes
        begin alike.
        """
        lengths = range(MAX_CHANGE, 0, -1) if self.changes else ()
        for length in lengths:
            old = tuple(self.tokens[position : position + length])
            if old in self.changes:
                return old
        return ()

    def _ahead(self) -> Iterator[tuple[int, int, int]]:
        """The tokens expected next, up to the end of the sequence, each with `at` and `done` behind
        it.
        """
        at, done = self.at, self.done
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
        position just lost, which shows how the copy was changed, or else the one with the longest
        match.
        """
        lost = self.at
        gram = tuple(self.tokens[-GRAM:])
        found = self.index.get(gram, [])[-RECENT:]
        found = [position for position in found if position != len(self.tokens)]
        soon = [position for position in found if self._is_soon(position, lost)]
        if soon:
            self.at = min(soon)
            self._remember_change(lost)
            self.streak = self._matched(self.at) + min(self.before_change, MAX_CREDIT)
        elif found:
            self.at = max(found, key=lambda position: (self._matched(position), position))
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

    def draft(self, room: int) -> list[int]:
        """The tokens to check next, at most `room`, and about as many as were right before."""
        tokens = self.propose(min(room, self.streak))
        length = max(length for length in LENGTHS if length <= len(tokens))
        return tokens[:length]
