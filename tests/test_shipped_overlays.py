"""The shipped overlays, run as the bus runs them: an envelope on stdin, or a service over HTTP."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import math
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

OVERLAYS = Path(__file__).parent.parent / "overlays"
PHASES = ["OPEN", "ALIGN", "ASCEND", "CLEAR", "SEAL"]
DEADLINE_S = 60


def run_raw(overlay: str, stdin: bytes, **env: str) -> subprocess.CompletedProcess[bytes]:
    folder = OVERLAYS / overlay
    program, *arguments = shlex.split(json.loads((folder / "manifest.json").read_bytes())["entrypoint"])
    assert program == "python3"
    return subprocess.run(
        [sys.executable, "-B", "-W", "error", *arguments],
        input=stdin,
        cwd=folder,
        env={"PATH": os.environ["PATH"], **env},
        capture_output=True,
        timeout=DEADLINE_S,
        check=False,
    )


def envelope(payload: Any, phase: str = "OPEN", **more: Any) -> bytes:
    whole = {
        "overlay": "any",
        "version": "0.1.0",
        "capability": "run",
        "phase": phase,
        "request_id": "018f0000-0000-7000-8000-000000000000",
        "run_id": "0" * 64,
        "timestamp_ms": 1_700_000_000_000,
        "payload": payload,
        "seed": None,
        "memory": {"profile": "MINIMAL", "soft_mb": 512, "hard_mb": 1024},
        **more,
    }
    return json.dumps(whole).encode()


def ask(overlay: str, payload: Any, phase: str = "OPEN", **more: Any) -> dict[str, Any]:
    done = run_raw(overlay, envelope(payload, phase, **more))
    assert (done.returncode, done.stderr) == (0, b"")
    reply: dict[str, Any] = json.loads(done.stdout)
    return reply


def analyse(text: str, **more: Any) -> dict[str, Any]:
    reply = ask("abraxas", {"prompt": text}, **more)
    assert reply["ok"] is True
    result: dict[str, Any] = reply["result"]
    return result


def terms(result: dict[str, Any]) -> list[str]:
    return [term["term"] for term in result["key_terms"]]


@pytest.mark.parametrize("overlay", ["abraxas", "abraxas_exec", "psyfi"])
def test_each_manifest_bears_the_name_of_its_folder(overlay: str) -> None:
    assert json.loads((OVERLAYS / overlay / "manifest.json").read_bytes())["name"] == overlay


# abraxas: the analysis

TEXT = "The cat sat. The dog's well-known bone, e.g. here, cost 3.14 euros! Really?\n\nA cat.\n"


def test_counts_agree_with_counting_by_hand() -> None:
    assert analyse(TEXT)["counts"] == {
        "characters": 84,
        "bytes": 84,
        "lines": 3,
        "paragraphs": 2,
        "sentences": 4,
        "words": 15,
    }


def test_word_and_sentence_statistics_agree_with_counting_by_hand() -> None:
    result = analyse(TEXT)
    assert result["words"] == {
        "distinct": 13,  # the, cat and eleven that occur once
        "once": 11,
        "type_token_ratio": 0.8667,
        "mean_letters": 3.8,  # 57 letters and digits
        "median_letters": 3.0,
        "longest": "well-known",
        "longest_letters": 9,
        "segmentation": "spaces",
    }
    assert result["sentences"] == {"mean_words": 3.75, "median_words": 2.5, "longest_words": 9}


def test_lix_and_rix_agree_with_their_formulas() -> None:
    # 8 words, 2 sentences, 3 words of more than 6 letters: LIX = 8/2 + 100 * 3/8, RIX = 3/2
    result = analyse("Readability formulas count. Sentences and such are short.")
    assert result["readability"] == {"long_words": 3, "lix": 41.5, "rix": 1.5}


def test_a_full_stop_before_a_small_letter_or_inside_a_word_ends_no_sentence() -> None:
    assert analyse("Use e.g. tea, approx. five bags of tea.com's best. Stir!")["counts"]["sentences"] == 2


def test_a_line_break_goes_on_with_a_sentence_and_a_blank_line_ends_it() -> None:
    assert analyse("one line\r\nand the next\r\n\r\na heading")["counts"] == {
        "characters": 35,
        "bytes": 35,
        "lines": 4,
        "paragraphs": 2,
        "sentences": 2,
        "words": 7,
    }


def test_empty_text_has_a_result() -> None:
    result = analyse("")
    assert set(result["counts"].values()) == {0}
    assert result["words"]["segmentation"] == "none"
    assert result["readability"] is None
    assert result["key_terms"] == result["scripts"] == []


def test_one_word_has_a_result() -> None:
    result = analyse("hello")
    assert result["counts"]["words"] == result["counts"]["sentences"] == 1
    assert result["readability"] == {"long_words": 0, "lix": 1.0, "rix": 0.0}
    assert result["key_terms"] == [{"term": "hello", "count": 1, "weight": 1.0}]


def test_text_without_spaces_is_taken_character_by_character() -> None:
    result = analyse("植物は光合成をする。光合成は酸素を作る。")
    assert result["words"]["segmentation"] == "characters"
    assert result["counts"]["words"] == 18
    assert result["counts"]["sentences"] == 2
    assert result["readability"] is None
    assert terms(result)[0] == "光合成"


def test_thai_marks_stay_with_their_letter() -> None:
    result = analyse("ที่นี่")
    assert result["counts"]["characters"] == 6
    assert result["counts"]["words"] == 2
    assert result["scripts"] == [{"script": "THAI", "letters": 2, "share": 1.0}]


def test_vowel_signs_and_accents_do_not_part_words() -> None:
    assert analyse("हिन्दी में")["counts"]["words"] == 2
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    result = analyse(f"{composed} {decomposed}")
    assert (result["words"]["distinct"], result["words"]["longest_letters"]) == (1, 4)
    assert result["unicode"]["nfc"] is False


def test_emoji_are_counted_as_they_are_seen() -> None:
    family, flag, thumb = "\U0001f469\u200d\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea", "\U0001f44d\U0001f3fd"
    result = analyse(f"{family} {flag}{flag} {thumb}")
    assert result["unicode"]["emoji"] == 4
    assert result["counts"]["words"] == 0


def test_scripts_are_listed_by_their_share_of_the_letters() -> None:
    assert analyse("abcdef \u0430\u0431\u0432 1")["scripts"] == [
        {"script": "LATIN", "letters": 6, "share": 0.6667},
        {"script": "CYRILLIC", "letters": 3, "share": 0.3333},
    ]


ENGLISH = """The scheduler admits a call when its memory reservation fits. A memory reservation is made before the call
starts, and the scheduler waits when there is no room. Under stress, the scheduler asks overlays to save memory; an
overlay that saves is kept, and the one that does not is stopped by the scheduler. A memory reservation ends with its
call."""
GERMAN = """Die Photosynthese ist ein Prozess, bei dem Pflanzen, Algen und manche Bakterien aus Licht Energie gewinnen.
Die Pflanzen nehmen dabei Wasser aus dem Boden und Kohlendioxid aus der Luft auf. Daraus entstehen Glukose und
Sauerstoff. Der Sauerstoff wird an die Luft abgegeben, und die Glukose dient den Pflanzen als Nahrung. Ohne die
Photosynthese gäbe es auf der Erde kaum Sauerstoff, und die meisten Lebewesen könnten nicht leben. Die Lichtreaktion der
Photosynthese findet an den Membranen statt, und die Dunkelreaktion der Photosynthese braucht kein Licht."""


def test_key_terms_are_content_words_without_a_list_of_stop_words() -> None:
    assert {"scheduler", "memory reservation"} <= set(terms(analyse(ENGLISH))[:4])
    assert set(terms(analyse(GERMAN))[:3]) == {"photosynthese", "pflanzen", "sauerstoff"}


def test_key_terms_come_in_the_order_of_their_weight() -> None:
    weights = [term["weight"] for term in analyse(ENGLISH)["key_terms"]]
    assert weights == sorted(weights, reverse=True)
    assert weights[0] == 1.0
    assert len(weights) == 10


def test_intent_comes_back_and_text_stands_in_for_prompt() -> None:
    reply = ask("abraxas", {"text": "hello", "intent": "test"})
    assert reply["result"]["intent"] == "test"
    assert reply["result"]["counts"]["words"] == 1


@pytest.mark.parametrize("phase", PHASES)
def test_the_analysis_is_the_same_in_every_phase(phase: str) -> None:
    assert analyse(ENGLISH, phase=phase) == analyse(ENGLISH)


def test_a_context_limit_cuts_before_the_first_word_beyond_it() -> None:
    result = analyse("One two. Three four.", memory={"max_context_tokens": 2})
    assert result["truncated"] is True
    assert result["counts"]["words"] == 2
    assert result["counts"]["characters"] == len("One two. ")
    assert result["limit"] == {"max_context_tokens": 2, "characters_left_out": len("Three four.")}


def test_a_context_limit_that_is_not_reached_changes_nothing() -> None:
    assert analyse("One two.", memory={"max_context_tokens": 2}) == analyse("One two.")


def test_disabled_features_leave_their_section_out_and_say_so() -> None:
    whole, saved = analyse(ENGLISH), analyse(ENGLISH, memory={"disabled_features": ["HIGH_COST_METRICS", "OTHER"]})
    assert saved["left_out"] == ["key_terms"]
    assert whole.keys() - saved.keys() == {"key_terms"}


def test_a_megabyte_is_analysed_whole() -> None:
    text = (ENGLISH + "\n\n") * 3000
    result = analyse(text)
    assert result["counts"]["characters"] == len(text) > 900_000
    assert result["counts"]["words"] == 3000 * analyse(ENGLISH)["counts"]["words"]
    assert result["truncated"] is False


def test_hostile_megabytes_take_no_more_than_linear_time() -> None:
    # Each would take minutes if a pattern looked at the row of full stops anew from every one of its characters.
    for text in ("." * 999_999 + "a", "a" + ".)" * 500_000 + "b", "\n " * 500_000 + "a", "a'" * 500_000):
        assert analyse(text)["counts"]["characters"] == len(text)


def test_a_long_unbroken_text_does_not_come_back_whole() -> None:
    result = analyse("a" * 100_000)
    assert result["words"]["longest"] == "a" * 64
    assert result["words"]["longest_letters"] == 100_000
    assert result["key_terms"] == []


@pytest.mark.parametrize(
    "payload", [{"prompt": ENGLISH + GERMAN + "光合成と光合成"}, {"op": "echo", "b": {"z": 1, "a": 2}}]
)
def test_the_same_envelope_gives_the_same_bytes_whatever_the_hash_seed(payload: dict[str, Any]) -> None:
    replies = {run_raw("abraxas", envelope(payload), PYTHONHASHSEED=seed).stdout for seed in ("0", "1", "42")}
    assert len(replies) == 1


# abraxas: ops


def test_hash_is_the_digest_of_the_text_in_utf_8() -> None:
    reply = ask("abraxas", {"op": "hash", "text": "héllo"})
    digest = hashlib.sha256("héllo".encode()).hexdigest()
    assert reply["result"] == {"op": "hash", "algorithm": "sha256", "bytes": 6, "digest": digest}


def test_hash_of_data_is_that_of_its_compact_json() -> None:
    reply = ask("abraxas", {"op": "hash", "algorithm": "sha512", "data": {"b": [1, None], "a": "ü"}})
    assert reply["result"]["digest"] == hashlib.sha512('{"a":"ü","b":[1,null]}'.encode()).hexdigest()


@pytest.mark.parametrize("overlay", ["abraxas", "abraxas_exec"])
def test_compact_text_folds_white_space_and_keeps_paragraphs(overlay: str) -> None:
    text = "  one\t two\nthree \n \n\n  four\u3000five \n"
    reply = ask(overlay, {"op": "compact_text", "text": text}, "CLEAR")
    result = reply["result"].get("output", reply["result"])
    assert result["text"] == "one two three\n\nfour five"
    if overlay == "abraxas":
        assert (result["characters_before"], result["characters_after"]) == (len(text), 24)


@pytest.mark.parametrize("phase", PHASES)
def test_echo_gives_the_payload_back_in_every_phase(phase: str) -> None:
    payload = {"op": "echo", "deep": [{"ü": None}, 1.5, "\U0001f469"]}
    assert ask("abraxas", payload, phase)["result"] == {"op": "echo", "payload": payload}


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        ({}, "no text"),
        ({"prompt": 5}, "prompt must be a string"),
        ({"op": "delete"}, "known: hash, echo, compact_text"),
        ({"op": ["hash"]}, "known: hash"),
        ({"op": "hash"}, "no text"),
        ({"op": "hash", "text": "a", "algorithm": "crc32"}, "sha256"),
        ({"op": "hash", "text": "a", "algorithm": {}}, "sha256"),
        ({"op": "compact_text", "text": ["a"]}, "text must be a string"),
        ({"prompt": "\ud800"}, "surrogate"),
        ({"op": "echo", "x": "\ud800"}, "surrogate"),
    ],
)
def test_a_bad_payload_is_answered_with_a_sentence(payload: dict[str, Any], words: str) -> None:
    reply = ask("abraxas", payload)
    assert reply["ok"] is False
    assert reply["code"] == "BAD_INPUT"
    assert words in reply["error"]


@pytest.mark.parametrize(
    "memory", [{"max_context_tokens": -1}, {"max_context_tokens": "9"}, {"disabled_features": "X"}]
)
def test_a_bad_memory_block_is_answered_with_its_name(memory: dict[str, Any]) -> None:
    reply = ask("abraxas", {"prompt": "a"}, memory=memory)
    assert reply["code"] == "BAD_INPUT"
    assert f"memory.{next(iter(memory))}" in reply["error"]


@pytest.mark.parametrize("overlay", ["abraxas", "abraxas_exec"])
@pytest.mark.parametrize(
    "stdin",
    [b"", b"hello", b"\xff", b"[]", b'{"phase":"OPEN"}', b'{"phase":"REST","payload":{}}', b'{"phase":[],"payload":{}}',
     b'{"phase":"OPEN","payload":{"a":NaN}}', b"[" * 100_000],
    ids=["empty", "text", "not-utf8", "array", "no-payload", "phase", "phase-list", "nan", "deep"],
)  # fmt: skip
def test_a_malformed_envelope_is_exit_2_with_a_reply(overlay: str, stdin: bytes) -> None:
    done = run_raw(overlay, stdin)
    reply = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (2, b"")
    assert (reply["ok"], reply["code"]) == (False, "BAD_ENVELOPE")


# abraxas_exec


@pytest.mark.parametrize("key", ["op", "operation"])
def test_ascend_performs_the_operation(key: str) -> None:
    reply = ask("abraxas_exec", {key: "hash", "text": "abc"}, "ASCEND")
    assert reply["result"] == {
        "status": "ascended",
        "operation": "hash",
        "output": {"algorithm": "sha256", "bytes": 3, "digest": hashlib.sha256(b"abc").hexdigest()},
        "exec_performed": True,
    }


def test_word_count_is_what_wc_says() -> None:
    output = ask("abraxas_exec", {"op": "word_count", "text": "one two\nthrée\n"}, "ASCEND")["result"]["output"]
    assert output == {"program": ["wc", "-l", "-w", "-c"], "lines": 2, "words": 3, "bytes": 15}


def test_word_count_without_wc_says_so(tmp_path: Path) -> None:
    done = run_raw("abraxas_exec", envelope({"op": "word_count", "text": "a"}, "ASCEND"), PATH=str(tmp_path))
    reply = json.loads(done.stdout)
    assert (done.returncode, reply["ok"], reply["code"]) == (0, False, "PROGRAM_FAILED")
    assert "wc" in reply["error"]


def test_clear_only_reads_and_starts_no_program(tmp_path: Path) -> None:
    done = run_raw("abraxas_exec", envelope({"op": "word_count", "text": "a"}, "CLEAR"), PATH=str(tmp_path))
    assert json.loads(done.stdout)["result"] == {
        "status": "clear",
        "readonly": True,
        "operation": "word_count",
        "output": None,
        "exec_performed": False,
    }
    assert ask("abraxas_exec", {"op": "hash", "text": "abc"}, "CLEAR")["result"]["output"]["bytes"] == 3


@pytest.mark.parametrize("phase", ["OPEN", "ALIGN", "SEAL"])
def test_other_phases_sum_the_payload_up_and_perform_nothing(phase: str) -> None:
    result = ask("abraxas_exec", {"op": "hash", "text": "one two"}, phase)["result"]
    assert result["text"] == {"characters": 7, "words": 2}
    assert result["exec_performed"] is False
    assert "output" not in result


@pytest.mark.parametrize("payload", [{}, {"op": "rm"}, {"op": 1}, {"op": "hash"}, {"op": "hash", "text": "\ud800"}])
def test_ascend_with_a_bad_payload_is_answered_with_a_code(payload: dict[str, Any]) -> None:
    assert ask("abraxas_exec", payload, "ASCEND")["code"] == "BAD_INPUT"


# psyfi


@dataclass
class Service:
    """A running psyfi and one kept connection to it."""

    process: subprocess.Popen[str]
    connection: http.client.HTTPConnection

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, Any]]:
        raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        self.connection.request(method, path, raw, headers)
        response = self.connection.getresponse()
        return response.status, json.loads(response.read())

    def simulate(self, parameters: dict[str, Any], **more: Any) -> dict[str, Any]:
        payload = {"simulation_type": "quantum_coherence", "parameters": parameters}
        status, reply = self.call("POST", "/run", json.loads(envelope(payload, **more)))
        assert (status, reply["ok"]) == (200, True)
        result: dict[str, Any] = reply["result"]
        return result


def start_service(*arguments: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-B", "-W", "error", str(OVERLAYS / "psyfi" / "service.py"), *arguments],
        env={"PATH": os.environ["PATH"], **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def stop_service(process: subprocess.Popen[str], by: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
    process.send_signal(by)
    _, errors = process.communicate(timeout=DEADLINE_S)
    return process.returncode, errors


def address_of(process: subprocess.Popen[str]) -> tuple[str, int]:
    assert process.stdout is not None
    url = urlsplit(process.stdout.readline().split()[-1])
    assert url.hostname
    assert url.port
    return url.hostname, url.port


@pytest.fixture(scope="module")
def psyfi() -> Iterator[Service]:
    process = start_service("--port", "0")
    connection = http.client.HTTPConnection(*address_of(process), timeout=DEADLINE_S)
    yield Service(process, connection)
    connection.close()
    assert stop_service(process) == (0, "")


def test_health_answers_with_the_version_of_the_manifest(psyfi: Service) -> None:
    manifest = json.loads((OVERLAYS / "psyfi" / "manifest.json").read_bytes())
    status, reply = psyfi.call("GET", "/health?probe=1")
    assert (status, reply["ok"], reply["result"]["status"]) == (200, True, "ok")
    assert reply["result"]["version"] == manifest["version"]


def test_without_spread_the_curve_is_the_exponential_of_t2(psyfi: Service) -> None:
    result = psyfi.simulate({"duration": 100, "t1": 100, "t_phi": 40, "spread": 0})
    t2 = 1 / (1 / 200 + 1 / 40)
    assert result["t2"] == pytest.approx(t2, rel=1e-5)
    assert result["t2_estimate"] == pytest.approx(t2, rel=1e-4)
    assert result["t2_star"] == pytest.approx(t2, rel=1e-4)
    for t, coherence in zip(result["time"], result["coherence"], strict=True):
        assert coherence == pytest.approx(math.exp(-t / t2), rel=1e-4)


def test_a_detuning_that_stays_dephases_as_a_gaussian(psyfi: Service) -> None:
    result = psyfi.simulate({"duration": 60, "t1": 1e9, "t_phi": 1e9, "spread": 0.05})
    for t, coherence in zip(result["time"], result["coherence"], strict=True):
        assert coherence == pytest.approx(math.exp(-((0.05 * t) ** 2) / 2), abs=0.005)
    assert result["t2_star"] == pytest.approx(math.sqrt(2) / 0.05, rel=0.01)


def test_a_detuning_that_changes_follows_kubo(psyfi: Service) -> None:
    result = psyfi.simulate({"duration": 50, "spread": 0.2, "correlation_time": 4, "members": 400})
    chi = (0.2 * 4) ** 2 * (math.exp(-50 / 4) + 50 / 4 - 1)
    assert result["closed_form"][-1] == pytest.approx(math.exp(-50 * (1 / 160 + 1 / 60) - chi), rel=1e-4)
    for simulated, exact, error in zip(
        result["coherence"], result["closed_form"], result["standard_error"], strict=True
    ):
        assert abs(simulated - exact) <= 5 * error + 1e-4


def test_an_echo_brings_back_what_a_staying_detuning_took(psyfi: Service) -> None:
    result = psyfi.simulate({"duration": 40, "spread": 0.2, "sequence": "echo"})
    assert result["coherence"][len(result["coherence"]) // 2] < 0.05
    assert result["coherence"][-1] == pytest.approx(math.exp(-40 / result["t2"]), rel=1e-3)
    assert result["t2_estimate"] == pytest.approx(result["t2"], rel=1e-3)


def test_the_inversion_returns_to_its_equilibrium_with_t1(psyfi: Service) -> None:
    result = psyfi.simulate({"duration": 80, "t1": 40, "equilibrium": -0.5})
    assert result["inversion"][-1] == pytest.approx(-0.5 * (1 - math.exp(-2)), rel=1e-4)


def test_the_curve_has_as_many_points_as_asked_made_odd(psyfi: Service) -> None:
    result = psyfi.simulate({"points": 10})
    assert len(result["time"]) == len(result["coherence"]) == 11
    assert (result["time"][0], result["time"][-1], result["coherence"][0]) == (0.0, 100.0, 1.0)


def test_the_same_seed_gives_the_same_answer_and_another_seed_another(psyfi: Service) -> None:
    first = psyfi.simulate({"correlation_time": 5}, seed="fixed-seed")
    assert psyfi.simulate({"correlation_time": 5}, seed="fixed-seed") == first
    assert psyfi.simulate({"correlation_time": 5}, seed=7)["coherence"] != first["coherence"]


def test_the_answer_does_not_depend_on_the_process(psyfi: Service) -> None:
    process = start_service(OVERLAY_PORT="0", PYTHONHASHSEED="42")
    other = Service(process, http.client.HTTPConnection(*address_of(process), timeout=DEADLINE_S))
    try:
        assert other.simulate({"correlation_time": 5}) == psyfi.simulate({"correlation_time": 5})
    finally:
        other.connection.close()
        assert stop_service(process, signal.SIGINT) == (0, "")


def test_a_bare_body_does_as_well_as_an_envelope(psyfi: Service) -> None:
    bare = {"simulation_type": "quantum_coherence", "parameters": {"duration": 100}, "seed": "s"}
    assert psyfi.call("POST", "/run", bare)[1]["result"] == psyfi.simulate({"duration": 100}, seed="s")


def test_degradation_takes_fewer_members_and_leaves_extras_out(psyfi: Service) -> None:
    whole = psyfi.simulate({"members": 100})
    saved = psyfi.simulate({"members": 100}, memory={"max_fraction": 0.7, "disable_nonessential": True})
    assert saved["members"] == 70
    assert saved["degraded"] == {
        "members_asked": 100,
        "left_out": ["standard_error", "inversion", "closed_form"],
    }
    assert whole.keys() - saved.keys() == {"standard_error", "inversion", "closed_form"}


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (400, b"", "not JSON"),
        (400, b"{", "not JSON"),
        (400, b"[]", "one JSON object"),
        (400, b'{"payload": 5}', "payload must be an object"),
        (400, b'{"simulation_type":"quantum_coherence","parameters":[]}', "parameters must be an object"),
        (400, b'{"simulation_type":"quantum_coherence","memory":{"max_fraction":"x"}}', "max_fraction"),
        (400, b'{"simulation_type":"quantum_coherence","parameters":{"t1":NaN}}', "NaN"),
        (422, b"{}", "known: quantum_coherence"),
        (422, b'{"simulation_type":["quantum_coherence"]}', "known: quantum_coherence"),
        (422, b'{"simulation_type":"quantum_coherence","parameters":{"t3":1}}', "no parameter 't3'"),
        (422, b'{"simulation_type":"quantum_coherence","parameters":{"duration":-1}}', "duration is -1"),
        (422, b'{"simulation_type":"quantum_coherence","parameters":{"members":2.5}}', "a whole number"),
        (422, b'{"simulation_type":"quantum_coherence","parameters":{"t1":true}}', "t1 is True"),
        (422, b'{"simulation_type":"quantum_coherence","parameters":{"sequence":[]}}', "ramsey or echo"),
        (422, b'{"simulation_type":"quantum_coherence","parameters":{"duration":1e9}}', "steps"),
        (422, b'{"simulation_type":"quantum_coherence","seed":[]}', "seed"),
    ],
)
def test_a_bad_body_is_answered_with_a_sentence(psyfi: Service, status: int, body: bytes, words: str) -> None:
    answered, reply = psyfi.call("POST", "/run", body)
    assert (answered, reply["ok"], reply["code"]) == (status, False, "BAD_INPUT")
    assert words in reply["error"]


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/other", 404), ("GET", "/run", 405), ("DELETE", "/health", 405)]
)
def test_a_wrong_address_or_method_is_answered_in_json(psyfi: Service, method: str, path: str, status: int) -> None:
    answered, reply = psyfi.call(method, path)
    assert (answered, reply["ok"]) == (status, False)


def test_a_body_that_is_too_large_or_of_unknown_length_is_refused_and_the_connection_closed(psyfi: Service) -> None:
    for header, status in (("Content-Length: 99999999", 413), ("Transfer-Encoding: chunked", 411)):
        with socket.create_connection((psyfi.connection.host, psyfi.connection.port), DEADLINE_S) as raw:
            raw.sendall(f"POST /run HTTP/1.1\r\nHost: x\r\n{header}\r\n\r\n".encode())
            answer = b"".join(iter(lambda: raw.recv(4096), b""))  # ends only where the service closes
        assert answer.startswith(f"HTTP/1.1 {status} ".encode())
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["ok"] is False


def test_a_request_left_half_sent_does_not_keep_others_waiting(psyfi: Service) -> None:
    with socket.create_connection((psyfi.connection.host, psyfi.connection.port), DEADLINE_S) as raw:
        raw.sendall(b"POST /run HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
        assert psyfi.call("GET", "/health")[0] == 200


def test_the_request_in_hand_is_answered_before_the_service_ends() -> None:
    process = start_service("--port", "0")
    address = address_of(process)
    body = envelope({"simulation_type": "quantum_coherence", "parameters": {"members": 2}})
    with socket.create_connection(address, DEADLINE_S) as raw:
        raw.sendall(b"POST /run HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(body))
        assert raw.recv(4096).startswith(b"HTTP/1.1 100 ")  # so the service has the request in hand
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(ConnectionError):
            while True:
                socket.create_connection(address, DEADLINE_S).close()
        raw.sendall(body)
        answer = b"".join(iter(lambda: raw.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"\r\nConnection: close\r\n" in answer
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["ok"] is True
    assert process.communicate(timeout=DEADLINE_S)[1] == ""
    assert process.returncode == 0


def test_a_second_signal_ends_the_service_at_once() -> None:
    process = start_service("--port", "0")
    address = address_of(process)
    with socket.create_connection(address, DEADLINE_S) as raw:
        raw.sendall(b"POST /run HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 9\r\n\r\n")
        assert raw.recv(4096).startswith(b"HTTP/1.1 100 ")
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(ConnectionError):
            while True:
                socket.create_connection(address, DEADLINE_S).close()
        assert stop_service(process, signal.SIGINT) == (-signal.SIGINT, "")


def test_no_code_of_a_shipped_overlay_looks_like_one_of_the_bus() -> None:
    for source in OVERLAYS.rglob("*.py"):
        assert re.findall(r"\bERR_[A-Z_]+", source.read_text("utf-8")) == [], source


def test_a_port_in_use_is_said_and_ends_the_service(psyfi: Service) -> None:
    process = start_service("--port", str(psyfi.connection.port))
    _, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1
    assert errors.startswith("psyfi cannot listen on 127.0.0.1:")
