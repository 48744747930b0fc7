"""What vpsd accepts: requests, the load of the machine, its configuration and its command line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import namedtuple
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from harness import CAPTURED, FILES, copy_program, rows

import vpsd
from cerebrum.fields import describe
from cerebrum.settings import ConfigError, Environment
from cerebrum.text.languages import LANGUAGES
from cerebrum_common import HttpError
from vpsd import CpuMeter, check_cpu, load_config, parse_inference

# -------------------------------------------------------------------------------------- the request

BASE = {"model": "m", "prompt": "p"}
SAID = {"role": "user", "content": "x"}
# A value that each field refuses, and the field's rule; tests/test_common.py has the values that a
# rule refuses. llama.cpp takes this seed as random.
RULES = f"""
model          | ""          | a string from 1 to 200 characters
prompt         | ""          | a non-empty string
max_tokens     | -1          | an integer from 0 to 2048
temperature    | 1.1         | a number from 0 to 1
top_p          | 0           | a number above 0 to 1
seed           | 4294967295  | an integer from 0 to 4294967294
stop           | [""]        | a string, or an array of 0 to 16 non-empty strings
suffix         | 1           | a string
filename       | "{1001 * "x"}" | a string from 0 to 1000 characters
language       | "cobol"     | one of {", ".join(LANGUAGES)}
mode           | "chat"      | one of complete, infill, instruct
stop_at        | "end"       | one of auto, none
progress       | 1           | true or false
session        | ""          | a string from 1 to 200 characters
extra          | "x"         | an array of 0 to 256 objects
predict_ms     | -1          | an integer from 0 to 600000
min_confidence | 1.01        | a number from 0 to 1
"""
TALK = {"model": "m", "messages": [SAID]}
BAD_REQUESTS = json.loads("""[
    [{}, "model: expected a string from 1 to 200 characters, got nothing"],
    [{"model": "m"}, "prompt: expected a non-empty string, or messages instead of it"],
    [{"model": "m", "prompt": "p", "messages": [{"role": "user", "content": "x"}]},
     "prompt: expected a non-empty string, or messages instead of it"],
    [{"model": "m", "messages": [{"role": "user", "content": "x"}], "suffix": "s"},
     "suffix: expected only beside prompt, not beside messages"],
    [{"model": "m", "messages": null}, "messages: expected an array of 1 to 100 objects, got null"],
    [{"model": "m", "messages": [{"role": "user"}]},
     "messages[0].content: expected a string, got nothing"],
    [{"model": "m", "prompt": "p", "extra": [{"text": "x"}, {}]},
     "extra[1].text: expected a non-empty string, got nothing"]]""")
TOO_MANY = "messages: expected an array of 1 to 100 objects, got an array of 101"
BAD_REQUESTS.append([TALK | {"messages": [SAID] * 101}, TOO_MANY])
for name, text, rule in rows(RULES):
    value = json.loads(text)
    message = f"{name}: expected {rule}, got {describe(value)}"
    BAD_REQUESTS.append([BASE | {name: value}, message])


def test_bad_request() -> None:
    for body, message in BAD_REQUESTS:
        with pytest.raises(HttpError) as caught:
            parse_inference(body)
        assert (caught.value.code, caught.value.message) == ("INVALID_REQUEST", message)


DEFAULTS = json.loads("""{
    "messages": null, "max_tokens": 512, "temperature": 0.4, "top_p": null, "seed": null,
    "suffix": null, "filename": "", "language": "", "mode": "complete",
    "stop_at": "auto", "indent": 0, "heal": false, "special": false, "progress": false,
    "priority": "normal", "session": null, "extra": [], "predict_ms": 0, "min_confidence": null,
    "instruction": null, "prompt_ms": 0}""")
DEFAULTS["stop"] = ()


GOOD_REQUESTS = json.loads("""[
    [{}, {}],
    [{"stop": "x"}, {"stop": ["x"]}],
    [{"temperature": 1, "max_tokens": 0, "seed": 4294967294}, {"temperature": 1.0}],
    [{"suffix": ""}, {"mode": "infill"}],
    [{"suffix": "", "mode": "complete"}, {}]]""")
GOOD_REQUESTS.append([{"prompt": "", "extra": [{"text": "x"}]}, {"extra": [("", "x")]}])


def test_request() -> None:
    for given, read in GOOD_REQUESTS:
        request = parse_inference(BASE | given | {"unknown": 1})
        assert asdict(request) == BASE | DEFAULTS | given | read
        assert isinstance(request.temperature, float)


def test_a_request_of_messages() -> None:
    read = {"prompt": "", "messages": [("user", "x")], "mode": "instruct"}
    assert asdict(parse_inference(TALK)) == BASE | DEFAULTS | read


# ---------------------------------------------------------------------------------------- admission


def config(**more: str) -> vpsd.Config:
    """The configuration from these variables alone."""
    given = {"CEREBRUM_MODELS_FILE": str(Path(vpsd.__file__).with_name("models.toml")), **more}
    return load_config(Environment(given))


BUSY = "expected other programs to use at most 70 % of the CPU, got 71 %"


def test_a_busy_machine() -> None:
    check_cpu(70.0, 70.0)
    with pytest.raises(HttpError) as caught:
        check_cpu(71.0, 70.0)
    assert (caught.value.status, caught.value.code) == (503, "RESOURCE_EXHAUSTED")
    assert caught.value.message == BUSY


def test_cpu_meter_counts_others_without_ourselves(patch: Any):
    times = namedtuple("times", "user nice system idle iowait irq softirq steal guest guest_nice")
    second = times(50.0, 5.0, 20.0, 20.0, 4.0, 0.0, 0.0, 1.0, 50.0, 0.0)
    nothing = times(*[0.0] * 10)  # no time has passed, or the system counts none
    idle = times(0.0, 0.0, 0.0, 100.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    readings = iter([idle, second, idle, nothing])
    patch(vpsd.psutil, "cpu_times_percent", lambda: next(readings))
    patch(vpsd.psutil, "cpu_count", lambda: 2)
    own = SimpleNamespace(cpu_percent=lambda: 80.0)  # of one CPU
    patch(vpsd.psutil, "Process", lambda: own)
    meter = CpuMeter()
    assert (meter.system_percent, meter.others_percent) == (0.0, 0.0)
    meter.sample()  # 40 % are our own, and 5 % those of niced programs, which may work on
    assert (meter.system_percent, meter.others_percent) == (75.0, 30.0)
    for _ in (idle, nothing):  # no figure falls below 0
        meter.sample()
        assert (meter.system_percent, meter.others_percent) == (0.0, 0.0)


# ------------------------------------------------------------------------------------------- config


WRONG = """
VPS_PORT        | 65536 | expected a number from 0 to 65535, got '65536'
THREADS         | 0     | expected a number from 1 to 256, got '0'
N_CTX           | 100   | expected a number from 256 to 131072, got '100'
KV_TYPE         | q4_0  | expected one of f16, q8_0, got 'q4_0'
CACHE_MB        | -1    | expected a number from 0 to 65536, got '-1'
DRAFT           | 2     | expected a number from 0 to 1, got '2'
DRAFT           | 0.5   | expected an integer, got 0.5
MAX_CONCURRENT  | 0     | expected a number from 1 to 16, got '0'
MAX_CPU_PERCENT | 101   | expected a number from 1 to 100, got '101'
MIN_FREE_MB     | 1e3   | expected a number from 0 to 1048576, got '1e3'
IDLE_MINUTES    | -1    | expected a number from 0 to 1048576, got '-1'
MODELS_FILE     | /no   | /no: [Errno 2] No such file or directory: '/no'
"""


@pytest.mark.parametrize(("name", "value", "message"), rows(WRONG))
def test_config_names_the_wrong_variable(name, value, message) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**{f"CEREBRUM_{name}": value})
    assert str(caught.value) == f"CEREBRUM_{name}: {message}"


def test_a_user_without_a_home_needs_a_folder_for_the_state(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda _: {}[0])
    message = r"^CEREBRUM_STATE_DIR: expected a path, got '~/.*there is no such home$"
    with pytest.raises(ConfigError, match=message):
        config()
    assert config(CEREBRUM_STATE_DIR="/state").engine.state_dir == Path("/state")


UNKNOWN = f"vpsd fetch: expected one of {', '.join(FILES)}, got 'x'"
NO_KEY = "vpsd: CEREBRUM_API_KEY: expected a key, got none; make one with ./generate_api_key.sh"


def test_command_line(tmp_path: Path):
    copy_program("vpsd", tmp_path)  # because a .env may lie beside the original
    environment = {"HOME": f"{tmp_path}", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, tmp_path / "vpsd.py"]
    for arguments, code, message in ((["fetch", "x"], 1, UNKNOWN), ([], 2, NO_KEY)):
        ended = subprocess.run([*command, *arguments], env=environment, **CAPTURED)
        assert (ended.returncode, ended.stdout, ended.stderr.strip()) == (code, "", message)
