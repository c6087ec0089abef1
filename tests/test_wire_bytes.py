"""The third layer against the kernel's own counters: what TCP_INFO adds up to is what the interface carried.

Two network namespaces joined by a line; on the device's interface there is nothing but one client of a broker. The
TUN device carries IP packets alone: no ARP, no Ethernet headers, no IPv6 of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.brokers import needs_mosquitto
from tools.broker import find_mosquitto
from tools.certificates import make_certificates
from tools.links import Line, Network, inside, missing

pytestmark = [pytest.mark.broker, needs_mosquitto]
PORT = 8883
CLEAN = Line(loss=0.0, delay_s=0.005, up_bits_per_s=10e6, down_bits_per_s=10e6)
LOSSY = Line(loss=0.05, delay_s=0.005, up_bits_per_s=10e6, down_bits_per_s=10e6)
SACK_BYTES = 36  # the most a segment carries in SACK blocks

CONFIG = """\
listener {port} 0.0.0.0
allow_anonymous true
user root
cafile {folder}/ca.pem
certfile {folder}/broker.pem
keyfile {folder}/broker.key
log_dest file {folder}/mosquitto.log
"""

# In the device's namespace: send and hear messages of several lengths, then show the counts and wait, still connected.
CLIENT = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from shared.config import BrokerConfig
from shared.mqtt import MqttTransport
from shared.transport import Connected, Delivered, Received
broker = BrokerConfig(sys.argv[1], int(sys.argv[2]), tls=True, ca_file=Path(sys.argv[3]))
transport = MqttTransport(broker, "device")
transport.start()
def wait(kind):
    while not isinstance(event := transport.poll(30.0), kind):
        assert event is not None, "nothing came in 30 s"
wait(Connected)
transport.subscribe("kseed/spring/change")
for number in range(20):
    transport.publish("kseed/spring/change", bytes(37 * number * number))
    wait(Delivered) if number == 7 else wait(Received)
sys.stdout.write("sent\\n")
sys.stdout.flush()
sys.stdin.readline()
print(json.dumps(asdict(transport.traffic())), flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def network(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Network]:
    """The line of `request.param`, and a broker with TLS in the hub."""
    if (reason := missing()) is not None:
        pytest.skip(reason)
    made = Network(1, request.param, seed=3)
    try:
        make_certificates(tmp_path, ["127.0.0.1", made.hub_address(0)])
        (tmp_path / "m.conf").write_text(CONFIG.format(port=PORT, folder=tmp_path))
        (log := tmp_path / "mosquitto.log").touch()
        broker = subprocess.Popen(inside(made.hub, [str(find_mosquitto()), "-c", str(tmp_path / "m.conf")]))
        try:
            until_s = time.monotonic() + 20.0
            while " running" not in log.read_text():
                assert time.monotonic() < until_s, "mosquitto does not start"
                time.sleep(0.05)  # between two looks
            yield made
        finally:
            broker.terminate()
            broker.wait()
    finally:
        made.close()


def counted(network: Network, folder: Path) -> tuple[dict[str, int], tuple[int, int]]:
    """What a client counted of itself, and what its interface carried, while both stand still."""
    command = [sys.executable, "-c", CLIENT, network.hub_address(0), str(PORT), str(folder / "ca.pem")]
    client = subprocess.Popen(
        inside(network.devices[0], command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert client.stdin is not None
    assert client.stdout is not None
    try:
        assert client.stdout.readline() == "sent\n"
        carried = still(network)
        client.stdin.write("\n")
        client.stdin.flush()
        traffic = json.loads(client.stdout.readline())
        assert network.device_bytes(0) == carried
        return traffic, carried
    finally:
        client.kill()
        client.wait()
        client.stdin.close()
        client.stdout.close()


def still(network: Network) -> tuple[int, int]:
    """The interface's counts, once the last acknowledgements and repetitions have gone over it."""
    carried, since_s = network.device_bytes(0), time.monotonic()
    while time.monotonic() - since_s < 3.0:
        time.sleep(0.1)
        if (now := network.device_bytes(0)) != carried:
            carried, since_s = now, time.monotonic()
    return carried


@pytest.mark.parametrize("network", [CLEAN], indirect=True)
def test_third_layer_is_what_the_interface_carried_to_the_byte(network: Network, tmp_path: Path) -> None:
    traffic, carried = counted(network, tmp_path)
    assert (traffic["ip_sent_bytes"], traffic["ip_received_bytes"]) == carried
    assert traffic["payload_sent_bytes"] == traffic["payload_received_bytes"] == sum(37 * n * n for n in range(20))


@pytest.mark.parametrize("network", [LOSSY], indirect=True)
def test_on_a_lossy_line_only_sack_blocks_are_missing(network: Network, tmp_path: Path) -> None:
    traffic, (sent, received) = counted(network, tmp_path)
    assert network.lost > 0
    print(
        f"sent {sent}, counted {traffic['ip_sent_bytes']}; received {received}, counted {traffic['ip_received_bytes']}"
    )
    for carried, known in ((sent, traffic["ip_sent_bytes"]), (received, traffic["ip_received_bytes"])):
        assert abs(carried - known) <= 0.02 * carried + SACK_BYTES
