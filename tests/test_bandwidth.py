"""`kseed bandwidth`: its arithmetic, its table, and a small measurement between real processes."""

from __future__ import annotations

import csv
import shutil
import sys
from pathlib import Path

import pytest

from edge_client.tally import RoundMetrics
from shared.errors import UnavailableError, UserError
from shared.manifest import Manifest, Tensor
from shared.transport import KindBytes
from tests.brokers import needs_mosquitto
from tools.bandwidth import BandwidthSettings, measure_bandwidth
from tools.bandwidth_report import (
    BandwidthReport,
    Flow,
    kinds_of,
    layers_of,
    other_ways,
    report_text,
    smollm2_manifest,
    write_csv,
)
from tools.bench_wire import wire_rows
from tools.certificates import make_certificates


def a_line(number: int, scale: int, *, is_known: bool = True) -> RoundMetrics:
    """Bytes of a round, all multiples of `scale`."""
    return RoundMetrics(
        run="r",
        device="d",
        round=number,
        version=number,
        model_digest=None,
        receipt="accepted",
        steps=200,
        train_loss=1.0,
        held_out_loss=None,
        held_out_accuracy=None,
        rebuild_s=0.0,
        evaluate_s=0.0,
        steps_s=1.0,
        paused_s=0.0,
        payload_sent_bytes=scale,
        payload_received_bytes=2 * scale,
        socket_sent_bytes=5 * scale,
        socket_received_bytes=6 * scale,
        mqtt_sent_bytes=3 * scale,
        mqtt_received_bytes=4 * scale,
        ip_sent_bytes=7 * scale if is_known else None,
        ip_received_bytes=8 * scale if is_known else None,
        kinds={"update": KindBytes(1, scale, 3 * scale), "puback": KindBytes(0, 0, 0, 1, 0, 4)},
        ended_at_ms=0,
    )


def a_report(lines: list[RoundMetrics]) -> BandwidthReport:
    """Of `lines`, whose first is the join too."""
    return BandwidthReport(
        broker="a broker",
        protocol="MQTT over TLS",
        link=None,
        agents=1,
        model="a model",
        compared_with="for its shapes",
        seeds=4096,
        local_steps=200,
        numbers="f16",
        rounds=len(lines),
        client_round=layers_of(lines),
        least_bytes=None,
        most_bytes=None,
        kinds=kinds_of(lines),
        joining=layers_of(lines[:1]),
        others=(),
        round_s=1.0,
        steps_s=0.5,
        files={},
    )


def test_layers_are_means_over_rounds() -> None:
    layers = layers_of([a_line(1, 100), a_line(2, 300)])
    assert (layers.payload, layers.mqtt) == (Flow(200, 400), Flow(600, 800))
    assert (layers.socket, layers.ip) == (Flow(1000, 1200), Flow(1400, 1600))
    assert layers.ip.both == 3000


def test_a_layer_that_one_round_does_not_know_is_unknown() -> None:
    layers = layers_of([a_line(1, 100), a_line(2, 300, is_known=False)])
    assert layers.ip == Flow(None, None)
    assert layers.mqtt.both == 1400


def test_kinds_are_means_with_the_largest_first() -> None:
    update, puback = kinds_of([a_line(1, 100), a_line(2, 300)])
    assert (update.kind, update.mqtt, update.payload, update.packets) == (
        "update",
        Flow(600, 0),
        Flow(200, 0),
        Flow(1, 0),
    )
    assert (puback.kind, puback.mqtt) == ("puback", Flow(0, 4))


def test_other_ways_follow_from_the_shapes() -> None:
    tensors = (Tensor("a.q_proj.weight", (8, 4)), Tensor("a.v_proj.weight", (2, 4)), Tensor("a.k_proj.weight", (2, 4)))
    ways = {way.what: way for way in other_ways(Manifest(tensors))}
    assert ways["LoRA factors, rank 8, q and v, 16 bit"].up == 2 * 8 * (8 + 4 + 2 + 4)
    assert ways["LoRA factors, rank 16, q and v, 16 bit"].both == 2 * 2 * 16 * 18
    assert ways["the full model, 16 bit"].both == 2 * 2 * (32 + 8 + 8)
    assert len(other_ways(Manifest((Tensor("h.c_attn.weight", (8, 4)),)))) == 2  # neither q nor v by that name


def test_shapes_of_smollm2_add_up_to_its_size() -> None:
    assert smollm2_manifest().elements == 134_515_008


def test_csv_has_layers_and_kinds_of_every_round(tmp_path: Path) -> None:
    write_csv(tmp_path / "b.csv", [a_line(1, 100), a_line(2, 300)])
    with (tmp_path / "b.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["ip_bytes"] for row in rows if row["what"] == "all"] == ["700", "800", "2100", "2400"]
    assert [row["mqtt_bytes"] for row in rows if row["what"] == "update"] == ["300", "900"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ({"rounds": 1}, "--rounds is 1; give 2 or more"),
        ({"numbers": "f64"}, "--numbers is 'f64'; allowed are f32, f16, f8"),
        ({"agents": 4}, "--agents is 4; allowed are 1 to 3"),
        ({"link": "5g"}, "--link is '5g'; allowed are nb-iot, lte-m, 3g, satellite, wifi"),
        ({"link": "wifi", "tls": False}, "--link is measured with TLS alone"),
    ],
)
def test_impossible_settings_are_refused(tmp_path: Path, words: dict[str, object], text: str) -> None:
    with pytest.raises(UserError, match=text):
        BandwidthSettings(tmp_path, **words)  # type: ignore[arg-type]


def test_a_link_where_there_are_no_namespaces_says_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnavailableError, match="It needs Linux, root, iproute2, /dev/net/tun and mosquitto"):
        BandwidthSettings(tmp_path, link="wifi")


def test_certificates_without_openssl_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnavailableError, match="openssl is not installed; install it, or use --no-tls"):
        make_certificates(tmp_path, ["127.0.0.1"])


@pytest.mark.broker
@needs_mosquitto
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="TCP_INFO is Linux'")
@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_measurement_over_tls_gives_layers_that_contain_each_other(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    report = measure_bandwidth(
        BandwidthSettings(tmp_path / "out", rounds=3, local_steps=8, seeds=256), lambda line: None
    )
    layers = report.client_round
    sums = [flow.both or 0.0 for flow in (layers.payload, layers.mqtt, layers.socket, layers.ip)]
    assert 0 < sums[0] < sums[1] < sums[2] < sums[3] < 3000
    by_kind = {kind.kind: kind for kind in report.kinds}
    assert {"update", "receipt", "plan", "puback"} <= set(by_kind)
    assert sum(kind.mqtt.both or 0.0 for kind in report.kinds) == pytest.approx(sums[1])
    assert sum(kind.payload.both or 0.0 for kind in report.kinds) == pytest.approx(sums[0])
    assert (by_kind["update"].packets, by_kind["plan"].packets) == (Flow(1, 0), Flow(0, 1))
    assert "TCP/IP with TLS" in report_text(report)
    assert Path(report.files["plot"]).stat().st_size > 10_000
    assert (tmp_path / "out" / "report.json").is_file()


def test_benchmark_states_goal_and_baseline_and_leaves_out_what_is_unknown() -> None:
    rows = wire_rows(a_report([a_line(1, 100), a_line(2, 300)]))
    assert [row.median for row in rows] == [600, 1400, 2200, 3000, 1500]
    assert rows[0].baseline == "paper: 18000 of payload alone"
    assert (rows[3].goal, rows[3].baseline) == ("< 2048", "payload alone: 600")
    known = wire_rows(a_report([a_line(1, 100), a_line(2, 300, is_known=False)]))
    assert [row.median for row in known] == [600, 1400, 2200, 1500]
