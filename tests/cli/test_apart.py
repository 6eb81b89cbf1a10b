"""`shuteye serve`: its command line is read by a child, whose every outcome is the command's."""

import subprocess
import sys

SERVE = """
import sys
from shuteye.cli.apart import serve
from shuteye.server import launch

def run(engine, server):
    print(engine.model, engine.cache_dir, server.port, server.api_key, "cyclopts" in sys.modules)
    return 7

launch.serve = run
sys.exit(serve())
"""


def serve(*arguments):
    """Exit status, stdout and stderr of `shuteye serve` with a recorder in the server's place."""
    command = (sys.executable, "-c", SERVE, "serve", *arguments)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def test_what_the_child_read_is_served_here_without_its_libraries(tmp_path):
    """Would catch a setting lost between the processes, the exit status too, and the memory that reading takes."""
    found = serve("tiny", "--cache-dir", str(tmp_path), "--port", "81", "--api-key", "secret")
    assert found == (7, f"tiny {tmp_path} 81 secret False\n", "")


def test_a_wrong_command_line_and_a_question_for_help_serve_nothing():
    """Would catch a server that starts all the same, an exit status of 0, and a message that is told twice."""
    code, told, complaint = serve("--port", "-1")
    assert (code, told, complaint.count("port must be")) == (2, "", 1)
    code, told, complaint = serve("--help")
    assert (code, told.count("Usage: shuteye serve"), complaint) == (0, 1, "")


def test_a_child_that_is_lost_is_no_success():
    """Would catch a start script that believes in a server that never was."""
    lost = "from shuteye.cli import main; import os; main.run = lambda: os.kill(os.getpid(), 9)\n"
    done = subprocess.run([sys.executable, "-c", lost + SERVE, "serve"], capture_output=True, text=True, check=False)
    assert done.returncode not in (0, 7)
