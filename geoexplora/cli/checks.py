"""Checks of settings that depend on each other or on the model's sizes, all made before anything heavy. Torch-free.

Each check yields a `Finding` for each thing that is wrong and never raises, so that the user sees all of them at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from geoexplora.bands import SENSORS, Sensor, nearest, resolve_groups
from geoexplora.cli.command import Check, Finding
from geoexplora.cli.objective_checks import OBJECTIVE_CHECKS
from geoexplora.cli.processes import is_first_process
from geoexplora.errors import ConfigError
from geoexplora.registry import (
    DATASET_NAMES,
    FROM_SOURCE,
    MODELS,
    Architecture,
    find_dataset,
    look_up,
    resolve_blocks,
)
from geoexplora.weights.sources.addresses import exists as path_exists
from geoexplora.weights.sources.shortcuts import SHORTCUTS, looks_fetchable


def _found(problem: ConfigError, *keys: str, option: str = "") -> Finding:
    text = " ".join(str(problem).splitlines()[:1]) + ". " + " ".join(str(problem).splitlines()[1:])
    return Finding(keys, f"{option}: {text}".removeprefix(": "))


def _sensor(options: Any) -> Sensor | None:
    """The dataset's sensor, None where only the opened data tell it."""
    try:
        name = find_dataset(options.dataset or "").sensor
    except ConfigError:
        return None  # reported elsewhere
    return None if name is None else SENSORS[name]


def _architecture(options: Any) -> Architecture | None:
    return MODELS.get(options.model)


def dataset(options: Any) -> Iterator[Finding]:
    """The dataset is named, known, and its folder given."""
    if options.dataset is None:
        text = f"--dataset is missing. Name one of: {', '.join(DATASET_NAMES)}."
        yield Finding(("dataset",), text, "unready")
        return
    try:
        entry = find_dataset(options.dataset)
    except ConfigError as problem:
        yield _found(problem, "dataset", option="--dataset")
        return
    if entry.needs_root and options.root is None:
        text = f"--root is missing. Name the folder that holds {options.dataset}."
        yield Finding(("root",), text, "unready")


def ranges(options: Any) -> Iterator[Finding]:
    """Numbers of the data options lie where they can."""
    if options.years[0] > options.years[1]:
        yield Finding(("years",), f"--years: the first, {options.years[0]}, is after the last, {options.years[1]}.")
    if not 0 <= options.max_unreadable <= 1:
        text = f"--max-unreadable {options.max_unreadable:g} is no share. Give a number from 0 to 1."
        yield Finding(("max_unreadable",), text)


def bands(options: Any) -> Iterator[Finding]:
    """All bands exist and are named once."""
    sensor = _sensor(options)
    if sensor is None or options.bands is None:
        return
    known = []
    for name in options.bands:
        try:
            known.append(sensor.band(name).name)
        except ConfigError as problem:
            yield _found(problem, "bands", option="--bands")
    if len(known) == len(options.bands):
        try:
            sensor.select(known)
        except ConfigError as problem:
            yield _found(problem, "bands", option="--bands")


def groups(options: Any) -> Iterator[Finding]:
    """Channel groups part the input bands: each band in one group."""
    sensor = _sensor(options)
    if sensor is None or options.groups is None:
        return
    selected = options.bands or sensor.band_names
    if any(True for _ in bands(options)):
        return
    try:
        resolve_groups(options.groups, selected, sensor)
    except ConfigError as problem:
        yield _found(problem, "groups", "bands", option="--groups")


def model_input(options: Any) -> Iterator[Finding]:
    """Image, patch and crop fit each other."""
    if options.image_size < 1 or options.patch_size < 1:
        keys = ("image_size", "patch_size")
        yield Finding(keys, "--image-size and --patch-size must be at least 1 pixel.")
    elif options.image_size % options.patch_size:
        size, patch = options.image_size, options.patch_size
        near = sorted({max(size // patch, 1) * patch, (size // patch + 1) * patch})
        yield Finding(
            ("image_size", "patch_size"),
            f"--image-size {size} is not a multiple of --patch-size {patch}. Near it: {' or '.join(map(str, near))}.",
        )
    low, high = options.crop_scale
    if not 0 < low <= high <= 1:
        text = f"--crop-scale {low:g},{high:g}: expected two shares of the area, rising, above 0 and up to 1."
        yield Finding(("crop_scale",), text)


def model(options: Any) -> Iterator[Finding]:
    """The encoder is known."""
    if options.model == FROM_SOURCE:
        if options.init is None and not options.resume:
            yield Finding(("model", "init"), "--model source needs --init. Name the weights, or a model.")
        return
    try:
        look_up("model", options.model, dict.fromkeys((*MODELS, FROM_SOURCE)))
    except ConfigError as problem:
        yield _found(problem, "model", option="--model")


def start(options: Any) -> Iterator[Finding]:
    """The source weights suit the mode."""
    if options.mode == "scratch":
        if options.init is not None:
            yield Finding(
                ("init", "mode"),
                f"--mode scratch starts from random weights, but --init names {options.init}."
                " Leave out --init, or take --mode full to train all weights from there.",
            )
        return
    if options.init is None and options.resume:
        return  # said when it was started
    if options.init is None:
        yield Finding(
            ("init",),
            f"--mode {options.mode} without --init starts from random weights. Name source weights by --init"
            + (" for ExPLoRA as published." if options.mode == "explora" else ", or take --mode scratch."),
            "warning",
        )
    elif not options.resume:  # a checkpoint holds all weights
        yield from exists(options)


def exists(options: Any) -> Iterator[Finding]:
    """The file or folder of ``--init`` is there, or it is something that can be fetched."""
    for finding in positional_exists(options):
        yield replace(finding, text=f"--init {finding.text}")


def positional_exists(options: Any) -> Iterator[Finding]:
    """The same where it stands without its name."""
    if options.init is not None and not path_exists(Path(options.init)) and not looks_fetchable(options.init):
        near = nearest(options.init, SHORTCUTS)
        yield Finding(
            ("init",),
            f"{options.init}: no such file or run folder, and no known name of weights. {near}Check the path, or give"
            " an address (https://, hf://), a shortcut such as dinov2-vitl14, or TorchGeo's or timm's name.",
        )


def whole_blocks(options: Any) -> Iterator[Finding]:
    """Whole blocks exist."""
    architecture = _architecture(options)
    if architecture is None or options.mode != "explora":
        return
    for block in options.whole_blocks:
        try:
            resolve_blocks([block], architecture.depth)
        except ConfigError as problem:
            yield _found(problem, "whole_blocks", option="--whole-blocks")
            break
    else:
        try:
            resolve_blocks(options.whole_blocks, architecture.depth)
        except ConfigError as problem:
            yield _found(problem, "whole_blocks", option="--whole-blocks")


def rank(options: Any) -> Iterator[Finding]:
    """LoRA is of lower rank than what it adapts."""
    if options.mode != "explora":
        return
    architecture = _architecture(options)
    width = architecture.width if architecture else None
    limits = {"rank": (width, f"of {options.model}")}
    if options.objective == "mae":
        limits["decoder_rank"] = (options.decoder_width, "of the decoder")
    for name, (limit, what) in limits.items():
        value, flag = getattr(options, name), f"--{name.replace('_', '-')}"
        if value < 0:
            yield Finding((name,), f"{flag} {value} is negative. Give at least 1, or 0 for no LoRA.")
        elif limit is not None and value > limit:
            text = f"{flag} {value} is above the width {what}, {limit}. LoRA wants far less: 8 to 64 are usual."
            yield Finding((name,), text)
    if options.alpha is not None and not (math.isfinite(options.alpha) and options.alpha > 0):
        yield Finding(("alpha",), f"--alpha {options.alpha:g} must be above 0.")


def numbers(options: Any) -> Iterator[Finding]:
    """Counts and rates of the optimization are possible."""
    at_least = {
        "batch_size": 1, "devices": 1, "num_nodes": 1, "epochs": 1, "max_steps": 1, "effective_batch_size": 1,
        "num_workers": 0, "warmup_epochs": 0, "warmup_steps": 0, "weight_decay": 0, "min_lr": 0, "seed": 0,
        "log_every": 1, "checkpoint_every": 1, "probe_every": 0, "weight_decay_end": 0,
    }  # fmt: skip
    for name, low in at_least.items():
        value = getattr(options, name, None)
        if value is not None and not (value >= low and math.isfinite(value)):
            yield Finding((name,), f"--{name.replace('_', '-')} must be at least {low}, not {value:g}.")
    for name in ("lr", "whole_blocks_lr_scale", "layer_decay", "patch_embed_lr_scale", "clip_grad"):
        value = getattr(options, name, None)
        if value is not None and not (value > 0 and math.isfinite(value)):
            yield Finding((name,), f"--{name.replace('_', '-')} must be above 0, not {value:g}.")
    if not 0 <= getattr(options, "drop_path", 0.0) < 1:
        yield Finding(("drop_path",), f"--drop-path {options.drop_path:g} must be at least 0 and below 1.")


def effective_batch(options: Any) -> Iterator[Finding]:
    """Gradient accumulation comes out even."""
    at_once = options.batch_size * options.devices * options.num_nodes
    wanted = options.effective_batch_size
    if wanted is None or at_once < 1 or wanted < 1 or wanted % at_once == 0:
        return
    near = sorted({max(wanted // at_once, 1) * at_once, (wanted // at_once + 1) * at_once})
    yield Finding(
        ("effective_batch_size", "batch_size", "devices", "num_nodes"),
        f"--effective-batch-size {wanted} is not a multiple of {at_once}, which is --batch-size {options.batch_size}"
        f" x --devices {options.devices} x --num-nodes {options.num_nodes}. Near it: {' or '.join(map(str, near))}.",
    )


def length(options: Any) -> Iterator[Finding]:
    """Training has an end."""
    if options.epochs is None and options.max_steps is None:
        yield Finding(("epochs", "max_steps"), "neither --epochs nor --max-steps is set. Give one, or both.")


def output(options: Any) -> Iterator[Finding]:
    """There is a folder to write to."""
    if options.output is None:
        yield Finding(("output",), "--output is missing. Name the folder to write the run into.", "unready")
    elif Path(options.output).is_file():
        yield Finding(("output",), f"--output {options.output} is a file. Name a folder.")
    elif not options.resume and is_first_process():  # for the others, the first has made it
        from geoexplora.runs.folder import RunFolder

        if RunFolder(options.output).holds_run:
            text = (
                f"--output {options.output} already holds a run."
                " Go on with it by --resume, or name another folder with --output."
            )
            yield Finding(("output",), text, "unready")


SOURCE_CHECKS: dict[Check, tuple[str, ...]] = {
    dataset: ("dataset", "root"),
    ranges: ("years", "max_unreadable"),
    bands: ("dataset", "bands"),
}
"""Checks of the options that say which data to read."""

PRETRAIN_CHECKS: dict[Check, tuple[str, ...]] = (
    SOURCE_CHECKS
    | OBJECTIVE_CHECKS
    | {
        groups: ("dataset", "bands", "groups"),
        model_input: ("image_size", "patch_size", "crop_scale"),
        model: ("model", "init", "resume"),
        start: ("mode", "init", "resume"),
        whole_blocks: ("mode", "model", "whole_blocks"),
        rank: ("mode", "model", "objective", "rank", "decoder_rank", "decoder_width", "alpha"),
        numbers: (),
        effective_batch: ("batch_size", "devices", "num_nodes", "effective_batch_size"),
        length: ("epochs", "max_steps"),
        output: ("output", "resume"),
    }
)
"""Checks of pretrain."""
