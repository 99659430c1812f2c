"""How a script ends: one line, and the exit code that says why."""

import signal
import subprocess
import sys

import pytest
from small_runs import ROOT

SCRIPT = (
    "import time\nfrom common.errors import UserError, run_script\ndef main():\n    {}\nrun_script(main)\n"
)


def run(body: str, *, send: int | None = None, before: str = "") -> tuple[int, str]:
    script = before + SCRIPT.format(body)
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    if send is not None:
        process.stdout.readline()  # it has begun
        process.send_signal(send)
    err = process.communicate(timeout=60)[1]
    return process.returncode, err


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("raise UserError('first\\nsecond')", "error: first second"),
        ("raise UserError('a\\u202eb')", "error: a\\u202eb"),
        ("open('/nowhere/at/all')", "error: [Errno 2]"),
        ("raise MemoryError", "error: memory does not suffice"),
        ("bytearray(2**62)", "error: memory does not suffice"),
        ("import torch; torch.empty(2**50)", "error: memory does not suffice"),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_exit_code_2(body, says):
    code, err = run(body)
    assert code == 2
    assert err.startswith(says)
    assert err.count("\n") == 1


def test_a_library_that_may_not_write_so_much_is_a_full_disk(tmp_path):
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (99, 99))\n"
    saving = f"save_file({{'x': torch.ones(99)}}, {str(tmp_path / 'x')!r})"
    code, err = run(f"import torch; from safetensors.torch import save_file; {saving}", before=limit)
    assert (code, err) == (
        2,
        "error: the disk is full (file too large): free some, and the same command goes on\n",
    )


def test_a_bug_keeps_its_traceback():
    code, err = run("raise RuntimeError('a shape')")
    assert code == 1
    assert "Traceback" in err


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_ends_a_script_with_one_line_and_the_code_of_shells(name):
    number = getattr(signal, name)
    code, err = run("print(flush=True); time.sleep(60)", send=number)
    assert code == 128 + number
    assert err == f"interrupted by {name}; the same command goes on where it stopped\n"


def test_what_nohup_ignores_stays_ignored():
    ignore = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    code, err = run("print(flush=True); time.sleep(1)", send=signal.SIGHUP, before=ignore)
    assert (code, err) == (0, "")
