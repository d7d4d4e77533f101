"""What `lmm compile` found, in lines for a reader."""

WHERE = 90  # characters of an array's source, from its end


def report(result) -> str:
    """`compile.compile`'s result in lines."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in result["mesh"].items()) or "one device"
    lines = [
        f"{result['step']} on {result['topology']} (slices of {result['accelerator']} in Google Cloud): "
        f"{result['devices']} devices, {mesh}",
        _verdict(result),
        *_memory(result),
    ]
    if not result["fits"]:
        lines += _advice(result)
    if result["savings"]:
        lines += _savings(result["savings"])
    if result["collectives"]:
        lines += [*_traffic(result), *_roofline(result)]
    return "\n".join([*lines, f"compiled in {result['compile_seconds']:.0f} s"])


def size(count) -> str:
    """Bytes for a reader."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.2f} MiB"


def _verdict(result):
    peak, usable = result["peak_hbm_bytes"], result["hbm_bytes"]
    if result["fits"]:
        return f"fits: {size(peak)} of {size(usable)} a device at the peak"
    if peak is None:
        return f"does NOT fit into {size(usable)} a device; the compiler does not say what it would need"
    return f"does NOT fit: needs {size(peak)} a device, {size(peak - usable)} more than the {size(usable)} there are"


def _memory(result):
    parts = {name: n for name, n in result["memory"].items() if name != "largest" and n}
    lines = ["memory of a device: " + ", ".join(f"{name} {size(n)}" for name, n in parts.items())]
    lines += [f"  {size(n):>11}  {kind}  {source[-WHERE:]}" for n, kind, source in result["memory"]["largest"]]
    return lines


def _savings(rows):
    heads = ("of a device", "state", "gradients", "trainable", "checkpoint")
    table = [heads] + [
        (
            row["name"],
            size(row["state_bytes"]),
            size(row["gradient_bytes"]),
            f"{row['trainable']:,}",
            size(row["checkpoint_bytes"]),
        )
        for row in rows
    ]
    widths = [max(len(row[n]) for row in table) for n in range(len(heads))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]


def _traffic(result):
    lines = [f"{size(result['collective_bytes'])} a device through collectives (an all-reduce counts twice)"]
    for link, by_axes in result["collectives"].items():
        for axes, kinds in by_axes.items():
            words = ", ".join(f"{kind} {size(n)}" for kind, n in sorted(kinds.items(), key=lambda x: -x[1]))
            lines.append(f"  {link.upper()}, along {axes}: {words}")
    if result["minimum_bytes"]:
        ratio = result["parameter_bytes"] / result["minimum_bytes"]
        lines.append(
            f"  without those along tensor alone {size(result['parameter_bytes'])}, {ratio:.2f} times the minimum of "
            f"{size(result['minimum_bytes'])}"
        )
    return lines


def _roofline(result):
    found = result["roofline"]
    parts = ", ".join(f"{name} {seconds:.4g} s" for name, seconds in found["seconds"].items() if seconds)
    lines = [
        f"{result['flops'] / 1e12:,.4g} TFLOP a step, {result['executed_flops'] / 1e12:,.4g} with what runs twice",
        f"roofline: at least {found['step_seconds']:.4g} s a step, limited by {found['limits']}; MFU at most "
        f"{found['mfu']:.0%} ({parts}; each at its published rate, all beside each other)",
    ]
    if cycles := result["estimated_cycles"]:
        lines.append(f"{cycles / 1e6:,.1f} million cycles by the compiler, without collectives and kernels")
    return lines


def _advice(result):
    state, usable = result["state_bytes"], result["hbm_bytes"]
    if state > usable:
        return [f"parameters and optimizer alone are {size(state)}: more chips on mesh.fsdp or mesh.tensor"]
    if result["step"] != "train":
        return ["fewer prompts at a time, a shorter data.length, or more chips"]
    return [
        "what to change, least costly first: model.decoder.remat=full, then offload; more train.micro_batches, each "
        "of fewer packs; more chips on mesh.tensor or mesh.fsdp (a larger slice)"
    ]
