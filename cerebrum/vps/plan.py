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
from cerebrum.vps.memory import Need, Parts, fit_context, needed
from cerebrum.vps.schedule import MUCH_LATER, Costs
from cerebrum_common import Model

# A plan with a second model must be worth so many times the plan without it.
MIN_PAIR_GAIN = 1.05  # for less, it is not worth its memory
MIN_EARLY_GAIN = 0.8  # if it can answer while the first one reads: that is worth a loss


class LoadPlan(NamedTuple):
    """What to load of a model."""

    model_id: str
    path: Path  # the published file
    settings: Settings  # the given ones, with a context that fits into memory
    sha256: str = ""
    fim: Sequence[str] = ()
    layout: str = "psm"
    tuned: TunedFile | None = None
    reason: str = ""  # why the model runs untuned, "" if it does not
    parts: Parts = Parts()  # the memory that the model takes
    # Of a decode of each size in DECODES, by the file that is loaded; empty: unknown.
    seconds: Sequence[float] = ()
    draft: LoadPlan | None = None  # of the draft model
    note: str = ""  # what was decided about the draft model, "" if there was nothing to decide

    @property
    def kv_dir(self) -> Path:
        """Where its parked sequences are saved."""
        return self.settings.state_dir / "kv" / self.model_id

    @property
    def bytes(self) -> int:
        """The memory in all."""
        return sum(self.parts.values())

    @property
    def draft_share(self) -> float:
        """How large the draft model's weights are beside the model's; 0 without it."""
        return self.draft.parts["weights"] / self.parts["weights"] if self.draft else 0.0

    @property
    def rate(self) -> float:
        """The tokens a second to expect, if the draft model is as much faster as it is smaller."""
        if not self.draft:
            return 1 / self.seconds[0]
        costs = Costs(dict(zip(DECODES, self.seconds, strict=True)))
        return pair_rate(costs, self.seconds[0] * self.draft_share)

    @property
    def worth(self) -> float:
        """Tokens a second times tokens of context: half of one is a fair price for twice the
        other.
        """
        return self.rate * self.settings.n_ctx * self.settings.sequences

    @property
    def words(self) -> str:
        file = "tuned" if self.tuned else "published"
        return f"{self.rate:.1f} tokens a second by the {file} file in {self.settings.context}"


def plan_load(model: Model, folder: Path, settings: Settings, free: float, need: Need) -> LoadPlan:
    """What to load of a model into `free` bytes of memory. The tuned file is larger; it is used
    only if it fits with the context that the published file has. ModelError or OSError if the
    published file cannot be used.
    """
    path = folder / model.file
    fitted, parts = fit_context(path, settings, free, need)
    marks = model.fim, model.fim_layout
    plan = LoadPlan(model.id, path, fitted, model.sha256, *marks, parts=parts)
    tuned, reason = find_tuned(path, fitted, model.sha256)
    if not tuned:
        return plan._replace(reason=reason)
    try:
        (larger,) = need(tuned.path, [tuned.settings])
        faster = plan._replace(tuned=tuned, parts=larger, seconds=tuned.passport.here)
        if faster.bytes <= free:
            return faster
        reason = (
            f"its tuned file needs {faster.bytes / MB:.0f} MB, and "
            f"{free / MB:.0f} MB can be freed beside the reserve"
        )
    except (ModelError, OSError) as error:
        reason = f"its tuned file cannot be used: {error}"
    return plan._replace(reason=reason, seconds=tuned.passport.published)


def plan_pair(
    model: Model, draft: Model | None, folder: Path, settings: Settings, free: float
) -> LoadPlan:
    """What to load of a model and its draft model, whose files are in `folder`. ModelError or
    OSError if the model's published file cannot be used; its draft model is only left out.
    """
    alone = plan_load(model, folder, settings, free, needed)
    if not draft or not settings.draft:
        return alone
    try:
        pair = plan_both(model, draft, folder, settings, free)
    except FileNotFoundError:
        return alone._replace(note=f"{draft.id} is not here to write drafts")
    except (ModelError, OSError) as error:
        return alone._replace(note=f"{draft.id} writes no drafts: {error}")
    # Without known speeds it must not take anything from the model. A plan may be too large for the
    # memory: `fit_context` returns the smallest settings then.
    takes_nothing = pair.settings == alone.settings and pair.tuned == alone.tuned
    if pair.bytes > free or not (alone.seconds or takes_nothing):
        return alone._replace(note=f"{draft.id} has no room to write drafts")
    if not alone.seconds:
        return pair._replace(note=f"{draft.id} writes drafts")
    # Reading takes about as long as the weights are large. Where the model has little time and
    # reads the least part of a prompt, its draft model reads twice as much (`Decoder.choose`).
    is_much_sooner = 2 * MUCH_LATER * pair.draft_share <= 1
    min_gain = MIN_EARLY_GAIN if model.early and is_much_sooner else MIN_PAIR_GAIN
    if pair.worth > min_gain * alone.worth:
        note = f"{draft.id} writes drafts: expected {pair.words}; without it {alone.words}"
        return pair._replace(note=note)
    note = f"{draft.id} writes no drafts: expected {alone.words}; with it {pair.words}"
    return alone._replace(note=note)


def plan_both(
    model: Model, draft: Model, folder: Path, settings: Settings, free: float
) -> LoadPlan:
    """What to load of both. ModelError or OSError if they cannot be used together."""
    published = folder / draft.file
    plain = replace(settings, cache_mb=0, outputs=1)
    tuned, _ = find_tuned(published, plain, draft.sha256)
    path, own = (tuned.path, tuned.settings) if tuned else (published, plain)

    # `own`: the draft model's settings by itself. Beside the model, it has that one's context.

    def beside(large: Settings) -> Settings:
        """The draft model's settings. It answers in as many more sequences, if it may be early."""
        early = model.early * large.sequences
        return replace(own, n_ctx=large.n_ctx, sequences=large.sequences, early=early)

    def need(large: Path, candidates: Sequence[Settings]) -> list[Parts]:
        """What both models take."""
        drafts = needed(path, list(map(beside, candidates)))
        pairs = zip(needed(large, candidates), drafts, strict=True)
        return [parts | {"draft": sum(other.values())} for parts, other in pairs]

    pair = plan_load(model, folder, settings, free, need)
    check_pair(pair.path, path)
    small = beside(pair.settings)
    plan = LoadPlan(draft.id, published, small, draft.sha256)
    (parts,) = needed(path, [small])
    used = tuned and tuned._replace(settings=small)
    return pair._replace(draft=plan._replace(tuned=used, parts=parts))
