"""Drafts: likely next tokens, which the model checks in one decode. They are copied from the text
itself, or a small model has written them.

Pure: no model, no clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

# ----------------------------------------------------------------------------------- policy: drafts

GRAM = 3  # this many tokens must repeat before the tokens that followed them are drafted
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
    """How long a draft model takes to read `missing` tokens in pieces. Each piece has a decode of
    its own. One token is read for each draft in any case: it does not count, nor does the start of
    the decode that reads it.

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

# (streams, length) for a draft from the text, (streams, MODEL) for any of a draft model.
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
        # By the number of streams: moving average of the seconds per token of all streams together,
        # without drafts.
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
    """Proposes the next tokens of one sequence: a copy of those that followed the latest tokens
    when they came before. A copy ends at its first wrong token.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = list[int]()
        self.index = dict[tuple[int, ...], int]()  # where each gram ended when it came last
        self.at = 0  # position of the token expected next
        self.streak = 0  # how many latest tokens the copy has had too; 0: there is no copy
        for token in tokens:
            self.advance(token)

    def advance(self, token: int) -> None:
        """Append `token`, and follow the copy, or find another one."""
        if self.streak and token == self.tokens[self.at]:
            self.at += 1
            self.streak += 1
        else:
            self.streak = 0
        self.tokens.append(token)
        gram = tuple(self.tokens[-GRAM:])
        if not self.streak and gram in self.index:
            self.at = self.index[gram]
            self.streak = GRAM
        self.index[gram] = len(self.tokens)

    def draft(self, most: int) -> list[int]:
        """The tokens to check next, at most `most`, and about as many as were right before."""
        tokens = self.tokens[self.at : self.at + min(most, self.streak)]
        length = max(length for length in LENGTHS if length <= len(tokens))
        return tokens[:length]
