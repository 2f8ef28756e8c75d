"""The trainer's command of a run, from its config.json."""

import shlex

from .runs import Run

# Options that the trainer refuses without another one.
NEEDS = {
    "batch-schedule": ("batch-min batch-max batch-may-fall gns-scale gns-power gns-calibration gns-freeze".split()),
    "val-data": ["val-tokens"],
    "sample-every": ["sample-length", "prompt", "temperature", "top-k"],
}
# What follows from an option, and contradicts it if both are given.
FOLLOWS = {
    "max-steps": "max-tokens",
    "tokens-per-param": "max-tokens",
    "val-batches": "val-tokens",
    "beta2-half-life": "beta2",
}
INTERVALS = ("warmup", "val-every", "sample-every", "checkpoint-every")  # in tokens, which takes a unit
OFF_BY_DEFAULT = (
    "max-steps weight-decay warmup gns-all-every lr-coupling wd-coupling beta2-half-life sample-every checkpoint-every "
    "outlier-loss-z outlier-grad-z"
).split()
NO_OPTIONS = "model-shape parameters device git-revision build-flags resume dry-run eval-only".split()


def command(run: Run) -> str:
    """Without the options that are off, or that the trainer sets by itself."""
    config = run.config
    without = set(NO_OPTIONS) | {key for key in OFF_BY_DEFAULT if config.get(key) == 0}
    for key, dependent in NEEDS.items():
        on = config.get(key) == "gns" if key == "batch-schedule" else bool(config.get(key))
        without.update([] if on else dependent)
    if config.get("gns") == "off":
        without.update(("gns-tau", "gns-all-every"))
    if not config.get("val-data") and not config.get("hellaswag"):
        without.add("val-every")
    without |= {result for key, result in FOLLOWS.items() if config.get(key) not in (None, 0, "none")}
    words = ["./train_gptcu" if "nvcc" in str(config.get("build-flags")) else "./train_gpt"]
    for key, value in config.items():
        if key not in without and value is not None and value is not False and value not in ("none", "auto", "model"):
            unit = "tokens" if key in INTERVALS and value else ""
            words += [f"--{key}", f"{1 if value is True else value}{unit}"]
    return shlex.join(words)
