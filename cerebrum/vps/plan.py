"""What to load of a model: the tuned or the published file, in which context, with or without its
draft model, and how much memory that takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from cerebrum.vps.draft_model import check_pair
from cerebrum.vps.drafts import pair_rate
from cerebrum.vps.encoding import DECODES, TunedFile, find_tuned
from cerebrum.vps.llama import MB, ModelError, Settings
from cerebrum.vps.memory import Need, Parts, fit, needed
from cerebrum.vps.schedule import MUCH_LATER, Costs
from cerebrum_common import Model


class LoadPlan(NamedTuple):
    """What to load of a model."""

    settings: Settings  # the given ones, with a context that fits into memory
    tuned: TunedFile | None
    parts: Parts  # the memory that the model takes
    reason: str  # why the model runs untuned, "" if it does not
    # Of the decodes of DECODES, by the file that is loaded; empty: unknown.
    seconds: Sequence[float] = ()
    draft: LoadPlan | None = None  # of the draft model
    note: str = ""  # what was decided about the draft model, "" if there was nothing to decide

    @property
    def bytes(self) -> int:
        """The memory in all."""
        return sum(self.parts.values())

    @property
    def rate(self) -> float:
        """The tokens a second to expect, if the draft model is as much faster as it is smaller."""
        if not self.draft:
            return 1 / self.seconds[0]
        draft_seconds = self.seconds[0] * self.draft.parts["weights"] / self.parts["weights"]
        costs = Costs(dict(zip(DECODES, self.seconds, strict=True)))
        return pair_rate(costs, draft_seconds)

    @property
    def words(self) -> str:
        file = "tuned" if self.tuned else "published"
        return f"{self.rate:.1f} tokens a second by the {file} file in {self.settings.context}"


def plan_load(
    published: Path, settings: Settings, sha256: str, free: float, need: Need
) -> LoadPlan:
    """What to load of a model into `free` bytes of memory. The tuned file is larger; it is used
    only if it fits with the context that the published file has. ModelError or OSError if the
    published file cannot be used.
    """
    fitted, parts = fit(published, settings, free, need)
    tuned, reason = find_tuned(published, fitted, sha256)
    if not tuned:
        return LoadPlan(fitted, None, parts, reason)
    try:
        (larger,) = need(tuned.path, [tuned.settings])
        plan = LoadPlan(fitted, tuned, larger, "", tuned.passport.here)
        if plan.bytes <= free:
            return plan
        reason = (
            f"its tuned file needs {plan.bytes / MB:.0f} MB, and "
            f"{free / MB:.0f} MB can be freed beside the reserve"
        )
    except (ModelError, OSError) as error:
        reason = f"its tuned file cannot be used: {error}"
    return LoadPlan(fitted, None, parts, reason, tuned.passport.published)


def plan_pair(
    model: Model, draft: Model | None, folder: Path, settings: Settings, free: float
) -> LoadPlan:
    """What to load of a model and its draft model, whose files are in `folder`. ModelError or
    OSError if the model's published file cannot be used; its draft model is only left out.
    """
    path = folder / model.file
    alone = plan_load(path, settings, model.sha256, free, needed)
    if not draft or not settings.draft:
        return alone
    file = folder / draft.file
    small = replace(settings, cache_mb=0, outputs=1)
    try:
        tuned, _ = find_tuned(file, small, draft.sha256)
        file, small = (tuned.path, tuned.settings) if tuned else (file, small)

        def beside(large: Settings) -> Settings:
            early = model.early * large.sequences
            return replace(small, n_ctx=large.n_ctx, sequences=large.sequences, early=early)

        def need(large: Path, candidates: Sequence[Settings]) -> list[Parts]:
            """What both models take."""
            drafts = needed(file, [beside(candidate) for candidate in candidates])
            pairs = zip(needed(large, candidates), drafts, strict=True)
            return [own | {"draft": sum(other.values())} for own, other in pairs]

        pair = plan_load(path, settings, model.sha256, free, need)
        small = beside(pair.settings)
        (parts,) = needed(file, [small])
        check_pair(path, file)
    except FileNotFoundError:
        return alone._replace(note=f"{draft.id} is not here to write drafts")
    except (ModelError, OSError) as error:
        return alone._replace(note=f"{draft.id} writes no drafts: {error}")
    tuned = tuned and tuned._replace(settings=small)
    pair = pair._replace(draft=LoadPlan(small, tuned, parts, ""))
    # Without known speeds it must not take anything from the model. A plan may be too large for the
    # memory: `fit` returns the smallest settings then.
    takes_nothing = (pair.settings, pair.tuned) == (alone.settings, alone.tuned)
    if pair.bytes > free or not (alone.seconds or takes_nothing):
        return alone._replace(note=f"{draft.id} has no room to write drafts")
    if not alone.seconds:
        return pair._replace(note=f"{draft.id} writes drafts")
    # Reading takes about as long as the weights are large.
    is_much_sooner = 2 * MUCH_LATER * parts["weights"] <= pair.parts["weights"]
    least = MIN_EARLY_GAIN if model.early and is_much_sooner else MIN_PAIR_GAIN
    return best_plan(alone, pair, draft.id, least)


MIN_PAIR_GAIN = 1.05  # of the rate; for less, a second model is not worth its memory
MIN_EARLY_GAIN = 0.8  # if the second model can answer while the first one reads


def best_plan(alone: LoadPlan, pair: LoadPlan, draft_id: str, least: float) -> LoadPlan:
    """A model with its draft model if that gains at least so many times the tokens a second times
    tokens of context, or else alone. Half a context is a fair price for twice the speed.
    """

    def worth(plan: LoadPlan) -> float:
        return plan.rate * plan.settings.n_ctx * plan.settings.sequences

    if worth(pair) > least * worth(alone):
        return pair._replace(
            note=f"{draft_id} writes drafts: expected {pair.words}; without it {alone.words}"
        )
    return alone._replace(
        note=f"{draft_id} writes no drafts: expected {alone.words}; with it {pair.words}"
    )
