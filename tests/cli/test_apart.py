"""`shuteye serve`: its command line is read by a child, whose every outcome is the command's."""

import os
import subprocess
import sys

SERVE = """
import sys
from shuteye.cli import apart
from shuteye.frontend.engine_process import EngineProcess
from shuteye.server import launch

def run(order, zygote, process):
    engine, server = order.engines[0], order.server
    print(engine.model, engine.cache_dir, server.port, server.api_key, "cyclopts" in sys.modules, zygote.pid > 0)
    return 7

launch.serve = run
EngineProcess.tell = lambda *_: None  # there is no such model
sys.exit(apart.serve())
"""


def serve(*arguments, directory):
    """Exit status, stdout and stderr of `shuteye serve` with a recorder in the server's place; it leaves no file."""
    command = (sys.executable, "-c", SERVE, "serve", *arguments)
    environment = os.environ | {"TMPDIR": str(directory)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert not list(directory.glob("shuteye-*"))
    return done.returncode, done.stdout, done.stderr


def test_what_the_child_read_is_served_here_without_its_libraries(tmp_path):
    """Would catch a setting lost between the processes, the exit status too, and the memory that reading takes."""
    arguments = ("tiny", "--cache-dir", str(tmp_path), "--port", "81", "--api-key", "secret")
    assert serve(*arguments, directory=tmp_path) == (7, f"tiny {tmp_path} 81 secret False True\n", "")


def test_a_wrong_command_line_and_a_question_for_help_serve_nothing(tmp_path):
    """Would catch a server that starts all the same, an exit status of 0, and a message that is told twice."""
    code, told, complaint = serve("--port", "-1", directory=tmp_path)
    assert (code, told, complaint.count("port must be")) == (2, "", 1)
    code, told, complaint = serve("--help", directory=tmp_path)
    assert (code, told.count("Usage: shuteye serve"), complaint) == (0, 1, "")


def test_a_child_that_is_lost_is_no_success():
    """Would catch a start script that believes in a server that never was."""
    lost = "from shuteye.cli import main; import os; main.run = lambda **_: os.kill(os.getpid(), 9)\n"
    done = subprocess.run([sys.executable, "-c", lost + SERVE, "serve"], capture_output=True, text=True, check=False)
    assert done.returncode not in (0, 7)


STOPPED = """
import os, signal, time
from shuteye.cli import apart, main

def run(**_):
    while not handled():  # by the parent
        time.sleep(0.01)
    os.kill(os.getppid(), signal.SIGTERM)
    signal.pause()

def handled():
    lines = open(f"/proc/{os.getppid()}/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("SigCgt")).split()[1], 16) & 1 << signal.SIGTERM - 1

main.run = run
apart.serve()
"""


def test_a_signal_before_the_command_line_is_read_ends_all_three(tmp_path):
    """Would catch a child or an engine that goes on, and the directory of its socket: either holds these pipes open."""
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", STOPPED]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=60)
    assert (done.returncode, done.stdout, done.stderr, list(tmp_path.iterdir())) == (0, "", "", [])
