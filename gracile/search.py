"""The search behind `optimize`: what was measured, tried and decided, all of it kept so that it can go on."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from gracile.check import copy_of
from gracile.compress import provenance_of, report_of, run_steps
from gracile.config import to_config
from gracile.context import Context, Progress, derive_seed
from gracile.data import Data
from gracile.errors import GracileError
from gracile.evaluate.quality import aggregate, compare
from gracile.goal import Goal, Latency
from gracile.graph import Trace, trace
from gracile.measure import Subject, measure
from gracile.planner import (
    Form,
    broken_limits,
    forms,
    goal_data,
    mixed_precision_pays,
    prune_steps,
    quantize_steps,
    recipe_for,
)
from gracile.recipe import Recipe
from gracile.report.model import Candidate, StepRecord
from gracile.result import Result
from gracile.run_directory import RunDirectory, fingerprint_data, fingerprint_model
from gracile.stopwatch import Stopwatch, median_ms
from gracile.surgery import Edit

#: A form must be this much faster than plain float to be tried: less is within what timing can tell.
WORTHWHILE = 0.97
#: The width is searched on this grid of shares removed, fine enough for a few per cent of latency.
WIDTH_STEPS = 32
#: Speed-ups tried one after another, relative to the fastest full-width form, where the goal names no latency.
LADDER = (1.25, 1.5, 2.0, 2.5, 3.0, 4.0)


@dataclass
class Tried:
    """A candidate and what came of it."""

    name: str
    form: Form
    recipe: Recipe | None
    fraction: float
    quality: float
    latency_ms: float
    file_bytes: int
    macs: int
    drop_bound: float
    met: bool
    reason: str

    def cost(self, objective: str) -> float:
        """What the goal makes small."""
        return {"latency": self.latency_ms, "bytes": float(self.file_bytes), "macs": float(self.macs)}[objective]


class Search:
    """One search: everything measured or decided is kept in the run directory before the next thing begins."""

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        goal: Goal,
        teacher: nn.Module | None,
        seed: int,
        folder: Path,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        self.model = copy_of(model).eval()
        self.data, self.goal, self.teacher, self.seed, self.folder = data, goal, teacher, seed, folder
        self.on_progress = on_progress
        self.started = time.monotonic()
        identity = {"model": fingerprint_model(model), "goal": to_config(goal), "seed": seed}
        self.run_directory = RunDirectory(folder, identity | {"data": fingerprint_data(data)})
        batch = next(iter(data.calibration_batches)) if data.has_calibration else next(iter(data.evaluation or ()))
        self.traced: Trace = trace(self.model, lambda net: data.forward(net, batch))
        self.forms = forms(goal)
        self.tried: list[Tried] = []
        self.mixed_precision = False
        self.stopwatch = Stopwatch(data, goal.batch_size)

    def run(self) -> Result:
        """The whole search."""
        profile = self.profile()
        best_form = min(self.forms, key=lambda f: profile["full"][f.label])
        narrow_form = min(self.forms, key=lambda f: profile["narrow"].get(f.label, float("inf")))
        self.mixed_precision = bool(profile["mixed_precision"])
        original_ms = profile["full"][self.forms[0].label]
        self.judge("original", self.forms[0], 0.0, original_ms)
        for form in sorted(self.forms[1:], key=lambda f: profile["full"][f.label]):
            if profile["full"][form.label] <= WORTHWHILE * original_ms or self.goal.objective == "bytes":
                self.judge(form.label, form, 0.0, original_ms)
        full = profile["full"]
        reason = self.narrow(narrow_form, full[narrow_form.label], full[best_form.label], original_ms)
        return self.conclude(reason, original_ms)

    def profile(self) -> dict[str, Any]:
        """Latency of every form at full width and with half the units, all interleaved; kept as a decision."""
        known = self.run_directory.decision("profile")
        if known is not None:
            return dict(known)
        self.tell("profile", 0, 3)
        narrow = self.narrowed(0.5)
        subjects = []
        for width, base in (("full", self.model), ("narrow", narrow)):
            if base is None:
                continue
            quantized: dict[str, nn.Module] = {}
            for form in self.forms:
                if form.scheme is not None and form.label not in quantized:
                    quantized[form.label] = self.quantized(base, form)
                subjects.append(Subject(f"{width} {form.label}", quantized.get(form.label, base), form.target))
        self.tell("profile", 1, 3)
        latencies = self.stopwatch.latencies_ms(subjects)
        profile: dict[str, Any] = {"full": {}, "narrow": {}}
        for label, value in latencies.items():
            width, _, form_label = label.partition(" ")
            profile[width][form_label] = value
        self.tell("profile", 2, 3)
        trains = self.data.train is not None and self.goal.epochs > 0
        profile["mixed_precision"] = trains and mixed_precision_pays(self.model, self.data)
        self.run_directory.decide("profile", profile)
        self.tell("profile", 3, 3)
        return profile

    def narrow(self, form: Form, form_ms: float, full_ms: float, original_ms: float) -> str:
        """Try narrower models until the goal's limits decide; returns the reason the search ended.

        form_ms: of the full-width model in this form. full_ms: in the form that is fastest at full width.
        """
        if not prune_steps(0.5, self.traced, self.data):
            return "nothing in this model can be cut; only number formats were tried"
        wanted = [b for b in self.goal.limits if isinstance(b, Latency)]
        if wanted:
            limit_ms = min(b.limit(original_ms) for b in wanted)
            if any(t.met for t in self.tried):
                return "the limits are met without removing units"
            fraction = self.width_for(form, 0.97 * limit_ms, form_ms, "limit")
            if fraction is None:
                return f"no width reaches {limit_ms:.3g} ms on {form.target.name}"
            self.judge("narrow", form, fraction, original_ms)
            return "the width that the latency limit asks for was tried"
        last_met, first_missed = 0.0, None
        for speedup in LADDER:
            if self.out_of_time():
                return "out of time"
            fraction = self.width_for(form, full_ms / speedup, form_ms, f"ladder-{speedup}")
            if fraction is None or fraction <= last_met:
                return f"no width is {speedup}× as fast"
            tried = self.judge(f"narrow {speedup}x", form, fraction, original_ms)
            if not tried.met:
                first_missed = fraction
                break
            last_met = fraction
        if first_missed is not None and first_missed - last_met > 2 / WIDTH_STEPS and not self.out_of_time():
            self.judge(
                "narrow between", form, round((last_met + first_missed) / 2 * WIDTH_STEPS) / WIDTH_STEPS, original_ms
            )
        return (
            "a narrower model would drop more than allowed"
            if first_missed
            else "the narrowest width of the ladder is met"
        )

    def width_for(self, form: Form, limit_ms: float, form_ms: float, name: str) -> float | None:
        """The smallest share of units to remove for this measured latency, by bisection; None where none reaches it.

        Every width is timed in turn with the full-width model, whose latency is taken to be form_ms: a machine that is
        slower for a minute slows both.
        """
        known = self.run_directory.decision(f"width-{name}")
        if known is not None:
            return known["fraction"]  # type: ignore[no-any-return]
        low, high = 0, WIDTH_STEPS  # high is out of reach until measured
        measured: dict[int, float] = {}
        while high - low > 1:
            middle = (low + high) // 2
            self.tell(f"width for {limit_ms:.3g} ms", len(measured), 5)
            base = self.narrowed(middle / WIDTH_STEPS)
            if base is None:
                break
            candidate = self.quantized(base, form) if form.scheme is not None else base
            measured[middle] = form_ms * self.relative_latency(candidate, form)
            if measured[middle] <= limit_ms:
                high = middle
            else:
                low = middle
        fraction = high / WIDTH_STEPS if high < WIDTH_STEPS else None
        self.run_directory.decide(f"width-{name}", {"fraction": fraction, "measured_ms": measured})
        return fraction

    def narrowed(self, fraction: float) -> nn.Module | None:
        """A copy with this share of units removed, uncorrected and untrained: for timing only."""
        net = copy.deepcopy(self.model)
        context = self.context(net)
        try:
            for step in prune_steps(fraction, self.traced, self.data):
                replace(step, correct=False, repair=None)(net, context)  # type: ignore[type-var]
        except GracileError:
            return None
        return net

    def quantized(self, base: nn.Module, form: Form) -> nn.Module:
        """A quantized copy, uncorrected: for timing only."""
        assert form.scheme is not None
        net = copy.deepcopy(base)
        for step in quantize_steps(form, self.traced, net, for_timing=True):
            step(net, self.context(net))
        return net

    def context(self, net: nn.Module) -> Context:
        return Context(data=self.data, original=self.model, teacher=self.teacher or self.model, seed=self.seed)

    def relative_latency(self, net: nn.Module, form: Form) -> float:
        """Median latency of a model in a form, as a multiple of the full-width model's; both timed in turn."""

        def reference() -> Subject:
            full = self.quantized(self.model, form) if form.scheme is not None else self.model
            return Subject("full width", full, form.target)

        return self.stopwatch.relative(Subject("candidate", net, form.target), form.label, reference)

    def judge(self, name: str, form: Form, fraction: float, original_ms: float) -> Tried:
        """Make a candidate, export it, and measure quality and cost on the target; kept as a decision."""
        recipe = recipe_for(fraction, form, self.traced, self.model, self.data, self.goal, self.mixed_precision)
        known = self.run_directory.decision(f"candidate-{name}")
        if known is None:
            self.tell(f"candidate {name}", 0, 1)
            net = self.candidate(name, recipe)
            known = self.verify(name, net, form, original_ms)
            self.run_directory.decide(f"candidate-{name}", known)
            self.tell(f"candidate {name}", 1, 1)
        tried = Tried(name=name, form=form, recipe=recipe, fraction=fraction, **known)
        self.tried.append(tried)
        return tried

    def candidate(self, name: str, recipe: Recipe | None) -> nn.Module:
        """The model after a recipe, from the run directory as far as it is there."""
        if recipe is None:
            return self.model
        return run_steps(
            self.model, recipe, self.data, teacher=self.teacher, target=self.goal.target,
            seed=derive_seed(self.seed, name), run_dir=self.folder / "candidates" / name.replace(" ", "-"),
            on_progress=self.on_progress,
        )[0]  # fmt: skip

    def verify(self, name: str, net: nn.Module, form: Form, original_ms: float) -> dict[str, Any]:
        """Quality and cost of a candidate beside the original's, and which limit it breaks."""
        goal, metric = self.goal, self.data.metric
        assert metric is not None
        subjects = [Subject("original", self.model, goal.target), Subject(name, net, form.target)]
        with tempfile.TemporaryDirectory() as folder:
            before, after = measure(subjects, self.data, Path(folder), batch_sizes=(goal.batch_size,), seed=self.seed)
        assert before.values is not None and after.values is not None
        comparison = compare(
            metric, before.values, after.values, max_drop=goal.max_drop, confidence=goal.confidence, seed=self.seed
        )
        broken = [] if comparison.non_inferior else [comparison.verdict]
        broken += broken_limits(goal, before.measurements[0], after.measurements[0])
        return {
            "quality": aggregate(metric, after.values),
            # Candidates are judged minutes apart; beside the original in each, they can be compared.
            "latency_ms": original_ms * median_ms(after) / median_ms(before),
            "file_bytes": int(after.measurements[0].file_bytes or 0),
            "macs": int(after.measurements[0].macs or 0),
            "drop_bound": comparison.upper_bound,
            "met": not broken,
            "reason": "; ".join(broken),
        }

    def conclude(self, reason: str, original_ms: float) -> Result:
        """The best candidate, measured beside the original with everything the report shows."""
        met = [t for t in self.tried if t.met]
        if met:
            best = min(met, key=lambda t: t.cost(self.goal.objective))
        else:
            best = min(self.tried, key=lambda t: t.drop_bound)
        net = self.model
        edits: list[Edit] = []
        records: list[StepRecord] = []
        if best.recipe is not None:
            net, edits, records, _ = run_steps(
                self.model, best.recipe, self.data, teacher=self.teacher, target=self.goal.target,
                seed=derive_seed(self.seed, best.name),
                run_dir=self.folder / "candidates" / best.name.replace(" ", "-"),
            )  # fmt: skip
        subjects = [Subject("original", self.model, self.goal.target), Subject("compressed", net, best.form.target)]
        others = [f for f in self.forms[1:] if f.scheme is None]
        subjects += [Subject(f"original ({f.label})", self.model, f.target) for f in others]
        sizes = (self.goal.batch_size, 1)
        found = measure(
            subjects,
            self.data,
            self.folder / "measured",
            batch_sizes=sizes,
            seed=self.seed,
            seconds=2.0 * len(subjects),
        )
        report = report_of(
            found[0], found[1], self.data, seed=self.seed, max_drop=self.goal.max_drop, confidence=self.goal.confidence
        )
        pace = median_ms(found[0]) / original_ms  # candidates were timed against the original of then
        report = replace(
            report,
            title=f"{type(self.model).__name__} on {self.goal.target.name}",
            before=report.before + tuple(m for other in found[2:] for m in other.measurements),
            steps=tuple(records),
            met=bool(met),
            reason=reason,
            goal=goal_data(self.goal, found[0].measurements[0]),
            candidates=tuple(
                Candidate(
                    label=t.name,
                    quality=t.quality,
                    latency_ms=pace * t.latency_ms,
                    file_bytes=t.file_bytes,
                    met=t.met,
                    reason=t.reason,
                )
                for t in self.tried
            ),
        )
        provenance = provenance_of(best.recipe, self.data, derive_seed(self.seed, best.name))
        exported = {best.form.target.name: found[1].path} if found[1].path is not None else {}
        return Result(net, report, bool(met), tuple(edits), provenance, exported)

    def out_of_time(self) -> bool:
        return self.goal.minutes is not None and time.monotonic() - self.started > 60 * self.goal.minutes

    def tell(self, phase: str, done: int, total: int) -> None:
        if self.on_progress is not None:
            self.on_progress(Progress(phase, done, total))
