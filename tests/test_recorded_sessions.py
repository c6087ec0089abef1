"""The recorded conversations, played again: who speaks their version answers the same events with the same bytes."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from second_decoder import outcome
from second_maths import draw

import shared
from aggregator.service import Service
from aggregator.store import Store
from shared.refusals import Refusal
from shared.topics import parse_topic
from shared.transport import Connected, Received, TrafficCount
from shared.wire import PROTOCOL_VERSION, decode, encode
from tools.vectors_sessions import session_vectors
from tools.vectors_sessions_form import AgentSide, AggregatorSide, sent_by
from tools.vectors_sessions_record import AGGREGATOR, RUN, spec_of

FOLDER = Path(shared.__file__).parent / "vectors" / "sessions"
SESSIONS = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(FOLDER.glob("*.json"))}


def payload_of(session, entry):
    return bytes.fromhex(session["payloads_hex"][entry["payload"]]) if "payload" in entry else b""


def recorded(session, entry):
    return [
        (sent["topic"], bytes.fromhex(session["payloads_hex"][sent["payload"]]), sent["retain"])
        for sent in entry["sends"]
    ]


def replay(session):
    """The first event that is answered otherwise than recorded, as (event, recorded, found); None: there is none."""
    aggregator = AggregatorSide(spec_of(session["run_settings"]))
    agents = {device: AgentSide(RUN, device, number) for device, number in session["sessions"].items()}
    for entry in session["events"]:
        payload = payload_of(session, entry)
        if entry["to"] == AGGREGATOR:
            found = aggregator.tell(entry, payload)
        else:
            found = sent_by(agents[entry["to"]].tell(entry, payload))
        if found != recorded(session, entry):
            return entry, recorded(session, entry), found
    return None


@pytest.mark.parametrize("name", SESSIONS)
def test_both_sides_answer_a_recorded_conversation_with_the_same_bytes(name):
    assert replay(SESSIONS[name]) is None


@pytest.mark.parametrize("name", SESSIONS)
def test_a_conversation_with_one_byte_changed_is_noticed(name):
    session = copy.deepcopy(SESSIONS[name])
    number = max(sent["payload"] for entry in session["events"] for sent in entry["sends"])
    text = session["payloads_hex"][number]
    session["payloads_hex"][number] = text[:-1] + ("1" if text[-1] == "0" else "0")
    assert replay(session) is not None


def test_the_sessions_of_this_version_are_all_there():
    assert {name for name in SESSIONS if name.startswith(f"v{PROTOCOL_VERSION}-")} == {
        path.removesuffix(".json") for path in session_vectors()
    }


@pytest.mark.parametrize("name", SESSIONS)
def test_the_second_decoder_reads_everything_that_was_said(name):
    session, version = SESSIONS[name], int(name.split("-")[0][1:])
    read, context = 0, {"seeds": 256, "scalar_format": "f16"}
    context["change_format"] = session["run_settings"]["change_format"]
    for entry in session["events"]:
        for topic, payload, _ in recorded(session, entry):
            kind = parse_topic(topic).kind
            if version == 1:  # what the second decoder was written for
                found = outcome(kind, payload, context)
                assert "message" in found, (topic, found)
                if kind == "plan" and found["message"]["common_seeds"]:
                    plan = found["message"]
                    drawn = draw(bytes.fromhex(plan["nonce"]), None, plan["local_steps"], 256, None)[1]
                    context["known_seeds"] = sorted(set(drawn))
                read += 1
    assert read > 3 or version != 1


def receipts(session):
    """(device, code) of every receipt, in order."""
    said = [one for entry in session["events"] for one in recorded(session, entry)]
    return [
        (parse_topic(topic).device, Refusal(decode("receipt", payload).code).name)
        for topic, payload, _ in said
        if "/receipt/" in topic
    ]


def test_recorded_conversations_are_about_what_they_say():
    assert receipts(SESSIONS["v1-three-rounds"]) == [("ann", "ACCEPTED"), ("bob", "ACCEPTED")] * 3
    assert [device for device, _ in receipts(SESSIONS["v1-late-join"])] == ["ann", "bob", "ann", "cas"] + [
        "ann",
        "cas",
    ] * 2
    by_the_service = {"BUSY", "STORAGE"}
    told = {code for name in SESSIONS if name.startswith("v1-") for _, code in receipts(SESSIONS[name])}
    assert told == {code.name for code in Refusal} - by_the_service
    assert receipts(SESSIONS["v1-diverged"])[5:7] == [("cas", "ACCEPTED"), ("cas", "DIVERGED")]
    assert receipts(SESSIONS["v1-diverged"])[-1] == ("cas", "ACCEPTED")
    assert receipts(SESSIONS["v1-other-versions"]) == []
    assert receipts(SESSIONS["v1-stopped"]) == [("ann", "ACCEPTED")]


class Script:
    """A transport that says what was recorded and keeps what it is given; receipts without their detail."""

    def __init__(self):
        self.waiting, self.sent = [], []

    def start(self):
        pass

    def subscribe(self, topic_filter):
        pass

    def publish(self, topic, payload, *, retain=False):
        if "/receipt/" in topic:
            receipt = decode("receipt", payload)
            payload = encode(type(receipt)(receipt.round, receipt.code, ""))
        self.sent.append((topic, payload, retain))
        return len(self.sent)

    def poll(self, timeout_s):
        return self.waiting.pop(0) if self.waiting else None

    def traffic(self):
        return TrafficCount(0, 0, None, None)

    def close(self, timeout_s=5.0):
        pass


def timeless(entry, sent):
    """Without the plans that answer the operator, who is heard up to half a second later."""
    is_late = entry["event"] in ("pause", "resume")
    return [one for one in sent if not (is_late and one[0].endswith("/plan"))]


@pytest.mark.parametrize("name", [name for name in SESSIONS if name.startswith(f"v{PROTOCOL_VERSION}-")])
def test_the_real_aggregator_on_a_real_store_says_the_same(name, tmp_path):
    session = SESSIONS[name]
    transport, clock = Script(), {"now_ms": 0}
    with Store.open(tmp_path / "store.sqlite", may_create=True) as store:
        store.create(spec_of(session["run_settings"]), 0)
        service = Service(store, RUN, transport, lambda: clock["now_ms"], lambda text: None)
        service.start()
        for entry in session["events"]:
            if entry["to"] != AGGREGATOR:
                continue
            clock["now_ms"] = entry["now_ms"]
            if entry["event"] == "begin":
                transport.waiting.append(Connected("in-process", False))
            elif entry["event"] == "heard":
                payload = payload_of(session, entry)
                transport.waiting.append(Received(entry["topic"], payload, entry["retained"]))
            elif entry["event"] != "tick":
                store.command(RUN, entry["event"], entry.get("reason", ""), entry["now_ms"])
            transport.sent.clear()
            service.turn(0.0)
            while len(transport.sent) < len(entry["sends"]) and clock["now_ms"] < entry["now_ms"] + 1000:
                clock["now_ms"] += 100  # the operator's commands are looked for now and then
                service.turn(0.0)
            assert timeless(entry, transport.sent) == timeless(entry, recorded(session, entry))
