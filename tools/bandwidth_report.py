"""What `kseed bandwidth` found, as values, text and CSV. Values in, values out; no I/O but the CSV file."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from edge_client.tally import RoundMetrics
from shared.manifest import Manifest, Tensor
from shared.transport import KindBytes

PAPER_BYTES = 18_000  # FedKSeed's stated payload of one client-round, both ways together
GOAL_BYTES = 2_048  # of a client-round, both ways, all layers
LORA_RANKS = (8, 16)
WEIGHT_BYTES = 2  # in 16 bit
_LORA_TARGETS = ("q_proj.weight", "v_proj.weight")
_PARTS = ("packets", "payload_bytes", "mqtt_bytes")


class Flow(msgspec.Struct, frozen=True):
    """Bytes per client-round, or of the join, up and down; None: this platform cannot tell."""

    up: float | None
    down: float | None

    @property
    def both(self) -> float | None:
        """Their sum."""
        return None if self.up is None or self.down is None else self.up + self.down


class Layers(msgspec.Struct, frozen=True):
    """The same traffic in layers that contain each other; `socket` is MQTT with TLS, each byte once."""

    payload: Flow
    mqtt: Flow
    socket: Flow
    ip: Flow


class KindFlow(msgspec.Struct, frozen=True):
    """One kind of packet, per client-round."""

    kind: str
    packets: Flow
    payload: Flow
    mqtt: Flow


class Other(msgspec.Struct, frozen=True):
    """What another way of tuning the same model sends in a round, payload alone."""

    what: str
    up: float | None
    down: float | None
    both: float


class BandwidthReport(msgspec.Struct, frozen=True, kw_only=True):
    """All that is shown; written beside the files as report.json."""

    broker: str
    protocol: str  # "MQTT over TLS" or "MQTT without TLS"
    link: str | None
    agents: int
    model: str
    compared_with: str  # whose shapes the other ways are computed from
    seeds: int
    local_steps: int
    numbers: str  # how scalars and changes are written
    rounds: int  # client-rounds that are averaged: all but each agent's first
    client_round: Layers
    least_bytes: float | None  # of one round, both ways, all layers
    most_bytes: float | None
    kinds: tuple[KindFlow, ...]
    joining: Layers  # connection, run, model state and the first round
    others: tuple[Other, ...]
    round_s: float  # from a round's opening to its closing, median
    steps_s: float  # of it, the device's local steps
    files: dict[str, str]


def layers_of(lines: Sequence[RoundMetrics]) -> Layers:
    """The mean over `lines`."""
    return Layers(*(_flow(lines, layer) for layer in ("payload", "mqtt", "socket", "ip")))


def _flow(lines: Sequence[RoundMetrics], layer: str) -> Flow:
    def mean(way: str) -> float | None:
        counts = [getattr(line, f"{layer}_{way}_bytes") for line in lines]
        return None if not counts or None in counts else sum(counts) / len(counts)

    return Flow(mean("sent"), mean("received"))


def kinds_of(lines: Sequence[RoundMetrics]) -> tuple[KindFlow, ...]:
    """The mean of each kind over `lines`, most bytes first."""
    sums: dict[str, KindBytes] = {}
    for line in lines:
        for kind, count in line.kinds.items():
            sums[kind] = sums.get(kind, KindBytes()) + count
    n = len(lines)
    flows = [
        KindFlow(
            kind,
            Flow(count.sent_packets / n, count.received_packets / n),
            Flow(count.sent_payload_bytes / n, count.received_payload_bytes / n),
            Flow(count.sent_mqtt_bytes / n, count.received_mqtt_bytes / n),
        )
        for kind, count in sums.items()
    ]
    return tuple(sorted(flows, key=lambda flow: -(flow.mqtt.both or 0.0)))


def other_ways(manifest: Manifest) -> tuple[Other, ...]:
    """What the paper, LoRA factors and the full model send in a round, for a model of these tensors.

    LoRA as in its paper (Hu et al., 2021): attention's q and v, factors of rank r, r * (in + out) numbers of 16 bit
    each, up and down. A model that names those two otherwise has no such line.
    """
    shapes = [tensor.shape for tensor in manifest.tensors if tensor.name.endswith(_LORA_TARGETS)]
    ways = [Other("FedKSeed as published (paper's figure)", None, None, PAPER_BYTES)]
    for rank in LORA_RANKS if shapes else ():
        each = float(WEIGHT_BYTES * sum(rank * sum(shape) for shape in shapes))
        ways.append(Other(f"LoRA factors, rank {rank}, q and v, 16 bit", each, each, 2 * each))
    whole = float(WEIGHT_BYTES * manifest.elements)
    return (*ways, Other("the full model, 16 bit", whole, whole, 2 * whole))


def smollm2_manifest() -> Manifest:
    """The tensors of SmolLM2-135M: what other ways would send, where the model measured with is a tiny one."""
    width, mid, layers, vocabulary, kv = 576, 1536, 30, 49152, 192
    shapes = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (kv, width),
        "self_attn.v_proj": (kv, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (mid, width),
        "mlp.up_proj": (mid, width),
        "mlp.down_proj": (width, mid),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }
    tensors = [Tensor("model.embed_tokens.weight", (vocabulary, width)), Tensor("model.norm.weight", (width,))]
    tensors += [
        Tensor(f"model.layers.{n}.{name}.weight", shape) for n in range(layers) for name, shape in shapes.items()
    ]
    return Manifest(tuple(tensors))


def report_text(report: BandwidthReport) -> str:
    """The table."""
    rows = [
        f"{report.model}, K = {report.seeds}, {report.local_steps} local steps, numbers {report.numbers}, "
        f"{report.protocol}, {report.broker}"
        + (f", link {report.link}" if report.link else "")
        + (f", {report.agents} agents" if report.agents > 1 else ""),
        "",
        f"{f'Bytes per client-round (mean of {report.rounds})':<44} {'up':>12} {'down':>12} {'sum':>13}",
        *_layer_rows(report.client_round),
        f"  {'goal, all layers':<42} {'':>12} {'':>12} {GOAL_BYTES:>13,}",
        "",
        f"{'By kind of packet (MQTT bytes; of it payload)':<44} {'up':>12} {'down':>12} {'packets':>13}",
        *(_kind_row(kind) for kind in report.kinds),
        "",
        f"{'Joining, with the first round':<44} {'up':>12} {'down':>12} {'sum':>13}",
        *_layer_rows(report.joining),
        "",
        f"{f'Other ways, payload alone, {report.compared_with}':<70} {'sum':>15}",
        *(_other_row(other, report.client_round) for other in report.others),
        "",
        f"Seconds per round: {report.round_s:.1f}, of which local steps {report.steps_s:.1f}",
        *(f"  {name:<10} {path}" for name, path in report.files.items()),
    ]
    return "\n".join(rows)


def _layer_rows(layers: Layers) -> Iterator[str]:
    names = {"payload": "payload", "mqtt": "MQTT", "socket": "with TLS (TCP payload)", "ip": "TCP/IP with TLS"}
    for name, title in names.items():
        flow: Flow = getattr(layers, name)
        if flow.up is None or flow.down is None:
            yield f"  {title:<42} unknown on this platform"
        else:
            yield f"  {title:<42} {flow.up:>12,.0f} {flow.down:>12,.0f} {flow.up + flow.down:>13,.0f}"


def _kind_row(kind: KindFlow) -> str:
    def cell(mqtt: float | None, payload: float | None) -> str:
        return f"{mqtt or 0.0:,.0f}" + (f" ({payload:,.0f})" if payload else "")

    up, down = cell(kind.mqtt.up, kind.payload.up), cell(kind.mqtt.down, kind.payload.down)
    return f"  {kind.kind:<42} {up:>12} {down:>12} {kind.packets.both or 0.0:>13,.1f}"


def _other_row(other: Other, ours: Layers) -> str:
    all_layers = ours.ip.both or ours.payload.both
    times = f"   {other.both / all_layers:,.0f} x" if all_layers else ""
    return f"  {other.what:<68} {other.both:>15,.0f}{times}"


def write_csv(path: Path, lines: Sequence[RoundMetrics]) -> None:
    """One row per round, layer or kind, and direction."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["round", "what", "direction", "packets", "payload_bytes", "mqtt_bytes", "tls_bytes", "ip_bytes"]
        )
        for line in lines:
            for way in ("sent", "received"):
                layers = [getattr(line, f"{layer}_{way}_bytes") for layer in ("payload", "mqtt", "socket", "ip")]
                writer.writerow([line.round, "all", way, "", *layers])
                for kind, count in line.kinds.items():
                    packets, payload, mqtt = (getattr(count, f"{way}_{part}") for part in _PARTS)
                    if packets or mqtt:
                        writer.writerow([line.round, kind, way, packets, payload, mqtt, "", ""])
