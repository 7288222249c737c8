"""How metrics are shown: labels, units, and which direction is the better one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """How one metric is shown. `percent`: logged as a share of 1, shown in percentage points."""

    name: str
    label: str
    percent: bool = False
    # None: it describes, and neither direction is the better one
    higher_is_better: bool | None = True
    digits: int = 4
    # whether rows are compared by tests; what an arm costs stands beside its ratio to the reference instead
    tested: bool = True

    @property
    def scale(self) -> float:
        """Factor from the logged unit to the shown one."""
        return 100.0 if self.percent else 1.0

    @property
    def heading(self) -> str:
        """Label with its unit."""
        return f"{self.label} (%)" if self.percent else self.label


_LAST = {
    "top1": ("top-1", True, True),
    "top5": ("top-5", True, True),
    "ece": ("ECE", True, False),
    "nll": ("NLL", False, False),
    "loss": ("loss", False, False),
    "ce": ("CE", False, False),
}


# what an arm costs, by whole name
_COSTS = {
    "time/step_milliseconds": Metric("time/step_milliseconds", "ms a step", False, False, 1, False),
    "time/images_per_second": Metric("time/images_per_second", "images/s", False, True, 1, False),
    "time/data_wait_share": Metric("time/data_wait_share", "data wait", True, False, 1, False),
    "system/peak_megabytes": Metric("system/peak_megabytes", "peak MB", False, False, 0, False),
    "cost/student_parameters": Metric("cost/student_parameters", "student parameters", False, False, 0, False),
    "cost/parameters": Metric("cost/parameters", "trained parameters", False, False, 0, False),
    "cost/distillation_parameters": Metric("cost/distillation_parameters", "other parameters", False, False, 0, False),
}


# bias probes, by whole name; distances in sides of the image, agreement the better the closer to the teacher
_PROBES = {
    shown.name: shown
    for shown in (
        Metric("probe/attention_distance", "attention distance (sides)", False, None, 3),
        Metric("probe/attention_distance_first", "attention distance, first block (sides)", False, None, 3),
        Metric("probe/attention_distance_last", "attention distance, last block (sides)", False, None, 3),
        Metric("probe/attention_distance_teacher", "teacher's attention distance (sides)", False, None, 3, False),
        Metric("probe/cka", "CKA to teacher", False, True, 3),
        Metric("probe/attention_kl", "attention KL to teacher (nats)", False, False, 3),
        Metric("probe/relation_cosine", "relation cosine to teacher", False, True, 3),
        Metric("probe/shift_consistency", "shift consistency", True, True, 2),
        Metric("probe/sensitivity_low", "low-band sensitivity", False, None, 3),
        Metric("probe/sensitivity_mid", "mid-band sensitivity", False, None, 3),
        Metric("probe/sensitivity_high", "high-band sensitivity", False, None, 3),
        Metric("probe/overconfidence", "overconfidence", True, None, 2),
        Metric("probe/ece_scaled", "ECE after temperature scaling", True, False, 2),
    )
}


def metric(name: str) -> Metric:
    """The usual way to show a metric of that name: accuracies and ECE in percent, losses and costs lower-is-better."""
    for known in (_COSTS, _PROBES):
        if name in known:
            return known[name]
    where, _, last = name.rpartition("/")
    label, percent, higher = _LAST.get(last, (last, False, True))
    return Metric(name, f"{where} {label}".strip(), percent, higher, 2 if percent else 4)
