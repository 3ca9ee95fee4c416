"""Writes the tables of README.md from the code, bench/results and docs/results.json: `python -m bench.readme`."""

import inspect
import json
import re
from pathlib import Path
from typing import Any

import fastmem
from bench import contender, learn, ops, sequences, variants
from bench.machine import ROOT

RESULTS = ROOT / "bench" / "results"
MODES = {"forward": "forward", "backward": "forward + backward", "in_place": "in place"}


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def op_table() -> str:
    """Each public op: the first sentence of its docstring, and the rooms that hold it."""
    rows = []
    for name in fastmem.ops.__all__:
        if name not in fastmem.backends():  # an in-place form, or a configuration
            continue
        sentence = (inspect.getdoc(getattr(fastmem, name)) or "").split(".\n")[0].replace("\n", " ").rstrip(".")
        rooms = (f"csrc/cpu/{name}.cpp", f"kernels/{name}.py", f"fastmem/reference/{name}.py")
        rows.append([f"`{name}`", sentence, *("yes" if (ROOT / room).is_file() else "-" for room in rooms)])
    return table(["op", "what it does", "C++", "Triton", "PyTorch"], rows)


def _ratios(row: dict[str, Any]) -> list[str]:
    ratios = ops.headline(row["contenders"])
    return [f"{ratios[name]['median']:.2f}x" if name in ratios else "-" for name in ops.HEADLINES]


def _op_row(row: dict[str, Any]) -> list[str]:
    ours = row["contenders"][ops.OURS]
    return [
        f"`{row['op']}`", row["case"], MODES[row["mode"]], f"{ours['ms']['median']:.3f}", *_ratios(row),
        f"{row['times_floor']['median']:.1f}", f"{ours['mib']:.1f}" if "mib" in ours else "-",
    ]  # fmt: skip


def cpu_section(results: dict[str, Any]) -> str:
    machine, versions = results["machine"], results["versions"]
    count = results["settings"]["threads"]
    recorded = {(row["op"], row["case"]) for row in results["ops"]["rows"] if row["inputs"] == "recorded"}
    shown = [
        row
        for row in results["ops"]["rows"]
        if not row["flush"] and (row["inputs"] == "recorded" or (row["op"], row["case"]) not in recorded)
    ]
    header = ["op", "case", "what", "ms", *ops.HEADLINES, "floors", "peak MiB"]
    model = results["model"]
    steps = [
        [
            name, f"{entry['ms']['median']:.2f}", f"{entry['ratio']['median']:.2f}x",
            f"{entry['mib']:.0f}" if "mib" in entry else "-",
        ]
        for name, entry in model["contenders"].items()
    ]  # fmt: skip
    shape = model["shape"]
    late = []
    if "long" in results:
        entries = results["long"]["contenders"].items()
        later = [f"{name} {entry['ratio']:.2f}x, {entry['subnormal_ratio']:.2f}x" for name, entry in entries]
        late.append(
            "A DNC's step, in times of the first hundred: after 1,000 steps, and on links that hold nothing but "
            f"subnormal numbers: {'; '.join(later)}."
        )
    ranges = []
    for mode, name in MODES.items():
        gains = [
            row["threads"]["1 thread"]["ratio"]["median"] for row in results["ops"]["scaling"] if row["mode"] == mode
        ]
        if gains:
            ranges.append(f"{name} {min(gains):.2f}x to {max(gains):.2f}x")
    return "\n\n".join([
        f"**{machine['processor']}**, {machine['instruction set']}, {count} thread{'s' if count > 1 else ''}, "
        f"torch {versions['torch']}, commit {(results['commit'] or 'unknown')[:10]}, float32. "
        "A ratio is the time of the rival over that of fastmem, median of paired rounds: above 1x fastmem is faster; "
        "eager is the fastest eager form that we found. Floors: our time over the least that this machine allows. "
        "Inputs are states of a trained DNC; `program_lookup`, `program_mix`, `cached_attention` and shared banks have "
        "random ones.",
        table(header, [_op_row(row) for row in shown]),
        f"Two threads against one, at batches of 8 and more: {', '.join(ranges) or 'not measured'}.",
        *late,
        f"A DNC on repeat copy, forward, backward and update; batch {shape['batch']}, {shape['num_slots']} slots of "
        f"{shape['word_size']}, {shape['num_read_heads']} read heads:",
        table(["contender", "ms per step", "relative", "peak MiB"], steps),
    ])  # fmt: skip


def gpu_section(results: dict[str, Any]) -> str:
    machine, versions = results["machine"], results["versions"]
    rows = []
    for row in results["rows"]:
        microseconds = f"{1e3 * row['contenders'][ops.OURS]['ms']['median']:.1f}"
        rows.append([f"`{row['op']}`", row["case"], MODES[row["mode"]], microseconds, *_ratios(row)])
    heading = (
        f"**{machine['gpu']}**, driver {machine['driver']}, torch {versions['torch']}, Triton {versions['triton']}, "
        f"commit {(results['commit'] or 'unknown')[:10]}, float32, random inputs."
    )
    return f"{heading}\n\n{table(['op', 'case', 'what', 'us', *ops.HEADLINES], rows)}"


def figures(folder: Path = RESULTS) -> str:
    """Only whole runs count: a run of one part has another name."""
    sections = []
    for path in sorted(folder.glob("*.json")):
        results = json.loads(path.read_text())
        if path.name.startswith("gpu-"):
            sections.append(gpu_section(results))
        elif {"verify", "ops", "model"} <= results.keys():
            sections.append(cpu_section(results))
    return "\n\n".join(sections) or "No results are committed yet."


def _peers_row(row: dict[str, Any], peaks: dict[str, float | None]) -> list[str]:
    contenders = row["contenders"]
    ways = [sequences.fastest(contenders, rival) for rival in contender.RIVALS]
    memory = [peaks.get(name) for name in (contender.OURS, contender.COMPILED)] if row["mode"] == "backward" else []
    return [
        row["shape"], MODES[row["mode"]], f"{contenders[contender.OURS]['ms']['median']:.3f}",
        f"{row['floor_ms']:.3f}", f"{row['times_floor']:.1f}",
        *("-" if way is None else f"{contenders[way]['ratio']['median']:.2f}x" for way in ways),
        ", ".join("?" if peak is None else f"{peak:.0f}" for peak in memory) or "-",
    ]  # fmt: skip


def peers_section(results: dict[str, Any]) -> str:
    machine, versions = results["machine"], results["versions"]
    header = ["shape", "what", "ms a step", "floor ms", "floors", *contender.RIVALS, "peak MiB, torch.compile's"]
    shapes = "; ".join(f"{name} is {sequences.Shape(**shape)}" for name, shape in results["shapes"].items())
    first, *_, last = results["length"]
    memory = "" if last["mib"] is None else f" and {last['mib']:.0f} MiB beyond inputs and outputs"
    gains = [
        f"{row['shape']} {MODES[row['mode']]} {row['threads']['1 thread']['ratio']['median']:.2f}x"
        for row in results.get("threads", ())
    ]
    return "\n\n".join([
        f"**{machine['processor']}**, {machine['instruction set']}, one core, torch {versions['torch']}, JAX "
        f"{versions['jax']}, commit {(results['commit'] or 'unknown')[:10]}, float32. {shapes}; inputs and outputs are "
        "16 wide. A ratio is the time of the rival over that of `fastmem.nn.DNC`, median of paired rounds; of a rival "
        "with and without `torch.set_flush_denormal(True)` the faster counts.",
        table(header, [_peers_row(row, row.get("mib", {})) for row in results["race"]]),
        f"Longer sequences, forward + backward: {first['ms']['median']:.2f} ms a step at {sequences.LONG}; "
        f"{last['ms']['median']:.2f} ms a step at T {last['steps']}{memory}, of which links and memories kept are "
        f"{last['kept_states_mib']:.0f} MiB.",
        f"Two threads against one: {', '.join(gains) or 'not measured'}.",
    ])  # fmt: skip


def peers(folder: Path = RESULTS) -> str:
    """Only whole runs count here too."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("peers-*.json"))]
    whole = [
        results
        for results in found
        if {"race", "length"} <= results.keys() and results["shapes"].keys() == sequences.SHAPES.keys()
    ]
    return "\n\n".join(map(peers_section, whole)) or "No results are committed yet."


def variants_section(results: dict[str, Any]) -> str:
    machine, versions = results["machine"], results["versions"]
    timed = [
        [
            row["schedule"],
            *(
                text
                for mode in variants.MODES
                for text in (f"{row[mode]['ms']['median']:.3f}", f"{row[mode]['of_the_memory']:.2f}")
            ),
            f"{row['memory_mib']:.1f}", f"{row['rest_mib']:.1f}",
        ]
        for row in results["schedules"]
    ]  # fmt: skip
    stored = [
        [row["network"], MODES[row["mode"]], *(f"{row['ms'][key]:.3f}" for key in (variants.LAYER, variants.LINEAR)),
         *(f"{row['ms'][key]:.3f} ({more:.1f})" for key, more in row["layers_more"].items())]
        for row in results["programs"]
    ]  # fmt: skip
    shapes = ", ".join(f"{name} {shape}" for name, (_, shape) in variants.NETWORKS.items())
    return "\n\n".join([
        f"**{machine['processor']}**, {machine['instruction set']}, one core, torch {versions['torch']}, commit "
        f"{(results['commit'] or 'unknown')[:10]}, float32, `fastmem.nn.DNC` at {results['shape']} with "
        "`write_schedule`: milliseconds a step, the memory's part of the time as a share of what it is with a write in "
        "every step, and what training keeps. Cached is `CachedUniformWriting`, which runs from write to write, a call "
        "of the op each.",
        table(["writes", "forward", "memory's part", "forward + backward", "memory's part", "MiB of the memory",
               "other MiB"], timed),
        f"Stored programs in place of the linear interface ({shapes}): milliseconds a step, and in brackets the time "
        "beyond that with the linear interface, in multiples of that layer's own. With P = 1 there is nothing to mix, "
        "and the lookup is all of it.",
        table(["network", "what", "layer alone", "linear interface", *(f"P = {count}" for count in variants.PROGRAMS)],
              stored),
    ])  # fmt: skip


def variants_found(folder: Path = RESULTS) -> str:
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("variants-*.json"))]
    return "\n\n".join(map(variants_section, found)) or "No results are committed yet."


def learned() -> str:
    if not learn.RESULTS.exists():
        return "No results are committed yet."
    header = ["task and network", "solved, seeds", "minutes a seed", "LSTM of equal parameters: solved"]
    results = json.loads(learn.RESULTS.read_text())
    found = [f"- {sentence}" for sentence in learn.findings(results)]
    told = ["", "Networks with a memory against each other:", "", *found] if found else []
    return "\n".join([table(header, learn.summary(results)), *told])


def regenerated(text: str) -> str:
    sections = (("ops", op_table()), ("figures", figures()), ("peers", peers()), ("variants", variants_found()),
                ("learned", learned()))  # fmt: skip
    for name, content in sections:
        pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"README.md: expected the markers <!-- {name}:begin --> and <!-- {name}:end -->")
        escaped = content.replace("\\", r"\\")
        text = pattern.sub(rf"\g<1>{escaped}\n\g<2>", text)
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(regenerated(readme.read_text()))
