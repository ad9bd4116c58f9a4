"""The generated tables of README.md and docs/: `python -m tests.readme` writes them anew."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from lightning_offload.conf import schema

from lightning_offload.methods.full import FullSettings
from lightning_offload.methods.lsp import LSPSettings
from lightning_offload.methods.meft import MEFTSettings
from lightning_offload.methods.settings import CommonSettings, GradientSettings
from lightning_offload.methods.zo2 import ZO2Settings
from tests.features import FEATURES
from tests.features.registry import feature_rows, refusal_rows

README = Path(__file__).resolve().parents[1] / "README.md"
PAGES = (README, *sorted((README.parent / "docs").glob("*.md")))
"""The front page, and what it leads to."""

TREE = {
    "lightning_offload/numerics/adam.py": "AdamW, Adam, SGD: one step on given tensors, with torch's bits",
    "lightning_offload/numerics/row_adam.py": "AdamW on some rows of a table: exact and paid on touch, or SparseAdam's",
    "lightning_offload/numerics/projector.py": "sparse projectors: draw, compress, decompress, carry moments over",
    "lightning_offload/numerics/fitting.py": "what projectors miss of a gradient, and projectors that miss less",
    "lightning_offload/numerics/noise.py": "counter-based noise: any element on its own, the same bits everywhere",
    "lightning_offload/numerics/zeroth.py": "zeroth-order steps: perturbed copies and updates, tile by tile",
    "lightning_offload/numerics/noise_kernel.py": "the same on a GPU: a Triton kernel",
    "lightning_offload/numerics/mezo.py": "MeZO's own noise, in any order, and its arithmetic",
    "lightning_offload/numerics/adapter.py": "sparse adapters: routing, selection, forward, backward",
    "lightning_offload/numerics/native/kernels.cpp": "host loops in C++ that go through memory once",
    "lightning_offload/numerics/native/kernels.py": "the same as operators of torch's",
    "lightning_offload/numerics/native/build.py": "compiles them for this processor, and keeps what was compiled",
    "lightning_offload/numerics/native/proof.py": "compares them with torch before they are used",
    "lightning_offload/numerics/rounding.py": "stochastic rounding to bf16 and fp16",
    "lightning_offload/numerics/norms.py": "norms, the clip coefficient, masters that follow their weights",
    "lightning_offload/memory/blocks.py": "splits any model into units: repeated blocks, and the rest; ties",
    "lightning_offload/memory/hashing.py": "hashes of weights, on all cores",
    "lightning_offload/memory/arena.py": "host memory of exact size, page-locked in place, its true cost reported",
    "lightning_offload/memory/shards.py": "tensors of safetensors files by name, one at a time",
    "lightning_offload/memory/promises.py": "weights on the meta device that know where their values are",
    "lightning_offload/memory/slots.py": "device buffers that are used in turn",
    "lightning_offload/memory/lanes.py": "what runs after what: the protocol, and `InlineLanes`",
    "lightning_offload/memory/peers.py": "the other ranks, and all that is exchanged with them",
    "lightning_offload/memory/asynchronous.py": "lanes that run side by side: two copy streams and a host worker",
    "lightning_offload/memory/cuda.py": "CUDA streams and events behind them",
    "lightning_offload/memory/checked.py": "`CheckedLanes` and `ShuffledLanes`: missing dependencies, found on a CPU",
    "lightning_offload/memory/virtual.py": "`VirtualLanes`: a clock instead of work",
    "lightning_offload/memory/turns.py": "one function run several times at once, by threads that hand a baton on",
    "lightning_offload/memory/ambient.py": "what torch keeps per thread, set on another one",
    "lightning_offload/memory/allocator.py": "what torch's caching allocator would reserve",
    "lightning_offload/memory/ledger.py": "what moved when: bytes and seconds per lane, and every operation in a trace",
    "lightning_offload/memory/budget.py": "`Machine`: found, described by a hardware file, or capped",
    "lightning_offload/memory/host_limits.py": "host memory, cgroup, lockable memory, cores, NUMA nodes",
    "lightning_offload/memory/device_limits.py": "device memory, its link and node, and a cap on it",
    "lightning_offload/memory/rates.py": "`Rates`: how fast a machine is, given or measured",
    "lightning_offload/memory/calibrate.py": "measures those rates, in two seconds",
    "lightning_offload/memory/kept.py": "a JSON file in the user's cache folder",
    "lightning_offload/methods/base.py": "dtypes, trained parameters, what a step is decided by",
    "lightning_offload/methods/settings.py": "settings that methods share",
    "lightning_offload/methods/method.py": "what a method is: claims, settings, what steps them",
    "lightning_offload/methods/catalogue.py": "the methods by name, and those that others add",
    "lightning_offload/methods/engine.py": "hangs a method on a module and drives it through steps",
    "lightning_offload/methods/arrivals.py": "whose new weights compute waits for, and when",
    "lightning_offload/methods/muster.py": "gradients of several ranks meet, in one order",
    "lightning_offload/methods/marks.py": "which unit compute is working for, for the timeline",
    "lightning_offload/methods/uses.py": "what a forward does with the weights: order, ties, functional uses",
    "lightning_offload/methods/zo2.py": "the method zo2: its settings, what stays on the device",
    "lightning_offload/methods/zeroth.py": "its engine: forwards in lock-step, updates one step late",
    "lightning_offload/methods/perturbed.py": "its weights: moved along z in forwards, updated late",
    "lightning_offload/methods/streaming.py": "weights in host memory that visit the device, a unit at a time",
    "lightning_offload/methods/forwards.py": "the same for evaluation alone",
    "lightning_offload/methods/noises.py": "philox and MeZO noise, as the engine asks for them",
    "lightning_offload/methods/steplog.py": "the log of a zo2 run, and its file",
    "lightning_offload/methods/lockstep.py": "several forwards of one model that pass each unit together",
    "lightning_offload/methods/muting.py": "logging and metrics of the first of them alone",
    "lightning_offload/methods/randomness.py": "random states for each of them",
    "lightning_offload/methods/twin.py": "a module without memory: the same code on fake tensors",
    "lightning_offload/methods/meter.py": "FLOPs, bytes and live memory of what runs",
    "lightning_offload/methods/drivers.py": "what a dry run drives: an engine, or an optimizer alone",
    "lightning_offload/methods/dryrun.py": "one step of the real engine on a fake twin and virtual lanes",
    "lightning_offload/methods/zeroth_dryrun.py": "the same of zo2: forwards in lock-step, recorded and replayed",
    "lightning_offload/methods/priced_noise.py": "what noise and updates would take there",
    "lightning_offload/methods/sender.py": "what an engine asks of a part of which something leaves",
    "lightning_offload/methods/part.py": "something goes down in backward, the host steps with it",
    "lightning_offload/methods/ffn.py": "the feed-forward networks of any decoder, by structure",
    "lightning_offload/methods/sparse_adapter.py": "sparse adapters beside them: parameters, hooks",
    "lightning_offload/methods/meft.py": "wide sparse adapters: settings, placements",
    "lightning_offload/methods/row_tables.py": "rows of an adapter in host memory, and their step",
    "lightning_offload/methods/row_source.py": "chosen and brought up while the frozen network computes",
    "lightning_offload/methods/row_optimizer.py": "gradient rows add up on the host, which steps them",
    "lightning_offload/methods/row_forwards.py": "evaluation with rows in host memory",
    "lightning_offload/methods/padding.py": "which tokens of a forward are padding",
    "lightning_offload/methods/full.py": "method `full`: exact AdamW",
    "lightning_offload/methods/host.py": "gradients down, the step on the host, weights up",
    "lightning_offload/methods/lsp.py": "method `lsp`: settings, and which weights it projects",
    "lightning_offload/methods/dims.py": "the largest subspace that hides under backward",
    "lightning_offload/methods/projections.py": "projectors of a matrix: drawn, judged, fitted anew",
    "lightning_offload/methods/refits.py": "when projectors are replaced, and how moments follow",
    "lightning_offload/methods/subspace.py": "compressed gradients down, AdamW in the subspace, deltas up",
    "lightning_offload/methods/activations.py": "linear layers that hand over the factors of a gradient",
    "lightning_offload/methods/deliveries.py": "deltas on their way up through a few device slots",
    "lightning_offload/methods/deltas.py": "the same where the host makes what changes a weight, not the weight",
    "lightning_offload/methods/homes.py": "where one parameter lives on the host, and its step there",
    "lightning_offload/methods/resident.py": "small parameters, stepped on the device",
    "lightning_offload/methods/verdict.py": "norms, clip coefficient and finite check, without waiting",
    "lightning_offload/methods/rules.py": "which optimizers can be offloaded",
    "lightning_offload/materialising.py": "finds the values of weights on the meta device, in files or a checkpoint",
    "lightning_offload/buffers.py": "buffers on the meta device that no file has, made again",
    "lightning_offload/attaching.py": "an engine on a module that is about to be fitted",
    "lightning_offload/calibration.py": "batches apart, to whose gradients projectors are fitted",
    "lightning_offload/resuming.py": "checkpoints of an engine, of a plain Trainer, of another method",
    "lightning_offload/tables.py": "what is where: each unit, each place, by kind",
    "lightning_offload/savings.py": "what would save memory in a run that has run out of it, with the bytes",
    "lightning_offload/shortage.py": "out-of-memory errors, raised once more with both",
    "lightning_offload/words.py": "amounts as people read them",
    "lightning_offload/behaviour.py": "what every offload strategy does with Lightning's hooks",
    "lightning_offload/pl/": "the same for `pytorch_lightning`, compiled once more with its names",
    "lightning_offload/ranks.py": "the behaviour on several devices, a process each",
    "lightning_offload/resting.py": "strategies whose weights stay in host memory at rest",
    "lightning_offload/gradient_behaviour.py": "what those of the methods with gradients do beside",
    "lightning_offload/meft_behaviour.py": "what `meft` does beside",
    "lightning_offload/zeroth_attaching.py": "zo2's engine on a LightningModule, and its micro-batches",
    "lightning_offload/zeroth_attachment.py": "the same under a plain strategy",
    "lightning_offload/zeroth_behaviour.py": "what zo2's does: several forwards, no backward",
    "lightning_offload/parts.py": "a batch in parts, and how much each counts",
    "lightning_offload/strategies.py": "the strategies that a Trainer knows",
    "lightning_offload/windows.py": "who looks at weights or gradients in flight",
    "lightning_offload/precision.py": "`OffloadPrecision`: every dtype",
    "lightning_offload/mixins.py": "manual optimization with the same bits",
    "lightning_offload/method_mixins.py": "modules that bring their method along",
    "lightning_offload/replaying.py": "a zo2 run's weights from its log",
    "lightning_offload/attachment.py": "a mixin's own engine under a plain strategy",
    "lightning_offload/checkpoint.py": "streaming, atomic checkpoints",
    "lightning_offload/callbacks.py": "`OffloadStats`, `OffloadSummary`",
    "lightning_offload/progress.py": "progress: a bar on a terminal, plain lines in a file",
    "lightning_offload/tracing.py": "`OffloadTimeline`: a few steps traced, all of them against the plan",
    "lightning_offload/timeline.py": "what lanes did: `timeline.png`, a Perfetto trace, the table against the plan",
    "lightning_offload/own_method.py": "the strategy of a method of your own, in one line",
    "lightning_offload/registry.py": "makes the names known to Lightning",
    "lightning_offload/errors.py": "the few exceptions",
    "lightning_offload/planning/": "`plan()`: memory by place, time by lane, what to change; as text, JSON, picture",
    "lightning_offload/export.py": "a Hugging Face folder, checked by its logits",
    "lightning_offload/agreement.py": "whether what was written is the model: by logits, and value by value",
    "lightning_offload/stock.py": "the transformers model in a module, with and without adapters",
    "lightning_offload/lora.py": "LoRA as a folder that PEFT loads, and added to weights",
    "lightning_offload/adapters.py": "adapters as a folder in PEFT's form, and back onto a model",
    "lightning_offload/merging.py": "adapters made a part of the networks beside them, where exact",
    "lightning_offload/writing.py": "files that are written whole or not at all, and what is said where they cannot be",
    "lightning_offload/folders.py": "folders that are written whole or not at all",
    "lightning_offload/text/": "language models, data modules, the shipped model and its corpus",
    "lightning_offload/cli/": "`lightning-offload train | plan | evaluate | export | bench | doctor | compare`",
    "lightning_offload/doctor.py": "what was found on a machine, what will be used and why",
    "lightning_offload/runs.py": "where runs live, and which one is the last",
    "lightning_offload/plots.py": "`loss.png`",
    "lightning_offload/comparing.py": "finished runs side by side: a table, `loss.png`, `comparison.png`",
    "lightning_offload/bench/sections.py": "`lightning-offload bench`: what is measured, and what of it runs here",
    "lightning_offload/bench/arms.py": "who is measured: the methods, plain Lightning, the peers that are installed",
    "lightning_offload/bench/bounds.py": "the least a step can take, from counted work and measured rates",
    "lightning_offload/bench/host.py": "the host's share of a step, beside torch's kernel and the memory's rate",
    "lightning_offload/bench/noise.py": "what noise costs on the CPU, beside torch's own",
    "lightning_offload/bench/sizes.py": "device and host memory of each method, by the size of the model",
    "lightning_offload/bench/simulated.py": "planned steps on the machines of `conf/hardware`: schedule against bound",
    "lightning_offload/bench/simulated_zo2.py": "OPT models under zo2, planned, beside its authors' memory",
    "lightning_offload/bench/simulated_meft.py": "LLaMA-7B under meft, planned, beside adapters on the device",
    "lightning_offload/bench/prediction.py": "the plan beside measured steps: seconds, bytes, peaks",
    "lightning_offload/bench/training.py": "whole steps of models by shape: time, memory, lanes",
    "lightning_offload/bench/quality.py": "held-out loss at equal steps: rates tuned alike, seeds, the table",
    "lightning_offload/bench/quality_arms.py": "who trains the same weights: AdamW, the methods, LoRA and GaLore",
    "lightning_offload/bench/quality_runs.py": "one training of the shipped model, and a file that remembers each",
    "lightning_offload/bench/zeroth.py": "what zo2 learns at equal numbers of forwards",
    "lightning_offload/bench/recall.py": "how many facts are recalled after each method has shown them",
    "lightning_offload/bench/recall_arms.py": "who learns them: meft, the dense adapter, LoRA, all weights",
    "lightning_offload/bench/equal_loss.py": "time to equal loss: measured steps times planned seconds",
    "lightning_offload/bench/measure.py": "turns, medians, ratios",
    "lightning_offload/bench/report.py": "what was measured, as JSON and as Markdown",
    "conf/": "Hydra groups: model, data, method, optimizer, scheduler, precision, hardware, trainer, ...",
    "docs/": "what the front page leads to",
    "tests/": "mirrors the package",
    "tutorials/": "notebooks, executed by a test",
}
"""Every module of the package; `text/` in one line."""


def settings_rows(kind: type[CommonSettings], *, shared: bool) -> list[str]:
    """Name, default and meaning from the settings dataclass: what all methods share, or what only this one has."""
    names = {field.name for field in fields(GradientSettings)}
    chosen = [f.name for f in fields(kind) if (f.name in names) == shared]
    chosen.sort(key=lambda name: name != "accumulate")
    meanings: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        meanings |= _attributes(base)
    return [f"| `{name}` | `{getattr(kind(), name)!r}` | {meanings[name]} |" for name in chosen]


def tree_rows() -> list[str]:
    return [f"| `{path}` | {phrase} |" for path, phrase in TREE.items()]


def _attributes(kind: type) -> dict[str, str]:
    """The ``Attributes:`` section of a docstring, by name."""
    _, found_any, section = (kind.__doc__ or "").partition("Attributes:")
    if not found_any:
        return {}
    entries = re.split(r"\n        (?=\w+: )", "\n" + section.strip("\n"))
    found = {}
    for entry in entries:
        name, _, text = entry.strip().partition(": ")
        found[name] = re.sub(r"\s+", " ", text).replace("``", "`").replace("|", "\\|").rstrip(".")
    return found


def experiment_rows() -> list[str]:
    """Of each file the command on its first line, and what follows it."""
    rows = []
    for file in sorted((Path(schema.__file__).parent / "experiment").glob("*.yaml")):
        lines = [line.removeprefix("# ") for line in file.read_text().splitlines() if line.startswith("# ")]
        command, said = lines[1].removeprefix("lightning-offload "), " ".join(lines[2:])
        rows.append(f"| `{file.stem}` | `{command}`<br>{said} |")
    return rows


def tables() -> dict[str, list[str]]:
    """The rows of every generated table, by its marker."""
    return {
        "settings: generated": settings_rows(FullSettings, shared=True),
        "lsp settings: generated": settings_rows(LSPSettings, shared=False),
        "zo2 settings: generated": settings_rows(ZO2Settings, shared=False),
        "meft settings: generated": settings_rows(MEFTSettings, shared=False),
        "features: generated": feature_rows(FEATURES),
        "refusals: generated": refusal_rows(FEATURES),
        "tree: generated": tree_rows(),
        "experiments: generated": experiment_rows(),
    }


def render(text: str) -> str:
    """``text`` with the rows of each generated table in it written anew."""
    for marker, rows in tables().items():
        before, comment, after = text.partition(f"<!-- {marker}")
        if not comment:
            continue
        head, rule, rest = after.partition("|---|\n")
        _, blank, following = rest.partition("\n\n")
        text = before + comment + head + rule + "\n".join(rows) + (blank or "\n") + following
    return text


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(render(page.read_text()))
